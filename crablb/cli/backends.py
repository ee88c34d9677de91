"""``crablb backends``: each server, whether it serves, and why."""

from __future__ import annotations

import argparse
from itertools import groupby

from crablb.api import types
from crablb.cli import asking


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "backends", help="the backends of a running load balancer: whether each serves, and why"
    )
    parser.add_argument("vip", metavar="VIP", nargs="?", help="of this service alone (default: of all)")
    asking.add_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    with asking.client(args) as client:
        backends = client.get("/v1/backends", list[types.Backend], vip=args.vip)
    if args.json:
        asking.print_json(backends)
        return 0
    for number, (vip, group) in enumerate(groupby(backends, lambda backend: backend.service)):
        if number:
            print()
        print(vip)
        asking.print_table(HEADS, [_row(backend) for backend in group], numbers=range(2, 9))
    return 0


HEADS = ["  backend", "state", "since", "weight", "share", "conns", "redir", "flows", "load", "why"]


def _row(backend: types.Backend) -> list[str]:
    weight = str(backend.weight)
    if backend.serving and backend.weight_now != backend.weight:
        weight = f"{backend.weight_now}/{weight}"
    remarks = [backend.reason] if backend.reason else []
    if not backend.cr:
        remarks.append(f"not redirected to: {backend.cr_reason}")
    if backend.changed:
        remarks.append("changed at run time")
    return [
        f"  {backend.address}",
        "serves" if backend.serving else backend.state if backend.state != "up" else "down",
        asking.since(backend.since),
        weight,
        f"{backend.share:.0%}",
        "-" if backend.connections is None else f"{backend.connections:,}",
        "-" if backend.assigned is None else f"{backend.assigned:,}",
        f"{backend.flows:,}",
        "-" if backend.load is None else f"{backend.load:.2f}",
        "; ".join(remarks),
    ]
