"""Next hops follow the kernel's links, routes and neighbours."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Coroutine, Iterator
from ipaddress import ip_address

import pytest
import uvloop
from structlog.testing import capture_logs

from crablb.control.announce import announcement
from crablb.kernel import rtnetlink
from crablb.kernel.interface import interface_info
from crablb.kernel.netlink import HopState, NextHop, NextHops
from crablb.kernel.rtnetlink import NDA_DST, NEIGHBOUR
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

    async def came_about(self, condition: Callable[[], object]) -> None:
        """The same of what no change tells of."""
        async with asyncio.timeout(20):
            while not condition():
                await asyncio.sleep(0.01)

    def __getitem__(self, address: object) -> NextHop:
        return self.hops.current[address]  # type: ignore[index]


def follow(
    lab: Lab, check: Callable[[Followed], Coroutine[None, None, None]], run: Callable[..., None] = asyncio.run
) -> None:
    async def main() -> None:
        changed = asyncio.Event()
        hops = NextHops(lambda *_: changed.set())
        await hops.start([FIRST, SECOND, BEHIND, ABSENT])
        try:
            await check(Followed(hops, changed))
        finally:
            await hops.close()

    with inside(lab.lb.netns):
        run(main())


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
        follow(lab, check, run)
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

    follow(lab, check, uvloop.run)


def test_other_neighbours_are_left_in_the_kernel(lab):
    """Whoever sends ARP here makes entries; no event of them comes, and those of backends of both families do."""

    async def check(hops: Followed) -> None:
        await hops.until(lambda: all(hops[a].state is HopState.RESOLVED for a in (FIRST, SECOND)))
        taken, take = [], hops.hops._take

        def note(data: bytes, sender: object) -> None:
            taken.append(data)
            take(data, sender)

        hops.hops._reader._take = note
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
