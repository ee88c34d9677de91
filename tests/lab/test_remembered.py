"""What load balancers of labs remember goes with the lab."""

from __future__ import annotations

import subprocess

import pytest

from crablb.lab.lab import REMEMBERED, Lab
from tests.helpers.namespaces import unique


@pytest.mark.parametrize("gone", [False, True])
def test_nothing_is_remembered_of_a_lab_that_is_gone(gone):
    """Also where its namespace went before it, as by hand; nor does a new one begin with what an old one left."""
    name = unique()
    REMEMBERED.mkdir(parents=True, exist_ok=True)
    mine = REMEMBERED / f"netns-crab-{name}-lb-eth0.state.json"
    other = REMEMBERED / f"netns-crab-{name}x-lb-eth0.state.json"
    try:
        for path in (mine, other):
            path.write_text("{}")
        with Lab.create(name, servers=1) as lab:
            assert not mine.exists()
            mine.write_text("{}")
            if gone:
                lab.lb.end()
                subprocess.run(["ip", "netns", "del", lab.lb.netns], check=True)
        assert not mine.exists()
        assert other.exists()
    finally:
        for path in (mine, other):
            path.unlink(missing_ok=True)
