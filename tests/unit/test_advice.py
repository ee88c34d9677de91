"""What an operator is told, from states alone."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

import pytest
from structlog.testing import capture_logs

from crablb.control import advice
from crablb.control.advice import Advice, Adviser
from crablb.dataplane.events import Event, HopsChanged, Started, Swept
from crablb.dataplane.statistics import DAEMON_COUNTERS
from crablb.kernel.interface import Interface
from crablb.kernel.netlink import HopState, NextHop
from crablb.model import Backend, Config, Fallback, Service, Vip

A, B = ip_address("10.0.0.11"), ip_address("fd00::11")
UP = NextHop(HopState.RESOLVED, "", 1, None, b"\2\0\0\0\0\1", b"\2\0\0\0\0\2", None, 1500)
SILENT = NextHop(HopState.UNRESOLVED, "10.0.0.11 does not answer on eth0")
WEB6 = Vip(ip_address("fd00::100"), 80)


def texts(found) -> list[tuple[str, str | None]]:
    return [(a.text, a.counter) for a in found]


def test_backends_that_come_and_go():
    assert texts(advice.unusable({A: UP, B: SILENT})) == [("backend not usable yet", None)]
    assert texts(advice.moved({}, {A: UP})) == [("backend reachable", None)]
    assert texts(advice.moved({A: UP}, {A: SILENT})) == [("backend unreachable", "backends_lost")]
    assert texts(advice.moved({}, {A: SILENT})) == [("backend not usable yet", None)]
    assert texts(advice.moved({A: SILENT}, {A: NextHop(HopState.NO_ROUTE)})) == []  # it was said already
    (reachable,) = advice.moved({}, {A: UP})
    assert reachable == Advice("info", "backend reachable", {"backend": "10.0.0.11", "mac": "02:00:00:00:00:01"})


def test_a_backend_that_is_reached_otherwise():
    gateway = ip_address("10.0.0.1")
    other = replace(UP, dst_mac=b"\2\0\0\0\0\3")
    (told,) = advice.moved({A: UP}, {A: other})
    assert (told.level, told.counter) == ("warning", "backends_moved")
    assert told.text.startswith("a backend's MAC address changed")
    assert told.facts == {"backend": "10.0.0.11", "before": "02:00:00:00:00:01", "mac": "02:00:00:00:00:03"}
    (told,) = advice.moved({A: replace(UP, gateway=gateway)}, {A: replace(other, gateway=gateway)})
    assert told.facts["gateway"] == "10.0.0.1"
    # Another way is no forgery.
    assert texts(advice.moved({A: UP}, {A: replace(other, gateway=gateway)})) == [("another way to a backend", None)]
    assert texts(advice.moved({A: UP}, {A: replace(other, ifindex=2)})) == [("another way to a backend", None)]
    assert texts(advice.moved({A: UP}, {A: replace(UP, mtu=9000)})) == [("the way to a backend has another MTU", None)]
    assert texts(advice.moved({A: UP}, {A: replace(UP, src_mac=b"\2\0\0\0\0\4")})) == []  # of our own


def test_a_flood_writes_few_lines():
    engine = Engine()
    adviser = Adviser(engine)  # type: ignore[arg-type]
    macs = [replace(UP, dst_mac=bytes([2, 0, 0, 0, i >> 8, i & 255])) for i in range(1000)]
    with capture_logs() as said:
        for i in range(1, 1000):
            adviser.hear(HopsChanged({A: macs[i - 1]}, {A: macs[i]}))
            adviser.hear(HopsChanged({B: macs[i - 1]}, {B: macs[i]}))
    assert 2 <= len(said) <= 20
    assert engine.counted.count("backends_moved") == 2 * 999


@pytest.mark.parametrize(
    ("backend", "fallback", "gateway", "mtu", "told"),
    [
        (B, Fallback.DSR_IPIP, None, 1500, False),
        (B, Fallback.DSR_IPIP, None, 1320, False),  # 1,280 and an IPv6 header
        (B, Fallback.DSR_IPIP, None, 1319, True),
        (A, Fallback.DSR_IPIP, None, 1300, False),  # 1,280 and an IPv4 header
        (A, Fallback.DSR_IPIP, None, 1299, True),
        (B, Fallback.AUTO, None, 1300, False),  # by MAC address: no tunnel
        (B, Fallback.AUTO, ip_address("fd00::1"), 1300, True),
        (B, Fallback.DSR_L2, ip_address("fd00::1"), 1300, False),
    ],
)
def test_narrow_tunnels(backend, fallback, gateway, mtu, told):
    config = Config(("eth0",), (Service(WEB6, (Backend(backend),), fallback=fallback),))
    hops = {backend: replace(UP, gateway=gateway, mtu=mtu)}
    assert texts(advice.narrow_tunnels(config, hops)) == told * [
        ("clients that are not redirected may stall", "narrow_tunnels")
    ]
    assert not list(advice.narrow_tunnels(config, {backend: SILENT}))
    assert not list(advice.narrow_tunnels(config, {}))


def test_who_is_not_reached():
    hops = {A: UP, B: UP, ip_address("10.0.0.12"): SILENT}
    (told,) = advice.unreached(hops, {B})
    assert told.facts["backend"] == "10.0.0.11"
    assert "interface lo takes no packets" in told.facts["reason"]
    gone = replace(UP, ifindex=2**31 - 1)
    assert not list(advice.unreached({A: gone}, set()))


def test_interfaces():
    def told(kind: str) -> Advice:
        (found,) = advice.interface(Event(kind, interface="eth0", reason="it"))
        return found

    assert (told("interface-gone").level, told("interface-back").level) == ("warning", "info")
    assert told("interface-renamed").facts == {"interface": "eth0", "before": "it"}
    assert told("interface-changed").facts == {"interface": "eth0", "now": "it"}
    assert told("interface-unserved").facts == {"interface": "eth0", "reason": "it"}


def test_full_tables():
    assert not list(advice.full(flows=900, refused=0, room=1000))
    assert texts(advice.full(flows=901, refused=3, room=1000)) == [
        ("as many flows as `flows` allows, nearly; some may be left to user space", "flows_nearly_full"),
        ("a worker's flow cache had no room for connections; they are decided by the hash alone", "cache_full"),
    ]


def test_what_the_kernel_drops():
    assert not list(advice.dropped(0))
    (told,) = advice.dropped(7)
    assert (told.counter, told.facts["packets"]) == ("xsk_dropped", 7)
    assert not list(advice.unsent(0))
    (told,) = advice.unsent(3)
    assert (told.counter, told.facts["packets"]) == (None, 3)


def test_packets_that_are_too_long():
    jumbo = Interface("eth0", 1, bytes(6), 9000, True, 1, 1, "")
    assert not list(advice.too_long([jumbo], {}))
    assert not list(advice.too_long([jumbo], {"eth1": 3818}))
    assert not list(advice.too_long([replace(jumbo, mtu=3818)], {"eth0": 3818}))
    (told,) = advice.too_long([jumbo], {"eth0": 3818})
    assert told.facts["interface"] == "eth0"
    assert "take 3818 bytes" in told.facts["reason"]


@pytest.mark.parametrize(("kind", "remedy"), [("veth", "ethtool -K PEER txvlan off"), ("", "of the VLAN itself")])
def test_tags_that_are_not_seen(kind, remedy):
    (told,) = advice.unseen_tags([Interface("eth0", 1, bytes(6), 1500, True, 1, 1, kind)])
    assert told.facts["interface"] == "eth0"
    assert remedy in told.facts["reason"]


class Engine:
    """What an adviser sees of one."""

    bypass = True
    reached = frozenset()
    interfaces: tuple[Interface, ...] = ()
    tags_beside: tuple[Interface, ...] = ()
    narrow: dict[str, int] = {}  # noqa: RUF012
    config = Config(("eth0",), (Service(WEB6, (Backend(B),), fallback=Fallback.DSR_IPIP),), flows=100)

    def __init__(self) -> None:
        self.hops = {B: replace(UP, mtu=1280)}
        self.counted: list[str] = []
        self.modes, self.too_big = {"eth0": "native"}, 0

    def statistics(self):
        return {"total": {"too_big": self.too_big}}

    def count(self, what: str) -> None:
        assert what in DAEMON_COUNTERS
        self.counted.append(what)


def test_uncut_segments():
    """Said when they begin, in generic mode alone, and known as long as they come."""
    engine = Engine()
    adviser = Adviser(engine)  # type: ignore[arg-type]

    def sweep(too_big: int) -> tuple[int, list[str]]:
        engine.too_big += too_big
        with capture_logs() as said:
            adviser.hear(Swept(flows=1, refused=0))
        return adviser.uncut, [one["event"] for one in said if "not cut yet" in one["event"]]

    assert sweep(1000) == (0, [])
    engine.modes = {"eth0": "generic", "eth1": "native"}
    assert sweep(advice.CRAWLING - 1) == (0, [])
    uncut, said = sweep(200)
    assert (uncut, len(said)) == (200, 1)
    assert sweep(300) == (300, [])
    assert sweep(0) == (0, [])
    assert len(sweep(20)[1]) == 1


def test_when_what_is_told():
    engine = Engine()
    adviser = Adviser(engine)  # type: ignore[arg-type]

    def told(notice) -> list[str]:
        engine.counted.clear()
        adviser.hear(notice)
        return engine.counted

    assert told(Started()) == ["narrow_tunnels"]
    assert told(HopsChanged({B: UP}, {B: SILENT})) == ["backends_lost", "narrow_tunnels"]  # what is known of its MTU
    same = engine.hops[B]
    assert told(HopsChanged({B: same}, {B: replace(same, dst_mac=b"\2\0\0\0\0\3")})) == ["backends_moved"]
    assert told(Swept(flows=99, refused=1)) == ["flows_nearly_full", "cache_full"]
    assert told(Swept(flows=1, refused=0)) == []
    assert told(Swept(flows=1, refused=0, dropped=3)) == ["xsk_dropped"]
    assert told(Event("server-silent", B)) == ["reports_silent"]
    assert told(Event("redirects-stopped", B, WEB6)) == ["redirects_stopped"]
    assert told(Event("redirects-resumed", B, WEB6)) == []
    assert told(Event("interface-gone", interface="eth0")) == ["interfaces_lost"]
    assert told(Event("interface-unserved", interface="eth0", reason="no memory")) == ["interfaces_unserved"]
    for kind in ("interface-back", "interface-renamed", "interface-changed"):
        assert told(Event(kind, interface="eth0", reason="it")) == []
    assert told(Event("changed")) == []
