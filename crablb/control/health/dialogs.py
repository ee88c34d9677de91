"""Conversations with servers, many at once in one event loop: each a generator that waits for a descriptor.

No task and no future a conversation: of tcp checks there may be thousands in a second.  The loop polls one epoll
instance that has all descriptors: uvloop ends the watch of a descriptor that reports an error, as a refused connection
does (:mod:`crablb.kernel.reader`).
"""

from __future__ import annotations

import asyncio
import errno
import resource
import select
import time
from collections import deque
from collections.abc import Callable, Generator
from typing import NamedTuple

import structlog

from crablb.errors import why
from crablb.seldom import Seldom

__all__ = ["Answer", "Dialog", "Dialogs", "Silent", "room"]

#: Descriptors that are looked after before the event loop has its turn: a TLS handshake takes a millisecond.
BATCH = 16
#: Conversations that are begun before it has.
BEGUN = 32
#: Descriptors that are the rest of the process's; of the others checks may have one in two.
REST = 256
#: Seconds that a conversation may take to clear away after its time.
GRACE = 1.0
#: Seconds after the end of a conversation's time at which it is not the server that is late.
LATE = 0.05
#: What keeps this host from asking, and says nothing of the server.
OWN = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM, errno.EADDRNOTAVAIL, errno.EACCES, errno.EPERM,
       errno.EAFNOSUPPORT, errno.ENETDOWN}  # fmt: skip

log = structlog.get_logger()


class Answer(NamedTuple):
    """What came of one check.

    ``ok``: None, if it could not be tried, or what came back tells nothing of the backend.  ``reason``: in words.
    ``percent``: of its weight that the backend is to have; ``drain``: whether it is to get nothing new; None: nothing
    was said of it.  ``decisive``: it holds at once, whatever came before.  ``own``: this host
    kept it from being tried, which says nothing of the server.
    """

    ok: bool | None
    reason: str
    percent: int | None = None
    drain: bool | None = None
    decisive: bool = False
    own: bool = False


#: Yields a descriptor and the events (epoll(7)) to wait for; returns the answer.
Dialog = Generator[tuple[int, int], None, Answer]


class Silent(Exception):
    """Raised inside of a conversation whose time is over."""


def _refused(error: OSError) -> Answer:
    """What an error of a socket says."""
    if error.errno in OWN:
        return Answer(None, f"could not be tried: {error.strerror}", own=True)
    words = {errno.ECONNREFUSED: "refused", errno.ECONNRESET: "reset", errno.ETIMEDOUT: "no answer"}
    return Answer(False, words.get(error.errno or 0, (error.strerror or repr(error)).lower()))


def room() -> int:
    """How many descriptors checks may have at a time."""
    limit = min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 1 << 20)
    return max(8, (limit - REST) // 2)


def _ready(held: _Held) -> bool:
    poll = select.poll()
    poll.register(held.fd, held.events)
    return bool(poll.poll(0))


class _Held:
    """One that is under way, or waits for a place."""

    __slots__ = ("asked", "began", "dialog", "done", "events", "fd", "late", "timeout", "timer")

    def __init__(self, dialog: Dialog, timeout: float, done: Callable[[Answer, float], None]) -> None:
        self.dialog, self.timeout, self.done = dialog, timeout, done
        self.fd, self.events = -1, 0  # what it waits for
        self.asked, self.began = time.monotonic(), 0.0
        self.late = False  # it had its time, and was given as much again
        self.timer: asyncio.TimerHandle | None = None


class Dialogs:
    """Holds conversations from :meth:`start` to :meth:`close`, ``room`` at a time; others wait for a place."""

    def __init__(self, room: int) -> None:
        self.room = room
        self._waiting: deque[_Held] = deque()
        self._held: set[_Held] = set()
        self._by_fd: dict[int, _Held] = {}
        self._filling: asyncio.Handle | None = None
        self._seldom = Seldom()

    def __len__(self) -> int:
        return len(self._held) + len(self._waiting)

    @property
    def waiting(self) -> tuple[int, float]:
        """How many wait for a place, and for how many seconds the first of them has."""
        return len(self._waiting), time.monotonic() - self._waiting[0].asked if self._waiting else 0.0

    def start(self) -> None:
        """In the running event loop.  Raises OSError."""
        self._loop = asyncio.get_running_loop()
        self._epoll = select.epoll()
        self._loop.add_reader(self._epoll, self._look)

    def close(self) -> None:
        """Break off all that there are; nobody is answered."""
        self._waiting.clear()
        if self._filling:
            self._filling.cancel()
        for held in self._held:
            if held.timer:
                held.timer.cancel()
            held.dialog.close()
        self._held.clear()
        self._by_fd.clear()
        self._loop.remove_reader(self._epoll)
        self._epoll.close()

    def hold(self, dialog: Dialog, timeout: float, done: Callable[[Answer, float], None]) -> None:
        """``done`` is given the answer, and the seconds it took; perhaps before this returns.  ``timeout``: seconds."""
        held = _Held(dialog, timeout, done)
        if len(self._held) < self.room and not self._waiting:
            self._begin(held)
        else:
            self._waiting.append(held)
            self._fill_soon()

    def _fill_soon(self) -> None:
        if self._filling is None and self._waiting and len(self._held) < self.room:
            self._filling = self._loop.call_soon(self._fill)

    def _fill(self) -> None:
        self._filling = None
        for _ in range(min(BEGUN, len(self._waiting), self.room - len(self._held))):
            self._begin(self._waiting.popleft())
        self._fill_soon()

    def _begin(self, held: _Held) -> None:
        self._held.add(held)
        held.began = time.monotonic()
        self._step(held)

    def _look(self) -> None:
        for fd, _ in self._epoll.poll(0, BATCH):
            if held := self._by_fd.get(fd):
                self._step(held)

    def _silent(self, held: _Held) -> None:
        if not held.late and time.monotonic() - held.began - held.timeout > LATE and _ready(held):
            held.late, held.timer = True, None  # the answer is here, and it is this process that had no time
            return self._step(held)
        held.timer = self._loop.call_later(GRACE, self._give_up, held)
        self._step(held, Silent())

    def _give_up(self, held: _Held) -> None:
        held.timer = None
        held.dialog.close()
        self._finish(held, Answer(False, f"no answer in {held.timeout:g} s"))

    def _step(self, held: _Held, error: Exception | None = None) -> None:
        try:
            fd, events = held.dialog.throw(error) if error else held.dialog.send(None)
            self._await(held, fd, events)
        except StopIteration as end:
            self._finish(held, end.value)
        except Silent:
            self._finish(held, Answer(False, f"no answer in {held.timeout:g} s"))
        except OSError as refusal:
            held.dialog.close()
            self._finish(held, _refused(refusal))
        except Exception as fault:  # ours; the others go on
            if times := self._seldom.due("failed"):
                log.error("a check failed", times=times, **why(fault))
            self._finish(held, Answer(None, f"could not be tried: {fault!r}", own=True))

    def _await(self, held: _Held, fd: int, events: int) -> None:
        held.events = events
        if held.fd != fd:
            held.fd = fd
            self._by_fd[fd] = held
            self._epoll.register(fd, events | select.EPOLLONESHOT)
        else:
            self._epoll.modify(fd, events | select.EPOLLONESHOT)
        if held.timer is None:
            held.timer = self._loop.call_later(held.timeout, self._silent, held)

    def _finish(self, held: _Held, answer: Answer) -> None:
        """The descriptor is closed, so epoll has forgotten it."""
        if held.timer:
            held.timer.cancel()
        if self._by_fd.get(held.fd) is held:
            del self._by_fd[held.fd]
        self._held.discard(held)
        held.done(answer, time.monotonic() - held.began)
        self._fill_soon()
