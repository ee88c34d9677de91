"""The process that is to take over from this one: the program that is installed now, with this one's own arguments.

It has this one's folder, environment and standard output.  What it says on standard error goes by this process into its
log, which so knows why it failed; when it serves it has the log itself (:func:`crablb.log.adopt`).
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

from crablb import log as logging
from crablb.errors import KernelError
from crablb.kernel import bpf, capabilities

__all__ = ["FLAG", "Parent", "Successor", "again", "parent"]

FLAG = "--takeover"
#: In a successor's environment: the process that has started it, and descriptors of its log and of the BPF file system
#: that it found outside its mount namespace, where a process without CAP_SYS_PTRACE does not see it (-1: none).
BY = "CRABLB_STARTED_BY"
#: Lines that say why it failed, at most; characters of each.
LINES, LENGTH = 5, 1000
#: Seconds that one has which is told to end; for what it said last.
END, LAST = 5.0, 1.0


def again() -> list[str] | None:
    """The command that started this process, for one more; None: there is no interpreter that could be started."""
    if not sys.executable or getattr(sys, "frozen", False):
        return None
    words = [word for word in sys.orig_argv[1:] if word != FLAG]
    return [sys.executable, *words, FLAG]


class Parent:
    """The process that has started this one as its successor."""

    def __init__(self, pid: int, log: int) -> None:
        self.pid, self._log = pid, log

    @property
    def gone(self) -> bool:
        """Whether it has ended."""
        return os.getppid() != self.pid

    def adopt_log(self) -> None:
        """It has ended, and reads no more what this one says on standard error."""
        logging.adopt(self._log)


def parent() -> Parent | None:
    """Who has started this process; None: somebody else.  Programs that this one starts are not told."""
    words = os.environ.pop(BY, "").split()
    try:
        pid, log, outer = map(int, words)
        os.set_inheritable(log, False)
        if outer >= 0:
            os.set_inheritable(outer, False)
            bpf.take_outer(outer)
    except (ValueError, OSError):
        return None
    return Parent(pid, log)


class Successor:
    """Made and watched in the event loop.  Raises :class:`KernelError` if it cannot be started."""

    def __init__(self, command: Sequence[str]) -> None:
        try:
            log, outer = os.dup(logging.STDERR), bpf.outer()  # this process may end before it can hand it over
            try:
                with capabilities.lent():
                    self._child = subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stderr=subprocess.PIPE,
                        env={**os.environ, BY: f"{os.getpid()} {log} {outer}"},
                        pass_fds=(log,) if outer < 0 else (log, outer),
                    )
            finally:
                os.close(log)
            self._watch = os.pidfd_open(self._child.pid)
        except OSError as error:
            raise KernelError(f"cannot start {command[0]}: {error.strerror or error}") from None
        self.pid = self._child.pid
        assert self._child.stderr
        self._said, self._rest = deque[str](maxlen=LINES), ""
        self._errors = self._child.stderr.fileno()
        os.set_blocking(self._errors, False)
        self._loop = asyncio.get_running_loop()
        self._ended = asyncio.Event()
        self._silent = asyncio.Event()
        self._loop.add_reader(self._watch, self._end_seen)
        self._loop.add_reader(self._errors, self._read)

    def _end_seen(self) -> None:
        self._loop.remove_reader(self._watch)
        self._ended.set()

    def _read(self) -> None:
        try:
            data = os.read(self._errors, 1 << 16)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._loop.remove_reader(self._errors)
            self._silent.set()
        *lines, self._rest = (self._rest + data.decode(errors="replace")).split("\n")
        if self._rest and (not data or len(self._rest) > LENGTH):
            lines, self._rest = [*lines, self._rest], ""
        for line in lines:
            logging.pass_on(line + "\n")
            # What is logged as it goes is no reason to end, and of a traceback the last line tells enough.
            if line and not line.startswith(("{", " ", "Traceback ")):
                self._said.append(line[:LENGTH].removeprefix("crablb: "))

    async def ended(self) -> str:
        """Wait for its end; why it has ended, as it said last."""
        await self._ended.wait()
        status = self._child.wait()
        await self.let_go()
        if self._said and status >= 0:
            return "; ".join(self._said)
        how = f"by {signal.Signals(-status).name}" if status < 0 else f"with exit status {status}"
        return f"the new process has ended {how}"

    async def let_go(self) -> None:
        """Pass on what it has said before it had the log itself, or before its end."""
        with suppress(TimeoutError):  # a program that it has started may have its standard error, too
            async with asyncio.timeout(LAST):
                await self._silent.wait()

    async def end(self) -> None:
        """Have it end, if it has not yet."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            if not self._ended.is_set():
                signal.pidfd_send_signal(self._watch, number)
            with suppress(TimeoutError):
                async with asyncio.timeout(END):
                    await self._ended.wait()
                break
        self._child.poll()

    def close(self) -> None:
        """Watch it no more."""
        for fd in (self._watch, self._errors):
            self._loop.remove_reader(fd)
        os.close(self._watch)
        assert self._child.stderr
        self._child.stderr.close()
        if self._child.returncode is None:
            self._child.returncode = 0  # it outlives this process: nobody is to be warned of that
