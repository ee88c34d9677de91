"""The machine: its kernel, what a process may do and have there, clocks, disks."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from crablb._native import lib
from crablb.control import seed
from crablb.doctor.finding import Finding, Severity, fault, note, ok, warning
from crablb.errors import ConfigError
from crablb.kernel import bpf, capabilities, pins, rtnetlink
from crablb.kernel.bpf.errors import unprivileged
from crablb.kernel.rtnetlink import Netlink
from crablb.values import guarded

STATE = seed.PATH.parent
AF_XDP = 44
#: The oldest kernels: that is tested; that has managed neighbours; that has AF_XDP packets in several buffers, and tcx.
TESTED, MANAGED, NEWER = (6, 1), (5, 16), (6, 6)
#: That lets another process have AF_XDP sockets in use.
TAKEOVERS = (6, 4)
#: Bytes of the frames of a queue, that a process without CAP_IPC_LOCK may have to lock.
UMEM = 4096 * 2048
FEWEST_FILES, FILES = 64, 256
LEAST_SPACE, LEAST_ADDRESSES, LEAST_MEMORY = 1 << 20, 2 << 30, 128 << 20
#: Findings about a process, not the machine.
OF_PROCESS = ("rights", "limit-files", "limit-memlock", "limit-addresses", "bpffs")
TIME_ERROR = 5  # adjtimex(2): the clock is not synchronised


# ---- kernel ----


@dataclass(frozen=True, slots=True)
class Kernel:
    release: str
    xdp_sockets: bool
    several_buffers: bool  # AF_XDP takes packets in several
    btf: bool
    jit: int | None  # net.core.bpf_jit_enable; None: not to be read
    statistics: int | None  # kernel.bpf_stats_enabled
    lockdown: str  # "none", "integrity", "confidentiality"; empty: there is none


def _number(path: str) -> int | None:
    try:
        return int(Path(path).read_text())
    except (OSError, ValueError):
        return None


def read_kernel() -> Kernel:
    try:
        socket.socket(AF_XDP, socket.SOCK_RAW).close()
        xdp_sockets = True
    except PermissionError:  # it is there, and for others: see `rights`
        xdp_sockets = True
    except OSError:
        xdp_sockets = False
    lockdown = ""
    with suppress(OSError):
        lockdown = Path("/sys/kernel/security/lockdown").read_text().partition("[")[2].partition("]")[0]
    return Kernel(
        os.uname().release,
        xdp_sockets,
        bool(lib.crab_xsk_knows_frags()),
        Path("/sys/kernel/btf/vmlinux").exists(),
        _number("/proc/sys/net/core/bpf_jit_enable"),
        _number("/proc/sys/kernel/bpf_stats_enabled"),
        lockdown,
    )


def version(release: str) -> tuple[int, int]:
    """(6, 1) of "6.1.0-18-amd64"; (0, 0) of what does not begin so."""
    found = re.match(r"(\d+)\.(\d+)", release)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def kernel(found: Kernel) -> Iterator[Finding]:
    this = version(found.release)
    if this < MANAGED:
        yield fault(
            "kernel-old",
            f"Linux {found.release} is too old",
            "it has no managed neighbours (5.16), so backends are not resolved; tested are 6.1 and newer",
            "install a newer kernel",
        )
    elif this < TESTED:
        yield warning(
            "kernel-old", f"Linux {found.release} is not tested", "6.1 and newer are", "install a newer kernel"
        )
    elif this < NEWER:
        yield note(
            "kernel-features",
            f"Linux {found.release} has no AF_XDP for packets in several buffers, and no tcx"
            + (", and no takeovers" if this < TAKEOVERS else ""),
            "with an MTU of more than 3,818 bytes long packets are dropped unless they are known flows'; other tc"
            " programs may run before those of the agents"
            + ("; an upgrade is a restart (keep = SECONDS: known connections go on)" if this < TAKEOVERS else ""),
            "Linux 6.6 or newer has all of it",
        )
    else:
        yield ok("kernel", f"Linux {found.release}")
    if not found.xdp_sockets:
        yield fault(
            "af-xdp",
            "this kernel has no AF_XDP",
            "the load balancer receives and sends by it",
            "a kernel with CONFIG_XDP_SOCKETS=y",
        )
    if not found.btf:
        yield note(
            "btf",
            "the kernel has no BTF",
            "the load balancer does without; a server's agent does not see listeners of before it",
            "a kernel with CONFIG_DEBUG_INFO_BTF=y",
        )
    if found.jit == 0:
        yield warning(
            "jit",
            "BPF programs are interpreted",
            "each packet costs several times as much",
            "sysctl -w net.core.bpf_jit_enable=1",
        )
    if found.statistics:
        yield note(
            "bpf-statistics",
            "the time of BPF programs is measured",
            "which costs every packet two looks at the clock",
            "sysctl -w kernel.bpf_stats_enabled=0",
        )
    if found.lockdown == "confidentiality":
        yield note(
            "lockdown",
            "the kernel is locked down for confidentiality",
            "BPF programs may not read its memory; the load balancer's do not, the agents' are refused",
            "lockdown=integrity on the kernel's command line",
        )


# ---- rights and limits ----


@dataclass(frozen=True, slots=True)
class Rights:
    user: int
    lacking: tuple[str, ...]  # of capabilities.SERVE
    advice: str  # of why, if more is known


def serves() -> bool:
    """Whether a load balancer is perhaps to run as this process does: not by another user who has none of the
    capabilities, as a member of ``admin_group``."""
    return os.geteuid() == 0 or set(capabilities.lacking(capabilities.SERVE)) != set(capabilities.SERVE)


def of_process(findings: Iterable[Finding], serves: bool) -> Iterator[Finding]:
    """Findings about what this process may do: where it is not the one to serve, they are good to know."""
    for finding in findings:
        if serves or finding.id not in OF_PROCESS or finding.severity is Severity.OK:
            yield finding
        else:
            why = f"{finding.why}; of no harm if another user runs it, as root"
            yield replace(finding, severity=Severity.NOTE, why=why)


def read_rights() -> Rights:
    return Rights(os.geteuid(), tuple(capabilities.lacking(capabilities.SERVE)), unprivileged())


def rights(found: Rights) -> Iterator[Finding]:
    if found.lacking:
        yield fault(
            "rights",
            f"user {found.user} lacks {', '.join(found.lacking)}",
            "crablb serve needs them, and the doctor sees less without",
            "run it as root, or in a unit of systemd with AmbientCapabilities=" + " ".join(capabilities.SERVE),
        )
    elif found.advice:
        yield fault("rights", "BPF programs may not be loaded", found.advice, "run it on the host")
    else:
        yield ok("rights", f"user {found.user} may load and attach BPF programs")


@dataclass(frozen=True, slots=True)
class Limits:
    """Bytes and files that a process may have; None: no limit."""

    files: int | None
    locked: int | None  # None also if it may lock what it likes (CAP_IPC_LOCK)
    addresses: int | None
    available: int | None  # memory, of the machine; None: not known


def _limit(which: int) -> int | None:
    hard = resource.getrlimit(which)[1]
    return None if hard == resource.RLIM_INFINITY else hard


def read_limits() -> Limits:
    available = None
    with suppress(OSError):
        if found := re.search(r"^MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text(), re.M):
            available = int(found[1]) << 10
    locked = _limit(resource.RLIMIT_MEMLOCK) if capabilities.lacking(("CAP_IPC_LOCK",)) else None
    # The address space's soft limit is what holds: nothing raises it.
    soft = resource.getrlimit(resource.RLIMIT_AS)[0]
    return Limits(_limit(resource.RLIMIT_NOFILE), locked, None if soft == resource.RLIM_INFINITY else soft, available)


def limits(found: Limits) -> Iterator[Finding]:
    before = []
    if found.files is not None and found.files < FILES:
        tell = fault if found.files < FEWEST_FILES else warning
        yield tell(
            "limit-files",
            f"{found.files} files may be open at most",
            f"crablb needs {FEWEST_FILES} at the least, and one or two for each map, queue and connection to its API",
            "ulimit -n 65536, LimitNOFILE=65536 in a unit of systemd",
        )
        before.append("files")
    if found.locked is not None and found.locked < UMEM:
        yield fault(
            "limit-memlock",
            f"{found.locked:,} bytes may be locked at most",
            f"the frames of each queue are {UMEM:,}; the kernel refuses more (ENOBUFS)",
            "ulimit -l unlimited, LimitMEMLOCK=infinity in a unit of systemd, or CAP_IPC_LOCK",
        )
        before.append("memlock")
    if found.addresses is not None and found.addresses < LEAST_ADDRESSES:
        yield warning(
            "limit-addresses",
            f"a process may have {found.addresses:,} bytes of addresses",
            "tables of flows and the workers' stacks need more of them than of memory",
            "ulimit -v unlimited, LimitAS=infinity in a unit of systemd",
        )
        before.append("addresses")
    if found.available is not None and found.available < LEAST_MEMORY:
        yield warning(
            "memory",
            f"{found.available >> 20} MiB of memory are available",
            "the load balancer needs some 90 MiB; without memory its tasks fail and are begun anew",
            "free some, or a smaller `flows`",
        )
        before.append("memory")
    if not before:
        yield ok("limits", "files, memory and addresses suffice")


# ---- the BPF file system, and whether programs load ----


def read_bpffs() -> tuple[bool, bool]:
    """Whether it is mounted, and whether it could be."""
    return bool(bpf.find_bpffs()), not capabilities.lacking(("CAP_SYS_ADMIN",)) and bpf.BPFFS.is_dir()


def bpffs(found: tuple[bool, bool]) -> Iterator[Finding]:
    mounted, mountable = found
    if mounted:
        yield ok("bpffs", "the BPF file system is mounted")
    elif mountable:
        yield note(
            "bpffs", f"the BPF file system is not mounted on {bpf.BPFFS}", "the first start mounts it as root", _MOUNT
        )
    else:
        yield fault(
            "bpffs",
            f"the BPF file system is not mounted on {bpf.BPFFS}, and this process may not mount it",
            "what must outlive the daemon is pinned there",
            _MOUNT,
        )


_MOUNT = f"mount -t bpf bpf {bpf.BPFFS}"


def read_load() -> str:
    """Why the load balancer's program does not load; empty if it does.

    Raises :class:`crablb.kernel.bpf.BpfPermissionError`: whether it would is not to be known.
    """
    try:
        with bpf.Object(bpf.object_path("lb"), max_entries={"flows": 1}, frags=bool(lib.crab_xsk_knows_frags())):
            return ""
    except bpf.BpfPermissionError:  # see `rights`
        raise
    except bpf.BpfError as error:
        return str(error)


def load(refused: str) -> Iterator[Finding]:
    if refused:
        yield fault(
            "program-refused",
            "the kernel does not load the load balancer's program",
            refused,
            "as it says; a kernel of 6.1 or newer takes it",
        )
    else:
        yield ok("program", "the kernel loads the load balancer's program")


# ---- clocks ----


@dataclass(frozen=True, slots=True)
class Clock:
    synchronised: bool
    behind: float  # seconds that the wall clock is behind the files of this package; 0 or less: it is not


def read_clock() -> Clock:
    libc = ctypes.CDLL(None, use_errno=True)
    asked = ctypes.create_string_buffer(512)  # struct timex; nothing is to be set
    state = libc.adjtimex(asked)
    if state < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return Clock(state != TIME_ERROR, os.stat(__file__).st_mtime - time.time())


def clock(found: Clock) -> Iterator[Finding]:
    if found.behind > 86400:
        yield warning(
            "clock-wrong",
            "the wall clock is behind the day on which crablb was installed",
            "certificates are not valid yet, and times in the log are wrong",
            "timedatectl set-ntp true",
        )
    elif not found.synchronised:
        yield note(
            "clock",
            "the wall clock is not synchronised",
            "times in the log cannot be compared with other machines'",
            "timedatectl set-ntp true",
        )
    else:
        yield ok("clock", "the wall clock is synchronised")


# ---- places ----


@dataclass(frozen=True, slots=True)
class Place:
    path: str  # the folder itself, or the nearest above it that is there
    wanted: str
    free: int  # bytes
    files: bool  # whether more files may be made
    read_only: bool
    writable: bool  # by this user, if it is perhaps to serve


def read_place(path: Path) -> Place:
    there = next(each for each in (path, *path.parents) if each.exists())
    found = os.statvfs(there)
    return Place(
        str(there),
        str(path),
        (found.f_bfree if os.geteuid() == 0 else found.f_bavail) * found.f_frsize,
        not found.f_files or bool(found.f_ffree),
        bool(found.f_flag & os.ST_RDONLY),
        not serves() or os.access(there, os.W_OK | os.X_OK),
    )


def place(found: Place) -> Iterator[Finding]:
    essential = found.wanted == str(pins.RUN)
    tell = fault if essential else warning
    why = (
        "crablb serve keeps its locks there, and does not start without"
        if essential
        else "the seed and changes at run time are kept there: without, a restart may move fallback connections"
    )
    name = "run-folder" if essential else "state-folder"
    if found.read_only:
        yield tell(name, f"{found.path} is read-only", why, f"mount -o remount,rw {found.path}")
    elif found.free < LEAST_SPACE or not found.files:
        yield tell(name, f"{found.path} is full", why, f"df {found.path}; df -i {found.path}")
    elif not found.writable:
        yield tell(
            name,
            f"this user cannot write {found.path}",
            why,
            f"as root: install -d -o {os.geteuid()} {found.wanted}",
        )
    else:
        yield ok(name, f"{found.wanted} has room")


def read_seed() -> str:
    """What is wrong with the seed; empty if nothing is."""
    try:
        text = seed.PATH.read_text()
    except FileNotFoundError:
        return ""
    try:
        guarded(seed.PATH)
    except ConfigError as error:
        return str(error)
    good = re.fullmatch(r"[0-9a-fA-F]{32}\s*", text)
    return "" if good else f"{seed.PATH} does not hold 32 hexadecimal digits"


def seeded(wrong: str) -> Iterator[Finding]:
    if wrong:
        yield warning(
            "seed",
            wrong,
            "the key of every hash: who knows it can choose connections that collide; without it, a restart moves"
            " fallback connections",
            f"chmod 600 {seed.PATH}, or remove it: the next start makes another one",
        )


# ---- /proc ----


def read_proc() -> tuple[bool, bool]:
    """Whether /proc is mounted, and whether all processes are to be seen there."""
    return Path("/proc/self/status").exists(), Path("/proc/1/status").exists()


def proc(found: tuple[bool, bool]) -> Iterator[Finding]:
    mounted, all_seen = found
    if not mounted:
        yield fault("proc", "/proc is not mounted", "crablb reads there what it may do", "mount -t proc proc /proc")
    elif not all_seen:
        yield note(
            "proc",
            "other users' processes are hidden in /proc (hidepid)",
            "what network namespaces that are no more have left is not cleared away",
        )


# ---- the kernel's table of neighbours ----


def read_neighbours() -> tuple[str, int, int | None]:
    """The family that is nearer to its limit; entries; the limit, None where it is another namespace's to know."""
    found = []
    with Netlink() as netlink:
        for family, name in ((socket.AF_INET, "ipv4"), (socket.AF_INET6, "ipv6")):
            entries = sum(1 for _ in rtnetlink.neighbours(netlink, family))
            found.append((name, entries, _number(f"/proc/sys/net/{name}/neigh/default/gc_thresh3")))
    return max(found, key=lambda one: one[1] / (one[2] or 1 << 30))


def neighbours(found: tuple[str, int, int | None]) -> Iterator[Finding]:
    family, entries, most = found
    if most and entries > 0.8 * most:
        yield warning(
            "neighbour-table",
            f"{entries:,} neighbours, and there is room for {most:,} ({family})",
            "in a full table backends are not resolved (neighbour table overflow)",
            f"sysctl -w net.{family}.neigh.default.gc_thresh3={4 * most}",
        )
