"""Where crablb keeps what must outlive a process: pins in the BPF file system, one folder a network namespace.

``/sys/fs/bpf/crablb/<inode of the network namespace>/<role>/<object>``.  A lock file beside tells whether the process
that made them lives.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from crablb.errors import KernelError
from crablb.kernel.bpf import ensure_bpffs
from crablb.kernel.bpf.descriptor import Descriptor

RUN = Path("/run/crablb")


def namespace() -> int:
    """Inode number of this thread's network namespace."""
    return os.stat("/proc/thread-self/ns/net").st_ino


def folder(role: str) -> Path:
    """Where the pins of ``role`` ("lb-eth0", "client", "server") in this network namespace are."""
    return ensure_bpffs() / "crablb" / str(namespace()) / role


def put(held: Descriptor, path: Path) -> None:
    """Pin in place of what is pinned there, without a moment between the two."""
    new = path.with_name(f"{path.name}-new")
    new.unlink(missing_ok=True)
    held.pin(new)
    new.replace(path)


def remove(path: Path) -> None:
    """Remove a folder of pins, and those above it that are empty then."""
    shutil.rmtree(path, ignore_errors=True)
    for parent in (path.parent, path.parent.parent):
        try:
            parent.rmdir()
        except OSError:
            return


def _lock_path(role: str) -> Path:
    return RUN / f"{namespace()}-{role}.lock"


def owner(role: str) -> int | None:
    """Process id of the live owner of a role, None if there is none."""
    try:
        fd = os.open(_lock_path(role), os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return int(os.read(fd, 32) or 0)
    finally:
        os.close(fd)
    return None


@contextmanager
def own(role: str, what: str) -> Iterator[None]:
    """Be the one owner of a role while in the context; it ends with the process too.

    Raises :class:`KernelError` if a live process has it; ``what`` names the role to a person.
    """
    RUN.mkdir(parents=True, exist_ok=True)
    path = _lock_path(role)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.read(fd, 32).decode() or "another process"
            raise KernelError(f"{what} is run already by process {pid}; stop it first") from None
        os.ftruncate(fd, 0)
        os.write(fd, str(os.getpid()).encode())
        yield
        path.unlink(missing_ok=True)
    finally:
        os.close(fd)
