"""When open MPTCP connections leave a load balancer together, and when each by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from ipaddress import ip_address
from types import SimpleNamespace

import pytest

from crablb.agent import mptcp
from crablb.agent.mptcp import PATIENCE, Ready
from crablb.config import parse_vip
from crablb.kernel import mptcp as kernel
from crablb.kernel.mptcp import ANSWER, Subflow
from crablb.model import Address, Vip

VIPS = [parse_vip("tcp://10.0.0.100:80"), parse_vip("tcp://10.0.0.100:81"), parse_vip("tcp://[fd00::100]:80")]
Done = list[tuple[str, object]]


@pytest.fixture
def look(monkeypatch) -> Callable[..., tuple[tuple[int, int], Done]]:
    """A look at what there is, by address; what it gave, and what was done."""
    found: dict[Address, Ready] = {}
    done: Done = []
    manager = SimpleNamespace(flush_initial=lambda address: done.append(("together", address)))
    monkeypatch.setattr(mptcp, "PathManager", lambda: nullcontext(manager))
    monkeypatch.setattr(mptcp, "leaving", lambda address: found[address])
    monkeypatch.setattr(mptcp, "_destroy", lambda one: done.append(("alone", one)))

    def look(ipv4: Ready, ipv6: Ready, waited: dict[Address, int] | None) -> tuple[tuple[int, int], Done]:
        found.update({VIPS[0].address: ipv4, VIPS[2].address: ipv6})
        done.clear()
        return mptcp.leave_now(VIPS, waited), list(done)

    return look


def address(vip: Vip) -> Address:
    return vip.address


NONE = Ready([], 0, 0)


def test_all_that_can_leave_together(look):
    assert look(Ready([["a"], ["b"]], 0, 0), NONE, {}) == ((2, 0), [("together", address(VIPS[0]))])


def test_whoever_has_no_other_way_holds_up_nobody(look):
    """He may never have one."""
    assert look(Ready([["a"], ["b"]], 1, 0), NONE, {}) == ((2, 1), [("alone", "a"), ("alone", "b")])


def test_whoever_gives_no_answer_is_waited_for(look):
    """At so many looks, each address by itself; then the others leave one by one, at each look from then on."""
    waited: dict[Address, int] = {}
    silent, fine = Ready([["a"], ["b"]], 1, 1), Ready([["c"]], 0, 0)
    for _ in range(PATIENCE):
        assert look(silent, fine, waited) == ((1, 3), [("together", address(VIPS[2]))])
    for _ in range(2):
        assert look(silent, NONE, waited) == ((2, 1), [("alone", "a"), ("alone", "b")])
    # It answered, and is waited for again the next time.
    assert look(fine, NONE, waited) == ((1, 0), [("together", address(VIPS[0]))])
    assert look(silent, NONE, waited) == ((0, 3), [])


def test_one_look_waits_for_nobody(look):
    assert look(Ready([["a"]], 1, 1), NONE, None) == ((1, 1), [("alone", "a")])


class Peers:
    """Peers that answer, or not, some time after they are asked; each look, and each row of it, takes its time."""

    def __init__(
        self, monkeypatch, count: int, *, answer: float | None, row: float = 0.0, starved: float = 0.0
    ) -> None:
        self.now = 100.0
        self.answer, self.row, self.starved = answer, row, starved
        here, there = ip_address("10.0.0.11"), ip_address("10.0.0.2")
        self.ways = [Subflow(1, here, 80, there, port, heard=50.0) for port in range(1, count + 1)]
        self.asked: dict[Subflow, float] = {}
        monkeypatch.setattr(kernel, "time", SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleep))
        monkeypatch.setattr(kernel, "_challenge", lambda one: self.asked.update({one: self.now}))
        monkeypatch.setattr(kernel, "subflows", self.subflows)

    def sleep(self, seconds: float) -> None:
        self.now += seconds + self.starved

    def subflows(self) -> Iterator[Subflow]:
        for one in self.ways:
            self.now += self.row
            heard = one.heard
            if self.answer is not None and self.now >= (came := self.asked[one] + self.answer):
                heard = self.now - came
            yield replace(one, heard=heard)


def test_who_answers_is_heard(monkeypatch):
    peers = Peers(monkeypatch, 3, answer=0.1)
    assert kernel.answering(peers.ways) == {one.ends for one in peers.ways}
    assert peers.now - 100 < 0.2


def test_who_does_not_answer_is_waited_for_and_no_longer(monkeypatch):
    peers = Peers(monkeypatch, 3, answer=None)
    assert kernel.answering(peers.ways) == set()
    assert ANSWER <= peers.now - 100 < ANSWER + 0.1


def test_an_asker_without_cpu_looks_once_more(monkeypatch):
    """It is not the peer's silence if the time is over before anybody has looked."""
    peers = Peers(monkeypatch, 3, answer=0.1, starved=2 * ANSWER)
    assert kernel.answering(peers.ways) == {one.ends for one in peers.ways}


def test_so_many_that_a_look_takes_longer_than_an_answer(monkeypatch):
    peers = Peers(monkeypatch, 1000, answer=0.001, row=0.001)
    assert kernel.answering(peers.ways) == {one.ends for one in peers.ways}
