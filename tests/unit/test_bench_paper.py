"""The suites paper and policies, as small as they can be; what they measure decides nothing here."""

from __future__ import annotations

import json
import os
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import machine, paper, policies
from bench.context import Context
from bench.farm import Farm, Unavailable, Way
from bench.figures import Results, Row, Suite
from tests.conftest import ROOT


def quiet() -> Context:
    return Context("tiny", say=lambda _: None)


# ---- the simulation ----


@given(st.lists(st.tuples(st.floats(0, 3), st.integers(0, 2)), max_size=60))
def test_response_times(requests):
    """As one request after the other has them."""
    arrivals = np.cumsum([gap for gap, _ in requests])
    servers = np.array([server for _, server in requests], np.int64)
    free: dict[int, float] = {}
    expected = []
    for at, server in zip(arrivals, servers, strict=True):
        free[server] = max(at, free.get(server, 0.0)) + 1
        expected.append(free[server] - at)
    assert np.allclose(paper.response_times(arrivals, servers), expected)


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_mean_of_an_md1_queue(load):
    """Random choice makes M/D/1 lines: service plus load / (2 (1 - load)) (Pollaczek and Khinchine)."""
    random = np.random.default_rng(7)
    arrivals = np.cumsum(random.exponential(1 / (load * paper.SERVERS), 400_000))
    times = paper.response_times(arrivals, paper.by_chance(random, len(arrivals)))
    assert times.mean() == pytest.approx(1 + load / (2 * (1 - load)), rel=0.03)


def test_round_robins():
    random = np.random.default_rng(1)
    assert paper.in_turn(random, 33).tolist() == [*range(16), *range(16), 0]
    chosen = paper.in_turn_by_client(random, 160_000)
    # Clients begin anywhere and are not in step, but each goes round: in the end all have served as many.
    assert np.ptp(np.bincount(chosen, minlength=16)) <= paper.CLIENTS
    assert len(set(chosen[:16].tolist())) < 16


def test_order_of_the_policies():
    """At every load: random is the worst, and central round-robin the best; all are 1 when there is next to no load."""
    for load in (0.5, 0.7, 0.9):
        worst, between, best = (paper.simulate(policy, load, 60_000, 3) for policy in paper.SIMULATED)
        assert worst > between > best
    assert all(paper.simulate(policy, 0.001, 5_000, 3) == pytest.approx(1, abs=0.1) for policy in paper.SIMULATED)


def test_figure_4_is_the_same_each_time():
    suites = [Suite("paper", ""), Suite("paper", "")]
    for suite in suites:
        paper.figure_4(quiet(), suite)
    assert suites[0] == suites[1]
    (table,) = suites[0].tables
    assert len(table.rows) == len(paper.SIMULATED) * len(paper.LOADS)


# ---- the suites ----


@pytest.fixture(scope="module", params=[paper, policies], ids=["paper", "policies"])
def suite(request):
    if os.geteuid() != 0:
        pytest.skip("network namespaces and BPF need root")
    found = request.param.run(quiet())
    assert not list(Path("/run/netns").glob(f"crab-bench-*-{os.getpid()}-*"))
    return found


def test_what_they_write(suite):
    data = Results("tiny", machine.describe(), [suite]).json()
    jsonschema.validate(data, json.loads((ROOT / "bench/schema.json").read_text()))


def test_all_is_there(suite):
    assert suite.left_out == []
    for table in suite.tables:
        assert table.rows
        assert all(min(row.samples) > 0 for row in table.rows), table.key
    plots = {plot.key: plot for plot in suite.plots}
    if suite.name == "policies":
        assert [table.key for table in suite.tables] == ["policies-p50", "policies-p99"]
        assert all([row.name for row in table.rows] == list(policies.POLICIES) for table in suite.tables)
        assert plots.keys() == {"policies"}
        return
    assert list(plots) == [f"paper-fig{n}" for n in ("4", "7", "9", "10-rr", "10-crr", "11", "12")]
    for plot in plots.values():
        assert {curve.source for curve in plot.curves} == {"here", "paper"}, plot.key
        assert plot.note
    assert [target.name for target in suite.targets] == ["P5"]


def test_p5():
    def rows(ours: float) -> dict[str, Row]:
        return {
            "redirected, 16,384 bytes": Row("", [ours, ours, ours]),
            "DSR, 16,384 bytes": Row("", [90.0, 91.0, 89.0]),
        }

    reached = paper.p5(rows(270.0), 16384)
    assert (reached.reached, reached.why) == (True, "")
    assert reached.value.startswith("3.00 times, 270 Mbit/s beside 90: messages of 16 KiB")
    missed = paper.p5(rows(200.0), 16384)
    assert missed.reached is False
    assert missed.why == "3 links carry 2.00 of 3"


def test_servers_that_do_not_report_are_told(monkeypatch, tmp_path):
    if os.geteuid() != 0:
        pytest.skip("network namespaces and BPF need root")
    monkeypatch.setattr("bench.farm.REPORT_WAIT", 0)
    with (
        pytest.raises(Unavailable, match="not all servers have reported"),
        Farm(quiet(), tmp_path, "silent", {"any": Way()}, [0], report=True),
    ):
        pass
    assert not list(Path("/run/netns").glob(f"crab-bench-silent-{os.getpid()}-*"))


def test_links_are_as_narrow_as_asked(tmp_path):
    """And what does not get through is told."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces and BPF need root")
    with Farm(quiet(), tmp_path, "narrow", {"any": Way("round-robin")}, [0, 0], clients=2) as farm:
        farm.shape(20)
        found = farm.together("any", "--mode", "rr", "--connections", "4", "--bytes", "16384", "--seconds", "0.5")
        assert len(found) == 2
        rate = sum(client["bytes"] * 4 / client["seconds"] / 1e6 for client in found)
        assert 0 < rate < 2 * 20
        farm.servers[0].ip("link set eth0 down")
        farm.servers[1].ip("link set eth0 down")
        with pytest.raises(Unavailable, match=r"any: .* failed"):
            farm.crr("any", "--seconds", "0.2")
