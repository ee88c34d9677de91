"""Pins that another user could have made, or can change, are not taken."""

from __future__ import annotations

import errno
import os
from pathlib import Path

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


@pytest.mark.parametrize("fails", ["write_text", "replace"])
def test_what_could_not_take_a_place_is_gone(tmp_path, monkeypatch, fails):
    """And what was there stays."""
    path = tmp_path / "state"
    path.write_text("before")
    work = getattr(Path, fails)

    def fail(self, *args):
        if fails == "write_text":
            work(self, "aft")  # as much as there was room for
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, fails, fail)
        with pytest.raises(OSError, match="No space"), pins.replacing(path, ".new") as new:
            new.write_text("after")
    assert path.read_text() == "before"
    assert not list(tmp_path.glob("*.new"))
    with pins.replacing(path, ".new") as new:
        new.write_text("after")
    assert [found.read_text() for found in tmp_path.glob("state*")] == ["after"]
