"""The load balancer's side of reports: receive them, and tell the policies.  See :mod:`crablb.report`."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Callable, Iterable
from typing import Any, cast

import structlog

from crablb.errors import KernelError
from crablb.model import Address, Service, host_port
from crablb.policy import Balance
from crablb.report import Judge, Message, Refused

__all__ = ["SILENT", "Feedback"]

log = structlog.get_logger()

#: Seconds without a report after which a server's load is not known any more.
SILENT = 3.0


class Feedback(asyncio.DatagramProtocol):
    """Takes reports into a :class:`Balance`.  ``count`` adds one to a counter of the daemon; ``silent`` is told who
    has stopped reporting.

    :meth:`start` raises :class:`KernelError` if the address cannot be bound.
    """

    def __init__(
        self,
        balance: Balance,
        master: bytes,
        count: Callable[[str], None],
        silent: Callable[[Address], None] = lambda _: None,
    ) -> None:
        self._silent = silent
        self._balance = balance
        self._judge = Judge(master)
        self._count = count
        self._services: list[Service] = []
        self._heard: dict[Address, float] = {}
        self._refused: set[tuple[Any, str]] = set()
        self._transport: asyncio.DatagramTransport | None = None

    async def start(self, address: Address, port: int) -> None:
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            sock.bind((str(address), port))
        except OSError as error:
            sock.close()
            raise KernelError(f"cannot take reports at {host_port(address, port)}: {error.strerror}") from None
        await asyncio.get_running_loop().create_datagram_endpoint(lambda: self, sock=sock)

    def close(self) -> None:
        if self._transport:
            self._transport.close()

    def follow(self, services: Iterable[Service]) -> None:
        """Take reports about these services' backends."""
        self._services = list(services)
        backends = {b.address for service in self._services for b in service.backends}
        self._judge.follow(sorted(backends, key=str))
        self._heard = {address: at for address, at in self._heard.items() if address in backends}

    def reporting(self) -> set[Address]:
        """The backends whose load is known.  Names those that have fallen silent."""
        now = time.monotonic()
        for address in [a for a, at in self._heard.items() if now - at > SILENT]:
            del self._heard[address]
            self._count("reports_silent")
            self._silent(address)
            log.warning("server has fallen silent; its load is taken for average", backend=str(address))
        return set(self._heard)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)  # uvloop's is none by inheritance

    def datagram_received(self, data: bytes, addr: Any) -> None:
        try:
            message, answer = self._judge.judge(data)
        except Refused as refused:
            self._count(refused.counter)
            if (addr[0], refused.counter) not in self._refused and len(self._refused) < 1000:
                self._refused.add((addr[0], refused.counter))
                log.warning("report refused", sender=addr[0], reason=refused.counter.removeprefix("reports_"))
            return
        if answer:
            assert self._transport
            self._transport.sendto(answer, addr)
        if message:
            self._take(message)

    def error_received(self, exc: Exception) -> None:
        """An answer did not arrive; the next report will be answered too."""

    def _take(self, message: Message) -> None:
        self._count("reports")
        if message.backend not in self._heard:
            log.info("server reports its load", backend=str(message.backend))
        self._heard[message.backend] = time.monotonic()
        told = {v.vip: v for v in message.vips}
        for service in self._services:
            if service.vip in told and any(b.address == message.backend for b in service.backends):
                report = told[service.vip]
                self._balance.report(service.vip, message.backend, report.open + report.half_open, message.figure)
