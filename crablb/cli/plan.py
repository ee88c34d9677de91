"""``crablb plan``: what another configuration would change of a running load balancer, without changing it."""

from __future__ import annotations

import argparse

from crablb.api import types
from crablb.cli import asking, planned


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "plan",
        help="say what a configuration would change, and which connections it would move; exit status 0: nothing, 1:"
        " something, 2: it has faults",
    )
    parser.add_argument(
        "file",
        metavar="FILE.toml",
        nargs="?",
        help="the configuration (default: the file that it serves, as it is now)",
    )
    asking.add_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    text = asking.configuration(args.file) if args.file is not None else ""
    with asking.sent(args.file), asking.client(args) as client:
        plan = client.post("/v1/plan", types.Plan, text)
    if args.json:
        asking.print_json(plan)
    else:
        planned.show(plan)
    return int(planned.changes(plan))
