"""iperf3.  One server: its streams have to reach the one that the test was agreed with."""

from __future__ import annotations

import json

import pytest

from crablb.lab import VIP4, VIP6
from tests.stacks.conftest import Site

PORT = 5201
AMOUNT = 64 << 20


@pytest.mark.parametrize("topology", ["bridge", "routed"])
def test_iperf3(make_site, topology):
    site = make_site(PORT, servers=1, topology=topology)
    site.start(site.lab.servers[0], PORT, "iperf3", "-s")
    for vip in (str(VIP4), str(VIP6)):
        for streams in (1, 4):
            for ways in ([], ["--reverse"]):
                with site.counted(1 + streams):
                    end = measured(site, vip, "-n", str(AMOUNT), "-P", str(streams), *ways)
                assert end["sum_sent"]["bytes"] >= AMOUNT
                # What is on its way at the end is left there.
                assert end["sum_received"]["bytes"] > AMOUNT / 2
        # Both ways share an amount, of which the first may take all: so for a second.
        with site.counted(1 + 2 * 2):
            end = measured(site, vip, "-t", "1", "-P", "2", "--bidir")
        assert end["sum_received"]["bytes"] > 0 < end["sum_received_bidir_reverse"]["bytes"]


def measured(site: Site, vip: str, *more: str) -> dict[str, dict[str, int]]:
    """The sums of a run."""
    said = json.loads(site.use("iperf3", "-c", vip, "-J", *more))
    return said["end"]
