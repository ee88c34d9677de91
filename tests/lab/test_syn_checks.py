"""Checks by real SYNs: real servers, sound ones and those with each fault that a check is there for."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Iterator
from ipaddress import ip_address
from typing import TypeVar

import pytest
import uvloop

from crablb.control.health.syn import PORTS, Answer, Sounder
from crablb.kernel.netlink import HopState, NextHop, NextHops
from crablb.lab import VIP4, VIP6, Lab, Node
from crablb.model import Address, Backend, Fallback, OptionForm, Service, Vip
from tests.helpers.namespaces import inside
from tests.helpers.processes import until
from tests.helpers.world import agent_status, status

T = TypeVar("T")
VIP = {4: Vip(VIP4, 80), 6: Vip(VIP6, 80)}
FORWARD = {"net.ipv4.ip_forward": 1, "net.ipv6.conf.all.forwarding": 1}
#: Against a hang; but where a test waits for silence.
PATIENCE, BRIEF = 30.0, 0.5
CRAB = OptionForm.CRAB


def dip(server: Node, version: int) -> Address:
    return ip_address(server.ip4 if version == 4 else server.ip6)


class Asker:
    """The load balancer's checks, and the next hops that it sends them to."""

    def __init__(self, sounder: Sounder, hops: NextHops, changed: asyncio.Event) -> None:
        self.sounder, self.hops, self._changed = sounder, hops, changed

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    def hop(self, server: Node, version: int) -> NextHop:
        return self.hops.current[dip(server, version)]

    async def redirect(
        self, server: Node, version: int = 4, form: OptionForm = CRAB, timeout: float = PATIENCE, vip: Vip | None = None
    ) -> Answer:
        to = dip(server, version)
        return await self.sounder.redirect(self.hops.current[to], to, vip or VIP[version], form, timeout)

    async def fallback(
        self,
        server: Node,
        version: int = 4,
        how: Fallback = Fallback.AUTO,
        timeout: float = PATIENCE,
        *,
        over: int = 0,
        vip: Vip | None = None,
    ) -> Answer:
        to = dip(server, over or version)
        return await self.sounder.fallback(self.hops.current[to], to, vip or VIP[version], how, timeout)


def ask(lab: Lab, asked: Callable[[Asker], Awaitable[T]], run: Callable[..., T] = uvloop.run) -> T:
    """What comes of it, asked in the load balancer's node."""

    async def main() -> T:
        changed = asyncio.Event()
        hops = NextHops(lambda *_: changed.set())
        sounder = Sounder()
        await hops.start(dip(server, version) for server in lab.servers for version in (4, 6))
        try:
            sounder.start()
            asker = Asker(sounder, hops, changed)
            await asker.until(lambda: all(hop.state is HopState.RESOLVED for hop in hops.current.values()))
            return await asked(asker)
        finally:
            sounder.close()
            await hops.close()

    with inside(lab.lb.netns):
        return run(main())


def half_open(node: Node) -> str:
    return node.run("ss", "-Htan", "state", "syn-recv").stdout


def kernels_resets(node: Node) -> int:
    """How many the node's own TCP has sent."""
    names, values = (line.split() for line in node.run("grep", "^Tcp:", "/proc/net/snmp").stdout.splitlines())
    return int(values[names.index("OutRsts")])


def nft(node: Node, hook: str, *rules: str) -> None:
    chain = f"add table inet t; add chain inet t {hook} {{ type filter hook {hook} priority -400; }}; "
    node.run("nft", chain + "; ".join(f"add rule inet t {hook} {rule}" for rule in rules))


@pytest.fixture
def unfiltered() -> Iterator[list[Node]]:
    """Nodes whose filters are to go in the end."""
    nodes: list[Node] = []
    yield nodes
    for node in nodes:
        node.run("nft", "flush ruleset")


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
@pytest.mark.parametrize("topology", ["bridge", "routed"])
def test_sound_servers(standing, topology, run):
    """In every way that the load balancer has.  No connection is left, by the RSTs of the checks alone; and the
    servers' agents do not take them for redirects that nobody completes."""
    lab = standing(topology, servers=2, dsr=True).lab
    resets = kernels_resets(lab.lb)
    begun = [agent_status(server)["server"]["redirected"] for server in lab.servers]

    async def asked(asker: Asker) -> dict[tuple[object, ...], Answer]:
        ways: dict[tuple[object, ...], Awaitable[Answer]] = {}
        for server in lab.servers:
            for version in (4, 6):
                ways["redirect", server.name, version] = asker.redirect(server, version)
                for over in (4, 6):
                    ways["fallback", server.name, version, over] = asker.fallback(server, version, over=over)
        found = dict(zip(ways, await asyncio.gather(*ways.values()), strict=True))
        for server in lab.servers:
            for version in (4, 6):
                key = server.name, version
                found["fallback", *key] = await asker.fallback(server, version, Fallback.DSR_IPIP)
                found["redirect", *key, "experimental"] = await asker.redirect(server, version, OptionForm.EXPERIMENTAL)
        return found

    found = ask(lab, asked, run)
    assert not [key for key, one in found.items() if not one.ok or not one.answered], found
    assert all(one.echoed == (key[0] == "redirect") for key, one in found.items())
    assert found["redirect", "server1", 4].by == dip(lab.servers[0], 4)
    assert found["fallback", "server1", 6, 4].by == VIP6
    for server in lab.servers:
        until(lambda server=server: not half_open(server))
    assert kernels_resets(lab.lb) == resets
    assert [agent_status(server)["server"]["redirected"] for server in lab.servers] == begun


@pytest.mark.parametrize("topology", ["bridge", "routed"])
def test_beside_real_clients(standing, topology):
    """The workers see none of the checks, even if a router would bring them what is sent to a VIP; and clients none of
    their doings."""
    world = standing(topology, servers=2, dsr=True)
    world.client()
    world.serve()

    async def asked(asker: Asker) -> None:
        before = status(world.lab)["total"]
        for _ in range(PORTS + 1):
            for server in world.lab.servers:
                assert (await asker.redirect(server)).ok
                assert (await asker.fallback(server)).ok
        assert status(world.lab)["total"] == before
        # While the next hops are followed: whoever ends takes the neighbours' entries with him.
        assert world.echo(VIP4)["accepted_on"] != str(VIP4)
        assert status(world.lab)["total"]["redirected"] == 1

    ask(world.lab, asked)


@pytest.mark.parametrize("mode", ["native", "generic"])
def test_the_own_program_lets_them_through(standing, mode):
    """Also where the VIP is an address of the load balancer as well, and everything else of the VIP's is reset."""
    world = standing(servers=1)
    lab = world.lab
    lab.lb.ip(f"addr add {VIP4}/32 dev lo", f"addr add {VIP6}/128 dev lo nodad")
    world.serve("--xdp-mode", mode, "--closed", "reset")

    async def asked(asker: Asker) -> list[Answer]:
        asker.sounder.follow([Service(vip, (Backend(dip(lab.servers[0], n)),)) for n, vip in VIP.items()])
        return [await way(lab.servers[0], n) for n in (4, 6) for way in (asker.redirect, asker.fallback)]

    assert all(one.ok for one in ask(lab, asked))
    total = status(lab)["total"]
    assert not [name for name, n in total.items() if n], total
    lab.lb.ip(f"addr del {VIP4}/32 dev lo", f"addr del {VIP6}/128 dev lo")


def test_the_own_address_is_a_vip(make_world):
    """Then it is asked from another one, or not at all."""
    lab = make_world().lab
    (server,) = lab.servers
    world_vip = Vip(ip_address(lab.lb.ip4), 80)

    async def asked(asker: Asker) -> Answer:
        asker.sounder.follow([Service(world_vip, (Backend(dip(server, 4)),))])
        return await asker.redirect(server, timeout=BRIEF)

    found = ask(lab, asked)
    assert (found.ok, found.reason) == (None, "this host has no IPv4 address to ask from, other than VIPs")
    lab.lb.ip("addr add 10.0.0.3/16 dev eth0")
    assert ask(lab, asked).reason.startswith("refused")


def test_what_servers_lack(make_world):
    """No agent, no VIP, no IP in IP, nobody listening, nobody accepting."""
    world = make_world(servers=2)
    first, second = world.lab.servers
    listening = world.python(first, "serve", "first", "80", ready=True)
    world.python(second, "serve", "second", "80", ready=True)
    first.ip(f"addr del {VIP4}/32 dev lo")

    async def without(asker: Asker) -> list[Answer]:
        return [
            await asker.redirect(first),
            await asker.fallback(first, timeout=BRIEF),
            await asker.fallback(second, 6, over=4),
            await asker.fallback(second, 4, over=6),
            await asker.fallback(second, 4, Fallback.DSR_L2, over=6),
            await asker.redirect(second, vip=Vip(VIP4, 81)),
            await asker.fallback(second, vip=Vip(VIP4, 81)),
        ]

    redirected, lost, four, six, never, refused, refused_vip = ask(world.lab, without)
    assert (redirected.ok, redirected.answered, redirected.echoed) == (False, True, False)
    assert "without the redirect: no agent for tcp://10.0.0.100:80 there" in redirected.reason
    assert not lost.ok
    assert "see whether the VIP is on its lo" in lost.reason
    assert lost.seconds > BRIEF / 2  # event loops' timers may run out a millisecond early
    for one, by in ((four, second.ip4), (six, second.ip6)):
        assert one.reason == f"protocol unreachable, says {by}: it does not take IP in IP; its agent does with --dsr"
    assert never.ok is False
    assert "of another IP version" in never.reason
    assert refused.reason == "refused: nothing listens there on 10.0.0.12:81"
    assert refused_vip.reason.startswith("refused: nothing listens there on 10.0.0.100:81 (on 10.0.0.12 alone")
    listening.kill()
    listening.wait()
    assert (
        ask(world.lab, lambda asker: asker.redirect(first)).reason == "refused: nothing listens there on 10.0.0.11:80"
    )
    with inside(first.netns), socket.create_server(("10.0.0.11", 80), backlog=0) as hung:
        # One more than the backlog: then the queue is full, and the kernel drops SYNs.
        waiting = [socket.create_connection(("10.0.0.11", 80))]
        found = ask(world.lab, lambda asker: asker.redirect(first, timeout=BRIEF))
        assert (found.ok, found.answered) == (False, False)
        assert "a full accept queue" in found.reason
        hung.accept()[0].close()
        for one in waiting:
            one.close()


def test_a_server_that_sends_the_vip_back(make_world):
    """It has not the VIP, and forwards: what comes of its SYN is another server's answer."""
    world = make_world(servers=3)
    world.servers(agents=False)
    world.serve()
    first, *others = world.lab.servers
    first.ip(f"addr del {VIP4}/32 dev lo", f"route add {VIP4} via {world.lab.lb.ip4}")
    first.set(FORWARD | {"net.ipv4.conf.all.rp_filter": 0})

    async def asked(asker: Asker) -> list[Answer]:
        assert all([(await asker.fallback(server)).ok for server in others])
        return [await asker.fallback(first, timeout=BRIEF) for _ in range(12)]

    found = ask(world.lab, asked)
    assert not any(one.ok for one in found)
    # Unless the load balancer gave it back to the first, and noticed.
    assert any("answered in its place: it sent the SYN to the VIP back" in one.reason for one in found), found


@pytest.mark.parametrize("version", [4, 6])
def test_firewalls(standing, version, unfiltered):
    """On the server: that drop, refuse in each way, or take the option out; a gateway's word is its own."""
    lab = standing(servers=1).lab
    (server,) = lab.servers
    unfiltered.append(server)

    def filtered(*rules: str, timeout: float = PATIENCE) -> Answer:
        server.run("nft", "flush ruleset")
        nft(server, "input", *rules)
        return ask(lab, lambda asker: asker.redirect(server, version, timeout=timeout))

    icmp = "icmp" if version == 4 else "icmpv6"
    prohibited = "admin-prohibited"
    found = filtered("tcp dport 80 drop", timeout=BRIEF)
    assert found.ok is False
    assert "no answer from" in found.reason
    assert "a firewall" in found.reason
    found = filtered(f"tcp dport 80 reject with {icmp} type {prohibited}")
    by = dip(server, version)
    assert found.reason == f"administratively prohibited, says {by}: a firewall there refuses the SYN"
    assert found.by == by
    found = filtered(f"tcp dport 80 reject with {icmp} type port-unreachable")
    assert found.reason == f"port unreachable, says {by}: a firewall there refuses the SYN"
    assert filtered("tcp dport 80 reject with tcp reset").reason.startswith("refused: nothing listens")
    assert filtered("tcp dport 80 reset tcp option 42").reason.startswith("SYN-ACK without the redirect")


def test_the_load_balancers_own_firewall_does_not_matter(standing, unfiltered):
    """Nor its conntrack, nor its reverse-path filter."""
    lab = standing(servers=1).lab
    unfiltered.append(lab.lb)
    nft(lab.lb, "input", "ct state invalid drop", "meta l4proto tcp drop")
    lab.lb.set({"net.ipv4.conf.all.rp_filter": 1})
    try:
        (server,) = lab.servers
        assert ask(lab, lambda asker: asker.redirect(server)).ok
        assert ask(lab, lambda asker: asker.fallback(server)).ok
    finally:
        lab.lb.set({"net.ipv4.conf.all.rp_filter": 0})


def test_a_router_that_knows_no_way(standing):
    """Its ICMP error quotes the SYN, or the packet that wraps it; and it is what it says, wherever the fault is."""
    lab = standing("routed", dsr=True).lab
    (server,) = lab.servers

    async def asked(asker: Asker) -> list[Answer]:
        lab.middle.ip(*(f"route add unreachable {dip(server, n)}" for n in (4, 6)))
        try:
            return [await way(server, n) for n in (4, 6) for way in (asker.redirect, asker.fallback)]
        finally:
            lab.middle.ip(*(f"route del unreachable {dip(server, n)}" for n in (4, 6)))

    found = ask(lab, asked)
    assert [one.ok for one in found] == [False] * 4
    assert {one.reason for one in found[:2]} == {"host unreachable, says 10.2.0.254"}
    assert {one.reason for one in found[2:]} == {"no route to destination, says fd00:2::fe"}, found


def test_a_reset_that_never_comes(standing, unfiltered):
    """Then the server has the connection when its port comes round again, and says so: that tells nothing of it."""
    lab = standing(servers=1).lab
    (server,) = lab.servers
    unfiltered.append(server)
    nft(server, "input", "tcp flags & rst == rst drop")
    earlier = "its server still has an earlier check's connection; are RSTs dropped on the way to it?"

    async def asked(asker: Asker) -> list[Answer]:
        return [await asker.redirect(server) for _ in range(PORTS + 1)]

    *found, last = ask(lab, asked)
    assert all(one.ok for one in found)
    assert (last.ok, last.reason) == (None, earlier)


def test_links_that_go_and_come(make_world):
    """The load balancer's own is no fault of a server; checks go on when it is back, also when it was made anew."""
    world = make_world()
    world.servers()
    lab = world.lab
    (server,) = lab.servers

    async def asked(asker: Asker) -> None:
        assert (await asker.redirect(server)).ok
        hop = asker.hop(server, 4)
        lab.lb.ip("link set eth0 down")
        found = await asker.sounder.redirect(hop, dip(server, 4), VIP[4], CRAB, PATIENCE)
        assert (found.ok, found.reason) == (None, "cannot send to it by eth0: Network is down")
        await asker.until(lambda: asker.hop(server, 4).state is not HopState.RESOLVED)
        lab.lb.ip("link set eth0 up")
        await asker.until(lambda: asker.hop(server, 4).state is HopState.RESOLVED)
        assert (await asker.redirect(server)).ok
        assert (await asker.fallback(server)).ok
        lab.middle.ip("link set server1 down")
        found = await asker.sounder.redirect(hop, dip(server, 4), VIP[4], CRAB, BRIEF)
        assert (found.ok, found.reason[:9]) == (False, "no answer")
        await asker.until(lambda: asker.hop(server, 4).state is HopState.UNRESOLVED)
        found = await asker.redirect(server)
        assert (found.ok, found.reason) == (False, "10.0.0.11 does not answer on eth0")
        lab.lb.ip("link del eth0")
        found = await asker.sounder.redirect(hop, dip(server, 4), VIP[4], CRAB, PATIENCE)
        assert (found.ok, found.reason) == (None, "its interface is gone")

    ask(lab, asked)


def test_cookies(standing):
    """A server that keeps nothing of a SYN echoes the redirect all the same."""
    lab = standing(servers=1).lab
    (server,) = lab.servers
    server.set({"net.ipv4.tcp_syncookies": 2})
    try:
        assert ask(lab, lambda asker: asker.redirect(server)).ok
        assert ask(lab, lambda asker: asker.fallback(server)).ok
    finally:
        server.set({"net.ipv4.tcp_syncookies": 1})


def test_ports_are_taken_from_everybody_else(standing):
    """The kernel gives them to no connection, and nobody listens there; where some are taken, others are."""
    lab = standing(servers=1).lab
    lab.lb.set({"net.ipv4.ip_local_port_range": "40000 40100"})  # type: ignore[dict-item]
    try:

        async def asked(asker: Asker) -> set[int]:
            (server,) = lab.servers
            ports = set()
            for version in (4, 6):
                family = socket.AF_INET if version == 4 else socket.AF_INET6
                sockets = [socket.socket(family) for _ in range(30)]
                for sock in sockets:
                    sock.connect((str(dip(server, version)), 80))
                    ports.add(sock.getsockname()[1])
                for sock in sockets:
                    sock.close()
            own = {sock.getsockname()[1] for sock in asker.sounder._ports}
            assert len(own) == PORTS
            assert not own & ports
            with pytest.raises(OSError, match="in use"):
                socket.create_server(("", min(own)))
            return own

        ask(lab, asked)
    finally:
        lab.lb.set({"net.ipv4.ip_local_port_range": "32768 60999"})  # type: ignore[dict-item]
