"""``crablb save``: what was changed at run time becomes part of the configuration's file."""

from __future__ import annotations

import argparse

from crablb.api import types
from crablb.cli import asking


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "save",
        help="write what was changed at run time into the configuration's file; the one before stays, as FILE.bak",
    )
    asking.add_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    with asking.client(args) as client:
        applied = client.post("/v1/save", types.Applied)
    if args.json:
        asking.print_json(applied)
    else:
        asking.print_changes(applied.changes, applied.warnings)
    return 0
