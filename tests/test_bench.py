"""The benchmarks run; what they measure decides nothing here."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from tests.conftest import ROOT


def test_hot_loop():
    done = subprocess.run(["make", "-s", "-C", "bench", "RUNS=1"], cwd=ROOT, capture_output=True, text=True, check=True)
    rows = [line for line in done.stdout.splitlines() if re.search(r"\d+\.\d \( *\d+\.\d - +\d+\.\d\)", line)]
    assert len(rows) == 6


def test_bypass(namespace):
    done = subprocess.run(
        [sys.executable, "bench/bypass.py", "1000"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    rows = [line.split(",")[0] for line in done.stdout.splitlines()]
    assert rows.count("1") == (4 if len(os.sched_getaffinity(0)) > 1 else 2)
    assert done.stdout.count("MiB") == 2
