"""Receives servers' reports, and tells the engine.  What they say, and who is believed: :mod:`.selection.reports`."""

from __future__ import annotations

import asyncio
import math
import socket
import time
from collections.abc import Callable, Iterable
from typing import Any, cast

import structlog

from crablb.dataplane.engine import Engine
from crablb.errors import KernelError
from crablb.model import Address, Service, Vip, host_port
from crablb.selection.reports import Judge, Message, Refused

__all__ = ["Reports"]

log = structlog.get_logger()

#: Senders of refused reports that are named in the log in so many seconds, at most.
NAMED, NAMED_IN = 100, 600.0


class Reports(asyncio.DatagramProtocol):
    """Takes reports at an address and port into an engine.

    :meth:`start` raises :class:`KernelError` if the address cannot be bound.
    """

    def __init__(
        self, engine: Engine, master: bytes, listening: Callable[[tuple[Vip, Address], bool], None] = lambda *_: None
    ) -> None:
        """``master``: the 32 bytes that the backends' keys are derived from; ``listening`` is told whether something
        listens on a server for a service, with each report that says so."""
        self._engine, self._listening = engine, listening
        self._judge = Judge(master)
        self._refused: set[tuple[Any, str]] = set()  # those named since
        self._refused_since = -math.inf
        self._served: set[tuple[Vip, Address]] = set()
        self._deserted: set[tuple[Vip, Address]] = set()  # of services and servers where nothing listens
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
        """Take reports of these services' backends."""
        pairs = {(service.vip, b.address) for service in services for b in service.backends}
        self._judge.follow(sorted({address for _, address in pairs}, key=str))
        self._served = pairs
        self._deserted &= pairs

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)  # uvloop's is none by inheritance

    def datagram_received(self, data: bytes, addr: Any) -> None:
        try:
            message, answer = self._judge.judge(data)
        except Refused as refused:
            self._engine.count(refused.counter)
            self._name(addr[0], refused.counter)
            return
        if answer:
            assert self._transport
            self._transport.sendto(answer, addr)
        if message:
            self._take(message)

    def _name(self, sender: str, counter: str) -> None:
        """Have the sender of a refused report in the log: each once in a while, and of a flood's not all."""
        now = time.monotonic()
        if now - self._refused_since >= NAMED_IN:
            self._refused.clear()
            self._refused_since = now
        if (sender, counter) in self._refused or len(self._refused) > NAMED:
            return
        self._refused.add((sender, counter))
        if len(self._refused) <= NAMED:
            log.warning("report refused", sender=sender, reason=counter.removeprefix("reports_"))
        else:
            again = round(self._refused_since + NAMED_IN - now)
            log.warning("more senders' reports are refused; they are counted, and named again later", seconds=again)

    def error_received(self, exc: Exception) -> None:
        """An answer did not arrive; the next report will be answered too."""

    def _take(self, message: Message) -> None:
        self._engine.count("reports")
        loads = {v.vip: (v.open + v.half_open, message.figure) for v in message.vips}
        redirects = {v.vip: v.redirects for v in message.vips if v.redirects is not None}
        if self._engine.report(message.backend, loads, redirects):
            log.info("server reports its load", backend=str(message.backend))
        for v in message.vips:
            pair = v.vip, message.backend
            if pair not in self._served:
                continue
            if v.listening is False and pair not in self._deserted:
                log.warning("nothing listens on a server", backend=str(message.backend), service=str(v.vip))
            if v.listening is False:
                self._deserted.add(pair)
            else:
                self._deserted.discard(pair)
            if v.listening is not None:
                self._listening(pair, v.listening)
