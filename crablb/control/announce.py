"""The VIPs' link-layer addresses: the load balancer answers for its VIPs, and tells when it takes them.

For IPv4 by ARP (RFC 826), for IPv6 by neighbour discovery (RFC 4861, 4862).  Whether a VIP is answered for:
:mod:`.control.claim`.  The kernel does not have the VIPs, so it does none of this.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from typing import Any

import structlog

from crablb import lasting
from crablb.control.claim import ASK_INTERVAL, Act, Claim, State
from crablb.kernel import sockfilter
from crablb.kernel.checksum import checksum
from crablb.kernel.netlink import Link
from crablb.kernel.reader import Reader
from crablb.model import Address
from crablb.seldom import Seldom

__all__ = ["ETH_P_ARP", "ETH_P_IPV6", "Announcer", "Question", "about", "answer", "parse", "probe"]

#: VIPs that are held and asked after, a second, at most.
ASKED = 50
ETH_P_ARP, ETH_P_IPV6 = 0x0806, 0x86DD
ARP_REQUEST, ARP_REPLY = 1, 2
SOLICITATION, ADVERTISEMENT = 135, 136
BROADCAST = b"\xff" * 6
ALL_NODES = IPv6Address("ff02::1")

# include/uapi/linux/if_packet.h, socket.h
SOL_PACKET, PACKET_ADD_MEMBERSHIP, PACKET_DROP_MEMBERSHIP = 263, 1, 2
PACKET_MR_MULTICAST, PACKET_OUTGOING = 0, 4

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Question:
    """A packet that concerns an address: ``asks`` who has it, or claims to have it (``asks`` False)."""

    address: Address
    asks: bool
    mac: bytes  # of its sender
    sender: Address | None  # None: a probe by somebody who wants the address


def _icmpv6(source: IPv6Address, destination: IPv6Address, body: bytes) -> bytes:
    """An IPv6 packet with an ICMPv6 message whose checksum field is zero."""
    pseudo = source.packed + destination.packed + struct.pack("!II", len(body), 58)
    body = body[:2] + checksum(pseudo + body) + body[4:]
    return struct.pack("!IHBB", 6 << 28, len(body), 58, 255) + source.packed + destination.packed + body


def parse(frame: bytes) -> Question | None:
    """What a frame asks or claims; None if it is neither, or malformed."""
    kind = frame[12:14]
    if kind == b"\x08\x06" and len(frame) >= 42 and frame[14:20] == b"\0\1\x08\0\6\4":
        operation = int.from_bytes(frame[20:22], "big")
        mac, sender, target = frame[22:28], IPv4Address(frame[28:32]), IPv4Address(frame[38:42])
        if mac[0] & 1 or not any(mac):  # nobody's
            return None
        if operation == ARP_REQUEST and sender != target:
            return Question(target, True, mac, sender if int(sender) else None)
        if operation in (ARP_REQUEST, ARP_REPLY) and int(sender):
            return Question(sender, False, mac, sender)
    if kind == b"\x86\xdd" and len(frame) >= 78 and frame[20] == 58 and frame[21] == 255:
        length = int.from_bytes(frame[18:20], "big")
        body = frame[54 : 54 + length]
        if len(body) != length or checksum(frame[22:54] + struct.pack("!II", length, 58) + body) != b"\0\0":
            return None
        source, target6 = IPv6Address(frame[22:38]), IPv6Address(body[8:24])
        if body[0] == SOLICITATION:
            return Question(target6, True, frame[6:12], source if int(source) else None)
        if body[0] == ADVERTISEMENT:
            return Question(target6, False, frame[6:12], source)
    return None


def answer(question: Question, mac: bytes) -> bytes:
    """The frame that answers a question: the address is at ``mac``."""
    address = question.address
    if isinstance(address, IPv4Address):
        sender = question.sender.packed if question.sender else bytes(4)
        return (
            question.mac + mac + b"\x08\x06" + struct.pack("!HHBBH", 1, 0x0800, 6, 4, ARP_REPLY)
            + mac + address.packed + question.mac + sender
        )  # fmt: skip
    # Solicited if somebody asked; to everybody if who asked has no address yet (RFC 4861, 7.2.4).
    to = question.sender if isinstance(question.sender, IPv6Address) else ALL_NODES
    flags = 0x60000000 if question.sender else 0x20000000
    body = struct.pack("!BBHI", ADVERTISEMENT, 0, 0, flags) + address.packed + b"\x02\x01" + mac
    return (question.mac if question.sender else b"\x33\x33\0\0\0\1") + mac + b"\x86\xdd" + _icmpv6(address, to, body)


def _group(address: IPv6Address) -> IPv6Address:
    """Its solicited-node multicast address (RFC 4291, 2.7.1)."""
    return IPv6Address(IPv6Address("ff02::1:ff00:0").packed[:13] + address.packed[13:])


def probe(address: Address, mac: bytes, source: Address | None = None) -> bytes:
    """Ask whether somebody has the address, without claiming it.

    ``source``: this host's own address; without it, whoever wants the address too takes that for a rival's question.
    """
    if isinstance(address, IPv4Address):
        return (
            BROADCAST + mac + b"\x08\x06" + struct.pack("!HHBBH", 1, 0x0800, 6, 4, ARP_REQUEST)
            + mac + (source.packed if source else bytes(4)) + bytes(6) + address.packed
        )  # fmt: skip
    group = _group(address)
    body = struct.pack("!BBHI", SOLICITATION, 0, 0, 0) + address.packed
    if isinstance(source, IPv6Address):
        body += b"\x01\x01" + mac  # source link-layer address
    sender = source if isinstance(source, IPv6Address) else IPv6Address("::")
    return b"\x33\x33" + group.packed[12:] + mac + b"\x86\xdd" + _icmpv6(sender, group, body)


def announcement(address: Address, mac: bytes) -> bytes:
    """Tell everybody that the address is at ``mac`` now."""
    if isinstance(address, IPv4Address):
        return (
            BROADCAST + mac + b"\x08\x06" + struct.pack("!HHBBH", 1, 0x0800, 6, 4, ARP_REQUEST)
            + mac + address.packed + bytes(6) + address.packed
        )  # fmt: skip
    return answer(Question(address, True, BROADCAST, None), mac)


def about(kind: int, addresses: Collection[Address]) -> list[sockfilter.Step]:
    """A filter for questions and claims about these addresses (about all, if they are too many), by their last four
    bytes; :func:`parse` looks closer."""
    words = [int.from_bytes(a.packed[-4:], "big") for a in addresses if (a.version == 4) == (kind == ETH_P_ARP)]
    these = sockfilter.among(words) if len(words) * 4 < sockfilter.MOST - 20 else [sockfilter.TAKE]
    if kind == ETH_P_ARP:
        # ld: the sender's and the target's address
        return [(0x20, 0, 0, 28), *these, (0x20, 0, 0, 38), *these, sockfilter.LEAVE]
    return [
        (0x30, 0, 0, 20),  # ldb: next header
        (0x15, 1, 0, 58),
        sockfilter.LEAVE,
        (0x30, 0, 0, 54),  # ldb: type
        (0x15, 2, 0, SOLICITATION),
        (0x15, 1, 0, ADVERTISEMENT),
        sockfilter.LEAVE,
        (0x20, 0, 0, 74),  # ld: the end of the target's address
        *these,
        sockfilter.LEAVE,
    ]


class Announcer:
    """Answers for a set of VIPs on one interface, in its network namespace, from an event loop.

    An address that somebody else on the segment has is named in the log and not answered for, until he is gone.
    """

    def __init__(
        self,
        interface: str,
        on_act: Callable[[Address, Act, bytes], None] = lambda *_: None,
        task: Callable[[str, Callable[[], Awaitable[None]]], asyncio.Task[None]] = lasting.task,
    ) -> None:
        """``on_act`` is told what befell an address, and who else has it, or had; ``task`` runs what is never done."""
        self.interface = interface
        self._on_act = on_act
        self._start_task = task
        self._index = 0
        self._ours: frozenset[bytes] = frozenset()
        self._claims: dict[Address, Claim] = {}
        self._named: dict[Address, bytes] = {}  # VIP -> who has it, as was said
        self._link: Link | None = None
        self._sockets: dict[int, socket.socket] = {}
        self._readers: list[Reader] = []
        self._seldom = Seldom()
        self._wake = asyncio.Event()
        self._waiting_until = 0.0
        self._task: asyncio.Task[None] | None = None

    @property
    def mac(self) -> bytes:
        """The interface's address, as it is now."""
        return bytes(self._sockets[ETH_P_ARP].getsockname()[4])

    @property
    def states(self) -> Mapping[Address, State]:
        """Of each VIP."""
        return {address: claim.state for address, claim in self._claims.items()}

    def left_to(self, address: Address) -> bytes:
        """The MAC address of who else has a VIP, which is taken when he is gone; empty: nobody."""
        claim = self._claims.get(address)
        return claim.left_to if claim else b""

    # ---- life ----

    def start(self, addresses: Iterable[Address], held: Collection[Address] = ()) -> None:
        """``held``: those that another process of this host answered for until now.  Raises OSError."""
        self._index = socket.if_nametoindex(self.interface)
        for kind in (ETH_P_ARP, ETH_P_IPV6):
            # Of no protocol, and so deaf, until it has its filter.
            sock = self._sockets[kind] = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
            sockfilter.attach(sock, about(kind, ()))
            sock.bind((self.interface, kind))
            self._readers.append(Reader(sock, 2048, self._take, self._lost))
        self.follow(addresses)
        for address in self._claims.keys() & set(held):
            self._claims[address].inherit(self._now())
        self._task = self._start_task(f"announce on {self.interface}", self._run)

    def follow(self, addresses: Iterable[Address]) -> None:
        """Answer for these from now on, for new ones when it is sure that nobody else does."""
        now, wanted, before = self._now(), set(addresses), set(self._claims)
        for address in before - wanted:
            del self._claims[address]
            self._named.pop(address, None)
            self._listen(address, PACKET_DROP_MEMBERSHIP)
        for address in wanted - before:
            self._claims[address] = Claim(now)
            self._listen(address, PACKET_ADD_MEMBERSHIP)
        for claim in self._claims.values():
            claim.ask_interval = max(ASK_INTERVAL, len(wanted) / ASKED)
        for kind, sock in self._sockets.items():
            sockfilter.attach(sock, about(kind, wanted))
        self._wake.set()

    def link_is(self, link: Link, ours: Collection[bytes]) -> None:
        """How the interface is now.  ``ours``: MAC addresses of this machine on perhaps the same segment."""
        before, self._link = self._link, link
        self._ours = frozenset(ours)
        if not before:
            return
        if not link.running:
            if before.running:
                log.warning("a link is down, and nobody is answered there", interface=self.interface)
            self._begin()
        elif not before.running or link.ups != before.ups:
            log.info("a link is up again; VIPs are probed and announced", interface=self.interface)
            self._begin()
        elif link.mac != before.mac:
            log.info("a new MAC address; VIPs are announced", interface=self.interface, mac=link.mac.hex(":"))
            for claim in self._claims.values():
                claim.move(self._now())
            self._wake.set()

    async def close(self) -> None:
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for reader in self._readers:
            reader.close()
        for sock in self._sockets.values():
            sock.close()
        self._readers.clear()
        self._sockets.clear()

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    def _begin(self) -> None:
        for claim in self._claims.values():
            claim.begin(self._now())
        self._wake.set()

    def _listen(self, address: Address, option: int) -> None:
        """Have the interface take what is sent to the address's group, or not any more."""
        if isinstance(address, IPv6Address):
            group = b"\x33\x33" + _group(address).packed[12:]
            request = struct.pack("=iHH8s", self._index, PACKET_MR_MULTICAST, 6, group)
            try:
                self._sockets[ETH_P_IPV6].setsockopt(SOL_PACKET, option, request)
            except OSError as error:
                log.warning("cannot listen for questions about a VIP", vip=str(address), reason=error.strerror)

    # ---- what is due ----

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            if (not self._link or self._link.running) and self.mac:  # it has none when its interface is gone
                for address, claim in list(self._claims.items()):
                    if claim.due <= (now := self._now()):
                        self._do(address, claim, claim.step(now, self.mac))
                until = min((claim.due for claim in self._claims.values()), default=None)
            else:
                until = None
            self._waiting_until = until or 0.0
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(until):
                    await self._wake.wait()

    def _do(self, address: Address, claim: Claim, act: Act | None) -> None:
        mac = self.mac
        if act is Act.PROBE:
            self._send(probe(address, mac))
        elif act in (Act.ANNOUNCE, Act.TAKEN, Act.DEFENDED):
            self._send(announcement(address, mac))
        if act not in (None, Act.PROBE, Act.ANNOUNCE):
            self._say(address, claim, act)

    def _say(self, address: Address, claim: Claim, act: Act) -> None:
        facts = {"vip": str(address), "mac": claim.holder.hex(":"), "interface": self.interface, "claims": claim.claims}
        match act:
            case Act.TAKEN:
                self._named.pop(address, None)
                log.info("announced", vip=str(address), mac=self.mac.hex(":"), interface=self.interface)
            case Act.DEFENDED:
                log.warning("somebody else on the segment claims a VIP that is held here; it is defended", **facts)
            case Act.YIELDED:
                self._named[address] = claim.holder
                log.error(
                    "somebody else on the segment has this VIP; it is left to him, whose MAC address is the lower",
                    **facts,
                )
            case Act.IN_USE:
                # He is asked every few seconds, and named once.
                if self._named.get(address) == claim.holder or not self._seldom.due(address):
                    return
                self._named[address] = claim.holder
                log.error(
                    "somebody else on the segment has this VIP; it is taken when he is gone",
                    **facts,
                )
        claim.claims = 0
        self._on_act(address, act, claim.holder)

    def _send(self, frame: bytes) -> None:
        sock = self._sockets[int.from_bytes(frame[12:14], "big")]
        try:
            sock.send(frame)
        except OSError as error:  # the link is down; clients will ask again
            if count := self._seldom.due("send"):
                log.warning("cannot answer for a VIP", interface=self.interface, reason=error.strerror, times=count)

    # ---- what is heard ----

    def _take(self, frame: bytes, sender: Any) -> None:
        question = parse(frame) if sender[2] != PACKET_OUTGOING else None
        claim = self._claims.get(question.address) if question else None
        if question and claim:
            self._judge(question, claim)

    def _judge(self, question: Question, claim: Claim) -> None:
        mac, probed = self.mac, question.asks and question.sender is None
        if not mac:
            return
        other = question.mac != mac and question.mac not in self._ours
        if question.asks and claim.state is State.HELD and (other or not probed):
            self._send(answer(question, mac))
        if other and (probed or not question.asks):
            self._do(question.address, claim, claim.heard(self._now(), question.mac, mac, probe=probed))
            if claim.due < self._waiting_until:
                self._wake.set()

    def _lost(self, error: Exception) -> None:
        """Also that the link was taken down: it may be up again before anybody can tell."""
        if count := self._seldom.due("read"):
            log.warning("cannot read from the segment", interface=self.interface, reason=repr(error), times=count)
        if isinstance(error, OSError):
            self._begin()
