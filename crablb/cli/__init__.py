"""The ``crablb`` command.  Each module here is one command and has ``add_parser``.

Only the module of the command that is given is imported: a daemon does not carry the lab, nor an agent the engine.
"""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import NoReturn

from crablb.cli import streams
from crablb.errors import ConfigError, CrablbError
from crablb.values import near

# NumPy's linear algebra would start threads when it is imported, which keep what capabilities a command had then.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

#: Those whose process must not end by what tells others to read or to log anew: what it has in the kernel would stay.
LASTING = ("serve", "agent", "remove")
COMMANDS = (
    "serve",
    "status",
    "doctor",
    "services",
    "backends",
    "flows",
    "weight",
    "drain",
    "maint",
    "ready",
    "events",
    "log-level",
    "check",
    "capture",
    "trace",
    "reload",
    "plan",
    "diff",
    "save",
    "remove",
    "agent",
    "config",
    "key",
    "lab",
    "demo",
    "bench",
    "completion",
)


class Parser(argparse.ArgumentParser):
    """What is wrong with arguments is told as everything else is: in a line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is not None and value not in action.choices:
            what = "/".join(action.option_strings) or action.metavar or action.dest
            known = tuple(map(str, action.choices))
            hint = near(str(value), known, f"there are {', '.join(known)}")
            self.error(f"{what}: there is no {value!r}; {hint}")


class _Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"crablb {version('crablb')}")
        except PackageNotFoundError:
            raise CrablbError(
                "crablb is not installed, so its version is not known; install it: pip install ."
            ) from None
        parser.exit()


def make_parser(names: Sequence[str] = COMMANDS) -> Parser:
    """The parser of these commands."""
    parser = Parser(prog="crablb", description="Layer-4 load balancing by connection redirection, over AF_XDP.")
    parser.add_argument("--version", action=_Version, nargs=0, help="show crablb's version and exit")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name in names:
        import_module(f"crablb.cli.{name.replace('-', '_')}").add_parser(commands)
    for each in parsers(parser):
        for action in each._actions:
            # ArgumentDefaultsHelpFormatter would show None and False as well, and be of no use to manual pages.
            shown = action.default not in (None, False, [], argparse.SUPPRESS)
            if shown and action.help and "default:" not in action.help:
                action.help += " (default: %(default)s)"
    return parser


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """It, and those of its commands, and of theirs."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                yield from parsers(each)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Raises :class:`ConfigError`."""
    names = argv[:1] if argv and argv[0] in COMMANDS else [] if list(argv) == ["--version"] else COMMANDS
    parser = make_parser(names)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        # Those of the commands: what stands before a command, behind it is unknown.
        commands = [each for each in parsers(parser) if each is not parser] or [parser]
        known = tuple(flag for each in commands for action in each._actions for flag in action.option_strings)
        flags = [word for word in unknown if word.startswith("-")] or unknown
        see = f"see {' '.join(['crablb', *names])} --help"
        raise ConfigError(
            [
                f"argument {word!r} is of no use here, or stands in the wrong place; {see}"
                if word in known
                else f"unknown argument {word!r}; {near(word, known, see)}"
                for word in flags
            ]
        )
    return args


class _Terminated(SystemExit):
    """By SIGTERM."""


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends the command as an exception does, so that what was made is removed."""

    def end(*_: object) -> None:
        raise _Terminated(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 2 for anything that the user can mend, 3 if nobody is there to ask."""
    if argv is None and sys.argv[1:2] and sys.argv[1] in LASTING:
        for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)  # until it takes them, if it does
        # structlog imports it where it is there, for colours that no daemon shows: 5 MiB.
        sys.modules["rich"] = None  # type: ignore[assignment]
    try:
        streams.prepare()
        try:
            args = _parse(sys.argv[1:] if argv is None else argv)
        except SystemExit:  # of --help, --version
            sys.stdout.flush()
            raise
        with _terminable():
            status = int(args.run(args))
            sys.stdout.flush()
            return status
    except streams.UnreadError:
        return 1
    except CrablbError as error:
        streams.complain(str(error))
        return error.status
    except _Terminated:
        streams.discard()  # whoever does not read it would keep the command from its end
        raise
    except KeyboardInterrupt:
        streams.discard()
        return 130
    except OSError as error:
        streams.complain(_told(error))
        return 2


def _told(error: OSError) -> str:
    """What an error of the system means that nobody expected where it came."""
    remedy = ""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        remedy = "; raise the limit: ulimit -n, LimitNOFILE= in a systemd unit"
    elif str(error.filename).startswith("/proc"):
        remedy = "; mount it: mount -t proc proc /proc"
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}{remedy}"
