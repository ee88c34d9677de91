"""The VIPs' link-layer addresses: the load balancer answers for its VIPs, and tells when it takes them.

For IPv4 by ARP (RFC 826; probing and announcing as in RFC 5227), for IPv6 by neighbour discovery (RFC 4861, 4862).  The
kernel does not have the VIPs, so it does none of this.
"""

from __future__ import annotations

import asyncio
import ctypes
import socket
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

import structlog

from crablb.kernel.checksum import checksum
from crablb.model import Address

__all__ = ["Announcer", "Question", "answer", "parse"]

PROBES = 3
PROBE_INTERVAL = 0.2  # seconds
ETH_P_ARP, ETH_P_IPV6 = 0x0806, 0x86DD
ARP_REQUEST, ARP_REPLY = 1, 2
SOLICITATION, ADVERTISEMENT = 135, 136
BROADCAST = b"\xff" * 6
ALL_NODES = IPv6Address("ff02::1")

# include/uapi/linux/if_packet.h, filter.h, socket.h
SOL_PACKET, PACKET_ADD_MEMBERSHIP, PACKET_MR_MULTICAST, PACKET_OUTGOING = 263, 1, 0, 4
SO_ATTACH_FILTER = 26
#: Neighbour solicitations and advertisements, and nothing else that IPv6 carries.
FILTER = [
    (0x30, 0, 0, 20),  # ldb [20]: next header
    (0x15, 0, 3, 58),  # jeq ICMPv6
    (0x30, 0, 0, 54),  # ldb [54]: type
    (0x54, 0, 0, 0xFE),  # and: 135 and 134 become one, 136 and 137 too
    (0x15, 1, 0, 0x88),  # jeq 136 or 137: take it
    (0x15, 0, 1, 0x86),  # jeq 134 or 135: take it
    (0x06, 0, 0, 0x40000),
    (0x06, 0, 0, 0),
]

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


def probe(address: Address, mac: bytes) -> bytes:
    """Ask whether somebody has the address, without claiming it."""
    if isinstance(address, IPv4Address):
        return (
            BROADCAST + mac + b"\x08\x06" + struct.pack("!HHBBH", 1, 0x0800, 6, 4, ARP_REQUEST)
            + mac + bytes(4) + bytes(6) + address.packed
        )  # fmt: skip
    group = _group(address)
    body = struct.pack("!BBHI", SOLICITATION, 0, 0, 0) + address.packed
    return b"\x33\x33" + group.packed[12:] + mac + b"\x86\xdd" + _icmpv6(IPv6Address("::"), group, body)


def announcement(address: Address, mac: bytes) -> bytes:
    """Tell everybody that the address is at ``mac`` now."""
    if isinstance(address, IPv4Address):
        return (
            BROADCAST + mac + b"\x08\x06" + struct.pack("!HHBBH", 1, 0x0800, 6, 4, ARP_REQUEST)
            + mac + address.packed + bytes(6) + address.packed
        )  # fmt: skip
    return answer(Question(address, True, BROADCAST, None), mac)


class Announcer:
    """Answers for a set of VIPs on one interface, in its network namespace, from an event loop.

    An address that somebody else on the segment has is named in the log and not answered for.
    """

    def __init__(
        self,
        interface: str,
        ours: Iterable[bytes] = (),
        on_conflict: Callable[[Address, bytes], None] = lambda *_: None,
    ) -> None:
        """``ours``: MAC addresses that are the load balancer's too, on other interfaces of perhaps the same segment."""
        self.interface = interface
        self._ours = frozenset(ours)
        self._on_conflict = on_conflict
        self.conflicts: dict[Address, bytes] = {}  # VIP -> who has it
        self._wanted: set[Address] = set()
        self._held: set[Address] = set()
        self._sockets: dict[int, socket.socket] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def _open(self, kind: int) -> socket.socket:
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.htons(kind))
        if kind == ETH_P_IPV6:
            program = (ctypes.c_char * (8 * len(FILTER))).from_buffer_copy(
                b"".join(struct.pack("=HBBI", *step) for step in FILTER)
            )
            sock.setsockopt(
                socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("=HxxxxxxQ", len(FILTER), ctypes.addressof(program))
            )
        sock.bind((self.interface, kind))
        return sock

    @property
    def mac(self) -> bytes:
        """The interface's address, as it is now."""
        return bytes(self._sockets[ETH_P_ARP].getsockname()[4])

    def start(self, addresses: Iterable[Address]) -> None:
        loop = asyncio.get_running_loop()
        for kind in (ETH_P_ARP, ETH_P_IPV6):
            self._sockets[kind] = self._open(kind)
            loop.add_reader(self._sockets[kind], self._read, self._sockets[kind])
        self.follow(addresses)

    def follow(self, addresses: Iterable[Address]) -> None:
        """Answer for these from now on, for new ones when it is sure that nobody else does."""
        wanted = set(addresses)
        new = wanted - self._wanted
        self._wanted = wanted
        self._held &= wanted
        for address in [a for a in self.conflicts if a not in wanted]:
            del self.conflicts[address]
        if new:
            task = asyncio.create_task(self._take(new))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for sock in self._sockets.values():
            asyncio.get_running_loop().remove_reader(sock)
            sock.close()
        self._sockets.clear()

    async def _take(self, addresses: set[Address]) -> None:
        index = socket.if_nametoindex(self.interface)
        for address in addresses:
            if isinstance(address, IPv6Address):
                group = b"\x33\x33" + _group(address).packed[12:]
                request = struct.pack("=iHH8s", index, PACKET_MR_MULTICAST, 6, group)
                self._sockets[ETH_P_IPV6].setsockopt(SOL_PACKET, PACKET_ADD_MEMBERSHIP, request)
        for _ in range(PROBES):
            for address in addresses:
                self._send(probe(address, self.mac))
            await asyncio.sleep(PROBE_INTERVAL)
        for address in addresses & self._wanted:
            if address in self.conflicts:
                continue
            self._held.add(address)
            self._send(announcement(address, self.mac))
            log.info("announced", vip=str(address), mac=self.mac.hex(":"))

    def _send(self, frame: bytes) -> None:
        sock = self._sockets[int.from_bytes(frame[12:14], "big")]
        try:
            sock.send(frame)
        except OSError as error:  # the link is down; clients will ask again
            log.warning("cannot answer for a VIP", interface=self.interface, reason=error.strerror)

    def _read(self, sock: socket.socket) -> None:
        while True:
            try:
                frame, (_, _, kind, _, _) = sock.recvfrom(2048)
            except BlockingIOError:
                return
            except OSError as error:
                log.warning("cannot read from the segment", interface=self.interface, reason=error.strerror)
                return
            question = parse(frame) if kind != PACKET_OUTGOING else None
            if question and question.address in self._wanted:
                self._judge(question)

    def _judge(self, question: Question) -> None:
        address = question.address
        if address in self._held and question.asks:
            self._send(answer(question, self.mac))
        elif not question.asks and question.mac not in self._ours | {self.mac}:
            if self.conflicts.get(address) != question.mac:
                self._on_conflict(address, question.mac)
                log.error(
                    "somebody else on the segment has this VIP; find it and take the address away there",
                    vip=str(address),
                    mac=question.mac.hex(":"),
                    answered=address in self._held,
                )
            self.conflicts[address] = question.mac
