"""The suite tables, as small as it can be.  No time decides here; what is worked out does, being the same each time."""

from __future__ import annotations

import pytest

from bench import tables
from bench.figures import Row, Suite, Table
from bench.hashes import TABLELESS, TABLES
from tests.helpers.bench import quiet, written

TIMED = ("build", "warm", "cold")


@pytest.fixture(scope="module")
def suite() -> Suite:
    return tables.run(quiet())


def test_what_it_writes(suite: Suite):
    written(suite)
    keys = [table.key.removeprefix("tables-") for table in suite.tables]
    assert keys == [*(key for key in TIMED if suite.table(f"tables-{key}")), *tables.FIGURES]
    for table in suite.tables:
        assert len(table.rows) == 2 * len(TABLES + TABLELESS)
        assert all(row.baseline in {"", *(other.name for other in table.rows)} for row in table.rows)
    assert all(min(row.samples) > 0 for key in ("build", "warm") for row in rows(suite, key).values())
    (plot,) = suite.plots
    assert {len(curve.y) for curve in plot.curves} == {len(TABLES + TABLELESS)} == {len(plot.ticks)}


def rows(suite: Suite, key: str, weights: str = tables.EQUAL) -> dict[str, Row]:
    """By the method's name, with "no table" or without."""
    table = suite.table(f"tables-{key}")
    assert table
    found = {row.name: row for row in table.rows if f", {weights}: " in row.name}
    return {name.split(": ")[1].replace(", 65,537 slots", ""): row for name, row in found.items()}


@pytest.mark.parametrize("weights", tables.WEIGHTS)
def test_what_is_worked_out(suite: Suite, weights: str):
    """What each is known for."""
    for name, row in rows(suite, "last", weights).items():
        assert 1 <= row.median < 1.1, name
    for name, row in rows(suite, "any", weights).items():
        assert (row.median > 1.5) == name.startswith("JumpBackHash"), name
    for name, row in rows(suite, "added", weights).items():
        assert 1 <= row.median < 1.2, name
    for key in ("most", "least"):
        assert all(row.median == pytest.approx(1, abs=0.05) for row in rows(suite, key, weights).values())
    for name, row in rows(suite, "anew", weights).items():
        assert (row.median > 1.5) == (name not in ("maglev", "rendezvous")), name
    for name, row in rows(suite, "order", weights).items():
        if name in ("maglev", "rendezvous") or name.startswith("DxHash"):
            assert row.samples == [0.0], name
    for name, row in rows(suite, "started", weights).items():
        assert (row.median > 1) == (name not in ("maglev", "rendezvous")), name
    memory = {name: row.median for name, row in rows(suite, "memory", weights).items()}
    assert memory["maglev"] == memory["rendezvous"] == 65537 * 2 / 1024
    assert all(size < 8 for name, size in memory.items() if name.endswith("no table"))


def test_caches_that_cannot_be_flushed():
    suite = Suite("tables", "", [Table("tables-cold", "", "ns", [Row("one", [-1.0])])])
    tables.left_out(suite)
    assert suite.tables == []
    assert "cannot be flushed" in suite.left_out[0]
