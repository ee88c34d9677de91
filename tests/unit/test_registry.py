"""Numbers of backends and services: given, held, released, and given again when nothing holds them."""

from __future__ import annotations

from ipaddress import ip_address

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


def config(count: int, first: int = 0, vip: str = "10.0.0.100") -> Config:
    backends = tuple(Backend(ip_address(0x0A010000 + i)) for i in range(first, first + count))
    return Config(("eth0",), (Service(Vip(ip_address(vip), 80), backends),))


def test_more_backends_than_ids_in_a_life():
    """Autoscaling: 65,535 at a time, but any number one after the other."""
    registry = Registry(16)
    for round_ in range(3):
        registry.admit(config(30_000, 30_000 * round_))
        for address in list(registry.backends):
            registry.backends.release(address)
        registry.settle()
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
