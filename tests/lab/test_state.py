"""The state file on file systems that are full, or read-only."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from crablb.control import state
from tests.unit.test_state import changes, store


@pytest.fixture
def small(tmp_path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    place = tmp_path / "lib"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,mode=755", "tmpfs", place], check=True)
    yield place
    subprocess.run(["umount", "--lazy", place], check=True)


def fill(place: Path) -> None:
    with pytest.raises(OSError, match="No space left"), open(place / "big", "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


def remount(place: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", place], check=True)


@pytest.mark.parametrize("fault", ["full", "read-only"])
def test_it_is_told_and_written_when_there_is_room_again(small, fault, monkeypatch):
    monkeypatch.setattr(state, "AGAIN", 0.01)
    path = small / "eth0.state.json"
    failures: list[int] = []

    async def run() -> list[dict[str, object]]:
        one = store(path)
        one.failed = lambda: failures.append(1)
        task = asyncio.create_task(one.run())
        one.keep(changes(2))
        assert await one.written(10)
        if fault == "full":
            fill(small)
        else:
            remount(small, "ro")
        with capture_logs() as logs:
            one.keep(changes(3))
            assert not await one.written(10)
            assert store(path).load().changes == changes(2)  # whole, as it was
            if fault == "full":
                (small / "big").unlink()
            else:
                remount(small, "rw")
            async with asyncio.timeout(10):
                while not await one.written(0.01):
                    await asyncio.sleep(0)
        task.cancel()
        return list(logs)

    logs = asyncio.run(run())
    assert failures
    assert logs[0]["reason"] == {"full": "No space left on device", "read-only": "Read-only file system"}[fault]
    assert store(path).load().changes == changes(3)
