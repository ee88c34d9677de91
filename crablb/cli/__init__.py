"""The ``crablb`` command.  Each module here is one command and has ``add_parser``.

Only the module of the command that is given is imported: a daemon does not carry the lab, nor an agent the engine.
"""

from __future__ import annotations

import argparse
import errno
import faulthandler
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import NoReturn

from crablb.cli import streams
from crablb.errors import ConfigError, CrablbError, starved
from crablb.version import VERSION

# NumPy's linear algebra would start threads when it is imported, which keep what capabilities a command had then.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def _import_structlog() -> None:
    """Alone: it imports rich where that is installed, to show tracebacks with, and no daemon is to carry that."""
    if {"structlog", "rich"} & sys.modules.keys():  # another program's, which calls main()
        return
    sys.modules["rich"] = None  # type: ignore[assignment]  # as one that is not installed: see import_module()
    try:
        import_module("structlog")
    finally:
        del sys.modules["rich"]


#: Those whose process must not end by what tells others to read or to log anew: what it has in the kernel would stay.
LASTING = ("serve", "agent", "remove")
COMMANDS = (
    "quickstart",
    "serve",
    "check",
    "plan",
    "reload",
    "takeover",
    "diff",
    "save",
    "status",
    "services",
    "backends",
    "flows",
    "events",
    "top",
    "weight",
    "drain",
    "drain-lb",
    "maint",
    "ready",
    "explain",
    "trace",
    "capture",
    "doctor",
    "log-level",
    "remove",
    "agent",
    "config",
    "key",
    "lab",
    "demo",
    "bench",
    "completion",
)


#: Commands that others' programs have, and what is meant by them here: the first that there is.
MEANT: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("configure", "init", "install", "setup"), ("quickstart",)),
    **dict.fromkeys(("create", "new"), ("up", "quickstart")),
    **dict.fromkeys(("delete", "destroy", "rm", "uninstall"), ("down", "remove")),
    **dict.fromkeys(("list", "ls"), ("services", "status")),
    **dict.fromkeys(("ps", "show", "stats"), ("status",)),
    **dict.fromkeys(("test", "validate"), ("check",)),
    **dict.fromkeys(("enable", "undrain"), ("ready",)),
    "disable": ("maint",),
    "help": ("--help",),
    "restart": ("systemctl restart crablb",),
    "run": ("serve", "exec"),
    "set-weight": ("weight",),
    "start": ("serve", "up"),
    "stop": ("down", "systemctl stop crablb", "remove"),
    "version": ("--version",),
    "watch": ("top",),
}


class Parser(argparse.ArgumentParser):
    """What is wrong with arguments is told as everything else is: in a line, without the usage."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is not None and value not in action.choices:
            what = "/".join(action.option_strings) or action.metavar or action.dest
            from crablb.values import near  # seldom, and what it brings takes longer than the rest

            known = tuple(map(str, action.choices))
            if isinstance(action, argparse._SubParsersAction):
                for meant in MEANT.get(str(value), ()):
                    if (
                        meant in known
                        or meant in self._option_string_actions
                        or (" " in meant and self.prog == "crablb")
                    ):
                        self.error(f"{what}: there is no {value!r}; did you mean {meant}?")
            hint = near(str(value), known, f"there are {', '.join(known)}")
            self.error(f"{what}: there is no {value!r}; {hint}")


class _Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        if VERSION == "unknown":
            raise CrablbError("crablb is not installed, so its version is not known; install it: pip install .")
        print(f"crablb {VERSION}")
        parser.exit()


def make_parser(names: Sequence[str] = COMMANDS) -> Parser:
    """The parser of these commands."""
    parser = Parser(
        prog="crablb",
        description="Layer-4 load balancing by connection redirection, over AF_XDP.",
        epilog="Exit status: 0, done; 2, refused, and why is told; 130, Ctrl-C. Of commands that ask a load balancer"
        " also 3, none can be asked; 4, it is not known whether a change was made. What 1 is, the command says.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show crablb's version and exit")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    if set(names) & set(LASTING):
        _import_structlog()
    for name in names:
        import_module(f"crablb.cli.{name.replace('-', '_')}").add_parser(commands)
    for each in parsers(parser):
        for action in each._actions:
            # ArgumentDefaultsHelpFormatter would show None and False as well, and be of no use to manual pages.
            shown = action.default not in (None, False, "", [], argparse.SUPPRESS)
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
        from crablb.values import near

        # Those of the commands: what stands before a command, behind it is unknown.
        commands = [each for each in parsers(parser) if each is not parser] or [parser]
        known = tuple(flag for each in commands for action in each._actions for flag in action.option_strings)
        flags = [word for word in unknown if word.startswith("-")] or unknown
        see = f"see {' '.join(['crablb', *names])} --help"
        raise ConfigError(
            [
                f"argument {word!r} is of no use here, or stands in the wrong place; {see}"
                if word in known
                else f"unknown argument {word!r}; {_elsewhere(word, names) or near(word, known, see)}"
                for word in flags
            ]
        )
    return args


def _elsewhere(word: str, names: Sequence[str]) -> str:
    """Whose option it is, if it is one of other commands than these."""
    flag = word.partition("=")[0]
    if not (names and flag.startswith("--")):
        return ""
    # Not those of what a daemon must not import (main()), which are few.
    every = parsers(make_parser([name for name in COMMANDS if name != "top"]))
    progs = sorted({each.prog for each in every if flag in each._option_string_actions})
    if not progs:
        return ""
    see = f"see crablb {' '.join(names)} --help"
    return f"it is an option of {', '.join(progs[:3])}{', ...' if len(progs) > 3 else ''}; {see}"


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


def _take_signals(command: str) -> None:
    """Have signals come, whatever whoever started us made of them: what is blocked, or ignored as SIGCHLD may be, stays
    so in a program that is started.  Then nothing but SIGKILL would end us, and no program that we start be waited for.
    """
    if command in LASTING:
        for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)  # until it takes them, if it does
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signal.valid_signals())


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status: 2 for anything that the user can mend, 3 if nobody is there to ask, 4 if
    it is not known whether a change was made."""
    if argv is None:
        command = "".join(sys.argv[1:2])
        _take_signals(command)
        if command in LASTING:
            # structlog imports it where it is there, for colours that no daemon shows: 5 MiB.
            sys.modules["rich"] = None  # type: ignore[assignment]
            with suppress(OSError, RuntimeError, ValueError):  # there is no standard error
                # Whoever ends what has hung by SIGABRT, as systemd does, learns where each thread was.
                faulthandler.enable()
    try:
        streams.prepare()
        try:
            args = _parse(sys.argv[1:] if argv is None else argv)
        except SystemExit:  # of --help, --version
            sys.stdout.flush()
            raise
        with _terminable():
            args.program = argv is None  # else this one's arguments are not the program's
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
    except (OSError, MemoryError, RuntimeError, ImportError) as error:
        told = starved(error) or (_told(error) if isinstance(error, OSError) else None)
        if not told:
            raise
        streams.complain(str(told))
        return 2


def _told(error: OSError) -> str:
    """What an error of the system means that nobody expected where it came."""
    remedy = ""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        remedy = "; raise the limit: ulimit -n, LimitNOFILE= in a systemd unit"
    elif error.errno == errno.EROFS and str(error.filename).startswith("/proc"):
        remedy = "; it is mounted read-only: mount -o remount,rw /proc/sys, or let a privileged container do it"
    elif str(error.filename).startswith("/proc"):
        remedy = "; mount it: mount -t proc proc /proc"
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}{remedy}"
