"""What is known of backends goes over to another process."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

import msgspec
import pytest

from crablb.model import Backend, Service, Vip
from crablb.selection.loads import MANY, STEPS, Balance, Load

A, B, GONE = (ip_address(f"10.0.0.{n}") for n in (11, 12, 13))
WEB, MAIL = Vip(ip_address("10.0.0.100"), 80), Vip(ip_address("10.0.0.100"), 25)
ALL = [Service(vip, (Backend(A), Backend(B), Backend(GONE)), slow_start=10.0) for vip in (WEB, MAIL)]
LEFT = [Service(WEB, (Backend(A), Backend(B)), slow_start=10.0)]


def busy() -> Balance:
    balance = Balance()
    for vip, address, connections in ((WEB, A, 7), (WEB, B, 2), (MAIL, A, 9), (WEB, GONE, 1)):
        balance.report(vip, address, connections, 500)
        balance.load(vip, address).assigned += 3
        balance.heard(address, 100.0)
    balance.turn(WEB).next = 5
    balance.begin(ALL[0], B, 95.0)
    return balance


def test_loads_turns_and_warmth_go_on():
    """What the other one assigned is counted as connections; what was assigned here already, too."""
    given = msgspec.msgpack.decode(msgspec.msgpack.encode(busy().export()))
    after = Balance()
    after.follow(LEFT, {A, B}, None)
    after.load(WEB, A).assigned += 1
    after.adopt(given, LEFT)
    assert after.read(WEB, A) == Load(1, 11, 0.5)
    assert after.read(WEB, B) == Load(0, 5, 0.5)
    assert after.turn(WEB).next == 5
    assert after.weights(LEFT[0], LEFT[0].backends, 100.0) == {A: STEPS, B: STEPS // 2}
    assert after.reports(A)
    assert not after.reports(GONE)
    assert after.silent(200.0) == {A, B}
    assert {pair[:2] for pair in after.export()["loads"]} == {(str(WEB), str(A)), (str(WEB), str(B))}


def test_numbers_that_went_round():
    balance = busy()
    load = balance.load(WEB, A)
    load.base, load.assigned, load.open = 2**32 - 2, 3, MANY
    after = Balance()
    after.adopt(balance.export(), ALL)
    assert after.read(WEB, A).open == MANY
    assert replace(after.read(WEB, B), open=0) == Load(0, 0, 0.5)


@pytest.mark.parametrize("nonsense", [{}, {"loads": [[1]]}, {"loads": 7}, {**Balance().export(), "heard": [["x"]]}])
def test_nonsense(nonsense):
    with pytest.raises((LookupError, TypeError, ValueError)):
        Balance().adopt(nonsense, ALL)
