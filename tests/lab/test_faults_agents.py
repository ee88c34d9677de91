"""System calls of agents that fail, clocks that step, netlink that overruns, processes that stand still: clients are
served all the while, redirected and led away again without anybody's help afterwards, and nobody floods a log."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack
from errno import EMFILE, ENFILE, ENOBUFS, ENOMEM, EPERM
from errno import errorcode as NAMES
from typing import Any

import pytest

from crablb.kernel import pins
from crablb.lab import Lab, Node
from crablb.lab.demo import VIPS as SERVICES
from crablb.lab.demo import crablb
from tests.helpers.mptcp import VIPS, Ends, prepare_client
from tests.helpers.namespaces import inside, unique
from tests.helpers.processes import until
from tests.helpers.secret import secret
from tests.helpers.shim import Shim
from tests.helpers.world import World, agent_status

#: Seconds in which all is as before: of threads that pause, of looks that are seldom.
SOON = 90
#: Lines that an agent may log while such a call fails.
FEW = 40


class Agents:
    """A client that redirects to the IPv4 VIP are for, and a server that leads MPTCP clients of the IPv6 one away; both
    agents' calls go by rules."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.client, (self.server,) = world.lab.client, world.lab.servers
        Ends(world).servers()
        prepare_client(self.client)
        master, own = (world.folder / name for name in ("master", "own"))
        secret(master, bytes(range(32)).hex())
        secret(own, self.server.run(*crablb("key", "backend", self.server.ip4, "--master", str(master))).stdout)
        world.serve("--report-listen", world.lab.lb.ip4, "--report-key", str(master))
        four, six = SERVICES
        prefixes = [part for prefix in world.lab.prefixes() for part in ("--backends", prefix)]
        report = ["--report", world.lab.lb.ip4, "--report-key", str(own)]
        started = {
            # As the system does: on a busy machine what comes late would be taken for lost, and nothing offered.
            "client": ["--vip", four, *prefixes, "--retransmission", "0"],
            "server": ["--vip", four, "--vip", six, "--mptcp=leave", *report],
        }
        self.shims = {role: Shim.made(world.folder, role) for role in started}
        self.logs = {role: world.folder / f"{role}.log" for role in started}
        self.processes = {}
        for role, more in started.items():
            node = self.node(role)
            with open(self.logs[role], "w") as log:
                self.processes[role] = node.popen(
                    *crablb("agent", role, "--cgroup", str(node.cgroup), *more),
                    env={**os.environ, **self.shims[role].env},
                    stderr=log,
                    stdout=log,
                )
        for role in started:
            until(lambda role=role: "ready" in self.logs[role].read_text())  # type: ignore[misc]
        self._visitor = Ends(world).visitor()

    def node(self, role: str) -> Node:
        return self.client if role == "client" else self.server

    def visit(self, family: int, protocol: str) -> dict[str, Any]:
        """A new connection: what it was."""
        told: dict[str, Any] = self._visitor.tell(VIPS[family], protocol)
        assert told["intact"]
        return told

    def redirected(self) -> bool:
        return bool(self.visit(4, "tcp")["accepted_on"] == self.server.ip4)

    def led_away(self) -> bool:
        """A connection, which is given some seconds."""
        self.visit(6, "mptcp")
        try:
            until(lambda: agent_status(self.server, None)["server"]["mptcp"]["connections"]["direct"] == 1, 10)
        except AssertionError:
            return False
        return True

    def whole(self) -> bool:
        return not any(agent_status(self.node(role), None)[role]["faults"] for role in self.shims)

    def calm(self) -> None:
        """All works."""
        for works in (self.redirected, self.led_away, self.whole):
            try:
                until(works, SOON)
            except AssertionError:
                said = [agent_status(self.node(role), None) for role in self.shims]
                raise AssertionError(works.__name__, said, {r: self.lines(r)[-20:] for r in self.shims}) from None

    def lines(self, role: str) -> list[str]:
        return self.logs[role].read_text().splitlines()

    def change(self) -> None:
        """What agents look after is changed: the way to the VIP, and what is told of connections."""
        for source in ("10.0.0.51", self.client.ip4):
            self.client.ip(f"route replace {VIPS[4]}/32 via {self.world.lab.lb.ip4} src {source}")
        self.server.run("ip", "link", "set", "eth0", "mtu", "1450")
        self.server.run("ip", "link", "set", "eth0", "mtu", "1500")

    def close(self) -> None:
        for shim in self.shims.values():
            shim.end()
        self._visitor.child.kill()
        for role, process in self.processes.items():
            process.terminate()
            assert process.wait(60) == 0, self.logs[role].read_text()
            with inside(self.node(role).netns):
                left = [*pins.folder(role).glob("*"), *pins.RUN.glob(f"{pins.namespace()}-{role}*")]
                assert [path for path in left if path.suffix != ".lock"] == []


@pytest.fixture(scope="module")
def agents(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agents]:
    with ExitStack() as stack:
        lab = stack.enter_context(Lab.create(unique(), "bridge", 1, offload=False))
        lab.client.ip("addr add 10.0.0.51/24 dev eth0")
        made = Agents(World(lab, tmp_path_factory.mktemp("agents")))
        yield made
        made.close()
        for log in made.logs.values():
            assert "Traceback" not in log.read_text()


#: Calls of either agent while it works, what they are of, and what becomes of them.
BOTH = [
    ("socket", "netlink", ENOMEM),
    ("socket", "", EMFILE),
    ("send", "netlink", ENOBUFS),
    ("recv", "netlink", ENOBUFS),
    ("recv", "netlink", ENOMEM),
    ("poll", "", ENOMEM),
    ("open", "", EMFILE),
    ("bpf", "command 1.", ENOMEM),
]
CALLS = [
    *((role, *case) for case in BOTH for role in ("client", "server")),
    ("client", "open", "/crablb", ENFILE),
    ("client", "bpf", "command 2.", EPERM),
    ("client", "bpf", "command 7.", ENOMEM),
    ("server", "sendto", "inet", ENOBUFS),  # reports
]
QUICK = [("client", "bpf", "command 1.", ENOMEM), ("server", "recv", "netlink", ENOBUFS)]


def named(case: tuple[str, str, str, int]) -> str:
    role, call, of, does = case
    return f"{role}-{call}-{of}-{NAMES[does]}".replace(" ", "")


def upset(agents: Agents, case: tuple[str, str, str, int]) -> None:
    role, call, of, does = case
    agents.calm()
    before = len(agents.lines(role))
    with agents.shims[role].rule(call, of, does) as rule:
        agents.change()
        for _ in range(2):
            agents.visit(4, "tcp")
            agents.visit(6, "mptcp")
        until(lambda: rule.hits)
    agents.calm()
    lines = agents.lines(role)[before:]
    assert not [line for line in lines if "Traceback" in line]
    assert len(lines) < FEW
    assert agents.processes[role].poll() is None


@pytest.mark.xdist_group("agents")
@pytest.mark.parametrize("case", QUICK, ids=named)
def test_a_call_of_an_agent_fails(agents, case):
    upset(agents, case)


@pytest.mark.long
@pytest.mark.xdist_group("agents")
@pytest.mark.parametrize("case", CALLS, ids=named)
def test_every_call_of_an_agent_fails_for_a_while(agents, case):
    upset(agents, case)


@pytest.mark.long
@pytest.mark.xdist_group("agents")
def test_the_clock_steps(agents):
    """A month ahead, and behind; nothing is said about it."""
    agents.calm()
    before = {role: len(agents.lines(role)) for role in agents.shims}
    for month in (1, -1, 0):
        for shim in agents.shims.values():
            shim.step_clock(month * 30 * 86400)
        agents.change()
        agents.calm()
    for role, log in agents.logs.items():
        assert not [line for line in agents.lines(role)[before[role] :] if '"level": "error"' in line], log.read_text()


@pytest.mark.long
@pytest.mark.xdist_group("agents")
@pytest.mark.parametrize("role", ["client", "server"])
def test_it_is_stopped_for_ten_seconds(agents, role):
    """Meanwhile more happens than netlink has room for, and clients are served; afterwards all is as it was told."""
    agents.calm()
    before = len(agents.lines(role))
    process, node, end = agents.processes[role], agents.node(role), time.monotonic() + 10
    process.send_signal(signal.SIGSTOP)
    try:
        while time.monotonic() < end:
            for what in ("add", "del"):
                node.ip(*(f"route {what} 10.{200 + n % 50}.{n // 50}.0/24 dev eth0" for n in range(1000)))
            agents.change()
            agents.visit(4, "tcp")
            agents.visit(6, "mptcp")
    finally:
        process.send_signal(signal.SIGCONT)
    agents.calm()
    assert len(agents.lines(role)) - before < FEW
