"""How a client in a routed lab is connected to the router: each function changes that, before the client's agent is
installed."""

from __future__ import annotations

import subprocess

from crablb.lab import Lab, Node
from crablb.lab.lab import FORWARDING, SYSCTLS

GATEWAY = {4: "10.1.0.254", 6: "fd00:1::fe"}


def moved(lab: Lab, device: str, *made: str) -> None:
    """The client's addresses and routes are another interface's."""
    lab.client.ip(
        *made,
        "addr flush dev eth0",
        "link set eth0 up",
        f"link set {device} up",
        f"addr add {lab.client.ip4}/24 dev {device}",
        f"addr add {lab.client.ip6}/64 dev {device} nodad",
        f"route replace default via {GATEWAY[4]}",
        f"route replace default via {GATEWAY[6]}",
    )


def bridge(lab: Lab) -> None:
    moved(lab, "br0", "link add br0 type bridge", "link set eth0 master br0")


def macvlan(lab: Lab) -> None:
    moved(lab, "over", "link add link eth0 name over type macvlan mode bridge")


def host(lab: Lab) -> Node:
    """The client is a container: it gets to the router through its host, whose interface to it is ``pod0``."""
    node = lab.nodes["host"] = Node(lab.name, "host")
    node.cgroup.mkdir()
    subprocess.run(["ip", "netns", "add", node.netns], check=True)
    node.set(SYSCTLS | FORWARDING)
    lab.client.ip(f"link set eth0 netns {node.netns}", f"link add eth0 type veth peer name pod0 netns {node.netns}")
    node.ip("link set eth0 up", "link set pod0 up")
    return node


def bridged_container(lab: Lab) -> None:
    host(lab).ip("link add br0 type bridge", "link set br0 up", "link set eth0 master br0", "link set pod0 master br0")
    moved(lab, "eth0")


def routed_container(lab: Lab) -> None:
    """The host has the address that the client had."""
    host(lab).ip(
        f"addr add {lab.client.ip4}/24 dev eth0",
        f"addr add {lab.client.ip6}/64 dev eth0 nodad",
        f"route add default via {GATEWAY[4]}",
        f"route add default via {GATEWAY[6]}",
        "addr add 10.4.0.254/24 dev pod0",
        "addr add fd00:4::fe/64 dev pod0 nodad",
    )
    lab.client.ip(
        "link set eth0 up",
        "addr add 10.4.0.1/24 dev eth0",
        "addr add fd00:4::1/64 dev eth0 nodad",
        "route add default via 10.4.0.254",
        "route add default via fd00:4::fe",
    )
    lab.middle.ip(f"route add 10.4.0.0/24 via {lab.client.ip4}", f"route add fd00:4::/64 via {lab.client.ip6}")


def second_link(lab: Lab) -> None:
    lab.client.ip(f"link add eth1 type veth peer name client2 netns {lab.middle.netns}")
    lab.middle.ip(
        "link set client2 up", "addr add 10.4.0.254/24 dev client2", "addr add fd00:4::fe/64 dev client2 nodad"
    )
    lab.client.ip("link set eth1 up", "addr add 10.4.0.1/24 dev eth1", "addr add fd00:4::1/64 dev eth1 nodad")


def answers_elsewhere(lab: Lab) -> None:
    """What is sent to the client's address comes by the link that it does not send by."""
    second_link(lab)
    lab.middle.ip(f"route add {lab.client.ip4}/32 via 10.4.0.1", f"route add {lab.client.ip6}/128 via fd00:4::1")


def backends_elsewhere(lab: Lab) -> None:
    """The way to the servers is another one than that to the VIPs; they answer as they are reached, the router too."""
    answers_elsewhere(lab)
    lab.client.ip("route add 10.3.0.0/24 via 10.4.0.254", "route add fd00:3::/64 via fd00:4::fe")


def rule_from(lab: Lab) -> None:
    """What has the client's address goes by the second link."""
    second_link(lab)
    rules(lab, "from", lab.client.ip4, lab.client.ip6)


def rule_mark(lab: Lab) -> None:
    """What is for port 80 is marked by the client's firewall, and goes by the second link."""
    second_link(lab)
    rules(lab, "fwmark", "1", "1")
    lab.client.run(
        "nft", "add table inet m; add chain inet m c { type route hook output priority mangle; };"
        " add rule inet m c tcp dport 80 meta mark set 1",
    )  # fmt: skip


def rules(lab: Lab, selector: str, four: str, six: str) -> None:
    for family, value, gateway in (("-4", four, "10.4.0.254"), ("-6", six, "fd00:4::fe")):
        lab.client.run("ip", family, "rule", "add", selector, value, "lookup", "100")
        lab.client.run("ip", family, "route", "add", "default", "via", gateway, "table", "100")
