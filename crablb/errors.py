"""Errors that crablb raises.

The text of each is meant for the person who runs the program: what is wrong, where, and how to mend it.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


class CrablbError(Exception):
    """Base of every error that crablb raises on purpose."""

    #: The exit status of a command that it ends.
    status = 2


class ConfigError(CrablbError):
    """A configuration or an argument is wrong.  ``problems`` holds every fault found, one line each."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class KernelError(CrablbError):
    """The kernel refused something."""


def why(error: BaseException) -> dict[str, Any]:
    """For the log: what the machine refuses is a reason; anything else is our fault, and whoever mends it wants to see
    where."""
    refused = isinstance(error, OSError | MemoryError | CrablbError) or starved(error)
    return {"reason": str(error) or type(error).__name__} if refused else {"exc_info": error}


def printable(text: str) -> str:
    """Without what a terminal would obey, but for ends of lines: peers, programs and files name themselves."""
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)


def starved(error: BaseException) -> KernelError | None:
    """What it means that there is no memory, or that Python could start no thread; None of another error."""
    unmapped = isinstance(error, ImportError) and "failed to map segment" in str(error)  # of a library: dlopen(3)
    if isinstance(error, MemoryError) or unmapped or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        what = "there is not enough memory"
    elif isinstance(error, RuntimeError) and str(error) == "can't start new thread":
        what = "no thread can be started"
    else:
        return None
    return KernelError(f"{what}; raise the limits: ulimit -v, ulimit -u, TasksMax= in a systemd unit, or a container's")


def unbound(error: OSError, port: int) -> str:
    """Why a socket cannot have an address, in words, and what mends it."""
    remedies = {
        errno.EADDRINUSE: f"see who has it: ss -lntup sport = :{port}",
        errno.EADDRNOTAVAIL: "take an address that this machine has: ip addr",
        errno.EACCES: "a port below 1024 is root's: take another, or run it as root",
    }
    told = error.strerror or str(error)
    return f"{told}; {remedies[error.errno]}" if error.errno in remedies else told


class Problems:
    """Collects the faults of a configuration, or of arguments, each with its place, before any of it is acted on."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def add(self, where: str, what: str) -> None:
        self.found.append(f"{where}: {what}" if where else what)

    def attempt(self, where: str, parse: Callable[..., T], *args: Any) -> T | None:
        """``parse(*args)``, or None after noting why not."""
        try:
            return parse(*args)
        except CrablbError as error:
            for problem in error.problems if isinstance(error, ConfigError) else [str(error)]:
                self.add(where, problem)
            return None

    def each(self, flag: str, texts: Iterable[str], parse: Callable[[str], T]) -> list[T]:
        """What an argument that may be repeated was given, as far as it can be parsed."""
        parsed = [self.attempt(f"{flag} {text}", parse, text) for text in texts]
        return [value for value in parsed if value is not None]

    def finish(self) -> None:
        """Raises :class:`ConfigError` if anything was found."""
        if self.found:
            raise ConfigError(self.found)
