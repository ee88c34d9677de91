"""``crablb log-level``: the least that a running load balancer logs."""

from __future__ import annotations

import argparse

from crablb.api import types
from crablb.cli import asking


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("log-level", help="change the least that a running load balancer logs, until it ends")
    parser.add_argument("level", choices=["debug", "info", "warning", "error"], help="the least that is logged")
    asking.add_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    with asking.client(args) as client:
        applied = client.post("/v1/log-level", types.Applied, types.LogLevel(level=args.level))
    if args.json:
        asking.print_json(applied)
    else:
        asking.print_changes(applied.changes, applied.warnings)
    return 0
