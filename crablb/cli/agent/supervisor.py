"""Agents in other network namespaces than the process's own: a child in each.

setns(2) is for one thread, and an agent has several; and a child that fails, fails alone.  Children are told what to do
by sockets, not by signals, which terminals and service managers send to all processes there are.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field

import structlog

from crablb import lasting
from crablb import log as logging
from crablb.cli.agent.process import SIGNALS, Manager, Work, serve
from crablb.control import notify
from crablb.errors import ConfigError, CrablbError, KernelError, Problems
from crablb.kernel import netns, pins
from crablb.kernel.netns import Namespace
from crablb.kernel.signals import caught
from crablb.values import counted

log = structlog.get_logger()

#: Seconds between looks at which network namespaces there are.
LOOK = 2.0
#: Seconds until an agent is tried again where it could not be, at first and at most.
FIRST, LAST = LOOK, 32.0
#: What a child is told, and what it tells.
GO, END, GONE, INSTALLED, ALIVE = b"go", b"end", b"gone", b"installed", b"alive"
UNEXPECTED = "its process ended unexpectedly"


def _heard(sock: socket.socket) -> bytes:
    """What the other side says; nothing if it has ended."""
    try:
        return sock.recv(65536)
    except ConnectionError:  # before it had read all that it was told
        return b""


class Told:
    """Of a child: its parent's."""

    def __init__(self, parent: socket.socket) -> None:
        self._parent = parent
        self._watchdog = notify.Watchdog(lasting.late, self._live)
        self.process = os.getppid()

    def begin(self) -> None:
        """The signals are blocked already."""

    def stays(self) -> bool:
        self._parent.send(INSTALLED)
        return _heard(self._parent) == GO

    def until_end(self, summary: Callable[[], str]) -> bool:
        poll = select.poll()
        poll.register(self._parent, select.POLLIN)
        while self._watchdog.interval:
            self._watchdog.look()
            if poll.poll(self._watchdog.interval * 1000):
                break
        return self._told() == END

    def _live(self) -> None:
        with suppress(OSError):  # it has not read what was said before, or has ended, which is found out elsewhere
            self._parent.send(ALIVE, socket.MSG_DONTWAIT)

    def asked(self, seconds: float) -> bool:
        self._parent.settimeout(seconds)
        try:
            return bool(self._told())
        except (TimeoutError, BlockingIOError):
            return False

    def _told(self) -> bytes:
        said = _heard(self._parent)
        if not said:
            # The parent was killed, and so is the child: what is in the kernel stays.  (Children hold the parent's ends
            # of the sockets of those before them; they end from the last to the first.)
            os._exit(1)
        return said


class Child:
    """A process in another network namespace."""

    def __init__(self, namespace: Namespace, work: Work) -> None:
        self.namespace = namespace
        self.why = ""
        self.begun = self.alive = False  # whether it is told to go on, and has said that it lives since the last look
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            status = 1
            try:
                self.socket.close()
                status = _child(namespace, work, theirs)
            finally:
                os._exit(status)
        theirs.close()

    def tell(self, what: bytes) -> None:
        with suppress(OSError):  # it has ended, which is found out elsewhere
            self.socket.send(what)

    def installed(self, manager: Manager) -> str:
        """Wait until it has installed its agent, and then for word; or why it could not."""
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        while not poll.poll(manager.left() * 1000):
            manager.tell()
        said = _heard(self.socket)
        if said == INSTALLED:
            return ""
        os.waitpid(self.pid, 0)
        self.socket.close()
        return said.decode() or UNEXPECTED

    def listen(self) -> None:
        """Take what it has said."""
        with suppress(OSError):  # nothing more, or it has ended before it had read all that it was told
            while said := self.socket.recv(65536, socket.MSG_DONTWAIT):
                if said == ALIVE:
                    self.alive = True
                else:
                    self.why = said.decode()

    def ended(self, block: bool = False) -> bool:
        if not os.waitpid(self.pid, 0 if block else os.WNOHANG)[0]:
            return False
        self.listen()
        self.why = self.why or UNEXPECTED
        self.socket.close()
        return True


def _child(namespace: Namespace, work: Work, parent: socket.socket) -> int:
    orders = Told(parent)
    os.environ.pop("NOTIFY_SOCKET", None)
    logging.always(netns=namespace.name)
    try:
        netns.enter(namespace.path)
        if os.stat(netns.OWN).st_ino != namespace.inode:
            raise KernelError("it is gone, and another one has its place")
        serve(work, orders)
        return 0
    except CrablbError as error:
        parent.send(str(error).encode()[:65536])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        logging.flush()
    return 1


@dataclass
class _Failure:
    """Where an agent could not be installed: why, and when it is tried again."""

    reason: str = ""
    delay: float = FIRST
    due: float = field(default_factory=time.monotonic)

    def again(self, namespace: Namespace, reason: str) -> None:
        if reason != self.reason:
            log.warning("no agent can be in this network namespace now", netns=namespace.name, reason=reason)
        self.reason, self.due = reason, time.monotonic() + self.delay
        self.delay = min(2 * self.delay, LAST)


def _found(names: Iterable[str]) -> list[Namespace]:
    """Those that there are."""
    return Problems().each("", names, netns.find)


class Supervisor:
    """Has a child in each of these network namespaces, for as long as they are there."""

    def __init__(self, work: Work, namespaces: list[Namespace], every: bool) -> None:
        self._work, self._every = work, every
        self._first = namespaces
        #: By these one is found again that has gone and comes back; a process's number may be another one's then.
        self._names = [one.name for one in namespaces if not one.name.startswith("/proc/")]
        self._children: dict[int, Child] = {}
        self._new: list[Namespace] = []
        self._failures: dict[int, _Failure] = {}
        self._manager = Manager(self._summary, self._late)

    def run(self) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS | {signal.SIGCHLD})
        try:
            failed = self._take_up(netns.every() if self._every else self._first)
            if failed and not (self._every and (self._children or not self._work.detach)):
                raise ConfigError([f"{one}: {line}" for one, why in failed.items() for line in why.splitlines()])
            self._go(failed)
            if not self._work.detach:
                self._manager.ready()
                self._follow()
                notify.notify("STOPPING=1")
        finally:
            self._end()

    def _take_up(self, namespaces: Iterable[Namespace]) -> dict[Namespace, str]:
        """Start a child in each, all at once; those that cannot be, and why."""
        started, failed = [], {}
        for one in namespaces:
            try:
                self._children[one.inode] = Child(one, self._work)
            except OSError as error:  # no room for another process now
                failed[one] = f"cannot start its process: {error.strerror}"
            else:
                started.append(one)
        failed |= {one: why for one in started if (why := self._children[one.inode].installed(self._manager))}
        for one in failed:
            self._children.pop(one.inode, None)
        self._new = [one for one in started if one not in failed]
        return failed

    def _go(self, failed: dict[Namespace, str]) -> None:
        for one in self._new:
            self._children[one.inode].tell(GO)
            self._children[one.inode].begun = True
            self._failures.pop(one.inode, None)
        for one, why in failed.items():
            self._failures.setdefault(one.inode, _Failure()).again(one, why)

    def _follow(self) -> None:
        """Until a signal: let go what is gone, and take up what comes."""
        next_look = time.monotonic() + LOOK
        while self._every or self._names or self._children or self._failures:
            self._manager.tell()
            pause = min(max(next_look - time.monotonic(), 0), self._manager.left())
            if caught(SIGNALS | {signal.SIGCHLD}, pause) in SIGNALS:
                return
            for inode, child in list(self._children.items()):
                if child.ended():
                    del self._children[inode]
                    self._failures.setdefault(inode, _Failure()).again(child.namespace, child.why)
            if time.monotonic() >= next_look:
                self._look()
                next_look = time.monotonic() + LOOK
        log.warning("none of the network namespaces is there any more")

    def _late(self) -> list[str]:
        """Where agents have not shown life since the last time that all had."""
        children = [child for child in self._children.values() if child.begun]
        for child in children:
            child.listen()
        late = [child.namespace.name for child in children if not child.alive]
        if not late:
            for child in children:
                child.alive = False
        return late

    def _summary(self) -> str:
        return f"agents in {counted(len(self._children), 'network namespace')}"

    def _look(self) -> None:
        known = [child.namespace for child in self._children.values()]
        if self._every or self._failures or not all(one.stands for one in known):
            # Agents are in a network namespace for the sake of others.
            try:
                known = netns.every(but=pins.owners("client", "server"))
            except OSError:  # without memory or descriptors nobody is known to be gone: at the next look
                return
        there = {one.inode: one for one in known}
        for inode in self._children.keys() - there.keys():
            child = self._children.pop(inode)
            log.warning("this network namespace is gone", netns=child.namespace.name)
            child.tell(GONE)
            child.ended(block=True)
        for inode in self._failures.keys() - there.keys():
            del self._failures[inode]
        wanted = there if self._every else {inode: there[inode] for inode in self._failures}
        wanted |= {one.inode: one for one in _found(self._names)}
        now = time.monotonic()
        due = [one for inode, one in wanted.items() if inode not in self._children and self._due(inode) <= now]
        if due:
            self._go(failed := self._take_up(due))
            for one in due:
                if one not in failed:
                    log.info("an agent is in this network namespace now", netns=one.name)

    def _due(self, inode: int) -> float:
        return self._failures[inode].due if inode in self._failures else 0

    def _end(self) -> None:
        """Whatever they do; a second signal ends their waiting."""
        for child in self._children.values():
            child.tell(END)
        while self._children:
            for inode, child in list(self._children.items()):
                if child.ended():
                    del self._children[inode]
            if not self._children:
                return
            if signal.sigwait(SIGNALS | {signal.SIGCHLD}) in SIGNALS:
                for child in self._children.values():
                    child.tell(END)
