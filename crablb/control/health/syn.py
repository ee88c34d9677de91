"""Checks by real SYNs, which only the load balancer can do, because it is the path: a backend is asked as clients are.

``redirect``: a SYN with the redirect option to the backend's own address (DIP), which the SYN-ACK must echo.  ``fallback``:
a SYN to the VIP, sent by direct server return as the workers send it, which the server must answer as the VIP.  Each is
one SYN, of which no connection comes: a RST ends it, whatever came back.

They are sent and read beside the host's own TCP, by packet sockets.  So netfilter, rp_filter and a VIP that is an address
of this host as well do not matter; but what the kernel makes of a SYN-ACK that it did not ask for is a RST, which is right
too.  Nothing of this comes to the workers: the SYNs leave, and what comes back is for an address that is no VIP.
"""

from __future__ import annotations

import asyncio
import errno
import functools
import hashlib
import secrets
import socket
import struct
import time
from collections import deque
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import structlog

from crablb.control.health import segments
from crablb.control.health.segments import ACK, RST, SYN, Complaint, Reply
from crablb.errors import KernelError
from crablb.kernel import rtnetlink, sockfilter
from crablb.kernel.netlink import HopState, NextHop
from crablb.kernel.reader import Reader
from crablb.kernel.rtnetlink import Netlink
from crablb.model import Address, Fallback, OptionForm, Vip, host_port, mapped
from crablb.seldom import Seldom

__all__ = ["Answer", "Sounder"]

#: Source ports: a pair of backend and VIP takes another one each time, and comes back to the first when its server has
#: forgotten that even if the RST was lost: 64 checks of every second or two, where Linux keeps a half-open connection 63 s.
PORTS = 64
#: SYNs that are sent before the event loop has its turn.
BATCH = 64
#: Bytes of answers that may wait in a socket.
WAITING = 8 << 20
#: Bytes of an answer that are looked at: an ICMP error and the headers that it quotes.
ROOM = 2048
#: Pairs whose last port is remembered, and link-layer addresses; beyond, all are forgotten.
REMEMBERED = 1 << 16
#: Seconds that the host's own addresses are taken to be the same.
ADDRESSES = 2.0
SO_RCVBUFFORCE = 33
ETH_P = {4: 0x0800, 6: 0x86DD}

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one check.

    ``ok``: None, if it could not be tried, or what came back tells nothing of the backend.  ``reason``: in words, with
    what to do where that is known.  ``seconds``: from the SYN to what came back, or to the timeout.  ``answered``: there was a
    SYN-ACK, sound or not: somebody listens.  ``echoed``: with the redirect.  ``by``: who sent what came back.
    """

    ok: bool | None
    reason: str
    seconds: float = 0.0
    answered: bool = False
    echoed: bool = False
    by: Address | None = None


class _Key(NamedTuple):
    """Of a check that is under way there is no second one."""

    kind: str
    dip: Address
    vip: Vip


class _Check:
    """One that is under way."""

    __slots__ = ("form", "future", "hop", "key", "port", "sequence", "sent", "source", "timeout", "timer", "tunnel")

    def __init__(
        self,
        key: _Key,
        hop: NextHop,
        source: Address,
        tunnel: bool,
        form: OptionForm | None,
        timeout: float,
        future: asyncio.Future[Answer],
    ) -> None:
        self.key, self.hop, self.source, self.tunnel, self.form = key, hop, source, tunnel, form
        self.timeout, self.future = timeout, future
        self.port = self.sequence = 0
        self.sent = 0.0
        self.timer: asyncio.TimerHandle | None = None

    @property
    def target(self) -> tuple[Address, int]:
        """Where the SYN goes, and the SYN-ACK must come from."""
        return (self.key.dip if self.form else self.key.vip.address), self.key.vip.port

    def frame(self, sequence: int, flags: int, options: bytes = b"") -> bytes:
        to, port = self.target
        tcp = segments.segment(self.source, to, (self.port, port), sequence, flags, options)
        inner = segments.packet(self.source, to, segments.TCP, tcp)
        if self.tunnel:
            assert self.hop.source
            protocol = segments.IPIP if to.version == 4 else segments.IPV6
            inner = segments.packet(self.hop.source, self.key.dip, protocol, inner)
        return segments.frame(self.hop, inner)


class Sounder:
    """Sends the checks of one network namespace, and reads what comes back: :meth:`start`, then :meth:`close`.

    How many may be under way is bounded by their number alone, not by ports: a SYN is known by its port and its sequence
    number (a keyed hash of where it goes), and of one kind a backend and VIP have one at a time.  Whoever asks for it
    again gets the same answer.
    """

    def __init__(self) -> None:
        self._vips: frozenset[Address] = frozenset()
        self._key = secrets.token_bytes(16)
        self._ports: list[socket.socket] = []
        self._first = 0
        self._heard: list[socket.socket] = []
        self._readers: list[Reader] = []
        self._senders: dict[int, socket.socket] = {}
        self._asked: dict[_Key, _Check] = {}
        self._waiting: deque[_Check] = deque()
        self._flush: asyncio.Handle | None = None
        self._sent: dict[tuple[int, int], _Check] = {}  # by port, and low 24 bits of the sequence number
        self._rounds: dict[_Key, int] = {}
        self._macs: dict[bytes, Address] = {}  # of backends on the segment
        self._own: tuple[float, list[tuple[Address, int]]] = (0.0, [])
        self._seldom = Seldom()

    def start(self) -> None:
        """Take ports and listen, in the running event loop and this thread's network namespace.

        Raises :class:`KernelError`."""

    def follow(self, vips: Iterable[Address]) -> None:
        """Addresses of the services: no check is sent from one, though it may be the host's own."""
        self._vips = frozenset(vips)

    def close(self) -> None:
        """Answer what is under way, and give up ports and sockets."""

    async def redirect(self, hop: NextHop, dip: Address, vip: Vip, form: OptionForm, timeout: float) -> Answer:
        """Whether a backend takes redirected connections: a SYN with the redirect to ``vip`` goes to ``dip``, and the
        SYN-ACK must echo it.  ``timeout``: seconds."""
        raise NotImplementedError

    async def fallback(self, hop: NextHop, dip: Address, vip: Vip, fallback: Fallback, timeout: float) -> Answer:
        """Whether a backend serves by direct server return: a SYN to ``vip`` goes to ``dip`` as the workers send it, and
        must be answered as the VIP.  ``timeout``: seconds."""
        raise NotImplementedError
