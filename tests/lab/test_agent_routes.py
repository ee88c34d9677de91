"""The client agent's routes: the operator's way, with all that belongs to it, and nothing of his changed."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from crablb.lab import VIP4, VIP6, Lab, Node
from crablb.lab.demo import crablb, start_agent
from tests.helpers.processes import exchange, until
from tests.helpers.world import World, agent_status

PREFIXES = ["--backends", "10.0.0.0/24", "--backends", "fd00::/64"]
SHOWN = "ip rule; ip -6 rule; ip -d route show table all; ip -6 -d route show table all; ip nexthop; tc qdisc"


def shown(node: Node) -> str:
    return node.run("sh", "-c", SHOWN).stdout


def install(node: Node, *more: str, vip: object = VIP4) -> subprocess.CompletedProcess[str]:
    at = f"[{vip}]" if ":" in str(vip) else vip
    args = ["client", "--vip", f"tcp://{at}:80", *PREFIXES, "--cgroup", str(node.cgroup), "--detach", *more]
    return node.run(*crablb("agent", *args), check=False)


def ours(node: Node, family: str = "-4") -> list[dict[str, Any]]:
    """The agent's routes."""
    told = node.run("ip", family, "-j", "-d", "route", "show", "table", "all", "proto", "67").stdout
    found: list[dict[str, Any]] = json.loads(told)
    return found


def taken(node: Node, to: object, *more: str) -> bool:
    """Whether packets to an address pass the agent's program."""
    return "encap bpf" in node.run("ip", "route", "get", str(to), *more).stdout


@pytest.fixture
def lab(make_lab: Callable[..., Lab]) -> Lab:
    lab = make_lab("bridge")
    lab.client.ip(f"route del {VIP4}/32")
    lab.client.ip(f"route del {VIP6}/128")
    return lab


#: A route to the VIP, and what the agent's must say of it.
ROUTES = {
    "gateway": (["route add 10.0.0.100 via 10.0.0.2"], ["via 10.0.0.2 dev eth0"]),
    "on-link": ([], ["dev eth0", "scope link src 10.0.0.1"]),
    "source": (
        ["addr add 10.0.0.7/24 dev eth0", "route add 10.0.0.100 via 10.0.0.2 src 10.0.0.7"],
        ["via 10.0.0.2 dev eth0", "src 10.0.0.7"],
    ),
    "metrics": (
        ["route add 10.0.0.100 via 10.0.0.2 metric 7 mtu lock 1300 advmss 1200 window 9000 rto_min 5ms initcwnd 4"],
        ["mtu lock 1300", "advmss 1200", "window 9000", "rto_min lock 5ms", "initcwnd 4"],
    ),
    "congestion-control": (
        ["route add 10.0.0.100 via 10.0.0.2 congctl reno features ecn"],
        ["congctl reno", "features ecn"],
    ),
    "onlink": (["route add 10.0.0.100 via 192.0.2.7 dev eth0 onlink"], ["via 192.0.2.7 dev eth0", "onlink"]),
    "realm": (["route add 10.0.0.100 via 10.0.0.2 realm 5"], ["realm 5"]),
    "multipath": (
        ["route add 10.0.0.100 nexthop via 10.0.0.2 weight 3 nexthop via 10.0.0.11 dev eth0 onlink"],
        ["via 10.0.0.2 dev eth0 weight 3", "via 10.0.0.11 dev eth0 weight 1 onlink"],
    ),
    "nexthop-object": (
        ["nexthop add id 5 via 10.0.0.2 dev eth0", "route add 10.0.0.100 nhid 5"],
        ["via 10.0.0.2 dev eth0"],
    ),
    "nexthop-group": (
        [
            "nexthop add id 5 via 10.0.0.2 dev eth0",
            "nexthop add id 6 via 10.0.0.11 dev eth0",
            "nexthop add id 7 group 5,2/6,3",
            "route add 10.0.0.100 nhid 7",
        ],
        ["via 10.0.0.2 dev eth0 weight 2", "via 10.0.0.11 dev eth0 weight 3"],
    ),
    "gateway-of-the-other-family": (
        ["route add 10.0.0.100 via inet6 fd00::2 dev eth0"],
        ["via inet6 fd00::2 dev eth0"],
    ),
    "default": (["route add default via 10.0.0.2"], ["scope link src 10.0.0.1"]),  # on-link is the longer prefix
    "several-of-which-the-best": (
        ["route add 10.0.0.100 via 10.0.0.11 metric 9", "route add 10.0.0.100 via 10.0.0.2 metric 3"],
        ["via 10.0.0.2 dev eth0"],
    ),
    "ipv6-gateway": (["-6 route add fd00::100 via fd00::2 mtu 1400"], ["via fd00::2 dev eth0", "mtu 1400"]),
    "ipv6-metric-1": (["-6 route add fd00::100 via fd00::2 metric 1"], ["via fd00::2 dev eth0"]),
    "ipv6-multipath": (
        ["-6 route add fd00::100 nexthop via fd00::2 weight 2 nexthop via fd00::11"],
        ["via fd00::2 dev eth0 weight 2", "via fd00::11 dev eth0 weight 1"],
    ),
    "ipv6-preference": (["-6 route add fd00::100 via fd00::2 pref high"], ["pref high"]),
}


#: Without it, the kernel names a route's next hop object and does not say what it is.
COMPAT = "net.ipv4.nexthop_compat_mode"


@pytest.mark.parametrize(
    ("name", "compat"), [*((name, 1) for name in ROUTES), *((name, 0) for name in ROUTES if "nexthop-" in name)]
)
def test_the_route_is_a_copy(lab: Lab, name: str, compat: int):
    """Every attribute of it; and after the agent all is as it was before."""
    lines, words = ROUTES[name]
    lab.client.set({COMPAT: compat})
    for line in lines:
        lab.client.run("ip", *line.split())
    six = "ipv6" in name
    before = shown(lab.client)
    done = install(lab.client, vip=VIP6 if six else VIP4)
    assert (done.returncode, done.stderr) == (0, "")
    assert taken(lab.client, VIP6 if six else VIP4)
    (route,) = ours(lab.client, "-6" if six else "-4")
    told = lab.client.run("ip", "-6" if six else "-4", "route", "show", "table", str(route["table"])).stdout
    for word in words:
        assert word in told
    assert told.count("encap bpf xmit") == max(told.count("nexthop"), 1)
    # What the operator has is there, all of it, as before.
    assert set(before.splitlines()) <= set(shown(lab.client).splitlines())
    assert lab.client.run(*crablb("agent", "remove")).returncode == 0
    assert shown(lab.client) == before


def test_an_encapsulation_of_its_own_is_refused(lab: Lab):
    lab.client.run("ip", "route", "add", "10.0.0.100", "encap", "ip", "id", "7", "dst", "10.0.0.2", "dev", "eth0")
    before = shown(lab.client)
    done = install(lab.client)
    assert done.returncode == 2
    assert (
        done.stderr
        == "crablb: the route to 10.0.0.100 has an encapsulation of its own, and a route can have one only\n"
    )
    assert shown(lab.client) == before


#: Rules of an operator, each with his table 100 leading to the VIP, and whose packets follow it.
RULES = {
    "source": ("rule add from 10.0.0.1 table 100", ["from", "10.0.0.1"]),
    "mark": ("rule add fwmark 7 table 100", ["mark", "7"]),
    "not-marked": ("rule add not fwmark 7 table 100", []),
    "user": ("rule add uidrange 5-5 table 100", ["uid", "5"]),
    "ports": ("rule add ipproto tcp dport 80 table 100", ["ipproto", "tcp", "dport", "80"]),
    "destination": ("rule add to 10.0.0.64/26 table 100", []),
}


@pytest.mark.parametrize("name", RULES)
def test_policy_rules_decide_as_before(lab: Lab, name: str):
    """Packets that a rule sends another way go that way, by the agent's program."""
    rule, packet = RULES[name]
    lab.client.ip("addr add 10.0.0.7/24 dev eth0", f"route add {VIP4} via 10.0.0.2")
    lab.client.ip(f"route add {VIP4} via 10.0.0.11 dev eth0 table 100", rule)
    before = shown(lab.client)
    assert install(lab.client).returncode == 0
    told = lab.client.run("ip", "route", "get", str(VIP4), *packet).stdout
    assert "encap bpf" in told and "via 10.0.0.11" in told
    other = {"source": ["from", "10.0.0.7"], "not-marked": ["mark", "7"], "destination": None}.get(name, [])
    if other is not None:
        told = lab.client.run("ip", "route", "get", str(VIP4), *other).stdout
        assert "encap bpf" in told and "via 10.0.0.2" in told
    lab.client.run(*crablb("agent", "remove"))
    assert shown(lab.client) == before


def test_a_default_route_that_a_rule_suppresses_is_not_copied(lab: Lab):
    """As VPN clients do: the main table without its default route, then the VPN's table."""
    vip = "192.0.2.100"
    lab.client.ip("route add default via 10.0.0.2", "route add default via 10.0.0.11 dev eth0 table 51820")
    lab.client.ip("rule add not fwmark 51820 table 51820", "rule add table main suppress_prefixlength 0")
    assert install(lab.client, vip=vip).returncode == 0
    told = lab.client.run("ip", "route", "get", vip).stdout
    assert "encap bpf" in told and "via 10.0.0.11" in told
    told = lab.client.run("ip", "route", "get", vip, "mark", "51820").stdout
    assert "encap bpf" in told and "via 10.0.0.2" in told


def test_the_operators_own_commands_meet_his_routes_only(lab: Lab):
    lab.client.ip(f"route add {VIP4} via 10.0.0.2")
    assert install(lab.client).returncode == 0
    lab.client.run("ip", "route", "replace", str(VIP4), "via", "10.0.0.2", "dev", "eth0")
    assert taken(lab.client, VIP4)
    lab.client.run("ip", "route", "replace", str(VIP4), "via", "10.0.0.11", "dev", "eth0")
    told = lab.client.run("ip", "route", "show", str(VIP4)).stdout
    assert told.split() == ["10.0.0.100", "via", "10.0.0.11", "dev", "eth0"]
    lab.client.run("ip", "route", "del", str(VIP4))
    assert lab.client.run("ip", "route", "show", str(VIP4)).stdout == ""
    assert len(ours(lab.client)) == 1


# ---- what changes while the agent runs ----


CHANGES = {
    "link-down-and-up": (
        "ip link set eth0 down; ip link set eth0 up; ip addr replace fd00::1/64 dev eth0 nodad;"
        "ip route replace 10.0.0.100 via 10.0.0.2 dev eth0; ip -6 route replace fd00::100 via fd00::2 dev eth0"
    ),
    "addresses-flushed": (
        "ip addr flush dev eth0; ip addr add 10.0.0.1/24 dev eth0; ip addr add fd00::1/64 dev eth0 nodad;"
        "ip route replace 10.0.0.100 via 10.0.0.2 dev eth0; ip -6 route replace fd00::100 via fd00::2 dev eth0"
    ),
    "routes-replaced": (
        "ip route replace 10.0.0.100 via 10.0.0.2 mtu 1400; ip -6 route replace fd00::100 via fd00::2 mtu 1400"
    ),
    "rules-flushed": "ip rule del proto 67; ip -6 rule del proto 67",
    "routes-flushed": "ip route flush table all proto 67; ip -6 route flush table all proto 67",
    "policy-rule": (
        "ip route add 10.0.0.0/24 dev eth0 table 100; ip route add 10.0.0.100 via 10.0.0.2 dev eth0 table 100;"
        "ip rule add from 10.0.0.1 table 100; ip -6 route add fd00::100 via fd00::2 dev eth0 table 100;"
        "ip -6 rule add to fd00::100 table 100"
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_is_mended(make_world: Callable[..., World], name: str):
    """Open connections and new ones go on; the load balancer sees one packet of each."""
    world = make_world()
    world.servers()
    world.client()
    world.serve()
    client = world.lab.client
    held = [world.python(client, "hold", str(vip), "80", ready=True) for vip in (VIP4, VIP6)]
    before = agent_status(client)["client"]["counters"]["redirected"]
    client.run("sh", "-c", CHANGES[name])
    sources = {VIP4: ["from", "10.0.0.1"], VIP6: []}
    until(lambda: all(taken(client, vip, *more) for vip, more in sources.items()))
    until(lambda: client.run(*crablb("agent", "repair"), check=False).stdout == "")  # and all of it
    for one in held:
        assert exchange(one, "still here") == "still here"
    server = world.lab.servers[0]
    assert world.echo(VIP4, "10")["accepted_on"] == server.ip4
    assert world.echo(VIP6, "10")["accepted_on"] == server.ip6
    assert agent_status(client)["client"]["counters"]["redirected"] == before + 2


def test_a_connection_outlives_the_loss_of_its_route(make_world: Callable[..., World]):
    """What it sends meanwhile goes to the VIP, where a server that does not know it resets it."""
    world = make_world()
    world.servers(dsr=True)
    world.serve()
    client = world.lab.client
    assert install(client).returncode == 0
    held = world.python(client, "hold", str(VIP4), "80", ready=True)
    assert exchange(held, "before") == "before"
    client.ip("link set eth0 down", "link set eth0 up", f"route add {VIP4} via {world.lab.lb.ip4}")
    assert held.stdin and held.stdout
    held.stdin.write("meanwhile\n")
    held.stdin.flush()
    until(lambda: agent_status(client, 1)["client"]["counters"]["drop_reset"])
    client.run(*crablb("agent", "repair"))
    assert held.stdout.readline() == "meanwhile\n"
    assert exchange(held, "after") == "after"


def test_a_detached_agent_is_told_and_mended(make_world: Callable[..., World]):
    """Nobody follows what changes; a person asks, and has it mended."""
    world = make_world()
    world.servers()
    world.serve()
    client = world.lab.client
    assert install(client).returncode == 0
    vip = f"tcp://{VIP4}:80"
    fine = agent_status(client)["client"]
    assert (fine["routes"], fine["offering"], fine["faults"]) == ({vip: "agent"}, {vip: True}, [])
    client.ip("link set eth0 down", "link set eth0 up", f"route add {VIP4} via {world.lab.lb.ip4}")
    wrong = agent_status(client, 1)["client"]
    assert wrong["routes"] == {vip: "other"}
    assert wrong["faults"] == [f"the agent's copy of the route to {VIP4} is missing"]
    told = client.run(*crablb("agent", "status"), check=False)
    assert told.returncode == 1
    assert (
        "by a route that is not the agent's" in told.stdout and "wrong: the agent's copy of the route to" in told.stdout
    )
    client.ip(f"route del {VIP4}", "addr flush dev eth0")
    assert agent_status(client, 1)["client"]["routes"] == {vip: "none"}
    done = client.run(*crablb("agent", "repair"), check=False)
    assert (done.returncode, done.stdout) == (
        1,
        f"not mended: no route to {VIP4}; add one, as towards the load balancer\n",
    )
    client.ip("addr add 10.0.0.1/24 dev eth0", f"route add {VIP4} via {world.lab.lb.ip4}")
    done = client.run(*crablb("agent", "repair"))
    assert f"mended; it was: the agent's copy of the route to {VIP4} is missing\n" in done.stdout
    assert agent_status(client)["client"]["routes"] == {vip: "agent"}
    assert world.echo(VIP4, "10")["accepted_on"] == "10.0.0.11"


def test_the_route_comes_later_again(make_world: Callable[..., World]):
    """No route for a while, as when a link or a lease is lost: the agent waits, and takes the next one."""
    world = make_world()
    world.servers()
    agent = world.client()
    world.serve()
    client = world.lab.client
    client.ip("link set eth0 down")
    until(lambda: not ours(client))
    client.ip("link set eth0 up")
    until(lambda: taken(client, VIP4))  # on-link
    client.ip(f"route add {VIP4} via 10.0.0.2")
    until(lambda: "via 10.0.0.2" in client.run("ip", "route", "get", str(VIP4)).stdout)
    assert world.echo(VIP4, "10")["accepted_on"] == "10.0.0.11"
    agent.send_signal(signal.SIGTERM)
    assert agent.wait() == 0
    assert not ours(client)


def test_a_hop_that_is_down_is_left_out(lab: Lab):
    """A route by two interfaces, one of which goes down and comes back."""
    client = lab.client
    client.ip("link add eth1 type veth peer name peer1", "link set eth1 up", "link set peer1 up")
    client.ip("addr add 10.9.0.1/24 dev eth1")
    client.ip(f"route add {VIP4} nexthop via 10.0.0.2 nexthop via 10.9.0.2")
    agent = start_agent(client, "client", *PREFIXES)
    try:
        until(lambda: len(ours(client)[0].get("nexthops", [])) == 2)
        client.ip("link set eth1 down")
        until(lambda: ours(client) and ours(client)[0].get("gateway") == "10.0.0.2")
        client.ip("link set eth1 up")
        client.ip(
            "addr replace 10.9.0.1/24 dev eth1", f"route replace {VIP4} nexthop via 10.0.0.2 nexthop via 10.9.0.2"
        )
        until(lambda: len(ours(client)[0].get("nexthops", [])) == 2)
    finally:
        agent.terminate()
        agent.wait()
