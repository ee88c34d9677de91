"""Whose frames are taken: of those that a switch floods, none."""

from __future__ import annotations

import signal
import socket

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import Ether

from crablb.lab import VIP4, VIP6, Lab, Node
from crablb.lab.demo import start_agent
from tests.helpers.namespaces import inside
from tests.helpers.processes import exchange, until
from tests.helpers.world import World, agent_status, command, status

VIP = {4: str(VIP4), 6: str(VIP6)}
ROUTER = "00:00:5e:00:01:07"


def syn(mac: str, port: int) -> bytes:
    options = [("MSS", 1460), (42, b""), ("NOP", None), ("NOP", None)]
    tcp = TCP(sport=port, dport=80, flags="S", options=options)
    return bytes(Ether(src="02:00:00:00:11:11", dst=mac) / IP(src="10.0.0.1", dst=VIP[4]) / tcp)


def send(lab: Lab, frame: bytes) -> None:
    with inside(lab.client.netns), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
        sock.bind(("eth0", 0))
        sock.send(frame)


def taken(world: World) -> int:
    """SYNs; the client's kernel answers SYN-ACKs of which it knows nothing by RSTs."""
    return int(status(world.lab)["xdp"]["syn"])


def test_a_frame_for_another_machine_is_not_ours(make_world):
    """And a virtual router's is, if it was said; changed by a reload."""
    world = make_world(offload=False)
    world.servers(agents=False)
    config = world.folder / "lb.toml"
    text = 'interface = "eth0"\nmacs = {}\n[[service]]\naddress = "tcp://10.0.0.100:80"\nbackends = ["10.0.0.11"]\n'
    config.write_text(text.format("[]"))
    daemon = world.serve(config=config)
    world.lab.lb.ip("link set eth0 promisc on")
    for i, mac in enumerate(("02:00:00:00:99:99", ROUTER)):
        send(world.lab, syn(mac, 4000 + i))
        until(lambda i=i: status(world.lab)["xdp"]["pass_other_mac"] == i + 1)
    assert taken(world) == 0
    send(world.lab, syn(world.lab.lb.mac(), 4002))
    until(lambda: taken(world) == 1)
    config.write_text(text.format(f'["{ROUTER}"]'))
    daemon.send_signal(signal.SIGHUP)
    until(lambda: status(world.lab)["daemon"]["reloads"] == 1)
    send(world.lab, syn(ROUTER, 4003))
    until(lambda: taken(world) == 2)
    assert status(world.lab)["xdp"]["pass_other_mac"] == 2


@pytest.mark.parametrize("family", [4, 6])
def test_an_interface_gets_another_mac_address(make_world, family):
    """The load balancer's, which follows, and the server's, which is told of and mended."""
    world = make_world("routed", offload=False)
    world.servers(dsr=True)
    world.serve("--fallback", "dsr-ipip")
    assert world.echo(VIP[family])["intact"]

    def change(node: Node) -> None:
        node.ip(f"link set eth0 address 02:00:00:00:77:{ord(node.name[-1]):02x}")
        for other in world.lab.nodes.values():
            other.ip("neigh flush all")

    change(world.lab.lb)
    until(lambda: world.echo(VIP[family])["intact"])
    change(world.lab.servers[0])
    fault = "tunnelled packets to the MAC address that eth0 has now are let alone"
    assert agent_status(world.lab.servers[0], 1)["server"]["faults"] == [fault]
    assert command(world.lab.servers[0], "agent", "repair", "server") == f"mended; it was: {fault}\n"
    assert world.echo(VIP[family])["intact"]


def test_two_load_balancers_and_a_switch_that_floods(make_world):
    """A server that is gone: the switch floods what is for it, to both.  Neither sends it on again."""
    world = make_world("bridge", servers=2, offload=False)
    first, second = world.lab.servers
    world.python(first, "serve", "server1", "80", ready=True)
    backends = [f"tcp://{VIP4}:80={first.ip4}"]
    world.serve("--mode", "never", what=backends)
    world.serve("--mode", "never", what=backends, node=second)
    held = world.python(world.lab.client, "hold", VIP[4], "80", ready=True)
    exchange(held, "x")
    switch = world.lab.middle
    switch.ip("link set server1 down")

    def received() -> int:
        return second.counters()["rx_packets"]

    before = received()
    held.stdin.write("y\n")
    held.stdin.flush()
    until(lambda: status(world.lab, second)["xdp"]["pass_other_mac"] > 0)
    until(lambda: status(world.lab, second)["xdp"]["pass_other_mac"] > 2)  # the client's retransmissions
    assert received() - before < 200


def without_vips(world: World, server: Node) -> None:
    """The VIPs are no addresses of a server any more, but a route's, through the load balancer."""
    server.ip(f"addr del {VIP4}/32 dev lo", f"addr del {VIP6}/128 dev lo")
    server.ip(f"route add {VIP4}/32 via {world.lab.lb.ip4}", f"route add {VIP6}/128 via {world.lab.lb.ip6}")


@pytest.mark.parametrize("family", [4, 6])
def test_a_backend_that_sends_back(make_world, family):
    """It forwards, and has no VIP: its packets end at the load balancer."""
    world = make_world(offload=False)
    server = world.lab.servers[0]
    without_vips(world, server)
    server.set({"net.ipv4.ip_forward": 1, "net.ipv6.conf.all.forwarding": 1, "net.ipv4.conf.all.send_redirects": 0})
    world.serve("--mode", "never")
    client = world.python(world.lab.client, "echo", VIP[family], "80", "1")
    until(lambda: status(world.lab)["total"]["drop_sent_back"] > 1)  # the SYN, and once more
    client.kill()
    client.wait()
    total = status(world.lab)["total"]
    assert total["drop_sent_back"] <= total["fallback_mode"]
    assert total["received"] == total["drop_sent_back"] + total["fallback_mode"]


@pytest.mark.parametrize("family", [4, 6])
def test_a_backend_that_is_a_client_too(make_world, family):
    """By the fallback and by redirection."""
    world = make_world(servers=2, offload=False)
    world.servers()
    first, second = world.lab.servers
    without_vips(world, second)
    what = [f"tcp://{VIP4}:80={first.ip4},{second.ip4}*0", f"tcp://[{VIP6}]:80={first.ip6},{second.ip6}*0"]
    world.serve(what=what)
    seen = world.echo(VIP[family], node=second)
    assert (seen["intact"], seen["server"], seen["peer"]) == (True, "server1", VIP[family])
    prefixes = [part for prefix in world.lab.prefixes() for part in ("--backends", prefix)]
    agent = start_agent(second, "client", *prefixes, "--no-verify")
    seen = world.echo(VIP[family], node=second)
    assert seen["intact"]
    assert seen["accepted_on"] == (first.ip4 if family == 4 else first.ip6)
    total = status(world.lab)["total"]
    assert (total["redirected"], total["drop_sent_back"]) == (1, 0)
    agent.terminate()
    assert agent.wait() == 0
