"""The server's side of reports: tell load balancers how many connections there are, and how loaded the machine is."""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path

import structlog

from crablb import lasting
from crablb.errors import KernelError
from crablb.kernel.rtnetlink import tcp_sockets
from crablb.model import Address, Vip
from crablb.selection.reports import (
    CHALLENGE,
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


def waiting() -> tuple[dict[int, int], dict[int, int]]:
    """Half-open connections, and those that wait to be accepted, by port (sock_diag(7)).

    Raises :class:`KernelError` where the kernel does not tell.
    """
    half_open: dict[int, int] = {}
    queues: dict[int, int] = {}
    for family in (socket.AF_INET, socket.AF_INET6):
        for state, port, queue in tcp_sockets(family, 1 << TCP_SYN_RECV | 1 << TCP_LISTEN):
            if state == TCP_LISTEN:
                queues[port] = queues.get(port, 0) + queue
            else:
                half_open[port] = half_open.get(port, 0) + 1
    return half_open, queues


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


class Reporter:
    """Tells ``load_balancers`` (addresses and ports) from a thread of its own, between :meth:`start` and :meth:`stop`.

    ``connections`` gives the open connections by VIP, ``redirects`` how many redirects were begun and completed;
    ``backend`` is the address that they know this server by (None: the one that packets to them come from); ``figure``
    the file that holds the server's load (1.0: full; None: the CPUs').
    """

    def __init__(
        self,
        connections: Callable[[], dict[Vip, int]],
        redirects: Callable[[], dict[Vip, tuple[int, int]]],
        load_balancers: Sequence[tuple[Address, int]],
        key: bytes,
        backend: Address | None = None,
        figure: Path | None = None,
    ) -> None:
        self._connections = connections
        self._redirects = redirects
        self._targets = [_Target(address, port, backend) for address, port in load_balancers]
        self._key = key
        self._figure = figure
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
        blind = False
        poll = select.poll()
        for sock in (self._wake, *(t.socket for t in self._targets)):
            poll.register(sock, select.POLLIN)
        while True:
            connections = self._connections()
            now = time.monotonic()
            full = now - told_at >= FULL_INTERVAL
            if full:
                try:
                    half_open, queues, blind = *waiting(), False
                except KernelError as error:
                    if not blind:
                        log.warning("reports are without queues, and who listens", reason=str(error))
                    half_open, queues, blind = {}, {}, True
                figure = self._load()
                told_at = now
                for target in self._targets:
                    if target.challenge == NO_CHALLENGE and target.number:  # not heard of: it may be of before
                        target.version = VERSION if target.version != VERSION else 1
                    elif target.version != VERSION and now - target.tried >= TRY_INTERVAL:
                        self._try(target, figure, now)
            if connections != told:
                again = REPEATS
            if full or connections != told or again:
                again -= bool(again)
                told = connections
                redirects = self._redirects()
                vips = [
                    VipReport(
                        vip,
                        n,
                        half_open.get(vip.port, 0),
                        queues.get(vip.port, 0),
                        redirects.get(vip),
                        blind or vip.port in queues,
                    )
                    for vip, n in connections.items()
                ]
                for target in self._targets:
                    self._tell(target, vips, figure)
            ready = dict(poll.poll(CHANGES_INTERVAL * 1000))
            if self._wake.fileno() in ready:
                return
            for target in self._targets:
                if target.socket.fileno() in ready and self._hear(target):
                    self._tell(target, vips, figure)

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

    def _hear(self, target: _Target) -> bool:
        """Take a challenge; whether there was one."""
        try:
            message = Message.decode(target.socket.recv(2048), self._key)
        except (OSError, Refused):  # nobody there, or not from a load balancer
            return False
        if message.kind != CHALLENGE or message.session != self._session:
            return False
        if target.challenge != NO_CHALLENGE and message.version < target.version:
            return False  # an answer to what was tried before
        target.challenge, target.version = message.challenge, message.version
        return True
