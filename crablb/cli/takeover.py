"""``crablb takeover``: the program that is installed now serves in place of the one that runs."""

from __future__ import annotations

import argparse
import sys

from crablb.api import types
from crablb.api.client import ApiError, Client, UnansweredError, discover
from crablb.cli import asking
from crablb.values import parse_interface

#: Seconds that it may take: crablb.control.succession gives up earlier.  For one that is stopped, or hangs, as it would
#: do what it was told when it goes on.
SECONDS, PATIENCE = 115.0, 5.0


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "takeover",
        help="have the program that is installed now, with the configuration as it is now, serve in place of the load"
        " balancer that runs: an upgrade, or a restart, that no connection notices; wait until it does",
        epilog="Exit status: 0, the new one serves; 1, it does not (the reason is told), and the old one goes on; 2,"
        " you may not, or the arguments are wrong; 3, none runs; 4, no answer came: look (crablb status).",
    )
    asking.add_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    name = parse_interface(args.interface) if args.interface is not None else None
    path = discover(name)
    try:
        with Client(path, timeout=PATIENCE) as client:
            client.get("/v1/version", types.Version)
        with Client(path, timeout=SECONDS) as client:
            applied = client.post("/v1/takeover", types.Applied)
    except UnansweredError:
        raise
    except ApiError as error:
        if args.json:
            asking.print_json(types.Problems(problems=error.problems))
        for problem in error.problems:
            print(f"crablb: {problem}", file=sys.stderr)
        return 1
    if args.json:
        asking.print_json(applied)
    else:
        asking.print_changes(applied.changes)
    return 0
