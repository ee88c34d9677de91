"""Where crablb keeps what must outlive a process: pins in the BPF file system, one folder a network namespace.

``/sys/fs/bpf/crablb/netns-<cookie of the network namespace>/<role>/<object>``.  A lock file beside tells whether the
process that made them lives.

A namespace's cookie is never another one's; its inode number, by which versions of before named the folder, is given
out again.  A link of that name leads them to it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import time
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
#: In place of a process id: of one that this PID namespace does not see, another container's or, in one, the host's.
ELSEWHERE = 0
#: Looks at a lock before somebody has it of whom nothing else is seen, and seconds between two.
LOOKS, LOOK_PAUSE = 50, 0.002


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


def unescape(name: str) -> str:
    """The role that a folder is named after."""
    return name.replace("%2e", ".").replace("%25", "%")


def folder(role: str) -> Path:
    """Where the pins of ``role`` ("lb-eth0", "client", "server") in this network namespace are."""
    return root() / namespace() / escape(role)


@contextmanager
def replacing(path: Path, suffix: str) -> Iterator[Path]:
    """A path beside it, with this suffix, to make something at: that takes its place, without a moment between the two.
    Nothing of it stays if that fails."""
    new = path.with_name(path.name + suffix)
    new.unlink(missing_ok=True)
    try:
        yield new
        new.replace(path)
    except BaseException:
        with suppress(OSError):
            new.unlink(missing_ok=True)
        raise


def put(held: Descriptor, path: Path) -> None:
    """Pin in place of what is pinned there."""
    with replacing(path, "-new") as new:
        held.pin(new)


def note(path: Path, text: str) -> None:
    """Write a file of :data:`RUN`, whole or not at all."""
    with replacing(path, ".new") as new:
        new.write_text(text)


def forget(path: Path) -> None:
    """Remove such a file, and what one who was killed at writing it has left."""
    for each in (path, path.with_name(path.name + ".new")):
        each.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Remove a folder of pins, and those above it that are empty then."""
    shutil.rmtree(path, ignore_errors=True)
    for parent in (path.parent, path.parent.parent):
        with suppress(OSError):
            parent.rmdir()


def tidy(name: str) -> None:
    """Remove the link of the old name of a namespace of which nothing is left, and the folder of all if it is empty."""
    with suppress(OSError):
        for link in root().iterdir():
            # One that leads nowhere may be of somebody who has begun: others', or one with a lock.
            mine = link.is_symlink() and os.readlink(link) == name
            if mine and not link.exists() and not any(RUN.glob(f"{name}-*.lock")):
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
    """Who owns a role and lives: the process id that it has here, :data:`ELSEWHERE`, or None: nobody."""
    return _owner(_lock_path(role))


def check_free(role: str, what: str, instead: str = "") -> None:
    """Raises :class:`KernelError` as :func:`own` does, for who has other things to do before that.  ``instead``: what
    else than an end of the owner may be what is wanted."""
    if (pid := owner(role)) is not None:
        raise _owned_by(what, pid, instead)


def _owned_by(what: str, pid: int, instead: str = "") -> KernelError:
    return KernelError(f"{what} is run already by {told(pid)}; {instead}stop it first: {how_to_end(pid)}")


def told(pid: int) -> str:
    """A process, for a person, by its id here or :data:`ELSEWHERE`."""
    return f"process {pid}" if pid else "a process of another PID namespace"


def how_to_end(pid: int) -> str:
    if pid:
        return f"systemctl stop, or kill {pid}"
    return "in its container, or by the host, where crablb status and crablb agent status name it"


def begun(role: str) -> None:
    """The owner of a role, this process, has begun to do what it has it for."""
    with suppress(OSError), open(_lock_path(role), "a") as file:
        file.write("\n")  # ends the line that has its process id: versions of before read that as well


def has_begun(role: str) -> bool:
    """Whether the owner of a role says that it has begun."""
    with suppress(OSError):
        return _lock_path(role).read_text().endswith("\n")
    return False


def cannot_be_asked(role: str) -> None:
    """The owner of a role, this process, should answer those who ask it, and cannot."""
    mark = "\t\n" if has_begun(role) else "\t"  # white space: versions of before read a number
    with suppress(OSError), open(_lock_path(role), "r+") as file:  # where there is a lock
        file.seek(0, os.SEEK_END)
        file.write(mark)


def can_be_asked(role: str) -> None:
    """It can again."""
    with suppress(OSError), open(_lock_path(role), "r+") as file:
        said = file.read().replace("\t", " ")
        file.seek(0)
        file.write(said)  # as long as before, so that whoever reads meanwhile reads a number


def says_it_cannot_be_asked(role: str) -> bool:
    with suppress(OSError):
        return "\t" in _lock_path(role).read_text()
    return False


def _owner(path: Path) -> int | None:
    """Who has a lock.  Raises OSError.

    Asked of the kernel (proc_locks(5)) first: who tries a lock is in the way of those who take it, for an instant.
    Where nobody is listed, as the owner may be in another PID namespace, there is no other way to ask; hence several
    looks before somebody is believed to be the owner whom the lock's file does not name.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        lock, listed = os.fstat(fd), set[int]()
        for look in range(LOOKS):
            if look:
                time.sleep(LOOK_PAUSE)
            with suppress(OSError, IndexError):  # the list is masked, as in some containers
                listed = _holding([lock])
            if not listed and _lock(fd):
                return None
            noted = int(os.pread(fd, 32, 0) or 0)  # as the owner's PID namespace has it, which may not be this one
            # An agent's process has the lock; that which is to be ended is its parent, if it runs several.
            for pid in listed:
                for one in (pid, _parent(pid)):
                    if noted and _own_id(one) == noted:
                        return one
            if not listed and _has_open(noted, lock):
                return noted
    finally:
        os.close(fd)
    return next(iter(listed), ELSEWHERE)


def _lock(fd: int) -> bool:
    """Whether a lock is this descriptor's now: if nobody else has it."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _status(pid: int) -> dict[str, list[str]]:
    """proc_pid_status(5)."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    return {name: rest.split() for name, _, rest in (line.partition(":") for line in lines)}


def _parent(pid: int) -> int:
    return int(_status(pid).get("PPid", ["0"])[0])


def _own_id(pid: int) -> int:
    """The process id that a process has in its own PID namespace."""
    return int(_status(pid).get("NSpid", ["0"])[-1])


def _has_open(pid: int, file: os.stat_result) -> bool:
    with suppress(OSError):
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                if os.path.samestat(fd.stat(), file):
                    return True
    return False


def owners(*roles: str) -> set[int]:
    """The processes that own one of these roles, in whatever network namespace, as far as they are seen from here."""
    return _holding(_locks(roles))


def _holding(files: Iterable[os.stat_result]) -> set[int]:
    locks = {f"{os.major(s.st_dev):02x}:{os.minor(s.st_dev):02x}:{s.st_ino}" for s in files}
    lines = (line.split() for line in Path("/proc/locks").read_text().splitlines())
    return {int(fields[4]) for fields in lines if fields[1] == "FLOCK" and fields[5] in locks}


def held() -> dict[str, int | None]:
    """Who has each role of this network namespace that has a lock file, as :func:`owner` says.  Raises OSError."""
    prefix = f"{PREFIX}{cookie()}-"
    paths = sorted(RUN.glob(f"{prefix}*.lock"))
    return {path.name.removeprefix(prefix).removesuffix(".lock"): _owner(path) for path in paths}


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


def _unwritable(path: str | Path, error: OSError) -> KernelError:
    remedy = {errno.EROFS: f": mount -o remount,rw {RUN.parent}", errno.ENOSPC: f": df {RUN}; df -i {RUN}"}
    return KernelError(
        f"cannot write {path}: {error.strerror}; crablb keeps its state in {RUN}{remedy.get(error.errno or 0, '')}"
    )


def _owned_by_us(role: str) -> None:
    """Whose a folder of pins is decides what is in it; where the BPF file system's mode is 1777 anybody may make one.

    Raises :class:`KernelError` if it is neither root's, nor this user's, nor his to whom root has given /run/crablb.
    """
    trusted = {0, os.geteuid(), RUN.stat().st_uid}
    for path in (root(), root() / namespace(), folder(role)):
        try:
            found = path.lstat()
        except FileNotFoundError:
            continue
        if found.st_uid not in trusted or found.st_mode & 0o022:
            why = f"it is user {found.st_uid}'s, mode {found.st_mode & 0o7777:04o}"
            raise KernelError(f"{path}: {why}: what others can put there is not taken; look into it, and: rm -r {path}")


def _locked(path: Path, role: str, what: str) -> int:
    """The lock's descriptor.  Raises :class:`KernelError` if somebody has it, and OSError."""
    pid: int | None = ELSEWHERE
    for _ in range(LOOKS):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        ours = False
        try:
            with suppress(FileNotFoundError):  # the owner before removes the file when it ends
                ours = _lock(fd) and os.path.samestat(os.fstat(fd), path.stat())
        finally:
            if not ours:
                os.close(fd)
        if ours:
            return fd
        if (pid := owner(role)) is not None:
            break  # else it has ended just now, or somebody looked
    raise _owned_by(what, pid or ELSEWHERE)


@contextmanager
def own(role: str, what: str, process: int = 0) -> Iterator[int]:
    """Be the one owner of a role while in the context; it ends with the process too.  Gives the lock's descriptor, by
    which another process can :func:`take` it.

    Raises :class:`KernelError` if a live process has it; ``what`` names the role to a person, ``process`` the one that
    is to be ended if it is not this one.  What namespaces that are
    no more have left is removed first.
    """
    try:
        RUN.mkdir(parents=True, exist_ok=True)
        collect()
        name = namespace()
        path = RUN / f"{name}-{role}.lock"
        fd = _locked(path, role, what)
    except OSError as error:
        raise _unwritable(error.filename or RUN, error) from None
    _owned.add(fd)
    this = os.getpid()
    try:
        try:
            os.ftruncate(fd, 0)
            os.write(fd, str(process or os.getpid()).encode())
        except OSError as error:
            path.unlink(missing_ok=True)
            raise _unwritable(path, error) from None
        try:
            root().mkdir(exist_ok=True)  # who might make it sees it made
            _owned_by_us(role)
            _link_old_name()
            yield fd
        finally:
            if os.getpid() == this and fd not in _given:
                path.unlink(missing_ok=True)
    finally:
        if os.getpid() == this:
            _owned.remove(fd)
            os.close(fd)
            if fd in _given:
                _given.remove(fd)
            else:
                tidy(name)


#: Descriptors of the locks that this process owns; those that it has given to another one.
_owned: set[int] = set()
_given: set[int] = set()


def give(lock: int) -> None:
    """The lock's role is another process's: what its owner does at the end, this one leaves undone."""
    _given.add(lock)


def claim(fd: int) -> None:
    """Have the lock and its file name this process, of those that have the descriptor."""
    # Nobody else gets it in between: the kernel changes the kind of a lock at once, and notes who did.
    fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    # Written over, in one go: whoever truncates it first has no room for it where the file system is full.
    this = str(os.getpid()).encode()
    os.pwrite(fd, this.ljust(os.fstat(fd).st_size), 0)
    os.ftruncate(fd, len(this))


@contextmanager
def take(role: str, fd: int) -> Iterator[int]:
    """Be the owner of a role in place of a process that lives, by the descriptor of its lock, ours from now on.

    That process has to :func:`give` it up, or to :func:`claim` it back.
    """
    name = namespace()
    path = RUN / f"{name}-{role}.lock"
    _owned.add(fd)
    this = os.getpid()
    try:
        claim(fd)
        yield fd
    finally:
        if os.getpid() == this:
            given = fd in _given
            if not given:
                path.unlink(missing_ok=True)
            _given.discard(fd)
            _owned.remove(fd)
            os.close(fd)
            if not given:
                tidy(name)


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

    Process 1 may not be looked at in some containers: it is in the first one, or others are too.  Raises
    :class:`KernelError` if there is one that cannot be entered to ask for its name, ``OSError`` if another process may
    not be looked at, or there was no memory or descriptor to look with.
    """
    found = {0: FIRST}
    for place in netns.places():
        try:
            there = os.open(place, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:  # it has ended meanwhile
            forbidden = isinstance(error, PermissionError) and Path("/proc/1") not in place.parents
            if forbidden or not netns.is_gone(error):
                raise
            continue
        # Asked of what is open: a process may be in another one the next moment, as one that looks around as we do is.
        try:
            inode = os.fstat(there).st_ino
            if inode not in found:
                found[inode] = namespace_at(Path(f"/proc/self/fd/{there}"))
        finally:
            os.close(there)
    return set(found), set(found.values())


def collect() -> None:
    """Remove what network namespaces that are no more have left.

    Not in a PID namespace (a container's): it hides the processes of others, whose pins may be here; nor without the
    rights to look at others' processes and to enter their namespaces.
    """
    if not netns.all_seen() or capabilities.lacking(("CAP_SYS_ADMIN", "CAP_SYS_PTRACE")):
        return
    # First what there is, then who lives: what comes between is of one that lives.
    there = list(root().glob("*"))
    folders = [path for path in there if path.is_dir() and not path.is_symlink()]
    files = list(RUN.glob(f"{PREFIX}*-*"))
    mine = namespace()
    if all(path.name == mine or path.name.startswith(f"{mine}-") for path in (*folders, *files)):
        return
    try:
        inodes, names = _alive()
    except (KernelError, OSError):  # whoever cannot be asked may be the one whose pins these are
        return
    for path in folders:
        known = path.name in names or (path.name.isdigit() and int(path.name) in inodes)
        if not known and not any(map(_in_use, path.glob("*/*"))):
            for role in path.glob("*"):
                remove(role)
            with suppress(OSError):  # of one that died before its first pin
                path.rmdir()
    for path in files:
        name = "-".join(path.name.split("-")[:2])
        if (
            name not in names
            and not (root() / name).exists()
            and not (path.suffix == ".lock" and _owner(path) is not None)
        ):
            path.unlink(missing_ok=True)
    for link in there:
        if link.name.isdigit() and int(link.name) not in inodes and link.is_symlink():
            link.unlink(missing_ok=True)


def _in_use(pin: Path) -> bool:
    """Whether a pin is a link to an interface that is there: then so is its namespace."""
    if not pin.name.startswith(("link", "ingress-", "decap-")):
        return False
    try:
        with Link.from_pin(pin) as link:
            return link.of_interface and link.target != 0
    except BpfError as error:
        return error.errno != errno.ENOENT  # whatever cannot be looked at may be
