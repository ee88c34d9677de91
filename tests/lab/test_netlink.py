"""Next hops follow the kernel's links, routes and neighbours."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Iterator
from ipaddress import ip_address

import pytest

from crablb.kernel import netlink
from crablb.kernel.interface import interface_info
from crablb.kernel.netlink import HopState, NextHop, NextHops
from crablb.lab import Lab
from tests.helpers.namespaces import inside

FIRST, SECOND = ip_address("10.0.0.11"), ip_address("fd00::11")
BEHIND, ABSENT = ip_address("192.0.2.1"), ip_address("10.0.0.99")


class Followed:
    """Next hops of the load balancer's node, and a way to wait for one of them."""

    def __init__(self, hops: NextHops, changed: asyncio.Event) -> None:
        self.hops, self._changed = hops, changed

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    def __getitem__(self, address: object) -> NextHop:
        return self.hops.current[address]  # type: ignore[index]


def follow(lab: Lab, check: Callable[[Followed], Coroutine[None, None, None]]) -> None:
    async def main() -> None:
        changed = asyncio.Event()
        hops = NextHops(lambda *_: changed.set())
        await hops.start([FIRST, SECOND, BEHIND, ABSENT])
        try:
            await check(Followed(hops, changed))
        finally:
            await hops.close()

    with inside(lab.lb.netns):
        asyncio.run(main())


@pytest.fixture
def lab(make_lab) -> Iterator[Lab]:
    lab = make_lab("bridge")
    yield lab
    assert "managed" not in lab.lb.run("ip", "neigh").stdout


def test_what_answers_and_what_does_not(lab):
    mac = bytes.fromhex(lab.servers[0].mac().replace(":", ""))
    own = bytes.fromhex(lab.lb.mac().replace(":", ""))

    async def check(hops: Followed) -> None:
        index = interface_info("eth0").index
        for address in (FIRST, SECOND):
            await hops.until(lambda a=address: hops[a].state is HopState.RESOLVED)
            source = ip_address("10.0.0.2" if address.version == 4 else "fd00::2")
            assert hops[address] == NextHop(HopState.RESOLVED, "", index, None, mac, own, source, 1500, True)
        assert hops[ABSENT].state is HopState.UNRESOLVED
        assert hops[ABSENT].reason == "10.0.0.99 does not answer on eth0"
        assert hops[BEHIND].state is HopState.NO_ROUTE
        assert hops[BEHIND].reason == "no route: Network is unreachable"
        # appears
        lab.servers[0].ip("addr add 10.0.0.99/24 dev eth0")
        await hops.until(lambda: hops[ABSENT].state is HopState.RESOLVED)
        assert hops[ABSENT].dst_mac == mac

    follow(lab, check)


def test_routes_change(lab):
    async def check(hops: Followed) -> None:
        await hops.until(lambda: hops[FIRST].state is HopState.RESOLVED)
        lab.lb.ip("route add 192.0.2.0/24 via 10.0.0.11")
        await hops.until(lambda: hops[BEHIND].state is HopState.RESOLVED)
        assert hops[BEHIND].gateway == FIRST
        assert not hops[BEHIND].on_link
        assert hops[BEHIND].dst_mac == hops[FIRST].dst_mac
        lab.lb.ip("route replace unreachable 192.0.2.0/24")
        await hops.until(lambda: hops[BEHIND].state is HopState.NO_ROUTE)
        assert hops[BEHIND].reason in ("no route: No route to host", "no route: Network is unreachable")
        lab.lb.ip("route del unreachable 192.0.2.0/24", "route add 192.0.2.0/24 dev lo")
        await hops.until(lambda: hops[BEHIND].state is HopState.NOT_ETHERNET)
        assert hops[BEHIND].reason == "its route leads through lo, which is not an Ethernet interface"
        lab.lb.ip("route replace 192.0.2.0/24 via 10.0.0.11 mtu 1400")
        await hops.until(lambda: hops[BEHIND].mtu == 1400)
        # through another interface
        lab.lb.ip(
            "link add veth0 type veth peer name veth1", "link set veth0 up", "link set veth1 up",
            "route replace 192.0.2.0/24 dev veth0", "neigh replace 192.0.2.1 lladdr 02:00:00:00:99:99 dev veth0",
        )  # fmt: skip
        await hops.until(lambda: hops[BEHIND].dst_mac == bytes.fromhex("020000009999"))
        assert hops[BEHIND].on_link
        assert hops[BEHIND].ifindex == interface_info("veth0").index != interface_info("eth0").index
        assert hops[BEHIND].src_mac == interface_info("veth0").mac
        lab.lb.ip("link del veth0")
        await hops.until(lambda: hops[BEHIND].state is HopState.NO_ROUTE)
        # one that was on the segment moves behind a gateway
        lab.lb.ip("route add 10.0.0.99/32 via 10.0.0.11")
        await hops.until(lambda: hops[ABSENT].state is HopState.RESOLVED)
        assert not hops[ABSENT].on_link

    follow(lab, check)


def test_neighbours_and_links_change(lab):
    async def check(hops: Followed) -> None:
        await hops.until(lambda: hops[FIRST].state is HopState.RESOLVED)
        # A server's card is replaced.
        lab.servers[0].set({"net.ipv4.conf.eth0.arp_notify": 1})
        lab.servers[0].ip("link set eth0 address 02:00:00:00:77:77")
        await hops.until(lambda: hops[FIRST].dst_mac == bytes.fromhex("020000007777"))
        lab.lb.ip("neigh replace 10.0.0.11 lladdr 02:00:00:00:88:88 nud permanent dev eth0")
        await hops.until(lambda: hops[FIRST].dst_mac == bytes.fromhex("020000008888"))
        lab.lb.ip("neigh del 10.0.0.11 dev eth0")
        await hops.until(lambda: hops[FIRST].dst_mac == bytes.fromhex("020000007777"))
        # Our own changes.
        lab.lb.ip("link set eth0 address 02:00:00:00:66:66")
        await hops.until(lambda: hops[FIRST].src_mac == bytes.fromhex("020000006666"))
        # The link goes down, and comes up again.
        lab.lb.ip("link set eth0 down")
        await hops.until(lambda: hops[FIRST].state is not HopState.RESOLVED)
        lab.lb.ip("link set eth0 up")
        await hops.until(lambda: hops[FIRST].state is HopState.RESOLVED)
        lab.lb.ip("link del eth0")
        await hops.until(lambda: hops[FIRST].reason == "no route: Network is unreachable")

    follow(lab, check)


@pytest.mark.parametrize("address", [FIRST, SECOND])
def test_a_neighbour_that_is_dead(lab, address):
    """It is asked more often than the kernel does by itself: here that would take it hours."""
    lab.lb.set({f"net.ipv{address.version}.neigh.eth0.base_reachable_time_ms": 36_000_000})

    async def check(hops: Followed) -> None:
        await hops.until(lambda: hops[address].state is HopState.RESOLVED)
        entries = json.loads(lab.lb.run("ip", "-j", "neigh", "show", str(address)).stdout)
        assert entries[0]["state"] == ["REACHABLE"]
        # It is the switch's link that goes: ours is as it was.
        lab.middle.ip("link set server1 down")
        await hops.until(lambda: hops[address].state is HopState.UNRESOLVED)
        assert hops[address].reason == f"{address} does not answer on eth0"
        lab.middle.ip("link set server1 up")
        await hops.until(lambda: hops[address].state is HopState.RESOLVED)
        assert "managed" in lab.lb.run("ip", "neigh", "show", str(address)).stdout

    follow(lab, check)


def test_a_neighbour_that_lives(lab, monkeypatch):
    """Nobody hears of its being asked."""
    monkeypatch.setattr(netlink, "PROBE_INTERVAL", 0.01)

    async def check(hops: Followed) -> None:
        await hops.until(lambda: {hops[a].state for a in (FIRST, SECOND)} == {HopState.RESOLVED})
        told: list[object] = []
        hops.hops._on_change = lambda *changed: told.append(changed)
        asked = lab.servers[0].counters()["rx_packets"]
        async with asyncio.timeout(20):
            while lab.servers[0].counters()["rx_packets"] < asked + 50:
                await asyncio.sleep(0.01)
        assert not told
        assert "managed" in lab.lb.run("ip", "neigh", "show", str(FIRST)).stdout

    follow(lab, check)


def test_no_link(lab):
    """Known at once, whatever the neighbours' entries say."""

    async def check(hops: Followed) -> None:
        await hops.until(lambda: hops[FIRST].state is HopState.RESOLVED)
        lab.lb.ip("neigh replace 10.0.0.11 lladdr 02:00:00:00:88:88 nud permanent dev eth0")
        await hops.until(lambda: hops[FIRST].dst_mac == bytes.fromhex("020000008888"))
        lab.middle.ip("link set lb down")
        await hops.until(lambda: hops[FIRST].state is HopState.UNRESOLVED)
        assert hops[FIRST].reason == "eth0 has no link"
        lab.middle.ip("link set lb up")
        await hops.until(lambda: hops[FIRST].state is HopState.RESOLVED)

    follow(lab, check)
