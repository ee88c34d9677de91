"""Real clients and servers through ``crablb serve``, in labs."""

from __future__ import annotations

import json
import signal
from collections import Counter

import pytest
from scapy.layers.inet import TCP
from scapy.utils import rdpcap

from crablb.lab import VIP4, VIP6
from crablb.lab.demo import VIPS, crablb, start_agent, syns
from tests.helpers.covering import OFFLOAD, covering
from tests.helpers.processes import answer, exchange, until
from tests.helpers.world import agent_status, status

VIP = {4: str(VIP4), 6: str(VIP6)}


@covering(OFFLOAD, topology=["bridge", "routed"], offload=[True, False])
def test_redirected(make_world, topology, offload):
    world = make_world(topology, servers=2, offload=offload)
    world.servers()
    world.client()
    world.serve()
    capture = world.folder / "lb.pcap"
    with world.lab.middle.capture(capture, "tcp", "lb"):
        for family in (4, 6):
            seen = world.echo(VIP[family])
            assert seen["intact"]
            assert seen["peer"] == VIP[family]
            own = world.lab.node(seen["server"])
            assert seen["accepted_on"] == (own.ip4 if family == 4 else own.ip6)
    assert syns(capture) == {"SYN": 4}  # one in and one out for each
    assert status(world.lab)["total"]["redirected"] == 2
    counters = world.client_counters()
    assert counters["offered"] == counters["redirected"] == 2


def test_experimental_form(make_world):
    world = make_world()
    world.servers()
    world.client("--option", "experimental")
    world.serve("--option", "experimental")
    for family in (4, 6):
        assert world.echo(VIP[family])["intact"]
    counters = world.client_counters()
    assert counters.get("redirected") == 2, (counters, status(world.lab), agent_status(world.lab.servers[0], None))


@covering(OFFLOAD, mode=["native", "generic"], offload=[True, False])
def test_unprepared_client_takes_the_fallback(make_world, offload, mode):
    world = make_world(servers=2, offload=offload)
    world.servers(agents=False)
    world.serve("--xdp-mode", mode)
    if mode == "generic" and offload:
        # In generic mode a segment that is not cut yet exceeds a UMEM frame; cut it at the sender.
        world.lab.client.run("ethtool", "-K", "eth0", "tso", "off", "gso", "off")
    for family in (4, 6):
        seen = world.echo(VIP[family])
        assert seen["intact"]
        assert seen["accepted_on"] == seen["peer"] == VIP[family]
    now = status(world.lab)
    assert now["mode"] == mode
    assert now["total"]["fallback_no_offer"] == 2
    assert now["total"]["fallback_established"] > 0
    assert now["total"]["redirected"] == now["total"]["drop_checksum"] == 0


def test_prepared_and_unprepared_clients_mix(standing):
    world = standing()
    world.serve()
    assert world.echo(VIP4)["accepted_on"] == VIP[4]
    agent = world.client()
    assert world.echo(VIP4)["accepted_on"] == world.lab.servers[0].ip4
    agent.send_signal(signal.SIGTERM)
    assert agent.wait() == 0
    assert world.echo(VIP4)["accepted_on"] == VIP[4]


def test_syn_cookies(make_world):
    world = make_world()
    for server in world.lab.servers:
        server.set({"net.ipv4.tcp_syncookies": 2})
    world.servers()
    world.client()
    world.serve()
    for family in (4, 6):
        assert world.echo(VIP[family])["intact"]
    assert world.client_counters()["redirected"] == 2
    sent = world.lab.servers[0].run("nstat", "-asz", "TcpExtSyncookiesSent").stdout
    assert int(sent.split("TcpExtSyncookiesSent")[1].split()[0]) == 2


@pytest.mark.parametrize("family", [4, 6])
def test_forged_syn_acks_are_refused(make_world, family):
    world = make_world()
    world.client()
    vip = VIP[family]
    good = world.lab.servers[0].ip4 if family == 4 else world.lab.servers[0].ip6
    # The backend's kernel shall not answer what it knows nothing of.
    world.lab.servers[0].run(
        "nft",
        "add table inet t; add chain inet t in { type filter hook input priority 0; };"
        " add rule inet t in tcp dport 80 drop",
    )
    other, outside = ("10.0.0.101", "203.0.113.9") if family == 4 else ("fd00::101", "2001:db8::9")
    forger = world.python(world.lab.middle, "forge", vip, other, good, outside, ready=True)
    client = world.python(world.lab.client, "refused", vip, "80")
    replies = [tuple(r) for r in json.loads(answer(forger))]
    assert client.communicate()[0].strip() == "connected"
    # The wrong acknowledgement number earned a RST from the kernel, the sound answer an ACK; nothing else did.
    assert (good, "R") in replies
    assert (good, "A") in replies
    assert not [r for r in replies if r[0] not in (good,)]
    counters = world.client_counters()
    assert counters["redirected"] == 1
    assert counters["drop_source"] == 1
    assert counters["drop_vip"] == 2


FORGED = {
    4: "02040 5b4 2a06 0a000065 0101",
    6: "020405b4 2a12 fd000000000000000000000000000101 0101",
}


@pytest.mark.parametrize("family", [4, 6])
def test_a_clients_redirect_never_reaches_a_server(make_world, family):
    world = make_world()
    server = world.lab.servers[0]
    world.serve()
    options = FORGED[family].replace(" ", "")
    capture = world.folder / "server.pcap"
    source = world.lab.client.ip4 if family == 4 else world.lab.client.ip6
    with server.capture(capture, "tcp[13] == 2 or (ip6 and ip6[53] == 2)"):
        child = world.python(world.lab.client, "syn", source, VIP[family], world.lab.lb.mac(), options)
        assert child.wait() == 0, child.stderr.read()
        until(lambda: status(world.lab)["total"]["sent"] == 1)
        until(lambda: capture.stat().st_size > 24)
    got = [p for p in rdpcap(str(capture)) if TCP in p and p[TCP].sport == 4242]
    assert len(got) == 1
    assert got[0][TCP].options == [("MSS", 1460)]
    assert status(world.lab)["total"]["forged_option"] == 1


@pytest.mark.parametrize("family", [4, 6])
def test_connection_refused(make_world, family):
    world = make_world()
    start_agent(world.lab.servers[0], "server")
    world.client()
    world.serve()
    child = world.python(world.lab.client, "refused", VIP[family], "80")
    assert child.communicate()[0].strip() == "ConnectionRefusedError"
    # By the fallback, which was asked because something on the way to the backend might have said it.
    counters = world.client_counters()
    assert counters["refused_port"] == 1
    assert counters["retransmitted"] >= 1  # more on a machine that stands still for seconds


def test_reset(standing):
    world = standing()
    world.client()
    world.serve()
    for family in (4, 6):
        child = world.python(world.lab.client, "reset", VIP[family], "80")
        assert child.communicate()[0].strip() == "ConnectionResetError"


@pytest.mark.long
def test_lost_syn_ack(make_world):
    """The client's second SYN makes no offer: the fallback serves it, and the late redirect changes nothing."""
    world = make_world()
    world.servers()
    world.client()
    world.serve()
    # Lost are those that redirect, until there was one of the fallback: server and client may send again in any order.
    world.lab.servers[0].run(
        "nft",
        "add table inet t; add chain inet t out { type filter hook output priority 0; };"
        " add set inet t served { type ipv4_addr; flags dynamic; };"
        f" add rule inet t out ip saddr {VIP4} tcp flags & (syn | ack) == (syn | ack) add @served {{ ip daddr }};"
        " add rule inet t out tcp flags & (syn | ack) == (syn | ack) ip daddr != @served drop",
    )
    seen = world.echo(VIP4)
    assert seen["intact"]
    assert seen["accepted_on"] == VIP[4]
    total = status(world.lab)["total"]
    assert total["redirected"] == 1
    assert total["fallback_no_offer"] == 1
    assert total["retransmitted_syn"] >= 1  # more on a machine that stands still for seconds
    assert world.client_counters()["retransmitted"] >= 1


@covering({True: "known", False: "older-than-the-agent"}, known=[True, False], family=[4, 6])
def test_four_tuple_collision(make_world, known, family):
    """A connection straight to the backend has the four-tuple that the redirected one would get."""
    world = make_world()
    world.servers()
    server = world.lab.servers[0]
    direct = server.ip4 if family == 4 else server.ip6
    if known:
        world.client()
    first = world.python(world.lab.client, "hold", direct, "80", "40000", ready=True)
    if not known:
        world.client()
    world.serve()
    seen = world.echo(VIP[family], "100000", "40000")
    assert seen["intact"]
    assert seen["accepted_on"] == VIP[family]  # by the fallback
    # and the first one is as it was
    assert exchange(first, "still here") == "still here"
    counters = world.client_counters()
    if known:
        assert counters["no_offer_shared"] == 1
        assert "offered" not in counters
    else:
        assert counters["offered"] == 1
        assert counters["retransmitted"] >= 1  # more on a machine that stands still for seconds
        assert "redirected" not in counters


def test_sigterm_leaves_nothing_behind(standing):
    world = standing()
    child = world.serve()
    lb = world.lab.lb
    assert "xdp" in lb.run("ip", "link", "show", "eth0").stdout
    assert "managed" in lb.run("ip", "neigh").stdout
    child.send_signal(signal.SIGTERM)
    assert child.wait() == 0
    assert "xdp" not in lb.run("ip", "link", "show", "eth0").stdout
    assert "managed" not in lb.run("ip", "neigh").stdout
    done = lb.run(*crablb("status", "--iface", "eth0"), check=False)
    assert done.returncode == 3
    assert "no load balancer serves eth0" in done.stderr


def test_the_next_load_balancer_takes_over(standing):
    world = standing()
    world.client()
    first = world.serve()
    held = world.python(world.lab.client, "hold", VIP[4], "80", ready=True)
    first.send_signal(signal.SIGKILL)
    first.wait()
    # Without a daemon the VIP is silent, not refusing; what is established goes on.
    assert status(world.lab)["pid"] is None
    assert exchange(held, "alive") == "alive"
    waiting = world.python(world.lab.client, "echo", VIP[6], "80")
    until(lambda: status(world.lab)["xdp"]["drop_no_socket"] > 0)
    world.serve()
    assert "took over" in (world.folder / "serve.log").read_text()
    # The waiting client's next SYN finds the new one; it makes no offer any more.
    out, err = waiting.communicate(timeout=300)
    assert json.loads(out)["intact"], err
    assert world.echo(VIP4)["accepted_on"] == world.lab.servers[0].ip4
    assert exchange(held, "alive") == "alive"


def test_only_backends_that_answer_are_chosen(make_world):
    world = make_world()
    world.servers()
    world.client()
    good = world.lab.servers[0].ip4
    world.serve(what=[f"tcp://{VIP4}:80=10.0.0.99,{good},192.0.2.1"])
    log = (world.folder / "serve.log").read_text()
    assert "10.0.0.99 does not answer" in log
    assert "192.0.2.1" in log and "no route" in log
    assert {seen["accepted_on"] for seen in world.echoes(VIP4, 10)} == {good}
    # One that appears later is used from then on: half of the connections are its.
    world.lab.servers[0].ip("addr add 10.0.0.99/24 dev eth0")
    until(lambda: "backend reachable" in (world.folder / "serve.log").read_text())
    until(lambda: "10.0.0.99" in {seen["accepted_on"] for seen in world.echoes(VIP4, 10)})  # the workers know it
    assert {seen["accepted_on"] for seen in world.echoes(VIP4, 40)} == {good, "10.0.0.99"}


def test_client_agent_restarts_under_connections(make_world):
    """Killed or detached, it works on; the next one takes over the connections."""
    world = make_world()
    world.servers()
    agent = world.client()
    world.serve()
    held = world.python(world.lab.client, "hold", VIP[4], "80", ready=True)
    agent.send_signal(signal.SIGKILL)
    agent.wait()
    assert exchange(held, "one") == "one"
    assert agent_status(world.lab.client)["client"]["pid"] is None
    agent = world.client()
    assert exchange(held, "two") == "two"
    assert world.echo(VIP[6])["intact"]
    twice = world.lab.client.run(*crablb("agent", "client", "--vip", VIPS[0], "--backends", "10.0.0.0/24"), check=False)
    assert twice.returncode == 2
    assert f"process {agent.pid}" in twice.stderr


def test_detached_agents_and_their_removal(make_world):
    world = make_world()
    lab = world.lab
    before = {n.name: n.run("sh", "-c", "ip route; ip -6 route; tc qdisc").stdout for n in (lab.client, lab.servers[0])}
    world.servers(agents=False)
    lab.servers[0].run(*crablb("agent", "server", "--vip", VIPS[0], "--cgroup", str(lab.servers[0].cgroup), "--detach"))
    lab.client.run(
        *crablb("agent", "client", "--vip", VIPS[0], "--backends", "10.0.0.0/24",
                "--cgroup", str(lab.client.cgroup), "--detach")
    )  # fmt: skip
    world.serve()
    assert world.echo(VIP4)["accepted_on"] == lab.servers[0].ip4
    told = lab.client.run(*crablb("agent", "status")).stdout
    assert "client: detached" in told and "1 redirected connections" in told
    for node in (lab.client, lab.servers[0]):
        assert "removed" in node.run(*crablb("agent", "remove")).stdout
        assert agent_status(node) == {}
        assert node.run("sh", "-c", "ip route; ip -6 route; tc qdisc").stdout == before[node.name]
    assert world.echo(VIP4)["accepted_on"] == VIP[4]


def test_two_queues(make_world):
    """Connections come in by both queues of an interface; the workers share one sequence of backends."""
    world = make_world(servers=3)
    lab = world.lab
    lab.lb.ip("link del eth0")
    wide = "numrxqueues 2 numtxqueues 2"
    lab.middle.ip(
        f"link add eth0 netns {lab.lb.netns} {wide} type veth peer name lb {wide}",
        "link set lb master br0 up",
    )
    lab.middle.run("ethtool", "-K", "lb", "gro", "on")
    lab.lb.ip("link set eth0 up", f"addr add {lab.lb.ip4}/24 dev eth0", f"addr add {lab.lb.ip6}/64 dev eth0 nodad")
    world.servers()
    world.client()
    world.serve("--policy", "round-robin")
    child = world.python(lab.client, "hold_names", VIP[4], "80", "60")
    assert Counter(answer(child).split()) == {"server1": 20, "server2": 20, "server3": 20}
    now = status(lab)
    assert now["queues"] == ["eth0/0", "eth0/1"]
    redirected = [queue["redirected"] for queue in now["workers"]]
    assert sum(redirected) == now["total"]["redirected"] == 60
    assert min(redirected) > 10
    assert now["total"]["retransmitted_syn"] == 0
