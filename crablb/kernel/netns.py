"""Network namespaces: which there are, by what names, and going into one.

setns(2) concerns one thread: what it does, and the programs that it starts, are there.  A socket stays where it was
made.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from crablb.errors import ConfigError, KernelError

__all__ = ["Namespace", "all_seen", "enter", "every", "find", "inside", "is_gone", "own_name", "places"]

#: Where ip netns keeps those that have names.
NAMED = Path("/run/netns")
OWN = Path("/proc/thread-self/ns/net")
SELF = Path("/proc/self/ns/net")
CLONE_NEWNET = 0x40000000
PROC_PID_INIT_INO = 0xEFFFFFFC  # linux/proc_ns.h: of the PID namespace that sees all processes
NS_GET_NSTYPE = 0xB703  # linux/nsfs.h


@dataclass(frozen=True, slots=True)
class Namespace:
    """``name``: as a person calls it, and --netns takes it; ``inode``: nobody else's while somebody is inside."""

    name: str
    path: Path
    inode: int

    def __str__(self) -> str:
        return f"netns {self.name}"

    @property
    def stands(self) -> bool:
        """Whether its path still stands for it; if not, it may be there without."""
        try:
            return os.stat(self.path).st_ino == self.inode
        except OSError:
            return False


def _open(path: Path) -> int:
    """Without waiting, whatever it is."""
    return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)


def _enter(namespace: int, name: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(namespace, CLONE_NEWNET):
        number = ctypes.get_errno()
        if number == errno.EINVAL:
            raise KernelError(f"{name} is not a network namespace")
        remedy = "; run it as root" if number == errno.EPERM else ""
        raise KernelError(f"cannot enter network namespace {name}: {os.strerror(number)}{remedy}")


def enter(path: Path) -> None:
    """Take this thread into the network namespace that a file stands for.  Raises :class:`KernelError`."""
    try:
        there = _open(path)
    except OSError as error:
        raise KernelError(f"cannot enter network namespace {path}: {error.strerror}") from None
    try:
        _enter(there, str(path))
    finally:
        os.close(there)


def own_name() -> str:
    """What ip-netns(8) calls this thread's network namespace; empty: nothing."""
    inode = os.stat(OWN).st_ino
    with suppress(OSError):
        return next((p.name for p in sorted(NAMED.iterdir()) if p.is_file() and p.stat().st_ino == inode), "")
    return ""


@contextmanager
def inside(path: Path) -> Iterator[None]:
    """This thread is in a network namespace while in the context.  Raises :class:`KernelError`."""
    home = _open(OWN)
    try:
        enter(path)
        try:
            yield
        finally:
            _enter(home, "that this process began in")
    finally:
        os.close(home)


def find(text: str) -> Namespace:
    """By the name that ip netns knows, or by a path.  Raises :class:`ConfigError`."""
    path = Path(text) if "/" in text else NAMED / text
    try:
        there = _open(path)
    except FileNotFoundError:
        if path.parent != NAMED:
            raise ConfigError("there is no such file") from None
        names = ", ".join(sorted(one.name for one in NAMED.glob("*"))) or "none"
        raise ConfigError(f"there is no such name; there are: {names} (without a name: /proc/PID/ns/net)") from None
    except OSError as error:
        raise ConfigError(f"cannot be opened: {error.strerror}") from error
    except ValueError as error:  # a NUL in it
        raise ConfigError(f"cannot be opened: {error}") from None
    try:
        kind = 0
        with suppress(OSError):  # not a namespace at all
            kind = fcntl.ioctl(there, NS_GET_NSTYPE)
        if kind != CLONE_NEWNET:
            raise ConfigError("is not a network namespace")
        return Namespace(text, path, os.fstat(there).st_ino)
    finally:
        os.close(there)


def all_seen() -> bool:
    """Whether this process sees those of all namespaces: of all PID namespaces, and in /proc (hidepid)."""
    return os.stat("/proc/self/ns/pid").st_ino == PROC_PID_INIT_INO and Path("/proc/1").exists()


def is_gone(error: OSError) -> bool:
    """Whether it says that a process or a mount has ended, or may not be looked at: not that there was no memory or
    descriptor to look with, when nothing is known of it."""
    return error.errno in (errno.ENOENT, errno.ESRCH, errno.ENOTDIR, errno.EACCES, errno.EPERM)


def places(but: Collection[int] = ()) -> Iterator[Path]:
    """Files that stand for the network namespaces there are: of processes, except for some, and of mounts.

    Raises ``OSError`` if not all can be told.
    """
    for process in sorted(int(name) for name in os.listdir("/proc") if name.isdigit()):
        if process not in but:
            yield Path(f"/proc/{process}/ns/net")
    for view in ("self", "1"):
        try:
            mounts = Path(f"/proc/{view}/mountinfo").read_text()
        except OSError as error:
            if not is_gone(error):
                raise
            continue
        for line in mounts.splitlines():
            fields, _, kind = line.partition(" - ")
            if kind.startswith("nsfs ") and fields.split()[3].startswith("net:["):
                mounted = fields.split()[4].encode().decode("unicode_escape")  # \040 for a space
                yield Path(f"/proc/{view}/root{mounted}")


def every(but: Collection[int] = ()) -> list[Namespace]:
    """All network namespaces: those that have names by these, this process's own, the others by a process or a mount.

    ``but``: processes that do not count, as they are there for the sake of others.  Raises ``OSError`` if not all can
    be told.
    """
    found: dict[int, Namespace] = {}
    named = sorted(NAMED.glob("*"))
    for place in (*named, SELF, *places(but)):
        try:
            if os.stat(place).st_ino not in found:
                one = find(place.name if place in named else str(place))
                found.setdefault(one.inode, one)  # a process may be in another one by now
        except ConfigError as error:  # a name that is yet to stand for one, or does no more
            if isinstance(error.__cause__, OSError) and not is_gone(error.__cause__):
                raise error.__cause__ from None
        except OSError as error:  # it has ended meanwhile
            if not is_gone(error):
                raise
    return list(found.values())
