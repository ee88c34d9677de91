"""The benchmarks run; what they measure decides nothing here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

from crablb.policy import BUILTIN, CONSISTENT
from tests.conftest import ROOT


def test_hot_loop():
    done = subprocess.run(["make", "-s", "-C", "bench", "RUNS=1"], cwd=ROOT, capture_output=True, text=True, check=True)
    rows = [line for line in done.stdout.splitlines() if re.search(r"\d+\.\d \( *\d+\.\d - +\d+\.\d\)", line)]
    names = [row.split()[0] for row in rows[6:]]
    assert names == [name for name in BUILTIN if name not in CONSISTENT]


def test_python_policies():
    done = subprocess.run(
        [sys.executable, "bench/pypolicy.py", "1"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert len(done.stdout.splitlines()) == 5


def test_uneven_servers(namespace, tmp_path):
    """Requests are answered under each policy; what they took decides nothing."""
    out = tmp_path / "times.json"
    policies = ["--policy", "random", "--policy", "least-connections"]
    subprocess.run(
        [sys.executable, "bench/uneven.py", "--seconds", "1", "--rounds", "1", *policies, "--json", str(out)],
        cwd=ROOT, check=True,
    )  # fmt: skip
    found = json.loads(out.read_text())
    assert found["rate"] == 250
    assert [len(rounds) for rounds in found["times"].values()] == [1, 1]
    assert all(len(times) > 150 and min(times) >= 5 for rounds in found["times"].values() for times in rounds)


def test_bypass(namespace):
    done = subprocess.run(
        [sys.executable, "bench/bypass.py", "1000"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    rows = [line.split(",")[0] for line in done.stdout.splitlines()]
    assert rows.count("1") == (4 if len(os.sched_getaffinity(0)) > 1 else 2)
    assert done.stdout.count("MiB") == 2
