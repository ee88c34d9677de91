"""No byte of a request is executed twice, whatever is lost, killed or exchanged; and what a client saw acknowledged was
executed.

Servers write down the number of each request when it is there to its last byte, before they answer; clients write down
which were answered, and send none again.  Every test holds one log against the other.

``CRABLB_LONG=N``: everything N times (and ``--timeout=0``).  With ``-rP`` it is told how many requests that were.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
from dataclasses import dataclass

import pytest
from crablb._native import ffi

from crablb.kernel import bpf, pins
from crablb.lab import VIP4, VIP6, Node
from crablb.lab.demo import crablb, start_agent
from tests.helpers.namespaces import inside
from tests.helpers.numbered import Log
from tests.helpers.processes import answer, exchange, until
from tests.helpers.world import World, agent_status
from tests.lab.test_never_worse import PATHS

pytestmark = pytest.mark.long

LONG = int(os.environ.get("CRABLB_LONG", "1"))
HOSTS = (str(VIP4), str(VIP6))
#: Servers that share one know each other's cookies.
KEY = "00112233-44556677-8899aabb-ccddeeff"


class Numbered:
    """A world whose servers execute numbered requests, Fast Open's too."""

    def __init__(self, world: World, *, agents: bool = True, dsr: bool = False, silent: tuple[str, ...] = ()) -> None:
        """``silent``: servers that write nothing down."""
        self.world, self.lab, self.folder = world, world.lab, world.folder
        self.dsr = dsr
        self.agents: dict[str, subprocess.Popen[str]] = {}
        self._firsts = itertools.count(0, 10**9)
        # Ports come again within a minute.
        self.lab.client.set({"net.ipv4.tcp_fastopen": 1, "net.ipv4.tcp_tw_reuse": 1})
        for server in self.lab.servers:
            server.set({"net.ipv4.tcp_fastopen": 3})
            server.run("sysctl", "-qw", f"net.ipv4.tcp_fastopen_key={KEY}")
            log = "/dev/null" if server.name in silent else str(self.folder / f"{server.name}.executed")
            world.python(server, "serve", log, module="numbered", ready=True)
            if dsr:
                server.ip(f"addr del {VIP4}/32 dev lo", f"addr del {VIP6}/128 dev lo")
                server.set({"net.ipv4.conf.all.arp_ignore": 0, "net.ipv4.conf.all.arp_announce": 0})
            if agents:
                self.arm(server)

    def arm(self, server: Node) -> None:
        """Install the server's agent."""
        self.agents[server.name] = start_agent(server, "server", *(["--dsr"] if self.dsr else []))

    def ask(self, how: str, ports: str, *, patience: int = 30) -> Asked:
        """One connection to each VIP from each port, all at once."""
        first = next(self._firsts)
        return Asked(self._client("ask", first, patience, how, ports, str(first), *HOSTS), first)

    def traffic(self, *hows: str, workers: int = 12) -> Traffic:
        first = next(self._firsts)
        ways = [f"{host}={how}" for how in hows for host in HOSTS]
        return Traffic(self._client("traffic", first, 5, str(first), str(workers), *ways))

    def _client(self, program: str, first: int, patience: int, *args: str) -> subprocess.Popen[str]:
        log = str(self.folder / f"{first}.asked")
        return self.world.python(self.lab.client, program, log, str(patience), *args, module="numbered")

    def fast_opened(self) -> int:
        """Requests that servers got in a SYN."""
        told = [s.run("nstat", "-asz", "TcpExtTCPFastOpenPassive").stdout for s in self.lab.servers]
        return sum(int(text.split("TcpExtTCPFastOpenPassive")[1].split()[0]) for text in told)

    def redirected(self) -> int:
        """Redirects that the client's agent took up."""
        counted: dict[str, int] = agent_status(self.lab.client, None)["client"]["counters"]
        return counted["redirected"]

    def held(self) -> Log:
        """The logs so far, which hold."""
        log = Log.read(self.folder)
        print(f"{len(log.executed)} requests executed, {len(log.acknowledged)} acknowledged, {len(log.failed)} failed")
        log.hold()
        return log


@dataclass
class Asked:
    child: subprocess.Popen[str]
    first: int

    def end(self) -> None:
        """All connections have come to their end."""
        assert answer(self.child) == "done"


@dataclass
class Traffic:
    child: subprocess.Popen[str]

    def flows(self) -> None:
        """So many more requests are acknowledged."""
        assert exchange(self.child, "200") == "200"

    def end(self) -> None:
        assert exchange(self.child, "end") == "ended"


def forget_failures(client: Node) -> None:
    """Of the client's agent: all connections offer."""
    with inside(client.netns):
        folder = pins.folder("client")
        with bpf.Map.from_pin(folder / "client_vips") as vips, bpf.Map.from_pin(folder / "client_paths") as paths:
            for key, value in vips.items():
                entry = ffi.from_buffer("struct crab_client_vip *", changed := bytearray(value))
                entry.health.until_ns = entry.health.failures = 0
                vips.update(key, bytes(changed))
            for key in list(paths.keys()):
                paths.delete(key)


#: Paths made of nftables alone.
FILTERS = [name for name in PATHS if name == "stateful firewall" or name.startswith("option ")]

# ---- what is lost ----

SYN = "tcp flags & (syn | ack) == syn"
FROM_CLIENT, FROM_LB, FROM_SERVER = 'iifname "client"', 'iifname "lb"', 'iifname "server*"'
#: A packet that every connection has, by where it is met, and what it is.
PACKETS = {
    "SYN": (FROM_CLIENT, SYN),
    "SYN to server": (FROM_LB, SYN),
    "SYN-ACK": (FROM_SERVER, "tcp flags & (syn | ack) == syn | ack"),
    "ACK": (FROM_CLIENT, "tcp flags == ack"),
    "data": (FROM_CLIENT, "tcp flags & (syn | psh) == psh"),
    "answer": (FROM_SERVER, "tcp flags & (syn | psh) == psh"),
}
#: Which copies of it are lost.
COPIES = {"first": (1,), "first two": (1, 2), "second": (2,)}
#: A connection has a second one of those that begin it only if the first was lost.
LOSSES = [(p, c) for p in PACKETS for c in COPIES if not ("SYN" in p and c == "second")]
#: Connections of each family that a loss is tried on at once.  Their ports say which loss is theirs.
EACH = 2
FIRST_PORT = 20000


def lose(switch: Node, *bases: int) -> None:
    """On the switch, each connection loses what its port says."""
    sets, rules = [], []
    for i, (packet, copies) in enumerate(LOSSES):
        where, what = PACKETS[packet]
        port = "dport" if where == FROM_SERVER else "sport"
        theirs = ", ".join(f"{base + i * EACH}-{base + i * EACH + EACH - 1}" for base in bases)
        for family in ("ip", "ip6"):
            match = f"{where} ether type {family} {what} tcp {port} {{ {theirs} }}"
            for copy in (1, 2):
                name = f"{family}_{i}_{copy}"
                sets.append(f"set {name} {{ type inet_service; flags dynamic; size 1024; }}")
                verdict = "counter drop" if copy in COPIES[copies] else "accept"
                # A copy that is in none of the sets before is this one.
                rules.append(f"{match} tcp {port} != @{name} add @{name} {{ tcp {port} }} {verdict}")
    text = "table bridge losses\ndelete table bridge losses\ntable bridge losses {\n" + "\n".join(sets)
    text += "\nchain c { type filter hook prerouting priority -300;\n" + "\n".join(rules) + "\n}\n}\n"
    switch.run("nft", "-f", "-", input=text)


def lost(switch: Node) -> dict[tuple[str, str], int]:
    """How often each was lost."""
    rules = json.loads(switch.run("nft", "-j", "list", "table", "bridge", "losses").stdout)["nftables"]
    counts = [e["counter"]["packets"] for r in rules if "rule" in r for e in r["rule"]["expr"] if "counter" in e]
    each = [len(COPIES[copies]) * 2 for _, copies in LOSSES]
    told = iter(counts)
    return {loss: sum(itertools.islice(told, n)) for loss, n in zip(LOSSES, each, strict=True)}


@pytest.mark.parametrize("kind", ["unprepared", "prepared", "always redirected"])
def test_lost_packets(make_world, kind):
    """Of the handshake, and what follows, in turn; with and without Fast Open."""
    world = make_world(servers=2)
    numbered = Numbered(world)
    client, switch = world.lab.client, world.lab.middle
    balancer = world.serve()
    numbered.ask("fastopen", "19000-19000").end()  # for cookies
    if kind == "always redirected":
        balancer.terminate()
        balancer.wait()
        world.always_redirect()
    if kind != "unprepared":
        world.client()
    opened = numbered.fast_opened()
    count = len(LOSSES) * EACH
    for wave in range(LONG):
        if kind != "unprepared":
            forget_failures(client)
        bases = [FIRST_PORT + (2 * wave + i) % 200 * 200 for i in range(2)]
        lose(switch, *bases)
        asked = {
            how: numbered.ask(how, f"{base}-{base + count - 1}", patience=60)
            for base, how in zip(bases, ("plain", "fastopen"), strict=True)
        }
        for one in asked.values():
            one.end()
        log = numbered.held()
        for how, one in asked.items():
            failed = {
                (LOSSES[(n - one.first) // len(HOSTS) // EACH], what)
                for n, what in log.failed.items()
                if 0 <= n - one.first < count * len(HOSTS)
            }
            assert not failed, (how, failed)
        # A request may be one segment, and its answer.
        assert all(n for (_, copies), n in lost(switch).items() if copies != "second"), lost(switch)
    if kind != "unprepared":
        assert numbered.redirected()
    if kind == "always redirected":
        assert numbered.fast_opened() == opened
        assert all(agent_status(server)["server"]["counters"]["fast_open"] for server in world.lab.servers)
    else:
        assert numbered.fast_opened() > opened


# ---- what is killed, removed and exchanged ----


def test_client_agent_comes_and_goes(make_world):
    world = make_world(servers=3)
    numbered = Numbered(world)
    world.serve()
    traffic = numbered.traffic("plain", "fastopen")
    ends = (
        (signal.SIGKILL, None),
        (signal.SIGTERM, None),
        (signal.SIGKILL, ("remove",)),
        (signal.SIGKILL, ("remove", "--now")),
    )
    for how, then in ends * LONG:
        agent = world.client()
        traffic.flows()
        assert numbered.redirected()
        agent.send_signal(how)
        traffic.flows()
        agent.wait()
        if then:
            world.lab.client.run(*crablb("agent", *then))
            traffic.flows()
    traffic.end()
    numbered.held()
    assert numbered.fast_opened()


def test_server_agents_come_and_go(make_world):
    world = make_world(servers=3)
    numbered = Numbered(world)
    world.serve()
    world.client()
    traffic = numbered.traffic("plain", "fastopen")
    traffic.flows()
    for leave in (signal.SIGKILL, signal.SIGTERM) * LONG:
        for server in world.lab.servers[:2]:
            agent = numbered.agents[server.name]
            agent.send_signal(leave)
            agent.wait()
            forget_failures(world.lab.client)
            traffic.flows()
            numbered.arm(server)
            forget_failures(world.lab.client)
            traffic.flows()
    traffic.end()
    assert numbered.held().acknowledged
    assert numbered.redirected() and numbered.fast_opened()


def test_load_balancer_comes_and_goes(make_world):
    world = make_world(servers=3)
    numbered = Numbered(world)
    balancer = world.serve()
    world.client()
    traffic = numbered.traffic("plain", "fastopen")
    for how in (signal.SIGKILL, signal.SIGTERM) * LONG:
        traffic.flows()
        balancer.send_signal(how)
        balancer.wait()
        balancer = world.serve()
        forget_failures(world.lab.client)
    traffic.flows()
    traffic.end()
    numbered.held()
    assert numbered.redirected() and numbered.fast_opened()


def test_route_is_replaced(make_world):
    world = make_world(servers=3)
    numbered = Numbered(world)
    world.serve()
    agent = world.client()
    client, via = world.lab.client, (world.lab.lb.ip4, world.lab.lb.ip6)
    traffic = numbered.traffic("plain", "fastopen")
    for _ in range(LONG):
        traffic.flows()
        client.ip(*(f"route replace {vip} via {lb} mtu 1400" for vip, lb in zip(HOSTS, via, strict=True)))
        traffic.flows()
        client.ip(*(f"route del {vip}" for vip in HOSTS))
        client.ip(*(f"route add {vip} via {lb}" for vip, lb in zip(HOSTS, via, strict=True)))
        forget_failures(client)
        traffic.flows()
        agent.send_signal(signal.SIGSTOP)  # else it mends them
        client.run("sh", "-c", "ip rule del proto 67; ip -6 rule del proto 67")
        forget_failures(client)
        traffic.flows()
        agent.send_signal(signal.SIGCONT)
        until(lambda: client.run("sh", "-c", "ip rule; ip -6 rule").stdout.count("proto 67") >= 2)
        forget_failures(client)
        traffic.flows()
    traffic.end()
    numbered.held()
    assert numbered.redirected() and numbered.fast_opened()


def test_firewalls_and_filters_come_and_go(make_world):
    """In the middle of connections."""
    world = make_world("routed", servers=2)
    numbered = Numbered(world, dsr=True)
    world.serve()
    world.client()
    traffic = numbered.traffic("plain", "fastopen")
    traffic.flows()
    for path in FILTERS * LONG:
        PATHS[path].make(world.lab)
        forget_failures(world.lab.client)
        traffic.flows()
        world.lab.middle.run("nft", "delete table inet path")
        forget_failures(world.lab.client)
        traffic.flows()
    traffic.end()
    numbered.held()
    assert numbered.redirected() and numbered.fast_opened()


def test_address_translation(make_world):
    """It is there before the connections: whose address changes between a SYN with data and its second copy looks like
    two clients, to whatever load balancer."""
    world = make_world("routed", servers=2)
    numbered = Numbered(world, dsr=True)
    PATHS["NAT"].make(world.lab)
    world.serve()
    world.client()
    traffic = numbered.traffic("plain", "fastopen")
    for _ in range(2 * LONG):
        forget_failures(world.lab.client)
        traffic.flows()
    traffic.end()
    numbered.held()
    assert numbered.fast_opened() and not numbered.redirected()


# ---- it can fail ----


def test_a_request_sent_again_is_seen(make_world):
    world = make_world()
    numbered = Numbered(world)
    world.serve()
    numbered.ask("plain", "20000-20001").end()
    numbered.held()
    numbered.ask("again", "20002-20003").end()
    with pytest.raises(AssertionError, match="executed twice"):
        numbered.held()


def test_a_request_that_is_answered_and_not_executed_is_seen(make_world):
    world = make_world(servers=2)
    numbered = Numbered(world, silent=("server2",))
    world.serve()
    numbered.ask("plain", "20000-20019").end()
    with pytest.raises(AssertionError, match="acknowledged, and not executed"):
        numbered.held()


def test_a_load_balancer_that_forgets_is_seen(make_world):
    """A SYN's data is executed, and its SYN-ACK lost; the second SYN goes to another server."""
    world = make_world(servers=2, offload=False)
    numbered = Numbered(world)
    world.forget()
    numbered.ask("fastopen", "19000-19001").end()  # for cookies
    numbered.held()
    # Two connections to each VIP: the next one is the first server's again.
    world.lab.servers[0].run(
        "nft", "add table inet t; add chain inet t c { type filter hook output priority 0; };"
        " add rule inet t c tcp flags & (syn | ack) == syn | ack drop"
    )  # fmt: skip
    numbered.ask("fastopen", "20000-20000").end()
    with pytest.raises(AssertionError, match="executed twice"):
        numbered.held()
