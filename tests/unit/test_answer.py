"""What a VIP answers that is no service's, and a service without a backend: the C hot loop against Scapy."""

from __future__ import annotations

from typing import Any

import pytest
from crablb._native import ffi, lib
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6EchoReply,
    ICMPv6EchoRequest,
    ICMPv6ND_NS,
    IPv6,
    IPv6ExtHdrHopByHop,
)
from scapy.layers.l2 import Dot1Q, Ether
from scapy.packet import Packet, Raw

from tests.helpers.frames import ether, reference
from tests.helpers.native import Core, compiled

SEED = bytes(16)
CLIENT = {4: "10.0.0.1", 6: "fd00::1"}
VIP = {4: "10.0.0.100", 6: "fd00::100"}
OTHER = {4: "10.0.0.77", 6: "fd00::77"}
FAMILIES = pytest.mark.parametrize("family", [4, 6])


def core(**how: bool) -> Core:
    made = Core(reference(SEED))
    made.set_answers(*VIP.values(), **how)
    return made


def ip(family: int, to: str | None = None, source: str | None = None, **more: object) -> Packet:
    layer, hops = (IP, "ttl") if family == 4 else (IPv6, "hlim")
    return layer(src=source or CLIENT[family], dst=to or VIP[family], **{hops: 7}, **more)


def echo(family: int, payload: bytes = b"x" * 33) -> Packet:
    return (ICMP(id=7, seq=9) if family == 4 else ICMPv6EchoRequest(id=7, seq=9)) / Raw(payload)


def answered(family: int, sent: Packet, got: bytes | None) -> Packet:
    """The answer, which comes from where the packet went, with all its checksums right."""
    assert got is not None
    there, back = Ether(bytes(sent)), Ether(got)
    assert (back.src, back.dst) == (there.dst, there.src)
    layer = IP if family == 4 else IPv6
    assert (back[layer].src, back[layer].dst) == (there[layer].dst, there[layer].src)
    assert (back[layer].ttl if family == 4 else back[layer].hlim) == 64
    again = back.copy()  # of the outermost layers; what is quoted stays
    if family == 4:
        del again[IP].chksum
    upper = again[layer].payload
    del upper.fields["cksum" if upper.name.startswith("ICMPv6") else "chksum"]
    assert bytes(again) == got
    return back


@FAMILIES
@pytest.mark.parametrize("tag", [False, True])
@given(payload=st.binary(max_size=1400))
def test_an_echo_request_is_answered(family, tag, payload):
    head = ether() / Dot1Q(vlan=7) if tag else ether()
    sent = head / ip(family) / echo(family, payload)
    outcome, got = core().outcome(bytes(sent))
    assert outcome == "echo"
    back = answered(family, sent, got)
    if family == 4:
        assert (back[ICMP].type, back[ICMP].code, back[ICMP].id, back[ICMP].seq) == (0, 0, 7, 9)
        assert bytes(back[ICMP].payload) == payload
    else:
        assert (back[ICMPv6EchoReply].id, back[ICMPv6EchoReply].seq) == (7, 9)
        assert back[ICMPv6EchoReply].data == payload


@pytest.mark.parametrize("size", [0, 1, 56])
def test_an_echo_request_of_zeros_is_answered(size):
    """A reply of zeros alone has the checksum 0xffff: with 0 its words would add up to no sum at all (RFC 1624, 3)."""
    sent = ether() / ip(4) / ICMP(id=0, seq=0) / Raw(bytes(size))
    outcome, got = core().outcome(bytes(sent))
    assert outcome == "echo"
    answered(4, sent, got)


@FAMILIES
@pytest.mark.parametrize(
    ("flags", "ack", "seq"), [("S", 1001, 0), ("A", 0, 5), ("FA", 0, 5), ("F", 1001, 0), ("", 1000, 0)]
)
def test_a_closed_port_is_reset(family, flags, ack, seq):
    """RFC 9293, 3.10.7.1: by the acknowledgement if there is one, else acknowledging what came."""
    sent = ether() / ip(family) / TCP(sport=4000, dport=82, flags=flags, seq=1000, ack=5)
    outcome, got = core().outcome(bytes(sent))
    assert outcome == "closed"
    back = answered(family, sent, got)[TCP]
    assert (back.sport, back.dport, back.seq, back.ack) == (82, 4000, seq, ack)
    assert back.flags == ("R" if "A" in flags else "RA")


@FAMILIES
@pytest.mark.parametrize("size", [0, 10, 1400])
def test_a_closed_udp_port_is_unreachable(family, size):
    sent = ether() / ip(family) / UDP(sport=4000, dport=53) / Raw(bytes(size))
    outcome, got = core().outcome(bytes(sent))
    assert outcome == "closed"
    back = answered(family, sent, got)
    error = back[ICMP] if family == 4 else back[ICMPv6DestUnreach]
    assert (error.type, error.code) == ((3, 3) if family == 4 else (1, 4))
    quoted = bytes(error.payload)
    assert len(quoted) >= (28 if family == 4 else 48)
    assert bytes(sent)[14 : 14 + len(quoted)] == quoted


def silent(family: int) -> dict[str, Packet]:
    head = ether() / ip(family)
    quoted = ip(family) / UDP()
    error = (ICMP(type=3, code=3) if family == 4 else ICMPv6DestUnreach()) / quoted
    nobody = ("0.0.0.0", "127.0.0.1", "224.0.0.1", "255.255.255.255") if family == 4 else ("::", "::1", "ff02::1")
    options = (
        ether() / ip(4, options=b"\x01" * 4) / TCP(dport=82)
        if family == 4
        else ether() / ip(6) / IPv6ExtHdrHopByHop() / TCP(dport=82)
    )
    return {
        "reset": head / TCP(dport=82, flags="R"),
        "christmas": head / TCP(dport=82, flags="SF"),
        "error": head / error,
        "other-icmp": head / (ICMP(type=13) if family == 4 else ICMPv6ND_NS(tgt=VIP[6])),
        "reply": head / (ICMP(type=0) if family == 4 else ICMPv6EchoReply()),
        "other-protocol": ether() / ip(family, **{"proto" if family == 4 else "nh": 132}) / Raw(bytes(40)),
        "options": options,
        **{f"from {one} {i}": ether() / ip(family, source=one) / upper
           for one in nobody for i, upper in enumerate((TCP(dport=82), UDP(), echo(family)))},
    }  # fmt: skip


@FAMILIES
def test_what_nobody_answers(family):
    for what, packet in silent(family).items():
        assert core().outcome(bytes(packet)) == ("drop_closed", None), what


@FAMILIES
def test_wrong_checksums_are_not_answered(family):
    for upper in (echo(family), TCP(dport=82, flags="S", chksum=0x1234)):
        frame = bytearray(bytes(ether() / ip(family) / upper))
        frame[-1] ^= 1
        assert core().outcome(bytes(frame)) == ("drop_checksum", None)
    if family == 4:
        assert core().outcome(bytes(ether() / ip(4, chksum=1) / UDP())) == ("drop_checksum", None)


@FAMILIES
def test_at_every_length(family):
    """Whatever is cut off: not a byte beyond the frame is read or written, and nothing is made up."""
    for upper in (echo(family), TCP(dport=82, flags="S"), UDP() / Raw(bytes(9))):
        frame = bytes(ether() / ip(family) / upper)
        for length in range(len(frame)):
            (got,) = core().handle(frame[:length])
            assert got is None


@FAMILIES
def test_whose_address_it_is_not(family):
    """Only VIPs that are to be answered for: one that is this machine's is the kernel's."""
    made = Core(reference(SEED))
    for upper in (echo(family), TCP(dport=82, flags="S"), UDP()):
        assert core().outcome(bytes(ether() / ip(family, OTHER[family]) / upper)) == ("drop_not_service", None)
        assert made.outcome(bytes(ether() / ip(family) / upper)) == ("drop_not_service", None)
    mapped = IPv6(src=CLIENT[6], dst=f"::ffff:{VIP[4]}")
    assert core().outcome(bytes(ether() / mapped / ICMPv6EchoRequest())) == ("drop_not_service", None)


@FAMILIES
def test_the_settings(family):
    ping, tcp, udp = (bytes(ether() / ip(family) / u) for u in (echo(family), TCP(dport=82, flags="S"), UDP()))
    quiet = core(ping=False)
    assert [quiet.outcome(f)[0] for f in (ping, tcp, udp)] == ["drop_closed", "closed", "closed"]
    quiet = core(reset=False)
    assert [quiet.outcome(f)[0] for f in (ping, tcp, udp)] == ["echo", "drop_closed", "drop_closed"]


def test_no_more_than_so_many_a_second():
    made = core()
    frames = [bytes(ether() / ip(4) / u) for u in (echo(4), TCP(dport=82, flags="S"), UDP())] * 20
    for _ in range(20):
        made.handle(*frames)
    counts = made.counts()
    assert counts["echo"] + counts["closed"] == 1000
    assert counts["drop_rate"] == 200
    assert made.handle(frames[0], now=1001) != [None]  # in the next one there is room again


def test_handlers_come_first():
    made = core()
    matches = compiled([{"protocol": 17, "port": 53}])
    lib.crab_snapshot_match(made.snapshot, matches)
    handled: list[int] = []

    @ffi.callback("void(void *, struct crab_handled *, uint32_t)")
    def handle(context: Any, frames: Any, n: int) -> None:
        for i in range(n):
            handled.append(frames[i].handler)
            frames[i].verdict = lib.CRAB_HANDLED_KEPT

    lib.crab_core_handle(made.core, handle, ffi.NULL)
    assert made.outcome(bytes(ether() / ip(4) / UDP(dport=53)))[0] == "handler_kept"
    assert made.outcome(bytes(ether() / ip(4) / UDP(dport=54)))[0] == "closed"
    assert handled == [0]


@FAMILIES
@pytest.mark.parametrize("data", [b"", b"abc"])
def test_a_service_without_a_backend_refuses(family, data):
    """Its SYNs alone: what else comes may be of connections that will be found again."""
    world = reference(SEED)
    for backend in world.backends:
        backend.usable = False
    made = Core(world)
    sent = ether() / ip(family) / TCP(sport=5, dport=80, flags="S", seq=41) / Raw(data)
    assert made.outcome(bytes(sent)) == ("drop_no_backend", None)
    made.set_refusal(0 if family == 4 else 2)
    outcome, got = made.outcome(bytes(sent))
    assert outcome == "refused"
    back = answered(family, sent, got)[TCP]
    assert (back.flags, back.ack, back.seq) == ("RA", 42 + len(data), 0)
    ack = ether() / ip(family) / TCP(sport=5, dport=80, flags="A")
    assert made.outcome(bytes(ack)) == ("drop_no_backend", None)
    many = [made.outcome(bytes(sent))[0] for _ in range(1000)]
    assert many == ["refused"] * 999 + ["drop_rate"]
