"""The packets of checks by SYNs: against Scapy, against the option lists of tests/reference, and against any bytes."""

from __future__ import annotations

import socket
import struct
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP
from scapy.layers.inet6 import ICMPv6DestUnreach, ICMPv6PacketTooBig, ICMPv6ParamProblem, ICMPv6TimeExceeded, IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

from crablb.control.health import segments
from crablb.control.health.segments import ACK, RST, SYN, Complaint, Reply, Template
from crablb.kernel import sockfilter
from crablb.kernel.netlink import HopState, NextHop
from crablb.model import Address, OptionForm
from tests.reference import options as reference
from tests.reference import packets

FIRST, LAST = 40000, 40063
MACS = bytes.fromhex("020000000001"), bytes.fromhex("020000000002")
HOP = NextHop(HopState.RESOLVED, dst_mac=MACS[0], src_mac=MACS[1], mtu=1500)
OURS: dict[int, Address] = {4: IPv4Address("192.0.2.2"), 6: IPv6Address("2001:db8::2")}
THEIRS: dict[int, Address] = {4: IPv4Address("198.51.100.7"), 6: IPv6Address("2001:db8:1::7")}
VIPS: dict[int, Address] = {4: IPv4Address("10.0.0.100"), 6: IPv6Address("fd00::100")}
LAYER = {4: IP, 6: IPv6}

versions = st.sampled_from([4, 6])
ports = st.integers(0, 0xFFFF)
words = st.integers(0, 0xFFFFFFFF)


def syn(version: int, form: OptionForm | None, tunnel: int = 0, mtu: int = 1500) -> Template:
    """``tunnel``: the version of the IP header in front; 0: none."""
    options = segments.options_of_syn(mtu, version, VIPS[version] if form else None, form or OptionForm.CRAB)
    tcp = segments.segment(OURS[version], THEIRS[version], (0, 80), 0, SYN, options)
    whole = segments.packet(OURS[version], THEIRS[version], segments.TCP, tcp)
    if tunnel:
        whole = segments.packet(OURS[tunnel], THEIRS[tunnel], 4 if version == 4 else 41, whole)
    return Template(segments.frame(HOP, whole), len(tcp))


def made_anew(frame: bytes) -> bytes:
    """By Scapy, which writes all lengths and checksums itself."""
    packet = Ether(frame)
    layer: Packet | None = packet
    while layer:
        for field in ("len", "chksum", "plen", "ihl", "dataofs"):
            if field in layer.fields:
                del layer.fields[field]
        layer = layer.payload if layer.payload else None
    return bytes(packet)


@given(versions, st.sampled_from([None, *OptionForm]), st.sampled_from([0, 4, 6]), ports, words, words)
def test_syns(version, form, tunnel, port, sequence, stamp):
    """Their lengths and checksums are right, and all else is what the protocol says and a Linux client's SYN has."""
    frame = bytes(syn(version, form, tunnel).filled(port, sequence, stamp))
    assert made_anew(frame) == frame
    packet = Ether(frame)
    assert (packet.dst, packet.src) == ("02:00:00:00:00:01", "02:00:00:00:00:02")
    outer = packet[LAYER[tunnel or version]]
    assert (outer.src, outer.dst) == (str(OURS[tunnel or version]), str(THEIRS[tunnel or version]))
    inner = outer.payload if tunnel else outer
    assert (inner.src, inner.dst, inner.payload.name) == (str(OURS[version]), str(THEIRS[version]), "TCP")
    tcp = inner.payload
    assert (tcp.sport, tcp.dport, tcp.seq, tcp.ack, str(tcp.flags), tcp.urgptr) == (port, 80, sequence, 0, "S", 0)
    assert not tcp.payload
    raw = bytes(tcp)[20 : tcp.dataofs * 4]
    client = [
        reference.Option(2, struct.pack("!H", 1460 if version == 4 else 1440)),
        reference.Option(4, b""),
        reference.Option(8, struct.pack("!I", stamp) + b"CRAB"),
        reference.Option(1),
        reference.Option(3, b"\x07"),
    ]
    if form is None:
        assert reference.parse(raw) == (client, b"")
        return
    # What the load balancer makes of a client's SYN, whose offer stands behind the others.
    experimental = form is OptionForm.EXPERIMENTAL
    offered = b"".join(option.raw for option in (*client, reference.offer(experimental)))
    offered += b"\x01" * (-len(offered) % 4)
    assert raw == packets.rewrite(offered, experimental, VIPS[version].packed)
    assert len(raw) <= 40


@given(versions, ports, words)
def test_resets(version, port, sequence):
    tcp = segments.segment(OURS[version], THEIRS[version], (0, 80), 0, RST)
    whole = segments.packet(OURS[version], THEIRS[version], segments.TCP, tcp)
    frame = bytes(Template(segments.frame(HOP, whole), len(tcp)).filled(port, sequence))
    assert made_anew(frame) == frame
    tcp = Ether(frame)[TCP]
    assert (tcp.sport, tcp.dport, tcp.seq, str(tcp.flags), tcp.options) == (port, 80, sequence, "R", [])


def test_small_and_large_ways():
    """The MSS is what a way's MTU leaves, of whatever MTU there is."""
    for mtu, mss in ((68, 28), (1280, 1240), (9000, 8960), (65536, 65496), (1 << 20, 65535), (0, 0)):
        assert dict(Ether(bytes(syn(4, None, mtu=mtu).filled(1, 2, 3)))[TCP].options)["MSS"] == mss


# ---- what comes back ----


def reply(version: int, port: int, flags: str, options: bytes = b"") -> Packet:
    tcp = TCP(sport=80, dport=port, seq=5, ack=7, flags=flags, dataofs=5 + len(options) // 4)
    return LAYER[version](src=str(THEIRS[version]), dst=str(OURS[version])) / tcp / Raw(options)


#: ICMP errors that are told of, without what they quote, and in words.
TOLD = {
    4: [
        (ICMP(type=3, code=1), "host unreachable"),
        (ICMP(type=3, code=2), "protocol unreachable"),
        (ICMP(type=3, code=3), "port unreachable"),
        (ICMP(type=3, code=4, nexthopmtu=1400), "packet too big"),
        (ICMP(type=3, code=13), "administratively prohibited"),
        (ICMP(type=3, code=15), "unreachable"),
        (ICMP(type=11, code=0), "time exceeded"),
        (ICMP(type=12, code=0), "parameter problem"),
    ],
    6: [
        (ICMPv6DestUnreach(code=0), "no route to destination"),
        (ICMPv6DestUnreach(code=1), "administratively prohibited"),
        (ICMPv6DestUnreach(code=4), "port unreachable"),
        (ICMPv6DestUnreach(code=9), "unreachable"),
        (ICMPv6PacketTooBig(mtu=1280), "packet too big"),
        (ICMPv6TimeExceeded(), "time exceeded"),
        (ICMPv6ParamProblem(code=1), "protocol unreachable"),
        (ICMPv6ParamProblem(code=0), "parameter problem"),
    ],
}


def complaint(version: int, error: Packet, quoted: bytes) -> bytes:
    return bytes(LAYER[version](src=str(THEIRS[version]), dst=str(OURS[version])) / error / Raw(quoted))


def test_replies():
    for version in (4, 6):
        found = segments.parse(bytes(reply(version, 40001, "SA", b"\x02\x04\x05\xb4")))
        assert found == Reply(THEIRS[version].packed, 80, 40001, 5, 7, SYN | ACK, b"\x02\x04\x05\xb4")
    # With IP options.
    raw = b"\x46" + bytes(reply(4, 40001, "RA"))[1:20] + bytes(4) + bytes(reply(4, 40001, "RA"))[20:]
    assert segments.parse(raw) == Reply(THEIRS[4].packed, 80, 40001, 5, 7, RST | ACK, b"")


@pytest.mark.parametrize("tunnel", [0, 4, 6])
@pytest.mark.parametrize("version", [4, 6])
def test_complaints(version, tunnel):
    """About a SYN, or the packet that wraps it, whole or its headers alone."""
    outer = tunnel or version
    sent = bytes(syn(version, OptionForm.CRAB, tunnel).filled(40002, 0x12345678, 9))[14:]
    least = sent[: (20 if outer == 4 else 40) + ((20 if version == 4 else 40) if tunnel else 0) + 8]
    for error, what in TOLD[outer]:
        for quoted in (sent, least):
            found = segments.parse(complaint(outer, error, quoted))
            assert found == Complaint(THEIRS[outer].packed, what, bool(tunnel), 40002, 0x12345678)
        assert segments.parse(complaint(outer, error, least[:-1])) is None
    echo = IP(src="198.51.100.7") / ICMP(type=8) / Raw(sent)
    assert segments.parse(bytes(echo)) is None


def test_what_is_neither():
    for data in (
        b"",
        b"\x45",
        bytes(reply(4, 40001, "SA"))[:30],
        bytes(IP(frag=1) / Raw(bytes(40))),
        bytes(IP(proto=17) / Raw(bytes(40))),
        b"\x44" + bytes(reply(4, 40001, "SA"))[1:],  # a header of 16 bytes
        bytes(IPv6(nh=1) / Raw(b"\3\1" + bytes(60))),  # ICMP in IPv6
    ):
        assert segments.parse(data) is None, data


@given(st.binary(max_size=200))
def test_any_bytes(data):
    """Nothing raises; nor with headers in front that lead on to them."""
    for front in (
        b"",
        b"\x45" + bytes(8) + b"\x06" + bytes(10),
        b"\x45" + bytes(8) + b"\x01" + bytes(10) + b"\x03\x01",
    ):
        segments.parse(front + data)
    segments.parse(b"\x60" + bytes(5) + b"\x3a" + bytes(33) + b"\x01\x04" + data)
    list(segments.redirects(data))


@given(st.binary(max_size=40))
def test_redirects_in_any_list(options):
    """What the reference finds in it."""
    listed, _ = reference.parse(options)
    mine = [one for one in segments.redirects(options) if len(one[1]) in (4, 16)]
    theirs = []
    for option in listed:
        data = option.data or b""
        if option.kind == reference.EXPERIMENT_1 and data[:2] == reference.EXID:
            theirs.append((OptionForm.EXPERIMENTAL, data[2:]))
        elif option.kind == reference.CRAB:
            theirs.append((OptionForm.CRAB, data))
    assert mine == [one for one in theirs if len(one[1]) in (4, 16)]


# ---- the filters ----


class Filtered:
    """Whether a filter takes a packet: the kernel's own answer."""

    def __init__(self, version: int, addresses: list[Address]) -> None:
        self._in, self._out = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._out.setblocking(False)
        self.all_addresses = len([one for one in addresses if one.version == version]) > 255
        sockfilter.attach(self._out, segments.taken(FIRST, LAST, addresses)[version])

    def takes(self, packet: bytes) -> bool:
        self._in.send(packet)
        try:
            self._out.recv(65536)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        self._in.close()
        self._out.close()


@pytest.fixture(params=[1, 255, 256], ids="{} addresses".format)
def filters(request):
    more: list[Address] = [IPv6Address(f"2001:db8:9::1:{n:x}") for n in range(request.param - 1)]
    more += [IPv4Address("192.0.3.1")]
    both = {version: Filtered(version, [*OURS.values(), *more]) for version in (4, 6)}
    yield both
    for one in both.values():
        one.close()


@pytest.mark.parametrize("version", [4, 6])
def test_what_filters_take(filters, version):
    """Answers to our ports and errors about SYNs from there, and nothing else."""
    filtered = filters[version]
    for port in (FIRST, FIRST + 5, LAST):
        assert filtered.takes(bytes(reply(version, port, "SA")))
        for inner in (4, 6):
            for tunnel in (version,) if inner != version else (0, version):
                sent = bytes(syn(inner, None, tunnel).filled(port, 1, 2))[14:]
                assert all(filtered.takes(complaint(version, error, sent)) for error, _ in TOLD[version])
    for port in (0, FIRST - 1, LAST + 1, 65535):
        assert not filtered.takes(bytes(reply(version, port, "SA")))
        sent = bytes(syn(version, None).filled(port, 1, 2))[14:]
        assert not any(filtered.takes(complaint(version, error, sent)) for error, _ in TOLD[version])
    echo = LAYER[version](dst=str(OURS[version])) / (ICMP(type=8) if version == 4 else Raw(b"\x80" + bytes(60)))
    assert not filtered.takes(bytes(echo))
    elsewhere = LAYER[version](dst=str(THEIRS[version])) / TCP(sport=80, dport=FIRST, flags="SA")
    assert filtered.takes(bytes(elsewhere)) == filtered.all_addresses


def test_no_addresses():
    for version in (4, 6):
        filtered = Filtered(version, [])
        assert not filtered.takes(bytes(reply(version, FIRST, "SA")))
        filtered.close()


@given(versions, st.binary(max_size=120))
def test_filters_take_what_is_read(version, data):
    """Whatever is behind the IP header: no packet that says something of our ports is left."""
    for protocol in (6, 1 if version == 4 else 58):
        packet = bytes(LAYER[version](src=str(THEIRS[version]), dst=str(OURS[version])))
        at = 9 if version == 4 else 6
        packet = packet[:at] + bytes([protocol]) + packet[at + 1 :] + data
        found = segments.parse(packet)
        if found and FIRST <= found.port <= LAST:
            filtered = Filtered(version, list(OURS.values()))
            assert filtered.takes(packet)
            filtered.close()
