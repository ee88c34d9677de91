"""Load balancers that are killed at each call by which they change something: what is left is whole."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.shim import tried

pytestmark = [pytest.mark.long, pytest.mark.timeout(1500)]


@pytest.mark.parametrize(
    "scenario",
    ["start", "reload", "stop", *(pytest.param(name, marks=pytest.mark.each) for name in ("takeover", "other-seed"))],
)
def test_killed_at_each_step(tmp_path: Path, scenario: str):
    """A program is attached by a pinned link, and the flows can be adopted, at each instant; the next one serves."""
    found = tried(tmp_path, "killed", scenario, backends=range(11, 15), seconds=1400)
    assert found["points"] > 3
    assert (found["faults"], found["left"], found["program"]) == ({}, [], 0)
