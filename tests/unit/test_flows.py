"""The XDP program's table of flows, as it is counted."""

from __future__ import annotations

from ipaddress import ip_address
from types import SimpleNamespace

from crablb._native import lib

from crablb.dataplane import census
from crablb.dataplane.flows import FLOW, FlowTable
from crablb.model import Vip

A, VIP = ip_address("10.0.0.11"), Vip(ip_address("10.0.0.100"), 80)


def test_a_flow_that_has_ended_is_none_when_its_time_is_over():
    """Its packets find their way as long as its place is not needed; nobody waits for it."""
    memory = bytearray(16 * lib.CRAB_BUCKET * FLOW.itemsize)
    table = FlowTable(SimpleNamespace(mmap=lambda: memory, max_entries=16))
    old = lib.CRAB_AGE_ENDING + 10
    for hash_, age in ((1, 0), (2, old), (3, 0), (4, old)):
        assert table.add(hash_, 7, 0, age=age)
    table.places["state"][table.places["hash"] >= 3] = lib.CRAB_FLOW_ENDING
    total, ending, found = census.find(table, {7: A}, {0: VIP}, 10)
    assert (total, ending, sorted((f.hash, f.state) for f in found)) == (
        3, 1, [(1, "open"), (2, "open"), (3, "ending")],
    )  # fmt: skip
    assert census.count(table, {}, {7: A}, {0: VIP}).flows == {(VIP, A): 3}
    assert (table.count(), len(table.flows())) == (3, 4)
