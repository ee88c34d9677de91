"""The suite mptcp runs, as small as it can; that connections are led away is all that it decides."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bench import mptcp
from bench.context import Context, Unavailable
from tests.helpers.bench import quiet, written

pytestmark = [pytest.mark.long, pytest.mark.xdist_group("bench-mptcp")]


def test_suite():
    suite = mptcp.run(quiet())
    assert not list(Path("/run/netns").glob(f"crab-bench-mptcp-{os.getpid()}-*"))
    written(suite)
    assert suite.left_out == []
    for table in suite.tables:
        assert all(min(row.samples) > 0 for row in table.rows), table.key
    near, packets, share, last = suite.tables
    assert {row.name.partition(",")[0] for row in near.rows} == set(mptcp.MODES)
    rows = [row.name for row in packets.rows]
    assert rows == [row.name for row in share.rows] == [row.name for row in last.rows]
    of = {row.name: row.median for row in share.rows}
    assert of["TCP, 10 MB down"] == of["TCP, 10 MB up"] == 100
    assert any(share < 100 for share in of.values())
    assert suite.targets == []  # nothing so short decides one (p15 has a test of its own)


def test_without_mptcpize_it_is_left_out(monkeypatch):
    def tool(self, name):
        raise Unavailable(f"{name} is not installed (make bench installs it)")

    monkeypatch.setattr(Context, "tool", tool)
    with pytest.raises(Unavailable, match="mptcpize is not installed"):
        mptcp.run(quiet())
    assert not list(Path("/run/netns").glob(f"crab-bench-mptcp-{os.getpid()}-*"))
