"""Bonds, VLANs and netem, which not every kernel has: run by kernels.py, in those that do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from crablb.lab import VIP4, VIP6, Lab, Node
from crablb.lab.demo import crablb
from tests.helpers.namespaces import unique
from tests.helpers.world import World, agent_status, status

VIP = {4: str(VIP4), 6: str(VIP6)}


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with Lab.create(unique(), "bridge", 1, offload=False) as lab:
        yield World(lab, tmp_path)


def bond(node: Node, name: str, *ports: str) -> None:
    """The node's address on a bond of these ports."""
    down = [line for port in ports for line in (f"addr flush dev {port}", f"link set {port} down")]
    joined = [f"link set {port} master {name}" for port in ports]
    node.ip(
        *down, f"link add {name} type bond mode active-backup miimon 100", *joined, f"link set {name} up",
        f"addr add {node.ip4}/24 dev {name}", f"addr add {node.ip6}/64 dev {name} nodad",
    )  # fmt: skip


def second_cable(lab: Lab) -> None:
    """From the load balancer to the switch: eth1."""
    lab.middle.ip(
        f"link add lb2 type veth peer name eth1 netns {lab.lb.netns}", "link set lb2 master br0", "link set lb2 up"
    )
    for node, port in ((lab.middle, "lb2"), (lab.lb, "eth1")):
        node.run("ethtool", "-K", port, "tx", "off", "tso", "off", "gso", "off", "gro", "on")


def everybody_is_served(world: World) -> None:
    for family in (4, 6):
        assert world.echo(VIP[family], "300000")["intact"]
    total = status(world.lab)["total"]
    assert total["fallback_no_offer"] == 2
    assert [name for name, n in total.items() if n and name.startswith("drop")] == []


def test_a_bond_is_served(world: World) -> None:
    """In generic mode, as its native program would run where there are no sockets."""
    lab = world.lab
    world.servers(dsr=True)
    lab.lb.ip("link set eth0 down", "link set eth0 name port0")
    bond(lab.lb, "eth0", "port0")
    refused = lab.lb.run(
        *crablb(
            "serve", "--iface", "eth0", "--xdp-mode", "native", "--service", f"tcp://{VIP4}:80={lab.servers[0].ip4}"
        ),
        check=False,
    )
    assert refused.returncode == 2
    assert "interface eth0 is a bond: AF_XDP sockets get its packets in generic mode alone" in refused.stderr
    assert "xdp" not in lab.lb.run("ip", "link").stdout
    world.serve()
    everybody_is_served(world)


def test_the_ports_of_a_bond_are_served(world: World) -> None:
    """What goes out leaves by the bond, also when the port in use is another."""
    lab = world.lab
    world.servers(dsr=True)
    second_cable(lab)
    bond(lab.lb, "bond0", "eth0", "eth1")
    world.serve("--iface", "eth1", "--fallback", "dsr-ipip")
    everybody_is_served(world)
    lab.lb.ip("link set bond0 type bond active_slave eth1")
    assert world.echo(VIP[4], "300000")["intact"]


def test_a_server_behind_a_bond(world: World) -> None:
    """Its ports have the program that decapsulates."""
    server = world.lab.servers[0]
    bond(server, "bond0", "eth0")
    world.servers(dsr=True)
    assert set(agent_status(server, None)["server"]["dsr"]["interfaces"]) == {"eth0"}
    world.serve("--fallback", "dsr-ipip")
    everybody_is_served(world)
    counters = agent_status(server, None)["server"]["counters"]
    assert counters["dsr_decapsulated"] > 200
    assert counters["dsr_clamped"] == 2


@pytest.mark.parametrize("fallback", ["dsr-l2", "dsr-ipip"])
def test_backends_in_a_vlan(world: World, fallback: str) -> None:
    """Clients come without a tag, backends are where the kernel's route leads: behind one."""
    lab, server = world.lab, world.lab.servers[0]
    for node, host in ((lab.lb, 2), (server, 11)):
        node.ip(
            "link add link eth0 name eth0.100 type vlan id 100", "link set eth0.100 up",
            f"addr add 10.9.0.{host}/24 dev eth0.100", f"addr add fd00:9::{host}/64 dev eth0.100 nodad",
        )  # fmt: skip
    world.servers(dsr=True)
    assert set(agent_status(server, None)["server"]["dsr"]["interfaces"]) == {"eth0", "eth0.100"}
    what = [f"tcp://{VIP4}:80=10.9.0.11", f"tcp://[{VIP6}]:80=fd00:9::11"]
    world.serve("--fallback", fallback, what=what)
    everybody_is_served(world)
    link = json.loads(lab.lb.run("ip", "-j", "-s", "link", "show", "dev", "eth0.100").stdout)[0]
    assert link["stats64"]["tx"]["packets"] > 200


def test_what_a_bad_link_does(world: World) -> None:
    """It delays, loses, doubles and disorders, in front of the load balancer and of the client."""
    lab = world.lab
    world.servers(dsr=True)
    agent = world.client()
    world.serve()
    for port in ("lb", "client"):
        lab.middle.run(
            *f"tc qdisc add dev {port} root netem delay 10ms 5ms loss 3% duplicate 3% reorder 25%".split()
        )  # fmt: skip
    for _ in range(4):
        for family in (4, 6):
            assert world.echo(VIP[family], "300000")["intact"]
    assert status(lab)["total"]["redirected"] >= 8
    agent.terminate()
    agent.wait()
    for _ in range(4):
        for family in (4, 6):
            assert world.echo(VIP[family], "300000")["intact"]
    total = status(lab)["total"]
    assert total["fallback_no_offer"] >= 8
    assert [name for name, n in total.items() if n and name.startswith("drop")] == []
