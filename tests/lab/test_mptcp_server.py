"""Clients without an agent, led past the load balancer by the server's: ``agent server --mptcp``."""

from __future__ import annotations

import signal
import threading
from ipaddress import ip_address

import pytest
from scapy.layers.inet import TCP
from scapy.layers.l2 import Ether
from scapy.utils import PcapReader

from crablb.agent import mptcp
from crablb.agent.paths import PathLeader, Paths
from crablb.config import parse_vip
from crablb.kernel import mptcp as kernel
from crablb.lab.demo import VIPS as SERVICES
from crablb.lab.demo import crablb
from crablb.model import Address
from tests.helpers.covering import covering
from tests.helpers.mptcp import FEW, VIPS, Box, Ends, cut, direct_cut, passing, prepare_client, subflows
from tests.helpers.namespaces import inside
from tests.helpers.processes import until
from tests.helpers.world import World, agent_status, command

SIZE = 4 << 20
ALL = [part for vip in SERVICES for part in ("--vip", vip)]


def prepared(make_world, topology="bridge", servers=1, *, mode="backup", more=(), **ends) -> World:
    """A world whose clients may be led away, and whose servers' agents do so."""
    world = make_world(topology, servers=servers, offload=False)
    Ends(world).servers(**ends)
    world.agents = [lead(world, server, mode, *more) for server in world.lab.servers]
    prepare_client(world.lab.client)
    world.serve()
    return world


def lead(world, server, mode="backup", *more):
    dsr = ["--dsr"] if world.lab.topology == "routed" else []
    return world.agent(server, "server", f"--mptcp={mode}", *dsr, *more)


def ways(server, expected=0):
    """The server's open MPTCP connections: by the load balancer alone, both ways, directly."""
    return tuple(agent_status(server, expected)["server"]["mptcp"]["connections"].values())


def endpoints(node):
    return node.run("ip", "mptcp", "endpoint").stdout.splitlines()


def sysctl(node, name):
    return node.run("sysctl", "-n", f"net.mptcp.{name}").stdout.strip()


@covering(mode=["backup", "leave"], topology=["bridge", "routed"])
def test_packets_by_the_load_balancer(make_world, topology, mode):
    """At most nine, whatever the length; the data are whole, and the peer is the VIP.  A connection that left never
    comes again, not even to end."""
    world = prepared(make_world, topology, servers=2, mode=mode)
    for family in (4, 6):
        with passing(world) as begun:
            held = Ends(world).hold(VIPS[family])
            until(lambda: sum(ways(server)[2 if mode == "leave" else 1] for server in world.lab.servers) == 1)
        with passing(world) as then:
            assert held.tell("up", SIZE)
            assert held.tell("down", SIZE)
            assert held.tell("about")["peer"] == VIPS[family]
            held.tell("close")
        print(
            f"{mode}, {topology}, IPv{family}: {begun.lb} and {then.lb} packets by the load balancer, {then.direct} not"
        )
        assert begun.lb + then.lb <= FEW
        assert then.lb <= (0 if mode == "leave" else FEW)
        assert then.direct > 1000


@pytest.mark.parametrize("mode", ["backup", "leave"])
def test_deaths(make_world, mode):
    """One after the other, of the same connection: the load balancer, the direct way, the agent."""
    world = prepared(make_world, mode=mode)
    (server,), (agent,) = world.lab.servers, world.agents
    held = Ends(world).hold(VIPS[4])
    at = 2 if mode == "leave" else 1
    until(lambda: ways(server)[at] == 1)
    gaps = {}

    def gap(what, count=200):
        held.more(count)
        gaps[what] = held.end()
        held.begin()

    held.begin()
    with cut(world.lab, "lb"):
        gap("load balancer")
    if mode == "backup":
        with direct_cut(world.lab):
            gap("direct way")
    agent.send_signal(signal.SIGKILL)
    agent.wait()
    gap("agent killed")
    lead(world, server, mode)
    gap("the next agent")
    assert held.end() < 1000
    assert held.tell("up", SIZE)
    assert held.tell("down", SIZE)
    print(mode, {what: f"{gap:.1f} ms" for what, gap in gaps.items()})
    held.tell("close")


@pytest.mark.parametrize("mode", ["backup", "leave"])
def test_the_kernel_listens_for_joins(make_world, mode):
    """The application listens on the VIP alone: nobody can connect to the server itself, and clients are led there."""
    world = prepared(make_world, mode=mode, more=["--mptcp-port", "8080"], vip_alone=4)
    (server,) = world.lab.servers
    for port in (80, 8080):
        refused = world.python(world.lab.client, "refused", server.ip4, str(port))
        assert "Connection" in refused.communicate()[0]
    with passing(world) as passed:
        held = Ends(world).hold(VIPS[4])
        until(lambda: ways(server, 1)[2 if mode == "leave" else 1] == 1)
        # That is as it is to be; over IPv6 nobody listens.
        assert agent_status(server, 1)["server"]["faults"] == [f"{SERVICES[1]}: nothing listens on port 80 over IPv6"]
        assert held.tell("up", SIZE)
        held.tell("close")
    assert passed.lb <= FEW
    assert passed.direct > 500


def test_only_chosen_clients_are_told(make_world):
    world = prepared(
        make_world, mode="leave", more=["--redirect-clients", "192.0.2.0/24", "--redirect-clients", "::/0"]
    )
    (server,) = world.lab.servers
    with passing(world) as passed:
        held = Ends(world).hold(VIPS[4])
        assert held.tell("up", SIZE)
        held.tell("close")
    assert (passed.direct, passed.subtypes["add_addr"]) == (0, 0)
    held = Ends(world).hold(VIPS[6])
    until(lambda: ways(server) == (0, 0, 1))


# ---- what is found, and put back ----


def test_what_was_found_is_put_back(make_world):
    """Sysctls and limits that nobody changed since, endpoints that are the agent's; others' stay as they are."""
    world = make_world(offload=False)
    (server,) = world.lab.servers
    Ends(world).servers()
    server.ip("addr add 10.9.0.1/32 dev lo")
    server.run("ip", "mptcp", "endpoint", "add", "10.9.0.1", "id", "7", "subflow")
    server.run("ip", "mptcp", "limits", "set", "subflows", "1")
    found, limits = endpoints(server), server.run("ip", "mptcp", "limits").stdout
    for mode in ("backup", "leave"):
        agent = lead(world, server, mode, "--mptcp-port", "8080")
        assert found[0] in endpoints(server)
        assert sysctl(server, "allow_join_initial_addr_port") == "0"
        assert sysctl(server, "path_manager") == {"backup": "kernel", "leave": "userspace"}[mode]
        agent.send_signal(signal.SIGKILL)  # the next one, or who removes it, puts back what was there before it
        agent.wait()
        if mode == "leave":
            told = agent_status(server, 1)["server"]["faults"]
            assert told == ["the process that leads MPTCP clients away has ended; start the agent again"]
            lead(world, server, mode, "--mptcp-port", "8080").terminate()
        else:
            command(server, "agent", "remove", "server")
        until(lambda: endpoints(server) == found)
        until(lambda: server.run("ip", "mptcp", "limits").stdout == limits)
        until(lambda: sysctl(server, "allow_join_initial_addr_port") == "1")
        until(lambda: sysctl(server, "path_manager") == "kernel")
    agent = lead(world, server)
    server.set({"net.mptcp.allow_join_initial_addr_port": 1})
    assert agent_status(server, 1)["server"]["faults"] == [
        "net.mptcp.allow_join_initial_addr_port is 1, not 0: further subflows come to the VIP"
    ]
    server.run("ip", "mptcp", "endpoint", "flush")
    told = agent_status(server, 1)["server"]["faults"]
    assert len(told) == 5
    assert command(server, "agent", "repair") == "".join(f"mended; it was: {fault}\n" for fault in told)
    assert agent_status(server)["server"]["faults"] == []
    agent.terminate()
    assert agent.wait() == 0
    assert endpoints(server) == []


def test_connections_outlive_the_agent(make_world):
    """They go back to the VIP's way; and endpoints stay that connections live by, for the next agent."""
    world = prepared(make_world)
    (server,), (agent,) = world.lab.servers, world.agents
    both = Ends(world).hold(VIPS[4])
    until(lambda: ways(server) == (0, 1, 0))
    server.run("ip", "mptcp", "endpoint", "delete", "id", "0", str(VIPS[4]))  # it has the direct way alone
    world.lab.client.run("ip", "mptcp", "limits", "set", "add_addr_accepted", "0")
    alone = Ends(world).hold(VIPS[4])
    until(lambda: ways(server) == (1, 0, 1))
    agent.terminate()
    assert agent.wait() == 0
    assert sorted(line.split()[0] for line in endpoints(server)) == ["10.0.0.100", "10.0.0.11"]
    assert both.tell("up", SIZE)
    assert alone.tell("up", SIZE)
    for said in (command(server, "agent", "status"), command(server, "agent", "remove", "server")):
        assert "stays: MPTCP endpoint 10.0.0.11 (id 1, signal), as connections live by it; new MPTCP clients" in said
        assert "stays: MPTCP endpoint 10.0.0.100" in said
    agent = lead(world, server)
    assert ways(server) == (1, 0, 1)
    both.tell("close")
    until(lambda: ways(server) == (1, 0, 0))
    agent.terminate()
    assert agent.wait() == 0
    assert [line.split()[0] for line in endpoints(server)] == ["10.0.0.100"]
    assert alone.tell("up", SIZE)
    alone.tell("close")
    until(lambda: subflows(server) == [])
    assert "removed" in command(server, "agent", "remove", "server")
    assert endpoints(server) == []


@pytest.mark.long
@pytest.mark.parametrize("how", ["ended", "replaced"])
def test_from_one_mode_to_the_other(make_world, how):
    """Connections live on: by the load balancer from backup, and led again there; where they are from leave."""
    world = prepared(make_world)
    (server,), (agent,) = world.lab.servers, world.agents

    def change(agent, mode):
        if how == "replaced":
            done = server.run(*crablb("agent", "server", *ALL, f"--mptcp={mode}", "--replace"), check=False)
            assert (done.returncode, "stop it first" in done.stderr) == (2, True)
            agent.kill()
        else:
            agent.terminate()
        agent.wait()
        return lead(world, server, mode, *(["--replace"] if how == "replaced" else []))

    first = Ends(world).hold(VIPS[4])
    until(lambda: ways(server) == (0, 1, 0))
    agent = change(agent, "leave")
    until(lambda: ways(server) == (1, 0, 0))
    second = Ends(world).hold(VIPS[4])
    until(lambda: ways(server) == (1, 0, 1))
    change(agent, "backup")
    third = Ends(world).hold(VIPS[4])
    until(lambda: ways(server) == (0, 2, 1), 20)
    assert all(held.tell("up", SIZE) and held.tell("down", SIZE) for held in (first, second, third))


def test_vips_come_and_go(make_world):
    world = prepared(make_world)
    (server,) = world.lab.servers
    command(server, "agent", "server", "remove", SERVICES[1])
    assert sorted(line.split()[0] for line in endpoints(server)) == ["10.0.0.100", "10.0.0.11", "fd00::11"]
    command(server, "agent", "server", "add", SERVICES[1])
    assert len(endpoints(server)) == 4
    assert agent_status(server)["server"]["faults"] == []


def test_vips_come_and_go_where_connections_leave(make_world):
    world = prepared(make_world, mode="leave")
    (server,) = world.lab.servers
    command(server, "agent", "server", "remove", SERVICES[1])
    stays = Ends(world).hold(VIPS[6])
    leaves = Ends(world).hold(VIPS[4])
    until(lambda: ways(server) == (0, 0, 1))
    command(server, "agent", "server", "add", SERVICES[1])
    other = Ends(world).hold(VIPS[6])
    until(lambda: ways(server) == (1, 0, 2))
    assert [held.tell("ping", 1) < 10_000 for held in (stays, leaves, other)] == [True] * 3


#: What there is: sysctls of net.mptcp, another's endpoint, and what is said of it.
REFUSED = {
    "off": ({"enabled": "0"}, "", "MPTCP is switched off (net.mptcp.enabled is 0)"),
    "mptcpd": ({"path_manager": "userspace"}, "", "connections are led by another program (net.mptcp.path_manager is"),
    "NetworkManager": ({}, "10.0.0.11 id 3 subflow", "10.0.0.11 (id 3, subflow) is an MPTCP endpoint of another"),
}


@pytest.mark.long
def test_what_cannot_be_is_refused(make_world):
    """Before anything is done, and named."""
    world = make_world(offload=False)
    (server,) = world.lab.servers

    def refused(*more):
        before = endpoints(server)
        done = server.run(*crablb("agent", "server", *ALL, *more), check=False)
        assert (done.returncode, done.stdout) == (2, ""), done
        assert endpoints(server) == before
        assert "Traceback" not in done.stderr
        return done.stderr

    for sysctls, other, said in REFUSED.values():
        found = {name: sysctl(server, name) for name in sysctls}
        for name, value in sysctls.items():
            server.set({f"net.mptcp.{name}": value})
        if other:
            server.run("ip", "mptcp", "endpoint", "add", *other.split())
        assert said in refused("--mptcp")
        for name, value in found.items():
            server.set({f"net.mptcp.{name}": value})
    server.run("ip", "mptcp", "endpoint", "flush")
    server.run("ip", "mptcp", "endpoint", "add", "10.9.0.1", "signal")
    assert "is announced by the kernel for another program" in refused("--mptcp=leave")
    server.run("ip", "mptcp", "endpoint", "flush")
    assert "--mptcp-port 80: it is tcp://10.0.0.100:80's" in refused("--mptcp", "--mptcp-port", "80")
    more = [part for n in range(5) for part in ("--vip", f"tcp://10.5.0.{n}:80")]
    assert "the kernel takes 8 MPTCP endpoints; the VIPs' addresses and this host's are 9" in refused("--mptcp", *more)
    server.ip("addr add 10.4.0.1/24 dev eth0")
    assert "IPv4: 10.0.0.11, 10.4.0.1" in refused("--mptcp")
    assert "10.4.0.9 is no address of this host" in refused("--mptcp", "--mptcp-address", "10.4.0.9")
    assert f"{VIPS[4]} is a VIP" in refused("--mptcp", "--mptcp-address", VIPS[4])
    Ends(world).servers(port=8080)
    assert "choose one that nobody has" in refused("--mptcp-address=10.0.0.11", "--mptcp", "--mptcp-port=8080")


def test_more_vips_than_the_kernel_takes(make_world):
    """Those that are served go on; and the way for many is ``leave``."""
    world = prepared(make_world, more=["--mptcp-port", "8080"])
    (server,) = world.lab.servers
    before = endpoints(server)
    for vips in ([f"tcp://10.5.0.{n}:80" for n in range(5)], ["tcp://10.0.0.100:8080"]):
        done = server.run(*crablb("agent", "server", "add", *vips), check=False)
        assert (done.returncode, done.stdout) == (2, ""), done
        assert "--mptcp" in done.stderr
        assert endpoints(server) == before
        assert agent_status(server)["server"]["vips"] == list(SERVICES)
    world.agents[0].terminate()
    assert world.agents[0].wait() == 0
    more = [part for n in range(9) for part in ("--vip", f"tcp://10.5.0.{n}:80")]
    assert lead(world, server, "leave", *more).poll() is None


@pytest.mark.parametrize("mode", ["backup", "leave"])
def test_what_changes_meanwhile_is_told(make_world, mode):
    """An address that has gone, and comes back; who leads connections; and which clients are never led."""
    world = prepared(make_world, mode=mode, more=["--mptcp-address", "10.0.0.11"])
    (server,) = world.lab.servers
    (unled,) = agent_status(server)["server"]["mptcp"]["unled"]
    assert unled.startswith("tcp://[fd00::100]:80: no IPv6 address of this host is told")
    assert unled in command(server, "agent", "status")
    server.ip("addr del 10.0.0.11/24 dev eth0")
    (told,) = agent_status(server, 1)["server"]["faults"]
    assert told.startswith("10.0.0.11 is no address of this host any more")
    server.ip("addr add 10.0.0.11/24 dev eth0")
    assert agent_status(server)["server"]["faults"] == []
    Ends(world).hold(VIPS[4])
    until(lambda: ways(server)[2 if mode == "leave" else 1] == 1)
    server.set({"net.mptcp.path_manager": {"backup": "userspace", "leave": "kernel"}[mode]})
    (told,) = agent_status(server, 1)["server"]["faults"]
    assert told.startswith("net.mptcp.path_manager is")
    assert command(server, "agent", "repair") == f"mended; it was: {told}\n"
    assert sysctl(server, "path_manager") == {"backup": "kernel", "leave": "userspace"}[mode]


@pytest.mark.parametrize("junk", ["", "{", "[[1, 2, 3]]", '[["x", 0]]', "7", '"10.0.0.11"'])
def test_a_damaged_note_of_what_was_left(make_lab, junk):
    (server,) = make_lab().servers
    with inside(server.netns):
        path = mptcp._left_path()
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.write_text(junk)
        command(server, "agent", "status")
        command(server, "agent", "remove", "server")
    finally:
        path.unlink(missing_ok=True)


def test_arguments_that_cannot_be(make_lab):
    """All that is wrong, at once."""
    (server,) = make_lab().servers
    for more, said in (
        (
            ["--mptcp=leave", "--detach"],
            "--mptcp=leave needs a process, which leads each connection",
        ),
        (["--mptcp", "--redirect-clients", "10.0.0.0/8"], "with --mptcp=backup the kernel leads connections"),
        (["--mptcp-port", "80", "--redirect-clients", "10.0.0.0/8"], "--mptcp-port, --redirect-clients: of use with"),
        (["--mptcp", "--mptcp-port", "0"], "--mptcp-port 0: 0 is not a whole number from 1 to 65535"),
        (["--mptcp", "--mptcp-address", "x"], "--mptcp-address x:"),
    ):
        done = server.run(*crablb("agent", "server", *ALL, *more), check=False)
        assert done.returncode == 2
        assert said in done.stderr


@pytest.mark.parametrize("family", [4, 6])
def test_a_load_balancer_is_left(make_world, family):
    """In backup mode by all that have another way, whoever else has none, and would hang."""
    world = prepared(make_world)
    (server,), client = world.lab.servers, world.lab.client
    vips = [parse_vip(vip) for vip in SERVICES]
    many = Ends(world).hold_many(VIPS[family], 10)
    one = Ends(world).hold(VIPS[family])
    until(lambda: ways(server) == (0, 11, 0))
    client.run("ip", "mptcp", "limits", "set", "add_addr_accepted", "0")
    alone = Ends(world).hold(VIPS[family])
    other = Ends(world).hold(VIPS[family], protocol="tcp")
    one.begin()
    waited: dict[Address, int] = {}
    with inside(server.netns):
        until(lambda: mptcp.leave_now(vips, waited) == (11, 1))
    one.more()
    print(f"longest gap: {one.end():.1f} ms")
    until(lambda: ways(server) == (1, 0, 11))
    assert many.tell("ping") == 10
    assert alone.tell("up", SIZE)
    with inside(server.netns):
        assert mptcp.leave_now(vips) == (0, 1)
    alone.tell("close")
    one.tell("close")
    until(lambda: ways(server) == (0, 0, 10))
    # And by the kernel, where all can.
    client.run("ip", "mptcp", "limits", "set", "add_addr_accepted", "1")
    more = Ends(world).hold_many(VIPS[family], 10)
    until(lambda: ways(server) == (0, 10, 10))
    with inside(server.netns):
        until(lambda: mptcp.leave_now(vips, waited) == (10, 0))
        assert mptcp.leave_now(vips) == (0, 0)
    until(lambda: ways(server) == (0, 0, 20))
    assert more.tell("ping") == 10
    assert other.tell("up", SIZE)
    with passing(world) as passed:
        assert many.tell("ping") == 10
    assert passed.lb == 0
    other.tell("close")


@pytest.mark.long
@pytest.mark.parametrize("family", [4, 6])
def test_a_way_that_does_not_work_is_not_left_by(make_world, family):
    """Whether a connection is idle, or the server only receives, nothing at the server tells of a way that has died;
    nor, when the agent goes, of the load balancer's death."""
    world = prepared(make_world)
    (server,), (agent,) = world.lab.servers, world.agents
    vips = [parse_vip(vip) for vip in SERVICES]
    idle, busy = (Ends(world).hold(VIPS[family]) for _ in range(2))
    until(lambda: ways(server) == (0, 2, 0))
    with direct_cut(world.lab), inside(server.netns):
        assert busy.tell("up", SIZE)
        assert mptcp.leave_now(vips) == (0, 2)
        assert [held.tell("ping", 3) < 10_000 for held in (busy, idle)] == [True, True]
        assert mptcp.leave_now(vips) == (0, 2)
    with inside(server.netns):
        until(lambda: sum(ways(server)) == 2 and mptcp.leave_now(vips)[1] == 0)
    until(lambda: ways(server) == (0, 0, 2))
    both = Ends(world).hold(VIPS[family])
    until(lambda: ways(server) == (0, 1, 2))
    with cut(world.lab, "lb"):
        agent.terminate()
        assert agent.wait() == 0
        assert server.ip4 in " ".join(endpoints(server)) or server.ip6 in " ".join(endpoints(server))
        assert [held.tell("ping", 3) < 10_000 for held in (busy, idle, both)] == [True] * 3


FIREWALL = """
table inet firewall {
    chain input {
        type filter hook input priority 0; policy drop;
        ct state invalid drop
        ct state established,related accept
        meta l4proto { icmp, icmpv6 } accept
    }
}
"""


@pytest.mark.parametrize("family", [4, 6])
def test_a_firewall_that_tracks_connections_lets_ways_be_proven(make_world, family):
    """As of a client whose firewall drops what is outside the window."""
    world = prepared(make_world)
    (server,) = world.lab.servers
    world.lab.client.run("nft", "-f", "-", input=FIREWALL)
    idle = Ends(world).hold(VIPS[family])
    until(lambda: ways(server) == (0, 1, 0))
    with inside(server.netns):
        until(lambda: mptcp.leave_now([parse_vip(vip) for vip in SERVICES]) == (1, 0))
    assert idle.tell("up", SIZE)


@pytest.fixture
def leader(make_world):
    """A path manager of this process in a server's network namespace, and connections that are to leave."""
    world = make_world(offload=False)
    (server,) = world.lab.servers
    Ends(world).servers()
    server.set({"net.mptcp.allow_join_initial_addr_port": 0, "net.mptcp.pm_type": 1})
    prepare_client(world.lab.client)
    world.serve()
    leader = PathLeader(mptcp.Mptcp((ip_address(server.ip4),), "leave"), lambda: [parse_vip(SERVICES[0])])
    return world, server, leader


def open_ways(server):
    with inside(server.netns):
        return tuple(mptcp.ways([parse_vip(vip) for vip in SERVICES], [ip_address(server.ip4)]).values())


def test_events_that_are_lost(leader, monkeypatch):
    """All connections leave, though most of what happens is not heard."""
    world, server, leader = leader
    monkeypatch.setattr(kernel, "BUFFER", 1)  # the least that there may be
    go = threading.Event()
    done = PathLeader._do
    monkeypatch.setattr(PathLeader, "_do", lambda *args: (go.wait(60), done(*args)))
    with inside(server.netns), leader.running():
        many = Ends(world).hold_many(VIPS[4], 100)
        assert open_ways(server) == (100, 0, 0)
        go.set()
        until(lambda: open_ways(server) == (0, 0, 100))
        assert many.tell("ping") == 100


@pytest.mark.long
def test_a_path_manager_that_fails_begins_anew(leader, monkeypatch):
    """Connections live meanwhile, and those that began then leave later."""
    world, server, leader = leader
    failures = [RuntimeError("a test"), OSError("another")]

    def hear(self, event):
        if failures:
            raise failures.pop()
        return heard(self, event)

    heard = Paths.hear
    monkeypatch.setattr(Paths, "hear", hear)
    with inside(server.netns), leader.running():
        held = [Ends(world).hold(VIPS[4]) for _ in range(3)]
        until(lambda: not failures and open_ways(server) == (0, 0, 3))
        assert all(one.tell("up", SIZE) for one in held)


def test_an_address_that_clients_do_not_reach(make_world):
    """The connection stays by the load balancer, and nobody tries again and again."""
    world = prepared(make_world, mode="leave")
    (server,) = world.lab.servers
    tried = world.folder / "tried.pcap"
    which = f"tcp[tcpflags] & tcp-syn != 0 and dst host {server.ip4}"
    with direct_cut(world.lab), world.lab.client.capture(tried, which):
        held = Ends(world).hold(VIPS[4])
        assert held.tell("up", SIZE)
        assert held.tell("down", SIZE)
        assert held.tell("ping", 100) < 10_000
        assert ways(server) == (1, 0, 0)
        held.tell("close")
    # One attempt at most for each time that the address is told; a SYN sent again is none.
    syns = [Ether(bytes(packet))[TCP] for packet in PcapReader(str(tried))]
    print(f"{len(syns)} SYNs")
    assert 1 <= len({(syn.sport, syn.seq) for syn in syns}) <= 2


def test_programs_that_listen_by_tcp_are_named(make_world):
    world = prepared(make_world, protocol="tcp")
    (server,) = world.lab.servers
    told = agent_status(server, 1)["server"]["faults"]
    said = [f"{vip}: what listens there takes no MPTCP" for vip in SERVICES]
    assert [fault.partition(";")[0] for fault in told] == said
    assert Ends(world).echoes(VIPS[4])[0]["mptcp"] is False


@pytest.mark.parametrize("mode", ["backup", "leave"])
def test_twenty_milliseconds(make_world, mode):
    """Of ten megabytes no more than 1.5 % by the load balancer: what is sent in the first round trips; of what left
    nothing after the fourth."""
    world = prepared(make_world, mode=mode)
    box = Box(world)
    box.delay(0.01)
    with passing(world) as passed:
        held = Ends(world).hold(VIPS[4])
        assert held.tell("up", 10_000_000)
        held.tell("close")
    times = [float(packet.time) for packet in PcapReader(str(world.folder / "at-lb.pcap"))]
    last = (times[-1] - times[0]) / 0.02
    print(f"{mode}: {passed.lb} by the load balancer, {passed.direct} not; the last after {last:.1f} round trips")
    assert passed.lb <= 0.015 * passed.direct


def told(server):
    """Addresses that the server's kernel has told."""
    return int(server.run("nstat", "-asz", "MPTcpExtAddAddrTx").stdout.split("MPTcpExtAddAddrTx")[1].split()[0])


@pytest.mark.parametrize("mode", ["backup", "leave"])
def test_connections_by_redirection_stay_as_they_are(make_world, mode):
    """One SYN with both offers: redirection is taken, by one packet, and there is no second subflow; over IPv6 there is
    no room for both, and it is led by MPTCP."""
    world = prepared(make_world, mode=mode)
    (server,) = world.lab.servers
    world.client()
    with passing(world) as passed:
        held = Ends(world).hold(VIPS[4])
        assert held.tell("up", SIZE)
        said = held.tell("about")
        assert (said["accepted_on"], said["peer"], said["mptcp"]) == (server.ip4, VIPS[4], True)
        assert len(subflows(server)) == 1
        held.tell("close")
    assert passed.lb == 1
    print(mode, told(server))
    if mode == "leave":
        assert told(server) == 0
    held = Ends(world).hold(VIPS[6])
    until(lambda: ways(server)[2 if mode == "leave" else 1] == 1)


@pytest.mark.parametrize("mode", ["backup", "leave"])
def test_clients_of_ipv6_alone(make_world, mode):
    """They are told IPv4 addresses too, by the kernel, and use the IPv6 one."""
    world = prepared(make_world, mode=mode)
    (server,) = world.lab.servers
    world.lab.client.ip(f"addr del {world.lab.client.ip4}/24 dev eth0")
    held = Ends(world).hold(VIPS[6])
    until(lambda: ways(server)[2 if mode == "leave" else 1] == 1)
    assert (server.ip6, world.lab.client.ip6) in subflows(server)
    assert held.tell("up", SIZE)
