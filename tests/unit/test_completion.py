"""When redirecting to a backend stops, because it completes none, and when it is tried again."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crablb.model import Backend, Service, Vip
from crablb.selection.completion import BACK_OFF, BACK_OFF_MOST, Completions

A, B = ip_address("10.0.0.11"), ip_address("10.0.0.12")
WEB, MAIL = Vip(ip_address("10.0.0.100"), 80), Vip(ip_address("10.0.0.100"), 25)


def failing(begun: int = 100, at: float = 0.0) -> Completions:
    """Redirects to A have just stopped, at ``at`` + 3."""
    known = Completions()
    assert known.report(WEB, A, begun, 50, at) is None  # what was before is not known
    assert known.report(WEB, A, begun + 5, 50, at) is None  # a handshake takes a moment
    assert known.report(WEB, A, begun + 5, 50, at + 2.9) is None
    assert known.report(WEB, A, begun + 5, 50, at + 3) == "stopped"
    return known


def test_one_that_completes_none():
    known = failing()
    assert known.stopped() == {(WEB, A)}
    assert known.back_off(WEB, A) == BACK_OFF
    assert known.report(WEB, A, 105, 50, 4) is None  # said once


def test_a_few_are_no_reason():
    known = Completions()
    known.report(WEB, A, 0, 0, 0)
    for second in range(1000):
        assert known.report(WEB, A, 4, 0, second) is None
    assert known.stopped() == frozenset()


def test_one_completed_is_enough():
    known = Completions()
    known.report(WEB, A, 0, 0, 0)
    for second in range(1, 1000):
        assert known.report(WEB, A, 4 * second, second // 2, second) is None


def test_each_service_and_backend_by_itself():
    known = failing()
    for vip, backend in ((WEB, B), (MAIL, A)):
        known.report(vip, backend, 0, 0, 0)
        assert known.report(vip, backend, 2, 1, 9) is None
        assert known.back_off(vip, backend) == 0
    assert known.stopped() == {(WEB, A)}


def test_it_is_tried_again_later_and_later():
    known, begun, now = failing(), 105, 3.0
    waited = []
    for _ in range(9):
        wait = known.back_off(WEB, A)
        waited.append(wait)
        assert not known.retry(now + wait - 0.1)
        assert known.stopped()
        assert known.retry(now + wait)
        assert not known.stopped()
        now, begun = now + wait, begun + 2
        assert known.report(WEB, A, begun, 50, now) is None
        now += 1
        assert known.report(WEB, A, begun, 50, now) == "stopped"
    assert waited == [min(BACK_OFF * 2**n, BACK_OFF_MOST) for n in range(9)]


def test_it_works_again():
    known = failing()
    assert known.retry(13)
    assert known.report(WEB, A, 106, 51, 14) == "resumed"
    assert known.back_off(WEB, A) == 0
    known.report(WEB, A, 111, 51, 15)
    assert known.report(WEB, A, 111, 51, 17) is None  # as patient as in the beginning
    assert known.report(WEB, A, 111, 51, 18) == "stopped"
    assert known.back_off(WEB, A) == BACK_OFF


def test_late_completions_end_the_wait():
    known = failing()
    assert known.report(WEB, A, 105, 51, 4) == "resumed"
    assert known.stopped() == frozenset()


@pytest.mark.parametrize("begun", [2**32 - 102, 2**32 - 1])
def test_counters_go_round(begun):
    failing(begun)  # the assertions in it
    known = Completions()
    known.report(WEB, A, 2**32 - 1, 2**32 - 1, 0)
    assert known.report(WEB, A, 9, 1, 5) is None


def test_an_agent_that_is_started_anew():
    """It counts from 0: no reason for anything, and none to try early."""
    known = failing()
    assert known.report(WEB, A, 0, 0, 5) is None
    assert known.stopped() == {(WEB, A)}
    assert known.report(WEB, A, 2, 1, 6) == "resumed"


def test_what_is_not_served_is_forgotten():
    known = failing()
    known.forget([Service(WEB, (Backend(B),)), Service(MAIL, (Backend(A),))])
    assert known.stopped() == frozenset()


steps = st.tuples(st.integers(0, 9), st.integers(0, 9), st.floats(0, 20))


@given(st.lists(steps, max_size=60))
def test_it_is_stopped_exactly_in_between(told):
    """Whatever is reported: it stops only what is redirected to, and resumes only what was stopped."""
    known, begun, completed, now, trouble = Completions(), 0, 0, 0.0, False
    for more, done, wait in told:
        begun, completed, now = begun + more, completed + done, now + wait
        known.retry(now)
        before = known.stopped()
        verdict = known.report(WEB, A, begun, completed, now)
        if verdict == "stopped":
            assert not before and known.stopped() and not done
            trouble = True
        elif verdict == "resumed":
            assert trouble and done and not known.stopped()
            trouble = False
        assert bool(known.back_off(WEB, A)) == trouble


def test_another_process_goes_on():
    """With the backends that it has, through texts."""
    known = failing()
    known.report(MAIL, A, 5, 5, 1)
    known.report(WEB, B, 7, 7, 2)
    given = known.export()
    after = Completions()
    after.adopt(given, [Service(WEB, (Backend(A),)), Service(MAIL, (Backend(A),))])
    assert after.stopped() == {(WEB, A)}
    assert after.back_off(WEB, A) == BACK_OFF
    assert {each[:2] for each in after.export()} == {(str(WEB), str(A)), (str(MAIL), str(A))}
    assert not after.retry(3 + BACK_OFF - 0.1)
    assert after.retry(3 + BACK_OFF)
    # It tries again, and is as strict as the other one was.
    assert after.report(WEB, A, 107, 50, 20) is None
    assert after.report(WEB, A, 107, 50, 21) == "stopped"
    for nonsense in ([("x",)], [("x", "y", "z")], [(*given[0][:2], "a", "b", "c", "d", "e", "f")]):
        with pytest.raises((TypeError, ValueError)):
            after.adopt(nonsense, [])
