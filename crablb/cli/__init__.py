"""The ``crablb`` command.  Each module here is one command and has ``add_parser``.

Only the module of the command that is given is imported: a daemon does not carry the lab, nor an agent the engine.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module

from crablb.errors import CrablbError

COMMANDS = ("serve", "status", "agent", "key", "lab", "demo", "bench")


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the command as an exception does, so that what was made is removed."""

    def end(*_: object) -> None:
        sys.exit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 2 for anything that the user can mend."""
    parser = argparse.ArgumentParser(
        prog="crablb", description="Layer-4 load balancing by connection redirection, over AF_XDP."
    )
    argv = sys.argv[1:] if argv is None else argv
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in argv[:1] if argv and argv[0] in COMMANDS else COMMANDS:
        import_module(f"crablb.cli.{command}").add_parser(commands)
    args = parser.parse_args(argv)
    try:
        with _terminable():
            return int(args.run(args))
    except CrablbError as error:
        for line in str(error).splitlines():
            print(f"crablb: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 1
