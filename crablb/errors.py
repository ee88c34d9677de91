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
