"""Notices when a file holds something else: written, exchanged by an editor, or by another link on the way to it."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import structlog

from crablb.kernel.inotify import Folders
from crablb.values import read_bytes

__all__ = ["Watch", "fingerprint", "folders"]

log = structlog.get_logger()

#: Seconds without another event after which the file is taken for whole, and seconds until it is looked at for what no
#: event tells: a file system of another machine, a folder that was exchanged.
QUIET, NOW_AND_THEN = 0.2, 30.0
#: Links on the way to a file at most, as in the kernel.
LINKS = 40


def folders(path: Path) -> Iterator[Path]:
    """Those in which something changes when another file comes to be found at ``path``: its own, and of each link on
    the way (Kubernetes exchanges one)."""
    here = path.absolute()
    for _ in range(LINKS):
        yield here.parent
        for parent in (here, *here.parents):
            if parent.is_symlink():
                yield parent.parent
                rest = here.relative_to(parent)
                here = parent.parent / parent.readlink() / rest
                break
        else:
            return


def fingerprint(path: Path) -> str:
    """Of what a file holds; empty: it cannot be read, or is none: a pipe would be empty afterwards."""
    try:
        return hashlib.sha256(read_bytes(path)).hexdigest() if path.is_file() else ""
    except (OSError, ValueError):
        return ""


class Watch:
    """Has ``changed`` awaited when the file holds something else than before; ``run`` goes on until it is cancelled."""

    def __init__(self, path: Path, changed: Callable[[], Awaitable[object]], known: str = "") -> None:
        """``known``: the fingerprint that it had before; empty: the first look is what counts."""
        self._path, self._changed = path, changed
        self._known = known
        self._happened = asyncio.Event()

    async def look(self) -> None:
        """What it holds now is known."""
        self._known = await asyncio.to_thread(fingerprint, self._path) or self._known

    async def run(self) -> None:
        """Raises :class:`OSError` if no more can be watched."""
        seen = Folders(self._happened.set)
        try:
            while True:
                with contextlib.suppress(OSError, ValueError):  # a link that leads nowhere, or round
                    seen.follow(list(folders(self._path)))
                before = self._known
                await self.look()
                if before and self._known != before:
                    await self._changed()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(NOW_AND_THEN):
                        await self._quiet()
        finally:
            seen.close()

    async def _quiet(self) -> None:
        """Wait until something has happened, and then nothing more."""
        await self._happened.wait()
        while self._happened.is_set():
            self._happened.clear()
            await asyncio.sleep(QUIET)
