"""What is made of the peers suite's figures."""

from __future__ import annotations

import pytest

from bench import peers
from bench.figures import Row, Table


def row(*samples: float) -> Row:
    return Row("", list(samples))


def found(ours: float, p99: float, setup: float) -> dict[str, dict[str, Row]]:
    same = {"direct": row(10.0, 10.0, 10.0)}
    return {
        "connections": {**same, "crablb, redirect": row(ours, ours, ours), "nginx stream": row(5.0, 6.0, 5.0),
                        "XDP redirect": row(9.0, 9.0, 9.0)},
        "cpu": {**same, "crablb, redirect": row(14.0, 14.0, 14.0), "XDP redirect": row(11.0, 11.0, 11.0)},
        "rr p50": {**same, "crablb, redirect": row(10.1, 10.1, 10.1)},
        "rr p99": {**same, "crablb, redirect": row(p99, p99, p99)},
        "setup p50": {**same, "crablb, redirect": row(setup, setup, setup), "crablb, DSR": row(20.0, 20.0, 20.0)},
    }  # fmt: skip


PROGRAMS = Table("peers-bpf", "", "us", [Row("crablb, redirect: crab_server", [2.0]), Row("XDP redirect: x", [9.0])])


@pytest.mark.parametrize(
    ("shared", "apart", "reached"),
    [
        ((8.2, 10.3, 19.0), (9.4, 10.3, 14.0), [True, True]),
        ((7.9, 10.3, 19.0), (9.4, 10.3, 14.0), [False, True]),  # few on one CPU
        ((8.2, 10.3, 19.0), (9.2, 10.3, 14.0), [False, True]),  # few apart
        ((8.2, 10.5, 19.0), (9.4, 10.3, 14.0), [True, False]),  # slow on one CPU
        ((8.2, 10.3, 19.0), (9.4, 10.5, 14.0), [True, False]),  # slow apart
        ((8.2, 10.3, 14.0), (9.4, 10.3, 16.0), [True, False]),  # slow to set up: that is judged apart
    ],
)
@pytest.mark.parametrize("counted", [True, False])
def test_targets(shared, apart, reached, counted):
    second = found(*apart)
    del second["cpu"]
    if counted:
        second |= {"endpoints": second["connections"], "balancer": second["connections"]}
    targets = peers.targets(found(*shared), PROGRAMS, second)
    assert [target.reached for target in targets] == reached
    assert all(bool(target.why) != target.reached for target in targets)
    assert all("on one CPU " in t.value and "; the load balancer on a CPU of its own " in t.value for t in targets)


@pytest.mark.parametrize(("us", "waited"), [(80_000.0, True), (110_000.0, False)])
def test_whose_time_it_is(us, waited):
    """Nine connections a second: of 80 ms each the endpoints' CPU is not full, of 110 it is."""
    second = found(9.0, 10.3, 14.0)
    second |= {"endpoints": {"direct": row(70_000.0), "crablb, redirect": row(us)}, "balancer": second["connections"]}
    why = peers.targets(found(8.2, 10.3, 14.0), PROGRAMS, second)[0].why
    assert f"{us - 70_000:.0f} us more redirected: 2 us in BPF programs" in why
    assert ("of that CPU, so connections also waited" in why) == waited


def test_targets_of_one_layout():
    """What is reached there is not reached yet; what is not there, is not."""
    for shared, reached in (((8.2, 10.3, 14.0), None), ((7.9, 10.5, 14.0), False)):
        targets = peers.targets(found(*shared), PROGRAMS, {})
        assert [target.reached for target in targets] == [reached, reached]
        assert all(target.value.endswith("a CPU of its own: not measured") for target in targets)
