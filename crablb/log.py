"""Structured logs: readable on a terminal, JSON lines everywhere else, always on standard error.

Lines are written by a thread of its own: whoever logs never waits for whoever reads.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import select
import stat
import sys
import threading
from collections import deque
from contextlib import suppress

import structlog

from crablb.errors import printable

_always: dict[str, object] = {}

STDERR = 2
LINES = 10_000  # that wait for a reader at most
FLUSH = 1.0  # seconds that the end of the process waits for one


def always(**what: object) -> None:
    """Have this in every line of this process from now on."""
    _always.update(what)


def _add_always(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    return {**_always, **event}


def to_standard_error() -> None:
    """As structlog has it, but there, unless the program has configured it: standard output is the program's."""
    if not structlog.is_configured():
        structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))


class _Writer:
    """A file to write to without waiting.  What there is no room for is lost, and counted in the next line."""

    def __init__(self, fd: int = STDERR) -> None:
        self.path = ""  # of standard error as it was at the start, if that is a file
        self._fd = fd
        self.reset()
        os.register_at_fork(after_in_child=self.reset)  # threads do not come along, and locks may be held

    def reset(self) -> None:
        self._changed = threading.Condition()
        self._lines: deque[tuple[str, int]] = deque()  # and how many each stands for
        self._lost, self._reason = 0, ""
        self._busy = False
        self._begun = False  # a line that could not be ended
        self._thread: threading.Thread | None = None

    def write(self, line: str) -> None:
        with self._changed:
            if len(self._lines) >= LINES:
                self._lose(1, "nobody read them")
                return
            if self._lost:
                told = {"event": "log lines were lost", "lines": self._lost, "reason": self._reason}
                self._lines.append((json.dumps(told) + "\n", self._lost))
                self._lost = 0
            self._lines.append((line, 1))
            if not self._thread:
                thread = threading.Thread(target=self._run, name="crablb-log", daemon=True)
                with suppress(RuntimeError):  # there is no memory for one: with a later line, or when somebody waits
                    thread.start()
                    self._thread = thread
            self._changed.notify_all()

    def _lose(self, lines: int, reason: str) -> None:
        self._lost, self._reason = self._lost + lines, reason

    def flush(self) -> None:
        """What the logger calls after each line."""

    def wait(self, seconds: float) -> None:
        """Until all is written, or so long."""
        with self._changed:
            if self._thread:
                self._changed.wait_for(lambda: not (self._lines or self._busy), seconds)
                return
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        while self._lines and poll.poll(seconds * 1000):
            self._write_next()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._lines)
                self._busy = True
            self._write_next()

    def _write_next(self) -> None:
        line, lines = self._lines.popleft()
        data = whole = (b"\n" if self._begun else b"") + line.encode(errors="replace")
        try:
            while data:
                data = data[self._write(data) :]
            self._begun = False
        except OSError as error:  # closed, full: that is told by the next line that can be written
            self._begun = self._begun or len(data) < len(whole)
            with self._changed:
                self._lose(lines, error.strerror or str(error))

    def _write(self, data: bytes) -> int:
        # Not by sys.stderr, whose lock the end of the interpreter wants.
        while True:
            try:
                return os.write(self._fd, data)
            except BlockingIOError:  # others have made the pipe so, and it is full
                poll = select.poll()
                poll.register(self._fd, select.POLLOUT)
                poll.poll()


_writer = _Writer()


def flush() -> None:
    """Give what was logged a moment to be written: before the process ends, or writes to standard error itself."""
    _writer.wait(FLUSH)


def pass_on(line: str) -> None:
    """What another process wants logged, as it is."""
    _writer.write(line)


def adopt(fd: int) -> None:
    """Go on in another process' log, by its descriptor, which stays the caller's."""
    flush()
    os.dup2(fd, STDERR)
    _writer.path = _file()


def _file() -> str:
    """The regular file that standard error is, by name; empty if it is something else."""
    with suppress(OSError):
        if stat.S_ISREG(os.fstat(STDERR).st_mode):
            return os.readlink(f"/proc/self/fd/{STDERR}")
    return ""


def reopen() -> None:
    """The log was moved away, as logrotate(8) does: go on in a new file of its name, if it is a file at all."""
    path = _writer.path
    if path:
        try:
            file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        except OSError as error:
            structlog.get_logger().warning("cannot open the log anew", file=path, reason=error.strerror)
            return
        os.dup2(file, STDERR)
        os.close(file)
    structlog.get_logger().info("the log was opened anew" if path else "the log is no file: there is nothing to open")


_LEVELS = ("debug", "info", "warning", "error")
_least = "info"


def level() -> str:
    """The least that is logged."""
    return _least


def set_level(name: str) -> None:
    """``name``: debug, info, warning or error.  For loggers that are in use as well."""
    global _least  # noqa: PLW0603 - there is one log
    if name not in _LEVELS:
        raise ValueError(f"no level {name}; there are {', '.join(_LEVELS)}")
    _least = name


def _filter(_: object, method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    if logging.getLevelNamesMapping()[method.upper()] < logging.getLevelNamesMapping()[_least.upper()]:
        raise structlog.DropEvent
    return event


def _tame(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
    """For a terminal, which shows strings as they are.  JSON has an escape for whatever it would obey."""
    for key, value in event.items():
        if isinstance(value, str):
            text = printable(value)
            event[key] = text if key in ("exception", "stack") else " ".join(text.splitlines())
    return event


def set_up(level: str = "info") -> None:
    """``level``: debug, info, warning or error."""
    set_level(level)
    _writer.path = _file()
    atexit.register(flush)
    renderers: list[structlog.typing.Processor] = (
        [_tame, structlog.dev.ConsoleRenderer()]
        if sys.stderr.isatty()
        else [structlog.processors.JSONRenderer(default=str)]
    )
    structlog.configure(
        processors=[
            _filter,
            structlog.contextvars.merge_contextvars,
            _add_always,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            *renderers,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.DEBUG),
        logger_factory=structlog.WriteLoggerFactory(_writer),  # type: ignore[arg-type]
        cache_logger_on_first_use=True,
    )
