"""Checks by real SYNs, which only the load balancer can do, because it is the path: a backend is asked as clients are.

``redirect``: a SYN with the redirect option to the backend's own address (DIP), which the SYN-ACK must echo.
``fallback``: a SYN to the VIP, sent by direct server return as the workers send it, which the server must answer as the
VIP.  Each is one SYN, of which no connection comes: a RST ends it, whatever came back.

They are sent and read beside the host's own TCP, by packet sockets.  So netfilter, rp_filter and a VIP that is an
address of this host as well do not matter; what the kernel makes of a SYN-ACK that it did not ask for is a RST, which
is right too.  The workers see none of it: the SYNs leave, and what comes back is for an address that is no VIP.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import secrets
import socket
import struct
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_address
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
#: forgotten that even if the RST was lost: after 64 checks, 128 s, where Linux keeps a half-open connection for 63 s.
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
#: Of a sequence number what is a keyed hash; above it the turn.
TAG = 0xFFFFFF
ETH_P = {4: 0x0800, 6: 0x86DD}

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one check.

    ``ok``: None, if it could not be tried, or what came back tells nothing of the backend.  ``reason``: in words, with
    what to do where that is known.  ``seconds``: from the SYN to what came back, or to the timeout.  ``answered``:
    there was a SYN-ACK, sound or not: somebody listens.  ``echoed``: with the redirect.  ``by``: who sent it.
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

    __slots__ = ("form", "future", "hop", "key", "port", "sent", "sequence", "source", "timeout", "timer", "tunnel")

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

    def syn(self) -> bytes:
        stamp = int(time.monotonic() * 1000) & 0xFFFFFFFF
        to = self.key.vip.address
        form = self.form or OptionForm.CRAB
        options = segments.options_of_syn(self.hop.mtu, to.version, stamp, to if self.form else None, form)
        return self.frame(self.sequence, SYN, options)

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

    Ports do not bound how many may be under way: a SYN is known by its port and its sequence number (a keyed hash of
    where it goes), and of a kind each pair of backend and VIP has one at a time: whoever asks for it meanwhile gets the
    same answer.  A pair costs some 200 bytes, and while it is asked 1 KiB.
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
        self._turns: dict[_Key, int] = {}
        self._macs: dict[bytes, Address] = {}  # of backends on the segment
        self._own: tuple[float, list[tuple[Address, int]]] = (0.0, [])
        self._seldom = Seldom()

    def start(self) -> None:
        """Take ports and listen, in the running event loop and this thread's network namespace.

        Raises :class:`KernelError`.
        """
        try:
            self._ports = _reserve()
            self._first = self._ports[0].getsockname()[1]
            for version, program in segments.taken(self._first, self._first + PORTS - 1).items():
                # Of all interfaces.  What comes before there is a filter is for none of these ports.
                sock = socket.socket(
                    socket.AF_PACKET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, socket.htons(ETH_P[version])
                )
                self._heard.append(sock)
                sockfilter.attach(sock, program)
                sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, WAITING)
                self._readers.append(Reader(sock, ROOM, self._take, self._lost))
        except OSError as error:
            self.close()
            raise KernelError(f"cannot check backends by SYNs: {error.strerror}") from None

    def follow(self, vips: Iterable[Address]) -> None:
        """Addresses of the services: no check is sent from one, though it may be the host's own."""
        self._vips = frozenset(vips)

    def close(self) -> None:
        """Answer what is under way, and give up ports and sockets."""
        for check in list(self._asked.values()):
            self._finish(check, Answer(None, "the checks have ended"))
        if self._flush:
            self._flush.cancel()
        while self._readers:
            self._readers.pop().close()
        for sock in (*self._heard, *self._senders.values(), *self._ports):
            sock.close()
        self._heard, self._senders, self._ports = [], {}, []

    async def redirect(self, hop: NextHop, dip: Address, vip: Vip, form: OptionForm, timeout: float) -> Answer:
        """Whether a backend takes redirected connections: a SYN with the redirect to ``vip`` goes to ``dip``, and the
        SYN-ACK must echo it.  ``timeout``: seconds."""
        if dip.version != vip.address.version:
            return Answer(None, f"IPv{vip.address.version} clients cannot be redirected to an IPv{dip.version} address")
        return await self._ask(_Key("redirect", dip, vip), hop, tunnel=False, form=form, timeout=timeout)

    async def fallback(self, hop: NextHop, dip: Address, vip: Vip, fallback: Fallback, timeout: float) -> Answer:
        """Whether a backend serves by direct server return: a SYN to ``vip`` goes to ``dip`` as the workers send it,
        and must be answered as the VIP.  ``timeout``: seconds."""
        by_mac = hop.on_link and fallback is not Fallback.DSR_IPIP and dip.version == vip.address.version
        if not by_mac and fallback is Fallback.DSR_L2 and hop.state is HopState.RESOLVED:
            why = f"it is behind {hop.gateway}" if hop.gateway else "it is of another IP version than the VIP"
            return Answer(False, f"dsr-l2 does not reach it: {why}; use fallback auto or dsr-ipip")
        return await self._ask(_Key("fallback", dip, vip), hop, tunnel=not by_mac, form=None, timeout=timeout)

    async def _ask(self, key: _Key, hop: NextHop, *, tunnel: bool, form: OptionForm | None, timeout: float) -> Answer:
        check = self._asked.get(key)
        if check is None:
            if obstacle := _obstacle(hop):
                return obstacle
            source = self._source(hop, key)
            if source is None:
                return Answer(
                    None, f"this host has no IPv{key.vip.address.version} address, other than VIPs, to ask from"
                )
            if tunnel and hop.source is None:
                return Answer(None, f"the kernel has no address to send to {key.dip} from")
            if hop.on_link:
                _bound_size(self._macs)
                self._macs[hop.dst_mac] = key.dip
            check = _Check(key, hop, source, tunnel, form, timeout, asyncio.get_running_loop().create_future())
            self._number(check)
            self._asked[key] = self._sent[check.port, check.sequence & TAG] = check
            self._waiting.append(check)
            if self._flush is None:
                self._flush = asyncio.get_running_loop().call_soon(self._send_waiting)
        # Others may wait for it as well.
        return await asyncio.shield(check.future)

    def _source(self, hop: NextHop, key: _Key) -> Address | None:
        """An address to ask from, which the answer finds its way to."""
        version = key.vip.address.version
        avoided = self._vips | {key.vip.address, key.dip}
        if hop.source and hop.source.version == version and hop.source not in avoided:
            return hop.source
        until, own = self._own
        if time.monotonic() >= until:
            own = _own_addresses()
            self._own = time.monotonic() + ADDRESSES, own
        able = [(index != hop.ifindex, address) for address, index in own if address.version == version]
        return next((address for _, address in sorted(able, key=lambda a: a[0]) if address not in avoided), None)

    def _number(self, check: _Check) -> None:
        """Give it a port and a sequence number."""
        to, port = check.target
        head = mapped(check.source) + mapped(to) + mapped(check.key.dip) + struct.pack("!H?", port, check.tunnel)
        _bound_size(self._turns)
        while True:
            turn = self._turns[check.key] = self._turns.get(check.key, secrets.randbits(16)) + 1
            check.port = self._first + turn % PORTS
            hashed = hashlib.blake2s(head + struct.pack("!H", check.port), key=self._key, digest_size=3).digest()
            if (check.port, tag := int.from_bytes(hashed, "big")) not in self._sent:
                break
        # By the upper byte a SYN is told from one of an earlier turn that a server still remembers.  They are so far
        # apart that it takes none for a part of the other connection, and says so (RFC 9293, 3.10.7.4).
        check.sequence = (turn & 0xFF) << 24 | tag

    def _send_waiting(self) -> None:
        """So many that all else in the loop has its turn."""
        loop = asyncio.get_running_loop()
        for _ in range(min(BATCH, len(self._waiting))):
            check = self._waiting.popleft()
            if check.future.done():
                continue
            check.sent = time.monotonic()
            if problem := self._send(check.hop.ifindex, check.syn()):
                self._finish(check, Answer(None, problem))
            else:
                check.timer = loop.call_later(check.timeout, self._silent, check)
        self._flush = loop.call_soon(self._send_waiting) if self._waiting else None

    def _send(self, index: int, frame: bytes) -> str:
        """Why not; empty: it is sent."""
        error = None
        for _ in range(2):  # the first time a socket may tell of what befell its interface before
            try:
                sock = self._senders.get(index)
                if sock is None:
                    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
                    sock.bind((socket.if_indextoname(index), 0))
                    self._senders[index] = sock
                sock.send(frame)
                return ""
            except OSError as refusal:
                error = refusal
                if error.errno in (errno.ENXIO, errno.ENODEV) and index in self._senders:
                    self._senders.pop(index).close()
        assert error
        try:
            name = socket.if_indextoname(index)
        except OSError:
            return "its interface is gone"
        return f"cannot send to it by {name}: {error.strerror}"

    def _finish(self, check: _Check, answer: Answer) -> None:
        if check.timer:
            check.timer.cancel()
        self._asked.pop(check.key, None)
        self._sent.pop((check.port, check.sequence & TAG), None)
        if not check.future.done():
            check.future.set_result(answer)

    def _reset(self, check: _Check, sequence: int) -> None:
        """End what the server may have begun, by the way that the SYN went."""
        self._send(check.hop.ifindex, check.frame(sequence, RST))

    def _silent(self, check: _Check) -> None:
        self._reset(check, check.sequence + 1)
        self._finish(check, Answer(False, _silence(check), time.monotonic() - check.sent))

    def _lost(self, error: Exception) -> None:
        if count := self._seldom.due("lost"):
            log.warning("answers to checks were lost", error=repr(error), times=count)

    def _take(self, data: bytes, sender: Any) -> None:
        heard = segments.parse(data)
        if heard is None:
            return
        sequence = heard.sequence if isinstance(heard, Complaint) else (heard.acknowledged - 1) & 0xFFFFFFFF
        check = self._sent.get((heard.port, sequence & TAG))
        if check is None:
            return
        seconds = time.monotonic() - check.sent
        if isinstance(heard, Complaint):
            if sequence == check.sequence:
                self._finish(check, Answer(False, _complained(check, heard), seconds, by=heard.source))
            return
        flags = heard.flags & (SYN | RST | ACK)
        if sequence != check.sequence:
            if flags == ACK:  # a challenge (RFC 9293, 3.10.7.4)
                self._reset(check, heard.acknowledged)
                reason = "it still has an earlier check's connection; do resets not come through to it?"
                self._finish(check, Answer(None, reason, seconds, by=heard.source))
            return
        if flags == SYN | ACK:
            self._reset(check, heard.acknowledged)
        elif flags != RST | ACK:
            return
        other = self._macs.get(sender[4]) if check.form is None and sender[4] != check.hop.dst_mac else None
        reason, ok, echoed = _judged(check, heard, other)
        self._finish(check, Answer(ok, reason, seconds, flags == SYN | ACK, echoed, heard.source))


def _bound_size(known: dict[Any, Any]) -> None:
    if len(known) >= REMEMBERED:
        known.clear()


def _reserve() -> list[socket.socket]:
    """Sockets that are bound to :data:`PORTS` ports one after the other, the highest of those that the kernel gives to
    whoever asks for none in particular.  Raises OSError."""
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    error = OSError(errno.EADDRINUSE, f"there are no {PORTS} ports together that are free")
    for first in range(high - PORTS + 1, low - 1, -PORTS):
        taken: list[socket.socket] = []
        try:
            for port in range(first, first + PORTS):
                taken.append(_bound(port))
            return taken
        except OSError as refusal:
            for sock in taken:
                sock.close()
            if refusal.errno != errno.EADDRINUSE:
                raise
    raise error


def _bound(port: int) -> socket.socket:
    try:
        sock = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
    except OSError:  # this host has no IPv6
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(("", port))
    except OSError:
        sock.close()
        raise
    return sock


def _own_addresses() -> list[tuple[Address, int]]:
    """This host's addresses that it is reached by, and the interface of each."""
    with Netlink() as netlink:
        reached = rtnetlink.reached_by(netlink)
        return [(ip_address(text), index) for text, index in rtnetlink.addresses(netlink).items() if text in reached]


def _obstacle(hop: NextHop) -> Answer | None:
    """What keeps a check from being sent."""
    if hop.state is HopState.RESOLVED:
        return None
    if hop.state is HopState.UNRESOLVED and not hop.asking:
        return Answer(False, hop.reason)
    return Answer(None, hop.reason)


def _judged(check: _Check, reply: Reply, other: Address | None) -> tuple[str, bool, bool]:
    """What a SYN-ACK or RST to a check's SYN says: in words, whether it is sound, and whether it has the redirect.

    ``other``: another backend, that sent it.
    """
    dip, vip = check.key.dip, check.key.vip
    by, where = (reply.source, reply.source_port), host_port(reply.source, reply.source_port)
    if other:
        return f"{other} answered in its place: it sent the SYN to the VIP back; is the VIP on its lo?", False, False
    if reply.flags & RST:
        where = host_port(*check.target)
        only = "" if check.form else f", if on {dip} alone then not for clients that are not redirected"
        return f"refused: nothing listens there on {where}{only}", False, False
    if not check.form:
        if by == check.target:
            return "answers as the VIP", True, False
        if reply.source == dip:
            return f"answers as {dip}, not as the VIP: is the VIP on its lo?", False, False
        return f"answers as {where}, not as the VIP: its address is translated on the way", False, False
    echoed = list(segments.redirects(reply.options))
    sound = (check.form, vip.address) in echoed
    if by != check.target:
        return (
            f"answers as {where}, not as {host_port(*check.target)}: its address is translated on the way",
            False,
            sound,
        )
    if sound:
        return "SYN-ACK with the redirect", True, True
    if echoed:
        return f"SYN-ACK with a redirect to {echoed[0][1]}, which was not sent", False, False
    return (
        f"SYN-ACK without the redirect: no agent there that serves {vip}, or a filter on the way removes TCP options",
        False,
        False,
    )


def _silence(check: _Check) -> str:
    where = host_port(*check.target)
    if check.form:
        return f"no answer from {where}: a firewall, a full accept queue, or a filter of TCP options drops the SYN"
    tunnel = ", whether it takes IP in IP" if check.tunnel else ""
    return (
        f"no answer as {where}: see whether the VIP is on its lo{tunnel}, and whether a firewall, rp_filter or a full"
        " accept queue drops SYNs"
    )


def _complained(check: _Check, complaint: Complaint) -> str:
    told = f"{complaint.what}, says {complaint.source}"
    if complaint.what in (segments.PROHIBITED, segments.PORT):  # a host itself sends a RST
        return f"{told}: a firewall there refuses the SYN"
    if complaint.what == segments.NO_PROTOCOL and complaint.tunnel:
        return f"{told}: it does not take IP in IP; its agent does with --dsr"
    if complaint.what == segments.TOO_BIG:
        return f"{told}: the way's MTU is too small for a SYN; {check.hop.mtu} is what the kernel knows"
    if complaint.what == segments.LOOP:
        return f"{told}: packets go in a circle; {'see the routes' if check.form else 'is the VIP on its lo?'}"
    return told
