"""``crablb maint``: a backend gets no new connections, and no checks, until it is ready; those that it has go on."""

from __future__ import annotations

import argparse

from crablb.cli import changing


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "maint", help="have a backend get no new connections, and no checks, until it is ready; those that it has go on"
    )
    changing.add_arguments(parser)
    parser.set_defaults(run=changing.run_state, state="maint")
