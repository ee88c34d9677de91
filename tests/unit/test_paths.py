"""The path manager's thoughts, without a kernel."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crablb.agent import paths
from crablb.agent.paths import Announce, Close, Paths
from crablb.config import parse_vip
from crablb.kernel.mptcp import Endpoint, Event, Happened, Subflow

VIP, DIP, CLIENT = ip_address("10.0.0.100"), ip_address("10.0.0.11"), ip_address("10.1.0.1")
ENDPOINT = Endpoint(DIP, 1)


def first(token=1, local=VIP, port=80, remote=CLIENT):
    return Subflow(token, local, port, remote, 40000 + token)


def second(token=1):
    return Subflow(token, DIP, 80, CLIENT, 50000 + token, id=1)


def work(subflows):
    return {one.ends for one in subflows}


def event(what, subflow):
    return Event(what, subflow.token, subflow)


def made(clients=(), choose=lambda client: ENDPOINT, vips=("tcp://10.0.0.100:80",)):
    return Paths(lambda: [parse_vip(vip) for vip in vips], choose, clients)


def test_a_connection_is_told_and_then_closed_at_the_vip():
    core = made()
    assert core.hear(event(Happened.CREATED, first())) is None
    assert core.hear(event(Happened.ESTABLISHED, first())) == Announce(first(), ENDPOINT)
    assert core.hear(event(Happened.SUB_ESTABLISHED, second(2))) is None  # another's
    assert core.hear(event(Happened.SUB_ESTABLISHED, second())) == Close(first())
    assert core.hear(event(Happened.SUB_ESTABLISHED, second())) is None  # once


def test_what_is_told_nothing():
    """Of CR, of other services, of clients that were not chosen, and where there is no address for them."""
    core = made(clients=[ip_network("10.1.0.0/24")])
    for one in (first(local=DIP), first(port=81), first(remote=ip_address("10.1.1.1"))):
        assert core.hear(event(Happened.ESTABLISHED, one)) is None
    assert core.hear(event(Happened.ESTABLISHED, first())) == Announce(first(), ENDPOINT)
    assert made(choose=lambda client: None).hear(event(Happened.ESTABLISHED, first())) is None


def test_one_that_ends_is_forgotten():
    core = made()
    core.hear(event(Happened.ESTABLISHED, first()))
    core.hear(Event(Happened.CLOSED, 1))
    assert core.hear(event(Happened.SUB_ESTABLISHED, second())) is None
    assert core.hear(Event(Happened.ANNOUNCED, 7)) is None


def test_joins_to_the_vip_are_no_direct_way():
    core = made()
    core.hear(event(Happened.ESTABLISHED, first()))
    assert core.hear(event(Happened.SUB_ESTABLISHED, replace(first(), remote_port=1, id=0))) is None


def test_a_look_finds_what_was_not_heard():
    """Who has come leaves; who has not is told, once."""
    core = made()
    assert list(core.see([first(1), second(1), first(2), replace(first(3), established=False)], work)) == [
        Close(first(1)),
        Announce(first(2), ENDPOINT),
    ]
    assert list(core.see([first(2)], work)) == []
    assert list(core.see([first(2), replace(second(2), established=False)], work)) == []
    assert list(core.see([first(2), second(2)], work)) == [Close(first(2))]


def test_a_way_that_is_not_proven_is_not_left_by():
    """It is told nothing anew; of whoever has no way at the VIP nothing is asked."""
    core, asked = made(), []
    assert list(core.see([first(1), second(1), second(2)], lambda ways: asked.extend(ways) or set())) == []
    assert asked == [second(1)]
    assert list(core.see([first(1), second(1)], work)) == [Close(first(1))]


@pytest.mark.parametrize(
    ("there", "unsure"),
    [
        ([first(), second()], True),  # nobody has answered there in time
        ([first(), replace(second(), established=False)], True),  # who has told of itself already, perhaps
        ([replace(first(), established=False)], True),
        ([first()], False),  # it is told, and will come or not
        ([second(), replace(second(2), established=False)], False),  # they have left
    ],
)
def test_what_is_not_clear_yet_is_looked_at_again(there, unsure):
    """On a busy machine nothing that works answers in half a second, and no event comes any more."""
    core = made()
    list(core.see(there, lambda ways: set()))
    assert core.unsure == unsure
    list(core.see([first(), second()], work))
    assert not core.unsure


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(paths, "ROOM", 3)
    core = made()
    for token in range(5):
        core.hear(event(Happened.ESTABLISHED, first(token)))
    assert [core.hear(event(Happened.SUB_ESTABLISHED, second(token))) for token in range(5)] == [
        None,
        None,
        *(Close(first(token)) for token in (2, 3, 4)),
    ]


@given(st.lists(st.tuples(st.sampled_from(Happened), st.integers(1, 3), st.booleans())))
def test_nothing_is_closed_that_has_no_other_way(told):
    """Whatever happens in whatever order: what is closed is at the VIP, of a connection that has come."""
    core, came = made(), set()
    for what, token, direct in told:
        if what == Happened.SUB_ESTABLISHED and direct:
            came.add(token)
        command = core.hear(event(what, second(token) if direct else first(token)))
        if isinstance(command, Close):
            assert (command.subflow, token in came) == (first(token), True)
