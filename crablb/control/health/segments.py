"""The packets of checks by real SYNs: to write, and to read what comes back.  No sockets and no clock.

TCP after RFC 9293; the redirect option as the load balancer writes it; ICMP errors after RFC 792 and RFC 4443, IP in IP
after RFC 2003 and RFC 2473.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator
from typing import NamedTuple

from crablb._native import ffi, lib
from crablb.kernel import sockfilter
from crablb.kernel.checksum import checksum
from crablb.kernel.netlink import NextHop
from crablb.model import Address, OptionForm, mapped

__all__ = [
    "ACK", "RST", "SYN", "Complaint", "Reply", "Template",
    "frame", "options_of_syn", "packet", "parse", "redirects", "segment", "taken",
]  # fmt: skip

SYN, RST, ACK = 0x02, 0x04, 0x10
TCP, IPIP, IPV6, ICMPV6 = 6, 4, 41, 58
ICMP = 1
NOP, EOL, CRAB, EXPERIMENTAL = 1, 0, 42, 253
EXID = b"CR"
#: In a check's SYN, in the place of its timestamps' echo, which means nothing there (RFC 7323, 3.2): by this servers'
#: agents know that no connection will come of it, and do not count it as a redirect (crab_is_check of bpf/syn.h).
MARK = 0x43524142
HOPS = 64
TCP_HEADER = 20
#: Where the time is in a check's SYN.
STAMP_AT = TCP_HEADER + 8
PORT_FIELD, WORD, TCP_FIELDS = struct.Struct("!H"), struct.Struct("!I"), struct.Struct("!HHIIBB")

# Steps of classic BPF: linux/filter.h.
LD, LDH, LDB, LDH_X, LDB_X, LDX_HEADER = 0x20, 0x28, 0x30, 0x48, 0x50, 0xB1
JEQ, JGE, JGT, JSET = 0x15, 0x35, 0x25, 0x45
FARTHEST = 255  # steps that a jump goes over


class Reply(NamedTuple):
    """A TCP segment to one of our ports."""

    source: bytes  # address
    source_port: int
    port: int  # ours
    sequence: int
    acknowledged: int
    flags: int
    options: bytes


class Complaint(NamedTuple):
    """An ICMP error about a SYN of ours."""

    source: bytes  # address
    what: str
    tunnel: bool  # about the packet that the SYN was wrapped in
    port: int  # the SYN's
    sequence: int


PROHIBITED, PORT, NO_PROTOCOL = "administratively prohibited", "port unreachable", "protocol unreachable"
TOO_BIG, LOOP = "packet too big", "time exceeded"
#: ICMP errors, of IPv4 and of IPv6, by type and code; without code: any other.
ERRORS: dict[tuple[int, int] | tuple[int], str] = {
    (3, 0): "network unreachable",
    (3, 1): "host unreachable",
    (3, 2): NO_PROTOCOL,
    (3, 3): PORT,
    (3, 4): TOO_BIG,
    (3, 9): PROHIBITED,
    (3, 10): PROHIBITED,
    (3, 13): PROHIBITED,
    (3,): "unreachable",
    (11,): LOOP,
    (12,): "parameter problem",
}
ERRORS6: dict[tuple[int, int] | tuple[int], str] = {
    (1, 0): "no route to destination",
    (1, 1): PROHIBITED,
    (1, 3): "address unreachable",
    (1, 4): PORT,
    (1, 5): "source address failed policy",
    (1, 6): "reject route to destination",
    (1,): "unreachable",
    (2,): TOO_BIG,
    (3,): LOOP,
    (4, 1): NO_PROTOCOL,
    (4,): "parameter problem",
}


def options_of_syn(mtu: int, version: int, vip: Address | None = None, form: OptionForm = OptionForm.CRAB) -> bytes:
    """The options of a Linux client's SYN (RFC 9293, 7323, 2018) at time 0, and behind them the redirect to ``vip``."""
    size = max(min(mtu - (40 if version == 4 else 60), 0xFFFF), 0)
    base = struct.pack("!BBHBBBBIIBBBB", 2, 4, size, 4, 2, 8, 10, 0, MARK, NOP, 3, 3, 7)
    if vip is None:
        return base
    out = ffi.new("uint8_t[20]")
    size = lib.crab_option_redirect(out, list(OptionForm).index(form), mapped(vip))
    return base + bytes(ffi.buffer(out, size))


def redirects(options: bytes) -> Iterator[tuple[OptionForm, bytes]]:
    """The redirects in a list of options, which may be any bytes, and the address that each names."""
    at = 0
    while at < len(options) and options[at] != EOL:
        if options[at] == NOP:
            at += 1
            continue
        size = options[at + 1] if at + 1 < len(options) else 0
        if size < 2 or at + size > len(options):
            return
        kind, data = options[at], options[at + 2 : at + size]
        at += size
        form = OptionForm.CRAB
        if kind == EXPERIMENTAL and data[:2] == EXID:
            form, data = OptionForm.EXPERIMENTAL, data[2:]
        elif kind != CRAB:
            continue
        if len(data) in (4, 16):
            yield form, data


def segment(
    source: Address, destination: Address, ports: tuple[int, int], sequence: int, flags: int, options: bytes = b""
) -> bytes:
    """A TCP segment without data, between addresses of one family; ``ports``: its source's and its destination's."""
    size = 20 + len(options)
    head = struct.pack("!HHIIBBHHH", *ports, sequence & 0xFFFFFFFF, 0, size << 2, flags, 64240, 0, 0)
    tcp = head + options
    pseudo = source.packed + destination.packed + struct.pack("!II", size, TCP)
    return tcp[:16] + checksum(pseudo + tcp) + tcp[18:]


def packet(source: Address, destination: Address, protocol: int, payload: bytes) -> bytes:
    """An IP packet that is not to be fragmented."""
    if source.version == 6:
        return (
            struct.pack("!IHBB", 6 << 28, len(payload), protocol, HOPS) + source.packed + destination.packed + payload
        )
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), 0, 0x4000, HOPS, protocol, 0)
    head += source.packed + destination.packed
    return head[:10] + checksum(head) + head[12:] + payload


def frame(hop: NextHop, inner: bytes) -> bytes:
    """The frame that takes an IP packet to the next hop."""
    return hop.dst_mac + hop.src_mac + (b"\x08\x00" if inner[0] >> 4 == 4 else b"\x86\xdd") + inner


class Template:
    """A frame that is sent again and again, with another source port, sequence number and, of a SYN, time."""

    __slots__ = ("_frame", "_stamped", "_sum", "_tcp")

    def __init__(self, whole: bytes, size: int) -> None:
        """``whole``: such a frame, with zeros for these; ``size``: bytes of its TCP header, which is the last in it."""
        self._frame = whole
        self._tcp = len(whole) - size
        self._stamped = size > TCP_HEADER
        self._sum = 0xFFFF - int.from_bytes(whole[self._tcp + 16 : self._tcp + 18], "big")

    def filled(self, port: int, sequence: int, stamp: int = 0) -> bytearray:
        """The frame to send.  The checksum is changed, not made anew (RFC 1624)."""
        out, tcp = bytearray(self._frame), self._tcp
        total = self._sum + port + (sequence >> 16) + (sequence & 0xFFFF)
        PORT_FIELD.pack_into(out, tcp, port)
        WORD.pack_into(out, tcp + 4, sequence)
        if self._stamped:
            total += (stamp >> 16) + (stamp & 0xFFFF)
            WORD.pack_into(out, tcp + STAMP_AT, stamp)
        PORT_FIELD.pack_into(out, tcp + 16, (0xFFFF - total % 0xFFFF) % 0xFFFF)
        return out


def parse(data: bytes) -> Reply | Complaint | None:
    """What an IP packet is, which may be any bytes; None for all else, later fragments, and what is cut off."""
    try:
        protocol, at = _ip(data, 0)
        source = data[12:16] if data[0] >> 4 == 4 else data[8:24]
        if protocol == TCP:
            source_port, port, sequence, acknowledged, offset, flags = TCP_FIELDS.unpack_from(data, at)
            options = data[at + TCP_HEADER : at + (offset >> 4) * 4]
            return Reply(source, source_port, port, sequence, acknowledged, flags, options)
        if protocol != (ICMP if len(source) == 4 else ICMPV6):
            return None
        errors = ERRORS if protocol == ICMP else ERRORS6
        what = errors.get((data[at], data[at + 1])) or errors.get((data[at],))
        if not what:
            return None
        quoted, at = _ip(data, at + 8)
        tunnel = quoted in (IPIP, IPV6)
        if tunnel:
            quoted, at = _ip(data, at)
        if quoted != TCP:
            return None
        return Complaint(source, what, tunnel, PORT_FIELD.unpack_from(data, at)[0], WORD.unpack_from(data, at + 4)[0])
    except (struct.error, IndexError, ValueError):
        return None


def _ip(data: bytes, at: int) -> tuple[int, int]:
    """Protocol, and where its header begins, of an IP packet.  Raises IndexError or ValueError."""
    version = data[at] >> 4
    if version == 4 and data[at] & 15 >= 5 and not (data[at + 6] & 0x1F or data[at + 7]):
        return data[at + 9], at + (data[at] & 15) * 4
    if version == 6:
        return data[at + 6], at + 40
    raise ValueError


def taken(first: int, last: int, addresses: Collection[Address]) -> dict[int, list[sockfilter.Step]]:
    """Filters by IP version, of packets that begin with their IP header: what is to one of these addresses, and there a
    segment to these ports, or an ICMP error about a segment from them, wrapped or not."""

    def port(load: int, at: int) -> list[sockfilter.Step]:
        return [(load, 0, 0, at), (JGE, 0, 2, first), (JGT, 1, 0, last), sockfilter.TAKE, sockfilter.LEAVE]

    def case(value: int, steps: list[sockfilter.Step]) -> list[sockfilter.Step]:
        return [(JEQ, 0, len(steps), value), *steps]

    def to(version: int) -> list[sockfilter.Step]:
        """By the address' last four bytes."""
        words = {int.from_bytes(address.packed[-4:], "big") for address in addresses if address.version == version}
        load = (LD, 0, 0, 16 if version == 4 else 36)
        if len(words) > FARTHEST:  # all
            return []
        return [
            load,
            *((JEQ, n, 0, word) for n, word in zip(range(len(words), 0, -1), words, strict=True)),
            sockfilter.LEAVE,
        ]

    four = [
        *to(4),
        (LDH, 0, 0, 6), (JSET, 0, 1, 0x1FFF), sockfilter.LEAVE,  # a fragment, but the first
        (LDX_HEADER, 0, 0, 0),
        (LDB, 0, 0, 9), *case(TCP, port(LDH_X, 2)),
        *case(ICMP, [
            (LDB_X, 0, 0, 0), (JEQ, 3, 0, 3), (JEQ, 2, 0, 11), (JEQ, 1, 0, 12), sockfilter.LEAVE,
            (LDB_X, 0, 0, 17), *case(TCP, port(LDH_X, 28)), *case(IPIP, port(LDH_X, 48)), *case(IPV6, port(LDH_X, 68)),
            sockfilter.LEAVE,
        ]),
        sockfilter.LEAVE,
    ]  # fmt: skip
    six = [
        *to(6),
        (LDB, 0, 0, 6), *case(TCP, port(LDH, 42)),
        *case(ICMPV6, [
            (LDB, 0, 0, 40), (JGT, 0, 1, 4), sockfilter.LEAVE,
            (LDB, 0, 0, 54), *case(TCP, port(LDH, 88)), *case(IPIP, port(LDH, 108)), *case(IPV6, port(LDH, 128)),
            sockfilter.LEAVE,
        ]),
        sockfilter.LEAVE,
    ]  # fmt: skip
    return {4: four, 6: six}
