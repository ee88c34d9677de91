"""The client endpoint where redirects do not work, or must not: nobody is worse off for it than once."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from crablb._native import ffi

from crablb.config import parse_vip
from crablb.kernel import bpf, pins
from crablb.lab import VIP4, VIP6
from crablb.lab.demo import VIPS, start_agent
from tests.helpers.namespaces import inside, unique
from tests.helpers.processes import answer, exchange, until
from tests.helpers.world import World, agent_status, status

VIP = {4: str(VIP4), 6: str(VIP6)}
REDIRECTED = "tcp option 42 exists"
SYN_ACK = "tcp flags & (syn | ack) == (syn | ack)"
#: A SYN-ACK is 60 bytes, with a redirect 68: the first is within the quota, the second is not.
FIRST = "quota until 100 bytes"


def drop(node, hook: str, *rules: str) -> None:
    node.run(
        "nft", f"add table inet t; add chain inet t c {{ type filter hook {hook} priority -400; }};"
        + "".join(f"add rule inet t c {rule} drop;" for rule in rules),
    )  # fmt: skip


def redirects(world: World, vip: str = VIPS[0]) -> dict[str | None, dict[str, object]]:
    """How redirects to a VIP fare: None, or by backend."""
    told = agent_status(world.lab.client, None)["client"]["redirects"]
    return {entry["backend"]: entry for entry in told if entry["vip"] == vip}


def pinned(world: World, name: str) -> bpf.Map:
    with inside(world.lab.client.netns):
        return bpf.Map.from_pin(pins.folder("client") / name)


def end_back_off(world: World) -> None:
    """Its time is over."""
    with pinned(world, "client_vips") as vips, pinned(world, "client_paths") as paths:
        for held, kind in ((vips, "struct crab_client_vip *"), (paths, "struct crab_client_health *")):
            for key, value in held.items():
                entry = ffi.from_buffer(kind, changed := bytearray(value))
                health = entry.health if held is vips else entry
                if health.until_ns:
                    health.until_ns, health.trial_ns = 1, 0
                    held.update(key, bytes(changed))


def prepared(world: World, *program: str, agents: bool = True) -> subprocess.Popen[str]:
    """The server runs a program of its own; agents and the load balancer are there."""
    child = world.python(world.lab.servers[0], *program, ready=True)
    if agents:
        start_agent(world.lab.servers[0], "server")
    world.client()
    world.serve()
    return child


def asked(world: World, *how: str) -> None:
    child = world.python(world.lab.client, "ask", *how)
    out, err = child.communicate(timeout=300)
    assert out.strip() == "done", err


@pytest.mark.parametrize("cookies", [False, True], ids=["without-cookies", "cookies"])
def test_fast_open_data_reaches_one_server_once(make_world, cookies):
    world = make_world()
    client = world.lab.client
    # 4, 0x200: without cookies (ip-sysctl.rst)
    client.set({"net.ipv4.tcp_fastopen": 1 if cookies else 5})
    world.lab.servers[0].set({"net.ipv4.tcp_fastopen": 2 if cookies else 0x203})
    server = prepared(world, "tell", "80")
    for family in (4, 6):
        asked(world, VIP[family], "80", "3", "fastopen")
    assert json.loads(exchange(server, "?")) == [f"{VIP[f]} {i}" for f in (4, 6) for i in range(3)]
    counters = world.client_counters()
    assert "offered" not in counters
    assert counters["no_offer_options"] == 6
    sent = client.run("nstat", "-asz", "TcpExtTCPFastOpenActive").stdout
    assert int(sent.split("TcpExtTCPFastOpenActive")[1].split()[0]) == (4 if cookies else 6)


def test_signed_connections_make_no_offer(make_world):
    """What an MD5 signature is for, a translated address ends."""
    world = make_world()
    prepared(world, "signed", "80", world.lab.client.ip4)
    child = world.python(world.lab.client, "signed", "80", VIP[4], VIP[4])
    assert answer(child) == f"signed {VIP[4]}"
    assert world.client_counters() == {"no_offer_options": 1}


def test_multipath_offers_where_both_fit(make_world):
    """MP_CAPABLE grows by a key in the SYN-ACK: beside that an IPv4 redirect fits, an IPv6 one does not."""
    world = make_world()
    prepared(world, "tell", "80")
    for family, counted in ((4, "completed"), (6, "no_offer_room")):
        asked(world, VIP[family], "80", "2", "multipath")
        assert world.client_counters()[counted] == 2
    sent = world.lab.client.run("nstat", "-asz", "MPTcpExtMPCapableSYNTX").stdout
    assert int(sent.split("MPTcpExtMPCapableSYNTX")[1].split()[0]) == 4
    assert world.client_counters()["offered"] == 2


def test_backends_outside_the_prefixes_are_named(make_world):
    world = make_world()
    world.servers()
    other = ["--backends", "10.0.0.128/25", "--backends", "fd00::/64"]  # where the servers are not
    world._kept(start_agent(world.lab.client, "client", *other))
    world.serve()
    assert {seen["accepted_on"] for seen in world.echoes(VIP4, 3)} == {VIP[4]}
    told = redirects(world)
    assert (told[None]["reason"], told[None]["blamed"]) == ("source", world.lab.servers[0].ip4)
    counters = world.client_counters()
    assert counters["retransmitted"] >= 1  # more on a machine that stands still for seconds
    assert (counters["failed"], counters["no_offer_backoff"]) == (1, 2)


@pytest.mark.parametrize(("verify", "retransmitted"), [("--no-verify", {1}), ("--verify", {2, 3, 4})])
def test_withdrawn_offer_is_taken_up(make_world, verify, retransmitted):
    """Behind a load balancer that always redirects, a SYN-ACK is lost: the SYN is sent again, and redirected again.

    The server answers no more than every half a second what it cannot use (net.ipv4.tcp_invalid_ratelimit), and so not
    what it is asked right behind the SYN.  Its redirect is taken up all the same, after a further one.
    """
    world = make_world()
    world.servers()
    world.client(verify)
    world.always_redirect()
    drop(world.lab.servers[0], "output", f"{SYN_ACK} {FIRST}")
    seen = world.echo(VIP4)
    assert seen["intact"]
    assert seen["accepted_on"] == world.lab.servers[0].ip4
    counters = world.client_counters()
    assert (counters["offered"], counters["redirected"]) == (1, 1)
    assert counters["retransmitted"] in retransmitted
    assert counters["completed"] == 1
    assert redirects(world)[None]["reason"] is None


def test_redirect_that_the_host_drops(make_world):
    """The client's own firewall, or reverse-path filter, takes away what was accepted: the fallback serves."""
    world = make_world()
    world.servers()
    world.client()
    world.serve()
    drop(world.lab.client, "prerouting", f"{SYN_ACK} {REDIRECTED}")
    seen = world.echo(VIP4)
    assert seen["intact"]
    assert seen["accepted_on"] == VIP[4]
    told = redirects(world)
    assert told[None]["reason"] == told[world.lab.servers[0].ip4]["reason"] == "not_taken"
    assert world.echo(VIP4)["accepted_on"] == VIP[4]
    counters = world.client_counters()
    assert (counters["offered"], counters["no_offer_backoff"]) == (1, 1)
    assert counters["retransmitted"] >= 1


@pytest.mark.parametrize("family", [4, 6])
def test_port_of_a_closed_connection_outside_the_cgroup(make_world, family):
    """The next connection from there goes to the load balancer, as the agent does not know of it."""
    world = make_world()
    world.servers()
    world.client()
    world.serve()
    assert world.echo(VIP[family], "10", "41000")["accepted_on"] != VIP[family]
    assert agent_status(world.lab.client)["client"]["flows"] == 1  # its TIME_WAIT

    # which the kernel lets a connection end after a second
    def connect() -> str | None:
        with inside(world.lab.client.netns), socket.socket(socket.AF_INET if family == 4 else socket.AF_INET6) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(("", 41000))
            sock.settimeout(60)
            try:
                sock.connect((VIP[family], 80))
            except OSError:
                return None
            return sock.recv(100).decode().split()[1]

    found = []
    until(lambda: found.append(connect()) or found[-1])
    assert found[-1] == VIP[family]
    assert status(world.lab)["total"]["fallback_no_offer"] == 1
    assert agent_status(world.lab.client)["client"]["flows"] == 0


def test_lost_route(make_world):
    """The agent's route is gone, and it cannot mend it: one connection finds out, the others take the fallback."""
    world = make_world()
    world.servers()
    agent = world.client()
    world.serve()
    client = world.lab.client
    assert world.echo(VIP4)["accepted_on"] != VIP[4]
    agent.send_signal(signal.SIGSTOP)  # else it mends them
    client.ip("rule del proto 67")
    assert {seen["accepted_on"] for seen in world.echoes(VIP4, 5)} == {VIP[4]}
    told = redirects(world)
    assert told[None]["reason"] == "route"
    assert told[None]["backing_off"] > 0
    counters = agent_status(client, None)["client"]["counters"]
    assert (counters["reset_route"], counters["no_offer_backoff"]) == (1, 4)
    assert counters["retransmitted"] >= 1
    assert counters["failed"] == 1
    agent.send_signal(signal.SIGCONT)
    until(lambda: "proto 67" in client.run("ip", "rule").stdout)
    end_back_off(world)
    assert {seen["accepted_on"] for seen in world.echoes(VIP4, 3)} == {world.lab.servers[0].ip4}
    assert redirects(world)[None]["reason"] is None


@pytest.fixture
def container(make_world) -> Iterator[tuple[World, str]]:
    """A namespace of its own behind the client's, in the client's cgroup, as its host's containers are."""
    world, name = make_world(), f"crab-{unique()}"
    client = world.lab.client
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        client.ip("link add pod0 type veth peer name eth0 netns " + name, "addr add 172.30.0.1/24 dev pod0")
        client.ip("link set pod0 up")
        for line in ("addr add 172.30.0.2/24 dev eth0", "link set eth0 up", "route add default via 172.30.0.1"):
            subprocess.run(["ip", "-n", name, *line.split()], check=True)
        client.set({"net.ipv4.ip_forward": 1})
        client.run(
            "nft", "add table ip n; add chain ip n p { type nat hook postrouting priority 100; };"
            ' add rule ip n p oifname "eth0" masquerade',
        )  # fmt: skip
        yield world, name
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


def test_containers_beside_the_agent_make_no_offer(container):
    """Their addresses are others' by the time that a redirect comes back."""
    world, name = container
    world.servers()
    world.client()
    world.serve()
    peers = ("nsenter", f"--net=/run/netns/{name}", sys.executable, "-m", "tests.helpers.peers")
    child = world.program(world.lab.client, *peers, "echo", VIP[4], "80")
    out, err = child.communicate(timeout=300)
    assert json.loads(out)["accepted_on"] == VIP[4], err
    assert world.client_counters() == {}
    assert world.echo(VIP4)["accepted_on"] == world.lab.servers[0].ip4


def test_early_retransmission(make_world):
    """While an offer is out; in all the SYN is sent for no shorter time than without."""
    world = make_world()
    client = world.lab.client
    world.servers()

    def begin(host: str = VIP[4]) -> tuple[subprocess.Popen[str], int, int]:
        child = world.python(client, "timeouts", host, "80")
        rto, count = json.loads(answer(child))
        return child, rto, count

    linear = int(client.run("sysctl", "-n", "net.ipv4.tcp_syn_linear_timeouts").stdout)

    def whole(rto: int, count: int) -> float:
        return rto / 1e6 * (linear + 2 ** (count + 1) - 1)

    _, rto, count = begin()
    assert rto == 1_000_000
    world.client()
    child, early, _ = begin()
    assert 250_000 <= early < 300_000
    until(lambda: world.client_counters().get("retransmitted"))
    more = int(exchange(child, "again"))
    assert whole(rto, count) <= whole(early, more) < 1.5 * whole(rto, count)
    # A VIP that is far away gets three times its round-trip time.
    with pinned(world, "client_vips") as vips:
        key = parse_vip(VIPS[0]).key()
        entry = ffi.from_buffer("struct crab_client_vip *", value := bytearray(vips.lookup(key)))
        entry.rtt_us = 300_000
        vips.update(key, bytes(value))
        _, far, _ = begin()
        assert 900_000 <= far < 920_000
        entry.rtt_us = 600_000
        vips.update(key, bytes(value))
        assert begin()[1:] == (rto, count)
        vips.update(key, bytes(bytearray(len(value))))
    # Once connected, the socket is as it was.
    world.serve()
    assert int(exchange(child, "connected")) == count
    assert world.client_counters()["retransmitted"] >= 1


@pytest.mark.parametrize("offers", [True, False], ids=["offers", "signed"])
def test_dead_vip_is_given_up_no_earlier(make_world, offers):
    """Nor if the SYN's options turn out to forbid the offer, when its timeout has been set."""
    world = make_world()
    # Sent again once after a second, and given up two seconds later.
    world.lab.client.set({"net.ipv4.tcp_syn_linear_timeouts": 0, "net.ipv4.tcp_syn_retries": 1})
    world.client()
    begun = time.monotonic()
    child = world.python(world.lab.client, *(["refused", VIP[4], "80"] if offers else ["signed", "80", VIP[4], VIP[4]]))
    assert "TimeoutError" in "".join(child.communicate())
    assert time.monotonic() - begun >= 3
    assert ("offered" in world.client_counters()) == offers
    # It says nothing against redirects.
    assert redirects(world)[None]["reason"] is None
    assert "failed" not in world.client_counters()


@pytest.mark.parametrize("fault", ["dropped", "no-agent"])
def test_back_off(make_world, fault):
    """Redirects do not get through, or a backend does not echo them: one connection finds out, one at a time tries
    again, and when it works all are redirected."""
    world = make_world()
    server = world.lab.servers[0]
    world.servers(agents=fault == "dropped")
    if fault == "dropped":
        drop(server, "prerouting", REDIRECTED)
    world.client()
    world.serve()
    for failures, connections in enumerate((4, 3), 1):
        assert {seen["accepted_on"] for seen in world.echoes(VIP4, connections)} == {VIP[4]}
        counters = world.client_counters()
        assert counters["offered"] == counters["failed"] == failures
        assert counters["retransmitted"] >= failures
        told = redirects(world)
        assert 10 * failures - 8 < told[None]["backing_off"] <= 10 * failures
        if fault == "dropped":
            assert (told[None]["reason"], told[None]["blamed"]) == ("lost", None)
        else:
            assert (told[None]["reason"], told[None]["blamed"]) == ("no_echo", server.ip4)
            assert told[server.ip4]["reason"] == "no_echo"
        end_back_off(world)
    if fault == "dropped":
        server.run("nft", "delete table inet t")
    else:
        world._kept(start_agent(server, "server"))
    assert {seen["accepted_on"] for seen in world.echoes(VIP4, 3)} == {server.ip4}
    told = redirects(world)
    assert told[None]["reason"] is told[server.ip4]["reason"] is None
    assert told[server.ip4]["completed"] == 3


def test_backend_that_is_filtered(make_world):
    """Its SYN-ACK comes, nothing of ours gets there: one connection hangs."""
    world = make_world()
    world.servers()
    world.client()
    world.serve()
    server = world.lab.servers[0]
    drop(server, "prerouting", f"ip daddr {server.ip4} tcp dport 80 tcp flags & syn == 0")
    hanging = world.python(world.lab.client, "ask", VIP[4], "80", "1")
    until(lambda: redirects(world)[None]["reason"] == "silent")
    assert {seen["accepted_on"] for seen in world.echoes(VIP4, 3)} == {VIP[4]}
    assert redirects(world)[server.ip4]["failed"] == 1
    # It was a loss after all.
    server.run("nft", "delete table inet t")
    until(lambda: redirects(world)[None]["reason"] is None, 60)
    assert hanging.poll() is None or hanging.returncode


def test_no_room_means_no_offer(make_world):
    """Not a redirect that is refused when it comes."""
    world = make_world()
    client = world.lab.client
    world.servers()
    code = (
        "import sys\nfrom ipaddress import ip_network\nfrom crablb.agent.client import ClientAgent\n"
        "from crablb.config import parse_vip\n"
        "ClientAgent([parse_vip(sys.argv[1])], [ip_network('10.0.0.0/24')], cgroup=sys.argv[2], flows=32).install()\n"
    )
    client.run(sys.executable, "-c", code, VIPS[0], str(client.cgroup))
    world.serve()
    held = world.python(client, "hold_many", VIP[4], "80", "40", ready=True)
    assert exchange(held, "alive") == "40"
    counters = world.client_counters()
    assert counters["offered"] == counters["redirected"] == 30
    assert counters["no_offer_full"] == 10
    assert "retransmitted" not in counters


def test_what_the_server_closes_goes_soon(make_world):
    """Only who closes first waits for a minute."""
    world = make_world()
    prepared(world, "tell", "80")
    asked(world, VIP[4], "80", "5")
    assert world.client_counters()["redirected"] == 5
    told = redirects(world)
    here = {"taken": 5, "completed": 5, "failed": 0}  # in the last minute
    assert (told[None]["minute"], told[world.lab.servers[0].ip4]["minute"]) == ({"offered": 5, **here}, here)
    with pinned(world, "client_flows") as flows:
        until(lambda: not list(flows.keys()), 20)


def test_application_that_gives_up_early(make_world):
    """Sooner than its SYN would be sent again: that its offer came to nothing is remembered all the same."""
    world = make_world()
    world.servers()
    world.client()
    world.serve()
    drop(world.lab.servers[0], "output", f"{SYN_ACK} {REDIRECTED}")
    child = world.python(world.lab.client, "impatient", VIP[4], "80", "10", "0.2")
    out, err = child.communicate(timeout=300)
    assert [word == "connected" for word in out.split()] == [False] + [True] * 9, (out, err)
    assert redirects(world)[None]["reason"] == "lost"


def test_sockets_that_are_bound_to_an_interface(make_world):
    """A translated packet is routed as any; theirs are not, so they make no offer."""
    world = make_world()
    world.servers()
    world.client()
    world.serve()
    seen = world.echo(VIP4, "10", "0", "eth0")
    assert (seen["intact"], seen["accepted_on"]) == (True, VIP[4])
    assert world.client_counters() == {"no_offer_bound": 1}


NEIGHBOUR = """
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
struct {
    __uint(type, BPF_MAP_TYPE_ARRAY);
    __uint(max_entries, 2);
    __type(key, __u32);
    __type(value, __u64);
} seen SEC(".maps");
SEC("sockops") int other(struct bpf_sock_ops *c)
{
    __u32 k = 0;
    __u64 *n;
    switch (c->op) {
    case BPF_SOCK_OPS_TCP_CONNECT_CB:
        bpf_sock_ops_cb_flags_set(c, c->bpf_sock_ops_cb_flags | BPF_SOCK_OPS_WRITE_HDR_OPT_CB_FLAG);
        return 1;
    case BPF_SOCK_OPS_HDR_OPT_LEN_CB:
        k = (c->skb_tcp_flags & 0x02) == 0;
        break;
    default:
        return 1;
    }
    if ((n = bpf_map_lookup_elem(&seen, &k)))
        __sync_fetch_and_add(n, 1);
    return 1;
}
char LICENSE[] SEC("license") = "GPL";
"""


@pytest.mark.parametrize("first", [True, False], ids=["before", "behind"])
def test_other_programs_callbacks_stay_theirs(make_world, tmp_path, first):
    """Attached before or behind ours, a program that wants to write options of every packet is asked for them."""
    source, target = tmp_path / "other.bpf.c", tmp_path / "other.bpf.o"
    source.write_text(NEIGHBOUR)
    triplet = subprocess.run(["gcc", "-print-multiarch"], capture_output=True, text=True, check=True).stdout.strip()
    subprocess.run(
        ["clang", "-target", "bpf", "-O2", "-g", f"-I/usr/include/{triplet}", "-c", source, "-o", target], check=True
    )
    world = make_world()
    world.servers()
    with bpf.Object(target) as other:
        if first:
            link = other.program("other").attach_cgroup_sockops(world.lab.client.cgroup)
        world.client()
        if not first:
            link = other.program("other").attach_cgroup_sockops(world.lab.client.cgroup)
        with link:
            world.serve()
            assert world.echo(VIP4)["accepted_on"] == world.lab.servers[0].ip4
            syns, others = (int.from_bytes(other.map("seen").lookup(i), "little") for i in (0, 1))
    assert syns == 1
    assert others > 10


def test_installing_over_another_versions_maps(make_world):
    """What cannot be taken over is left, without a traceback."""
    world = make_world()
    world.servers()
    agent = world.client()
    world.serve()
    assert world.echo(VIP4)["accepted_on"] == world.lab.servers[0].ip4
    agent.send_signal(signal.SIGKILL)
    agent.wait()
    with inside(world.lab.client.netns):
        folder = pins.folder("client")
        (folder / "client_flows").unlink()
        with bpf.Map.from_pin(folder / "client_vips") as stranger:
            stranger.pin(folder / "client_flows")
    agent = world.client()
    assert world.echo(VIP4)["accepted_on"] == world.lab.servers[0].ip4
    agent.send_signal(signal.SIGTERM)
    assert "client_flows" in agent.communicate()[1]
