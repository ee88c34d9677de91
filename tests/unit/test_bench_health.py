"""The health suite runs."""

from __future__ import annotations

from bench import health
from bench.context import Context


def test_tiny():
    suite = health.run(Context("tiny", say=lambda _: None))
    (table,) = suite.tables
    assert [row.name for row in table.rows] == ["connections, bare", "tcp", "http"]
    assert all(sample > 0 for row in table.rows for sample in row.samples)
