"""Processes that are killed under live connections: a few instants of those that ``make deaths`` tries."""

from __future__ import annotations

from pathlib import Path

import pytest

from crablb.agent import dsr
from crablb.agent.base import has_clsact
from crablb.kernel import bpf
from tests.deaths.farm import Farm, exists
from tests.deaths.rounds import ACTS, Tally, first, play
from tests.helpers.namespaces import Pair, unique

#: Whose, what, and at which call, or millisecond.
SOME = (
    ("lb", "predecessor", 5),
    ("lb", "successor", 140),
    ("lb", "reloading", 20),
    ("lb", "starting", 120),
    ("client", "starting", 110),
    ("server1", "ending", 40),
    ("server2", "starting", 200),
    ("all", "serving", 300),
)
FIRST = (("server2", 240), ("client", 150), ("lb", 120))


@pytest.mark.long
def test_nobody_notices(tmp_path: Path):
    """No connection breaks, new ones need one retransmission at the most, and nothing is left in the end."""
    tally = Tally()
    with Farm.made(tmp_path / "farm", offload=False, connections=60) as farm:
        assert {kind: count for kind, count in farm.opened["held"].items() if count} == farm.wanted
        assert farm.opened["redirected"]["tunnel6"] == 0
        # Not all, on a machine that is late: a SYN that is sent again asks for neither.
        assert farm.opened["redirected"]["redirect4"] and farm.opened["redirected"]["redirect6"]
        assert farm.opened["multipath"]["mptcp4"] and farm.opened["multipath"]["mptcp6"]
        for role, name, at in SOME:
            play(farm, tally, role, next(act for act in ACTS[role] if act.name == name), at)
        assert any(exists(*one) for one in farm.ids)  # it is seen while it is there
        tally.end(farm)
        for role, at in FIRST:
            first(farm, tally, role, at)
    assert tally.faults == [], tally.told()
    assert tally.struck.total() >= len(SOME)


@pytest.mark.long
def test_a_connection_that_breaks_is_seen(tmp_path: Path):
    """Their flows are taken away, and the backends weighted otherwise: those by the fallback come to another server."""
    with Farm.made(tmp_path / "farm", offload=True, connections=60) as farm:
        farm.processes["lb"].kill()
        farm.remove("lb")
        farm.write()
        farm.start("lb")
        farm.tell("beat")
        broken = farm.tell("state")["broken"]
    assert broken
    assert all(line.startswith(("tunnel", "mptcp")) for line in broken), broken


def test_what_is_made_is_noted_before(monkeypatch: pytest.MonkeyPatch):
    """Whoever is killed when he has made a qdisc has left a note of it."""
    noted: list[bool] = []

    def killed(*_: object, **__: object) -> None:
        assert not has_clsact("veth0")
        raise KeyboardInterrupt

    monkeypatch.setattr(bpf, "attach_tc", killed)
    folder = bpf.ensure_bpffs() / f"crablb-{unique()}"
    folder.mkdir()
    try:
        with Pair.made() as pair, pytest.raises(KeyboardInterrupt):
            pair.ip("addr", "add", "10.0.0.2/24", "dev", "veth0")
            dsr.set_up([], ["veth0"], [], folder, lambda state: noted.append(state["interfaces"]["veth0"]))
    finally:
        for pin in folder.iterdir():
            pin.unlink()
        folder.rmdir()
    assert noted[-1] is True
