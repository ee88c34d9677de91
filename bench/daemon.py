"""The daemon itself, for the suite `xsk`: how it starts, what memory it has, what a single SYN waits for it."""

from __future__ import annotations

import os
import re
import select
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from bench.context import Unavailable
from bench.figures import Suite, Table, Target
from bench.veth import FAR, PACKET_OUTGOING, SERVE, VIP, World, affinity, arguments, daemon, syn
from crablb.kernel import bpf


class Probe:
    """Single SYNs from the far end, and what comes back."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0800))
        self.sock.bind((FAR, 0))
        self.number = 0

    def __enter__(self) -> Probe:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def send(self) -> None:
        self.number += 1
        frame = self.world.frame
        self.sock.send(syn(frame[:6], frame[6:12], port=1024 + self.number % 60000, sequence=self.number))

    def answered(self, timeout: float) -> bool:
        """Whether a SYN comes back within so many seconds."""
        self.sock.settimeout(timeout)
        while True:
            try:
                data, (_, _, kind, *_) = self.sock.recvfrom(2048)
            except TimeoutError:
                return False
            # A redirected SYN is to a backend's MAC address: not to the interface's own.
            if kind != PACKET_OUTGOING and data[30:34] != socket.inet_aton(VIP):
                return True


#: How far a start is, one after the other.
INTERPRETER, MODULES = "the interpreter runs", "modules are imported"
FIRST, READY = "the first SYN is forwarded", "READY=1 is said"
#: By itself, what takes most of the time between modules and the first SYN.
VERIFIED = "of it, the XDP program: read, verified, compiled"


def took(*command: str) -> float:
    """Seconds from exec of a program to its end.  Raises :class:`Unavailable` if it fails."""
    start = time.monotonic()
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unavailable(f"{' '.join(command)}: {done.stderr.strip()[-300:]}")
    return time.monotonic() - start


def verified() -> float:
    """Seconds that the load balancer's XDP program takes to load."""
    start = time.monotonic()
    bpf.Object(bpf.object_path("lb")).close()
    return time.monotonic() - start


def start_up(world: World) -> dict[str, float]:
    """Seconds from exec to the end of each phase of a start.

    The first two are those of programs that go no further.  The others are of one start, which says READY=1 by
    ``NOTIFY_SOCKET`` (sd_notify(3)), and which gets a SYN each millisecond until one comes out.
    """
    found = {
        INTERPRETER: took(sys.executable, "-c", "pass"),
        MODULES: took(sys.executable, "-c", "import crablb.cli.serve, crablb.control.daemon"),
    }
    with (
        tempfile.TemporaryDirectory(prefix="crablb-start-") as folder,
        Probe(world) as probe,
        open(os.devnull, "w") as null,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told,
    ):
        path = f"{folder}/notify"
        told.bind(path)
        told.setblocking(False)
        start = time.monotonic()
        child = subprocess.Popen(arguments(), stderr=null, env={**os.environ, "NOTIFY_SOCKET": path})
        try:
            while READY not in found or FIRST not in found:
                if child.poll() is not None or time.monotonic() - start > 20:
                    raise Unavailable("crablb serve did not start")
                with suppress(BlockingIOError):
                    if told.recv(4096).startswith(b"READY=1"):
                        found[READY] = time.monotonic() - start
                if FIRST not in found:
                    probe.send()
                    if probe.answered(0.001):
                        found[FIRST] = time.monotonic() - start
        finally:
            child.send_signal(signal.SIGTERM)
            child.wait()
    return {**found, VERIFIED: verified()}


#: Of a mapping's name in smaps (proc_pid_smaps(5)): what it is.
PARTS = {
    "the UMEM": re.compile(r"/memfd:crablb-umem\b"),
    "rings of AF_XDP sockets": re.compile(r"socket:"),
    "maps of BPF programs": re.compile(r"anon_inode:.?bpf-map"),
    "Python: the interpreter and its modules in C": re.compile(
        r"/.*(/python[\d.]*$|/libpython|/lib-dynload/|/site-packages/)"
    ),
    "crablb's own C": re.compile(r"/.*/_native\b"),
    "the C library and others": re.compile(r"/"),
}
ANONYMOUS = "anonymous: Python's objects, the flow cache, tables"


def parts(pid: int) -> dict[str, float]:
    """MiB of a process in memory, by what they are."""
    found: Counter[str] = Counter()
    name = ""
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        head = re.match(r"[0-9a-f]+-[0-9a-f]+ \S+ \S+ \S+ \d+ *(.*)", line)
        if head:
            name = next((part for part, pattern in PARTS.items() if pattern.match(head[1])), ANONYMOUS)
        elif line.startswith("Rss:"):
            found[name] += int(line.split()[1])
    return {part: kib / 1024 for part, kib in found.items()}


def resident(pid: int) -> float:
    """MiB of a process in memory."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def cpu_time(pid: int) -> float:
    """Seconds that the threads of a process have run."""
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


ALL = "with metrics and the page"
#: What a daemon has beside its main job: by name, arguments and MiB at most.
BESIDE = {
    "admin off": (("--admin", "off"), 80.0),
    SERVE: ((), 95.0),
    ALL: (("--metrics-listen", "127.0.0.1"), 95.0),
}


def at_rest(world: World, *more: str) -> dict[str, float]:
    """Memory, and CPU time in per cent of a core, of a daemon that has nothing to do."""
    with daemon(world, *more) as pid:
        before, start = cpu_time(pid), time.monotonic()
        select.select([], [], [], world.context.pick(5.0, 2.0, 0.1))  # how long it is watched
        share = (cpu_time(pid) - before) / (time.monotonic() - start) * 100
        return {"memory": resident(pid), "idle": share, **parts(pid)}


def latency(world: World, pause: float, *more: str) -> float:
    """Microseconds from a SYN's sending to its coming back, median; each ``pause`` seconds after the last answer."""
    times = []
    with daemon(world, *more), Probe(world) as probe, affinity(world.cpus[0]):
        for _ in range(world.context.pick(400, 150, 5)):
            if pause:
                select.select([], [], [], pause)
            start = time.perf_counter()
            probe.send()
            if not probe.answered(1):
                raise Unavailable("a SYN did not come back")
            times.append((time.perf_counter() - start) * 1e6)
    return statistics.median(times)


def latency_of(world: World, pause: float, *more: str) -> Callable[[], dict[str, float]]:
    return lambda: {"us": latency(world, pause, *more)}


# ---- the suite ----


def at_rest_and_start(world: World, suite: Suite) -> None:
    context = world.context
    rounds = context.pick(7, 3, 1)
    start = context.in_turn("daemon", {SERVE: lambda: start_up(world)}, rounds)
    ways = {name: lambda more=more: at_rest(world, *more) for name, (more, _) in BESIDE.items()}
    rest = context.in_turn("daemon", ways, context.pick(3, 1, 1))
    probes = {
        f"{how}, {what}": latency_of(world, pause, *more)
        for pause, how in ((0.002, "2 ms after the last"), (0.0, "one after the other"))
        for what, more in (("sleeping at once", ("--busy-poll", "0")), ("turning", ()))
    }
    delays = context.in_turn("latency", probes, context.pick(7, 2, 1))["us"]
    for name, row in delays.items():
        if name.endswith(", turning"):
            row.baseline = name.replace("turning", "sleeping at once")
    suite.tables += [
        Table(
            "daemon-start",
            "`crablb serve`: from exec to the first SYN forwarded",
            "s",
            list(start[FIRST].values()),
            note="One SYN is sent each millisecond until one comes out. Four backends, one queue; not pinned.",
        ),
        Table(
            "daemon-phases",
            "The same by phases: how long after exec",
            "ms",
            [
                replace(start[name][SERVE], name=name, samples=[1e3 * s for s in start[name][SERVE].samples])
                for name in (INTERPRETER, MODULES, VERIFIED, FIRST, READY)
            ],
            note="The first two are of programs that end there; what the XDP program takes is measured by itself. "
            "READY=1 is said when all is done, the API included; packets are served before.",
        ),
        Table(
            "daemon-memory",
            "`crablb serve`: resident memory, one queue, four backends",
            "MiB",
            list(rest["memory"].values()),
            note="VmRSS: with the UMEM, the flow cache and the XDP program's flows, all of the default sizes.",
        ),
        Table(
            "daemon-parts",
            "The same, by what it is, of the last of these",
            "MiB",
            sorted(
                (replace(rest[part][ALL], name=part) for part in (*PARTS, ANONYMOUS) if ALL in rest.get(part, {})),
                key=lambda row: -row.median,
            ),
            note="By smaps; files are shared with whoever has them mapped, too.",
        ),
        Table("daemon-idle", "`crablb serve` with nothing to do", "% of a core", list(rest["idle"].values())),
        Table(
            "xsk-latency",
            "A single SYN, in and out again (median; the sender's own system calls are in it)",
            "us",
            list(delays.values()),
            note=f"Sender on CPU {world.cpus[0]}, `crablb serve` on CPU {world.cpus[1]}.",
        ),
    ]
    seconds, memory = start[FIRST][SERVE].median, {name: row.median for name, row in rest["memory"].items()}
    reached = seconds <= 0.5 and all(memory[name] <= most for name, (_, most) in BESIDE.items())
    why = "" if reached else "see daemon-start and daemon-memory"
    small, all_ = memory["admin off"], memory[ALL]
    suite.targets.append(Target("P10", f"{seconds:.2f} s; {small:.1f} MiB; {all_:.1f} MiB with all", reached, why))
