"""What a process is given when it starts: standard streams, files that may be open, where programs are."""

from __future__ import annotations

import io
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from crablb.errors import CrablbError, printable

#: How many files may be open: less than the first is refused, and if it can be had, there may be the second.
FEWEST_FILES, FILES = 64, 65536
#: Where ip(8), tc(8) and the like are; not every user's PATH says so.
SBIN = ("/usr/local/sbin", "/usr/sbin", "/sbin")


class UnwritableError(CrablbError):
    """Standard output takes nothing."""


class UnreadError(UnwritableError):
    """Nobody reads it any more, as of ``| head``."""


class _Output(io.TextIOWrapper):
    """Standard output, whose errors cannot be taken for others', nor swallowed with them.

    Raises :class:`UnwritableError`.
    """

    def write(self, text: str) -> int:
        with _refusing():
            return super().write(text)

    def flush(self) -> None:
        with _refusing():
            super().flush()


@contextmanager
def _refusing() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        discard()
        raise UnreadError from None
    except OSError as error:
        discard()
        raise UnwritableError(f"cannot write to standard output: {error.strerror or error}") from None


def prepare() -> None:
    """Make up for what is missing.  Raises :class:`CrablbError` if that cannot be."""
    _fill()
    path = os.environ.get("PATH", os.defpath).split(os.pathsep)
    os.environ["PATH"] = os.pathsep.join([*path, *(folder for folder in SBIN if folder not in path)])
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or soft < min(hard, FILES):
        soft = FILES if hard == resource.RLIM_INFINITY else min(hard, FILES)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft < FEWEST_FILES:
        raise CrablbError(
            f"{soft} files may be open at most, and crablb needs {FEWEST_FILES} or more; raise the limit: ulimit -n,"
            " LimitNOFILE= in a systemd unit"
        )


def _fill() -> None:
    """Open what is closed of the three: else the next socket or map would be standard error.

    What is written to standard output is refused then, as the user should know; what is written to standard error is
    lost.
    """
    for number, mode in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            with suppress(OSError):  # no /dev: so be it
                os.open(os.devnull, mode)
    # The interpreter made none of them.
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - for good
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
    # Else it is somebody else's, who runs this command.
    if sys.__stdout__ in (None, sys.stdout) and isinstance(sys.stdout, io.TextIOWrapper):
        tty, encoding = sys.stdout.isatty(), sys.stdout.encoding
        # Names of files are bytes, and are shown as those that they are.
        output = _Output(sys.stdout.detach(), encoding, "surrogateescape", line_buffering=tty)
        sys.stdout = sys.__stdout__ = output  # type: ignore[misc]


def discard() -> None:
    """Write no more to standard output, nor what was printed and waits."""
    output = sys.__stdout__
    if output and output is sys.stdout:
        with suppress(OSError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.close(null)
            output.flush()


def complain(text: str) -> None:
    """A line on standard error for each of the text's, if anything can be written there."""
    with suppress(OSError, ValueError):
        print("\n".join(f"crablb: {line}" for line in printable(text).splitlines()), file=sys.stderr, flush=True)
