"""The state file: what goes wrong with it is told, and keeps nobody from serving."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from crablb.control import state
from crablb.control.state import Saved, Store, write
from crablb.overlay import Changes, Edit, MemberEdit, ServiceEdit

SEED = bytes(16)


def changes(weight: int) -> Changes:
    member = MemberEdit(settings={"weight": Edit(1, weight)})
    return Changes({"tcp://10.0.0.100:80": ServiceEdit(backends={"10.0.0.11": member})})


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "lib" / "eth0.state.json"


def store(path: Path, interface: str = "eth0", seed: bytes = SEED) -> Store:
    return Store(path, (interface,), seed)


def loaded(path: Path) -> Store:
    """One that has found nothing of use."""
    one = store(path)
    assert one.load() == Saved(interfaces=("eth0",), deployment=one._deployment)
    return one


async def kept(one: Store, *all_: Changes, seconds: float = 10.0) -> bool:
    """Write these, one after the other."""
    task = asyncio.create_task(one.run())
    for each in all_:
        one.keep(each)
    done = await one.written(seconds)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    return done


def test_what_is_kept_is_found(path):
    assert store(path).load().changes == Changes()
    assert asyncio.run(kept(store(path), changes(2), changes(3)))
    assert store(path).load().changes == changes(3)
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(path.parent) == [path.name]


def test_what_comes_while_it_is_written_is_written_once(path, monkeypatch):
    """However many changes there are: the disk sees the first, and the last."""
    seen: list[Changes] = []

    def slow(path: Path, data: bytes) -> None:
        seen.append(state.msgspec.json.decode(data, type=Saved).changes)
        write(path, data)

    monkeypatch.setattr(state, "write", slow)

    async def run() -> None:
        one = store(path)
        task = asyncio.create_task(one.run())
        one.keep(changes(1))
        await one.written(10)
        for weight in range(2, 500):
            one.keep(changes(weight))
        assert await one.written(10)
        task.cancel()

    asyncio.run(run())
    assert seen == [changes(1), changes(499)]
    assert store(path).load().changes == changes(499)


def test_health_goes_along(path):
    one = store(path)
    one.health = lambda: [{"backend": "10.0.0.11", "healthy": False}]
    assert asyncio.run(kept(one, changes(2)))
    assert store(path).load().health == [{"backend": "10.0.0.11", "healthy": False}]


@pytest.mark.parametrize(
    "held",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 100_000,
        b"null",
        b'{"version": "one"}',
        b'{"version": 1}',
        b'{"version": 1, "interfaces": 5, "deployment": ""}',
        b'{"version": 1, "interfaces": ["eth0"], "deployment": "", "changes": {"services": [1]}}',
        b'{"version": 1, "interfaces": ["eth0"], "deployment": "", "changes": {"services": {"x": {"added": 5}}}}',
    ],
)
def test_a_corrupt_one_is_put_aside(path, held):
    path.parent.mkdir()
    path.write_bytes(held)
    with capture_logs() as logs:
        begun = loaded(path)
    assert "of no use" in logs[0]["event"]
    assert path.read_bytes() == held  # until something is written: it may be another daemon's
    aside = path.with_name(f"{path.name}.corrupt")
    assert asyncio.run(kept(begun, changes(2)))
    assert aside.read_bytes() == held
    assert store(path).load().changes == changes(2)


@pytest.mark.parametrize(("version", "suffix"), [(0, "v0"), (2, "v2"), (999, "v999")])
def test_one_of_another_version_is_put_aside(path, version, suffix):
    path.parent.mkdir()
    path.write_text(json.dumps({"version": version, "what": "ever"}))
    with capture_logs() as logs:
        begun = loaded(path)
    assert f"version {version}" in logs[0]["reason"]
    assert asyncio.run(kept(begun, changes(2)))
    assert path.with_name(f"{path.name}.{suffix}").exists()


@pytest.mark.parametrize("other", [{"interface": "eth1"}, {"seed": bytes([1]) * 16}])
def test_one_of_another_load_balancer_is_put_aside(path, other: dict[str, Any]):
    assert asyncio.run(kept(store(path, **other), changes(2)))
    with capture_logs() as logs:
        begun = loaded(path)
    assert "another" in logs[0]["reason"]
    assert asyncio.run(kept(begun, changes(3)))
    assert path.with_name(f"{path.name}.other").exists()


def folder(path: Path) -> None:
    path.mkdir(parents=True)
    (path / "in it").touch()


def pipe(path: Path) -> None:
    path.parent.mkdir()
    os.mkfifo(path)


def others_may_write(path: Path) -> None:
    asyncio.run(kept(store(path), changes(2)))
    path.chmod(0o666)


def link(path: Path) -> None:
    path.parent.mkdir()
    path.symlink_to("/dev/zero")


def link_to_nowhere(path: Path) -> None:
    path.parent.mkdir()
    path.symlink_to("nowhere")


def group_may_write(path: Path) -> None:
    asyncio.run(kept(store(path), changes(2)))
    path.chmod(0o664)


def anothers(path: Path) -> None:
    asyncio.run(kept(store(path), changes(2)))
    os.chown(path, 65534, 65534)


def too_long(path: Path) -> None:
    path.parent.mkdir()
    path.touch()
    os.truncate(path, state.MOST + 1)


UNREADABLE = [folder, pipe, others_may_write, group_may_write, anothers, link, link_to_nowhere, too_long]


@pytest.mark.parametrize("odd", UNREADABLE if os.geteuid() == 0 else [o for o in UNREADABLE if o is not anothers])
def test_what_is_no_file_of_ours_is_put_aside_unread(path, odd):
    """And that is a problem until somebody has looked into it."""
    odd(path)
    before = path.lstat()
    with capture_logs() as logs:
        begun = loaded(path)
    assert "it cannot be read" in logs[0]["reason"]
    assert logs[0]["remedy"] == state.REMEDY
    assert begun.lost.startswith(f"{path}: it cannot be read")
    assert path.lstat().st_ino == before.st_ino
    assert asyncio.run(kept(begun, changes(3)))
    aside = path.with_name(f"{path.name}.unreadable")
    assert (aside.lstat().st_ino, aside.lstat().st_mode) == (before.st_ino, before.st_mode)
    assert begun.lost == f"{aside}: put aside by a start"
    again = store(path)
    assert (again.load().changes, again.lost) == (changes(3), begun.lost)
    aside.rename(path.parent.parent / "elsewhere")
    assert asyncio.run(kept(again, changes(4)))
    assert again.lost == ""


def test_the_remedy_brings_back_what_was_lost(path):
    group_may_write(path)
    asyncio.run(kept(loaded(path), changes(3)))
    aside = path.with_name(f"{path.name}.unreadable")
    aside.chmod(0o600)
    aside.rename(path)
    again = store(path)
    assert (again.load().changes, again.lost) == (changes(2), "")


def test_it_is_put_aside_though_nothing_changes(path):
    """It is not to be found in the way by a later start, nor written over."""
    path.parent.mkdir()
    path.write_bytes(b"{")

    async def run() -> None:
        one = loaded(path)
        task = asyncio.create_task(one.run())
        async with asyncio.timeout(30):
            while not one.lost.endswith("put aside by a start"):
                await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(run())
    assert path.with_name(f"{path.name}.corrupt").read_bytes() == b"{"


def test_each_that_is_put_aside_is_kept(path):
    path.parent.mkdir()
    for n in range(4):
        path.write_text(f"{{{n}")
        assert asyncio.run(kept(loaded(path), changes(2)))
    found = sorted(aside.name.removeprefix(path.name) for aside in path.parent.iterdir())
    assert found == ["", ".corrupt", ".corrupt-2", ".corrupt-3", ".corrupt-4"]
    assert path.with_name(f"{path.name}.corrupt").read_text() == "{0"


def test_what_cannot_be_put_aside_is_not_written_over(path, monkeypatch):
    monkeypatch.setattr(state, "AGAIN", 0.01)
    others_may_write(path)
    before, rename = path.read_bytes(), Path.rename
    begun = loaded(path)

    def refused(self: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    async def run() -> None:
        monkeypatch.setattr(Path, "rename", refused)
        task = asyncio.create_task(begun.run())
        begun.keep(changes(3))
        assert not await begun.written(10)
        assert begun.trouble == "Operation not permitted"
        assert begun.lost.startswith(f"{path}: ")
        assert path.read_bytes() == before
        monkeypatch.setattr(Path, "rename", rename)
        async with asyncio.timeout(10):
            while not await begun.written(0.01):
                await asyncio.sleep(0)
        task.cancel()

    asyncio.run(run())
    assert path.with_name(f"{path.name}.unreadable").read_bytes() == before


def no_room(path: Path) -> Iterator[None]:
    """No file may have more than a few bytes."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, ignored)


def in_the_way(path: Path) -> Iterator[None]:
    folder(path)
    yield
    (path / "in it").unlink()
    path.rmdir()


def no_folder(path: Path) -> Iterator[None]:
    path.parent.write_text("a file")
    yield
    path.parent.unlink()


@pytest.mark.parametrize("fault", [no_room, in_the_way, no_folder])
def test_what_cannot_be_written_is_told_once_counted_and_tried_again(path, fault, monkeypatch):
    monkeypatch.setattr(state, "AGAIN", 0.01)
    failures: list[int] = []

    async def run() -> list[str]:
        one = store(path)
        one.failed = lambda: failures.append(1)
        trouble = fault(path)
        next(trouble)
        task = asyncio.create_task(one.run())
        with capture_logs() as logs:
            one.keep(changes(2))
            assert not await one.written(10)
            while len(failures) < 3:
                await one.written(0.01)
                await asyncio.sleep(0)
            next(trouble, None)
            async with asyncio.timeout(10):
                while not await one.written(0.01):
                    await asyncio.sleep(0)
        task.cancel()
        return [entry["event"] for entry in logs]

    told = asyncio.run(run())
    assert len([event for event in told if "is not written down" in event]) == 1
    assert told[-1] == "what is changed at run time is written down again"
    assert store(path).load().changes == changes(2)
    assert os.listdir(path.parent) == [path.name]


def test_a_disk_that_hangs_holds_nobody_up(path, monkeypatch):
    """The event loop goes on, and so does a stop; the process ends."""
    monkeypatch.setattr(state, "LAST", 0.05)
    code = (
        "import asyncio, threading\n"
        "from crablb.control import state\n"
        "state.LAST = 0.05\n"
        "state.write = lambda *_: threading.Event().wait()\n"
        "from tests.unit.test_state import changes, store\n"
        "from pathlib import Path\n"
        "async def run():\n"
        "    one = store(Path('/nowhere'))\n"
        "    task = asyncio.create_task(one.run())\n"
        "    one.keep(changes(2))\n"
        "    assert not await one.written(0.05)\n"
        "    task.cancel()\n"
        "    await one.close()\n"
        "asyncio.run(run())\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_close_writes_what_is_left(path):
    async def run() -> None:
        one = store(path)
        one.keep(changes(4))
        await one.close()
        await one.close()

    asyncio.run(run())
    assert store(path).load().changes == changes(4)


#: What of os changes something.
CALLS = ("mkdir", "open", "write", "fsync", "fchmod", "rename", "replace", "unlink")


@pytest.mark.parametrize("how", ["killed", "fails"])
@pytest.mark.parametrize("usable", [True, False])
def test_at_whatever_step_it_ends_nothing_is_lost(path, how, usable):
    """Before each call that changes something: what was there is there, whole, in its place or aside."""
    assert asyncio.run(kept(store(path), changes(1)))
    before = path.read_bytes()
    seen = set()
    for name in CALLS:
        for when in range(4):
            for left in path.parent.iterdir():
                left.unlink()
            path.write_bytes(before)
            path.chmod(0o600 if usable else 0o666)
            pid = os.fork()
            if not pid:
                _end_at(name, when, how)
                with contextlib.suppress(OSError):
                    asyncio.run(kept(loaded(path) if not usable else store(path), changes(2), seconds=5))
                os._exit(0)
            os.waitpid(pid, 0)
            asides = [aside.read_bytes() for aside in path.parent.glob(f"{path.name}.*")]
            there = path.read_bytes() if path.exists() else None
            if usable:
                assert there is not None, (name, when)
                assert not asides
            else:
                assert before in (there, *asides), (name, when)
            if there and there != before:
                assert store(path).load().changes == changes(2), (name, when)
            seen.add(there == before)
            write(path, before)  # what is left of a crash is in nobody's way
    assert seen == {True, False}


def _end_at(name: str, when: int, how: str) -> None:
    """Before the ``when``-th call of a function of os."""
    real, left = getattr(os, name), [when]

    def ending(*args: Any, **more: Any) -> Any:
        left[0] -= 1
        if left[0] == -1:
            if how == "killed":
                os._exit(1)
            raise OSError(5, "Input/output error")
        return real(*args, **more)

    setattr(os, name, ending)
