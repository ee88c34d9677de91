"""Work that is never done, and is begun anew when it fails.

What fails for want of memory, or because a table changed under it, works the next time.  What was not done meanwhile is
done then, so whoever fails says so, is counted, and is not given up at once.
"""

from __future__ import annotations

import asyncio
import math
import os
import select
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import structlog

from crablb.errors import why

__all__ = ["Pauses", "in_thread", "keep", "keep_in_thread", "late", "show_name", "task", "wait"]

#: Seconds before what failed is begun anew: the first time, doubled each time, at most.
FIRST, LONGEST = 1.0, 10.0
#: Seconds of work after which a failure is the first again.
CALM = 60.0
#: Failures in a row before it is given up.
TRIES = 30

#: Seconds of sleep after which a thread shows that it lives.
BEAT = 0.5

log = structlog.get_logger()


class _Pulse:
    """Of a thread of :func:`keep_in_thread`."""

    def __init__(self, name: str) -> None:
        self.name, self.beats, self.marked = name, 0, -1


_pulses: dict[int, _Pulse] = {}  # by thread


def show_name() -> None:
    """Have the kernel know this thread's name, as ``ps -L`` and ``top -H`` show it: 15 bytes of it."""
    with suppress(OSError):
        Path("/proc/thread-self/comm").write_text(threading.current_thread().name)


def wait(poll: select.poll, seconds: float = math.inf) -> list[tuple[int, int]]:
    """Wait as ``poll`` does; a thread of :func:`keep_in_thread` shows meanwhile that it lives."""
    end = time.monotonic() + seconds
    while True:
        if pulse := _pulses.get(threading.get_ident()):
            pulse.beats += 1
        left = max(end - time.monotonic(), 0)
        if (ready := poll.poll(min(left, BEAT) * 1000)) or left <= BEAT:
            return ready


def late() -> list[str]:
    """The threads of :func:`keep_in_thread` that have not shown life since the last time that all had."""
    pulses = list(_pulses.copy().values())
    found = [pulse.name for pulse in pulses if pulse.beats == pulse.marked]
    if not found:
        for pulse in pulses:
            pulse.marked = pulse.beats
    return found


class Pauses:
    """How long to wait after each failure."""

    def __init__(self) -> None:
        self.failures = 0

    def after(self, worked: float) -> float:
        """Seconds, after a failure of what had worked for ``worked`` seconds."""
        self.failures = 1 if worked >= CALM else self.failures + 1
        return min(FIRST * (1 << min(self.failures - 1, 10)), LONGEST)


def _say(name: str, error: Exception, pause: float, failed: Callable[[], None]) -> None:
    if not threading.main_thread().is_alive():  # the program ends: there are no new threads, and nobody is to mend it
        return
    with suppress(Exception):  # there may not even be the memory to say it
        failed()
        log.error("a background task failed; it is begun anew", task=name, seconds=pause, **why(error))


async def keep(name: str, work: Callable[[], Awaitable[None]], failed: Callable[[], None] = lambda: None) -> None:
    """Run ``work`` until it returns; ``failed`` is called each time that it raises.

    Raises what it raised when it failed :data:`TRIES` times in a row.
    """
    pauses, pause = Pauses(), 0.0
    while True:
        began = time.monotonic()
        try:
            await asyncio.sleep(pause)
            began = time.monotonic()
            return await work()
        except Exception as error:
            pause = pauses.after(time.monotonic() - began)
            if pauses.failures >= TRIES:
                raise
            _say(name, error, pause, failed)


def task(
    name: str,
    work: Callable[[], Awaitable[None]],
    failed: Callable[[], None] = lambda: None,
    given_up: Callable[[str], None] = lambda _: None,
) -> asyncio.Task[None]:
    """:func:`keep` as a task of the running event loop; ``given_up`` is told why it will not be done any more."""

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()):
            log.error("a background task is given up", task=name, **why(error))
            given_up(f"task {name} failed: {error!r}")

    made = asyncio.create_task(keep(name, work, failed))
    made.add_done_callback(ended)
    return made


def keep_in_thread(name: str, work: Callable[[], None], stop: int) -> None:
    """Run ``work`` until it returns, or until there is something to read, or nobody at the other end, at ``stop``.

    It waits by :func:`wait`; :func:`late` tells if it does not any more, or the thread has ended otherwise.
    """
    this, pauses = threading.get_ident(), Pauses()
    _pulses[this] = _Pulse(name)
    show_name()
    poll = select.poll()
    poll.register(stop, select.POLLIN | select.POLLHUP)
    while True:
        began = time.monotonic()
        try:
            work()
            break
        except Exception as error:
            pause = pauses.after(time.monotonic() - began)
            _say(name, error, pause, lambda: None)
        try:
            if wait(poll, pause):
                break
        except OSError:  # poll(2) has no memory either
            time.sleep(FIRST)
    del _pulses[this]


@contextmanager
def in_thread(name: str, work: Callable[[int], None]) -> Iterator[None]:
    """While in the context, a thread of :func:`keep_in_thread` works; ``work`` gets the descriptor at whose other end
    nobody is any more (POLLHUP) when it is to return, which is waited for."""
    stop, stopped = os.pipe()
    thread = threading.Thread(
        target=keep_in_thread, args=(name, lambda: work(stop), stop), name=f"crablb-{name}", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        os.close(stopped)
        thread.join()
        os.close(stop)
