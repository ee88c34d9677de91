"""What a client's programs are told about offers."""

from __future__ import annotations

import pytest
from crablb._native import ffi

from crablb.agent import offering
from crablb.kernel import pins


def given_up(first: float, count: int, linear: int) -> float:
    """As tcp_retransmit_timer and tcp_write_timeout do it: seconds until connect() fails."""
    whole, timeout, sent_again = 0.0, first, 0
    while True:
        whole += timeout
        if sent_again >= count + linear:
            return whole
        sent_again += 1
        if sent_again > linear:
            timeout *= 2


@pytest.mark.parametrize("linear", [None, 0, 4, 10])
@pytest.mark.parametrize("retries", [1, 2, 6, 10])
@pytest.mark.parametrize("retransmission", [0.05, 0.25, 0.3, 0.9])
def test_a_dead_vip_is_given_up_no_earlier(monkeypatch, tmp_path, retransmission, retries, linear):
    """Nor much later, with what the system is set to."""
    (tmp_path / "retries").write_text(f"{retries}\n")
    monkeypatch.setattr(offering, "RETRIES", tmp_path / "retries")
    monkeypatch.setattr(offering, "LINEAR", tmp_path / "linear")  # not there before Linux 6.5
    if linear is not None:
        (tmp_path / "linear").write_text(f"{linear}\n")
    told = ffi.from_buffer("struct crab_client_settings *", offering.settings(1000, retransmission=retransmission))
    first = told.rto / told.hz
    assert retransmission <= first <= 1.1 * retransmission + 1 / told.hz
    for count, more in enumerate(told.more, 1):
        before = given_up(1, count, linear or 0)
        after = given_up(first, count + more, linear or 0)
        assert before <= after
        assert given_up(first, count + more - 1, linear or 0) < before or more == 0


def test_default_costs_a_dead_vip_next_to_nothing(monkeypatch, tmp_path):
    for name, value in (("RETRIES", 6), ("LINEAR", 4)):
        (tmp_path / name).write_text(str(value))
        monkeypatch.setattr(offering, name, tmp_path / name)
    told = ffi.from_buffer("struct crab_client_settings *", offering.settings(1000))
    assert given_up(1, 6, 4) <= given_up(told.rto / told.hz, 6 + told.more[5], 4) < 1.02 * given_up(1, 6, 4)


@pytest.mark.parametrize("retransmission", [0, 1, 3])
def test_as_the_system_does(retransmission):
    told = ffi.from_buffer("struct crab_client_settings *", offering.settings(7, retransmission=retransmission))
    assert (told.rto, list(told.more), told.flows, told.offering) == (0, [0] * 7, 7, 1)
    assert told.netns_cookie == pins.cookie() > 0


@pytest.mark.parametrize(("age", "expected"), [(0, 67), (30, 37), (59, 8), (60, 7), (90, 4), (120, 0), (10**9, 0)])
def test_last_minute(age, expected):
    """Sixty in the minute before, spread evenly, and seven in the present one."""
    counts = ffi.new("struct crab_client_minute *", {"since_ns": 10**18, "now": [7] * 4, "before": [60] * 4})
    assert offering.last_minute(counts, 10**18 + age * 10**9) == [expected] * 4
