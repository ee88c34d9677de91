"""The client agent comes, is replaced, and goes, and no connection notices."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable

import pytest
from crablb._native import ffi

from crablb.agent import ClientAgent, offering
from crablb.kernel import bpf, pins
from crablb.lab import VIP4, VIP6, Node
from crablb.lab.demo import crablb
from tests.helpers.namespaces import inside
from tests.helpers.processes import answer, exchange, until
from tests.helpers.world import World, agent_status, command


def shown(node: Node) -> str:
    """All that an agent changes."""
    return node.run(
        "sh", "-c", "ip rule; ip -6 rule; ip route show table all; ip -6 route show table all; tc qdisc"
    ).stdout


@pytest.fixture
def world(make_world: Callable[..., World]) -> World:
    world = make_world()
    world.servers()
    world.serve()
    return world


def left(node: Node) -> list[str]:
    with inside(node.netns):
        return [str(path) for path in pins.folder("client").glob("*")]


@pytest.mark.long
def test_remove_waits_for_connections(world: World):
    """Nothing is offered any more; what is redirected is translated to its end."""
    client = world.lab.client
    before = shown(client)
    agent = world.client()
    held = [world.python(client, "hold", str(vip), "80", ready=True) for vip in (VIP4, VIP6)]
    agent.kill()
    agent.wait()
    remove = world.program(client, *crablb("agent", "remove", "client"))
    assert answer(remove) == "client: offers no more; 2 connections left, to go on"
    assert world.echo(VIP4, "10")["accepted_on"] == str(VIP4)  # by the fallback
    assert agent_status(client)["client"]["withdrawn"] is True
    for one in held:
        assert exchange(one, "still here") == "still here"
    assert remove.poll() is None
    for one in held:
        one.communicate()
    assert answer(remove) == "client: removed"
    assert remove.wait() == 0
    assert (shown(client), left(client)) == (before, [])


@pytest.mark.long
def test_a_half_closed_connection_is_waited_for(world: World):
    """An upload that has ended, whose answer is still on its way."""
    client = world.lab.client
    agent = world.client()
    halfway = world.python(client, "half", str(VIP4), "80", ready=True)
    agent.kill()
    agent.wait()
    remove = world.program(client, *crablb("agent", "remove", "client"))
    assert answer(remove) == "client: offers no more; 1 connection left, to go on"
    assert exchange(halfway, "read") == "200000 bytes and the count"
    assert answer(remove) == "client: removed"


@pytest.mark.long
@pytest.mark.parametrize("how", [["--now"], ["--wait", "0.2"]], ids=" ".join)
def test_remove_does_not_wait_longer_than_told(world: World, how: list[str]):
    client = world.lab.client
    before = shown(client)
    agent = world.client()
    held = world.python(client, "hold", str(VIP4), "80", ready=True)
    agent.kill()
    agent.wait()
    done = client.run(*crablb("agent", "remove", "client", *how))
    assert done.stdout.splitlines()[-1] == "client: removed, which ends 1 connection"
    assert (shown(client), left(client)) == (before, [])
    assert held.stdin
    held.stdin.write("gone\n")
    held.stdin.flush()
    assert held.wait(timeout=300) != 0


@pytest.mark.long
@pytest.mark.parametrize("how", ["kill", "term", "detached", "repair"])
def test_new_connections_while_an_agent_is_replaced(world: World, how: str):
    """As many as come until all have ended: each is served."""
    client = world.lab.client
    prefixes = [part for p in world.lab.prefixes() for part in ("--backends", p)]
    detached = crablb(
        "agent", "client", "--vip", f"tcp://{VIP4}:80", "--vip", f"tcp://[{VIP6}]:80", *prefixes, "--detach"
    )
    agent = world.client() if how in ("kill", "term") else None
    if not agent:
        client.run(*detached)
    clients = [world.python(client, "echoes", str(vip), "80", "200", "10") for vip in (VIP4, VIP6) for _ in range(2)]
    cycles = 0
    while any(one.poll() is None for one in clients) or not cycles:
        if agent:
            agent.send_signal(signal.SIGKILL if how == "kill" else signal.SIGTERM)
            agent.wait()
            agent = world.client()
        elif how == "detached":
            client.run(*detached)
        else:
            command(client, "agent", "repair", "client")
        cycles += 1
    for one in clients:
        out, err = one.communicate(timeout=300)
        assert one.returncode == 0, err
        assert all(echo["intact"] for echo in json.loads(out))


@pytest.mark.long
def test_connections_whose_end_nobody_heard(world: World):
    """Those of another cgroup than the agent's now: they go on, and leave nothing when they have ended."""
    client = world.lab.client
    agent = world.client()
    held, other = (world.python(client, "hold", str(VIP4), "80", ready=True) for _ in range(2))

    def owned() -> int:
        with inside(client.netns):
            return len(offering.owned(ClientAgent.folder()))

    assert owned() == 2
    agent.kill()
    agent.wait()
    elsewhere = client.cgroup / "elsewhere"
    elsewhere.mkdir()
    try:
        agent = world.client("--cgroup", str(elsewhere))
        assert exchange(held, "one") == "one"
        other.kill()
        other.wait()
        assert owned() == 2
        until(lambda: command(client, "agent", "repair", "client") is not None and owned() == 1)
        assert exchange(held, "two") == "two"
        held.kill()
        held.wait()
        until(lambda: command(client, "agent", "repair", "client") is not None and owned() == 0)
    finally:
        world.end()
        elsewhere.rmdir()


@pytest.mark.long
def test_sigterm_waits_and_leaves_what_is_needed(world: World):
    """After its time the agent ends; the connections go on, and the next agent has them."""
    client = world.lab.client
    before = shown(client)
    agent = world.client("--wait", "0.2")
    held = world.python(client, "hold", str(VIP4), "80", ready=True)
    agent.send_signal(signal.SIGTERM)
    assert agent.wait() == 0
    assert exchange(held, "one") == "one"
    assert world.echo(VIP4, "10")["accepted_on"] == str(VIP4)
    now = agent_status(client, 1)["client"]
    assert (now["pid"], now["withdrawn"]) == (None, True)
    assert now["faults"][0].startswith("it offers no more, and nobody waits for its connections")
    agent = world.client("--wait", "60")
    assert exchange(held, "two") == "two"
    assert world.echo(VIP4, "10")["accepted_on"] == "10.0.0.11"
    assert "withdrawn" not in agent_status(client)["client"]
    agent.send_signal(signal.SIGTERM)
    until(lambda: agent_status(client)["client"].get("withdrawn"))
    assert exchange(held, "three") == "three"
    assert agent.poll() is None
    held.communicate()
    assert agent.wait() == 0
    assert (shown(client), left(client)) == (before, [])


def test_a_second_signal_ends_the_waiting(world: World):
    client = world.lab.client
    agent = world.client("--wait", "99999")
    held = world.python(client, "hold", str(VIP4), "80", ready=True)
    agent.send_signal(signal.SIGTERM)
    until(lambda: agent_status(client)["client"].get("withdrawn"))
    agent.send_signal(signal.SIGTERM)
    assert agent.wait(timeout=120) == 0
    assert exchange(held, "one") == "one"


def test_an_installation_under_traffic_breaks_nothing(world: World):
    """Killed and started again, over and over: no connection breaks, and none that begins meanwhile falls back."""
    client = world.lab.client
    agent = world.client()
    held = world.python(client, "hold_many", str(VIP4), "80", "30", ready=True)
    new = world.python(client, "keep_connecting", str(VIP4), "80", ready=True)
    for _ in range(5):
        agent.kill()
        agent.wait()
        agent = world.client()
        assert exchange(held, "still here") == "30"
    assert exchange(new, "end") == "['10.0.0.11']"


@pytest.mark.long
def test_an_installation_that_is_refused_leaves_the_one_before(world: World):
    client = world.lab.client
    agent = world.client()
    held = world.python(client, "hold", str(VIP4), "80", ready=True)
    agent.kill()
    agent.wait()
    before = shown(client), left(client)
    args = ["client", "--vip", "tcp://10.0.0.1:80", "--backends", "10.0.0.0/24"]
    assert client.run(*crablb("agent", *args, "--detach"), check=False).returncode == 2
    assert (shown(client), left(client)) == before
    assert exchange(held, "still here") == "still here"


@pytest.mark.long
def test_another_version_waits_for_the_connections_of_the_one_before(world: World):
    """One whose maps are not this version's: nothing is changed while connections need it; then it is replaced."""
    client = world.lab.client
    agent = world.client()
    held = world.python(client, "hold", str(VIP4), "80", ready=True)
    agent.kill()
    agent.wait()
    with inside(client.netns):
        (pins.folder("client") / "client_peers").unlink()
    before = shown(client), left(client)
    args = ["client", "--vip", f"tcp://{VIP4}:80", "--backends", "10.0.0.0/24", "--cgroup", str(client.cgroup)]
    done = client.run(*crablb("agent", *args, "--detach"), check=False)
    assert done.returncode == 2
    assert "is of another version, and has 1 connection; wait for the end: crablb agent remove client" in done.stderr
    assert (shown(client), left(client)) == before
    assert exchange(held, "still here") == "still here"
    held.communicate()
    done = client.run(*crablb("agent", *args, "--detach"))
    assert world.echo(VIP4, "10")["accepted_on"] == "10.0.0.11"


@pytest.mark.long
def test_tables_of_another_size(world: World):
    """Those of the agent before are kept while connections need them, which is said; then they are made anew."""
    client = world.lab.client
    args = ["client", "--vip", f"tcp://{VIP4}:80", "--backends", "10.0.0.0/24", "--cgroup", str(client.cgroup)]

    def install(*more: str) -> str:
        return str(client.run(*crablb("agent", *args, "--detach", *more)).stderr)

    def told() -> tuple[int, float]:
        found = agent_status(client)["client"]
        return found["room"], found["retransmission"]

    def timeout() -> float:
        """What the program goes by, which has the clock's resolution and may be a little later."""
        with inside(client.netns), bpf.Map.from_pin(pins.folder("client") / "client_settings") as settings:
            value = ffi.from_buffer("struct crab_client_settings *", settings.lookup(0))
            return float(value.rto / value.hz)

    assert install("--flows", "2048", "--retransmission", "0.1") == ""
    assert told() == (2048, 0.1)
    assert 0.1 <= timeout() < 0.13
    shown = client.run(*crablb("agent", "status")).stdout
    assert (
        "0 redirected connections (also closed ones), room for 2,048\n  a SYN that offered is sent again after 0.1 s\n"
        in shown
    )
    held = world.python(client, "hold", str(VIP4), "80", ready=True)
    assert install("--retransmission", "0") == ""  # of the same size, as none was asked for
    assert told() == (2048, 0)
    assert timeout() == 0
    assert "is sent again as the system does\n" in client.run(*crablb("agent", "status")).stdout
    (line,) = (json.loads(text) for text in install("--flows", "4096").splitlines())
    assert (line["level"], line["room"], line["asked_for"], line["connections"]) == ("warning", 2048, 4096, 1)
    assert "--flows does nothing" in line["event"]
    assert told() == (2048, 0.25)
    assert exchange(held, "still here") == "still here"
    held.communicate()
    with inside(client.netns):
        until(lambda: not ClientAgent.live())
    (line,) = (json.loads(text) for text in install("--flows", "4096").splitlines())
    assert (line["level"], line["room"], line["before"]) == ("info", 4096, 2048)
    assert told() == (4096, 0.25)
    assert world.echo(VIP4, "10")["accepted_on"] == "10.0.0.11"


@pytest.mark.long
def test_other_vips_in_its_place(world: World):
    """What is no VIP any more has no route of the agent's; its open connections end by themselves."""
    client = world.lab.client
    world.client().kill()
    args = ["client", "--vip", f"tcp://{VIP4}:80", "--backends", "10.0.0.0/24", "--cgroup", str(client.cgroup)]
    until(lambda: agent_status(client)["client"]["pid"] is None)
    assert client.run(*crablb("agent", *args, "--detach"), check=False).returncode == 0
    assert "encap" in client.run("ip", "route", "get", str(VIP4)).stdout
    assert "encap" not in client.run("ip", "-6", "route", "get", str(VIP6)).stdout
    assert world.echo(VIP4, "10")["accepted_on"] == "10.0.0.11"
    assert world.echo(VIP6, "10")["accepted_on"] == str(VIP6)


@pytest.mark.long
def test_another_cgroup_in_its_place(world: World):
    """The attachment moves: there is one, at the new cgroup."""
    client = world.lab.client
    other = client.cgroup / "other"
    other.mkdir()
    try:
        for cgroup in (client.cgroup, other):
            args = ["client", "--vip", f"tcp://{VIP4}:80", "--backends", "10.0.0.0/24", "--cgroup", str(cgroup)]
            assert client.run(*crablb("agent", *args, "--detach")).returncode == 0
        assert agent_status(client)["client"]["cgroup"] == str(other)
        assert world.echo(VIP4, "10")["accepted_on"] == str(VIP4)  # the client is not in it
        assert client.run(*crablb("agent", "remove"), check=False).returncode == 0
    finally:
        other.rmdir()


WRONG_WAITS = ["-1", "soon", "1e9", "inf", ""]


@pytest.mark.parametrize("wait", WRONG_WAITS)
def test_a_wrong_time(wait: str):
    done = subprocess.run(crablb("agent", "remove", f"--wait={wait}"), capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"crablb: --wait {wait}: is not a number of seconds (0 to 99999)\n"
