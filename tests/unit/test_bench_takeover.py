"""What is made of the takeover suite's figures."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from bench import takeover
from bench.takeover import NOTHING, RELOADS, RESTART, TAKEOVERS, WAYS, Found

WELL = Found(connections=1000, rate=100.0, failed=Counter(), lost=0, again=0, repeated=0, longest=9.0, waited=1.0)


def found(**of_takeovers: object) -> dict[str, dict[str, Found]]:
    """All went well, but for takeovers of the second way, and the restart, which is not judged."""
    events = (NOTHING, RELOADS, TAKEOVERS, RESTART)
    all_of_it = {way: dict.fromkeys(events, WELL) for way in WAYS}
    for way in WAYS:
        all_of_it[way][RESTART] = replace(WELL, failed=Counter(reset=9), lost=99, longest=999)
    second = list(WAYS)[1]
    all_of_it[second][TAKEOVERS] = replace(WELL, **of_takeovers)
    return all_of_it


@pytest.mark.parametrize(
    ("makes", "says", "why"),
    [
        ({}, "6,000 connections, 100 a second or more: 0 failed, 0 SYNs lost; at most 1.0 ms", ""),
        ({"longest": 50.0, "waited": 5.0, "again": 3, "repeated": 9}, "at most 5.0 ms (fallback, bypass)", ""),
        ({"failed": Counter({"no answer in time": 2})}, "2 failed, 0 SYNs lost", "2 failed (2 no answer in time)"),
        ({"lost": 1}, "0 failed, 1 SYNs lost", "takeovers: 0 failed, 1 SYNs lost"),
        ({"waited": 5.1}, "at most 5.1 ms", "fallback, bypass: a takeover keeps a SYN for 5.1 ms"),
    ],
)
def test_p13(makes, says, why):
    target = takeover.p13(found(**makes), 100, 10)
    assert (target.name, target.reached) == ("P13", not why)
    assert "3 ways, 100 reloads and 10 takeovers each" in target.value
    assert says in target.value
    assert why in target.why and bool(target.why) == bool(why)


def test_p13_is_not_decided_by_a_part():
    for what in (RELOADS, TAKEOVERS):
        part = found()
        del part["redirected"][what]
        assert takeover.p13(part, 100, 10).reached is None


def test_tables():
    """A row for each way and what happened; why connections failed is beside their number."""
    tables = {table.key: table for table in takeover.tables(found(failed=Counter({"a": 1, "b": 2})))}
    assert all(len(table.rows) == 4 * len(WAYS) for table in tables.values())
    (row,) = [row for row in tables["takeover-failed"].rows if row.name == "fallback, bypass: takeovers"]
    assert (row.samples, row.note) == ([3], "1 a; 2 b")
    assert tables["takeover-lost"].rows[3].samples == [99]
