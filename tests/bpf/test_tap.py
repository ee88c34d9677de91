"""The XDP program that shows what it does: it does what the other one does, and shows that."""

from __future__ import annotations

import time
from collections.abc import Iterator
from ipaddress import ip_address

import pytest
from crablb._native import ffi, lib
from scapy.layers.inet import TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.packet import Raw

from crablb.dataplane import flows as flowmap
from crablb.dataplane import paths, statistics
from crablb.dataplane.paths import Ways
from crablb.dataplane.tap import Seen, fill, parse
from crablb.filters import Filter, parse_filter
from crablb.kernel import bpf
from tests.bpf.test_valid import CLIENT, DIP, HASHES, MACS, VIP, icmp, layer, tcp
from tests.helpers.frames import SEED, ether
from tests.helpers.programs import LO, forwarding, several_buffers

XDP_DROP, XDP_PASS, XDP_TX, XDP_REDIRECT = 1, 2, 3, 4
FOUR, SIX = 0, 1  # backends' ids
TUNNELLED = {4: 2, 6: 3}


class Pair:
    """Both programs, on the same maps."""

    def __init__(self, plain: bpf.Object, tap: bpf.Object) -> None:
        self.plain, self.tap = plain.program("crab_lb"), tap.program("crab_lb_tap")
        self.maps, self.counters = tap.maps, plain.map("xdp_counters")
        self.table = flowmap.FlowTable(plain.map("flows"))
        self._records: list[bytes] = []
        self.ring = bpf.Ring(tap.map("tapped"), self._records.append)

    def want(self, *wanted: Filter, snap: int = 2048, seconds: float = 60) -> None:
        taps = ffi.new("struct crab_taps *")
        taps.count, taps.snap = len(wanted), snap
        taps.until_ns = time.monotonic_ns() + int(seconds * 1e9)
        for entry, each in zip(taps.list, wanted, strict=False):
            fill(entry, each, {DIP[4]: FOUR, DIP[6]: SIX})
        self.maps["taps"].update(0, bytes(ffi.buffer(taps)))

    def counts(self) -> dict[str, int]:
        return {name: self.counters.sum_u64(i) for i, name in enumerate(statistics.XDP_COUNTERS)}

    def know(self, tunnel: bool) -> None:
        self.table.places["hash"] = 0
        for i, family in enumerate((4, 6)):
            backend, flags = (TUNNELLED[family], lib.CRAB_FLOW_TUNNEL) if tunnel else (i, 0)
            assert self.table.add(HASHES[family], backend, family, flags=flags)

    def run(self, program: bpf.Program, frame: bytes, tunnel: bool = False) -> tuple[int, bytes, set[str]]:
        self.know(tunnel)
        before = self.counts()
        done = program.test_run(frame)
        return done.retval, done.data, {name for name, n in self.counts().items() if n != before[name]}

    def shown(self) -> list[tuple[int, Seen]]:
        self.ring.consume()
        data = b"".join(self._records)
        self._records.clear()
        return list(parse(data, {FOUR: DIP[4], SIX: DIP[6], 2: DIP[4], 3: DIP[6]}))


@pytest.fixture
def pair(namespace) -> Iterator[Pair]:
    with forwarding(SEED) as plain:
        tap = bpf.Object(bpf.object_path("lbtap"), reuse=plain.maps, frags=bool(lib.crab_xsk_knows_frags()))
        with tap:
            ways = Ways(tx=True, partial=lib.CRAB_PARTIAL_FINISH)
            for family in (4, 6):
                source = ip_address("10.0.0.2" if family == 4 else "fd00::2")
                for number in (FOUR if family == 4 else SIX, TUNNELLED[family]):
                    path = paths.path(DIP[family], MACS, 1500, source, LO, ways)
                    plain.map("paths").update(number, path)
            made = Pair(plain, tap)
            with made.ring:
                yield made


def cases(family: int) -> dict[str, bytes]:
    head = ether() / layer(family)(src=str(CLIENT[family]), dst=str(VIP[family]))
    ack = TCP(sport=4242, dport=80, flags="A")
    short = {"ttl": 1} if family == 4 else {"hlim": 1}
    back = Ether(src=MACS[:6].hex(":"), dst="02:00:00:00:00:02")
    return {
        "known": tcp(family),
        "known, with data": tcp(family, data=b"x" * 900),
        "known, padded": tcp(family) + bytes(20),
        "ICMP error": icmp(family),
        "FIN": tcp(family, "FA"),
        "SYN": tcp(family, "S"),
        "unknown": bytes(head / TCP(sport=4243, dport=80, flags="A")),
        "no hops": bytes(ether() / layer(family)(src=str(CLIENT[family]), dst=str(VIP[family]), **short) / ack),
        "sent back": bytes(back / layer(family)(src=str(CLIENT[family]), dst=str(VIP[family])) / ack),
        "tagged": bytes(ether() / Dot1Q(vlan=7) / layer(family)(src=str(CLIENT[family]), dst=str(VIP[family])) / ack),
        "another port": bytes(head / TCP(sport=4242, dport=81, flags="S")),
        "UDP": bytes(head / UDP(sport=4242, dport=80) / Raw(b"x")),
        "another machine's": bytes(Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:77") / head.payload / ack),
        "wrong checksum": tcp(family, data=b"x")[:-1] + b"y",
        "ARP": bytes(ether() / ARP(pdst="10.0.0.100")),
        "cut": tcp(family)[:40],
        "mapped": bytes(ether() / IPv6(src="::ffff:10.0.0.1", dst=str(VIP[6])) / ack),
    }


def compare(pair: Pair, frame: bytes, tunnel: bool, family: int) -> None:
    """A frame through both."""
    expected = pair.run(pair.plain, frame, tunnel)
    assert pair.shown() == []
    verdict, data, counted = pair.run(pair.tap, frame, tunnel)
    assert (verdict, data, counted) == expected
    shown = pair.shown()
    if counted & {"syn", "other", "icmp", "handler", "vip"}:  # the workers show it
        assert shown == []
        return
    forwarded = verdict in (XDP_TX, XDP_REDIRECT)
    holds = lib.CRAB_NO_BACKEND
    if forwarded or counted & {"drop_hops", "drop_sent_back"}:
        holds = TUNNELLED[family] if tunnel else (FOUR if family == 4 else SIX)
    taps = ffi.new("struct crab_taps *")
    ffi.memmove(taps, pair.maps["taps"].lookup(0), ffi.sizeof("struct crab_taps"))
    held = lib.crab_taps_find(taps, frame, len(frame), holds, verdict == XDP_PASS)
    if not held:
        assert shown == []
        return
    ((taps_shown, seen),) = shown
    assert taps_shown == held
    assert seen.frame == frame
    assert seen.length == len(frame)
    assert seen.verdict == verdict
    assert seen.counters == counted
    assert seen.interface == LO
    assert seen.out == (data if forwarded else b"")
    assert seen.out_length == len(seen.out)
    assert seen.out_interface == (LO if forwarded else 0)
    assert seen.backend == (None if holds == lib.CRAB_NO_BACKEND else DIP[family])
    assert seen.at <= seen.done


@pytest.mark.parametrize("tunnel", [False, True], ids=["by-mac", "tunnel"])
def test_it_does_the_same_and_shows_it(pair, tunnel):
    pair.want(Filter(), parse_filter("client 10.0.0.0/8"), parse_filter("port 80"), parse_filter("backend 10.0.0.11"))
    for family in (4, 6):
        for name, frame in cases(family).items():
            try:
                compare(pair, frame, tunnel, family)
            except AssertionError as error:
                error.add_note(f"{name}, IPv{family}")
                raise


def test_what_is_not_named_is_not_shown(pair):
    pair.want(parse_filter("port 81"), parse_filter("backend fd00::11"))
    assert pair.run(pair.tap, tcp(4))[0] == XDP_TX
    assert pair.shown() == []
    assert pair.run(pair.tap, tcp(6))[0] == XDP_TX
    assert [taps for taps, _ in pair.shown()] == [0b10]


def test_it_ends_by_itself(pair):
    """When nobody says any more that somebody looks on."""
    pair.want(Filter(), seconds=-1)
    assert pair.run(pair.tap, tcp(4))[0] == XDP_TX
    assert pair.shown() == []


def test_cut(pair):
    frame = tcp(4, data=bytes(range(200)))
    for snap in (1, 13, 14, 54, 100, 2048):
        pair.want(Filter(), snap=snap)
        _, data, _ = pair.run(pair.tap, frame)
        ((_, seen),) = pair.shown()
        assert (seen.frame, seen.out) == (frame[:snap], data[:snap])
        assert (seen.length, seen.out_length) == (len(frame), len(data))


def test_a_full_ring_counts(pair):
    pair.want(Filter())
    frame = tcp(4, data=bytes(1400))
    pair.know(tunnel=False)
    pair.tap.test_run(frame, repeat=1000)  # what went out lies there the next time, until it has no hop left
    lost, shown = pair.maps["untapped"].sum_u64(0), pair.shown()
    assert len(shown) + lost == 1000
    assert lost
    assert shown


def test_no_more_is_taken_than_asked_for(pair):
    """Where records come as fast as they are taken, somebody else has to have a turn."""
    pair.want(Filter())
    for _ in range(7):
        pair.run(pair.tap, tcp(4))
    assert [pair.ring.consume(3), pair.ring.consume(3), pair.ring.consume(3), pair.ring.consume()] == [3, 3, 1, 0]
    assert len(pair.shown()) == 7


@several_buffers
def test_in_several_buffers(pair):
    """Of a frame whose end is out of a program's reach."""
    pair.want(Filter())
    frame = tcp(4, data=bytes(range(256)) * 20)
    ways = Ways(tx=True, partial=lib.CRAB_PARTIAL_FINISH, frags=True)
    pair.maps["paths"].update(FOUR, paths.path(DIP[4], MACS, 9000, None, LO, ways))
    pair.know(tunnel=False)
    done = pair.tap.test_run(frame, room=8192)
    assert done.retval == XDP_TX
    ((_, seen),) = pair.shown()
    assert seen.frame == frame[:2048]
    assert seen.length == seen.out_length == len(frame)
    assert seen.out == done.data[:2048]
