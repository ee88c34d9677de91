"""What is a packet at all: the same frames through the XDP program, which knows their flow, and the hot loop."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from ipaddress import ip_address

import pytest
from crablb._native import lib
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP
from scapy.layers.inet6 import ICMPv6PacketTooBig, IPv6
from scapy.packet import Packet, Raw

from crablb.dataplane import flows as flowmap
from crablb.dataplane import paths
from crablb.dataplane.paths import Ways
from crablb.kernel import bpf
from tests.helpers.frames import SEED, a_hop_less, ether
from tests.helpers.native import Core
from tests.helpers.programs import LO, forwarding
from tests.reference import packets

CLIENT = {4: ip_address("10.0.0.1"), 6: ip_address("fd00::1")}
VIP = {4: ip_address("10.0.0.100"), 6: ip_address("fd00::100")}
DIP = {4: ip_address("10.0.0.11"), 6: ip_address("fd00::11")}
ROUTER = {4: "10.0.0.254", 6: "fd00::fe"}
MACS = bytes.fromhex("020000000b0b020000000202")
XDP_TX, XDP_REDIRECT = 3, 4
HASHES = {f: flowmap.flow_hash(SEED, CLIENT[f], 4242, VIP[f], 80) for f in (4, 6)}


class Both:
    """Each frame through both, the flow known to the XDP program."""

    def __init__(self, loaded: bpf.Object) -> None:
        self.program, self.table = loaded.program("crab_lb"), flowmap.FlowTable(loaded.map("flows"))
        services = [packets.Service(VIP[f].packed, 80, table=[i] * 61) for i, f in enumerate((4, 6))]
        backends = [packets.Backend(DIP[f].packed, MACS[:6], MACS[6:], cr=False) for f in (4, 6)]
        self.core = Core(packets.LoadBalancer(services, backends, SEED, False))

    def forward(self, frame: bytes, known: dict[int, int] = HASHES) -> tuple[bytes | None, bytes | None]:
        """What either sends; ``None``: nothing.  ``known``: the flows' hashes, by family."""
        out = self.by_program(frame, known)
        (other,) = self.core.handle(frame)
        return out, other

    def by_program(self, frame: bytes, known: dict[int, int] = HASHES) -> bytes | None:
        self.table.places["hash"] = 0
        for family, hash_ in known.items():
            assert self.table.add(hash_, (4, 6).index(family), family)
        run = self.program.test_run(frame)
        return run.data if run.retval == XDP_TX else None

    def asks(self, family: int) -> bool:
        """Whether the XDP program was told to ask about the flow's next packet."""
        (flow,) = self.table.places[self.table.places["hash"] == HASHES[family]]
        return bool(flow["flags"] & lib.CRAB_FLOW_ASK)


@pytest.fixture
def both(namespace) -> Iterator[Both]:
    with forwarding(SEED) as loaded:
        for i, family in enumerate((4, 6)):
            loaded.map("paths").update(
                i, paths.path(DIP[family], MACS, 1500, None, LO, Ways(tx=True, partial=lib.CRAB_PARTIAL_FINISH))
            )
        yield Both(loaded)


def layer(family: int) -> type[Packet]:
    return IP if family == 4 else IPv6


def tcp(family: int, flags: str = "A", data: bytes = b"", **more: object) -> bytes:
    head = ether() / layer(family)(src=str(CLIENT[family]), dst=str(VIP[family]))
    return bytes(head / TCP(sport=4242, dport=80, flags=flags, **more) / Raw(data))


def icmp(family: int, quoted: int = 20) -> bytes:
    error = ICMP(type=3, code=4, nexthopmtu=1300) if family == 4 else ICMPv6PacketTooBig(mtu=1300)
    quote = layer(family)(src=str(VIP[family]), dst=str(CLIENT[family])) / TCP(sport=80, dport=4242)
    cut = bytes(quote)[: (20 if family == 4 else 40) + quoted]
    return bytes(ether() / layer(family)(src=ROUTER[family], dst=str(VIP[family])) / error / Raw(cut))


def header(family: int) -> int:
    return 20 if family == 4 else 40


def with_length(length: int) -> Callable[[bytes, int], bytes]:
    """The frame of an IP packet that says it is so long, behind its header; all else is as it should be."""

    def change(frame: bytes, family: int) -> bytes:
        said = (length + (20 if family == 4 else 0)) & 0xFFFF
        at = 14 + (2 if family == 4 else 4)
        return right(frame[:at] + struct.pack("!H", said) + frame[at + 2 :], family)

    return change


def right(frame: bytes, family: int) -> bytes:
    """With the right IPv4 header checksum."""
    if family == 6:
        return frame
    ip = frame[14:24] + b"\0\0" + frame[26:34]
    return frame[:24] + struct.pack("!H", packets.checksum(ip)) + frame[26:]


def put(at: int, new: bytes) -> Callable[[bytes, int], bytes]:
    """Other bytes behind the IP header."""

    def change(frame: bytes, family: int) -> bytes:
        start = 14 + header(family) + at
        return frame[:start] + new + frame[start + len(new) :]

    return change


def flipped(at: int) -> Callable[[bytes, int], bytes]:
    """One bit that is the other way round; from the end, if negative."""

    def change(frame: bytes, family: int) -> bytes:
        changed = bytearray(frame)
        changed[at if at < 0 else 14 + header(family) + at] ^= 4
        return bytes(changed)

    return change


REFUSED: dict[str, tuple[Callable[[int], bytes], Callable[[bytes, int], bytes]]] = {
    "length-0": (tcp, with_length(-20)),
    "length-of-no-tcp-header": (tcp, with_length(0)),
    "length-19": (tcp, with_length(19)),
    "length-past-the-frame": (tcp, with_length(21)),
    "length-that-wraps": (tcp, with_length(0xFFFF)),
    "length-that-wraps-to-the-frame's": (tcp, with_length(0x10000 - 20)),
    "shorter-than-its-checksum": (lambda f: tcp(f, data=b"data"), with_length(22)),
    "data-offset-4": (tcp, put(12, b"\x40")),
    "data-offset-past-the-segment": (tcp, put(12, b"\x60")),
    "data-offset-15": (lambda f: tcp(f, data=bytes(30)), put(12, b"\xf0")),
    "checksum": (tcp, flipped(16)),
    "payload": (lambda f: tcp(f, data=bytes(1460)), flipped(-1)),
    "payload-odd": (lambda f: tcp(f, data=bytes(1001)), flipped(-1)),
    "payload-first": (lambda f: tcp(f, data=bytes(1400)), flipped(20)),
    "reset": (lambda f: tcp(f, flags="A"), put(13, b"\x14")),
    "syn-ack": (lambda f: tcp(f, flags="SA"), lambda frame, family: frame),
    "syn-fin": (lambda f: tcp(f, flags="SF"), lambda frame, family: frame),
    "syn-rst": (lambda f: tcp(f, flags="SR"), lambda frame, family: frame),
    "syn-with-a-wrong-checksum": (lambda f: tcp(f, flags="S"), flipped(16)),
    "icmp-length-of-no-ports": (icmp, with_length(8)),
    "icmp-length-past-the-frame": (icmp, with_length(1000)),
    "icmp-length-that-wraps": (icmp, with_length(0xFFFF)),
    "icmp-checksum": (icmp, flipped(2)),
    "icmp-quote": (icmp, flipped(-1)),
    "icmp-quoted-version": (icmp, put(8, b"\x55")),
    "icmp-quoted-protocol": (icmp, lambda frame, family: put(17 if family == 4 else 14, b"\x11")(frame, family)),
    "icmp-echo": (icmp, lambda frame, family: put(0, b"\x08" if family == 4 else b"\x80")(frame, family)),
}


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("name", REFUSED)
def test_both_refuse(both, name, family):
    make, change = REFUSED[name]
    frame = make(family)
    damaged = change(frame, family)
    assert both.forward(damaged) == (None, None)
    assert not both.asks(family)


@pytest.mark.parametrize("make", [tcp, icmp])
@pytest.mark.parametrize("at", [24, 25, 22, 30])
def test_both_refuse_a_wrong_header_checksum(both, make, at):
    frame = bytearray(make(4))
    frame[at] ^= 1
    assert both.forward(bytes(frame)) == (None, None)


@pytest.mark.parametrize("make", [tcp, icmp])
@pytest.mark.parametrize("version", [0, 4, 5, 6, 15])
@pytest.mark.parametrize("family", [4, 6])
def test_both_refuse_another_version(both, make, version, family):
    frame = bytearray(make(family))
    frame[14] = version << 4 | frame[14] & 15
    got = both.forward(right(bytes(frame), family))
    assert (got == (None, None)) == (version != family)


@pytest.mark.parametrize("family", [4, 6])
def test_both_forward_what_is_sound(both, family):
    for size in (*range(0, 70), 255, 511, 512, 513, 1023, 1024, 1025, 1459, 1460):
        data = bytes((7 * i + size) % 256 for i in range(size))
        for flags in ("A", "PA", "FA", "R", "RA", "PAU"):
            frame = tcp(family, flags, data, options=[("Timestamp", (1, size))] if size % 2 else [])
            out = a_hop_less(MACS + frame[12:])
            # Of ends user space is to know.
            assert both.forward(frame) == (None if set(flags) & {"F", "R"} else out, out)
    for quoted in range(8, 20):
        frame = icmp(family, quoted)
        assert both.forward(frame) == (a_hop_less(MACS + frame[12:]),) * 2


@pytest.mark.parametrize("family", [4, 6])
def test_long_ones(both, family):
    """As of a host that joins segments: summed up by other ways, up to the longest that there are, in many buffers."""
    longest = 65535 - (header(4) if family == 4 else 0) - 20
    sizes = {n * 512 + more - 20 for n in (2, 7, 8, 15, 16, 17, 64, 127) for more in (-1, 0, 1)}
    for size in sorted(sizes | {longest - 1, longest}):
        frame = tcp(family, data=bytes((7 * i + size) % 256 for i in range(size)))
        assert both.by_program(frame) == a_hop_less(MACS + frame[12:]), size
        for at in (0, size // 2, size - 1):
            bent = bytearray(frame)
            bent[len(frame) - size + at] ^= 4
            assert both.by_program(bytes(bent)) is None, (size, at)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A packet of the flow, or an error about one, changed anywhere."""
    family = draw(st.sampled_from([4, 6]))
    if draw(st.booleans()):
        frame = icmp(family, draw(st.integers(8, 20)))
    else:
        flags = draw(st.sampled_from(["A", "A", "PA", "FA", "R", "S", "SA"]))
        frame = tcp(family, flags, draw(st.binary(max_size=40)), options=draw(st.sampled_from([[], [("MSS", 1460)]])))
    raw = bytearray(frame)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(12, min(len(raw) - 1, 80)))
        raw[at] = draw(st.integers(0, 255))
    if draw(st.booleans()):
        raw = bytearray(right(bytes(raw), family))
    match draw(st.sampled_from(["", "", "cut", "pad"])):
        case "cut":
            raw = raw[: draw(st.integers(14, len(raw)))]
        case "pad":
            raw += bytes(draw(st.integers(1, 30)))
    return bytes(raw)


@settings(max_examples=3000)
@given(damaged())
def test_the_program_forwards_nothing_that_user_space_refuses(both, frame):
    by_program, by_user_space = both.forward(frame)
    if by_program is not None:
        assert by_user_space is not None
        # Ethernet's padding may stay; a checksum of 0 may be written in either way.
        assert by_program[: len(by_user_space)].replace(b"\xff\xff", bytes(2)) == by_user_space.replace(
            b"\xff\xff", bytes(2)
        )
