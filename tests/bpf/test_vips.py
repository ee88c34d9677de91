"""What the XDP program does with packets to a VIP that are no service's: user space's, or the kernel's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from ipaddress import ip_address

import pytest
from crablb._native import ffi, lib
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption
from scapy.layers.inet6 import (
    HBHOptUnknown,
    ICMPv6EchoRequest,
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6ParamProblem,
    IPv6,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
)
from scapy.layers.l2 import Dot1AD, Dot1Q
from scapy.packet import Packet, Raw

from crablb.dataplane import statistics
from crablb.kernel import bpf
from crablb.model import mapped
from tests.helpers.frames import ether
from tests.helpers.native import compiled
from tests.helpers.programs import forwarding

CLIENT = {4: "10.0.0.1", 6: "fd00::1"}
VIP = {4: "10.0.0.100", 6: "fd00::100"}
XDP_DROP, XDP_PASS, XDP_REDIRECT = 1, 2, 4
ECHO, CLOSED, ALL = lib.CRAB_VIP_ECHO, lib.CRAB_VIP_CLOSED, lib.CRAB_VIP_ALL
FAMILIES = pytest.mark.parametrize("family", [4, 6])


@pytest.fixture
def program(namespace) -> Iterator[bpf.Object]:
    with forwarding(bytes(16)) as loaded:
        yield loaded


def own(program: bpf.Object, kinds: int) -> Callable[[Packet], int]:
    """What becomes of a frame when these kinds of a VIP's packets are user space's; none changes on the way."""
    for vip in VIP.values():
        program.map("vips").update(mapped(ip_address(vip)), kinds)

    def run(packet: Packet) -> int:
        frame = bytes(packet)
        got = program.program("crab_lb").test_run(frame)
        assert got.data == frame
        return int(got.retval)

    return run


def counts(program: bpf.Object) -> dict[str, int]:
    found = {n: program.map("xdp_counters").sum_u64(i) for i, n in enumerate(statistics.XDP_COUNTERS)}
    return {name: n for name, n in found.items() if n}


def ip(family: int, hops: int = 64, **more: object) -> Packet:
    layer, name = (IP, "ttl") if family == 4 else (IPv6, "hlim")
    return layer(**{"src": CLIENT[family], "dst": VIP[family], name: hops, **more})


def echo(family: int) -> Packet:
    return ICMP() if family == 4 else ICMPv6EchoRequest()


@FAMILIES
@pytest.mark.parametrize("head", [ether(), ether() / Dot1Q(vlan=7), ether() / Dot1AD(vlan=9) / Dot1Q(vlan=7)])
def test_what_is_a_vips(program, family, head):
    run = own(program, ECHO | CLOSED)
    for upper in (echo(family), TCP(dport=81, flags="S"), TCP(dport=81, flags="A"), TCP(dport=81, flags="R")):
        assert run(head / ip(family) / upper) == XDP_REDIRECT
    assert counts(program) == {"vip": 4}


@FAMILIES
def test_a_service_is_one_as_before(program, family):
    run = own(program, ECHO | CLOSED | ALL)
    assert run(ether() / ip(family) / TCP(dport=80, flags="S")) == XDP_REDIRECT
    assert counts(program) == {"syn": 1}


@FAMILIES
def test_the_kinds_that_are_asked_for(program, family):
    ping, tcp, udp = ip(family) / echo(family), ip(family) / TCP(dport=81), ip(family) / UDP()
    for kinds, wanted in (
        (ECHO, [XDP_REDIRECT, XDP_PASS, XDP_PASS]),
        (CLOSED, [XDP_PASS, XDP_REDIRECT, XDP_PASS]),
        (ECHO | CLOSED | ALL, [XDP_REDIRECT, XDP_REDIRECT, XDP_REDIRECT]),
    ):
        run = own(program, kinds)
        assert [run(ether() / packet) for packet in (ping, tcp, udp)] == wanted
    program.map("vips").delete(mapped(ip_address(VIP[family])))
    assert [run(ether() / packet) for packet in (ping, tcp, udp)] == [XDP_PASS] * 3


def rest(family: int, hops: int) -> dict[str, Packet]:
    """Into options each router on the way has written."""
    head = ether() / ip(family, hops)
    written = bytes([5 + 4 * (64 - hops) // 2]) + bytes([hops]) * 8
    if family == 4:
        return {
            "udp": head / UDP(dport=53) / Raw(b"question"),
            "empty": head,
            "other": ether() / ip(4, hops, proto=132) / Raw(bytes(30)),
            "fragment": ether() / ip(4, hops, flags="MF", proto=6) / Raw(bytes(64)),
            "last-fragment": ether() / ip(4, hops, frag=3, proto=17) / Raw(bytes(64)),
            "options": ether() / ip(4, hops, options=IPOption(b"\x01" * 4)) / TCP(dport=80, flags="S"),
            "written-into": ether() / ip(4, hops, options=IPOption(b"\x07\x0b" + written)) / UDP(dport=53),
            "written-into-icmp": ether() / ip(4, hops, options=IPOption(b"\x07\x0b" + written)) / ICMP(),
            "icmp": head / ICMP(type=13),
            "tagged": ether() / Dot1Q(vlan=7) / ip(4, hops) / UDP(dport=53),
        }
    return {
        "udp": head / UDP(dport=53) / Raw(b"question"),
        "empty": ether() / ip(6, hops, nh=59),
        "other": ether() / ip(6, hops, nh=132) / Raw(bytes(30)),
        "fragment": head / IPv6ExtHdrFragment(m=1) / TCP(dport=80, flags="S"),
        "options": head / IPv6ExtHdrHopByHop() / TCP(dport=80, flags="S"),
        "written-into": head / IPv6ExtHdrHopByHop(options=HBHOptUnknown(otype=0x3E, optdata=written)) / UDP(dport=53),
        "icmp": head / ICMPv6ParamProblem(),
        "tagged": ether() / Dot1Q(vlan=7) / ip(6, hops) / UDP(dport=53),
    }


@FAMILIES
def test_what_comes_back_is_not_passed_again(program, family):
    """The kernel gets what is sent, also if that is sent again; what it sent back to the network has fewer hops."""
    run = own(program, CLOSED)
    for what in rest(family, 64):
        assert [run(rest(family, hops)[what]) for hops in (62, 64, 64)] == [XDP_PASS] * 3, what
        assert [run(rest(family, hops)[what]) for hops in (62, 60, 63)] == [XDP_REDIRECT] * 3, what
        assert run(rest(family, 64)[what]) == XDP_PASS, what
    assert counts(program)["vip"] == 3 * len(rest(family, 64))


@FAMILIES
def test_what_differs_is_not_what_came_before(program, family):
    run = own(program, CLOSED)
    assert run(ether() / ip(family, 64) / UDP(sport=1, dport=53) / Raw(b"one")) == XDP_PASS
    for other in (
        ip(family, 62) / UDP(sport=2, dport=53) / Raw(b"one"),
        ip(family, 62) / UDP(sport=1, dport=53) / Raw(b"two"),
        ip(family, 62, src="10.0.0.9" if family == 4 else "fd00::9") / UDP(sport=1, dport=53) / Raw(b"one"),
    ):
        assert run(ether() / other) == XDP_PASS
    if family == 4:
        assert run(ether() / ip(4, 62, id=7) / UDP(sport=1, dport=53) / Raw(b"one")) == XDP_PASS


def test_neighbour_discovery_is_the_kernels(program):
    """A router asks a neighbour that it knows by unicast (RFC 4861, 7.3.3)."""
    run = own(program, ECHO | CLOSED | ALL)
    for message in (ICMPv6ND_NS(tgt=VIP[6]), ICMPv6ND_NA(tgt=VIP[6])):
        for hops in (255, 254):
            assert run(ether() / ip(6, hops) / message) == XDP_PASS
    assert counts(program) == {"pass_not_vip": 4}


@FAMILIES
def test_what_is_sent_to_a_group_or_another_machine(program, family):
    run = own(program, ECHO | CLOSED | ALL)
    program.map("macs").update(1, bytes.fromhex("0200000000020000") * lib.CRAB_MAX_MACS)
    for mac in ("ff:ff:ff:ff:ff:ff", "01:00:5e:00:00:01", "02:00:00:00:00:99"):
        head = ether()
        head.dst = mac
        for upper in (echo(family), TCP(dport=81, flags="S"), UDP()):
            assert run(head / ip(family) / upper) == XDP_PASS
    assert "vip" not in counts(program)


@FAMILIES
def test_a_handler_comes_first(program, family):
    run = own(program, ECHO | CLOSED | ALL)
    program.map("handlers").update(0, bytes(ffi.buffer(compiled([{"protocol": 17, "port": 53}]))))
    assert run(ether() / ip(family) / UDP(dport=53)) == XDP_REDIRECT
    assert run(ether() / ip(family) / UDP(dport=54)) == XDP_REDIRECT
    assert counts(program) == {"handler": 1, "vip": 1}


@FAMILIES
def test_without_a_daemon_it_is_dropped(namespace, family):
    with bpf.Object(bpf.object_path("lb")) as loaded:
        run = own(loaded, ECHO | CLOSED)
        assert run(ether() / ip(family) / echo(family)) == XDP_DROP
        assert run(ether() / ip(family) / TCP(dport=81, flags="S")) == XDP_DROP
        assert counts(loaded) == {"drop_no_socket": 2}
