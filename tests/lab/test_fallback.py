"""Clients that are not redirected: direct server return, real clients and servers."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import re
import select
import socket
import struct

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.utils import rdpcap

from crablb.lab import VIP4, VIP6, Node
from crablb.lab.demo import crablb, start_agent
from tests.helpers.cables import cable, two_networks
from tests.helpers.covering import OFFLOAD, covering
from tests.helpers.namespaces import inside
from tests.helpers.processes import exchange, until
from tests.helpers.world import World, agent_status, status

VIP = {4: str(VIP4), 6: str(VIP6)}
PORT = 7000
TCP_MD5SIG = 14


def forwarded(world: World) -> int:
    """Packets that went on, by user space or by the XDP program."""
    now = status(world.lab)
    return sum(n for name, n in now["total"].items() if name.startswith("fallback_")) + now["xdp"]["flow"]


def agents(world: World, counter: str) -> int:
    """A counter of the servers' agents, over all servers."""
    return sum(agent_status(server)["server"]["counters"][counter] for server in world.lab.servers)


@covering(OFFLOAD, fallback=["auto", "dsr-ipip"], topology=["bridge", "routed"], offload=[True, False])
def test_everybody_is_served(standing, topology, offload, fallback):
    """A prepared and an unprepared client, whole transfers both ways, wherever the servers are."""
    world = standing(topology, servers=2, offload=offload, dsr=True)
    world.serve("--fallback", fallback)
    before = agents(world, "dsr_decapsulated")
    tunnelled = topology == "routed" or fallback == "dsr-ipip"
    for family in (4, 6):
        seen = world.echo(VIP[family], "3000000")
        assert seen["intact"]
        assert seen["accepted_on"] == seen["peer"] == VIP[family]
    total = status(world.lab)["total"]
    assert total["fallback_no_offer"] == 2
    through = forwarded(world) if tunnelled else 0
    assert bool(total["encapsulated"]) == tunnelled
    assert not [name for name, n in total.items() if n and (name.startswith("drop") or name == "too_big")], total
    assert agents(world, "dsr_decapsulated") - before == through
    agent = world.client()
    for family in (4, 6):
        seen = world.echo(VIP[family])
        assert seen["intact"]
        assert seen["accepted_on"] != VIP[family]
    agent.terminate()
    assert agent.wait() == 0
    assert status(world.lab)["total"]["redirected"] == 2


@pytest.mark.parametrize("family", [4, 6])
def test_from_one_family_to_the_other(standing, family):
    world = standing("routed", dsr=True)
    world.client()
    server = world.lab.servers[0]
    vip = f"tcp://{VIP4}:80" if family == 4 else f"tcp://[{VIP6}]:80"
    world.serve("--fallback", "dsr-ipip", what=[f"{vip}={server.ip6 if family == 4 else server.ip4}"])
    seen = world.echo(VIP[family], "3000000")
    assert seen["intact"]
    assert seen["accepted_on"] == VIP[family]
    total = status(world.lab)["total"]
    assert total["fallback_no_cr_backend"] == 1  # it offered, but cannot be redirected into another family
    assert total["too_big"] == 0


@pytest.mark.long
def test_the_tunnels_packets(standing):
    """On the wire: the client's segments leave room for the outer header, because the SYN-ACK said so."""
    world = standing("routed", offload=False, dsr=True)
    world.serve("--ack-bypass", "off")  # what the XDP program sends, the other end merges (GRO) before it is captured
    clamped = agents(world, "dsr_clamped")
    capture = world.folder / "lb.pcap"
    with world.lab.middle.capture(capture, "ip or ip6", "lb"):
        for family in (4, 6):
            assert world.echo(VIP[family], "300000")["intact"]
    outer = [p for p in rdpcap(str(capture)) if p.src == world.lab.lb.mac() and (p.haslayer(IP, 0) or IPv6 in p)]
    tunnels = [p for p in outer if p[1].haslayer(IP) or p[1].haslayer(IPv6)]
    tunnels = [p for p in tunnels if (p[1].proto if IP in p and p[1].version == 4 else p[1].nh) in (4, 41)]
    assert len(tunnels) == forwarded(world)
    for packet in tunnels:
        assert packet[1].src in (world.lab.lb.ip4, world.lab.lb.ip6)
        assert packet[1].dst in (world.lab.servers[0].ip4, world.lab.servers[0].ip6)
        assert packet.wirelen <= 1514
    assert max(p.wirelen for p in tunnels) > 1400
    assert agents(world, "dsr_clamped") - clamped == 2


@pytest.mark.parametrize("family", [4, 6])
def test_path_mtu_discovery_through_the_tunnel(make_world, family):
    """The way to the backend is narrower than its agent knows: the client is told, and sends smaller packets."""
    world = make_world("routed", offload=False)
    world.servers(dsr=True)
    via, net = ("10.2.0.254", "10.3.0.0/24") if family == 4 else ("fd00:2::fe", "fd00:3::/64")
    world.lab.lb.ip(f"route add {net} via {via} mtu 1400")
    world.serve()
    assert world.echo(VIP[family], "300000")["intact"]
    total = status(world.lab)["total"]
    assert total["too_big"] >= 1
    assert forwarded(world) > 200
    route = "route" if family == 4 else "-6 route"
    known = world.lab.client.run("sh", "-c", f"ip {route} get {VIP[family]}").stdout
    assert f"mtu {1400 - (20 if family == 4 else 40)}" in known


@pytest.mark.parametrize(("family", "outer", "bypass"), [(4, 4, "on"), (6, 6, "on"), (4, 6, "off"), (6, 4, "off")])
def test_a_router_in_the_tunnels_way_says_its_mtu(make_world, family, outer, bypass):
    """The ICMP error is about the load balancer's own packet; the client is told, and so it is of the daemon after."""
    world = make_world("routed", offload=False)
    world.servers(dsr=True)
    lab, server = world.lab, world.lab.servers[0]
    backend, bits = (server.ip4, 32) if outer == 4 else (server.ip6, 128)
    lab.middle.ip(f"route add {backend}/{bits} dev br0 mtu lock 1400")
    vip = f"tcp://{VIP4}:80" if family == 4 else f"tcp://[{VIP6}]:80"
    how = ("--fallback", "dsr-ipip", "--ack-bypass", bypass)
    serving = world.serve(*how, what=[f"{vip}={backend}"])
    assert status(lab)["total"]["too_big"] == 0
    assert world.echo(VIP[family], "300000")["intact"]
    assert status(lab)["total"]["too_big"] >= 1
    assert forwarded(world) > 200
    told = f"mtu {1400 - (20 if outer == 4 else 40)}"
    known = lab.client.run("ip", "route", "get", VIP[family]).stdout
    assert told in known
    lab.client.run("ip", f"-{family}", "route", "flush", "cache")
    serving.terminate()
    assert serving.wait() == 0
    world.serve(*how, what=[f"{vip}={backend}"])
    counted = ("nstat", "-asz", "IpFragFails", "Ip6FragFails")
    before = lab.middle.run(*counted).stdout
    assert world.echo(VIP[family], "300000")["intact"]
    assert lab.middle.run(*counted).stdout == before


@pytest.mark.long
@pytest.mark.parametrize("way", ["link-local", "global"])
def test_ipv4_behind_an_ipv6_gateway(make_world, way):
    """As with "BGP unnumbered" (RFC 8950)."""
    world = make_world("routed", servers=2, offload=False)
    world.servers(dsr=True)
    lab = world.lab
    gateway = "fd00:2::fe"
    if way == "link-local":
        shown = lab.middle.run("ip", "-6", "addr", "show", "dev", "lb", "scope", "link").stdout
        gateway = re.findall(r"fe80::[0-9a-f:]+", shown)[0]
    lab.lb.ip("route del default", f"route add 10.3.0.0/24 via inet6 {gateway} dev eth0")
    world.serve(what=[f"tcp://{VIP4}:80={lab.servers[0].ip4},{lab.servers[1].ip4}"])
    assert world.echo(VIP4, "3000000")["intact"]
    assert status(lab)["xdp"]["flow"] > 1000
    world.client()
    assert world.echo(VIP4)["accepted_on"] in [server.ip4 for server in lab.servers]
    assert status(lab)["total"]["redirected"] == 1


@pytest.mark.long
@covering(bypass=["on", "off"], family=[4, 6])
def test_path_mtu_discovery_towards_the_client(make_world, family, bypass):
    """The ICMP error about the server's packet goes to the VIP, so to the load balancer: it finds the server."""
    world = make_world("routed", servers=3, offload=False)
    world.servers(dsr=True)
    world.lab.middle.ip(f"route add {world.lab.client.ip4}/32 dev client mtu lock 1300")
    world.lab.middle.ip(f"route add {world.lab.client.ip6}/128 dev client mtu lock 1300")
    world.serve("--ack-bypass", bypass)
    seen = world.echo(VIP[family], "300000")
    assert seen["intact"]
    server = world.lab.node(seen["server"])
    route = "route" if family == 4 else "-6 route"
    known = server.run("sh", "-c", f"ip {route} get {world.lab.client.ip4 if family == 4 else world.lab.client.ip6}")
    assert "mtu 1300" in known.stdout
    now = status(world.lab)
    if bypass == "off":
        assert now["total"]["fallback_icmp"] == now["xdp"]["icmp"] >= 1


@pytest.mark.long
def test_dsr_l2_does_not_pass_a_gateway(standing):
    world = standing("routed", dsr=True)
    world.serve("--fallback", "dsr-l2")
    done = world.lab.client.run("curl", "-s", "--connect-timeout", "1", f"http://{VIP4}/", check=False)
    assert done.returncode == 28
    assert status(world.lab)["total"]["drop_no_path"] >= 1
    world.client()
    assert world.echo(VIP4)["intact"]  # redirected clients need no path of that kind


def test_the_agent_leaves_nothing(make_lab):
    lab = make_lab("routed")
    server = lab.servers[0]
    server.ip(f"addr del {VIP4}/32 dev lo")  # the other VIP was there before, and stays
    shown = (
        "ip -4 addr; ip -6 addr; ip -o link | grep -o xdp; tc qdisc; sysctl -a 2>/dev/null | grep -E 'arp_(ign|ann)'"
    )
    before = server.run("sh", "-c", shown).stdout
    install = crablb("agent", "server", "--vip", f"tcp://{VIP4}:80", "--vip", f"tcp://[{VIP6}]:80", "--dsr", "--detach")
    server.run(*install)
    assert "xdp" in server.run("ip", "link", "show", "eth0").stdout
    assert str(VIP4) in server.run("ip", "addr", "show", "lo").stdout
    assert set(agent_status(server, 1)["server"]["counters"]) >= {"dsr_decapsulated", "dsr_clamped"}
    server.run(*install)  # over itself
    assert "removed" in server.run(*crablb("agent", "remove", "server")).stdout
    assert server.run("sh", "-c", shown).stdout == before


def test_the_agent_beside_another_xdp_program(make_lab, other_xdp_program):
    lab = make_lab("routed")
    server = lab.servers[0]
    server.ip(f"link set eth0 xdp obj {other_xdp_program} sec xdp")
    done = server.run(*crablb("agent", "server", "--vip", f"tcp://{VIP4}:80", "--dsr"), check=False)
    assert done.returncode == 2
    assert "interface eth0 has an XDP program already" in done.stderr
    assert agent_status(server) == {}
    wrong = server.run(*crablb("agent", "server", "--vip", f"tcp://{VIP4}:80", "--interface", "eth0"), check=False)
    assert (wrong.returncode, "of use with --dsr only" in wrong.stderr) == (2, True)


def test_what_each_kind_of_client_costs(make_world):
    """A redirected connection: one packet.  One by the fallback: everything that the client sends."""
    world = make_world("bridge")
    world.servers(dsr=True)
    world.serve()

    def seen() -> int:
        found = status(world.lab)
        return found["total"]["received"] + found["xdp"]["flow"]  # by the workers, and by the XDP program alone

    assert world.echo(VIP4, "100000")["intact"]
    plain = seen()
    assert plain > 5
    world.client()
    assert world.echo(VIP4, "100000")["intact"]
    assert seen() == plain + 1


def test_a_tunnel_too_narrow_for_ipv6_is_named(make_world):
    world = make_world("routed")
    world.lab.lb.ip("route add fd00:3::/64 via fd00:2::fe mtu 1300")
    world.serve()
    log = (world.folder / "serve.log").read_text()
    assert "its tunnel carries 1260 bytes" in log
    assert "IPv6 needs 1280" in log
    assert status(world.lab)["daemon"]["narrow_tunnels"] >= 1


# ---- the XDP program alone ----


@covering(mode=["native", "generic", "native-offload"], topology=["routed", "bridge"])
def test_known_flows_do_not_enter_user_space(standing, topology, mode):
    mode, _, offload = mode.partition("-")
    world = standing(topology, offload=bool(offload), dsr=True)
    world.serve("--ack-bypass", "on", "--xdp-mode", mode)
    for family in (4, 6):
        assert world.echo(VIP[family], "3000000")["intact"]
    now = status(world.lab)
    assert now["xdp"]["flow"] > 2000
    # Each connection: the SYN, and the packets on their way until its flow is known.
    assert now["total"]["learned"] >= 2
    assert now["total"]["received"] < 100
    assert sum(s["packets"] for s in now["services"].values()) == now["xdp"]["flow"]
    assert all(s["packets"] > 1000 and s["bytes"] > 3000000 for s in now["services"].values())
    assert now["flows"] == 2  # both have said FIN, and will be forgotten


@covering(OFFLOAD, topology=["bridge", "routed"], offload=[True, False], mode=["native", "generic"])
def test_established_flows_go_on_without_a_daemon(make_world, topology, offload, mode):
    world = make_world(topology, servers=3, offload=offload)
    world.servers(dsr=True)
    first = world.serve("--ack-bypass", "on", "--xdp-mode", mode)
    held = world.python(world.lab.client, "hold_many", VIP[4], "80", "20", ready=True)
    assert exchange(held, "one") == "20"  # the handshake's ACK, or this, makes the flow known
    first.kill()
    first.wait()
    assert exchange(held, "two") == "20"
    world.serve("--ack-bypass", "on", "--xdp-mode", mode)
    assert "took over fallback flows" in (world.folder / "serve.log").read_text()
    assert exchange(held, "three") == "20"


class Reloaded:
    """A load balancer with a configuration file that changes."""

    def __init__(self, world: World, bypass: str) -> None:
        self.world, self.bypass = world, bypass
        self.path = world.folder / "lb.toml"
        self.reloads = 0

    def write(self, backends: list[str], **more: str) -> None:
        settings = "".join(f'{k} = "{v}"\n' for k, v in more.items())
        self.path.write_text(
            f'interface = "eth0"\nack_bypass = "{self.bypass}"\n[[service]]\naddress = "tcp://{VIP4}:80"\n{settings}'
            f"backends = [{', '.join(backends)}]\n"
        )

    def start(self) -> None:
        self.child = self.world.serve(config=self.path)

    def reload(self, word: str = '"reloaded"') -> None:
        before = self.log().count(word)
        self.child.send_signal(1)
        until(lambda: self.log().count(word) > before)

    def log(self) -> str:
        return (self.world.folder / "serve.log").read_text()


ALL = ['"10.0.0.11"', '"10.0.0.12"', '"10.0.0.13"']


def named(address: str, **more: object) -> str:
    pairs = [f'{k} = "{v}"' if isinstance(v, str) else f"{k} = {v}" for k, v in {"address": address, **more}.items()]
    return "{" + ", ".join(pairs) + "}"


@pytest.mark.parametrize("bypass", ["on", "off"])
def test_no_change_breaks_a_connection(make_world, bypass):
    """200 connections by the fallback live through every change of the backends, and every restart."""
    world = make_world(servers=4, offload=False)
    world.servers(dsr=True)
    lb = Reloaded(world, bypass)
    lb.write(ALL)
    lb.start()
    held = world.python(world.lab.client, "hold_many", VIP[4], "80", "200", ready=True)
    assert exchange(held, "start") == "200"
    assert (status(world.lab)["flows"] == 200) == (bypass == "on")

    changes = {
        "add": [*ALL, '"10.0.0.14"'],
        "re-weight": ['"10.0.0.11*5"', *ALL[1:], '"10.0.0.14"'],
        "drain": [named("10.0.0.11", state="drain"), *ALL[1:]],
        "remove": ALL[1:],
        "remove another": ALL[2:],
        "all back": ALL,
    }
    for change, backends in changes.items():
        lb.write(backends)
        lb.reload()
        assert exchange(held, change) == "200", change
        if change == "remove another":
            assert {seen["server"] for seen in world.echoes(VIP4, 5)} == {"server3"}
    # A bad configuration changes nothing.
    lb.path.write_text("interface = 3")
    lb.reload('"not reloaded"')
    assert exchange(held, "bad") == "200"
    lb.write(ALL)
    for number in (15, 9):
        lb.child.send_signal(number)
        lb.child.wait()
        lb.start()
        assert exchange(held, f"restart after {number}") == "200"


def server_of(world: World, port: int) -> str:
    """The server that takes a connection from this port of the client's, which ends it by a RST."""
    with inside(world.lab.client.netns), socket.socket() as conn:
        conn.settimeout(60)
        conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        conn.bind(("", port))
        conn.connect((VIP[4], 80))
        return conn.makefile().readline().split()[0]


@pytest.mark.long
@pytest.mark.parametrize("bypass", ["on", "off"])
def test_a_port_used_again_is_a_new_connection(make_world, bypass):
    """It does not follow the one before to a backend that takes none."""
    world = make_world(servers=3, offload=False)
    world.servers(dsr=True)
    lb = Reloaded(world, bypass)
    lb.write(ALL[:2])
    lb.start()
    ports = range(30001, 30013)
    assert {server_of(world, port) for port in ports} == {"server1", "server2"}
    lb.write([named("10.0.0.11", state="drain"), ALL[1]])
    lb.reload()
    assert {server_of(world, port) for port in ports} == {"server2"}
    lb.write(ALL[2:])
    lb.reload()
    assert {server_of(world, port) for port in ports} == {"server3"}


@pytest.mark.parametrize("bypass", ["on", "off"])
def test_forged_packets_move_no_connection(make_world, bypass):
    """From somebody who knows the four-tuple, while new connections go elsewhere."""
    world = make_world(servers=3, offload=False)
    world.servers(dsr=True)
    lb = Reloaded(world, bypass)
    lb.write(ALL[:2])
    lb.start()
    forged = {40001: "", 40002: "S", 40003: "RS", 40004: "RRS", 40005: "FFS", 40006: "SF", 40007: "SSSR"}
    held = {port: world.python(world.lab.client, "hold", VIP[4], "80", str(port), ready=True) for port in forged}
    for child in held.values():
        assert exchange(child, "one") == "one"
    lb.write(ALL[2:])
    lb.reload()
    with inside(world.lab.client.netns), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as wire:
        wire.bind(("eth0", 0))
        for port, flags in forged.items():
            for flag in flags:
                tcp = TCP(sport=port, dport=80, flags={"F": "FA"}.get(flag, flag), seq=0x11111111)
                wire.send(bytes(Ether(dst=world.lab.lb.mac()) / IP(src="10.0.0.1", dst=VIP[4]) / tcp))
    for port, child in held.items():
        for text in ("two", "three"):
            assert exchange(child, text) == text, forged[port]


@pytest.mark.long
def test_a_flow_taken_over_outlives_its_backends_place(make_world):
    """Killed, and started again with other backends: the flows that are there stay where they are."""
    world = make_world(servers=3, offload=False)
    world.servers(dsr=True)
    lb = Reloaded(world, "on")
    lb.write(ALL)
    lb.start()
    held = world.python(world.lab.client, "hold_many", VIP[4], "80", "60", ready=True)
    assert exchange(held, "one") == "60"
    lb.child.kill()
    lb.child.wait()
    lb.write(ALL[2:])
    lb.start()
    assert exchange(held, "two") == "60"
    assert status(world.lab)["flows"] == 60


@pytest.mark.long
def test_flows_that_cannot_be_taken_over(standing):
    """A daemon that died before it had pinned its flows does not keep the next one from starting."""
    world = standing(offload=False, dsr=True)
    child = world.serve("--ack-bypass", "on")
    child.kill()
    child.wait()
    (world.lab.lb.pins / "lb-eth0" / "flows").unlink()
    world.serve("--ack-bypass", "on")
    assert world.echo(VIP4)["intact"]


@pytest.mark.long
@covering(bypass=["on", "off"], on_dead=["reassign", "reset"])
def test_a_dead_backend(make_world, on_dead, bypass):
    """The connections that it had end, by another backend's RST or by ours; those of the others go on."""
    world = make_world(servers=3, offload=False)
    world.servers(dsr=True)
    lb = Reloaded(world, bypass)
    lb.write(ALL, on_dead=on_dead)
    lb.start()
    held = world.python(world.lab.client, "hold_many", VIP[4], "80", "60", ready=True)
    assert exchange(held, "one") == "60"
    own = int(world.lab.servers[0].run("sh", "-c", "ss -Htn state established '( sport = :80 )' | wc -l").stdout)
    assert 0 < own < 60
    world.lab.servers[0].end()
    lb.write([named("10.0.0.11", state="dead"), *ALL[1:]], on_dead=on_dead)
    lb.reload()
    assert exchange(held, "two") == str(60 - own)
    total = status(world.lab)["total"]
    assert bool(total["reset"]) == (on_dead == "reset")
    assert bool(total["reassigned"]) == (on_dead == "reassign")
    assert {seen["server"] for seen in world.echoes(VIP4, 10)} == {"server2", "server3"}


def test_a_reset_that_we_send_is_right(make_world):
    """The client's kernel believes it at once: its sequence number and checksum fit."""
    world = make_world(servers=1, offload=False)
    world.servers(dsr=True)
    lb = Reloaded(world, "off")
    lb.write(ALL[:1], on_dead="reset")
    lb.start()
    held = world.python(world.lab.client, "hold", VIP[4], "80", ready=True)
    lb.write([named("10.0.0.11", state="dead")], on_dead="reset")
    lb.reload()
    held.stdin.write("hello\n")
    held.stdin.flush()
    assert held.wait() == 1
    assert "ConnectionResetError" in held.stderr.read()


@pytest.mark.long
def test_flows_move_to_another_load_balancer_and_back(make_world):
    """Two load balancers of one configuration behind an ECMP router, whose routes change in the middle of transfers."""
    world = make_world("routed", servers=3, offload=False)
    lab = world.lab
    world.servers(dsr=True)
    backends = ",".join(s.ip4 for s in lab.servers[:2])
    what = [f"tcp://{VIP4}:80={backends}"]
    world.serve("--ack-bypass", "on", what=what)
    # The third server's machine is the other load balancer; it has the VIP no more.
    second = lab.servers[2]
    second.end()
    second.cgroup.mkdir()
    second.run(*crablb("agent", "remove"))
    lab.middle.run("ethtool", "-K", second.name, "gro", "on")
    world.serve("--ack-bypass", "on", what=what, node=second)
    lab.middle.set({"net.ipv4.fib_multipath_hash_policy": 1})  # by the four-tuple
    one, two = f"via {lab.lb.ip4}", f"via {second.ip4}"

    def route(to: str) -> None:
        lab.middle.ip(f"route replace {VIP4}/32 {to}")

    route(f"nexthop {one} nexthop {two}")
    held = world.python(lab.client, "hold_many", VIP[4], "80", "100", ready=True)
    assert exchange(held, "start") == "100"
    shares = [status(lab, node)["flows"] for node in (lab.lb, second)]
    assert sum(shares) == 100
    assert all(share > 10 for share in shares)
    for to in (two, f"nexthop {one} weight 3 nexthop {two}", one, f"nexthop {two} nexthop {one}", two):
        route(to)
        assert exchange(held, to) == "100"
    for node in (lab.lb, second):
        now = status(lab, node)
        assert now["flows"] == 100
        assert now["total"]["learned"] >= 100


# ---- several interfaces ----


@pytest.mark.long
@covering(bypass=["auto", "off"], fallback=["dsr-l2", "dsr-ipip"])
def test_backends_behind_another_interface(make_world, fallback, bypass):
    world = make_world(offload=False)
    lab, server = world.lab, world.lab.servers[0]
    cable(lab.lb, server, 11)
    lab.client.ip(f"route add 10.9.0.0/24 via {server.ip4}", f"route add fd00:9::/64 via {server.ip6}")
    server.set({"net.ipv4.ip_forward": 1, "net.ipv6.conf.all.forwarding": 1})
    world.servers(dsr=True)
    what = [f"tcp://{VIP4}:80=10.9.0.11", f"tcp://[{VIP6}]:80=fd00:9::11"]
    world.serve("--fallback", fallback, "--ack-bypass", bypass, what=what)
    before = lab.lb.counters("eth1")["tx_packets"]
    for family in (4, 6):
        seen = world.echo(VIP[family], "3000000")
        assert (seen["intact"], seen["accepted_on"]) == (True, VIP[family])
    assert lab.lb.counters("eth1")["tx_packets"] - before >= forwarded(world) > 2000
    now = status(lab)
    assert (now["xdp"]["flow"] > 2000) == (bypass == "auto")
    assert bool(now["total"]["encapsulated"]) == (fallback == "dsr-ipip")
    assert [n for n, v in now["total"].items() if v and n.startswith("drop")] == []
    start_agent(lab.client, "client", "--backends", "10.9.0.0/24", "--backends", "fd00:9::/64")
    for family in (4, 6):
        seen = world.echo(VIP[family])
        assert (seen["intact"], seen["accepted_on"]) == (True, "10.9.0.11" if family == 4 else "fd00:9::11")
    assert status(lab)["total"]["redirected"] == 2


@pytest.mark.long
def test_clients_of_several_interfaces(make_world):
    """Two networks of clients, one load balancer; it is killed, taken over, and leaves nothing at its end."""
    world = make_world(servers=2, offload=False)
    lab = world.lab
    server, other = two_networks(world)
    what = [f"tcp://{VIP4}:80={server.ip4}", f"tcp://[{VIP6}]:80={server.ip6}"]
    first = world.serve("--iface", "eth1", what=what)
    held = [world.python(node, "hold_many", VIP[4], "80", "20", ready=True) for node in (lab.client, other)]
    for child in held:
        assert exchange(child, "one") == "20"
    assert status(lab)["queues"] == ["eth0/0", "eth1/0"]
    assert status(lab)["flows"] == 40
    first.kill()
    first.wait()
    for child in held:
        assert exchange(child, "two") == "20"
    second = world.serve("--iface", "eth1", what=what)
    for child in held:
        assert exchange(child, "three") == "20"
    for node in (lab.client, other):
        for family in (4, 6):
            assert world.echo(VIP[family], "300000", node=node)["intact"]
    assert all(worker["sent"] for worker in status(lab)["workers"])

    def same() -> bool:  # when nothing comes between the two, not even the kernel's own
        other = lab.lb.run(*crablb("status", "--iface", "eth1", "--json")).stdout
        return bool(json.loads(other) == status(lab) | {"interface": "eth1"})

    until(same)
    busy = lab.lb.run(*crablb("serve", "--iface", "eth1", "--service", what[0]), check=False)
    assert (busy.returncode, "the load balancer of eth1 is run already" in busy.stderr) == (2, True)
    second.terminate()
    assert second.wait() == 0
    assert "xdp" not in lab.lb.run("ip", "link").stdout
    assert "managed" not in lab.lb.run("ip", "neigh").stdout
    assert not lab.lb.pins.exists()


@pytest.mark.parametrize("bypass", ["on", "off"])
def test_a_flood_of_syns_disturbs_nobody(make_world, bypass):
    """From random sources, more than there is room for: bounded memory, and established flows stay."""
    world = make_world("bridge", servers=2, offload=False)
    world.servers(dsr=True)
    lb = Reloaded(world, bypass)
    lb.write(ALL[:2])
    lb.path.write_text("flows = 1024\n" + lb.path.read_text())
    lb.start()
    held = world.python(world.lab.client, "hold_many", VIP[4], "80", "50", ready=True)
    assert exchange(held, "before") == "50"
    resident = memory(lb.child.pid)
    flood = world.python(world.lab.client, "flood", VIP[4], world.lab.lb.mac(), "100000")
    out, err = flood.communicate(timeout=300)
    assert flood.returncode == 0, err
    assert int(out) >= 90000
    # Other backends now: only what is remembered tells where the old connections go.
    lb.write(ALL[:1])
    lb.path.write_text("flows = 1024\n" + lb.path.read_text())
    lb.reload()
    assert exchange(held, "after") == "50"
    now = status(world.lab)
    assert now["xdp"]["syn"] > 10000
    assert now["flows"] == (50 if bypass == "on" else 0)
    assert memory(lb.child.pid) < resident + (4 << 20)
    assert world.echo(VIP4, "10")["intact"]


def memory(pid: int) -> int:
    """Resident bytes."""
    with open(f"/proc/{pid}/statm") as file:
        return int(file.read().split()[1]) * 4096


@pytest.fixture
def listening(make_world):
    """``listening(family, prepare)``: a load balancer that always redirects, the client's socket and two servers',
    where what arrives waits."""
    opened = []

    def make(family, prepare=lambda listener, client: None):
        world = make_world(servers=2)
        world.serve(
            "--mode", "always", what=[f"{url(family)}={','.join(address(s, family) for s in world.lab.servers)}"]
        )
        kind = socket.AF_INET if family == 4 else socket.AF_INET6
        for server in world.lab.servers:
            server.set({"net.ipv4.tcp_fastopen": 0x603})  # for any listener, without a cookie
            with inside(server.netns):
                opened.append(socket.create_server(("", PORT), family=kind))
            prepare(opened[-1], world.lab.client)
            opened[-1].setblocking(False)
        world.lab.client.set({"net.ipv4.tcp_fastopen": 5})
        with inside(world.lab.client.netns):
            opened.append(socket.socket(kind))
        opened[-1].settimeout(60)
        return world, opened[-1], opened[:-1]

    yield make
    for one in opened:
        one.close()


def address(node: Node, family: int) -> str:
    return node.ip4 if family == 4 else f"[{node.ip6}]"


def url(family: int) -> str:
    return f"tcp://{VIP4}:{PORT}" if family == 4 else f"tcp://[{VIP6}]:{PORT}"


def accepted(listeners: list[socket.socket]) -> list[socket.socket]:
    """What has arrived at any of them."""
    ready, _, _ = select.select(listeners, [], [], 10)
    connections = []
    for listener in ready:
        with contextlib.suppress(BlockingIOError):
            while True:
                connections.append(listener.accept()[0])
    return connections


@pytest.mark.parametrize("family", [4, 6])
def test_fast_open_is_not_redirected(listening, family):
    """The server has the request before it is connected: it must be the one that the client goes on with."""
    world, client, servers = listening(family)
    client.sendto(b"request", socket.MSG_FASTOPEN, (VIP[family], PORT))
    (connection,) = accepted(servers)
    with connection:
        connection.settimeout(60)
        assert connection.getsockname()[0] == VIP[family]
        assert connection.recv(100) == b"request"
        connection.sendall(b"answer")
        assert client.recv(100) == b"answer"
        client.close()
        assert connection.recv(100) == b""
    total = status(world.lab)["total"]
    assert (total["fallback_unsafe"], total["redirected"]) == (1, 0)


@pytest.mark.parametrize("family", [4, 6])
def test_a_signed_connection_is_not_redirected(listening, family):
    """TCP-MD5 signs the addresses, and how long the options are: the servers' kernel drops what has another."""

    def sign(one: socket.socket, peer: str) -> None:
        packed = ipaddress.ip_address(peer).packed
        name = (
            struct.pack("=HH4s", socket.AF_INET, 0, packed)
            if family == 4
            else struct.pack("=HHI16s", socket.AF_INET6, 0, 0, packed)
        )
        one.setsockopt(socket.IPPROTO_TCP, TCP_MD5SIG, struct.pack("=128sBBHi80s", name, 0, 0, 6, 0, b"secret"))

    world, client, servers = listening(family, lambda one, node: sign(one, node.ip4 if family == 4 else node.ip6))
    sign(client, VIP[family])
    client.connect((VIP[family], PORT))
    (connection,) = accepted(servers)
    with connection:
        connection.settimeout(60)
        assert connection.getsockname()[0] == VIP[family]
        client.sendall(b"request")
        assert connection.recv(100) == b"request"
    total = status(world.lab)["total"]
    assert (total["fallback_unsafe"], total["redirected"]) == (1, 0)
