"""An agent's process: it installs, says that it is ready, and waits until it is to end."""

from __future__ import annotations

import math
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Protocol

import structlog

from crablb import lasting
from crablb import log as logging
from crablb.agent.base import Agent
from crablb.cli import streams
from crablb.control import notify
from crablb.kernel.signals import caught

log = structlog.get_logger()

#: Seconds after which the service manager is told how we are, if it does not ask more often whether we live.
STATUS = 10.0
SIGNALS = {signal.SIGTERM, signal.SIGINT, signal.SIGQUIT}


@dataclass
class Work:
    """``make`` gives the agent of the network namespace where it is called, and raises what is wrong there.

    ``meanwhile``: what else is to be done while it works; ``wait``: seconds for connections to end, at the end.
    """

    make: Callable[[], Agent]
    detach: bool
    meanwhile: Callable[[], AbstractContextManager[None]] = nullcontext
    wait: float = 0


class Orders(Protocol):
    """By what an agent's process is told what to do.  ``process``: the one to be ended if the agent is to end."""

    process: int

    def begin(self) -> None:
        """Before anything is installed."""

    def stays(self) -> bool:
        """Whether what is installed is to stay so."""

    def until_end(self, summary: Callable[[], str]) -> bool:
        """Wait until it is to end; false if nobody is there any more who has connections.  ``summary``: how it is."""

    def asked(self, seconds: float) -> bool:
        """Wait so long for word to end at once; whether it came."""


def serve(work: Work, orders: Orders) -> None:
    agent = work.make()
    orders.begin()
    with agent.owned(orders.process):
        agent.install()
        stays, left = False, 0
        try:
            if not orders.stays():
                return
            if stays := work.detach:
                return
            with work.meanwhile():
                if orders.until_end(agent.summary):
                    agent.withdraw()
                    left = agent.drain(work.wait, orders.asked)
        finally:
            if not (stays or left):
                agent.remove()
    if left:
        log.warning("connections go on by what stays in the kernel", connections=left, remove="crablb agent remove")


def ready() -> None:
    notify.notify("READY=1")
    # To a pipe that is full, print would wait for whoever does not read it, and the agent never end.
    poll = select.poll()
    poll.register(1, select.POLLOUT)
    if sys.stdout is not sys.__stdout__ or poll.poll(0):
        with suppress(streams.UnwritableError):  # closed, full: whom does it concern?
            print("ready", flush=True)


def endure() -> None:
    """The signals by which others are told to read or to log anew do not end an agent: what it has in the kernel would
    stay."""
    for number in (signal.SIGHUP, signal.SIGUSR2):
        signal.signal(number, lambda *_: None)
    signal.signal(signal.SIGUSR1, lambda *_: logging.reopen())


class Manager:
    """The service manager, for a thread that waits: it is told now and then how we are, and that all threads live."""

    def __init__(self, summary: Callable[[], str], late: Callable[[], list[str]] = lasting.late) -> None:
        self._summary, self._watchdog = summary, notify.Watchdog(late)
        self._said, self._due = "", math.inf

    def ready(self) -> None:
        """All is there: say so, and how we are from now on."""
        ready()
        self._due = time.monotonic()

    def left(self) -> float:
        """Seconds in which :meth:`tell` has nothing to do."""
        return min(max(self._due - time.monotonic(), 0), STATUS)

    def tell(self) -> None:
        if time.monotonic() < self._due:
            return
        self._due = time.monotonic() + (self._watchdog.interval or STATUS)
        if self._watchdog.interval:
            self._watchdog.look()
        with suppress(OSError):  # no descriptor to read the state by
            if (said := self._summary()) != self._said and notify.status(said):
                self._said = said


class Signals:
    """Of a process of its own: a service manager's, or a terminal's."""

    def __init__(self) -> None:
        self.process = os.getpid()

    def begin(self) -> None:
        # Waited for below; blocked before anything is installed, so that none comes in between.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)

    def stays(self) -> bool:
        return True

    def until_end(self, summary: Callable[[], str]) -> bool:
        manager = Manager(summary)
        manager.ready()
        while not caught(SIGNALS, manager.left()):
            manager.tell()
        notify.notify("STOPPING=1")
        return True

    def asked(self, seconds: float) -> bool:
        return bool(caught(SIGNALS, seconds))
