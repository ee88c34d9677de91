"""Where crablb keeps what must outlive a process: pins in the BPF file system, one folder a network namespace.

``/sys/fs/bpf/crablb/netns-<cookie of the network namespace>/<role>/<object>``.  A lock file beside tells whether the
process that made them lives.

A namespace's cookie is never another one's; its inode number, by which versions of before named the folder, is given
out again.  A link of that name leads them to it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import unquote

from crablb.errors import KernelError
from crablb.kernel import capabilities, netns
from crablb.kernel.bpf import BpfError, Link, ensure_bpffs, find_bpffs
from crablb.kernel.bpf.descriptor import Descriptor

RUN = Path("/run/crablb")
PREFIX = "netns-"
FIRST = f"{PREFIX}1"
SO_NETNS_COOKIE = 71  # asm-generic/socket.h


def cookie() -> int:
    """Of this thread's network namespace."""
    with socket.socket(socket.AF_UNIX) as sock:
        return int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8), "little")


def root() -> Path:
    """The folder of all namespaces' folders."""
    return ensure_bpffs() / "crablb"


def namespace() -> str:
    """The name of this thread's network namespace, for folders and files.  What a version of before left is renamed."""
    name = f"{PREFIX}{cookie()}"
    inode = os.stat("/proc/thread-self/ns/net").st_ino
    old = root() / str(inode)
    adopted = old.is_dir() and not old.is_symlink() and not (root() / name).exists()
    if adopted:
        old.rename(root() / name)
        old.symlink_to(name)
    for path in RUN.glob(f"{inode}-*"):
        if adopted or path.suffix == ".lock":
            path.rename(path.with_name(name + path.name.removeprefix(str(inode))))
        else:
            path.unlink(missing_ok=True)  # another namespace's, which had the number before
    return name


def namespace_at(path: Path) -> str:
    """The name of the network namespace that a file (/run/netns/NAME, /proc/PID/ns/net) stands for."""
    with netns.inside(path):
        return f"{PREFIX}{cookie()}"


def escape(name: str) -> str:
    """An interface's name as part of a pin's: the BPF file system has no dots in names."""
    return name.replace("%", "%25").replace(".", "%2e")


def folder(role: str) -> Path:
    """Where the pins of ``role`` ("lb-eth0", "client", "server") in this network namespace are."""
    return root() / namespace() / escape(role)


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
        with suppress(OSError):
            parent.rmdir()


def tidy() -> None:
    """Remove links of old names that lead nowhere, and the folder of all if nothing is left."""
    with suppress(OSError):
        for link in root().iterdir():
            if link.is_symlink() and not link.exists():
                link.unlink(missing_ok=True)
        root().rmdir()


def prepare() -> None:
    """Before rights are given up: find the BPF file system, and remove what namespaces that are no more have left.

    Raises :class:`KernelError`, and says how to mend it, if a user other than root may not write where state is kept.
    """
    where = ensure_bpffs()
    collect()
    if os.geteuid() == 0:
        return
    for path in (RUN, where / "crablb"):
        try:
            path.mkdir(parents=True, exist_ok=True)
            usable = os.access(path, os.R_OK | os.W_OK | os.X_OK, effective_ids=True)
        except OSError:
            usable = False
        if not usable:
            raise KernelError(
                f"user {os.geteuid()} cannot write {path}; as root: chmod o+x {where} && install -d -o {os.geteuid()}"
                f" {RUN} {where / 'crablb'}"
            )


def _lock_path(role: str) -> Path:
    return RUN / f"{namespace()}-{role}.lock"


def owner(role: str) -> int | None:
    """Process id of the live owner of a role, None if there is none."""
    return _locked_by(_lock_path(role))


def _locked_by(path: Path) -> int | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return int(os.read(fd, 32) or 0)
    finally:
        os.close(fd)
    return None


def owners(*roles: str) -> set[int]:
    """The processes that own one of these roles, in whatever network namespace.

    Asked of the kernel (proc_locks(5)): who tried the locks would be in the way of those who take them.
    """
    return _holding(_locks(roles))


def _holding(files: Iterable[os.stat_result]) -> set[int]:
    locks = {f"{os.major(s.st_dev):02x}:{os.minor(s.st_dev):02x}:{s.st_ino}" for s in files}
    lines = (line.split() for line in Path("/proc/locks").read_text().splitlines())
    return {int(fields[4]) for fields in lines if fields[1] == "FLOCK" and fields[5] in locks}


def held() -> dict[str, int | None]:
    """Who has each role of this network namespace that has a lock file; None: nobody lives that has it.

    Those that the kernel lists are not tried: see :func:`owners`.  Raises OSError.
    """
    prefix = f"{PREFIX}{cookie()}-"
    found: dict[str, int | None] = {}
    for path in sorted(RUN.glob(f"{prefix}*.lock")):
        with suppress(FileNotFoundError):  # it has gone meanwhile
            lock, listed = path.stat(), set[int]()
            with suppress(OSError):  # the list is masked, as in some containers
                listed = _holding([lock])
            found[path.name.removeprefix(prefix).removesuffix(".lock")] = next(iter(listed), None) or _locked_by(path)
    return found


def folders() -> dict[str, Path]:
    """The folders of pins of this network namespace by role, those of :func:`folder`; nothing is made or renamed.

    Raises OSError if they may not be looked at.
    """
    where, found = find_bpffs(), dict[str, Path]()
    before = str(os.stat("/proc/thread-self/ns/net").st_ino)  # in versions of before
    for path in [where / "crablb" / name for name in (f"{PREFIX}{cookie()}", before)] if where else ():
        with suppress(FileNotFoundError):
            for pinned in path.iterdir():
                found.setdefault(unquote(pinned.name), pinned)
    return found


def _locks(roles: Collection[str]) -> Iterator[os.stat_result]:
    for role in roles:
        for path in RUN.glob(f"{PREFIX}*-{role}.lock"):
            with suppress(OSError):  # it has gone meanwhile
                yield path.stat()


@contextmanager
def own(role: str, what: str, process: int = 0) -> Iterator[None]:
    """Be the one owner of a role while in the context; it ends with the process too.

    Raises :class:`KernelError` if a live process has it; ``what`` names the role to a person, ``process`` the one that
    is to be ended if it is not this one.  What namespaces that are
    no more have left is removed first.
    """
    try:
        RUN.mkdir(parents=True, exist_ok=True)
        collect()
        path = _lock_path(role)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        where = error.filename or RUN
        raise KernelError(f"cannot write {where}: {error.strerror}; crablb keeps its state in {RUN}") from None
    _owned.add(fd)
    this = os.getpid()
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.read(fd, 32).decode() or "another process"
            raise KernelError(f"{what} is run already by process {pid}; stop it first") from None
        try:
            os.ftruncate(fd, 0)
            os.write(fd, str(process or os.getpid()).encode())
        except OSError as error:
            path.unlink(missing_ok=True)
            raise KernelError(f"cannot write {path}: {error.strerror}; crablb keeps its state in {RUN}") from None
        try:
            _link_old_name()
            yield
        finally:
            if os.getpid() == this:
                path.unlink(missing_ok=True)
    finally:
        if os.getpid() == this:
            _owned.remove(fd)
            os.close(fd)
            tidy()


#: Descriptors of the locks that this process owns.
_owned: set[int] = set()


def _forked() -> None:
    """A role is its owner's, not its children's, who would keep it when the owner has ended."""
    for fd in _owned:
        os.close(fd)
    _owned.clear()


os.register_at_fork(after_in_child=_forked)


def _link_old_name() -> None:
    """For a version of before that is to take over what this one leaves."""
    old = root() / str(os.stat("/proc/thread-self/ns/net").st_ino)
    if old.is_symlink() and os.readlink(old) != namespace():
        old.unlink(missing_ok=True)
    while not old.is_symlink() and not old.exists():
        root().mkdir(exist_ok=True)
        with suppress(FileExistsError, FileNotFoundError):  # another process tidies up
            old.symlink_to(namespace())


# ---- namespaces that are no more ----


def _alive() -> tuple[set[int], set[str]]:
    """Inode numbers and names of the network namespaces there are.

    Where a process may not be looked at, as process 1 in some containers, it is in the first one, or others are too.
    Raises :class:`KernelError` if there is one that cannot be entered to ask for its name.
    """
    found = {0: FIRST}
    for place in netns.places():
        try:
            inode = os.stat(place).st_ino
        except OSError:  # it has ended meanwhile
            continue
        if inode not in found:
            try:
                found[inode] = namespace_at(place)
            except KernelError:
                if place.exists():
                    raise
    return set(found), set(found.values())


def collect() -> None:
    """Remove what network namespaces that are no more have left.

    Not in a PID namespace (a container's): it hides the processes of others, whose pins may be here; nor without the
    right to enter others.
    """
    if not netns.all_seen() or capabilities.lacking(("CAP_SYS_ADMIN",)):
        return
    folders = [path for path in root().glob("*") if path.is_dir() and not path.is_symlink()]
    files = list(RUN.glob(f"{PREFIX}*-*"))
    mine = namespace()
    if all(path.name == mine or path.name.startswith(f"{mine}-") for path in (*folders, *files)):
        return
    try:
        inodes, names = _alive()
    except KernelError:  # whoever cannot be asked may be the one whose pins these are
        return
    for path in folders:
        known = path.name in names or (path.name.isdigit() and int(path.name) in inodes)
        if not known and not any(map(_in_use, path.glob("*/*"))):
            for role in path.glob("*"):
                remove(role)
    for path in files:
        name = "-".join(path.name.split("-")[:2])
        if name not in names and not (root() / name).exists() and not (path.suffix == ".lock" and _locked_by(path)):
            path.unlink(missing_ok=True)
    for link in root().glob("*"):
        if link.name.isdigit() and int(link.name) not in inodes and link.is_symlink():
            link.unlink(missing_ok=True)


def _in_use(pin: Path) -> bool:
    """Whether a pin is a link to an interface that is there: then so is its namespace."""
    if not pin.name.startswith(("link", "ingress-", "decap-")):
        return False
    try:
        with Link.from_pin(pin) as link:
            return link.of_interface and link.target != 0
    except BpfError:
        return False
