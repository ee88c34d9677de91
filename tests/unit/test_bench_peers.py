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


@pytest.mark.parametrize(
    ("ours", "p99", "setup", "reached"),
    [(9.6, 10.2, 14.0, [True, True]), (9.4, 10.4, 14.0, [False, False]), (9.6, 10.2, 16.0, [True, False])],
)
def test_targets(ours, p99, setup, reached):
    programs = Table(
        "peers-bpf", "", "us", [Row("crablb, redirect: crab_server", [2.0]), Row("XDP redirect: x", [9.0])]
    )
    targets = peers.targets(found(ours, p99, setup), programs)
    assert [target.reached for target in targets] == reached
    assert all(bool(target.why) != target.reached for target in targets)
