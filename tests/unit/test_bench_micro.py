"""What is made of the micro suite's figures."""

from __future__ import annotations

import pytest

from bench import micro
from bench.context import Unavailable
from bench.figures import Row, Suite, Table


def test_annotated():
    text = (
        "12,800 (100.0%)  PROGRAM TOTALS\n\n Ir file:function\n\n"
        "6,400 (50.00%)  ../native/core.c:crab_core_batch [/bin/hotloop]\n"
        "3,200 (25.00%)  ../native/core.c:other [/bin/hotloop]\n"
        "  640 ( 5.00%)  /usr/include/bits/byteswap.h:swap [/bin/hotloop]\n"
        "   10 ( 0.08%)  ../native/rare.h:rare [/bin/hotloop]\n"
    )
    assert micro.by_file(text, 64) == {"all": 200.0, "core.c": 150.0, "byteswap.h": 10.0}
    with pytest.raises(Unavailable, match="something else"):
        micro.by_file("nothing", 64)


def syn_table(ours: float, xdp: float) -> Table:
    rows = []
    for family in (4, 6):
        bare = f"bare C loop, IPv{family}, {micro.USUAL}"
        rows += [
            Row(bare, [20.0, 21.0, 19.0]),
            Row(f"crablb, IPv{family}, {micro.USUAL}", [20.0 * ours, 21.0 * ours, 19.0 * ours], bare),
            Row(f"XDP program, IPv{family}", [xdp] * 3, bare),
        ]
    return Table("micro-syn", "", "ns", rows)


def test_p1():
    reached = micro.p1(syn_table(1.75, 80), None)
    assert (reached.reached, reached.why) == (True, "")
    assert "IPv6: 1.75 times the bare loop" in reached.value
    counted = Table("micro-instructions", "", "", [Row("IPv4, all", [700.0])])
    for table in (syn_table(1.85, 80), syn_table(1.75, 60)):
        missed = micro.p1(table, counted)
        assert missed.reached is False
        assert missed.why.startswith("700 instructions")


def test_targets_need_their_tables():
    suite = Suite("micro", "")
    assert micro.targets(suite) == []
    suite.tables = [
        Table("micro-queues", "", "", [Row("one", [1.0, 2.0, 1.0]), Row("two", [1.7, 3.4, 1.6])], baseline="one")
    ]
    (target,) = micro.targets(suite)
    assert (target.name, target.value, target.reached) == ("P9", "1.70 times", False)
