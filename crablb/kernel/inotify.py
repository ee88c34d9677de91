"""inotify(7): that something happened in a folder, in the running event loop."""

from __future__ import annotations

import asyncio
import ctypes
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

__all__ = ["Folders"]

IN_ATTRIB, IN_CLOSE_WRITE, IN_MOVED_FROM, IN_MOVED_TO = 0x4, 0x8, 0x40, 0x80
IN_CREATE, IN_DELETE, IN_DELETE_SELF, IN_MOVE_SELF = 0x100, 0x200, 0x400, 0x800
IN_ONLYDIR = 0x01000000
SEEN = IN_ATTRIB | IN_CLOSE_WRITE | IN_MOVED_FROM | IN_MOVED_TO | IN_CREATE | IN_DELETE | IN_DELETE_SELF | IN_MOVE_SELF


class Folders:
    """Calls ``happened`` when a file in one of some folders was written, exchanged, made or removed.

    Made in a running event loop; raises :class:`OSError` if there are too many who watch already
    (``fs.inotify.max_user_instances``).
    """

    def __init__(self, happened: Callable[[], None]) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        self._watched: dict[Path, int] = {}
        self._happened = happened
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._fd, self._read)

    def follow(self, folders: Iterable[Path]) -> None:
        """Watch these, as they are now, and no others.  One that is not there, or not to be read, is left out."""
        now: dict[Path, int] = {}
        for folder in folders:
            # The same folder has the same number: one that was exchanged, another.
            number = self._libc.inotify_add_watch(self._fd, os.fsencode(folder), SEEN | IN_ONLYDIR)
            if number >= 0:
                now[folder] = number
        for number in set(self._watched.values()) - set(now.values()):
            self._libc.inotify_rm_watch(self._fd, number)
        self._watched = now

    def _read(self) -> None:
        with suppress(BlockingIOError):
            os.read(self._fd, 65536)  # what it was does not matter: the file is looked at
        self._happened()

    def close(self) -> None:
        """Idempotent."""
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1
