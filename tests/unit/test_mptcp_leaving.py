"""When open MPTCP connections leave a load balancer together, and when each by itself."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from crablb.agent import mptcp
from crablb.agent.mptcp import PATIENCE, Ready
from crablb.config import parse_vip
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
