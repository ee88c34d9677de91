"""Receives servers' reports, and tells the engine.  What they say, and who is believed: :mod:`.selection.reports`."""

from __future__ import annotations

import asyncio
import math
import socket
import time
from collections.abc import Callable, Iterable
from typing import Annotated, Any, cast

import msgspec
import structlog

from crablb.dataplane.engine import Engine
from crablb.errors import KernelError, unbound
from crablb.model import Address, Service, Vip, host_port
from crablb.selection.reports import Judge, Message, Refused

__all__ = ["Reports"]

log = structlog.get_logger()

#: Senders of refused reports that are named in the log in so many seconds, at most.
NAMED, NAMED_IN = 100, 600.0


class _Judged(msgspec.Struct, frozen=True):
    """What :meth:`Judge.export` says."""

    secret: bytes
    generation: Annotated[int, msgspec.Meta(ge=0)]  # a number of eight bytes
    sessions: list[tuple[str, int, bytes, int]]
    floors: list[tuple[str, int]]


class _Known(msgspec.Struct, frozen=True):
    """What :meth:`Reports.export` says; pairs of a VIP and a backend."""

    judge: _Judged
    deserted: list[tuple[str, str]]
    leading: list[tuple[str, str]]
    at_vips: list[tuple[str, str, int]]


def _told(pairs: Iterable[tuple[Vip, Address]]) -> list[tuple[str, str]]:
    return [(str(vip), str(address)) for vip, address in pairs]


class Reports(asyncio.DatagramProtocol):
    """Takes reports at an address and port into an engine.

    :meth:`bind` raises :class:`KernelError` if the address cannot be bound.
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
        self._vips: set[Vip] = set()
        self._served: set[tuple[Vip, Address]] = set()
        self._deserted: set[tuple[Vip, Address]] = set()  # of services and servers where nothing listens
        #: Whether servers are told that connections are to leave this load balancer.
        self.leaving = False
        #: Services' servers that lead MPTCP clients past load balancers, as they say.
        self.leading: set[tuple[Vip, Address]] = set()
        #: How many connections by the fallback they have, as they say while connections are to leave.
        self.at_vips: dict[tuple[Vip, Address], int] = {}
        self._transport: asyncio.DatagramTransport | None = None
        self._socket: socket.socket | None = None

    def bind(self, address: Address, port: int, sock: socket.socket | None = None) -> None:
        """What is sent there waits from now on.  ``sock``: one that is bound there, this one's from now on."""
        if sock:
            self._socket = sock
            return
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            sock.bind((str(address), port))
        except OSError as error:
            sock.close()
            raise KernelError(f"cannot take reports at {host_port(address, port)}: {unbound(error, port)}") from None
        self._socket = sock

    async def start(self) -> None:
        """Read them, also after :meth:`pause`."""
        if self._socket and not self._transport:
            # The transport ends its socket; this one stays.
            await asyncio.get_running_loop().create_datagram_endpoint(lambda: self, sock=self._socket.dup())

    def pause(self) -> None:
        """Read no more; what comes waits."""
        if self._transport:
            self._transport.close()
            self._transport = None

    @property
    def fd(self) -> int:
        """Where they come."""
        assert self._socket
        return self._socket.fileno()

    def close(self) -> None:
        """Idempotent."""
        self.pause()
        if self._socket:
            self._socket.close()
            self._socket = None

    def export(self) -> dict[str, Any]:
        """What is known of the servers, as plain values for :meth:`adopt`."""
        return {
            "judge": self._judge.export(),
            "deserted": _told(self._deserted),
            "leading": _told(self.leading),
            "at_vips": [(*pair, n) for pair, n in zip(_told(self.at_vips), self.at_vips.values(), strict=True)],
        }

    def adopt(self, known: Any) -> None:
        """Go on for another process, which :meth:`export`-ed it; after :meth:`follow`.

        Raises ``ValueError``, of which msgspec's is one, and changes nothing, if it is nothing of the kind.
        """
        given = msgspec.convert(known, _Known)
        judged = given.judge
        self._judge.adopt(judged.secret, judged.generation, judged.sessions, judged.floors)
        pairs = {(str(vip), str(address)): (vip, address) for vip, address in self._served}
        self._deserted = {pairs[pair] for pair in given.deserted if pair in pairs}
        self.leading = {pairs[pair] for pair in given.leading if pair in pairs}
        self.at_vips = {pairs[vip, address]: n for vip, address, n in given.at_vips if (vip, address) in pairs}

    def follow(self, services: Iterable[Service]) -> None:
        """Take reports of these services' backends."""
        pairs = {(service.vip, b.address) for service in services for b in service.backends}
        self._judge.follow(sorted({address for _, address in pairs}, key=str))
        self._vips = {vip for vip, _ in pairs}
        self._served = pairs
        self._deserted &= pairs
        self.leading &= pairs
        self.at_vips = {pair: n for pair, n in self.at_vips.items() if pair in pairs}

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
            # Of any service: a server reports as one backend, and may be another one's by its other addresses.
            vips = [v.vip for v in message.vips if v.vip in self._vips] if self.leaving else []
            if vips and self._transport:
                self._transport.sendto(self._judge.leave(message, vips), addr)

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
            if v.leads:
                self.leading.add(pair)
            else:
                self.leading.discard(pair)
            if v.at_vip is not None:
                self.at_vips[pair] = v.at_vip
            else:
                self.at_vips.pop(pair, None)
