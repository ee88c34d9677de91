"""The load balancer on a CPU of its own: which, by what count, and what is said where that cannot be."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bench import paper, peers, placement
from bench.context import Unavailable
from bench.figures import Row, Suite, Table
from bench.placement import Cpus, Used, mask, not_busy, siblings, strays, two_cpus
from tests.helpers.bench import quiet


@pytest.fixture
def allowed(monkeypatch):
    """CPUs that this process may use, as far as anybody asks; what it is put on."""
    state = {0, 1, 2, 3}

    def put(pid, cpus):
        state.clear()
        state.update(cpus)

    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(state))
    monkeypatch.setattr(os, "sched_setaffinity", put)
    return state


def topology(folder: Path, monkeypatch, lists: dict[int, str]) -> None:
    for cpu, text in lists.items():
        (folder / f"cpu{cpu}/topology").mkdir(parents=True)
        (folder / f"cpu{cpu}/topology/thread_siblings_list").write_text(f"{text}\n")
    monkeypatch.setattr(placement, "TOPOLOGY", folder)


@pytest.mark.parametrize(
    ("lists", "balancer", "one_core"),
    [
        ({cpu: str(cpu) for cpu in range(4)}, 2, False),
        ({0: "0-1", 1: "0-1", 2: "2-3", 3: "2-3"}, 1, False),
        ({0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"}, 2, False),
        (dict.fromkeys(range(4), "0-3"), 2, True),
        ({}, 2, False),
    ],
)
def test_of_another_core_if_there_is_one(allowed, tmp_path, monkeypatch, lists, balancer, one_core):
    topology(tmp_path, monkeypatch, lists)
    with two_cpus() as cpus:
        assert cpus == Cpus(3, balancer)
        assert cpus.one_core == one_core
        assert allowed == {3}
    assert allowed == {0, 1, 2, 3}


def test_siblings(tmp_path, monkeypatch):
    topology(tmp_path, monkeypatch, {5: "1,5,8-9"})
    assert siblings(5) == {1, 5, 8, 9}
    assert siblings(6) == {6}


def test_one_cpu_is_told(allowed):
    allowed.clear()
    allowed.add(7)
    with pytest.raises(Unavailable, match=r"it takes two CPUs, and this process may use one \(7\)"), two_cpus():
        pass


@pytest.mark.parametrize(
    ("cpu", "text"), [(0, "00000001"), (5, "00000020"), (31, "80000000"), (32, "00000001,00000000")]
)
def test_mask(cpu, text):
    """Documentation/core-api/printk-formats.rst, bitmap: groups of 32 bits, the highest first."""
    assert mask(cpu) == text


def test_what_is_not_busy():
    """user nice system idle iowait irq softirq steal guest guest_nice (proc_stat(5))."""
    stat = "cpu  9 9 9 9 9 9 9 9 9 9\ncpu1 1 2 4 8 16 32 64 128 0 0\ncpu10 0 0 0 1000 0 0 0 0 0 0\nintr 5\n"
    ticks = os.sysconf("SC_CLK_TCK")
    assert not_busy(stat, 1) == (8 + 16 + 128) / ticks
    assert not_busy(stat, 10) == 1000 / ticks
    with pytest.raises(Unavailable, match="does not have CPU 2"):
        not_busy(stat, 2)


def test_strays():
    assert strays("on the bridge", {0: 3, 1: 1000}, 1) == ""
    assert strays("on the bridge", {0: 30, 1: 1000}, 1) == "30 of 1030 packets on the bridge were not on CPU 1"
    assert strays("x", {0: 5, 1: 0}, 1) == "5 of 5 packets x were not on CPU 1"
    assert strays("x", {0: 0, 1: 0}, 1) == ""


def rows(**medians: float) -> dict[str, Row]:
    names = {"direct": "direct", "ours": "crablb, redirect", "nft": "nftables DNAT"}
    return {names[name]: Row(names[name], [value] * 3) for name, value in medians.items()}


def accounted(ours: float, whole: float) -> dict[str, dict[str, Row]]:
    return {
        "balancer": rows(direct=0.1, ours=ours, nft=26.0),
        "program": rows(direct=0.0, ours=5.0, nft=0.0),
        "endpoints": rows(direct=70.0, ours=85.0, nft=90.0),
        "whole_balancer": rows(direct=1.0, ours=whole, nft=40.0),
        "elapsed": rows(direct=100.0, ours=100.0, nft=100.0),
    }


def test_costs():
    tables = peers.costs(accounted(8.0, 12.0))
    assert [table.key for table in tables] == ["peers-cost-connection", "peers-cost-connection-ends"]
    notes = {row.name: row.note for row in tables[0].rows}
    assert notes == {
        "direct": "", "crablb, redirect": "5.0 of it in its program", "nftables DNAT": "0.0 of it in its program",
    }  # fmt: skip
    assert peers.costs({}) == []


def test_two_counts_of_one_thing_are_compared():
    quiet_cpu, busy = Used(whole_balancer=0.02, elapsed=1), Used(whole_balancer=0.5, elapsed=1)
    # 2 of each 100 us are not the load's: 8 of 12 - 2.
    said = peers.beside_whole(accounted(8.0, 12.0), quiet_cpu)
    assert "crablb, redirect 0.80, nftables DNAT 0.68." in said and "more than" not in said
    for ours, share in ((4.0, "0.40"), (12.0, "1.20")):
        said = peers.beside_whole(accounted(ours, 12.0), quiet_cpu)
        assert said.endswith(f"That is more than interrupts and idling explain: crablb, redirect {share}.")
    assert "could not be told" in peers.beside_whole(accounted(8.0, 12.0), busy)


def test_tables_are_side_by_side():
    found = {"connections": rows(direct=10.0, ours=8.0), "cpu": rows(direct=1.0, ours=2.0)}
    apart = {"connections": rows(direct=10.0, ours=9.0)}
    tables = peers.tables(found, apart)
    assert [table.key for table in tables] == ["peers-connections", "peers-apart-connections", "peers-cpu"]
    assert tables[1].title == f"{tables[0].title}; the load balancer on a CPU of its own"
    assert all(table.baseline == "direct" for table in tables)


def test_figures_7_and_9_without_a_second_cpu(allowed, monkeypatch):
    """They are of one layout, and the reason is there."""
    allowed.clear()
    allowed.add(0)
    monkeypatch.setattr(paper, "p99s", lambda context, suite, cpus: {"CRR": rows(direct=1.0), "RR": rows(direct=2.0)})
    suite = Suite("paper", "")
    paper.figures_7_and_9(quiet(), suite)
    assert [table.key for table in suite.tables] == ["paper-crr", "paper-rr"]
    (reason,) = suite.left_out
    assert reason.startswith("figures 7 and 9, the load balancer on a CPU of its own: it takes two CPUs")
    assert {curve.name for plot in suite.plots for curve in plot.curves} == {"CRR", "RR"}


def test_the_tables_of_programs_are_the_endpoints():
    names = ("crablb, redirect: crab_server", "crablb, redirect: crab_lb", "XDP redirect: x")
    programs = Table("peers-bpf", "", "us", [Row(name, [2.0]) for name in names])
    assert peers.run_time(programs) == 2.0
