"""Checks by SYNs are measured."""

from __future__ import annotations

from bench import syns
from bench.context import Context


def test_tiny():
    table = syns.table(Context("tiny", say=lambda _: None), 200, 0.2)
    assert [row.name for row in table.rows] == ["redirect", "fallback"]
    assert all(sample > 0 for row in table.rows for sample in row.samples)
