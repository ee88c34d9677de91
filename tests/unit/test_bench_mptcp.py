"""What is made of the figures of the suite mptcp."""

from __future__ import annotations

import pytest

from bench import mptcp
from bench.figures import Row
from bench.lab import mptcp_counts


def row(name: str, *samples: float) -> Row:
    return Row(name, list(samples))


@pytest.mark.parametrize(
    ("packets", "share", "last", "whys"),
    [(9, 1.5, 4.0, []), (10, 1.5, 4.0, ["process"]), (9, 1.51, 4.0, ["150 packets were sent before"]),
     (9, 1.5, 4.1, ["three and a half round trips"]), (20, 2, 5, ["process", "150 packets", "round trips"])],
)  # fmt: skip
def test_p15(packets, share, last, whys):
    """Medians decide, each mode by its worst; few requests have another share, and what is seen last is leave's."""
    near = {"backup, 1 request": row("", 7), "leave, 1 request": row("", 6), "leave, up": row("", 5, packets, 99)}
    names = [f"{way}, {what}" for way in (*mptcp.MODES, "TCP") for what in ("10 MB down", "10 MB up", "50 requests")]
    far = {figure: {name: row(name, 1) for name in names} for figure in ("packets", "share", "last")}
    far["packets"]["backup, 10 MB up"] = row("", 150)
    far["share"] |= {
        "backup, 10 MB up": row("", share),
        "leave, 50 requests": row("", 30),
        "TCP, 10 MB up": row("", 100),
    }
    far["last"] |= {"leave, 10 MB down": row("", last), "backup, 10 MB up": row("", 30)}
    target = mptcp.p15(near, far)
    assert (target.name, target.reached) == ("P15", not whys)
    assert f"leave {packets} (up)" in target.value
    assert "backup 7 (1 request)" in target.value
    assert bool(target.why) == bool(whys)
    assert all(why in target.why for why in whys)


def test_no_counters_without_mptcp():
    assert mptcp_counts("TcpExt: A\nTcpExt: 1\n") == {}
    assert mptcp_counts("TcpExt: A\nTcpExt: 1\nMPTcpExt: B C\nMPTcpExt: 2 3\n") == {"B": 2, "C": 3}
