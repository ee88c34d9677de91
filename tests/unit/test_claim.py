"""Who answers for an address: the rule, played on a segment that is made of lists, by a clock that is a number."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from crablb.control.claim import (
    ANNOUNCE_INTERVAL,
    ASK_INTERVAL,
    DEFEND_INTERVAL,
    PROBE_INTERVAL,
    PROBES,
    RETRY,
    Act,
    Claim,
    State,
)

LOW, HIGH, FORGER = b"\2\0\0\0\0\1", b"\2\0\0\0\0\2", b"\2\0\0\0\0\0"
SAID = (Act.TAKEN, Act.IN_USE, Act.DEFENDED, Act.YIELDED)


@dataclass
class Host:
    mac: bytes
    claim: Claim
    part: int = 0  # of the segment: hosts hear those of their own part
    done: list[tuple[float, Act]] = field(default_factory=list)

    def acts(self, *which: Act) -> list[Act]:
        return [act for _, act in self.done if act in (which or SAID)]


class Segment:
    """Hosts that claim one address."""

    def __init__(self, *macs: bytes, seed: int = 0) -> None:
        choose = random.Random(seed).uniform
        self.now = 100.0
        self.hosts = [Host(mac, Claim(self.now, choose)) for mac in macs]

    def run(self, seconds: float) -> None:
        end, turns = self.now + seconds, 0
        while True:
            turns += 1
            assert turns < 100 * (seconds + 1), "it stands still"
            alive = [host for host in self.hosts if host.part >= 0]
            host = min(alive, key=lambda h: h.claim.due, default=None)
            if host is None or host.claim.due > end:
                break
            self.now = max(self.now, host.claim.due)
            self._do(host, host.claim.step(self.now, host.mac))
        self.now = end

    def _do(self, host: Host, act: Act | None) -> None:
        if act is None:
            return
        host.done.append((self.now, act))
        others = [other for other in self.hosts if other is not host and other.part == host.part >= 0]
        if act is Act.PROBE:
            for other in others:
                if other.claim.state is State.HELD:  # he answers
                    self._do(host, host.claim.heard(self.now, other.mac, host.mac, probe=False))
                self._do(other, other.claim.heard(self.now, host.mac, other.mac, probe=True))
        elif act in (Act.TAKEN, Act.ANNOUNCE, Act.DEFENDED):
            for other in others:
                self._do(other, other.claim.heard(self.now, host.mac, other.mac, probe=False))

    def forge(self, mac: bytes = FORGER, *, probe: bool = False) -> None:
        for host in self.hosts:
            self._do(host, host.claim.heard(self.now, mac, host.mac, probe=probe))

    def left_to(self, host: Host) -> bytes:
        """To whom a host leaves it, a little later."""
        self.run(0.13)
        return host.claim.left_to

    def holders(self) -> list[bytes]:
        return [host.mac for host in self.hosts if host.claim.state is State.HELD and host.part >= 0]


def test_probed_then_announced_twice():
    segment = Segment(LOW)
    segment.run(2 * ASK_INTERVAL)
    (host,) = segment.hosts
    assert [act for _, act in host.done][: PROBES + 2] == [Act.PROBE] * PROBES + [Act.TAKEN, Act.ANNOUNCE]
    taken = PROBES * PROBE_INTERVAL
    assert host.done[PROBES][0] == pytest.approx(100 + taken)
    assert host.done[PROBES + 1][0] == pytest.approx(100 + taken + ANNOUNCE_INTERVAL)
    # Then it is asked after, and not announced any more.
    segment.run(100)
    assert {act for _, act in host.done[PROBES + 2 :]} == {Act.PROBE}


def test_a_standby_waits_and_takes_over():
    segment = Segment(HIGH)
    segment.run(5)
    segment.hosts.append(Host(LOW, Claim(segment.now)))
    segment.run(60)
    first, standby = segment.hosts
    assert segment.holders() == [HIGH]
    assert set(standby.acts()) == {Act.IN_USE}
    assert first.acts() == [Act.TAKEN]  # it was asked, never claimed
    assert standby.claim.holder == HIGH
    assert {segment.left_to(standby) for _ in range(40)} == {HIGH}  # also while it is probed again
    first.part = -1
    segment.run(RETRY[1] + PROBES * PROBE_INTERVAL + 0.01)
    assert segment.holders() == [LOW]
    assert standby.claim.left_to == first.claim.left_to == b""


def test_an_address_is_left_to_nobody_when_nothing_is_known():
    """It is not enough that somebody claimed it once; after its link was down who was there is forgotten."""
    segment = Segment(HIGH)
    (host,) = segment.hosts
    segment.run(5)
    segment.forge()
    assert (host.acts(), host.claim.holder, host.claim.left_to) == ([Act.TAKEN, Act.DEFENDED], FORGER, b"")
    host.claim.begin(segment.now)
    segment.forge()
    assert host.claim.left_to == FORGER
    host.claim.begin(segment.now)
    assert host.claim.left_to == b""


@pytest.mark.parametrize("seed", range(20))
def test_of_two_that_begin_at_once_one_takes_it(seed):
    segment = Segment(HIGH, LOW, seed=seed)
    segment.run(1)
    assert segment.holders() == [LOW]
    segment.run(60)
    assert segment.holders() == [LOW]


@pytest.mark.parametrize("order", [(LOW, HIGH), (HIGH, LOW)])
@pytest.mark.parametrize("apart", [5.0, 6.1, 17.3])
def test_of_two_that_were_parted_one_yields(order, apart):
    segment = Segment(*order)
    segment.hosts[1].part = 1
    segment.run(apart)
    assert sorted(segment.holders()) == [LOW, HIGH]
    segment.hosts[1].part = 0
    segment.run(ASK_INTERVAL + 2)
    assert segment.holders() == [LOW]
    low, high = sorted(segment.hosts, key=lambda host: host.mac)
    assert high.acts()[:3] == [Act.TAKEN, Act.DEFENDED, Act.YIELDED]
    assert low.acts() == [Act.TAKEN, Act.DEFENDED]
    # Those who believed the other are told the last word.
    segment.run(ASK_INTERVAL + ANNOUNCE_INTERVAL)
    yielded = next(at for at, act in high.done if act is Act.YIELDED)
    assert any(at > yielded and act is Act.ANNOUNCE for at, act in low.done)
    segment.run(60)
    assert segment.holders() == [LOW]


def test_one_forged_claim_while_probing_costs_seconds():
    segment = Segment(HIGH)
    segment.run(0.1)
    segment.forge()
    assert segment.hosts[0].acts() == [Act.IN_USE]
    segment.run(RETRY[1] + PROBES * PROBE_INTERVAL + 0.01)
    assert segment.holders() == [HIGH]


def test_a_probe_by_a_higher_address_is_no_reason_to_wait():
    segment = Segment(LOW)
    segment.forge(HIGH, probe=True)
    segment.run(1)
    assert segment.holders() == [LOW]


@pytest.mark.parametrize("claims", [1, 2, 10])
def test_a_few_forged_claims_are_defended(claims):
    segment = Segment(HIGH)
    segment.run(5)
    for _ in range(claims):
        segment.forge()
        segment.run(0.01)
    assert segment.holders() == [HIGH]
    assert segment.hosts[0].acts() == [Act.TAKEN, Act.DEFENDED]
    segment.run(10)
    assert segment.holders() == [HIGH]
    assert segment.hosts[0].acts(Act.ANNOUNCE) == [Act.ANNOUNCE] * 2  # the second of taking it, and the last word


@pytest.mark.parametrize("macs", ["one lower", "one higher", "many"])
def test_a_flood_takes_nothing_and_costs_little(macs):
    segment = Segment(HIGH)
    segment.run(5)
    began = len(segment.hosts[0].done)
    for i in range(30_000):  # in 30 s
        lower, higher = FORGER, b"\2\0\0\0\0\7"
        segment.forge({"one lower": lower, "one higher": higher}.get(macs, bytes([2, 0, 0, 0, i >> 8 & 255, i & 255])))
        segment.run(0.001)
        assert segment.holders() == [HIGH]
    acts = segment.hosts[0].done[began:]
    assert len([act for _, act in acts if act is Act.PROBE]) <= 30 / PROBE_INTERVAL + 1
    assert len([act for _, act in acts if act is Act.DEFENDED]) <= 30 / DEFEND_INTERVAL + 1
    assert len([act for _, act in acts if act is Act.ANNOUNCE]) <= 30 / ANNOUNCE_INTERVAL + 1
    # Whom it led astray is told the last word.
    segment.run(ASK_INTERVAL + ANNOUNCE_INTERVAL)
    assert Act.ANNOUNCE in [act for at, act in segment.hosts[0].done if at > segment.now - 5]


def test_who_has_it_and_never_yields():
    """A host whose kernel has the address, and knows no rule: a lower one is left alone, a higher one defended from."""
    for mac, holders in ((FORGER, []), (b"\2\0\0\0\0\7", [HIGH])):
        segment = Segment(HIGH)
        segment.run(5)
        (host,) = segment.hosts
        asked = 0
        end = segment.now + 60
        while segment.now < end:
            segment.run(0.05)
            probes = len(host.acts(Act.PROBE))
            if probes > asked:
                asked = probes
                segment.forge(mac)
        assert segment.holders() == holders
        assert len(host.acts(Act.DEFENDED)) <= 60 / DEFEND_INTERVAL + 1
        assert len(host.acts(Act.ANNOUNCE)) <= 2


def test_after_the_link_was_down_it_is_probed_and_announced():
    segment = Segment(LOW)
    segment.run(5)
    (host,) = segment.hosts
    host.done.clear()
    host.claim.begin(segment.now)
    assert segment.holders() == []
    segment.run(5)
    assert [act for _, act in host.done][: PROBES + 2] == [Act.PROBE] * PROBES + [Act.TAKEN, Act.ANNOUNCE]


def test_a_new_mac_address_is_announced_twice():
    segment = Segment(LOW)
    segment.run(5)
    (host,) = segment.hosts
    host.done.clear()
    host.claim.move(segment.now)
    segment.run(5)
    assert host.acts(Act.ANNOUNCE) == [Act.ANNOUNCE] * 2
    assert host.done[0] == (105.0, Act.ANNOUNCE)
    assert segment.holders() == [LOW]
    probing = Claim(0.0)
    probing.move(0.0)
    assert probing.state is State.PROBING


def test_claims_are_counted():
    claim = Claim(0.0)
    claim.heard(0.0, HIGH, LOW, probe=True)  # no claim, as it goes on
    assert claim.claims == 0
    for _ in range(3):
        claim.heard(0.0, HIGH, LOW, probe=False)
    assert (claim.claims, claim.state, claim.holder) == (3, State.IN_USE, HIGH)


def test_one_that_another_process_held_is_held_at_once():
    """No probe, and an announcement a little later; whoever else claims it is asked as ever."""
    segment = Segment(HIGH)
    [host] = segment.hosts
    host.claim.inherit(segment.now)
    assert host.claim.state is State.HELD
    segment.run(ANNOUNCE_INTERVAL + 0.1)
    assert host.acts(Act.PROBE, Act.ANNOUNCE, Act.TAKEN) == [Act.ANNOUNCE]
    segment.run(ASK_INTERVAL)
    assert host.acts(Act.PROBE) == [Act.PROBE]
