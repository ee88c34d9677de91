"""Agents in network namespaces that are named, or in all that there are."""

from __future__ import annotations

import json
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from crablb.agent.base import cgroup_root
from crablb.kernel import pins
from crablb.lab import VIP4, VIP6, Lab, Node
from crablb.lab.demo import VIPS, crablb
from tests.helpers.namespaces import Island, inside, unique
from tests.helpers.processes import answer, exchange, until
from tests.helpers.world import World, agent_status, command

pytestmark = pytest.mark.long

ALL = [part for vip in VIPS for part in ("--vip", vip)]
BACKENDS = ["--backends", "10.0.0.0/24", "--backends", "fd00::/64"]


@pytest.fixture
def world(make_world: Callable[..., World]) -> World:
    """Two servers without agents, and a load balancer."""
    world = make_world(servers=2)
    world.servers(agents=False)
    world.serve()
    return world


def within(*nodes: Node) -> list[str]:
    """The arguments for these nodes, and a cgroup that all of the lab's processes are in."""
    return [
        *(part for node in nodes for part in ("--netns", node.netns)),
        "--cgroup",
        str(nodes[0].cgroup.parent),
    ]


def start(world: World, *args: str) -> subprocess.Popen[str]:
    """An agent whose process is in the load balancer's node; it is ready."""
    child = world.program(world.lab.lb, *crablb("agent", *args))
    assert answer(child) == "ready"
    return child


def logged(child: subprocess.Popen[str], event: str) -> dict[str, str]:
    """The next line of the log about this."""
    assert child.stderr
    bound = threading.Timer(60, child.kill)
    bound.start()
    try:
        for line in child.stderr:
            told: dict[str, str] = json.loads(line)
            if told["event"] == event:
                return told
        raise AssertionError(f"it ended without {event!r}")
    finally:
        bound.cancel()


def left(lab: Lab) -> list[str]:
    """What agents keep in any of a lab's nodes."""
    names = [node.pins.name for node in lab.nodes.values()]
    kept = [path for name in names for path in (*pins.RUN.glob(f"{name}-*"), *pins.root().glob(f"{name}/*"))]
    of_load_balancers = [path for path in kept if "lb-eth0" in path.name or path.suffix in (".sock", ".api")]
    return [str(path) for path in kept if path not in of_load_balancers]


def test_one_process_for_several(world: World) -> None:
    """It serves those that it is told of, not its own; and all of it ends with it."""
    lab = world.lab
    servers = start(world, "server", *ALL, *within(*lab.servers))
    client = start(world, "client", *ALL, *BACKENDS, *within(lab.client))
    seen = {world.echo(VIP4, "10")["accepted_on"] for _ in range(20)} | {world.echo(VIP6, "10")["accepted_on"]}
    assert {server.ip4 for server in lab.servers} < seen
    assert str(VIP4) not in seen and str(VIP6) not in seen
    assert agent_status(lab.lb) == {}
    for node, role, process in ((lab.servers[0], "server", servers), (lab.client, "client", client)):
        assert agent_status(node)[role]["pid"] == process.pid  # the one to be stopped, not a child of it
    told = json.loads(command(lab.lb, "agent", "status", "--json", *within(*lab.nodes.values())[:-2]))
    assert {name for name, found in told.items() if found} == {n.netns for n in (lab.client, *lab.servers)}
    shown = command(lab.lb, "agent", "status", "--netns", str(lab.client.path), "--netns", lab.lb.netns)
    assert shown.startswith(f"netns {lab.client.path}:\nclient: process {client.pid}, ")
    assert shown.endswith(f"netns {lab.lb.netns}:\nno agent in this network namespace\n")
    for process in (servers, client):
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0
    assert left(lab) == []


def test_detached_and_changed_from_outside(world: World) -> None:
    lab = world.lab
    both = within(*lab.servers)[:-2]
    lab.lb.run(*crablb("agent", "server", *ALL, *within(*lab.servers), "--detach"))
    other = "tcp://10.0.0.101:80"
    changed = lab.lb.run(*crablb("agent", "server", *both, "add", other)).stdout
    assert changed == "".join(f"netns {server.netns}: {other}: added\n" for server in lab.servers)
    assert all(agent_status(server)["server"]["vips"] == [*VIPS, other] for server in lab.servers)
    first, second = lab.servers
    with inside(first.netns):
        (pins.folder("server") / "link").unlink()
    assert "not attached" in command(lab.lb, "agent", "status", *both, expected=1)
    mended = command(lab.lb, "agent", "repair", *both)
    lost = f"the program that answers redirects is not attached to cgroup {first.cgroup.parent}"
    assert mended == f"netns {first.netns}: mended; it was: {lost}\n"
    lab.lb.run(*crablb("agent", "server", "--netns", second.netns, "remove", other))
    assert [len(agent_status(server)["server"]["vips"]) for server in lab.servers] == [3, 2]
    gone = command(lab.lb, "agent", "remove", "server", *both)
    assert gone == "".join(f"netns {server.netns}: server: removed\n" for server in lab.servers)
    assert left(lab) == []


# ---- errors ----


def test_faults_name_their_namespace(world: World) -> None:
    """All of them, of all arguments, before anything is changed."""
    lab = world.lab
    wrong = within(lab.client, *lab.servers)
    wrong += ["--netns", str(lab.client.path), "--netns", "nowhere-at-all", "--wait", "x"]
    done = lab.lb.run(*crablb("agent", "client", *ALL, *BACKENDS, *wrong), check=False)
    assert done.returncode == 2
    said = done.stderr.splitlines()
    own = "is an address of this host; a client cannot redirect connections to itself"
    assert said[0] == "crablb: --wait x: is not a number of seconds (0 to 99999)"
    assert said[1].startswith("crablb: --netns nowhere-at-all: there is no such name; there are: ")
    assert said[2] == f"crablb: --netns {lab.client.path}: is the same as {lab.client.netns}; name it once"
    assert said[3:] == [f"crablb: netns {n.netns}: {vip} {own}" for n in lab.servers for vip in (VIP4, VIP6)]
    assert left(lab) == []


@pytest.mark.parametrize("detach", [[], ["--detach"]], ids=["process", "detached"])
def test_where_one_cannot_be_none_is(world: World, other_xdp_program: Path, detach: list[str]) -> None:
    """Found out when the other one is installed already."""
    lab = world.lab
    first, second = lab.servers
    second.ip(f"link set eth0 xdp obj {other_xdp_program} sec xdp")
    before = first.run("ip", "addr").stdout
    done = lab.lb.run(*crablb("agent", "server", *ALL, "--dsr", *within(first, second), *detach), check=False)
    assert done.returncode == 2
    (said,) = done.stderr.splitlines()
    assert said.startswith(f"crablb: netns {second.netns}: interface eth0 has an XDP program already")
    assert left(lab) == []
    assert first.run("ip", "addr").stdout == before


def test_another_agent_in_one_of_them(world: World) -> None:
    lab = world.lab
    lab.lb.run(*crablb("agent", "server", "--vip", VIPS[0], *within(lab.servers[1]), "--detach"))
    done = lab.lb.run(*crablb("agent", "server", *ALL, *within(*lab.servers)), check=False)
    assert done.returncode == 2
    where = f"crablb: netns {lab.servers[1].netns}: "
    assert all(line.startswith(where) for line in done.stderr.splitlines())
    assert f"{where}  {VIPS[1]} would be new" in done.stderr
    assert agent_status(lab.servers[0]) == {}
    assert agent_status(lab.servers[1])["server"]["vips"] == [VIPS[0]]


# ---- its end, and its children's ----


def children(process: subprocess.Popen[str]) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def test_a_service_manager_signals_all_of_them(world: World) -> None:
    """Connections are waited for all the same; a second signal ends that."""
    lab = world.lab
    start(world, "server", *ALL, *within(*lab.servers))
    agent = start(world, "client", *ALL, *BACKENDS, "--wait", "9999", *within(lab.client))
    held = world.python(lab.client, "hold", str(VIP4), "80", ready=True)
    for pid in (*children(agent), agent.pid):
        subprocess.run(["kill", "-TERM", str(pid)], check=True)
    until(lambda: agent_status(lab.client, None)["client"].get("withdrawn"))
    assert exchange(held, "still here") == "still here"
    assert agent.poll() is None
    agent.send_signal(signal.SIGTERM)
    assert agent.wait(timeout=120) == 0
    assert agent_status(lab.client, 1)["client"]["pid"] is None  # it stays, for what it translates
    assert exchange(held, "and here") == "and here"


def test_killed_it_is_taken_over(world: World) -> None:
    lab = world.lab
    servers = start(world, "server", *ALL, *within(*lab.servers))
    agent = start(world, "client", *ALL, *BACKENDS, *within(lab.client))
    held = world.python(lab.client, "hold", str(VIP4), "80", ready=True)
    all_of_them = children(servers) + children(agent)
    assert len(all_of_them) == 3
    for process in (servers, agent):
        process.kill()
        process.wait()
    until(lambda: not any(Path(f"/proc/{child}").exists() for child in all_of_them))
    assert agent_status(lab.client)["client"]["pid"] is None
    assert [agent_status(server)["server"]["pid"] for server in lab.servers] == [None, None]
    again = start(world, "client", *ALL, *BACKENDS, *within(lab.client))
    assert agent_status(lab.client)["client"]["pid"] == again.pid
    assert exchange(held, "still here") == "still here"


def test_a_child_that_is_killed_comes_again(world: World) -> None:
    lab = world.lab
    agent = start(world, "server", *ALL, *within(*lab.servers))
    (child, _) = children(agent)
    subprocess.run(["kill", "-9", str(child)], check=True)
    told = logged(agent, "no agent can be in this network namespace now")
    assert told["reason"] == "its process ended unexpectedly"
    assert told["netns"] in {server.netns for server in lab.servers}
    assert logged(agent, "an agent is in this network namespace now")["netns"] == told["netns"]
    assert [agent_status(server)["server"]["pid"] for server in lab.servers] == [agent.pid] * 2


# ---- namespaces come and go ----

GONE, COME = "this network namespace is gone", "an agent is in this network namespace now"


@pytest.fixture
def name(world: World) -> Iterator[str]:
    """Of a namespace that the test makes, once and again."""
    name = f"crab-{unique()}"
    yield name
    subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def make(world: World, name: str) -> None:
    """A namespace with a cable to the load balancer's node, which goes with it."""
    subprocess.run(["ip", "netns", "add", name], check=True)
    world.lab.lb.ip(f"link add probe type veth peer name eth0 netns {name}", "link set probe up")
    lines = ["addr add 10.0.9.2/24 dev eth0", "link set eth0 up", f"route add {VIP4} via 10.0.9.1"]
    lines.append("route add 10.0.0.0/24 via 10.0.9.1")
    subprocess.run(["ip", "-n", name, "-batch", "-"], input="\n".join(lines), text=True, check=True)


def test_one_that_goes_away_is_let_go(world: World, name: str) -> None:
    """Agents do not keep it, nor each other there; it is served again when it is made again."""
    lab = world.lab
    make(world, name)
    cgroup = within(lab.client)[-2:]
    server = start(world, "server", *ALL, "--netns", name, *within(lab.servers[0]))
    client = start(world, "client", "--vip", VIPS[0], "--backends", "10.0.0.0/24", "--netns", name, *cgroup)
    subprocess.run(["ip", "netns", "del", name], check=True)
    assert [logged(agent, GONE)["netns"] for agent in (server, client)] == [name, name]
    until(lambda: lab.lb.run("ip", "link", "show", "probe", check=False).returncode)
    assert agent_status(lab.servers[0])["server"]["pid"] == server.pid
    make(world, name)
    assert [logged(agent, COME)["netns"] for agent in (server, client)] == [name, name]
    found = json.loads(command(lab.lb, "agent", "status", "--json", "--netns", name, expected=1))[name]
    assert {role: status["pid"] for role, status in found.items()} == {"client": client.pid, "server": server.pid}


def test_a_process_in_it_keeps_it(world: World, name: str) -> None:
    """Without its name. Who named a process waits for no other one."""
    lab = world.lab
    make(world, name)
    inhabitant = world.program(lab.lb, "nsenter", f"--net=/run/netns/{name}", "sh", "-c", "echo ready; exec cat")
    assert answer(inhabitant) == "ready"
    args = ["client", "--vip", VIPS[0], "--backends", "10.0.0.0/24", *within(lab.client)[-2:]]
    path = f"/proc/{inhabitant.pid}/ns/net"
    agent = start(world, *args, "--netns", path)
    subprocess.run(["ip", "netns", "del", name], check=True)
    # A look that lets go of it would find the process that came into it later gone as well.
    other = world.program(lab.lb, "nsenter", f"--net={path}", "sh", "-c", "echo ready; exec cat")
    assert answer(other) == "ready"
    inhabitant.communicate()
    shown = command(lab.lb, "agent", "status", "--netns", f"/proc/{other.pid}/ns/net")
    assert f"client: process {agent.pid}" in shown
    assert agent.poll() is None
    other.communicate()
    assert logged(agent, GONE)["netns"] == path
    assert logged(agent, "none of the network namespaces is there any more")
    assert agent.wait() == 0


# ---- all of them ----


@pytest.fixture
def cgroup() -> Iterator[Path]:
    path = cgroup_root() / f"crablb-{unique()}"
    path.mkdir()
    yield path
    path.rmdir()


LINES = (
    "link add eth0 type veth peer name eth1",
    "link set eth0 up",
    "link set eth1 up",
    "addr add 10.0.0.1/24 dev eth0",
    f"route add {VIP4} via 10.0.0.2",
)


def test_all_that_there_are_and_will_be(tmp_path: Path, cgroup: Path) -> None:
    args = ["client", "--vip", VIPS[0], "--backends", "10.0.0.0/24", "--cgroup", str(cgroup), "--all-netns"]
    with Island(tmp_path) as island:

        def found() -> dict[str, dict[str, dict[str, object]]]:
            done = island.run(*crablb("agent", "status", "--json", "--all-netns"))
            parsed: dict[str, dict[str, dict[str, object]]] = json.loads(done.stdout)
            return parsed

        island.run("ip", "netns", "add", "red")
        island.ip(*LINES, netns="red")
        agent = island.popen(*crablb("agent", *args))
        assert answer(agent) == "ready"
        cannot = "no agent can be in this network namespace now"
        first = logged(agent, cannot)
        assert first["netns"] == "/proc/self/ns/net"
        assert first["reason"].startswith(f"no route to {VIP4}")
        assert set(found()) == {"red"}
        # A container: first it has nothing, then a network, then it ends.
        container = island.popen("unshare", "--net", "sh", "-c", "echo $$; exec cat")
        path = f"/proc/{answer(container)}/ns/net"
        assert logged(agent, cannot)["netns"] == path
        for line in LINES:
            island.run("nsenter", f"--net={path}", "ip", *line.split())
        assert logged(agent, COME)["netns"] == path
        assert set(found()) == {"red", path}
        container.communicate()
        assert logged(agent, GONE)["netns"] == path
        island.ip("netns del red")
        assert logged(agent, GONE)["netns"] == "red"
        island.ip("netns add red")
        island.ip(*LINES, netns="red")
        assert logged(agent, COME)["netns"] == "red"
        island.run("kill", "-TERM", str(found()["red"]["client"]["pid"]))
        assert agent.wait() == 0
        assert found() == {}
        assert list(tmp_path.glob("run/netns-*")) == []


def test_detached_in_all_of_them(tmp_path: Path, cgroup: Path) -> None:
    args = ["client", "--vip", VIPS[0], "--backends", "10.0.0.0/24", "--cgroup", str(cgroup), "--all-netns", "--detach"]
    with Island(tmp_path) as island:
        none = island.run(*crablb("agent", *args), check=False)
        assert none.returncode == 2
        assert f"crablb: netns /proc/self/ns/net: no route to {VIP4}; add one, as towards the load balancer" in (
            none.stderr.splitlines()
        )
        for name in ("green", "red"):
            island.run("ip", "netns", "add", name)
            island.ip(*LINES, netns=name)
        done = island.run(*crablb("agent", *args))
        assert [json.loads(line)["netns"] for line in done.stderr.splitlines()] == ["/proc/self/ns/net"]
        island.ip("link set eth0 down", "link set eth0 up", f"route add {VIP4} via 10.0.0.2", netns="red")
        shown = island.run(*crablb("agent", "status", "--all-netns"), check=False)
        assert shown.returncode == 1
        assert [line for line in shown.stdout.splitlines() if "netns" in line or "wrong" in line] == [
            "netns green:",
            "netns red:",
            f"  wrong: the agent's copy of the route to {VIP4} is missing",
        ]
        mended = island.run(*crablb("agent", "repair", "--all-netns")).stdout
        assert mended == f"netns red: mended; it was: the agent's copy of the route to {VIP4} is missing\n"
        gone = island.run(*crablb("agent", "remove", "--all-netns")).stdout
        assert gone == "netns green: client: removed\nnetns red: client: removed\n"
        said = "no agent in any network namespace"
        for ask in ("status", "remove"):
            assert island.run(*crablb("agent", ask, "--all-netns")).stdout == f"{said}\n"
        done = island.run(*crablb("agent", "repair", "--all-netns"), check=False)
        assert (done.returncode, done.stderr) == (
            2,
            f"crablb: there is {said}; install one: crablb agent server --vip ...\n",
        )
