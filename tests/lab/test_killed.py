"""Load balancers that are killed at each call by which they change something: what is left is whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.namespaces import Pair
from tests.helpers.processes import ROOT

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def killer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    built = tmp_path_factory.mktemp("killer") / "killer.so"
    source = ROOT / "tests" / "helpers" / "killer.c"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O2", "-Wall", "-Werror", "-o", built, source], check=True)
    return built


@pytest.mark.parametrize("scenario", ["start", "takeover", "other-seed", "reload", "stop"])
def test_killed_at_each_step(killer: Path, scenario: str):
    """A program is attached by a pinned link, and the flows can be adopted, at each instant; the next one serves."""
    with Pair.made() as pair:
        pair.ip("addr", "add", "10.0.0.2/24", "dev", "veth0")
        for n in range(11, 15):
            pair.ip("neigh", "add", f"10.0.0.{n}", "lladdr", f"02:00:00:00:00:{n}", "dev", "veth0", "nud", "permanent")
        done = subprocess.run(
            [sys.executable, "-m", "tests.helpers.killed", scenario],
            env={**os.environ, "LD_PRELOAD": str(killer)},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["points"] > 3
    assert (found["faults"], found["left"], found["program"]) == ({}, [], 0)
