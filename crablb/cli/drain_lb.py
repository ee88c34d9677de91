"""``crablb drain-lb``: open connections leave the load balancer, and wait until it has none."""

from __future__ import annotations

import argparse
import sys
import time

from crablb.api import types
from crablb.api.client import Client
from crablb.cli import asking, changing
from crablb.errors import ConfigError
from crablb.values import counted

#: Seconds between two looks.
PAUSE = 0.5


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "drain-lb",
        help="have open connections leave the load balancer, as far as they can (MPTCP), and wait until they have",
        epilog="Exit status: 0, it has no open connection any more; 1, it has some at the timeout, and goes on.",
    )
    asking.add_arguments(parser)
    parser.add_argument(
        "--withdraw", action="store_true", help='do not announce the VIPs any more either (announce = "arp")'
    )
    changing.add_timeout(parser)
    parser.add_argument("--cancel", action="store_true", help="no more; VIPs that were withdrawn are announced again")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    timeout = changing.timeout(args)
    if args.cancel and (timeout is not None or args.withdraw):
        raise ConfigError("--cancel stands alone")
    with asking.client(args) as client:
        asked = types.DrainLb(cancel=args.cancel, withdraw=args.withdraw)
        found = client.post("/v1/drain-lb", types.Drained, asked)
        if not args.cancel:
            if not found.told:
                print("crablb: no server is told: it takes no reports (report_listen)", file=sys.stderr)
            found = _wait(client, args, timeout, found)
    if args.json:
        asking.print_json(found)
    elif args.cancel:
        print("it is not drained (any more)")
    else:
        _summarize(found)
    return 1 if found.flows and not args.cancel else 0


def _wait(client: Client, args: argparse.Namespace, timeout: float | None, found: types.Drained) -> types.Drained:
    """Until none is left, it is cancelled, or the time is over; says how many are left when that changes."""
    end = None if timeout is None else time.monotonic() + timeout
    before = None
    while True:
        if found.flows != before and not args.json:
            print(f"{counted(found.flows, 'connection')} left", flush=True)
        before = found.flows
        if not found.flows or not found.draining or (end is not None and time.monotonic() >= end):
            return found
        time.sleep(PAUSE if end is None else min(PAUSE, max(0.0, end - time.monotonic())))
        found = client.get("/v1/drain-lb", types.Drained)


def _summarize(found: types.Drained) -> None:
    gone = max(0, found.first - found.flows)
    print(f"{found.first:,} were there; {gone:,} have moved or ended; {found.flows:,} could not move (yet)")
    reasons: dict[str, dict[str, int]] = {}
    for each in found.left:
        where = reasons.setdefault(each.reason, {})
        where[each.backend] = where.get(each.backend, 0) + each.flows
    for reason, where in reasons.items():
        shown = ", ".join(f"{backend} ({n:,})" for backend, n in where.items())
        print(f"  {sum(where.values()):,}: {reason}: {shown}")
    if not found.draining:
        print("it is not drained any more: somebody has cancelled it")
