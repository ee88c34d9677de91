"""What is thought of a backend by a check, beside a plain model; what becomes of a service then."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from crablb.control.health.machine import Thought, think
from crablb.model import Backend, Service, State, Vip
from crablb.selection.loads import Balance
from crablb.selection.standing import Standing, judge

COUNTS = st.integers(1, 5)


class Checked(RuleBasedStateMachine):
    """The model remembers every result, and looks at the last ones."""

    @initialize(up=st.booleans(), fall=COUNTS, rise=COUNTS)
    def begin(self, up, fall, rise):
        self.fall, self.rise = fall, rise
        self.thought = Thought(up)
        self.up, self.confirmed, self.told = up, False, []

    @rule(ok=st.sampled_from((True, False, None)), times=st.integers(1, 6))
    def result(self, ok, times):
        for _ in range(times):
            self.thought = think(self.thought, ok, self.fall, self.rise)
            if ok is not None:
                self.told.append(ok)
            if self.told[-self.fall :] == [False] * self.fall:
                self.up = False
            if self.told[-self.rise :] == [True] * self.rise:
                self.up = True
            self.confirmed |= bool(self.told) and self.told[-1] == self.up

    @invariant()
    def as_the_model(self):
        if hasattr(self, "thought"):
            assert self.thought.up is self.up
            assert self.thought.known is self.confirmed
            assert self.thought.ok is (self.told[-1] if self.told else None)
            assert self.thought.moving is (bool(self.told) and self.told[-1] is not self.up)


TestChecked = Checked.TestCase


def test_not_in_a_row():
    thought = Thought(True)
    for ok in (False, False, True, False, False):
        thought = think(thought, ok, 3, 2)
    assert thought == Thought(True, True, False, 2)
    assert think(thought, None, 3, 2) is thought
    assert think(thought, False, 3, 2) == Thought(False, True, False, 3)


# ---- a service ----

VIP = Vip(ip_address("10.0.0.100"), 80)
A, B, C, D = (ip_address(f"10.0.0.{n}") for n in (11, 12, 13, 14))
DOWN = Standing(healthy=False)


def serving(service: Service, **standings: Standing) -> str:
    """Who gets new connections, by letter, when these are as they are."""
    verdict = judge(service, {(VIP, globals()[name]): standing for name, standing in standings.items()})
    names = {A: "A", B: "B", C: "C", D: "D"}
    return "".join(names[b.address] for b in verdict.service.backends if b.share) + ("!" if verdict.panic else "")


THREE = Service(VIP, (Backend(A), Backend(B), Backend(C)))
SPARE = Service(VIP, (Backend(A), Backend(B), Backend(C, backup=True), Backend(D, backup=True)))


@pytest.mark.parametrize(
    ("service", "standings", "expected"),
    [
        (THREE, {}, "ABC"),
        (THREE, {"A": DOWN}, "BC"),
        (THREE, {"A": DOWN, "B": DOWN}, "ABC!"),  # 33 % healthy
        (Service(VIP, THREE.backends, panic=33), {"A": DOWN, "B": DOWN}, "C"),
        (Service(VIP, THREE.backends, panic=0), {"A": DOWN, "B": DOWN, "C": DOWN}, ""),
        (Service(VIP, (Backend(A), Backend(B))), {"A": DOWN}, "B"),  # 50 % is not less than 50 %
        (Service(VIP, (Backend(A, 3), Backend(B))), {"A": DOWN}, "AB!"),  # by weight
        (Service(VIP, (Backend(A, 0), Backend(B))), {"A": DOWN}, "B"),
        (THREE, {"A": Standing(percent=0)}, "BC"),
        # Nothing is known of them: they may be healthy.
        (THREE, dict.fromkeys("ABC", Standing(healthy=False, known=False)), ""),
        (THREE, {"A": DOWN, "B": DOWN, "C": Standing(healthy=False, known=False)}, "ABC!"),
        (SPARE, {}, "AB"),
        (SPARE, {"A": DOWN}, "B"),
        (SPARE, {"A": DOWN, "B": DOWN}, "CD"),
        (SPARE, {"A": DOWN, "B": DOWN, "C": DOWN}, "D"),
        (SPARE, {"A": DOWN, "B": DOWN, "C": DOWN, "D": DOWN}, "AB!"),
        (SPARE, {"C": DOWN, "D": DOWN}, "AB"),
        (Service(VIP, (Backend(A, state=State.DRAIN), Backend(B, backup=True))), {}, "B"),
        (Service(VIP, (Backend(A, state=State.MAINT), Backend(B))), {"B": DOWN}, "B!"),
    ],
)
def test_who_serves(service, standings, expected):
    assert serving(service, **standings) == expected


@given(
    weights=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    panic=st.integers(0, 100),
    healthy=st.lists(st.booleans(), min_size=4, max_size=4),
    backup=st.lists(st.booleans(), min_size=4, max_size=4),
)
def test_what_always_holds(weights, panic, healthy, backup):
    addresses = (A, B, C, D)[: len(weights)]
    backends = tuple(Backend(a, w, backup=s) for a, w, s in zip(addresses, weights, backup, strict=False))
    standings = {(VIP, a): Standing(healthy=h) for a, h in zip(addresses, healthy, strict=False)}
    verdict = judge(Service(VIP, backends, panic=panic), standings)
    served = [b for b in verdict.service.backends if b.share]
    able = [b for b in backends if b.share and standings[VIP, b.address].healthy]
    assert bool(served) or not able, "somebody is healthy, and nobody serves"
    assert verdict.panic or all(standings[VIP, b.address].healthy for b in served)
    assert 0 <= verdict.healthy <= verdict.weight
    assert not (verdict.panic and verdict.backups) or all(b.backup for b in backends if b.share)
    kinds = {next(b.backup for b in backends if b.address == s.address) for s in served}
    assert len(kinds) <= 1, "primaries and backups serve together"


def test_what_is_as_the_operator_says_is_not_made_anew():
    assert judge(THREE, {}).service is THREE
    assert judge(THREE, {(VIP, A): Standing(cr=False)}).service.backends[0] == Backend(A, cr=False)


def test_a_percentage_of_a_weight_of_one_counts():
    balance = Balance()
    backends = (Backend(A), Backend(B))
    service = Service(VIP, backends)
    balance.give((VIP, A), 50)
    weights = balance.weights(service, backends, 0.0)
    assert weights == {A: 50, B: 100}
    assert balance.scale(service, weights) == 100
    assert (balance.part(service, A, 0.0), balance.part(service, B, 0.0)) == (0.5, 1.0)
    balance.give((VIP, A), 100)
    assert balance.weights(service, backends, 0.0) == {A: 1, B: 1}
    slow = Service(VIP, backends, slow_start=10.0)
    balance.give((VIP, A), 50)
    balance.begin(slow, B, 0.0)
    assert balance.weights(slow, backends, 5.0) == {A: 500, B: 500}
    assert balance.scale(slow, (A, B)) == 1000


def test_who_is_warm_does_not_begin_slowly():
    service = Service(VIP, (Backend(A), Backend(B)), slow_start=10.0)
    balance = Balance()
    balance.follow([], (), 0.0)
    balance.follow([service], (A, B), 1.0, {(VIP, A)})
    assert balance.weights(service, service.backends, 2.0) == {A: 10, B: 1}


def test_backups_serve_for_those_that_their_agents_drain():
    service = Service(VIP, (Backend(A), Backend(B), Backend(C, backup=True)))
    drained = {(VIP, A): Standing(percent=0), (VIP, B): Standing(percent=0)}
    verdict = judge(service, drained)
    assert [b.address for b in verdict.service.backends if b.share] == [C]
    assert (verdict.backups, verdict.panic) == (True, False)
    verdict = judge(service, drained | {(VIP, B): Standing()})
    assert [b.address for b in verdict.service.backends if b.share] == [B]
    assert (verdict.healthy, verdict.weight, verdict.backups) == (1, 1, False)
