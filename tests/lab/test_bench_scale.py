"""The scale suite runs."""

from __future__ import annotations

from bench import scale
from bench.context import Context


def test_tiny():
    suite = scale.run(Context("tiny", say=lambda _: None))
    assert len(suite.tables) == 9
    for table in suite.tables:
        assert [row.name for row in table.rows] == ["10 backends", "200 backends"]
        assert all(sample > 0 for row in table.rows for sample in row.samples)
