"""Checks by real SYNs, which only the load balancer can do, because it is the path: a backend is asked as clients are.

``redirect``: a SYN with the redirect option to the backend's own address (DIP), which the SYN-ACK must echo.
``fallback``: a SYN to the VIP, sent by direct server return as the workers send it, which the server must answer as the
VIP.  Each is one SYN, of which no connection comes: a RST ends it, whatever came back.

They are sent and read beside the host's own TCP, by packet sockets.  So netfilter, rp_filter and a VIP that is an
address of this host as well do not matter.  The kernel would answer a SYN-ACK that it did not ask for by a RST, and
send that to the VIP: where a router leads there, to the load balancer itself.  So each port has a listener, of whose
packets a filter leaves nothing.  The workers see none of it: SYNs leave, and what comes back is to no VIP.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import itertools
import secrets
import select
import socket
import time
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import Any, NamedTuple

import structlog

from crablb.control.health import segments
from crablb.control.health.segments import ACK, RST, SYN, Complaint, Reply, Template
from crablb.errors import KernelError
from crablb.kernel import rtnetlink, sockfilter
from crablb.kernel.netlink import HopState, NextHop
from crablb.kernel.reader import Reader
from crablb.kernel.rtnetlink import Netlink
from crablb.model import Address, Fallback, OptionForm, Service, Vip, host_port, mapped
from crablb.seldom import Seldom

__all__ = ["Answer", "Sounder"]

#: Source ports: a pair of backend and VIP takes another one each time, and comes back to the first when its server has
#: forgotten that even if the RST was lost: after 64 checks, 128 s, where Linux keeps a half-open connection for 63 s.
PORTS = 64
#: Ports that are tried for one that no other check has to the same address and port.
FEW = 8
#: SYNs that are sent before the event loop has its turn.
BATCH = 64
#: Bytes of answers that may wait in a socket.
WAITING = 8 << 20
#: Bytes of an answer that are looked at: an ICMP error and the headers that it quotes.
ROOM = 2048
#: Checks that are remembered, if nobody says which are needed.
MOST = 1 << 16
#: Seconds before it is looked again whether answers are read.
READ_ON = 0.005
#: Seconds that the host's own addresses are taken to be the same.
ADDRESSES = 2.0
SO_RCVBUFFORCE = 33
SETTINGS = Path("/proc/sys/net/ipv4")
#: Of a sequence number what is a keyed hash; above it the turn.
TAG = 0xFFFFFF
ETH_P = {4: 0x0800, 6: 0x86DD}

log = structlog.get_logger()


class Answer(NamedTuple):
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


Key = tuple[Address, Vip, bool]


class _Check:
    """One kind of check of a backend for a VIP: how it is sent, and what is under way of it."""

    __slots__ = (
        "connection", "dip", "form", "hop", "ifindex", "mac", "packed", "port", "reset", "sent", "sequence", "syn",
        "timeout", "timer", "to", "tunnel", "turn", "vip", "waiting", "whole",
    )  # fmt: skip

    def __init__(self, dip: Address, vip: Vip, form: OptionForm | None) -> None:
        """``form``: of the redirect; None: it is a check of the fallback."""
        self.dip, self.vip, self.form = dip, vip, form
        #: Where the SYN goes, and the SYN-ACK must come from.
        self.to = dip if form else vip.address
        self.packed = self.to.packed
        self.whole = mapped(dip) + vip.key()
        self.turn = secrets.randbits(16)
        self.hop: NextHop | None = None  # that it is aimed at
        self.tunnel = False
        self.waiting: list[asyncio.Future[Answer]] = []  # those who asked; none: nothing is under way
        self.timer: asyncio.TimerHandle | None = None
        self.port = self.sequence = 0
        self.sent = self.timeout = 0.0

    def aim(self, hop: NextHop, source: Address, *, tunnel: bool) -> None:
        """Send it so from now on."""
        self.hop, self.tunnel, self.ifindex = hop, tunnel, hop.ifindex
        self.mac = hop.dst_mac
        redirect = self.vip.address if self.form else None
        options = segments.options_of_syn(hop.mtu, self.to.version, redirect, self.form or OptionForm.CRAB)
        self.syn = self._template(hop, source, SYN, options)
        self.reset = self._template(hop, source, RST, b"")
        self.connection = mapped(source) + self.packed + self.vip.port.to_bytes(2, "big")

    def _template(self, hop: NextHop, source: Address, flags: int, options: bytes) -> Template:
        tcp = segments.segment(source, self.to, (0, self.vip.port), 0, flags, options)
        inner = segments.packet(source, self.to, segments.TCP, tcp)
        if self.tunnel:
            assert hop.source
            protocol = segments.IPIP if self.to.version == 4 else segments.IPV6
            inner = segments.packet(hop.source, self.dip, protocol, inner)
        return Template(segments.frame(hop, inner), len(tcp))


class Sounder:
    """Sends the checks of one network namespace, and reads what comes back: :meth:`start`, then :meth:`close`.

    Ports do not bound how many may be under way: a SYN is known by its port and its sequence number (a keyed hash of
    where it goes), and of a kind each pair of backend and VIP has one at a time: whoever asks for it meanwhile gets the
    same answer.
    """

    def __init__(self) -> None:
        self._vips: frozenset[Address] = frozenset()
        self._key = secrets.token_bytes(16)
        self._ports: list[socket.socket] = []
        self._first = 0
        self._heard: dict[int, socket.socket] = {}  # by IP version
        self._unread = select.poll()
        self._sources: set[Address] = set()
        self._readers: list[Reader] = []
        self._senders: dict[int, socket.socket] = {}
        self._checks: dict[Key, _Check] = {}
        self._waiting: deque[_Check] = deque()
        self._flush: asyncio.Handle | None = None
        self._sent: dict[tuple[int, int], _Check] = {}  # by port, and TAG of the sequence number
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
            for version, program in self._filters().items():
                # Of all interfaces.  What comes before there is a filter is for none of these ports.
                sock = socket.socket(
                    socket.AF_PACKET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, socket.htons(ETH_P[version])
                )
                self._heard[version] = sock
                self._unread.register(sock, select.POLLIN)
                sockfilter.attach(sock, program)
                sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, WAITING)
                self._readers.append(Reader(sock, ROOM, self._take, self._lost))
        except OSError as error:
            self.close()
            raise KernelError(f"cannot check backends by SYNs: {error.strerror}") from None

    def follow(self, services: Iterable[Service]) -> None:
        """These services' backends are asked from now on, others forgotten; and no check is sent from one of their
        VIPs, though it may be the host's own address."""
        services = list(services)
        pairs = {(backend.address, service.vip) for service in services for backend in service.backends}
        self._checks = {key: check for key, check in self._checks.items() if check.waiting or key[:2] in pairs}
        dips = {dip for dip, _ in pairs}
        self._macs = {mac: dip for mac, dip in self._macs.items() if dip in dips}
        self._vips = frozenset(service.vip.address for service in services)
        for check in self._checks.values():
            check.hop = None  # another source may be right

    def close(self) -> None:
        """Answer what is under way, and give up ports and sockets."""
        for check in self._checks.values():
            if check.timer:
                self._reset(check, check.sequence + 1)
            self._finish(check, Answer(None, "the checks have ended"))
        self._waiting.clear()
        if self._flush:
            self._flush.cancel()
        while self._readers:
            self._readers.pop().close()
        for sock in (*self._heard.values(), *self._senders.values(), *self._ports):
            sock.close()
        self._heard, self._senders, self._ports = {}, {}, []
        self._unread = select.poll()

    async def redirect(self, hop: NextHop, dip: Address, vip: Vip, form: OptionForm, timeout: float) -> Answer:
        """Whether a backend takes redirected connections: a SYN with the redirect to ``vip`` goes to ``dip``, and the
        SYN-ACK must echo it.  ``timeout``: seconds."""
        if dip.version != vip.address.version:
            return Answer(None, f"IPv{vip.address.version} clients cannot be redirected to an IPv{dip.version} address")
        return await self._ask((dip, vip, True), hop, form, tunnel=False, timeout=timeout)

    async def fallback(self, hop: NextHop, dip: Address, vip: Vip, fallback: Fallback, timeout: float) -> Answer:
        """Whether a backend serves by direct server return: a SYN to ``vip`` goes to ``dip`` as the workers send it,
        and must be answered as the VIP.  ``timeout``: seconds."""
        by_mac = hop.on_link and fallback is not Fallback.DSR_IPIP and dip.version == vip.address.version
        if not by_mac and fallback is Fallback.DSR_L2 and hop.state is HopState.RESOLVED:
            why = f"it is behind {hop.gateway}" if hop.gateway else "it is of another IP version than the VIP"
            return Answer(False, f"dsr-l2 does not reach it: {why}; use fallback auto or dsr-ipip")
        return await self._ask((dip, vip, False), hop, None, tunnel=not by_mac, timeout=timeout)

    def _ask(
        self, key: Key, hop: NextHop, form: OptionForm | None, *, tunnel: bool, timeout: float
    ) -> asyncio.Future[Answer]:
        loop = asyncio.get_running_loop()
        asked = loop.create_future()
        check = self._checks.get(key)
        if check and check.waiting:
            check.waiting.append(asked)
            return asked
        if check is None or check.form is not form:
            if len(self._checks) >= MOST:
                self._macs.clear()
                self._checks = {key: check for key, check in self._checks.items() if check.waiting}
            check = self._checks[key] = _Check(key[0], key[1], form)
        aimed = check.tunnel is tunnel and (check.hop is hop or check.hop == hop)
        if not aimed and (obstacle := self._aim(check, hop, tunnel)):
            asked.set_result(obstacle)
            return asked
        check.waiting.append(asked)
        check.timeout = timeout
        self._waiting.append(check)
        if self._flush is None:
            self._flush = loop.call_soon(self._send_waiting)
        return asked

    def _aim(self, check: _Check, hop: NextHop, tunnel: bool) -> Answer | None:
        """What keeps the check from being sent, if anything."""
        if hop.state is not HopState.RESOLVED:
            gone = hop.state is HopState.UNRESOLVED and not hop.asking
            return Answer(False if gone else None, hop.reason)
        version = check.to.version
        source = self._source(hop, version, check)
        if source is None:
            return Answer(None, f"this host has no IPv{version} address to ask from, other than VIPs")
        if tunnel and hop.source is None:
            return Answer(None, f"the kernel has no address to send to {check.dip} from")
        if hop.on_link:
            self._macs[hop.dst_mac] = check.dip
        self._hear({source, hop.source} if tunnel and hop.source else {source})
        check.aim(hop, source, tunnel=tunnel)
        if source != hop.source:  # and it may go
            check.hop = None
        return None

    def _filters(self) -> dict[int, list[sockfilter.Step]]:
        return segments.taken(self._first, self._first + PORTS - 1, self._sources)

    def _hear(self, sources: set[Address]) -> None:
        """Take what comes to these addresses, and to no others, as this host may be a router for other hosts."""
        if not sources <= self._sources:
            self._sources |= sources
            for version, program in self._filters().items():
                sockfilter.attach(self._heard[version], program)

    def _source(self, hop: NextHop, version: int, check: _Check) -> Address | None:
        """An address to ask from, which the answer finds its way to."""
        avoided = self._vips | {check.vip.address, check.dip}
        if hop.source and hop.source.version == version and hop.source not in avoided:
            return hop.source
        now = time.monotonic()
        until, own = self._own
        if now >= until:
            own = _own_addresses()
            self._own = now + ADDRESSES, own
        able = [(index != hop.ifindex, address) for address, index in own if address.version == version]
        return next((address for _, address in sorted(able, key=lambda a: a[0]) if address not in avoided), None)

    def _number(self, check: _Check) -> None:
        """Give it a port and a sequence number: a keyed hash of the connection, so that none has two checks at a time
        (of a VIP with more backends than there are ports some may share one)."""
        for attempt in itertools.count():
            check.turn += 1
            check.port = self._first + check.turn % PORTS
            of = check.connection if attempt < FEW else check.connection + check.whole
            hashed = hashlib.blake2s(of + check.port.to_bytes(2, "big"), key=self._key, digest_size=3).digest()
            tag = int.from_bytes(hashed, "big")
            if (check.port, tag) not in self._sent:
                break
        # By the upper byte a SYN is told from one of an earlier turn that a server still remembers.  They are so far
        # apart that it takes none for a part of the other connection, and says so (RFC 9293, 3.10.7.4).
        check.sequence = (check.turn & 0xFF) << 24 | tag
        self._sent[check.port, tag] = check

    def _send_waiting(self) -> None:
        """So many that all else in the loop has its turn."""
        loop = asyncio.get_running_loop()
        for _ in range(min(BATCH, len(self._waiting))):
            check = self._waiting.popleft()
            self._number(check)
            check.sent = time.monotonic()
            syn = check.syn.filled(check.port, check.sequence, int(check.sent * 1000) & 0xFFFFFFFF)
            if problem := self._send(check.ifindex, syn):
                self._finish(check, Answer(None, problem))
            else:
                check.timer = loop.call_later(check.timeout, self._silent, check)
        self._flush = loop.call_soon(self._send_waiting) if self._waiting else None

    def _send(self, index: int, frame: bytearray) -> str:
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
            check.timer = None
        self._sent.pop((check.port, check.sequence & TAG), None)
        for asked in check.waiting:
            if not asked.done():  # who asked may have given up
                asked.set_result(answer)
        check.waiting.clear()

    def _reset(self, check: _Check, sequence: int) -> None:
        """End what the server may have begun, by the way that the SYN went."""
        self._send(check.ifindex, check.reset.filled(check.port, sequence & 0xFFFFFFFF))

    def _silent(self, check: _Check, until: float = 0.0) -> None:
        """Its time is over; but what came while the event loop, or the whole machine, stood still is read first."""
        now = time.monotonic()
        if self._unread.poll(0) and (not until or now < until):
            again = partial(self._silent, check, until or now + check.timeout)
            check.timer = asyncio.get_running_loop().call_later(READ_ON, again)
            return
        self._reset(check, check.sequence + 1)
        self._finish(check, Answer(False, _silence(check), now - check.sent))

    def _lost(self, error: Exception) -> None:
        if count := self._seldom.due("lost"):
            log.warning("answers to checks were lost", error=repr(error), times=count)

    def _take(self, data: bytes, sender: Any) -> None:
        heard = segments.parse(data)
        if heard is None:
            return
        about = heard.sequence if isinstance(heard, Complaint) else (heard.acknowledged - 1) & 0xFFFFFFFF
        check = self._sent.get((heard.port, about & TAG))
        if check is None:
            return
        seconds = time.monotonic() - check.sent
        by = check.to if heard.source == check.packed else ip_address(heard.source)
        if isinstance(heard, Complaint):
            if about == check.sequence:
                self._finish(check, Answer(False, _complained(check, heard, by), seconds, by=by))
            return
        flags = heard.flags & (SYN | RST | ACK)
        if about != check.sequence:
            if flags == ACK:  # a challenge (RFC 9293, 3.10.7.4)
                self._reset(check, heard.acknowledged)
                reason = "its server still has an earlier check's connection; are RSTs dropped on the way to it?"
                self._finish(check, Answer(None, reason, seconds, by=by))
            return
        if flags == SYN | ACK:
            self._reset(check, heard.acknowledged)
        elif flags != RST | ACK:
            return
        other = self._macs.get(sender[4]) if not check.form and sender[4] != check.mac else None
        if other and other != check.dip:
            reason = f"{other} answered in its place: it sent the SYN to the VIP back; is the VIP on its lo?"
            self._finish(check, Answer(False, reason, seconds, by=by))
        else:
            ok, reason, echoed = _judged(check, heard, by)
            self._finish(check, Answer(ok, reason, seconds, bool(flags & SYN), echoed, by))


def _reserve() -> list[socket.socket]:
    """Sockets that have :data:`PORTS` ports one after the other, the highest that are free of those that the kernel
    gives to whoever asks for none in particular.  Raises OSError."""
    low, high = map(int, (SETTINGS / "ip_local_port_range").read_text().split())
    kept = [one.split("-") for one in (SETTINGS / "ip_local_reserved_ports").read_text().strip().split(",") if one]
    error = OSError(errno.EADDRINUSE, f"there are no {PORTS} ports together that are free")
    for first in range(high - PORTS + 1, low - 1, -PORTS):
        taken: list[socket.socket] = []
        if any(int(one[0]) < first + PORTS and first <= int(one[-1]) for one in kept):
            continue  # the administrator keeps them for somebody
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
    """A listener that hears nothing: nobody can have the port, and nobody is answered."""
    try:
        sock = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
    except OSError:  # this host has no IPv6
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        if sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        sock.bind(("", port))
        sockfilter.attach(sock, [sockfilter.LEAVE])
        sock.listen(0)
    except OSError:
        sock.close()
        raise
    return sock


def _own_addresses() -> list[tuple[Address, int]]:
    """This host's addresses that it is reached by, and the interface of each."""
    with suppress(OSError), Netlink() as netlink:
        reached = rtnetlink.reached_by(netlink)
        return [(ip_address(text), index) for text, index in rtnetlink.addresses(netlink).items() if text in reached]
    return []


def _judged(check: _Check, reply: Reply, by: Address) -> tuple[bool, str, bool]:
    """Of a SYN-ACK or RST to a check's SYN: whether it is sound, in words, and whether it has the redirect."""
    if reply.flags & RST:
        only = "" if check.form else f" (on {check.dip} alone is not enough for clients that are not redirected)"
        return False, f"refused: nothing listens there on {host_port(check.to, check.vip.port)}{only}", False
    echoed = list(segments.redirects(reply.options)) if check.form else []
    sound = (check.form, check.vip.address.packed) in echoed
    if by != check.to or reply.source_port != check.vip.port:
        if not check.form and by == check.dip:
            return False, f"answers as {by}, not as the VIP: is the VIP on its lo?", False
        known, other = host_port(check.to, check.vip.port), host_port(by, reply.source_port)
        return False, f"answers as {other}, not as {known}: addresses are translated on the way", sound
    if not check.form:
        return True, "answers as the VIP", False
    if sound:
        return True, "SYN-ACK with the redirect", True
    if echoed:
        return False, f"SYN-ACK with a redirect to {ip_address(echoed[0][1])}, which was not in the SYN", False
    reason = (
        f"SYN-ACK without the redirect: no agent for {check.vip} there, or a filter on the way takes TCP options out"
    )
    return False, reason, False


def _silence(check: _Check) -> str:
    where = host_port(check.to, check.vip.port)
    if check.form:
        return f"no answer from {where}: a firewall, a full accept queue, or a filter of TCP options drops the SYN"
    tunnel = ", whether it takes IP in IP" if check.tunnel else ""
    return (
        f"no answer as {where}: see whether the VIP is on its lo{tunnel}, and whether a firewall, rp_filter or a full"
        " accept queue drops SYNs"
    )


def _complained(check: _Check, complaint: Complaint, by: Address) -> str:
    told = f"{complaint.what}, says {by}"
    if complaint.what in (segments.PROHIBITED, segments.PORT):  # a host itself sends a RST
        return f"{told}: a firewall there refuses the SYN"
    if complaint.what == segments.NO_PROTOCOL and complaint.tunnel:
        return f"{told}: it does not take IP in IP; its agent does with --dsr"
    if complaint.what == segments.TOO_BIG:
        return f"{told}: the way's MTU is too small for a SYN; the kernel takes it for larger"
    if complaint.what == segments.LOOP:
        return f"{told}: packets go in a circle; {'see the routes' if check.form else 'is the VIP on its lo?'}"
    return told
