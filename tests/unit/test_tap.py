"""What the workers show: all that a filter names, as it was, and nothing is done otherwise for it."""

from __future__ import annotations

import ipaddress
import random

from crablb._native import ffi, lib
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6PacketTooBig, IPv6
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.packet import Raw

from crablb.dataplane.tap import RECORD, Seen, fill, parse
from crablb.filters import Filter
from tests.helpers.frames import ether, reference, syn
from tests.helpers.native import Core
from tests.unit.test_differential import frames
from tests.unit.test_filters import filters

ROOM = 1 << 16


class Shown(Core):
    """A core whose packets are shown."""

    def __init__(
        self, *args: object, wanted: tuple[Filter, ...] = (Filter(),), snap: int = 2048, room: int = ROOM, **kw: object
    ):
        self.taps = compiled(wanted, snap)
        super().__init__(*args, **kw)
        assert not lib.crab_core_show(self.core, 3, room)
        self._room = room

    def publish(self) -> None:
        super().publish()
        lib.crab_snapshot_tap(self.snapshot, self.taps)

    def shown(self) -> list[tuple[int, Seen]]:
        out = ffi.new("uint8_t[]", self._room)
        n = lib.crab_core_shown(self.core, out)
        addresses = {i: ipaddress.ip_address(b.address) for i, b in enumerate(self.reference.backends)}
        return list(parse(bytes(ffi.buffer(out, n)), addresses))


def compiled(wanted: tuple[Filter, ...], snap: int = 2048, backends: dict | None = None):
    taps = ffi.new("struct crab_taps *")
    taps.count, taps.snap = len(wanted), snap
    for entry, each in zip(taps.list, wanted, strict=False):
        fill(entry, each, backends or {})
    return taps


@settings(max_examples=150, deadline=None)
@given(
    st.lists(frames(), min_size=1, max_size=20),
    st.sampled_from(["negotiated", "always", "never"]),
    st.sampled_from(["auto", "l2", "ipip"]),
    st.booleans(),
    st.sampled_from([(Filter(),), (Filter(port=7),), (Filter(port=3), Filter(vip=ipaddress.ip_address("fd00::100")))]),
)
def test_nothing_is_done_otherwise(sequence, mode, fallback, elsewhere, wanted):
    """The same frames, the same counts; and of each that is shown, what came in, what went out, and what counted it."""
    plain = Core(reference(False, mode, fallback, elsewhere=elsewhere))
    one = Core(reference(False, mode, fallback, elsewhere=elsewhere))
    core = Shown(reference(False, mode, fallback, elsewhere=elsewhere), wanted=wanted)
    out = core.handle(*sequence)
    assert out == plain.handle(*sequence)
    assert core.counts() == plain.counts()
    shown = iter(core.shown())
    for frame, sent in zip(sequence, out, strict=True):
        before = one.counts()
        one.handle(frame)
        counted = {name for name, n in one.counts().items() if n != before.get(name, 0)} - {"received"}
        held = lib.crab_taps_find(core.taps, frame, len(frame), lib.CRAB_NO_BACKEND, False)
        if not held:
            continue
        taps, seen = next(shown)
        assert taps == held
        assert seen.frame == frame
        assert seen.length == len(frame)
        assert seen.interface == core.ifindex
        assert (seen.out or None) == sent
        assert seen.out_length == len(sent or b"")
        assert bool(seen.out_interface) == bool(sent)
        assert seen.counters == counted
        assert seen.queue == 3
        assert seen.verdict is None
        assert seen.at <= seen.done
        if seen.backend:
            expected = {b.mac: b for b in core.reference.backends}[sent[:6]]
            assert seen.backend == ipaddress.ip_address(expected.address)
        forwarded = any(name == "redirected" or name.startswith("fallback") for name in counted)
        assert bool(seen.backend) == forwarded, counted
    assert next(shown, None) is None


def test_which_backend_it_was():
    """Of several on one machine, the one that the connection has."""
    lb = reference(fallback="l2")
    for backend in lb.backends[:4]:
        backend.mac, backend.on_link = lb.backends[0].mac, True
    core = Shown(lb)
    for port in range(1, 60):
        tcp = TCP(sport=port, dport=80, flags="S", seq=port)
        core.handle(bytes(ether() / IP(src="10.0.0.1", dst="10.0.0.100") / tcp))
        tcp.flags, tcp.seq = "A", port + 1
        core.handle(bytes(ether() / IP(src="10.0.0.1", dst="10.0.0.100") / tcp))
    shown = [seen for _, seen in core.shown()]
    assert len(shown) == 118
    chosen = [seen.backend for seen in shown if "fallback_no_offer" in seen.counters]
    assert len(set(chosen)) == 4
    assert chosen == [seen.backend for seen in shown if "fallback_established" in seen.counters]


def test_known_and_offered():
    core = Shown(reference())
    offered = syn(5)
    core.handle(offered)
    core.handle(offered)
    core.handle(bytes(ether() / IP(src="10.0.0.1", dst="10.0.0.100") / TCP(sport=5, dport=80, flags="A", seq=6)))
    first, second, third = (seen for _, seen in core.shown())
    assert (first.service, first.known, first.offer, first.chosen) == (True, False, True, False)
    assert (second.known, second.offer) == (True, True)
    assert second.counters >= {"retransmitted_syn"}
    assert (third.known, third.offer) == (True, False)


def test_a_ring_that_is_full_counts():
    """Then as much room as there was is there again; nothing of it is lost at the ring's end."""
    core, choose = Shown(reference(), room=8192, snap=300), random.Random(4)
    frames_ = [syn(port) for port in range(1, 301)]
    sent, seen, lost = 0, 0, 0
    for _ in range(100):
        for _ in range(choose.randrange(1, 60)):
            core.handle(frames_[sent % 300])
            sent += 1
        records = [record.frame for _, record in core.shown()]
        assert records == [frames_[i % 300] for i in range(seen + lost, seen + lost + len(records))]
        seen += len(records)
        lost = int(lib.crab_core_unshown(core.core))
        assert seen + lost == sent
    assert lost
    assert seen > lost


def test_what_is_cut():
    core = Shown(reference(), snap=33)
    core.handle(syn(1))
    ((_, seen),) = core.shown()
    assert seen.frame == syn(1)[:33]
    assert seen.length == len(syn(1))
    assert len(seen.out) == 33
    assert seen.out_length == len(syn(1)) + 4


def test_without_a_ring_again():
    core = Shown(reference())
    core.handle(syn(1))
    lib.crab_core_publish(core.core, ffi.NULL)
    lib.crab_core_hide(core.core)
    lib.crab_core_hide(core.core)
    assert core.shown() == []
    assert lib.crab_core_unshown(core.core) == 0


# ---- filters ----


def sides(frame: bytes) -> tuple[object, object, int | None, int | None]:
    """Client, VIP, their ports, as Scapy reads a frame."""
    packet = Ether(frame)
    layer = packet.getlayer(IP) or packet.getlayer(IPv6)
    if layer is None:
        return None, None, None, None
    client, vip = layer.src, layer.dst
    transport = layer.payload
    ports = (transport.sport, transport.dport) if isinstance(transport, TCP | UDP) else (None, None)
    return ipaddress.ip_address(client), ipaddress.ip_address(vip), *ports


def holds(wanted: Filter, client: object, vip: object, cport: int | None, vport: int | None) -> bool:
    if (wanted.client or wanted.vip) and client is None:
        return False
    if wanted.client and (client.version != wanted.client.version or client not in wanted.client):
        return False
    if wanted.vip and vip != wanted.vip:
        return False
    if wanted.vip_port and vport != wanted.vip_port:
        return False
    return not wanted.port or wanted.port in (cport, vport)


@st.composite
def packets_and_filters(draw):
    """A filter, and a packet that has much of what it names."""
    wanted = draw(filters())
    version = (wanted.client or wanted.vip).version if wanted.client or wanted.vip else draw(st.sampled_from([4, 6]))
    version = draw(st.sampled_from([version] * 9 + [10 - version]))
    some = st.ip_addresses(v=version).filter(lambda a: a.version == 4 or not a.ipv4_mapped)
    within = [some]
    if wanted.client and wanted.client.version == version:
        within = [st.integers(0, min(wanted.client.num_addresses - 1, 1 << 60)).map(lambda n: wanted.client[n]), some]
    client = draw(st.one_of(within))
    vip = (
        draw(st.sampled_from([wanted.vip, draw(some)])) if wanted.vip and wanted.vip.version == version else draw(some)
    )
    port = st.sampled_from([p for p in (wanted.port, wanted.vip_port) if p] + [80, 4000])
    layer = (IP if version == 4 else IPv6)(src=str(client), dst=str(vip))
    kind = draw(st.sampled_from([TCP, TCP, TCP, UDP]))
    head = draw(st.sampled_from([ether(), ether() / Dot1Q(vlan=7), ether() / Dot1Q(vlan=9) / Dot1Q(vlan=7)]))
    frame = bytes(head / layer / kind(sport=draw(port), dport=draw(port)) / Raw(b"data"))
    quoting = draw(st.booleans())
    if quoting and kind is TCP:  # the same connection, by an ICMP error about a packet of the other direction
        tcp = Ether(frame)[TCP]
        quoted = (IP if version == 4 else IPv6)(src=str(vip), dst=str(client)) / TCP(sport=tcp.dport, dport=tcp.sport)
        error = (
            IP(src="192.0.2.1", dst=str(vip)) / ICMP(type=3, code=4) if version == 4
            else IPv6(src="2001:db8::1", dst=str(vip)) / ICMPv6PacketTooBig()
        )  # fmt: skip
        return wanted, bytes(head / error / quoted), (client, vip, tcp.sport, tcp.dport)
    return wanted, frame, sides(frame)


@settings(max_examples=300, deadline=None)
@given(packets_and_filters(), st.integers(0, 3))
def test_filters(case, backend):
    wanted, frame, of = case
    backends = {wanted.backend: 2} if wanted.backend else {}
    found = lib.crab_taps_find(compiled((wanted,), backends=backends), frame, len(frame), backend, False)
    assert found == (holds(wanted, *of) and (not wanted.backend or backend == 2))


@settings(max_examples=300)
@given(st.binary(max_size=120), filters())
def test_rubbish(frame, wanted):
    """Only what names nothing, or ports of nothing, may hold for what is no packet; nothing is read behind its end."""
    memory = ffi.new("uint8_t[]", frame)  # under the sanitizers, native/tests does the same
    assert lib.crab_taps_find(compiled((wanted,)), memory, len(frame), lib.CRAB_NO_BACKEND, False) in (0, 1)


def test_what_is_left_to_the_kernel():
    """Without a filter that is not shown: all that the machine receives would be."""
    arp = bytes(ether() / ARP(pdst="10.0.0.100"))
    taps = compiled((Filter(), Filter(port=80), Filter(client=ipaddress.ip_network("10.0.0.0/8"))))
    assert lib.crab_taps_find(taps, arp, len(arp), lib.CRAB_NO_BACKEND, False) == 0b001
    assert lib.crab_taps_find(taps, arp, len(arp), lib.CRAB_NO_BACKEND, True) == 0
    assert lib.crab_taps_find(taps, syn(1), len(syn(1)), lib.CRAB_NO_BACKEND, True) == 0b110


def test_the_records_layout():
    """As the compiler has it, field by field."""
    record = ffi.new("struct crab_tapped *")
    names = ["at_ns", "done_ns", "counters", "size", "in_ifindex", "out_ifindex", "in_len", "out_len", "in_kept",
             "out_kept", "backend", "queue", "taps", "xdp", "verdict", "flags"]  # fmt: skip
    for i, name in enumerate(names):
        setattr(record, name, i + 1)
    assert RECORD.unpack(bytes(ffi.buffer(record))) == tuple(range(1, len(names) + 1))
