"""The suite takeover runs, as small as it can."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bench import takeover
from tests.helpers.bench import quiet, written

pytestmark = [pytest.mark.long, pytest.mark.xdist_group("takeover-load")]


def test_suite():
    suite = takeover.run(quiet())
    assert not list(Path("/run/netns").glob(f"crab-bench-relay-{os.getpid()}-*"))
    written(suite)
    assert suite.left_out == []
    events = (takeover.NOTHING, takeover.RELOADS, takeover.TAKEOVERS, takeover.RESTART)
    for table in suite.tables:
        assert [row.name for row in table.rows] == [f"{way}: {what}" for way in takeover.WAYS for what in events]
    made = suite.table("takeover-connections")
    assert made and all(row.median > 0 for row in made.rows)
    assert suite.targets == []  # nothing so short decides it
