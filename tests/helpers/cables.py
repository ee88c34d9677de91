"""Second cables in a lab."""

from __future__ import annotations

from crablb.lab import VIP4, VIP6, Node
from crablb.lab.demo import crablb
from tests.helpers.world import World


def cable(one: Node, other: Node, number: int) -> None:
    """Interfaces eth1 of two nodes, joined; 10.9.0.0/24 and fd00:9::/64 are there."""
    one.ip(f"link add eth1 type veth peer name eth1 netns {other.netns}")
    for node, host in ((one, 2), (other, number)):
        node.run("ethtool", "-K", "eth1", "tx", "off", "tso", "off", "gso", "off", "gro", "on")
        node.ip("link set eth1 up", f"addr add 10.9.0.{host}/24 dev eth1", f"addr add fd00:9::{host}/64 dev eth1 nodad")


def two_networks(world: World) -> tuple[Node, Node]:
    """A lab's two servers, the second of which becomes a client, in a network behind eth1 of the load balancer."""
    server, other = world.lab.servers
    world.servers(dsr=True)
    other.end()
    other.cgroup.mkdir()
    other.run(*crablb("agent", "remove"))
    cable(world.lab.lb, other, 12)
    other.ip(f"route add {VIP4} via 10.9.0.2 dev eth1", f"route add {VIP6} via fd00:9::2 dev eth1")
    other.set({"net.ipv4.ip_forward": 1, "net.ipv6.conf.all.forwarding": 1})
    server.ip(f"route add 10.9.0.0/24 via {other.ip4}", f"route add fd00:9::/64 via {other.ip6}")
    return server, other
