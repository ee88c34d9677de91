"""The load balancer of an interface: its process, or what a dead one has left; its counters."""

from __future__ import annotations

import glob
import os
import socket
import stat
import struct
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from crablb.control import state
from crablb.dataplane import statistics
from crablb.dataplane.paths import backends
from crablb.doctor.finding import Finding, fault, note, ok, warning
from crablb.kernel import bpf, pins
from crablb.model import Address, Vip

__all__ = [
    "Daemon",
    "Log",
    "Memory",
    "Stray",
    "counters",
    "judge",
    "logs",
    "memory",
    "read",
    "read_counters",
    "read_log",
    "read_memory",
    "read_strays",
    "strays",
]

LEAST_SPACE = 1 << 20
STOPPED = {"T": "stopped (SIGSTOP)", "t": "stopped by a debugger", "Z": "dead, and its parent does not look after it"}
#: What a daemon that lives has pinned; see crablb.dataplane.program.PINNED.
ESSENTIAL = ("link", "flows", "services", "sockets")


@dataclass(frozen=True, slots=True)
class Daemon:
    """Of one interface."""

    name: str
    pid: int | None = None  # as pins.owner says; None: nobody
    state: str = ""  # of the process, a letter of proc(5)
    age: float = 0.0  # seconds since the process began
    pinned: frozenset[str] = frozenset()
    there: bool = True  # the interface is
    attached: bool = False  # its program is on the interface
    keeper: int | None = None  # process that removes after a while what was kept
    offloads: str = ""  # features that are to be switched on again
    served: int = 0  # queues that have sockets
    queues: int = 0  # that the interface has
    locked: bool = True  # there is a lock file, held or not

    @property
    def alive(self) -> bool:
        return self.pid is not None


def names() -> list[str]:
    """The interfaces of this network namespace that a load balancer serves, or has left something of."""
    alive = (role for role, pid in pins.held().items() if pid is not None)
    roles = {*pins.folders(), *alive, *noted("offloads")}
    return sorted(role.removeprefix("lb-") for role in roles if role.startswith("lb-"))


def noted(kind: str) -> dict[str, Path]:
    """The files of a kind that crablb keeps in /run for this network namespace, by role."""
    prefix, suffix = f"{pins.PREFIX}{pins.cookie()}-", f".{kind}"
    return {path.name.removeprefix(prefix).removesuffix(suffix): path for path in pins.RUN.glob(f"{prefix}*{suffix}")}


def _process(pid: int) -> tuple[str, float]:
    """State and age of a process; proc(5)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        begun = int(fields[19]) / os.sysconf("SC_CLK_TCK")
        return fields[0], time.clock_gettime(time.CLOCK_BOOTTIME) - begun
    except (OSError, ValueError, IndexError):
        return "", 0.0


def stopped(pid: int) -> bool:
    """Whether a process does not answer, as it does not run."""
    return _process(pid)[0] in STOPPED


def _keeper(name: str) -> int | None:
    """The process of ``crablb remove --after`` for an interface of this network namespace."""
    here = os.stat("/proc/thread-self/ns/net").st_ino
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended
            words = path.read_bytes().decode(errors="replace").split("\0")
            if {"remove", "--after", name} <= set(words) and os.stat(path.with_name("ns") / "net").st_ino == here:
                return int(path.parent.name)
    return None


def _sockets(folder: Path, index: int) -> int:
    """Queues of an interface that the XDP program knows sockets for."""
    with bpf.Map.from_pin(folder / "interfaces") as interfaces:
        return int(struct.unpack("=II", interfaces.lookup(index) or bytes(8))[1])


def read(name: str, queues: int) -> Daemon:
    """``queues``: that the interface has in use now; 0: not known."""
    role = f"lb-{name}"
    pid, folder = pins.held().get(role), pins.folders().get(role)
    status, age = _process(pid) if pid else ("", 0.0)
    offloads = noted("offloads").get(role)
    try:
        index = socket.if_nametoindex(name)
    except OSError:
        index = 0
    attached, served = False, queues
    pinned = frozenset(path.name for path in folder.iterdir()) if folder else frozenset()
    if folder and index:
        with suppress(bpf.BpfNotFoundError), bpf.Link.from_pin(folder / "link") as link:
            attached = link.program_id == bpf.xdp_program(index)[0]
        with suppress(bpf.BpfNotFoundError):
            served = _sockets(folder, index)
    return Daemon(
        name, pid, status, age, pinned, bool(index), attached, _keeper(name) if pinned and pid is None else None,
        offloads.read_text().strip() if offloads else "", served, queues,
        any(pins.RUN.glob(f"*-{glob.escape(role)}.lock")),  # of a version of before under another name
    )  # fmt: skip


def _since(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def judge(found: Daemon) -> Iterator[Finding]:
    name = found.name
    remove = f"crablb remove --iface {name}"
    if found.alive and found.state in STOPPED:
        yield fault(
            "daemon-stopped",
            f"process {found.pid} is {STOPPED[found.state]}",
            "known flows go on; nothing else is decided, and no backend is followed",
            f"kill -CONT {found.pid}; if it does not go on, kill -9 {found.pid} and start it again",
        )
    elif found.pid == pins.ELSEWHERE and found.there:
        yield ok("daemon", f"{pins.told(found.pid)} serves {name}")
    elif found.alive and found.there:
        yield ok("daemon", f"process {found.pid} serves {name}, since {_since(found.age)}")
    elif found.pid is not None:
        yield ok("daemon", f"{pins.told(found.pid)} waits for {name}, since it is gone")
    elif found.pinned and not found.locked:
        yield warning(
            "daemon-elsewhere",
            f"what a load balancer has in the kernel for {name} is here, and its lock is not in {pins.RUN}",
            "it runs with another /run, as in a container of its own: whether it lives is not known, and a start here"
            " would not know either",
            f"run it here too, with {pins.RUN} of the host; if none runs anywhere: {remove}",
        )
    elif found.keeper:
        yield note(
            "kept",
            f"no process serves {name}; its flows are kept for the next one, until process {found.keeper} removes them",
            "known flows go on, new connections are dropped meanwhile",
            "crablb serve takes it over",
        )
    elif found.pinned:
        yield fault(
            "daemon-dead",
            f"no process serves {name}, and the load balancer that did is in the kernel still",
            "known flows go on, new connections are dropped",
            f"start crablb serve again, which takes it over; or {remove}",
        )
    else:
        yield ok("daemon", f"nobody serves {name} yet")
    if found.pinned and not found.there and not found.alive:
        yield warning(
            "left-interface",
            f"what a load balancer left stands under the name of {name}, which there is not",
            "a start by the interface's new name is refused, if it was renamed",
            remove,
        )
    if found.alive and found.pinned and found.there and not found.attached:
        yield fault(
            "program-detached",
            f"the load balancer's XDP program is not on {name}",
            "somebody has detached it: VIPs' packets go to the kernel, which refuses them",
            "restart crablb serve",
        )
    if found.alive and found.pinned and (missing := [pin for pin in ESSENTIAL if pin not in found.pinned]):
        yield warning(
            "pins-missing",
            f"pins of the load balancer are gone: {', '.join(missing)}",
            "a killed daemon's flows would not be found, nor its program removed",
            "restart crablb serve",
        )
    if found.alive and found.served < found.queues and found.attached:
        yield fault(
            "queues-unserved",
            f"{found.served} of {found.queues} queues have a socket",
            "VIPs' packets that come in by the others are dropped (drop_no_socket)",
            f"restart crablb serve, or ethtool -L {name} combined {found.served}",
        )
    if found.offloads and not found.alive and not found.pinned:
        yield warning(
            "offloads-left",
            f"{', '.join(found.offloads.split())} of {name} is off, and nobody switches it on again",
            "a load balancer switched it off and was killed; VLAN tags cost the CPU time",
            f"{remove} (or ethtool -K {name} rxvlan on)",
        )


# ---- where it logs to ----


@dataclass(frozen=True, slots=True)
class Log:
    """Standard error of a daemon."""

    pid: int
    target: str  # as /proc/PID/fd/2 has it
    file: bool
    free: int = 0  # bytes, on a file's disk


def read_log(pid: int) -> Log:
    path = Path(f"/proc/{pid}/fd/2")
    target, found = os.readlink(path), path.stat()
    if not stat.S_ISREG(found.st_mode):
        return Log(pid, target, False)
    with open(path, "rb") as file:
        room = os.fstatvfs(file.fileno())
    return Log(pid, target, True, room.f_bfree * room.f_frsize)


def logs(found: Log) -> Iterator[Finding]:
    if found.file and found.target.endswith(" (deleted)"):
        yield warning(
            "log-deleted",
            f"process {found.pid} logs to a file that is deleted: {found.target.removesuffix(' (deleted)')}",
            "nobody can read it, and it takes room on the disk",
            f"kill -USR1 {found.pid}, which opens the log anew",
        )
    elif found.file and found.free < LEAST_SPACE:
        yield warning(
            "log-full",
            f"the disk of {found.target} is full",
            "lines of the log are lost; the load balancer goes on",
            f"df {found.target}",
        )
    elif found.target == os.devnull:
        yield note(
            "log-nowhere",
            f"process {found.pid} logs to {os.devnull}",
            "nobody can read what befalls it but as events",
            "crablb events -f; start it with standard error to a file or to systemd's journal",
        )
    else:
        yield ok("log", f"process {found.pid} logs to {found.target}")


# ---- what it remembers ----


@dataclass(frozen=True, slots=True)
class Memory:
    """The state file; ``wrong``: why the next start will not take it; ``aside``: what was put aside by starts."""

    path: str
    wrong: str = ""
    aside: tuple[str, ...] = ()


def read_memory(name: str) -> Memory:
    """Raises OSError."""
    path = state.place(name)
    aside = tuple(sorted(map(str, path.parent.glob(f"{glob.escape(path.name)}.*"))))
    try:
        found = path.lstat()
    except FileNotFoundError:
        return Memory(str(path), "", aside)
    if not stat.S_ISREG(found.st_mode):
        return Memory(str(path), "it is no file", aside)
    if found.st_mode & 0o022:
        return Memory(str(path), "others can write it", aside)
    if found.st_size > state.MOST:
        return Memory(str(path), f"it has {found.st_size:,} bytes", aside)
    return Memory(str(path), _wrong(path.read_bytes()), aside)


def _wrong(data: bytes) -> str:
    try:
        saved = msgspec.json.decode(data, type=dict[str, Any])
    except (ValueError, RecursionError) as error:  # msgspec's is one, and what is no UTF-8, too
        return str(error)
    version = saved.get("version")
    return "" if version == state.VERSION else f"it is of version {version}, and this is {state.VERSION}"


def memory(found: Memory) -> Iterator[Finding]:
    if found.wrong:
        yield warning(
            "state-file",
            f"{found.path} is of no use: {found.wrong}",
            "what was changed at run time is not known to the next start",
            f"if others can write it: chmod 600 {found.path}; else the next start puts it aside",
        )
    for path in found.aside:
        yield note(
            "state-aside",
            f"a state file was put aside: {path}",
            "a start found it of no use; what was changed at run time before is not known since",
            f"look whether it is of use, then rm {path}",
        )


# ---- what lies about ----


@dataclass(frozen=True, slots=True)
class Stray:
    """A thing that nobody owns: a lock's role ("lock"), or the path of a socket that nobody listens at ("socket")."""

    kind: str
    name: str


def read_strays() -> list[Stray]:
    folders = pins.folders()
    found = [Stray("lock", role) for role, pid in pins.held().items() if pid is None and role not in folders]
    for path in sorted(pins.RUN.glob(f"{pins.PREFIX}{pins.cookie()}-*.sock")):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as sock:
            try:
                sock.connect(str(path))
            except (ConnectionRefusedError, FileNotFoundError):  # the second: a link that leads nowhere
                found.append(Stray("socket", str(path)))
            except OSError:  # it is busy (EAGAIN), or for others
                continue
    return found


def strays(found: list[Stray]) -> Iterator[Finding]:
    for one in found:
        if one.kind == "lock":
            yield note(
                "lock-stale",
                f"a lock that nobody holds: {one.name}",
                "of no harm: the next start takes it",
                f"crablb remove --iface {one.name[3:]}" if one.name.startswith("lb-") else "",
            )
        else:
            yield note(
                "socket-stale",
                f"nobody listens at {one.name}",
                "of no harm: the next start makes it anew; commands say that nobody serves",
                f"rm {one.name}",
            )


# ---- what it serves ----


def served(name: str) -> tuple[list[Vip], list[Address]]:
    """The VIPs and backends that the load balancer of an interface has in the kernel; none if there is none."""
    folder = pins.folders().get(f"lb-{name}")
    if not folder:
        return [], []
    try:
        with bpf.Map.from_pin(folder / "services") as services, bpf.Map.from_pin(folder / "paths") as paths:
            return [Vip.from_key(key) for key in services.keys()], [a for a, _ in backends(paths)]  # noqa: SIM118
    except bpf.BpfNotFoundError:
        return [], []


# ---- counters ----

#: Seconds between two looks at the counters.
APART = 1.0


@dataclass(frozen=True, slots=True)
class Meaning:
    """Of a counter that rises only where something is wrong; ``usual``: or now and then in any network."""

    what: str
    remedy: str
    usual: bool = False


MEANINGS: Mapping[str, Mapping[str, Meaning]] = {
    "xdp": {
        "drop_no_socket": Meaning(
            "VIPs' packets came in where no worker has a socket",
            "start crablb serve; again, if queues lack one",
        ),
        "drop_sent_back": Meaning(
            "a backend sends packets of the VIP back", "the VIP on its loopback: crablb agent server --dsr there"
        ),
        "drop_hops": Meaning("packets have no hop left: they go round", "find the ring: tcpdump -v, and the TTLs"),
        "drop_mapped": Meaning("IPv4-mapped addresses in IPv6 headers: forged", "filter them at the network's edge"),
        "drop_syn_rate": Meaning(
            "more SYNs came to a service than its syn_rate",
            "somebody floods: find who (crablb capture); or raise syn_rate",
        ),
    },
    "total": {
        "too_big": Meaning(
            "packets do not fit on the way to a backend (clients are told)",
            "a larger MTU on the way; in generic mode GRO and TSO off (docs/machine.md)",
            usual=True,
        ),
        "drop_too_big": Meaning("packets do not fit, and may be fragmented", "a larger MTU on the way to the backends"),
        "drop_checksum": Meaning("wrong checksums", "a faulty cable or card: ethtool -S IF; or somebody forges"),
        "drop_no_backend": Meaning("no backend of a service answers", "crablb backends; the log"),
        "drop_no_path": Meaning("fallback = 'dsr-l2', and the backend is behind a gateway", "fallback = 'auto'"),
        "drop_sent_back": Meaning(
            "a backend sends packets of the VIP back", "the VIP on its loopback: crablb agent server --dsr there"
        ),
        "drop_hops": Meaning("packets have no hop left: they go round", "find the ring: tcpdump -v, and the TTLs"),
        "drop_tx": Meaning("the kernel refused to send", "ip link: is the interface up? The log"),
        "drop_handler": Meaning("a handler failed", "its exception is in the log"),
        "drop_rate": Meaning(
            "more than 1,000 answers a second for VIPs' other ports", "somebody scans: find who (crablb capture)"
        ),
        "refused": Meaning("SYNs that no backend of a service could take", "crablb backends; the log"),
        "retransmitted_syn": Meaning(
            "SYNs came a second time: answers are lost, or servers slow",
            "crablb agent status on the servers; what filters the way between clients and them",
            usual=True,
        ),
        "flows_full": Meaning("SYNs were not remembered for want of room", "raise `flows`"),
        "xsk_rx_full": Meaning(
            "a worker had no time: its ring was full",
            "more queues or CPUs: ethtool -L; if one service is flooded, its syn_rate",
        ),
        "xsk_rx_dropped": Meaning("no frame was free, or none long enough", "a smaller MTU, or more queues"),
        "xsk_fill_empty": Meaning("the kernel found no free frame", "more queues or CPUs: ethtool -L"),
        "xsk_rx_invalid": Meaning("the kernel refused descriptors: a bug", "please report it"),
        "xsk_tx_invalid": Meaning("the kernel refused descriptors: a bug", "please report it"),
    },
    "daemon": {
        "reloads_refused": Meaning("configurations were refused", "crablb config check FILE; the log says why"),
        "backends_lost": Meaning("backends stopped answering", "crablb backends; the log"),
        "backends_moved": Meaning(
            "a backend's MAC address changed", "if no card was exchanged, somebody pretends to be it: see the log"
        ),
        "vips_in_use": Meaning("somebody else claimed a VIP", "arping -I IF VIP; the log says who"),
        "vips_yielded": Meaning("a VIP was left to somebody else", "arping -I IF VIP; the log says who"),
        "tasks_failed": Meaning("a background task failed, and was begun anew", "its exception is in the log"),
        "narrow_tunnels": Meaning("a tunnel is too narrow for IPv6", "a larger MTU on the way to the backend"),
        "flows_nearly_full": Meaning("90 % of `flows` were in use", "raise `flows`"),
        "cache_full": Meaning("a worker's flow cache had no room", "raise `flows`"),
        "policy_failed": Meaning("a policy in Python failed", "its exception is in the log"),
        "handler_failed": Meaning("a handler failed", "its exception is in the log"),
        "reports_unknown": Meaning("reports of no backend", "who sends them stands in the log"),
        "reports_malformed": Meaning("reports that are none", "who sends them stands in the log"),
        "reports_forged": Meaning("reports under a wrong key", "crablb key backend ADDRESS, and copy it there"),
        "reports_replayed": Meaning("reports older than the last one", "clocks: timedatectl on the servers"),
        "reports_silent": Meaning("servers stopped reporting", "crablb agent status on them"),
        "redirects_stopped": Meaning(
            "a backend completed no redirects", "crablb agent status there; what filters the way from the clients"
        ),
        "xsk_dropped": Meaning("the kernel dropped packets in front of the workers", "more queues or CPUs; see xsk_*"),
        "interfaces_lost": Meaning("an interface was gone", "ip link, and the log"),
        "interfaces_unserved": Meaning("an interface could not be served whole", "the log says why"),
        "backends_unhealthy": Meaning("checks took a backend out", "crablb backends; the log"),
        "panics": Meaning("too little of a service was healthy, and health disregarded", "crablb services; the log"),
        "quorums_lost": Meaning("a VIP was withdrawn for want of healthy backends", "crablb services; the log"),
        "takeovers_failed": Meaning("another process was to take over, and failed", "crablb events, and the log"),
        "state_unsaved": Meaning("changes at run time could not be written down", "df /var/lib/crablb, and the log"),
        "services_idle": Meaning("a service had no backend that takes connections", "state = 'up', or a weight"),
    },
}


def read_counters(name: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The counters now and :data:`APART` later; None if there are none.  Raises :class:`crablb.kernel.bpf.BpfError`."""
    folder = pins.folders().get(f"lb-{name}")
    if not folder:
        return None
    before = statistics.read_pinned(folder)
    time.sleep(APART)
    return before, statistics.read_pinned(folder)


def counters(found: tuple[Mapping[str, Any], Mapping[str, Any]] | None) -> Iterator[Finding]:
    if not found:
        return
    before, now = found
    for place, meanings in MEANINGS.items():
        for counter, meaning in meanings.items():
            old, new = before[place].get(counter, 0), now[place].get(counter, 0)
            if new > old and not meaning.usual:
                yield warning(
                    "counter-rises",
                    f"{counter} rises: {new:,}, {new - old:,} of them now",
                    meaning.what,
                    meaning.remedy,
                )
            elif new:
                yield note("counter", f"{counter}: {new:,} since the start", meaning.what, meaning.remedy)
    if not any(now["xdp"].get(counter) for counter in ("syn", "other", "flow")):
        yield note(
            "no-traffic",
            "no packet of a service has come in since the start",
            "the VIPs' packets do not come here, or nobody has sent any",
            "tcpdump -ni on a client or the router, and where its route to the VIP leads",
        )


def arriving(name: str) -> bool:
    """Whether the load balancer has seen SYNs."""
    folder = pins.folders().get(f"lb-{name}")
    try:
        return bool(folder and statistics.read_pinned(folder)["xdp"]["syn"])
    except bpf.BpfError:
        return False
