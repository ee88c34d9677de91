"""``crablb weight``: a backend's share of new connections."""

from __future__ import annotations

import argparse

from crablb.api import types
from crablb.cli import asking, changing
from crablb.errors import ConfigError
from crablb.values import MAX_WEIGHT


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("weight", help="give a backend another share of new connections")
    changing.add_arguments(parser)
    parser.add_argument("weight", metavar="N", help=f"0 to {MAX_WEIGHT}; 0: it gets none")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    text = args.weight
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise ConfigError(f"N: {text!r} is not a whole number from 0 to {MAX_WEIGHT}")
    with asking.client(args) as client:
        applied = changing.change(client, args, types.Patch(weight=int(text)))
    if args.json:
        asking.print_json(applied)
    else:
        asking.print_changes(applied.changes, applied.warnings)
    return 0
