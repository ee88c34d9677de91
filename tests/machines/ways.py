"""Redirect, fallback on one segment and in tunnels, takeover and death, in both families, in one lab: where the kernel
is so slow that to load a program takes a minute.  Run by kernels.py."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from crablb.doctor.machine import TAKEOVERS
from crablb.lab import VIP4, VIP6, Lab, Node
from crablb.lab.demo import crablb, syns
from tests.helpers.namespaces import unique
from tests.helpers.processes import exchange, until
from tests.helpers.world import RELEASE, World, agent_status, status

VIP = {4: str(VIP4), 6: str(VIP6)}
FAMILIES = pytest.mark.parametrize("family", VIP)
#: The port whose fallback goes in tunnels, of which the client's agent knows nothing.
TUNNELS = 81
SIZE = 300_000


class Ways(World):
    """A server, a client with an agent and one without, and a load balancer whose fallback goes either way."""

    def begin(self) -> None:
        (server,) = self.lab.servers
        ports = [part for vip in (VIP[4], f"[{VIP[6]}]") for part in ("--vip", f"tcp://{vip}:{TUNNELS}")]
        self.servers(True, *ports, dsr=True)
        self.python(server, "serve", server.name, str(TUNNELS), ready=True)
        self.client()
        client = self.lab.client
        self.unprepared = Node(self.lab.name, client.name, client.ip4, client.ip6)
        self.unprepared.cgroup = client.cgroup.with_name("unprepared")
        self.unprepared.make_cgroup()
        self.config = self.folder / "lb.toml"
        self.config.write_text(
            # Whether a veth takes what XDP programs send, the kernel does not say before Linux 6.3.
            'interface = "eth0"\nack_bypass = "on"\n'
            + "".join(
                f'[[service]]\naddress = "tcp://{vip}:{port}"\nfallback = "{way}"\ncheck = []\nbackends = ["{own}"]\n'
                for port, way in ((80, "dsr-l2"), (TUNNELS, "dsr-ipip"))
                for vip, own in ((VIP[4], server.ip4), (f"[{VIP[6]}]", server.ip6))
            )
        )
        self.first = self.serve(config=self.config)

    def decapsulated(self) -> tuple[int, int]:
        """Packets, and SYN-ACKs that were told what fits into a tunnel, at the server."""
        counters = agent_status(self.lab.servers[0])["server"]["counters"]
        return counters["dsr_decapsulated"], counters["dsr_clamped"]


@pytest.fixture(scope="module")
def ways(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ways]:
    with Lab.create(unique(), "bridge", 1) as lab:
        made = Ways(lab, tmp_path_factory.mktemp("ways"))
        made.begin()
        yield made
        made.end()


def redirected(ways: Ways, family: int) -> None:
    """A connection is, and the load balancer sees its SYN alone."""
    server, before = ways.lab.servers[0], ways.client_counters()
    capture = ways.folder / "lb.pcap"
    with ways.lab.middle.capture(capture, "tcp", "lb"):
        seen = ways.echo(VIP[family], str(SIZE))
    assert (seen["intact"], seen["peer"]) == (True, VIP[family])
    assert seen["accepted_on"] == (server.ip4 if family == 4 else server.ip6)
    assert syns(capture) == {"SYN": 2}  # one in, one out
    counters = ways.client_counters()
    assert [counters[name] - before.get(name, 0) for name in ("offered", "redirected")] == [1, 1]


@FAMILIES
def test_redirected(ways: Ways, family: int) -> None:
    redirected(ways, family)


@FAMILIES
def test_redirected_with_a_syn_cookie(ways: Ways, family: int) -> None:
    server = ways.lab.servers[0]
    server.set({"net.ipv4.tcp_syncookies": 2})

    def cookies() -> int:
        told = server.run("nstat", "-asz", "TcpExtSyncookiesSent").stdout
        return int(told.split("TcpExtSyncookiesSent")[1].split()[0])

    before = cookies()
    redirected(ways, family)
    assert cookies() == before + 1
    server.set({"net.ipv4.tcp_syncookies": 1})


@FAMILIES
def test_who_does_not_offer_takes_the_fallback(ways: Ways, family: int) -> None:
    before = status(ways.lab)
    seen = ways.echo(VIP[family], str(SIZE), node=ways.unprepared)
    assert (seen["intact"], seen["accepted_on"]) == (True, VIP[family])
    now = status(ways.lab)
    assert now["total"]["fallback_no_offer"] == before["total"]["fallback_no_offer"] + 1
    assert now["xdp"]["flow"] > before["xdp"]["flow"] + 10
    assert now["total"]["encapsulated"] == before["total"]["encapsulated"]


@FAMILIES
def test_the_fallback_goes_in_tunnels(ways: Ways, family: int) -> None:
    before, (decapsulated, clamped) = status(ways.lab), ways.decapsulated()
    seen = ways.echo(VIP[family], str(SIZE), port=TUNNELS)
    assert (seen["intact"], seen["accepted_on"]) == (True, VIP[family])
    now = status(ways.lab)
    assert now["total"]["encapsulated"] > before["total"]["encapsulated"]
    assert now["xdp"]["flow"] > before["xdp"]["flow"] + 10
    assert ways.decapsulated()[0] > decapsulated + 10
    assert ways.decapsulated()[1] == clamped + 1


@FAMILIES
def test_a_four_tuple_that_is_taken_is_not_redirected_onto(ways: Ways, family: int) -> None:
    server, port = ways.lab.servers[0], str(40000 + family)
    before = ways.client_counters().get("no_offer_shared", 0)
    first = ways.python(ways.lab.client, "hold", server.ip4 if family == 4 else server.ip6, "80", port, ready=True)
    seen = ways.echo(VIP[family], str(SIZE), port)
    assert (seen["intact"], seen["accepted_on"]) == (True, VIP[family])
    assert exchange(first, "still here") == "still here"
    assert ways.client_counters()["no_offer_shared"] == before + 1


def test_connections_outlive_load_balancers(ways: Ways) -> None:
    """Of each way and family: one that is killed, the next one's start, and that it is taken over."""
    held = [
        ways.python(node, "hold", vip, str(port), ready=True)
        for vip in VIP.values()
        for node, port in ((ways.lab.client, 80), (ways.unprepared, 80), (ways.unprepared, TUNNELS))
    ]

    def go_on(word: str) -> None:
        assert [exchange(one, word) for one in held] == [word] * len(held)

    go_on("begun")
    total = status(ways.lab)["total"]
    assert [name for name, n in total.items() if n and name.startswith("drop")] == []
    ways.first.kill()
    ways.first.wait()
    go_on("killed")
    second = ways.serve(config=ways.config)
    go_on("begun anew")
    if RELEASE >= TAKEOVERS:
        ways.lab.lb.run(*crablb("takeover"))
        assert second.wait() == 0
        go_on("taken over")
    else:
        refused = ways.lab.lb.run(*crablb("takeover"), check=False)
        assert refused.returncode == 1 and "Linux 6.4" in refused.stderr, refused.stderr
        assert second.poll() is None
        go_on("not taken over")
    for family in VIP:
        redirected(ways, family)
        assert ways.echo(VIP[family], str(SIZE), node=ways.unprepared)["intact"]
    os.kill(status(ways.lab)["pid"], signal.SIGTERM)
    until(lambda: not ways.lab.lb.pins.exists())
    assert "xdp" not in ways.lab.lb.run("ip", "link").stdout
