"""Numbers of backends and services: given, held, released, and given again when nothing holds them."""

from __future__ import annotations

from ipaddress import ip_address

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from crablb.dataplane.registry import Numbers, Registry
from crablb.errors import ConfigError
from crablb.model import Backend, Config, Service, Vip

LIMIT = 8
KEYS = st.sampled_from("abcdefghijkl")


class Numbering(RuleBasedStateMachine):
    """Against a model: what is held, and what cools because a snapshot from before may name it."""

    def __init__(self) -> None:
        super().__init__()
        self.held = {"a": 1, "b": 4}  # by a daemon before
        self.numbers: Numbers[str] = Numbers(LIMIT, self.held)
        self.cooling: set[int] = set()

    @rule(keys=st.lists(KEYS, max_size=6))
    def give(self, keys: list[str]) -> None:
        new = set(keys) - self.held.keys()
        lacking = max(0, len(new) - (LIMIT - len(self.held) - len(self.cooling)))
        assert self.numbers.lacking(keys) == lacking
        if lacking:
            with pytest.raises(OverflowError):
                self.numbers.give(keys)
            return
        assert set(self.numbers.give(keys)) == new
        for key in new:
            number = self.numbers[key]
            assert number not in self.cooling  # a snapshot may name it still
            assert number not in self.held.values()  # never twice
            self.held[key] = number

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.held)))
        number = self.held.pop(key)
        assert self.numbers.release(key) == number
        self.cooling.add(number)

    @rule()
    def settle(self) -> None:
        self.numbers.settle()
        self.cooling.clear()

    @invariant()
    def same(self) -> None:
        assert dict(self.numbers) == self.held
        assert all(0 <= number < LIMIT for number in self.held.values())
        assert len(set(self.held.values())) == len(self.held)


TestNumbering = Numbering.TestCase


def test_low_numbers_first():
    numbers: Numbers[str] = Numbers(10)
    assert numbers.give("abca") == ["a", "b", "c"]
    numbers.release("a")
    numbers.settle()
    numbers.give("de")
    assert dict(numbers) == {"b": 1, "c": 2, "d": 0, "e": 3}


ADDRESSES = [ip_address(f"10.0.0.{i}") for i in range(1, 13)]
VIPS = [Vip(ip_address("10.0.1.1"), port) for port in range(80, 84)]


class Holding(RuleBasedStateMachine):
    """A registry, a configuration that changes, flows, and a worker that looks into a snapshot for as long as it likes.

    A flow names a backend by id and must find the one that it was made for, whatever was given out meanwhile.
    """

    def __init__(self) -> None:
        super().__init__()
        self.registry = Registry(8)
        self.config = Config(("eth0",), ())
        self.flows: list[tuple[int, object]] = []  # id, and whose it was when the flow was made
        self.snapshot: dict[int, object] = {}  # the one that the worker looks into: id -> who may get new flows
        self.published()

    def published(self) -> None:
        self.newest = {self.registry.backends[address]: address for address in self.config.backends}
        self.known = {number: address for address, number in self.registry.backends.items()}

    @rule(backends=st.sets(st.sampled_from(ADDRESSES), max_size=6), vips=st.sets(st.sampled_from(VIPS), min_size=1))
    def configure(self, backends, vips) -> None:
        members = tuple(Backend(address) for address in sorted(backends))
        self.config = Config(("eth0",), tuple(Service(vip, members) for vip in sorted(vips, key=str)))
        self.registry.admit(self.config)
        self.published()

    @rule()
    def look(self) -> None:
        """The worker passes a quiescent point: from now on it looks into the newest snapshot."""
        self.snapshot = self.newest

    @precondition(lambda self: self.snapshot)
    @rule(data=st.data())
    def connect(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.snapshot)))
        self.flows.append((number, self.snapshot[number]))

    @precondition(lambda self: self.flows)
    @rule(data=st.data())
    def end(self, data: st.DataObject) -> None:
        self.flows.remove(data.draw(st.sampled_from(self.flows)))

    @rule()
    def sweep(self) -> None:
        if self.snapshot is not self.newest:
            return  # not quiet: the engine waits for the next one
        left = np.bincount([number for number, _ in self.flows], minlength=1 << 16).astype(np.uint32)
        if self.registry.collect([self.config], left):
            self.published()

    @invariant()
    def flows_find_their_own(self) -> None:
        for number, address in self.flows:
            assert self.known.get(number) == address
        numbers = list(self.registry.backends.values())
        assert len(set(numbers)) == len(numbers)
        assert self.config.backends <= self.registry.backends.keys()
        assert {s.vip for s in self.config.services} <= self.registry.services.keys()


TestHolding = Holding.TestCase


def config(count: int, first: int = 0, vip: str = "10.0.0.100") -> Config:
    backends = tuple(Backend(ip_address(0x0A010000 + i)) for i in range(first, first + count))
    return Config(("eth0",), (Service(Vip(ip_address(vip), 80), backends),))


def test_more_backends_than_ids_in_a_life():
    """Autoscaling: 65,535 at a time, but any number one after the other."""
    registry, nothing, none = Registry(16), Config(("eth0",), ()), np.zeros(1 << 16, np.uint32)
    for round_ in range(4):
        registry.admit(config(30_000, 30_000 * round_))
        registry.collect([nothing], none)
    assert not registry.backends
    registry.collect([nothing], none)
    registry.admit(config(1))
    assert list(registry.backends.values()) == [0]


def test_too_many_at_a_time():
    registry = Registry(1)
    registry.admit(config(60_000))
    services = dict(registry.services)
    with pytest.raises(ConfigError) as caught:
        registry.admit(config(6_000, 60_000, "10.0.0.101"))
    assert caught.value.problems == [
        "65,535 different backends at most can be known at a time, those removed whose connections last included;"
        " 465 too many: try again later, or restart crablb serve",
        "1 services at most can be known at a time, those removed whose connections last included;"
        " 1 too many: try again later, or restart crablb serve",
    ]
    assert dict(registry.services) == services  # nothing has changed
    assert len(registry.backends) == 60_000
