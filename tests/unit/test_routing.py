"""crablb.kernel.routing: which route is taken, and what a copy of it is."""

from __future__ import annotations

import socket
from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest

from crablb.agent.routes import PROTOCOL, Paths
from crablb.kernel.routing import RTA_FLOW, RTA_PREFSRC, Hop, Route, Rule, best

VIP = ip_address("10.0.0.100")
MAIN = Rule(socket.AF_INET, 32766, 254, 2, (0, 0, 0), False, ())
UNICAST, THROW = 1, 9
HOP = Hop(2)


def route(to: str, *, table: int = 254, kind: int = UNICAST, priority: int = 0, tos: int = 0, hop: Hop = HOP) -> Route:
    return Route(ip_network(to), table, 3, 0, kind, priority, tos, (hop,), ())


def test_the_longest_prefix_then_the_least_metric_then_the_first():
    longest = [route("10.0.0.100/32", priority=p, hop=Hop(p)) for p in (9, 3, 3)]
    found = [route("0.0.0.0/0"), route("10.0.0.0/24"), *longest]
    assert best(found, MAIN, VIP) is longest[1]
    assert best(found[:2], MAIN, VIP) is found[1]
    assert best(found, MAIN, ip_address("10.9.9.9")) is found[0]


@pytest.mark.parametrize(
    "other",
    [
        route("10.0.0.100/32", table=100),
        route("10.0.0.100/32", tos=16),
        route("10.0.0.100/32", hop=Hop(2, dead=True)),
        route("10.0.0.101/32"),
    ],
    ids=["table", "tos", "dead", "address"],
)
def test_what_is_not_asked(other: Route):
    default = route("0.0.0.0/0")
    assert best([other, default], MAIN, VIP) is default


def test_a_rule_may_suppress_short_prefixes():
    rule = replace(MAIN, suppressed=0)
    assert best([route("0.0.0.0/0")], rule, VIP) is None
    assert best([route("0.0.0.0/0"), route("10.0.0.0/8")], rule, VIP) is not None


def test_what_does_not_lead_there_is_not_copied():
    """A table that says throw leaves the decision to the rules behind."""
    paths = Paths([VIP], [replace(MAIN, table=100, priority=50), MAIN])
    paths.routes = [route("10.0.0.0/24", table=100, kind=THROW), route("10.0.0.0/24")]
    rules, copies = paths.wanted("crab_egress-1")
    assert [(rule.priority, rule.protocol) for rule in rules] == [(32765, PROTOCOL)]
    assert [copy.to for copy in copies] == [ip_network("10.0.0.100/32")]


def test_each_rule_has_a_table_of_its_own():
    rules = [MAIN, replace(MAIN, suppressed=0), replace(MAIN, table=253), replace(MAIN, table=51820)]
    paths = Paths([VIP], rules)
    paths.routes = [route("10.0.0.0/24", table=table) for table in (253, 254, 51820)]
    found, copies = paths.wanted("crab_egress-1")
    assert len({rule.table for rule in found}) == len(copies) == 4
    assert {rule.table for rule in found} == {copy.table for copy in copies}
    assert not {rule.table for rule in found} & {0, 253, 254, 255, 51820}


def test_a_copy_keeps_what_lives():
    hops = (Hop(2, b"\n\0\0\2", weight=2), Hop(3, b"\n\1\0\2", flow=b"\5\0\0\0", onlink=True), Hop(4, dead=True))
    several = replace(route("10.0.0.0/24"), hops=hops, more=((RTA_PREFSRC, b"\n\0\0\1"),))
    copy = several.through(VIP, 7, PROTOCOL, "ours")
    assert [(h.ifindex, h.weight, h.onlink, h.program) for h in copy.hops] == [
        (2, 2, False, "ours"),
        (3, 0, True, "ours"),
    ]
    assert copy.more == several.more
    alone = replace(several, hops=hops[1:]).through(VIP, 7, PROTOCOL, "ours")
    assert (alone.hops[0].flow, dict(alone.more)[RTA_FLOW]) == (b"", b"\5\0\0\0")  # where the kernel says it of one hop
