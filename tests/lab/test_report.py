"""What servers tell load balancers about their connections."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter

import pytest

from crablb.lab import VIP4, VIP6
from crablb.lab.demo import crablb, start_agent
from tests.helpers.processes import answer, exchange, until
from tests.helpers.secret import secret
from tests.helpers.world import World, agent_status, status


def counted(world: World, vip: str = f"tcp://{VIP4}:80") -> int:
    return int(agent_status(world.lab.servers[0], None)["server"]["connections"][vip])


def seen_by_ss(world: World) -> int:
    states = ["state", "established", "state", "close-wait"]
    out = world.lab.servers[0].run("ss", "-Htn", *states, "sport", "=", ":80").stdout
    return len(out.splitlines())


@pytest.mark.long
@pytest.mark.parametrize("prepared", [True, False], ids=["redirected", "fallback"])
def test_connections_are_counted_exactly(make_world, prepared):
    """After a storm of opens, closes, resets and killed processes: what ss says."""
    world = make_world(offload=False)
    world.servers(dsr=True)
    world.serve()
    if prepared:
        world.client()
    assert counted(world) == 0
    held = [world.python(world.lab.client, "hold_many", str(VIP4), "80", "40", ready=True) for _ in range(2)]
    until(lambda: counted(world) == 80)
    assert seen_by_ss(world) == 80
    storm = world.python(world.lab.client, "storm", str(VIP4), "80", "300")
    assert storm.wait(60) == 0, storm.stderr.read()
    until(lambda: counted(world) == 80)
    assert seen_by_ss(world) == 80
    held[0].kill()
    until(lambda: counted(world) == 40)
    assert seen_by_ss(world) == 40
    assert exchange(held[1], "still") == "40"
    # An agent that is replaced goes on counting the connections that there are.
    server = world.lab.servers[0]
    server.run("kill", "-9", str(agent_status(server)["server"]["pid"]))
    vips = [part for vip in (f"tcp://{VIP4}:80", f"tcp://[{VIP6}]:80") for part in ("--vip", vip)]
    until(lambda: not agent_status(server)["server"]["pid"])
    server.run(*crablb("agent", "server", *vips, "--dsr", "--detach"))
    assert counted(world) == 40
    assert counted(world, f"tcp://[{VIP6}]:80") == 0
    assert world.echo(VIP6, "10")["intact"]
    until(lambda: counted(world, f"tcp://[{VIP6}]:80") == 0)
    for pid in world.lab.servers[0].processes():
        command = world.lab.servers[0].run("cat", f"/proc/{pid}/cmdline", check=False).stdout
        if "tests.helpers.peers" in command:
            world.lab.servers[0].run("kill", "-9", str(pid))
    until(lambda: counted(world) == 0)


# ---- what load balancers do with it ----

MASTER = bytes(range(32))


class Reporting:
    """Servers that report to a load balancer."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.master = world.folder / "master"
        secret(self.master, MASTER.hex())

    def serve(self, policy: str = "least-connections"):
        listen = ["--report-listen", self.world.lab.lb.ip4, "--report-key", str(self.master)]
        return self.world.serve("--policy", policy, *listen)

    def servers(self, figures=()) -> tuple[list, list]:
        """Echo servers, and their agents."""
        echoes, agents = [], []
        for i, server in enumerate(self.world.lab.servers):
            echoes.append(self.world.python(server, "serve", server.name, "80", ready=True, start_new_session=True))
            agents.append(self.agent(server, *(["--report-figure", str(figures[i])] if figures else [])))
        return echoes, agents

    def agent(self, server, *more: str):
        key = self.world.folder / server.name
        shown = server.run(*crablb("key", "backend", server.ip4, "--master", str(self.master))).stdout
        secret(key, shown)
        return start_agent(server, "server", "--report", self.world.lab.lb.ip4, "--report-key", str(key), *more)

    def daemon(self) -> dict[str, int]:
        return {name: n for name, n in status(self.world.lab)["daemon"].items() if n}

    def log(self) -> str:
        return (self.world.folder / "serve.log").read_text()

    def names(self, count: int) -> list[str]:
        """The servers that so many connections, held at once, came to."""
        child = self.world.python(self.world.lab.client, "hold_names", str(VIP4), "80", str(count), ready=False)
        return answer(child).split()

    def settle(self, reports: int = 7) -> None:
        """Wait until each server has been heard since now; with losses that takes more reports."""
        now = self.daemon().get("reports", 0)
        until(lambda: self.daemon().get("reports", 0) >= now + reports, 60)


LOSSY = """table inet lossy {
    chain in { type filter hook input priority 0; udp dport 7171 numgen random mod 10 < 3 drop; }
    chain out { type filter hook output priority 0; udp sport 7171 numgen random mod 10 < 3 drop; }
}
"""


@pytest.mark.parametrize("lossy", [False, pytest.param(True, marks=pytest.mark.long)], ids=["sound", "lossy"])
def test_least_connections_sees_the_servers(make_world, lossy):
    """Right to the connection after restarts of everything, and with three tenths of the datagrams lost."""
    world = make_world(servers=3)
    world.client()
    reporting = Reporting(world)
    if lossy:
        world.lab.lb.run("nft", "-f", "-", input=LOSSY)
    first = reporting.serve()
    echoes, agents = reporting.servers()
    until(lambda: reporting.log().count("server reports its load") == 3)
    assert set(Counter(reporting.names(12)).values()) == {4}
    # The daemon dies, and forgets; the reports tell the next one.  One server loses its connections.
    first.kill()
    first.wait()
    os.killpg(echoes[2].pid, signal.SIGKILL)
    world.python(world.lab.servers[2], "serve", "server3", "80", ready=True)
    reporting.serve()
    reporting.settle(18 if lossy else 7)
    assert Counter(reporting.names(4)) == {"server3": 4}
    reporting.settle(18 if lossy else 7)
    assert set(Counter(reporting.names(3)).values()) == {1}
    # An agent dies: its server is taken for average, not for empty.
    agents[0].kill()
    until(lambda: "has fallen silent" in reporting.log(), 20)
    until(lambda: reporting.daemon().get("reports_silent", 0) >= 1)  # the log is written first
    reporting.settle(18 if lossy else 7)
    assert Counter(reporting.names(3))["server1"] <= 1


@pytest.mark.long
def test_least_loaded_sees_a_figure(make_world):
    world = make_world(servers=2)
    world.client()
    reporting = Reporting(world)
    figures = []
    for server in world.lab.servers:
        figures.append(world.folder / f"{server.name}.figure")
    figures[0].write_text("0.9")
    figures[1].write_text("0.1\n")
    reporting.serve("least-loaded")
    reporting.servers(figures)
    until(lambda: reporting.log().count("server reports its load") == 2)
    reporting.settle()
    # A server that a starved machine keeps from reporting for three seconds is taken for average meanwhile.
    until(lambda: Counter(reporting.names(5)) == {"server2": 5}, 60)
    figures[1].write_text("nonsense")  # named, and the load is taken for none
    figures[0].write_text("0.0")
    reporting.settle()
    assert reporting.daemon()["reports"] > 10


@pytest.mark.long
def test_a_backend_that_completes_no_redirects(make_world):
    """It gets the fallback alone, until it completes one; it is named, and so is a server where nothing listens."""
    world = make_world()
    client, server = world.lab.client, world.lab.servers[0]
    reporting = Reporting(world)
    reporting.serve("maglev")
    reporting.servers()
    until(lambda: "server reports its load" in reporting.log())
    # Who is redirected here never answers.
    half = world.python(client, "syn_acks", client.ip4, server.ip4, server.mac(), ready=True)
    redirect = "2a06" + VIP4.packed.hex()
    reporting.settle(2)  # what was begun before it reported is not judged
    for _ in range(5):
        assert redirect in json.loads(exchange(half, f"{redirect},"))[0]
    until(lambda: "not redirected to a backend" in reporting.log())
    until(lambda: reporting.daemon().get("redirects_stopped") == 1)
    world.client()
    seen = world.echo(VIP4)
    assert seen["intact"]
    assert seen["accepted_on"] == str(VIP4)  # at once, by the fallback
    total = status(world.lab)["total"]
    assert total["fallback_no_cr_backend"] == 1
    assert "redirected" not in {name for name, n in total.items() if n}
    # The other VIP of the same backend is another matter.
    assert world.echo(VIP6)["accepted_on"] == server.ip6

    def again() -> bool:
        return world.echo(VIP4)["accepted_on"] == server.ip4

    until(again, 30)
    until(lambda: "redirects work again" in reporting.log())
    assert reporting.daemon()["redirects_stopped"] == 1


def test_a_server_where_nothing_listens_is_named(make_world):
    world = make_world()
    reporting = Reporting(world)
    reporting.serve("maglev")
    agent = reporting.agent(world.lab.servers[0])
    until(lambda: "nothing listens on a server" in reporting.log())
    world.python(world.lab.servers[0], "serve", "server1", "80", ready=True)
    reporting.settle(3)
    assert reporting.log().count("nothing listens on a server") == 1
    assert agent.poll() is None


def test_an_address_that_is_taken(make_world):
    world = make_world()
    reporting = Reporting(world)
    first = reporting.serve()
    listen = ["--report-listen", world.lab.lb.ip4, "--report-key", str(reporting.master)]
    first.terminate()
    first.wait()
    taken = world.python(world.lab.lb, "take_udp", world.lab.lb.ip4, "7171", ready=True)
    service = f"tcp://{VIP4}:80={world.lab.servers[0].ip4}"
    done = world.lab.lb.run(*crablb("serve", "--iface", "eth0", "--service", service, *listen), check=False)
    assert (done.returncode, "cannot take reports at 10.0.0.2:7171: Address already in use" in done.stderr) == (2, True)
    assert "xdp" not in world.lab.lb.run("ip", "link").stdout
    taken.kill()
