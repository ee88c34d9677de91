"""What an agent that was killed at its start leaves to the next one: files, and no other opinion."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path

import pytest

from crablb.agent import ClientAgent, ServerAgent, limits
from crablb.agent.mptcp import Mptcp
from crablb.config import parse_vip
from crablb.kernel import pins

VIPS = [parse_vip("tcp://10.0.0.100:80")]
LEAD = Mptcp((ip_address("10.0.0.11"),), "leave")


@pytest.fixture(autouse=True)
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(pins, "RUN", tmp_path)
    monkeypatch.setattr(pins, "namespace", lambda: "netns-7")
    monkeypatch.setattr(pins, "root", lambda: tmp_path / "bpf")
    monkeypatch.setattr("crablb.agent.base.find_cgroup", lambda _: Path("/sys/fs/cgroup"))
    return tmp_path


def server(**more: object) -> ServerAgent:
    return ServerAgent(VIPS, **{"dsr": True, "mptcp": LEAD, **more})  # type: ignore[arg-type]


def test_one_that_died_before_it_had_noted_its_parts_is_no_other_agent():
    """The service manager starts it again as it was, without --replace."""
    server().remember()
    assert server().differs() == []
    assert server(dsr=False).differs() == ["it was installed with --dsr"]
    assert server(mptcp=None).differs() == ["it was installed with --mptcp=leave --mptcp-address 10.0.0.11"]
    assert server(sockets=True).differs() == ["it was installed without --mptcp-listeners"]


def test_a_version_of_before_noted_what_there_was():
    state = {"addresses": [], "sysctls": {}, "interfaces": {}}
    server().write({"vips": [str(vip) for vip in VIPS], "cgroup": "/sys/fs/cgroup", "dsr": state})
    assert server(mptcp=None).differs() == []
    assert server().differs() == ["it was installed without --mptcp"]


@pytest.mark.parametrize("agent", [ClientAgent, ServerAgent])
def test_files_of_one_that_died(run: Path, monkeypatch: pytest.MonkeyPatch, agent: type[ClientAgent | ServerAgent]):
    """At its start, or at writing its state."""
    monkeypatch.setattr(agent, "tear_down", classmethod(lambda *_: None))
    agent._starting_path().touch()
    Path(f"{agent.state_path()}.new").write_text('{"vips": [')
    agent.remove()
    assert list(run.iterdir()) == []


def test_files_of_limits(run: Path):
    Path(f"{limits._path()}.new").write_text("{")
    limits.release("client")
    assert list(run.iterdir()) == []
