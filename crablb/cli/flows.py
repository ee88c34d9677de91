"""``crablb flows``: the fallback flows that the XDP program knows."""

from __future__ import annotations

import argparse

from crablb.api import types
from crablb.cli import asking
from crablb.errors import ConfigError
from crablb.values import counted


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "flows",
        help="the connections that go by fallback; redirected ones need nothing of the load balancer, so it has none",
    )
    parser.add_argument("--vip", metavar="VIP", help="of this service")
    parser.add_argument("--backend", metavar="ADDRESS", help="of this backend")
    parser.add_argument("--client", metavar="ADDRESS[:PORT]", help="of this client")
    parser.add_argument("--limit", metavar="N", default="100", help="how many at most, up to 10000")
    parser.add_argument("--count", action="store_true", help="only how many each backend has")
    asking.add_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.count:
        return _count(args)
    if not (args.limit.isascii() and args.limit.isdigit() and len(args.limit) < 10):
        raise ConfigError(f"--limit: {args.limit!r} is not a whole number")
    with asking.client(args) as client:
        found = client.get(
            "/v1/flows", types.Flows, vip=args.vip, backend=args.backend, client=args.client, limit=args.limit
        )
    if args.json:
        asking.print_json(found)
        return 0
    rows = [[flow.service, flow.backend, flow.state, f"{flow.idle:.0f}s", flow.hash] for flow in found.flows]
    asking.print_table(["service", "backend", "state", "idle", "hash"], rows, numbers=(3,))
    print((f"{len(rows):,} of " if found.truncated else "") + counted(found.total, "flow"))
    return 0


def _count(args: argparse.Namespace) -> int:
    if (args.vip, args.backend, args.client) != (None, None, None):
        raise ConfigError("--count is of all flows: leave --vip, --backend and --client out")
    with asking.client(args) as client:
        told = client.get("/v1/flows/count", types.FlowCount)
    if args.json:
        asking.print_json(told)
        return 0
    rows = [[vip, address, f"{n:,}"] for vip, backends in told.services.items() for address, n in backends.items()]
    asking.print_table(["service", "backend", "flows"], rows, numbers=(2,))
    print(counted(told.total, "flow"))
    return 0
