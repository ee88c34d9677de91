"""Next hops follow the kernel's links, routes and neighbours."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import Callable, Coroutine, Iterator
from ipaddress import ip_address

import pytest
import uvloop
from structlog.testing import capture_logs

from crablb.control.announce import announcement
from crablb.kernel import netlink, rtnetlink
from crablb.kernel.interface import interface_info
from crablb.kernel.netlink import HopState, NextHop, NextHops
from crablb.kernel.rtnetlink import NDA_DST, NEIGHBOUR
from crablb.lab import Lab
from crablb.model import Address
from tests.helpers.namespaces import inside

FIRST, SECOND = ip_address("10.0.0.11"), ip_address("fd00::11")
BEHIND, ABSENT = ip_address("192.0.2.1"), ip_address("10.0.0.99")


class Followed:
    """Next hops of the load balancer's node, and a way to wait for one of them."""

    def __init__(self, hops: NextHops, changed: asyncio.Event) -> None:
        self.hops, self._changed = hops, changed

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(60):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def came_about(self, condition: Callable[[], object]) -> None:
        """The same of what no change tells of."""
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.01)

    def __getitem__(self, address: object) -> NextHop:
        return self.hops.current[address]  # type: ignore[index]


def follow(
    lab: Lab,
    check: Callable[[Followed], Coroutine[None, None, None]],
    *addresses: Address,
    run: Callable[..., None] = asyncio.run,
) -> None:
    async def main() -> None:
        changed = asyncio.Event()
        hops = NextHops(lambda *_: changed.set())
        await hops.start(addresses or [FIRST, SECOND, BEHIND, ABSENT])
        try:
            await check(Followed(hops, changed))
        finally:
            await hops.close()

    with inside(lab.lb.netns):
        run(main())


@pytest.fixture
def lab(make_lab) -> Iterator[Lab]:
    lab = make_lab("bridge", servers=2)
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
            assert hops[address] == NextHop(HopState.RESOLVED, "", index, None, mac, own, source, 1500, True, True)
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


def test_a_gateway_of_the_other_family(lab):
    """RFC 8950: IPv4 behind an IPv6 next hop, in the route itself or as an object."""
    server = lab.servers[0]

    async def check(hops: Followed) -> None:
        mac = bytes.fromhex(server.mac().replace(":", ""))
        (link_local,) = re.findall(r"fe80::[0-9a-f:]+", server.run("ip", "-6", "addr", "show", "dev", "eth0").stdout)
        for way in (f"via inet6 {SECOND} dev eth0", f"via inet6 {link_local} dev eth0", "nhid 8"):
            lab.lb.ip(f"nexthop replace id 8 via {SECOND} dev eth0", f"route add 192.0.2.0/24 {way}")
            await hops.until(lambda: hops[BEHIND].state is HopState.RESOLVED)
            assert hops[BEHIND].gateway == ip_address(link_local if "fe80" in way else SECOND)
            assert hops[BEHIND].dst_mac == mac
            assert hops[BEHIND].source == ip_address("10.0.0.2")
            lab.lb.ip("route del 192.0.2.0/24")
            await hops.until(lambda: hops[BEHIND].state is HopState.NO_ROUTE)

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


@pytest.mark.parametrize("compatible", [1, 0], ids=["said-in-routes", "objects-alone"])
def test_next_hop_objects_change(lab, compatible):
    """What is exchanged below a route, of which nothing is said but the object's own event."""
    lab.lb.set({"net.ipv4.nexthop_compat_mode": compatible})

    async def check(hops: Followed) -> None:
        macs = {gateway: bytes.fromhex(s.mac().replace(":", "")) for gateway, s in zip("ab", lab.servers, strict=False)}
        a, b = lab.servers[0].ip4, lab.servers[1].ip4
        lab.lb.ip(
            f"nexthop add id 1 via {a} dev eth0",
            f"nexthop add id 2 via {b} dev eth0",
            "nexthop add id 3 group 1",
            "route add 192.0.2.0/24 nhid 3",
        )
        await hops.until(lambda: hops[BEHIND].dst_mac == macs["a"])
        lab.lb.ip("nexthop replace id 3 group 2")
        await hops.until(lambda: hops[BEHIND].dst_mac == macs["b"])
        lab.lb.ip(f"nexthop replace id 2 via {a} dev eth0")
        await hops.until(lambda: hops[BEHIND].dst_mac == macs["a"])
        lab.lb.ip("nexthop add id 4 blackhole", "route replace 192.0.2.0/24 nhid 4")
        await hops.until(lambda: hops[BEHIND].state is HopState.NO_ROUTE)

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


@pytest.mark.parametrize("how", ["route", "objects", "ipv6"])
def test_one_of_several_next_hops(lab, how):
    """One that answers, and no other while it does; when it dies another, which stays when the first is back."""
    quick = {
        "base_reachable_time_ms": 1000,
        "delay_first_probe_time": 1,
        "interval_probe_time_ms": 1000,
        "retrans_time_ms": 100,
    }
    for family in ("ipv4", "ipv6"):
        lab.lb.set({f"net.{family}.neigh.eth0.{name}": value for name, value in quick.items()})
    address = ip_address("2001:db8::1") if how == "ipv6" else BEHIND
    gateways = [s.ip6 if how == "ipv6" else s.ip4 for s in lab.servers[:2]]
    if how == "objects":
        lines = [f"nexthop add id {i} via {gateway} dev eth0" for i, gateway in enumerate(gateways, 1)]
        lab.lb.ip(*lines, "nexthop add id 9 group 1/2", "route add 192.0.2.0/24 nhid 9")
    else:
        several = " ".join(f"nexthop via {gateway} dev eth0" for gateway in gateways)
        lab.lb.ip(f"route add {'2001:db8::/64' if how == 'ipv6' else '192.0.2.0/24'} {several}")

    async def check(hops: Followed) -> None:
        await hops.until(lambda: address in hops.hops.current and hops[address].state is HopState.RESOLVED)
        first = hops[address]
        at = gateways.index(str(first.gateway))
        await hops.until(lambda: lab.lb.run("ip", "neigh").stdout.count("managed") >= 2)
        lab.servers[at].ip("link set eth0 down")
        await hops.until(lambda: hops[address].gateway == ip_address(gateways[1 - at]))
        assert hops[address].state is HopState.RESOLVED
        second = hops[address]
        lab.servers[at].ip("link set eth0 up")
        hops.hops.follow([address, ABSENT])  # all is read anew
        await hops.until(lambda: ABSENT in hops.hops.current)
        assert hops[address] == second
        # The one in use is taken out of the route.
        left = gateways[at]
        lab.lb.ip(f"route replace {'2001:db8::/64' if how == 'ipv6' else '192.0.2.0/24'} via {left}")
        await hops.until(lambda: hops[address].gateway == ip_address(left))

    follow(lab, check, address)


def test_what_is_no_other_host(lab):
    own, all_of_them = ip_address("10.0.0.2"), ip_address("10.0.0.255")
    own6, wrapped = ip_address("fd00::2"), ip_address("2001:db8::1")
    lab.lb.ip("route add 2001:db8::/64 encap seg6 mode encap segs fd00::99 dev eth0")

    async def check(hops: Followed) -> None:
        for address in (own, own6):
            assert hops[address].state is HopState.NOT_A_HOST
            assert hops[address].reason == (
                "it is an address of this machine itself, and frames go to others only; leave it out"
            )
        assert hops[all_of_them].reason == "it is a broadcast address"
        assert hops[wrapped].state is HopState.NOT_ETHERNET
        assert hops[wrapped].reason == "its route wraps packets (ip route ... encap), as only the kernel does"
        lab.lb.ip("addr del 10.0.0.2/24 dev eth0", "addr add 10.0.0.3/24 dev eth0")
        lab.servers[0].ip("addr add 10.0.0.2/24 dev eth0")
        await hops.until(lambda: hops[own].state is HopState.RESOLVED)

    follow(lab, check, own, all_of_them, own6, wrapped)


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_an_overrun_is_survived(lab, run):
    """More routes come at once than the socket holds, as from a BGP session; then everything is asked for anew."""

    async def check(hops: Followed) -> None:
        await hops.until(lambda: hops[FIRST].state is HopState.RESOLVED)
        for turn in range(2):
            mac = f"02:00:00:00:77:0{turn}"
            # The loop does nothing meanwhile.
            verb = "add" if turn == 0 else "del"
            lab.lb.ip(
                *(f"route {verb} 172.16.{i >> 8}.{i & 255}/32 via 10.0.0.1" for i in range(20_000)),
                f"neigh replace 10.0.0.11 lladdr {mac} nud permanent dev eth0",
            )
            await hops.until(lambda m=mac: hops[FIRST].dst_mac.hex(":") == m)
        # And single events are heard again.
        lab.lb.ip("neigh replace 10.0.0.11 lladdr 02:00:00:00:77:77 nud permanent dev eth0")
        await hops.until(lambda: hops[FIRST].dst_mac.hex(":") == "02:00:00:00:77:77")

    with capture_logs() as said:
        follow(lab, check, run=run)
    assert "events of the kernel were lost; it is asked for everything" in {entry["event"] for entry in said}


def test_what_cannot_be_taken_is_asked_for(lab, monkeypatch):
    """No memory for an event: as if it had been lost."""

    async def check(hops: Followed) -> None:
        await hops.until(lambda: hops[FIRST].state is HopState.RESOLVED)
        failed = []

        def fail(data):
            failed.append(data)
            raise MemoryError

        with monkeypatch.context() as patch:
            patch.setattr(rtnetlink, "parse", fail)
            lab.lb.ip("neigh replace 10.0.0.11 lladdr 02:00:00:00:77:77 nud permanent dev eth0")
            await hops.came_about(lambda: failed)
        await hops.until(lambda: hops[FIRST].dst_mac.hex(":") == "02:00:00:00:77:77")

    follow(lab, check, run=uvloop.run)


def test_other_neighbours_are_left_in_the_kernel(lab):
    """Whoever sends ARP here makes entries; no event of them comes, and those of backends of both families do."""

    async def check(hops: Followed) -> None:
        await hops.until(lambda: all(hops[a].state is HopState.RESOLVED for a in (FIRST, SECOND)))
        taken, take = [], hops.hops._take

        def note(data: bytes, sender: object) -> None:
            taken.append(data)
            take(data, sender)

        hops.hops._readers[0]._take = note
        lab.lb.ip(*(f"neigh add 10.0.0.{i} lladdr 02:00:00:00:00:01 nud stale dev eth0" for i in range(100, 200)))
        lab.lb.ip(*(f"neigh add fd00::1:{i} lladdr 02:00:00:00:00:01 nud stale dev eth0" for i in range(100, 200)))
        for address in (FIRST, SECOND):
            lab.lb.ip(f"neigh replace {address} lladdr 02:00:00:00:88:88 nud permanent dev eth0")
            await hops.until(lambda a=address: hops[a].dst_mac.hex(":") == "02:00:00:00:88:88")
        assert taken
        about = [rtnetlink.address(m.attributes(NEIGHBOUR)[NDA_DST]) for d in taken for m in rtnetlink.parse(d)]
        assert set(about) <= {str(FIRST), str(SECOND), str(ABSENT)}

    follow(lab, check)


def test_a_forged_claim_for_a_backend(lab):
    """It is followed, as the kernel follows it; not for a backend whose MAC address is pinned."""
    forged = "02:00:00:00:66:66"

    async def check(hops: Followed) -> None:
        await hops.until(lambda: hops[FIRST].state is HopState.RESOLVED)

        def forge() -> None:
            with inside(lab.client.netns), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as wire:
                wire.bind(("eth0", 0))
                wire.send(announcement(FIRST, bytes.fromhex(forged.replace(":", ""))))

        forge()
        await hops.until(lambda: hops[FIRST].dst_mac.hex(":") == forged)
        own = lab.servers[0].mac()
        lab.lb.ip(f"neigh replace {FIRST} lladdr {own} nud permanent dev eth0")
        await hops.until(lambda: hops[FIRST].dst_mac.hex(":") == own)
        forge()
        # What comes behind it has come.
        lab.client.run("ping", "-c", "1", "-W", "5", lab.lb.ip4)
        assert own in lab.lb.run("ip", "neigh", "show", str(FIRST)).stdout
        assert hops[FIRST].dst_mac.hex(":") == own

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
