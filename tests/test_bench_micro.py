"""The micro suite, as small as it can be.  Of what it measures only instructions decide, which no load disturbs."""

from __future__ import annotations

import json
import os
import subprocess

import jsonschema
import pytest

from bench import machine, micro
from bench.context import Context, Unavailable
from bench.figures import Results, Row, Suite, Table
from crablb.policy import BUILTIN, CONSISTENT
from tests.conftest import ROOT

#: Instructions of a packet, for each address family and way, as gcc 12 compiles it.
INSTRUCTIONS = {(4, "redirect"): 584, (6, "redirect"): 617, (4, "fallback"): 619, (6, "fallback"): 655}
GCC = subprocess.run(["gcc", "-dumpversion"], capture_output=True, text=True, check=True).stdout.split(".")[0].strip()
#: What more there may be of them; another compiler's code may be longer.
TOLERANCE = 0.1 if GCC == "12" else 0.5


def quiet() -> Context:
    return Context("tiny", say=lambda _: None)


@pytest.fixture(scope="module")
def suite():
    if os.geteuid() != 0:
        pytest.skip("BPF needs root")
    return micro.run(quiet())


def test_what_it_writes(suite):
    data = Results("tiny", machine.describe(), [suite]).json()
    jsonschema.validate(data, json.loads((ROOT / "bench/schema.json").read_text()))


def test_all_is_there(suite):
    assert suite.left_out == []
    keys = ["syn", "stages", "instructions", "scale", "flows", "policies", "maglev", "disruption", "checksum"]
    keys += ["python", "bypass", "queues"]
    assert [table.key for table in suite.tables] == [f"micro-{key}" for key in keys]
    for table in suite.tables:
        # What its harness takes is taken off the XDP program's time, and at this size may be more than all.
        assert all(min(row.samples) > 0 for row in table.rows if not row.name.startswith("XDP")), table.key
    assert [target.name for target in suite.targets] == ["P1", "P7", "P8", "P9"]
    by_policy = [row.name for row in suite.table("micro-policies").rows if not row.name.startswith("maglev")]
    assert by_policy == [name for name in BUILTIN if name not in CONSISTENT]
    (plot,) = suite.plots
    assert [len(curve.y) for curve in plot.curves] == [3, 3]


@pytest.mark.parametrize(("family", "way"), INSTRUCTIONS)
def test_instructions(family, way):
    """Of the hot loop, for each packet: the figure that says whether a change made it slower."""
    counted = micro.callgrind(quiet(), family, way)
    assert counted["all"] <= INSTRUCTIONS[family, way] * (1 + TOLERANCE), counted
    assert sum(n for name, n in counted.items() if name != "all") > 0.9 * counted["all"]
    assert {"examine.c", "forward.c", "flows.h", "siphash.h", "checksum.h"} <= counted.keys()


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
