"""The xsk suite runs, as small as it can; what it measures decides nothing here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bench import daemon, xsk
from tests.helpers.bench import quiet, written

pytestmark = [pytest.mark.long, pytest.mark.xdist_group("bench-xsk")]


@pytest.fixture(scope="module")
def suite():
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("it needs two CPUs")
    before = Path("/proc/thread-self/ns/net").stat().st_ino
    found = xsk.run(quiet())
    assert Path("/proc/thread-self/ns/net").stat().st_ino == before
    assert not list(Path("/run/netns").glob(f"crab-xsk-{os.getpid()}-*"))
    return found


def test_what_it_writes(suite):
    written(suite)


def test_all_is_there(suite):
    units = {table.key: table.unit for table in suite.tables}
    units.pop("xsk-queues", None)  # with four CPUs
    units.pop("xsk-user", None)  # so short a time may be less than a tick
    assert units == {
        "xsk-raw": "Mpps",
        "xsk-serve": "Mpps",
        "xsk-offered": "Mpps",
        "daemon-start": "s",
        "daemon-phases": "ms",
        "daemon-memory": "MiB",
        "daemon-parts": "MiB",
        "daemon-idle": "% of a core",
        "xsk-latency": "us",
    }
    assert {plot.key for plot in suite.plots} == {"xsk-mpps", "paper-fig8"}
    assert [target.name for target in suite.targets] == ["P2", "P10"]
    serve = {row.name for row in suite.table("xsk-serve").rows}
    assert {
        "raw l2fwd",
        "crablb serve",
        "crablb serve, generic",
        "XDP redirect",
        "XDP, MAC addresses only",
        "nftables",
    } <= serve
    # Everything forwarded something, in the native and in the generic mode.
    for key in ("xsk-raw", "xsk-serve", "xsk-latency", "daemon-start", "daemon-phases"):
        assert all(min(row.samples) > 0 for row in suite.table(key).rows), key
    assert all(reason.startswith("two queues: ") for reason in suite.left_out), suite.left_out


def test_phases_of_a_start(suite):
    at = {row.name: row.median for row in suite.table("daemon-phases").rows}
    assert set(at) == {daemon.INTERPRETER, daemon.MODULES, daemon.VERIFIED, daemon.FIRST, daemon.READY}
    assert at[daemon.FIRST] == pytest.approx(1e3 * suite.table("daemon-start").row("crablb serve").median)


def test_parts_of_memory(suite):
    parts = {row.name: row.median for row in suite.table("daemon-parts").rows}
    assert set(parts) == {*daemon.PARTS, daemon.ANONYMOUS}
    # What is resident is counted by CPU (proc_pid_status(5)): some pages more or less.
    assert sum(parts.values()) == pytest.approx(suite.table("daemon-memory").row(daemon.ALL).median, abs=2)
    assert parts["the UMEM"] == pytest.approx(8, abs=0.5)  # 4,096 frames of 2 KiB, and room for one packet


@pytest.mark.skipif(os.geteuid() != 0 or len(os.sched_getaffinity(0)) < 2, reason="root and two CPUs are needed")
def test_two_queues_carry_what_comes_by_both():
    """On two CPUs, which their sources share: a rate that means nothing, but nothing is stuck."""
    cpus = sorted(os.sched_getaffinity(0))[:2]
    assert xsk.served_by_two(quiet(), cpus, cpus) > 0
