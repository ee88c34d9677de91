"""The client's side of MPTCP: the kernel's limits, set and put back; and what is said where they hinder."""

from __future__ import annotations

import signal
from collections.abc import Callable
from subprocess import PIPE, Popen

import pytest

from crablb.agent import limits as notes
from crablb.lab import Lab, Node
from crablb.lab.demo import VIPS, crablb
from tests.helpers.covering import covering
from tests.helpers.namespaces import inside
from tests.helpers.processes import answer, until
from tests.helpers.world import agent_status, command

#: The kernel's own.
BEFORE = {"add_addr_accepted": 0, "subflows": 2}
PREPARED = {"add_addr_accepted": 1, "subflows": 2}
OF_VIPS = ("--vip", VIPS[0], "--backends", "10.0.0.0/24")


def limits(node: Node) -> dict[str, int]:
    words = node.run("ip", "mptcp", "limits", "show").stdout.split()
    return {name: int(value) for name, value in zip(words[::2], words[1::2], strict=True)}


def set_limits(node: Node, accepted: int, subflows: int = 2) -> None:
    node.run("ip", "mptcp", "limits", "set", "add_addr_accepted", str(accepted), "subflows", str(subflows))


def start(node: Node, *args: str) -> Popen[str]:
    """The agent's process; on return it works."""
    child = node.popen(*crablb("agent", "client", *args), stdin=PIPE, stdout=PIPE, stderr=PIPE)
    assert answer(child) == "ready"
    return child


def end(child: Popen[str]) -> None:
    child.terminate()
    assert child.wait() == 0


@pytest.fixture
def client(make_lab: Callable[..., Lab]) -> Node:
    return make_lab().client


def programs(node: Node) -> list[str]:
    return [path.name for path in node.pins.glob("client/*")]


@pytest.mark.parametrize("more", [(), OF_VIPS], ids=["alone", "with-vips"])
def test_set_and_put_back(client, more):
    """Set while it works; put back at its end, after a SIGKILL by the next one, or by ``agent remove``."""
    assert limits(client) == BEFORE
    child = start(client, "--mptcp", *more)
    assert limits(client) == PREPARED
    assert bool(programs(client)) == bool(more)
    told = agent_status(client)["client"]
    assert told["mptcp"] == {"asked_for": True, "hindered": ""}
    assert told["faults"] == []
    assert "MPTCP sockets take up servers' addresses" in command(client, "agent", "status")
    end(child)
    assert limits(client) == BEFORE
    assert agent_status(client) == {}
    killed = start(client, "--mptcp", *more)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert limits(client) == PREPARED
    end(start(client, "--mptcp", *more))
    assert limits(client) == BEFORE
    # One that leaves it be puts back what the one before set.
    command(client, "agent", "client", "--mptcp", "--detach", *more)
    assert limits(client) == PREPARED
    if more:
        command(client, "agent", "client", "--detach", *more)
        assert limits(client) == BEFORE
        command(client, "agent", "client", "--mptcp", "--detach")  # and the programs go
        assert programs(client) == []
        assert limits(client) == PREPARED
        command(client, "agent", "client", "--mptcp", "--detach", *more)
        assert limits(client) == PREPARED
    command(client, "agent", "remove", "client")
    assert limits(client) == BEFORE


def test_others_limits(client):
    """More than is needed is let be; what somebody changes meanwhile stays so."""
    set_limits(client, 4, 5)
    end(start(client, "--mptcp"))
    assert limits(client) == {"add_addr_accepted": 4, "subflows": 5}
    set_limits(client, 0, 6)
    child = start(client, "--mptcp")
    assert limits(client) == {"add_addr_accepted": 1, "subflows": 6}
    set_limits(client, 3, 6)
    end(child)
    assert limits(client) == {"add_addr_accepted": 3, "subflows": 6}


def test_what_somebody_changed_is_put_back_too(client):
    """Not what was there at first; and each limit by itself."""
    command(client, "agent", "client", "--mptcp", "--detach")
    set_limits(client, 0, 6)
    command(client, "agent", "repair")
    assert limits(client) == {"add_addr_accepted": 1, "subflows": 6}
    command(client, "agent", "remove", "client")
    assert limits(client) == {"add_addr_accepted": 0, "subflows": 6}


@covering(first=["client", "server"], last=["server", "client"])
def test_both_agents_in_one_namespace(make_lab, first, last):
    """Whoever comes and goes first: each has what it needs, and what was there is put back."""
    (node,) = make_lab(offload=False).servers
    set_limits(node, 0, 1)
    agents = {"client": ["client"], "server": ["server", "--vip", VIPS[0]]}
    for role in sorted(agents, key=lambda role: role != first):
        command(node, "agent", *agents[role], "--mptcp", "--detach")
    assert limits(node) == PREPARED
    (gone,) = agents.keys() - {last}
    command(node, "agent", "remove", gone)
    assert limits(node) == (PREPARED if last == "client" else {"add_addr_accepted": 0, "subflows": 2})
    assert not any("limits" in fault for one in agent_status(node, None).values() for fault in one["faults"])
    command(node, "agent", "remove", last)
    assert limits(node) == {"add_addr_accepted": 0, "subflows": 1}


@pytest.mark.parametrize("junk", ["{", "[]", '{"asked": 1, "raised": {}}'])
def test_a_damaged_note_of_limits(client, junk):
    """What was found is not known any more: it is as if it were found so."""
    command(client, "agent", "client", "--mptcp", "--detach")
    with inside(client.netns):
        notes._path().write_text(junk)
    command(client, "agent", "status")
    command(client, "agent", "remove", "client")
    assert limits(client) == PREPARED


def test_lost_limits_are_mended(client):
    command(client, "agent", "client", "--mptcp", "--detach")
    set_limits(client, 0)
    (fault,) = agent_status(client, 1)["client"]["faults"]
    assert "may not take up a server's address: limits are add_addr_accepted 0 subflows 2" in fault
    assert "mended" in command(client, "agent", "repair")
    assert limits(client) == PREPARED
    set_limits(client, 0)
    child = start(client, "--mptcp")
    set_limits(client, 0)
    until(lambda: limits(client) == PREPARED)
    end(child)
    assert limits(client) == BEFORE


def test_what_hinders_is_said(client):
    """An agent that was not asked for MPTCP tells why MPTCP sockets go by the load balancer; that is no fault."""
    command(client, "agent", "client", "--detach", *OF_VIPS)

    def hindered(expected: int = 0) -> str:
        told = agent_status(client, expected)["client"]["mptcp"]
        assert told["asked_for"] is (expected == 1)
        said: str = told["hindered"]
        return said

    assert "add_addr_accepted 0 subflows 2); let them: crablb agent client --mptcp" in hindered()
    assert "go by the load balancer: the kernel's limits" in command(client, "agent", "status")
    client.run("ip", "mptcp", "endpoint", "add", client.ip4, "subflow", "fullmesh")
    assert hindered() == ""
    client.run("ip", "mptcp", "endpoint", "flush")
    set_limits(client, 1)
    assert hindered() == ""
    client.set({"net.mptcp.enabled": 0})
    assert "MPTCP is switched off" in hindered()
    client.set({"net.mptcp.enabled": 1})
    # Another path manager: named, and not fought over.
    set_limits(client, 0)
    client.set({"net.mptcp.pm_type": 1})
    assert "led by another program" in hindered()
    command(client, "agent", "client", "--mptcp", "--detach", *OF_VIPS)
    assert "led by another program" in hindered(1)
    assert "not mended: MPTCP connections are led" in command(client, "agent", "repair", expected=1)
    assert client.run("sysctl", "-n", "net.mptcp.pm_type").stdout == "1\n"


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ([], "the following arguments are required: --vip, --backends"),
        (["--vip", VIPS[0], "--mptcp"], "the following arguments are required: --backends"),
        (["--backends", "10.0.0.0/24", "--mptcp"], "--backends: of use with --vip only"),
        (["--mptcp", "--flows", "5000", "--verify"], "--flows, --verify: of use with --vip only"),
    ],
)
def test_arguments(client, capfd, args, said):
    command(client, "agent", "client", *args, expected=2)
    assert said in capfd.readouterr().err
    assert agent_status(client) == {}


@pytest.mark.parametrize("more", [(), OF_VIPS], ids=["alone", "with-vips"])
def test_off(client, capfd, more):
    client.set({"net.mptcp.enabled": 0})
    command(client, "agent", "client", "--mptcp", *more, expected=2)
    assert "--mptcp: MPTCP is switched off (net.mptcp.enabled is 0); switch it on" in capfd.readouterr().err
    assert agent_status(client) == {}
    assert programs(client) == []
    assert limits(client) == BEFORE
