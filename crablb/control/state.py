"""What a load balancer remembers over a restart: changes at run time, and what its checks found out, in one file.

The file is apart from the configuration, and nobody's to edit.  Nothing about it keeps a load balancer from serving:
what is of no use is told, and put aside before anything is written in its place; what cannot be written is told and
tried again.
"""

from __future__ import annotations

import asyncio
import contextlib
import glob
import hashlib
import os
import stat
import threading
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
import structlog

from crablb import trust
from crablb.kernel import netns, pins
from crablb.overlay import Changes

__all__ = ["FOLDER", "Saved", "Store", "place"]

log = structlog.get_logger()

FOLDER = Path("/var/lib/crablb")
VERSION = 1
#: Seconds until what could not be written is tried again, and between writes of what checks found out and is as it was.
AGAIN, NOW_AND_THEN = 10.0, 60.0
#: Bytes of a file at most.
MOST = 64 << 20
#: What to do about a file that is of no use.
REMEDY = (
    "look into it (if others can write it: chown root, chmod 600); to have it in force, put it back where it was while"
    " no load balancer serves the interface; else remove it"
)
#: Seconds that a stop waits for a slow disk.
LAST = 2.0


class Saved(msgspec.Struct, frozen=True, kw_only=True):
    """The file."""

    version: int = VERSION
    interfaces: tuple[str, ...]
    deployment: str  # a fingerprint of the seed
    changes: Changes = Changes()
    health: Any = None  # plain values, crablb.control.health's


class _Version(msgspec.Struct):
    version: int = 0


def place(interface: str) -> Path:
    """The file of the load balancer on an interface of this thread's network namespace.

    A namespace that ip-netns(8) has a name for has files of its own.
    """
    name = "" if pins.cookie() == 1 else netns.own_name()
    return FOLDER / f"{f'netns-{name}-' if name else ''}{interface}.state.json"


def _fingerprint(seed: bytes) -> str:
    return hashlib.sha256(b"crablb state" + seed).hexdigest()[:16]


class _UselessError(Exception):
    """What the file holds is of no use."""

    def __init__(self, suffix: str, reason: str) -> None:
        super().__init__(suffix, reason)
        self.suffix, self.reason = suffix, reason


class Store:
    """Reads the file once, and writes it whenever something has changed, in a thread: a disk may be slow.

    ``failed`` is called for each time that it could not be written.
    """

    def __init__(self, path: Path, interfaces: Sequence[str], seed: bytes) -> None:
        self.path = path
        self.failed: Callable[[], None] = lambda: None
        self.health: Callable[[], Any] | None = None  # what checks found out, as plain values; called in a thread
        self.trouble = ""  # why it is not written as it should be
        self.lost = ""  # what was written before, is not in force, and waits for somebody to look into it
        self._useless: tuple[str, str] | None = None  # what is to be put aside: the suffix for it, and why
        self._interfaces, self._deployment = tuple(interfaces), _fingerprint(seed)
        self._changes = Changes()
        self._wanted = self._written = 0  # versions of what is to be written
        self._dirty = asyncio.Event()
        self._settled = asyncio.Condition()
        self._writing: asyncio.Future[OSError | None] | None = None
        self._closed = False
        self._free = asyncio.Event()  # unless another process may have the file
        self._free.set()

    # ---- reading ----

    def load(self) -> Saved:
        """What was written last; of a file that is of no use, nothing, after saying why.

        Nothing is changed: whoever reads it may not come to serve.
        """
        empty = Saved(interfaces=self._interfaces, deployment=self._deployment)
        try:
            saved = self._parse(self._read())
        except FileNotFoundError:
            saved = empty
        except OSError as error:
            saved = self._of_no_use("unreadable", f"it cannot be read: {error.strerror or error}", empty)
        except _UselessError as error:
            saved = self._of_no_use(error.suffix, error.reason, empty)
        self.lost = self._lost()
        self._changes = saved.changes
        return saved

    def saved(self) -> Saved:
        """What is to be written now."""
        health = self.health() if self.health else None
        return Saved(interfaces=self._interfaces, deployment=self._deployment, changes=self._changes, health=health)

    def _read(self) -> bytes:
        """Raises :class:`OSError`."""
        fd = os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOFOLLOW)
        with open(fd, "rb") as file:
            found = os.fstat(fd)
            if not stat.S_ISREG(found.st_mode):
                raise OSError("it is no file")
            # It names programs (checks by exec): whoever writes it is obeyed.
            if why := trust.others(found):
                raise OSError(why)
            if found.st_size > MOST:
                raise OSError(f"it has {found.st_size} bytes, and the most is {MOST}")
            return file.read(MOST)

    def _parse(self, data: bytes) -> Saved:
        """Raises :class:`_UselessError`."""
        try:
            version = msgspec.json.decode(data, type=_Version).version
            if version != VERSION:
                raise _UselessError(f"v{version}", f"it is of version {version}, and this is {VERSION}")
            saved = msgspec.json.decode(data, type=Saved)
        except (ValueError, RecursionError) as error:  # msgspec's is one, and what is no UTF-8, too
            raise _UselessError("corrupt", str(error)) from None
        if saved.interfaces[:1] != self._interfaces[:1] or saved.deployment != self._deployment:
            whose = f"another load balancer's, on {', '.join(saved.interfaces)}"
            raise _UselessError("other", f"it is {whose}, or of another seed")
        return saved

    def _of_no_use(self, suffix: str, reason: str, instead: Saved) -> Saved:
        self._useless = suffix, reason
        log.error(
            "what was changed at run time is not known: the state file is of no use",
            path=str(self.path),
            reason=reason,
            remedy=REMEDY,
        )
        return instead

    def _lost(self) -> str:
        """What a person has to look into; empty: nothing."""
        if self._useless:
            return f"{self.path}: {self._useless[1]}"
        aside = sorted(map(str, self.path.parent.glob(f"{glob.escape(self.path.name)}.*")))
        return f"{', '.join(aside)}: put aside by a start" if aside else ""

    def _put_aside(self) -> None:
        """What is of no use, before something is written in its place.  Raises :class:`OSError`."""
        if not self._useless:
            return
        suffix, reason = self._useless
        names = (f"{self.path.name}.{suffix}{f'-{n}' if n > 1 else ''}" for n in count(1))
        aside = next(path for path in map(self.path.with_name, names) if not os.path.lexists(path))
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # somebody has taken it away
            self.path.rename(aside)
            log.warning("the state file was put aside", path=str(self.path), aside=str(aside), reason=reason)
        self._useless = None

    # ---- writing ----

    def keep(self, changes: Changes) -> None:
        """Write these down soon."""
        if changes != self._changes:
            self._changes = changes
            self.touch()

    def touch(self) -> None:
        """What checks found out has changed: write it down soon."""
        self._wanted += 1
        self._dirty.set()

    async def written(self, seconds: float) -> bool:
        """Wait until all is written down, at most so long; whether it is."""
        wanted = self._wanted
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds), self._settled:
                await self._settled.wait_for(lambda: self._written >= wanted or self.trouble)
        return self._written >= wanted

    def hold(self) -> None:
        """Write nothing, until :meth:`resume`: another process may have the file."""
        self._free.clear()

    def resume(self) -> None:
        """Write again."""
        self._free.set()

    async def run(self) -> None:
        """Write, as long as it is not cancelled; what came in the meantime at once."""
        if self._useless:
            self.touch()
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(AGAIN if self.trouble else NOW_AND_THEN):
                    await self._dirty.wait()
            await self._free.wait()
            if self.trouble or self.lost or self._dirty.is_set() or self.health:
                self._dirty.clear()
                await self._write()

    async def close(self) -> None:
        """Write what is not written yet; on a disk that is too slow, give up."""
        if self._closed or not self._free.is_set():
            return
        self._closed = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LAST):
                if self._writing:
                    await asyncio.wait([self._writing])
                await self._write()

    async def _write(self) -> None:
        wanted = self._wanted
        if self._writing and not self._writing.done():  # by a task that was cancelled
            await asyncio.wait([self._writing])
        writing = self._writing = asyncio.get_running_loop().create_future()
        self._begin(self._changes, writing)
        error = await asyncio.shield(writing)
        async with self._settled:
            if not error:
                self._written = max(self._written, wanted)
            self._say(f"{error.strerror or error}" if error else "")
            self._settled.notify_all()

    def _begin(self, changes: Changes, writing: asyncio.Future[OSError | None]) -> None:
        """In a thread that nobody waits for at the end, however slow the disk is."""
        loop = writing.get_loop()

        def work() -> None:
            error: OSError | None = None
            try:
                health = self.health() if self.health else None
                saved = Saved(interfaces=self._interfaces, deployment=self._deployment, changes=changes, health=health)
                self._put_aside()
                self.lost = self._lost()
                write(self.path, msgspec.json.encode(saved))
            except OSError as failure:
                error = failure
            except MemoryError:
                error = OSError("no memory")
            with contextlib.suppress(RuntimeError):  # the loop has ended
                loop.call_soon_threadsafe(done, error)

        def done(error: OSError | None) -> None:
            if not writing.done():
                writing.set_result(error)

        try:
            threading.Thread(target=work, name="crablb-state", daemon=True).start()
        except (RuntimeError, MemoryError) as failure:
            writing.set_result(OSError(str(failure) or "no memory"))

    def _say(self, trouble: str) -> None:
        """Once for each reason."""
        if trouble:
            self.failed()
        if trouble and trouble != self.trouble:
            log.error(
                "what is changed at run time is not written down, and gone after a restart; it is tried again",
                path=str(self.path),
                reason=trouble,
                seconds=AGAIN,
            )
        elif self.trouble and not trouble:
            log.info("what is changed at run time is written down again", path=str(self.path))
        self.trouble = trouble


def write(path: Path, data: bytes, mode: int = 0o600, owner: tuple[int, int] | None = None) -> None:
    """Put ``data`` in place of what a file holds; after a crash it holds the one or the other, whole.

    Raises :class:`OSError`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f".{path.name}.new")  # one writer has it: what a crash has left is written over
    fresh.unlink(missing_ok=True)
    fd = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(fd, "wb") as file:
            file.write(data)
            file.flush()
            if owner and owner != (os.geteuid(), os.getegid()):
                os.fchown(fd, *owner)
            os.fchmod(fd, mode)
            os.fsync(fd)
        fresh.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            fresh.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
