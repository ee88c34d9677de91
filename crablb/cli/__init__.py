"""The ``crablb`` command.  Each module here is one command and has ``add_parser``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from crablb.cli import agent, bench, demo, key, lab, serve, status
from crablb.errors import CrablbError


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 2 for anything that the user can mend."""
    parser = argparse.ArgumentParser(
        prog="crablb", description="Layer-4 load balancing by connection redirection, over AF_XDP."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (serve, status, agent, key, lab, demo, bench):
        command.add_parser(commands)
    args = parser.parse_args(argv)
    try:
        return int(args.run(args))
    except CrablbError as error:
        for line in str(error).splitlines():
            print(f"crablb: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 1
