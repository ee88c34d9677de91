"""The suites paper and policies, as small as they can be; what they measure decides nothing here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bench import paper, policies
from bench.farm import Farm, Unavailable, Way
from tests.helpers.bench import quiet, written

pytestmark = [pytest.mark.long, pytest.mark.xdist_group("bench-paper")]


@pytest.fixture(scope="module", params=[paper, policies], ids=["paper", "policies"])
def suite(request):
    found = request.param.run(quiet())
    assert not list(Path("/run/netns").glob(f"crab-bench-*-{os.getpid()}-*"))
    return found


def test_what_they_write(suite):
    written(suite)


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


def test_servers_that_do_not_report_are_told(monkeypatch, tmp_path):
    monkeypatch.setattr("bench.farm.REPORT_WAIT", 0)
    monkeypatch.setattr("bench.farm.REPORTED", "what no line says")
    with (
        pytest.raises(Unavailable, match="not all servers have reported"),
        Farm(quiet(), tmp_path, "silent", {"any": Way()}, [0], report=True),
    ):
        pass
    assert not list(Path("/run/netns").glob(f"crab-bench-silent-{os.getpid()}-*"))


def test_links_are_as_narrow_as_asked(tmp_path):
    """And what does not get through is told."""
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
