"""``crablb ready``: a backend gets new connections again, after drain, maint or dead."""

from __future__ import annotations

import argparse

from crablb.cli import changing


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("ready", help="have a backend get new connections again, after drain, maint or dead")
    changing.add_arguments(parser)
    parser.set_defaults(run=changing.run_state, state="up")
