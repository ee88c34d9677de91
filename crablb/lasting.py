"""Work that is never done, and is begun anew when it fails.

What fails for want of memory, or because a table changed under it, works the next time.  What was not done meanwhile is
done then, so whoever fails says so, is counted, and is not given up at once.
"""

from __future__ import annotations

import asyncio
import select
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

import structlog

from crablb.errors import CrablbError

__all__ = ["Pauses", "keep", "keep_in_thread", "task"]

#: Seconds before what failed is begun anew: the first time, doubled each time, at most.
FIRST, LONGEST = 1.0, 10.0
#: Seconds of work after which a failure is the first again.
CALM = 60.0
#: Failures in a row before it is given up.
TRIES = 30

log = structlog.get_logger()


class Pauses:
    """How long to wait after each failure."""

    def __init__(self) -> None:
        self.failures = 0

    def after(self, worked: float) -> float:
        """Seconds, after a failure of what had worked for ``worked`` seconds."""
        self.failures = 1 if worked >= CALM else self.failures + 1
        return min(FIRST * (1 << min(self.failures - 1, 10)), LONGEST)


def _why(error: BaseException) -> dict[str, object]:
    """What the machine refuses is a reason; anything else is our fault, and whoever mends it wants to see where."""
    refused = isinstance(error, OSError | MemoryError | CrablbError)
    return {"reason": str(error) or type(error).__name__} if refused else {"exc_info": error}


def _say(name: str, error: Exception, pause: float, failed: Callable[[], None]) -> None:
    if not threading.main_thread().is_alive():  # the program ends: there are no new threads, and nobody is to mend it
        return
    with suppress(Exception):  # there may not even be the memory to say it
        failed()
        log.error("a background task failed; it is begun anew", task=name, seconds=pause, **_why(error))


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
            log.error("a background task is given up", task=name, **_why(error))
            given_up(f"task {name} failed: {error!r}")

    made = asyncio.create_task(keep(name, work, failed))
    made.add_done_callback(ended)
    return made


def keep_in_thread(name: str, work: Callable[[], None], stop: int) -> None:
    """Run ``work`` until it returns, or until there is something to read, or nobody at the other end, at ``stop``."""
    pauses = Pauses()
    while True:
        began = time.monotonic()
        try:
            return work()
        except Exception as error:
            pause = pauses.after(time.monotonic() - began)
            _say(name, error, pause, lambda: None)
        poll = select.poll()
        poll.register(stop, select.POLLIN | select.POLLHUP)
        if poll.poll(pause * 1000):
            return
