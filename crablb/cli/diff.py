"""``crablb diff``: what was changed at run time, and is not in the configuration."""

from __future__ import annotations

import argparse
import sys

from crablb.api import types
from crablb.cli import asking


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "diff",
        help="say what was changed at run time, and is not in the configuration; exit status 0: nothing, 1: something",
    )
    asking.add_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    with asking.client(args) as client:
        found = client.get("/v1/diff", types.Diff)
    if args.json:
        asking.print_json(found)
    else:
        print("\n".join(found.changes) or "nothing was changed at run time")
        if found.changes and found.unsaved:
            print(f"crablb: a restart undoes this: {found.unsaved}", file=sys.stderr)
    return int(bool(found.changes))
