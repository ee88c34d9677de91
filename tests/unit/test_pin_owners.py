"""Pins that another user could have made, or can change, are not taken."""

from __future__ import annotations

import os

import pytest

from crablb.errors import KernelError
from crablb.kernel import pins


@pytest.fixture
def places(tmp_path, monkeypatch):
    """In place of /run/crablb and the BPF file system: folders of this user's."""
    run, bpffs = tmp_path / "run", tmp_path / "bpf"
    run.mkdir()
    bpffs.mkdir(mode=0o1777)
    monkeypatch.setattr(pins, "RUN", run)
    monkeypatch.setattr(pins, "ensure_bpffs", lambda: bpffs)
    monkeypatch.setattr(pins, "collect", lambda: None)  # looks at the whole machine
    return run, bpffs / "crablb"


def taken(role: str = "lb-eth0") -> None:
    with pins.own(role, "the test"):
        pass


@pytest.mark.parametrize("depth", [0, 1, 2], ids=["crablb", "namespace", "role"])
@pytest.mark.parametrize("how", ["another's", "open"])
def test_what_another_user_may_have_put_there_is_not_taken(places, depth, how):
    run, made = places
    parts = (made, made / pins.namespace(), made / pins.namespace() / "lb-eth0")
    parts[2].mkdir(parents=True)
    taken()
    parts[2].mkdir(parents=True, exist_ok=True)
    if how == "open":
        parts[depth].chmod(0o777)
    elif os.geteuid():
        pytest.skip("only root gives away")
    else:
        os.chown(parts[depth], 4711, -1)
    with pytest.raises(KernelError, match=rf"^{parts[depth]}: it is user .*; look into it, and: rm -r {parts[depth]}$"):
        taken()
    assert not any(run.glob("*.lock"))
    if how == "another's":
        os.chown(run, 4711, -1)  # root has made it his who serves
        taken()
