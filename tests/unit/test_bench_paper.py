"""The paper suite's simulation, and its target."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import paper
from bench.figures import Row, Suite
from tests.helpers.bench import quiet


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
