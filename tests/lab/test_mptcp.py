"""Clients without an agent, led past the load balancer, in the networks that there are: middleboxes, delays, others'
clients on the same VIP, programs that know nothing of MPTCP, and what somebody who means ill sends."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Callable

import pytest

from crablb.lab import Node
from crablb.lab.demo import NGINX, VIPS, start_agent
from tests.helpers.mptcp import FEW, Box, Ends, Held, cut, direct_cut, passing, prepare_client
from tests.helpers.mptcp import VIPS as VIP
from tests.helpers.processes import until
from tests.helpers.world import World, agent_status, status

SIZE = 1 << 20


def led(
    make_world: Callable[..., World],
    topology: str = "bridge",
    servers: int = 1,
    *,
    mode: str = "backup",
    protocol: str = "mptcp",
    listeners: bool = True,
    limits: bool = True,
) -> tuple[World, Ends]:
    """Servers that lead clients away, and a client that may be led."""
    world = make_world(topology, servers=servers, offload=False)
    ends = Ends(world)
    if listeners:
        ends.servers(protocol=protocol)
    for server in world.lab.servers:
        world.agent(server, "server", f"--mptcp={mode}", "--dsr")
    if limits:
        prepare_client(world.lab.client)
    world.serve()
    return world, ends


def stands(world: World, way: str, count: int = 1) -> None:
    """Wait until so many connections have this way: load_balancer, both, direct."""

    def there() -> int:
        told = [agent_status(server, None)["server"]["mptcp"]["connections"][way] for server in world.lab.servers]
        return sum(told)

    until(lambda: there() == count)


def whole(held: Held, size: int = SIZE) -> bool:
    return bool(held.tell("up", size) and held.tell("down", size))


# ---- middleboxes ----


@pytest.mark.long
@pytest.mark.parametrize("topology", ["bridge", "routed"])
def test_what_middleboxes_take_out(make_world, topology):
    """Whatever is stripped from SYN, SYN-ACK or later: the data are whole, and somebody's way carries them."""
    world, ends = led(make_world, topology)
    box = Box(world)
    for family, vip in VIP.items():
        for what in ("syn", "synack", "later", "join", "add_addr", "prio"):
            box.strip(what)
            with passing(world) as passed:
                held = ends.hold(vip)
                assert whole(held), what
                about = held.tell("about")
                held.tell("close")
            print(f"{topology}, IPv{family}, without {what}: {passed.lb} by the load balancer, {passed.direct} not")
            assert about["peer"] == vip
            assert about["mptcp"] is about["mptcp_there"] is (what in ("join", "add_addr", "prio")), what
            if what == "prio":
                continue  # both ways are as good
            # All by the load balancer.  In vain is tried once, and not again and again.
            assert passed.payload >= SIZE, what
            assert passed.direct <= 8, what
        box.strip()
        with passing(world) as passed:
            held = ends.hold(vip)
            stands(world, "both")
            assert whole(held)
            held.tell("close")
        assert passed.lb <= FEW


def test_a_middlebox_that_begins_in_the_middle(make_world):
    """A connection that has moved lives on when addresses and priorities cannot be told any more."""
    world, ends = led(make_world)
    box = Box(world)
    held = ends.hold(VIP[4])
    stands(world, "both")
    held.begin()
    box.strip("add_addr", "prio", "remove_addr")
    held.more()
    with cut(world.lab, "lb"):
        held.more()
    print(f"longest: {held.end():.1f} ms")
    assert whole(held)


@pytest.mark.long
@pytest.mark.parametrize("mode", ["backup", "leave"])
def test_servers_that_clients_cannot_reach(make_world, mode):
    """They live by the load balancer, and nobody tries again and again; once the way is there, new ones take it."""
    world, ends = led(make_world, mode=mode)
    for vip in VIP.values():
        with direct_cut(world.lab), passing(world) as passed:
            held = ends.hold(vip)
            held.begin()
            held.more(300)
            gap = held.end()
            assert whole(held)
        print(f"{mode}, {vip}: longest {gap:.1f} ms; {passed.direct} packets to the server itself")
        assert passed.payload >= SIZE
        assert passed.direct <= 8
        held.tell("close")
        held = ends.hold(vip)
        stands(world, "direct" if mode == "leave" else "both")
        held.tell("close")


# ---- those who do not take part ----


@pytest.mark.long
def test_clients_and_servers_that_do_not_take_part(make_world):
    """Limits that take up nothing; MPTCP off at the client; a listener of TCP: each is served, by the load balancer."""
    world, ends = led(make_world, limits=False)
    ends.servers(port=81, protocol="tcp")
    client = world.lab.client
    for vip in VIP.values():
        with passing(world) as passed:
            (about,) = ends.echoes(vip)
        assert about["mptcp"]
        assert passed.payload >= 100000
        assert passed.direct == 0
        assert passed.subtypes["add_addr"] >= 1  # it has heard of it
    told = agent_status(client, None)
    assert told == {}
    client.set({"net.mptcp.enabled": 0})
    refused = client.run("python3", "-c", "import socket; socket.socket(2, 1, 262)", check=False)
    assert refused.returncode
    for vip in VIP.values():
        (about,) = ends.echoes(vip, protocol="tcp")
        assert not about["mptcp"]
        assert not about["mptcp_there"]


def test_a_listener_of_tcp(make_world):
    """A client that speaks MPTCP to a program that does not has TCP; the agent says that it leads nobody."""
    world, ends = led(make_world, protocol="tcp")
    for vip in VIP.values():
        with passing(world) as passed:
            (about,) = ends.echoes(vip)
        assert not about["mptcp"]
        assert passed.subtypes == {"capable": 1}
    assert any("takes no MPTCP" in fault for fault in agent_status(world.lab.servers[0], 1)["server"]["faults"])


# ---- mixed ----


@pytest.mark.long
@pytest.mark.parametrize("mode", ["backup", "leave"])
def test_all_kinds_on_one_vip(make_world, mode):
    """Redirected, led and plain clients at once; who is redirected stays so, though he speaks MPTCP."""
    world, ends = led(make_world, servers=2, mode=mode)
    way = "direct" if mode == "leave" else "both"
    client, prefixes = world.lab.client, [part for p in world.lab.prefixes() for part in ("--backends", p)]
    start_agent(client, "client", *prefixes, "--no-verify")
    outside = bystander(world)
    for family, vip in VIP.items():
        before, announced = status(world.lab)["total"], mib(client, "AddAddr")
        with passing(world) as passed:
            redirected = ends.hold(vip, protocol="tcp")
            assert whole(redirected)
        assert redirected.tell("about")["accepted_on"] != vip
        assert passed.lb == 1
        with passing(world) as passed:
            plain = ends.hold(vip, protocol="tcp", node=outside)
            assert whole(plain)
        assert passed.payload >= SIZE
        with passing(world) as passed:
            multi = ends.hold(vip, node=outside)
            stands(world, way)
            assert whole(multi)
        assert passed.lb <= FEW
        assert mib(client, "AddAddr") > announced
        announced = mib(client, "AddAddr")
        with passing(world) as passed:
            both = ends.hold(vip)
            # Both offers fit into a SYN of IPv4; of IPv6 they do not, and MPTCP is what there is.
            if family == 6:
                stands(world, way, 2)
            assert whole(both)
        about = both.tell("about")
        assert about["mptcp"]
        if family == 4:
            assert passed.lb == 1
            assert about["accepted_on"] != vip
            # Its own path manager tells a redirected connection nothing; the kernel's, of the other family's address.
            assert mib(client, "AddAddr") - announced == (0 if mode == "leave" else 1)
            stands(world, way)
        else:
            assert 1 < passed.lb <= FEW
            assert about["accepted_on"] == vip
        assert status(world.lab)["total"]["mptcp"] - before["mptcp"] == 2
        everybody = (redirected, plain, multi, both)
        for one in everybody:  # all of them at once
            one.begin()
        for one in everybody:
            one.more()
            one.end()
            assert whole(one)
            one.tell("close")
        stands(world, way, 0)


def bystander(world: World) -> Node:
    """The client's network, without the client's cgroup: no agent concerns what runs there."""
    client = world.lab.client
    node = world.lab.nodes["bystander"] = Node(world.lab.name, client.name, client.ip4, client.ip6)
    node.cgroup = client.cgroup.with_name("bystander")
    node.make_cgroup()
    return node


def mib(node: Node, name: str) -> int:
    """A counter of the kernel's MPTCP (MPTcpExt)."""
    lines = node.run("cat", "/proc/net/netstat").stdout.splitlines()
    names, values = (line.split()[1:] for line in lines if line.startswith("MPTcpExt:"))
    return int(dict(zip(names, values, strict=True))[name])


# ---- programs that know nothing of MPTCP ----


@pytest.mark.long
@pytest.mark.parametrize("topology", ["bridge", "routed"])
def test_unmodified_programs(make_world, topology):
    """nginx and curl by LD_PRELOAD (mptcpize): downloads, uploads, a thousand requests on one connection."""
    world, _ = led(make_world, topology, servers=2, listeners=False)
    big = world.folder / "big"
    big.write_bytes(data := os.urandom(16 << 20))
    for server in world.lab.servers:
        folder = world.folder / server.name
        folder.mkdir()
        (folder / "nginx.conf").write_text(NGINX.format(dir=folder, name=server.name, big=big))
        server.run("mptcpize", "run", "nginx", "-c", str(folder / "nginx.conf"))
    curl = ["mptcpize", "run", "curl", "-s", "-S", "-m", "60"]
    for host in (VIP[4], f"[{VIP[6]}]"):
        with passing(world) as passed:
            world.lab.client.run(*curl, "-o", str(world.folder / "back"), f"http://{host}/big")
        assert (world.folder / "back").read_bytes() == data
        shown = [passed.lb]
        # The response begins before the direct way stands: a few segments' acknowledgements more.
        assert passed.lb <= 100
        with passing(world) as passed:
            world.lab.client.run(*curl, "-T", str(big), f"http://{host}/upload/up")
        (arrived,) = world.folder.glob("server*/up")
        assert hashlib.sha256(arrived.read_bytes()).digest() == hashlib.sha256(data).digest()
        arrived.unlink()
        shown.append(passed.lb)
        assert passed.lb <= 100
        assert passed.direct > 8000
        with passing(world) as passed:
            said = world.lab.client.run(*curl, "-w", "%{num_connects}\n", f"http://{host}/whoami?[1-1000]").stdout
        assert said.count("server") == 1000
        assert said.splitlines()[1::2].count("1") == 1
        shown.append(passed.lb)
        assert passed.lb <= 100
        print(f"{topology}, {host}: packets by the load balancer: 16 MiB down, up, 1,000 requests: {shown}")


# ---- delay ----


@pytest.mark.long
@pytest.mark.parametrize("mode", ["backup", "leave"])
def test_twenty_milliseconds(make_world, mode):
    """What is sent before the direct way stands goes by the load balancer: at most 1.5 % of 10 MB; with ``leave``
    nothing after the first four."""
    world, ends = led(make_world, mode=mode)
    Box(world).delay(0.01)
    for way in ("up", "down"):
        with passing(world) as passed:
            held = ends.hold(VIP[4])
            assert held.tell(way, 10_000_000)
        share = passed.lb / (passed.lb + passed.direct)
        print(f"{mode}, 10 MB {way} at 20 ms: {passed.lb} by the load balancer, {passed.direct} not: {share:.2%}")
        assert share <= 0.015
        with passing(world) as passed:
            assert held.tell(way, SIZE)
            held.tell("ping", 3)
            held.tell("close")
        assert passed.lb <= (0 if mode == "leave" else 9)  # of the close


# ---- changes of backends ----


@pytest.mark.long
@pytest.mark.parametrize("mode", ["backup", "leave"])
def test_no_change_breaks_a_connection(make_world, mode):
    """200 connections live through every change of the backends, and the load balancer's deaths."""
    world = make_world(servers=4, offload=False)
    ends = Ends(world)
    ends.servers()
    for server in world.lab.servers:
        world.agent(server, "server", f"--mptcp={mode}", "--dsr")
    prepare_client(world.lab.client)
    path = world.folder / "lb.toml"
    serve_log = world.folder / "serve.log"

    def write(*hosts: int, more: str = "") -> None:
        backends = ", ".join(f'"10.0.0.{host}"' for host in hosts)
        path.write_text(f'interface = "eth0"\n[[service]]\naddress = "{VIPS[0]}"\nbackends = [{backends}{more}]\n')

    write(11, 12, 13)
    child = world.serve(config=path)
    held = ends.hold_many(VIP[4], 200)
    stands(world, "direct" if mode == "leave" else "both", 200)
    assert held.tell("ping") == 200
    drained = ', {address = "10.0.0.11", state = "drain"}'
    for hosts, more in (((11, 12, 13, 14), ""), ((12, 13), drained), ((12, 13), ""), ((13,), ""), ((11, 12, 13), "")):
        count = serve_log.read_text().count('"reloaded"')
        write(*hosts, more=more)
        child.send_signal(signal.SIGHUP)
        until(lambda count=count: serve_log.read_text().count('"reloaded"') > count)
        assert held.tell("ping") == 200, (hosts, more)
    child.kill()
    child.wait()
    assert held.tell("ping") == 200
    world.serve(config=path)
    assert held.tell("ping") == 200
    told = held.tell("about")
    assert {one["peer"] for one in told} == {VIP[4]}
    assert all(one["mptcp"] for one in told)
    assert len({one["server"] for one in told}) == 3


# ---- ill will ----


def test_forged_joins(make_world):
    """Joins by the thousand with tokens of nobody, to the VIP and to the server itself: each is refused, and the
    connection that is there does not notice."""
    world, ends = led(make_world, servers=2)
    held = ends.hold(VIP[4])
    stands(world, "both")
    held.begin()
    count = 2000
    for address, mac in ((VIP[4], world.lab.lb.mac()), (world.lab.servers[0].ip4, world.lab.servers[0].mac())):
        before = status(world.lab)["total"]["mptcp_join"]
        refused = sum(mib(server, "MPJoinNoTokenFound") for server in world.lab.servers)
        child = world.python(world.lab.client, "forge_joins", address, mac, str(count), module="mptcp")
        _, err = child.communicate(timeout=120)
        assert child.returncode == 0, err
        until(lambda: sum(mib(s, "MPJoinNoTokenFound") for s in world.lab.servers) - refused >= count)  # noqa: B023
        assert status(world.lab)["total"]["mptcp_join"] - before == (count if address == VIP[4] else 0)
    print(f"longest: {held.end():.1f} ms")
    assert whole(held)
    stands(world, "both")
