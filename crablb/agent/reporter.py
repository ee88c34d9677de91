"""The server's side of reports: tell load balancers how many connections there are, and how loaded the machine is."""

from __future__ import annotations

import math
import os
import select
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path

import structlog

from crablb import lasting
from crablb.errors import KernelError
from crablb.kernel.rtnetlink import tcp_connections, tcp_sockets
from crablb.model import Address, Vip, mapped
from crablb.selection.reports import (
    CHALLENGE,
    HOLD,
    LEAVE,
    MAX_ENTRIES,
    NO_CHALLENGE,
    REPORT,
    VERSION,
    Message,
    Refused,
    VipReport,
)
from crablb.values import read_bytes

__all__ = ["Reporter"]

log = structlog.get_logger()

#: How often changes are looked for, and how often everything is told though nothing has changed, in seconds.
CHANGES_INTERVAL = 0.05
FULL_INTERVAL = 1.0
#: Of a core's time, how much may go into looking who listens, between full reports.
LOOKING = 0.01
#: How often a load balancer of before is asked whether it understands today's version by now, in seconds.
TRY_INTERVAL = 60.0
#: How often a change is told in all, lest it be lost; the next full report would make it good, but later.
REPEATS = 3
TCP_SYN_RECV, TCP_LISTEN = 3, 10  # include/net/tcp_states.h; request sockets are told as SYN_RECV


class _Cpu:
    """Busy time of all CPUs, in thousandths, since the last look (proc_stat(5))."""

    def __init__(self) -> None:
        self._before = self._read()
        self.value = 0

    @staticmethod
    def _read() -> tuple[int, int]:
        fields = [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        return sum(fields), fields[3] + fields[4]  # all; idle and waiting for a disk

    def look(self) -> int:
        now = self._read()
        all_, idle = now[0] - self._before[0], now[1] - self._before[1]
        if all_ > 0:
            self.value = round(1000 * (all_ - idle) / all_)
            self._before = now
        return self.value


def queues() -> dict[int, int]:
    """Connections that wait to be accepted, by port that somebody listens on (sock_diag(7)).

    Raises :class:`KernelError` where the kernel does not tell.
    """
    found: dict[int, int] = {}
    for family in (socket.AF_INET, socket.AF_INET6):
        for _, port, queue in tcp_sockets(family, 1 << TCP_LISTEN):
            found[port] = found.get(port, 0) + queue
    return found


def half_open() -> dict[int, int]:
    """Half-open connections by port.  Raises as :func:`queues` does."""
    found: dict[int, int] = {}
    for family in (socket.AF_INET, socket.AF_INET6):
        for _, port, _ in tcp_sockets(family, 1 << TCP_SYN_RECV):
            found[port] = found.get(port, 0) + 1
    return found


class _Waiting:
    """What :func:`queues` and :func:`half_open` say, looked at as often as they are cheap."""

    def __init__(self) -> None:
        self.queues: dict[int, int] = {}
        self.half_open: dict[int, int] = {}
        self.at_vip: dict[Vip, int] = {}
        self.blind = False  # the kernel does not tell
        self._next = 0.0

    def look(self, now: float, leaving: Collection[Vip], *, whole: bool) -> bool:
        """Look at the listeners, if it is time, and, if ``whole``, at half-open connections too, and at those to VIPs
        that are ``leaving``; whether others listen than before."""
        if not whole and (self.blind or now < self._next):
            return False
        before = self.queues.keys()
        began = time.thread_time()
        try:
            self.queues = queues()
            self._next = now + (time.thread_time() - began) / LOOKING
            if whole:
                self.half_open = half_open()
                self.at_vip = at_vips(leaving) if leaving else {}
            self.blind = False
        except KernelError as error:
            if not self.blind:
                log.warning("reports are without queues, and who listens", reason=str(error))
            self.queues, self.half_open, self.at_vip, self.blind = {}, {}, {}, True
        return self.queues.keys() != before


def at_vips(vips: Iterable[Vip]) -> dict[Vip, int]:
    """How many TCP connections have each of these VIPs as their local address, as those have that came by a load
    balancer's fallback.  Raises :class:`KernelError` where the kernel does not tell."""
    places = {(mapped(vip.address), vip.port.to_bytes(2, "big")): vip for vip in vips}
    ends = ((one.local, one.local_port) for one in tcp_connections())
    found = Counter(places[end] for end in ends if end in places)
    return {vip: found[vip] for vip in places.values()}


class _Target:
    """One load balancer."""

    def __init__(self, address: Address, port: int, backend: Address | None) -> None:
        self.name = f"{address}:{port}"
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        self.socket = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        self.where = (str(address), port)
        self.backend = backend
        self.challenge = NO_CHALLENGE
        self.version = VERSION
        self.number = 0
        self.tried = time.monotonic()  # when one of before was asked for more, last
        self.complained = False
        #: When reports were sent in the last seconds, and the number of the first of each time; and the last number
        #: that is older.
        self._sent: deque[tuple[float, int]] = deque()
        self._old = 0
        self._left = 0  # number of the last report that was answered by "leave"
        self.leaving: dict[Vip, float] = {}  # VIPs that connections are to leave, and until when

    def sends(self, now: float) -> None:
        self._forget(now)
        self._sent.append((now, self.number + 1))

    def hears_leave(self, message: Message, now: float) -> bool:
        """Take it if it is to be believed; whether more is to leave than before."""
        self._forget(now)
        if message.challenge != self.challenge or not max(self._old, self._left) < message.number <= self.number:
            return False
        self._left = message.number
        new = {v.vip for v in message.vips} - self.leaving.keys()
        self.leaving |= dict.fromkeys((v.vip for v in message.vips), now + HOLD)
        return bool(new)

    def _forget(self, now: float) -> None:
        while self._sent and self._sent[0][0] < now - HOLD:
            self._sent.popleft()
            self._old = self._sent[0][1] - 1 if self._sent else self.number
        self.leaving = {vip: until for vip, until in self.leaving.items() if until >= now}


class Reporter:
    """Tells ``load_balancers`` (addresses and ports) from a thread of its own, between :meth:`start` and :meth:`stop`.

    ``connections`` gives the open connections by VIP, ``redirects`` how many redirects were begun and completed;
    ``backend`` is the address that they know this server by (None: the one that packets to them come from); ``figure``
    the file that holds the server's load (1.0: full; None: the CPUs').  ``leave`` is called, each second for as long
    as a load balancer says so, with the VIPs whose open connections are to leave it, and may raise
    :class:`KernelError`; ``leads``: whether it can move any.
    """

    def __init__(
        self,
        connections: Callable[[], dict[Vip, int]],
        redirects: Callable[[], dict[Vip, tuple[int, int]]],
        load_balancers: Sequence[tuple[Address, int]],
        key: bytes,
        backend: Address | None = None,
        figure: Path | None = None,
        leave: Callable[[Sequence[Vip]], None] = lambda _: None,
        *,
        leads: bool = False,
    ) -> None:
        self._connections = connections
        self._redirects = redirects
        self._targets = [_Target(address, port, backend) for address, port in load_balancers]
        self._key = key
        self._figure = figure
        self._leave, self._leads = leave, leads
        self._leaving: tuple[frozenset[Vip], str] = frozenset(), ""  # what the log has: VIPs, and what keeps them
        self._session = os.urandom(8)
        self._cpu = _Cpu()
        self._wake, self._waker = socket.socketpair()
        self._thread = threading.Thread(
            target=lasting.keep_in_thread,
            args=("report", self._run, self._wake.fileno()),
            name="crablb-report",
            daemon=True,
        )

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._waker.send(b"x")
        self._thread.join()
        for sock in (self._wake, self._waker, *(t.socket for t in self._targets)):
            sock.close()

    def _run(self) -> None:
        told: dict[Vip, int] = {}
        told_at = -FULL_INTERVAL
        vips: list[VipReport] = []
        figure = again = 0
        waiting = _Waiting()
        more = False
        poll = select.poll()
        for sock in (self._wake, *(t.socket for t in self._targets)):
            poll.register(sock, select.POLLIN)
        while True:
            connections = self._connections()
            now = time.monotonic()
            full = now - told_at >= FULL_INTERVAL
            changed = waiting.look(now, self._leaving[0], whole=full) | (connections != told)
            if full:
                figure = self._load()
                told_at = now
                for target in self._targets:
                    if target.challenge == NO_CHALLENGE and target.number:  # not heard of: it may be of before
                        target.version = VERSION if target.version != VERSION else 1
                    elif target.version != VERSION and now - target.tried >= TRY_INTERVAL:
                        self._try(target, figure, now)
            if changed:
                again = REPEATS
            if full or again:
                again -= bool(again)
                told = connections
                redirects = self._redirects()
                vips = [
                    VipReport(
                        vip,
                        n,
                        waiting.half_open.get(vip.port, 0),
                        waiting.queues.get(vip.port, 0),
                        redirects.get(vip),
                        waiting.blind or vip.port in waiting.queues,
                        self._leads,
                        waiting.at_vip.get(vip),
                    )
                    for vip, n in connections.items()
                ]
                for target in self._targets:
                    self._tell(target, vips, figure)
            if full or more:
                self._move(now)
            more = False
            ready = dict(lasting.wait(poll, CHANGES_INTERVAL))
            if self._wake.fileno() in ready:
                return
            for target in self._targets:
                if target.socket.fileno() not in ready:
                    continue
                heard = self._hear(target)
                more |= heard == LEAVE
                if heard == CHALLENGE:
                    self._tell(target, vips, figure)

    def _move(self, now: float) -> None:
        """Have connections leave the load balancers that say so."""
        vips = frozenset(vip for t in self._targets for vip, until in t.leaving.items() if until >= now)
        reason = ""
        if vips:
            try:
                self._leave(sorted(vips, key=str))
            except KernelError as error:
                reason = str(error)
        told = sorted(map(str, vips))
        if vips != self._leaving[0]:
            log.info("a load balancer is being drained" if vips else "no load balancer is being drained", vips=told)
        if reason and reason != self._leaving[1]:
            log.warning("connections cannot leave the load balancer that is being drained", reason=reason, vips=told)
        self._leaving = vips, reason

    def _load(self) -> int:
        if not self._figure:
            return self._cpu.look()
        try:
            return max(0, round(1000 * float(read_bytes(self._figure, 1.0))))
        except (OSError, ValueError) as error:
            log.warning("no figure to report", file=str(self._figure), reason=str(error))
            return 0

    def _tell(self, target: _Target, vips: Sequence[VipReport], figure: int) -> None:
        try:
            if target.backend is None:
                target.socket.connect(target.where)
                target.backend = ip_address(target.socket.getsockname()[0])
            target.sends(time.monotonic())
            for first in range(0, max(len(vips), 1), MAX_ENTRIES):
                target.number += 1
                part = tuple(vips[first : first + MAX_ENTRIES])
                message = Message(
                    REPORT, target.backend, self._session, target.challenge, target.number, figure, part, target.version
                )
                target.socket.sendto(message.encode(self._key), target.where)
            target.complained = False
        except OSError as error:
            if not target.complained:
                log.warning("cannot report", load_balancer=target.name, reason=error.strerror)
            target.complained = True

    def _try(self, target: _Target, figure: int, now: float) -> None:
        """Ask for a challenge in today's version, of one of before that may have been replaced."""
        target.tried = now
        target.number += 1
        message = Message(REPORT, target.backend, self._session, NO_CHALLENGE, target.number, figure)  # type: ignore[arg-type]
        with suppress(OSError):
            target.socket.sendto(message.encode(self._key), target.where)

    def _hear(self, target: _Target) -> int:
        """Take what a load balancer says: CHALLENGE; LEAVE, if more is to leave than before; 0: nothing new."""
        try:
            message = Message.decode(target.socket.recv(2048), self._key)
        except (OSError, Refused):  # nobody there, or not from a load balancer
            return 0
        if message.session != self._session:
            return 0
        if message.kind == LEAVE:
            return LEAVE if target.hears_leave(message, time.monotonic()) else 0
        if message.kind != CHALLENGE or (target.challenge != NO_CHALLENGE and message.version < target.version):
            return 0  # an answer to what was tried before
        if target.challenge == NO_CHALLENGE:
            target.tried = -math.inf  # it may have come up when the other version was tried
        target.challenge, target.version = message.challenge, message.version
        return CHALLENGE
