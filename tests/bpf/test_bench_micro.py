"""The micro suite, as small as it can be.  Of what it measures only instructions decide, which no load disturbs."""

from __future__ import annotations

import subprocess

import pytest

from bench import micro
from crablb.model import CONSISTENT
from crablb.model import POLICIES as BUILTIN
from tests.helpers.bench import quiet, written

pytestmark = [pytest.mark.long, pytest.mark.xdist_group("bench-micro")]

#: Instructions of a packet, for each address family and way, as gcc 12 compiles it.
INSTRUCTIONS = {(4, "redirect"): 582, (6, "redirect"): 615, (4, "fallback"): 539, (6, "fallback"): 583}
GCC = subprocess.run(["gcc", "-dumpversion"], capture_output=True, text=True, check=True).stdout.split(".")[0].strip()
#: What more there may be of them; another compiler's code may be longer.
TOLERANCE = 0.1 if GCC == "12" else 0.5


@pytest.fixture(scope="module")
def suite():
    return micro.run(quiet())


def test_what_it_writes(suite):
    written(suite)


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
