"""``crablb reload``: a running load balancer reads its configuration again, and says what that has changed."""

from __future__ import annotations

import argparse

from crablb.api import types
from crablb.cli import asking, planned


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "reload",
        help="have the configuration read again, and say what that has changed, or every fault of it (exit status 2:"
        " nothing has changed then)",
    )
    parser.add_argument(
        "--discard", action="store_true", help="give up what was changed at run time (crablb diff tells it)"
    )
    asking.add_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    with asking.client(args) as client:
        plan = client.post(f"/v1/reload{'?discard=true' if args.discard else ''}", types.Plan)
    if args.json:
        asking.print_json(plan)
    else:
        planned.show(plan)
    return 0
