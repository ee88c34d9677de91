"""Somebody who may send any packet, and knows addresses and ports, but no sequence numbers, breaks nothing."""

from __future__ import annotations

import itertools
import json
import random
import re
import socket
from collections.abc import Iterator
from ipaddress import ip_address

import pytest
from scapy.layers.inet import ICMP, IP, TCP, fragment
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6ND_Redirect,
    ICMPv6NDOptDstLLAddr,
    ICMPv6PacketTooBig,
    ICMPv6TimeExceeded,
    IPv6,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
)
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

from crablb.kernel import bpf, pins
from crablb.lab import VIP4, VIP6, Node
from tests.helpers.namespaces import inside
from tests.helpers.processes import exchange, until
from tests.helpers.world import World, agent_status, command, status

VIP = {4: str(VIP4), 6: str(VIP6)}
ATTACKER = "02:00:00:00:66:66"
FLAGS = ("S", "SA", "R", "RA", "FA", "F", "A", "PA", "SE", "SR", "FSRPAU", "")


def address(node: Node, family: int) -> str:
    return str(node.ip4 if family == 4 else node.ip6)


class Attack:
    """Frames from the switch, to the load balancer, the client, or a server."""

    def __init__(self, world: World) -> None:
        self.world, self.numbers, self.sent = world, random.Random(17), 0

    def send(self, to: Node, frames: Iterator[Packet]) -> None:
        mac = to.mac()
        with inside(self.world.lab.middle.netns), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as wire:
            wire.bind((to.name, 0))
            for packet in frames:
                wire.send(bytes(Ether(src=ATTACKER, dst=mac) / packet))
                self.sent += 1

    def number(self) -> int:
        """One that is in no window: half of all numbers away from any that is, but for a chance in thousands."""
        return self.numbers.randrange(1 << 32)

    def segments(self, source: str, sport: int, to: str, dport: int, *more: object) -> Iterator[Packet]:
        l3 = IPv6 if ":" in to else IP
        for flags in FLAGS:
            tcp = TCP(sport=sport, dport=dport, flags=flags, seq=self.number(), ack=self.number(), options=list(more))
            yield l3(src=source, dst=to) / tcp / (Raw(b"forged") if "P" in flags else Raw())

    def errors(self, liar: str, client: str, port: int, to: str) -> Iterator[Packet]:
        """About a packet of the client's."""
        six = ":" in to
        quoted = (IPv6 if six else IP)(src=client, dst=to) / TCP(sport=port, dport=80, seq=self.number(), flags="A")
        if six:
            head = IPv6(src=liar, dst=client)
            for error in (
                *(ICMPv6DestUnreach(code=code) for code in range(7)),
                ICMPv6PacketTooBig(mtu=0),
                ICMPv6PacketTooBig(mtu=1280),
                ICMPv6TimeExceeded(),
            ):
                yield head / error / quoted
            redirect = ICMPv6ND_Redirect(tgt="fe80::66", dst=to) / ICMPv6NDOptDstLLAddr(lladdr=ATTACKER)
            yield IPv6(src=liar, dst=client, hlim=255) / redirect
        else:
            head = IP(src=liar, dst=client)
            for kind, code in (*((3, code) for code in range(16)), (11, 0), (12, 0)):
                yield head / ICMP(type=kind, code=code, nexthopmtu=68 if (kind, code) == (3, 4) else 0) / quoted
            yield head / ICMP(type=5, code=1, gw="10.0.0.66") / quoted

    def pieces(self, source: str, sport: int, to: str) -> Iterator[Packet]:
        """A reset and data in fragments: small ones, ones that lie over each other, and a header in two."""
        tcp = TCP(sport=sport, dport=80, flags="R", seq=self.number()) / Raw(b"x" * 24)
        if ":" in to:
            whole = bytes(tcp)
            for offset, piece, m in ((0, whole[:8], 1), (1, whole[8:16], 1), (1, b"\xff" * 8, 1), (2, whole[16:], 0)):
                yield IPv6(src=source, dst=to) / IPv6ExtHdrFragment(offset=offset, m=m, nh=6, id=7) / Raw(piece)
            yield IPv6(src=source, dst=to) / IPv6ExtHdrFragment(offset=0, m=0, nh=6, id=8) / tcp
            yield IPv6(src=source, dst=to) / IPv6ExtHdrHopByHop() / tcp
            yield IPv6(src=source, dst=to) / IPv6ExtHdrRouting(addresses=[source]) / tcp
        else:
            cut = fragment(IP(src=source, dst=to, id=7) / tcp, 8)
            yield from cut
            yield from reversed(cut)
            over = cut[1].copy()
            over[Raw].load = b"\xff" * 8
            yield over
            yield IP(src=source, dst=to, options=[b"\x83\x07\x04" + ip_address(source).packed]) / tcp

    def tunnels(self, outer: str, to: str, client: str, port: int, vip: str) -> Iterator[Packet]:
        """Protocols 4 and 41."""
        for inner in self.segments(client, port, vip, 80):
            yield (IPv6 if ":" in to else IP)(src=outer, dst=to) / inner


@pytest.mark.parametrize("family", [4, 6])
def test_tunnels_from_elsewhere_reach_no_server(make_world, family):
    """Where servers are told who their load balancers are; also when the program had to be put back."""
    world = make_world("routed", servers=1)
    lab, vip = world.lab, VIP[family]
    [server] = lab.servers
    balancers = [f"{address(lab.lb, f)}/{32 if f == 4 else 128}" for f in (4, 6)]
    world.servers(True, *(part for prefix in balancers for part in ("--tunnels-from", prefix)), dsr=True)
    world.serve()
    attack = Attack(world)

    def counts() -> dict[str, int]:
        return agent_status(server)["server"]["counters"]

    def fallback() -> None:
        before = counts()["dsr_decapsulated"]
        assert world.echo(vip)["intact"]
        assert counts()["dsr_decapsulated"] > before

    for _ in range(2):
        fallback()
        before = counts()
        outer, to = "203.0.113.9" if family == 4 else "2001:db8::9", address(server, family)
        frames = list(attack.tunnels(outer, to, address(lab.client, family), 41000, vip))
        attack.send(server, iter(frames))
        until(lambda: counts()["dsr_drop_source"] - before["dsr_drop_source"] == len(frames))  # noqa: B023
        assert counts()["dsr_decapsulated"] == before["dsr_decapsulated"]
        assert ":41000" not in server.run("ss", "-Htan").stdout
        with inside(server.netns), bpf.Link.from_pin(pins.folder("server") / "decap-eth0") as link:
            link.detach()
        assert "decapsulates" in command(server, "agent", "repair")


@pytest.mark.parametrize("family", [4, 6])
def test_a_tunnel_that_somebody_narrows_carries_on(make_world, family):
    """He knows all addresses, and says "too big" of the load balancer's own packets.  IPv4 routes can be locked."""
    world = make_world("routed", servers=2, offload=False)
    lab, vip, six = world.lab, VIP[family], family == 6
    server, other = lab.servers
    routes = lab.lb.run("ip", f"-{family}", "-j", "route", "show", "default").stdout
    lb, (way,) = address(lab.lb, family), json.loads(routes)
    if not six:
        lab.lb.ip(f"route add {other.ip4} via {way['gateway']} dev {way['dev']} mtu lock 1500")
    world.servers(dsr=True)
    served = f"tcp://[{vip}]:80" if six else f"tcp://{vip}:80"
    world.serve("--fallback", "dsr-ipip", what=[f"{served}={address(server, family)}"])

    def forged(to: Node) -> Packet:
        inner = (IPv6 if six else IP)(src=address(lab.client, family), dst=vip) / TCP(sport=41000, dport=80)
        outer = (IPv6 if six else IP)(src=lb, dst=address(to, family)) / inner
        if six:
            return IPv6(src=way["gateway"], dst=lb) / ICMPv6PacketTooBig(mtu=1280) / outer
        return IP(src=way["gateway"], dst=lb) / ICMP(type=3, code=4, nexthopmtu=68) / outer

    least = 1280 if six else 552
    host = address(lab.client, family)
    asked = f"[{host}]:41000 -> [{vip}]:80" if six else f"{host}:41000 -> {vip}:80"

    def way_to_it() -> str:
        steps = json.loads(command(lab.lb, "explain", asked, "--json"))["steps"]
        return next(step["why"] for step in steps if step["what"] == "backend")

    Attack(world).send(lab.lb, iter([forged(other), forged(server)]))  # one after the other
    until(lambda: way_to_it().endswith(f"MTU {least}"))
    if not six:
        assert "mtu lock 1500" in lab.lb.run("ip", "route", "get", other.ip4).stdout
    # Less than that it could not be told.
    assert world.echo(vip, "100000")["intact"]
    assert f"mtu {least}" in lab.client.run("ip", "route", "get", vip).stdout
    counts = status(lab)["total"]
    assert (counts["too_big"] > 0, counts["drop_too_big"]) == (True, 0)


@pytest.mark.parametrize("family", [4, 6])
def test_connections_live_through_what_strangers_send(make_world, family):
    """A redirected one and one by the fallback, with and without offloads between them; and new ones are served."""
    world = make_world(servers=2)
    world.servers()
    world.client()
    world.serve()
    lab, vip, port = world.lab, VIP[family], 41000
    attack = Attack(world)
    host = address(lab.client, family)
    redirected = world.python(lab.client, "hold", vip, "80", str(port), ready=True)
    with inside(lab.client.netns):  # outside of the agent's cgroup: by the fallback
        fallback = socket.create_connection((vip, 80), 60, source_address=("", port + 1))
    with fallback, fallback.makefile("rw") as plain:
        assert plain.readline().split()[1] == vip

        def live() -> None:
            assert exchange(redirected, "still here") == "still here"
            print("still here", file=plain, flush=True)
            assert plain.readline() == "still here\n"

        def server_of(local: int) -> Node:
            [found] = [s for s in lab.servers if re.search(rf":{local}\b", s.run("ss", "-Htn").stdout)]
            return found

        server = server_of(port)
        dip, other = address(server, family), address(server_of(port + 1), family)
        live()
        for _ in range(3):
            for source, local in itertools.product((dip, vip), (port, port + 1)):
                attack.send(lab.client, attack.segments(source, 80, host, local))
                attack.send(lab.client, attack.segments(source, 80, host, local, (42, ip_address(vip).packed)))
                attack.send(lab.client, attack.errors(address(lab.lb, family), host, local, source))
                attack.send(lab.client, attack.pieces(source, 80, host))
            live()
            for to, local in itertools.product((dip, other, vip), (port, port + 1)):
                target = lab.lb if to == vip else server if to == dip else server_of(port + 1)
                attack.send(target, attack.segments(host, local, to, 80))
                attack.send(target, attack.segments(host, local, to, 80, (42, ip_address(vip).packed)))
                attack.send(target, attack.errors(host, vip, 80, host))
                attack.send(target, attack.pieces(host, local, to))
                attack.send(
                    target, attack.tunnels("203.0.113.9" if family == 4 else "2001:db8::9", dip, host, local, vip)
                )
            live()
        assert {s.name for s in lab.servers if re.search(rf":{port}\b", s.run("ss", "-Htn").stdout)} == {server.name}
        seen = world.echo(vip, "100000")
        assert seen["intact"]
        assert seen["accepted_on"] != vip  # no offer was lost for it
        with inside(lab.client.netns), socket.create_connection((vip, 80), 60) as late:
            assert late.makefile().readline().split()[1] == vip
    assert not status(lab)["problems"], status(lab)["problems"]
    assert attack.sent > 500
