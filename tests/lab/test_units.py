"""The systemd units in deploy/: systemd understands them, and the agents can work with what they are given."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from crablb.lab import VIP4, Lab
from crablb.lab.demo import crablb
from tests.helpers.processes import ROOT, answer, until
from tests.helpers.world import World, agent_status

UNITS = sorted((ROOT / "deploy").glob("*.service"))
AGENTS = [unit for unit in UNITS if "agent" in unit.stem]


def value(unit: Path, key: str) -> str:
    (found,) = re.findall(rf"^{key}=(.*)$", unit.read_text(), re.MULTILINE)
    return str(found)


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_systemd_understands_it(unit: Path, tmp_path: Path):
    text = unit.read_text().replace("/usr/bin/crablb", "/bin/true")
    (tmp_path / unit.name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(tmp_path / unit.name)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    # Other units of this machine may be wrong; what concerns this one names it.
    assert [line for line in done.stderr.splitlines() if unit.stem in line] == []


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_what_it_is_kept_from(unit: Path):
    """systemd's own mark: 0 is nothing that it could do, 10 everything; in tenths."""
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--threshold=29", "--no-pager", str(unit)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_each_line_says_why(unit: Path):
    """What a unit is kept from has its reason above it, or above the lines that it stands with."""
    text = unit.read_text().partition("# ---- what it may do ----\n")[2].partition("\n[Install]")[0]
    for block in re.findall(r"(?:^#.*\n)*(?:^[A-Z].*\n)+", text, re.MULTILINE):
        assert block.startswith("#"), block
        assert block.count("\n") <= 8, f"one reason for so much: {block}"


def limited(unit: Path) -> list[str]:
    """What has a command run with the capabilities of the unit."""
    kept = ",".join("+" + name.removeprefix("CAP_").lower() for name in value(unit, "CapabilityBoundingSet").split())
    return ["setpriv", "--bounding-set", f"-all,{kept}", "--no-new-privs"]


def test_the_load_balancers_privileges_are_enough(make_world: Callable[..., World]):
    """With the capabilities of the unit it serves, is reloaded, restarted, and ends."""
    world = make_world()
    world.servers()
    program = [*limited(ROOT / "deploy/crablb.service"), *crablb()]
    for seconds in ("600", "0"):
        balancer = world.serve("--keep", seconds, program=program)
        assert world.echo(VIP4, "10")["intact"]
        balancer.terminate()
        assert balancer.wait() == 0
    assert "took over" in (world.folder / "serve.log").read_text()
    assert not list(world.lab.lb.pins.glob("lb-*"))


@pytest.mark.parametrize("unit", AGENTS, ids=lambda unit: unit.stem)
def test_its_privileges_are_enough(make_world: Callable[..., World], unit: Path):
    """With the capabilities of the unit the agent starts, works, and ends."""
    world = make_world()
    lab: Lab = world.lab
    role = unit.stem.removeprefix("crablb-agent-")
    node = lab.client if role == "client" else lab.servers[0]
    world.servers(agents=role == "client")
    world.serve()
    if role == "server":
        world.client()
    command = value(unit, "ExecStart").split()[1:-1]
    args = ["--vip", f"tcp://{VIP4}:80", *(["--backends", "10.0.0.0/24"] if role == "client" else [])]
    agent = world.program(
        node,
        *limited(unit),
        *crablb(*command, *args, "--cgroup", str(node.cgroup)),
    )  # fmt: skip
    assert answer(agent) == "ready"
    until(lambda: world.echo(VIP4, "10")["accepted_on"] == lab.servers[0].ip4, 60)
    if role == "client":  # which sends packets of its own
        assert world.client_counters()["verified"]
    agent.terminate()
    assert agent.wait() == 0
    assert role not in agent_status(node)


def test_the_client_has_time_to_end():
    """Longer than it waits for connections."""
    unit = ROOT / "deploy/crablb-agent-client.service"
    shown = subprocess.run(crablb("agent", "client", "--help"), capture_output=True, text=True, check=True).stdout
    default = re.search(r"--wait SECONDS.*?\(default:\s+(\d+)\)", shown, re.DOTALL)
    assert default and int(value(unit, "TimeoutStopSec")) > int(default[1])
