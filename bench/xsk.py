"""AF_XDP: what the rings carry without work, what `crablb serve` carries over them, and what the daemon itself costs.

All over one veth in a network namespace of its own.  SYNs come from an XDP program run on live frames at the veth's far
end (tools/syn.bpf.c), where what comes back is counted and dropped.  The floor is tools/xskraw.c: the same rings
(native/xsk.c), driven in C, with no work on the frames.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import socket
import statistics
import struct
import subprocess
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from ipaddress import ip_address
from pathlib import Path
from threading import Thread

from bench.context import Context, Unavailable
from bench.figures import Curve, Plot, Row, Suite, Table, Target
from bench.redirect import Hop, Redirect
from crablb.kernel import bpf
from crablb.lab.demo import crablb, notify_socket
from crablb.model import Vip

NEAR, FAR = "veth0", "veth1"
LB, VIP = "10.0.0.2", "10.0.0.100"
BACKENDS = tuple(f"10.0.0.{11 + i}" for i in range(4))
BACKEND_MACS = tuple(bytes((2, 0, 0, 0, 1, i)) for i in range(4))
CLIENTS = bytes((10, 64, 0, 0))  # a network of 22 bits
#: As Linux sends them: MSS, SACK, timestamps, window scale; then the offer of connection redirection.
OPTIONS = bytes([2, 4, 5, 180, 4, 2, 8, 10, 0, 0, 0, 1, 0, 0, 0, 0, 1, 3, 3, 7, 42, 2, 1, 1])
LENGTH = 14 + 20 + 20 + len(OPTIONS)  # bytes of a frame
#: What the paper's figure 8 says, million SYN/s on one core.
PAPER = {"user space": 14.75, "XDP": 6.8, "netfilter": 1.5}
CLONE_NEWNET = 0x40000000
PACKET_OUTGOING = 4
FLOOR = "raw l2fwd"
MORE_A_KICK = "raw l2fwd, 256 frames a kick"
SERVE = "crablb serve"
PINNING = (
    "The source and the kernel's receiving side of the load balancer's interface on CPU {0}, the program under test on "
    "CPU {1}, with the kernel's sending side and the receiving side of the far end, which counts and drops."
)


def checksum(data: bytes) -> int:
    """The internet checksum (RFC 1071) of an even number of bytes."""
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return 0xFFFF - int(total)


def syn(dst: bytes, src: bytes, *, port: int = 0, sequence: int = 0) -> bytes:
    """A SYN to the VIP that offers redirection, with right checksums, :data:`LENGTH` bytes.  ``dst``, ``src``: MACs."""
    vip = socket.inet_aton(VIP)
    ip = bytearray(struct.pack("!BBHHHBBH", 0x45, 0, LENGTH - 14, 0, 0x4000, 64, 6, 0) + CLIENTS + vip)
    ip[10:12] = checksum(bytes(ip)).to_bytes(2, "big")
    words = (20 + len(OPTIONS)) // 4
    tcp = bytearray(struct.pack("!HHIIBBHHH", port, 80, sequence, 0, words << 4, 2, 64240, 0, 0) + OPTIONS)
    pseudo = CLIENTS + vip + struct.pack("!HH", 6, len(tcp))
    tcp[16:18] = checksum(pseudo + bytes(tcp)).to_bytes(2, "big")
    return dst + src + b"\x08\x00" + bytes(ip) + bytes(tcp)


@contextmanager
def affinity(cpu: int) -> Iterator[None]:
    """This thread is on one CPU while in the context."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


class World:
    """A network namespace that this thread is in while in the context, with a veth from the load balancer to far."""

    def __init__(self, context: Context, queues: int = 1) -> None:
        self.context, self.queues = context, queues
        self.netns = f"crab-xsk-{os.getpid()}-{queues}"
        self.cpus = sorted(os.sched_getaffinity(0))
        self.pinning = PINNING.format(*self.cpus)
        self._stack = ExitStack()
        self.watched = 0  # process id of what is measured, if it is one
        self.offered = 0.0  # million SYN/s that the source made, in the last measurement
        self.user = 0.0  # per cent of the watched process's CPU time that it spent outside of the kernel, meanwhile

    def __enter__(self) -> World:
        with ExitStack() as stack:
            self._enter(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _enter(self, stack: ExitStack) -> None:
        objects = self.context.bpf("syn")
        self.raw_tool = self.context.make("xskraw")
        subprocess.run(["ip", "netns", "add", self.netns], check=True)
        stack.callback(subprocess.run, ["ip", "netns", "del", self.netns], check=True)
        libc = ctypes.CDLL(None, use_errno=True)
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, home)
        with open(Path("/run/netns") / self.netns) as there:
            if libc.setns(there.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
        stack.callback(lambda: libc.setns(home, CLONE_NEWNET))
        Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1")
        for name in ("all", "default"):
            Path(f"/proc/sys/net/ipv4/conf/{name}/rp_filter").write_text("0")
            Path(f"/proc/sys/net/ipv4/conf/{name}/send_redirects").write_text("0")
        wide = ["numrxqueues", str(self.queues), "numtxqueues", str(self.queues)]
        self.ip("link", "add", NEAR, *wide, "type", "veth", "peer", "name", FAR, *wide)
        self.ip("link", "set", "lo", "up")
        self.ip("link", "set", NEAR, "up")
        self.ip("link", "set", FAR, "up")
        # For those without an XDP program in the driver: what XDP sends wakes only an end that polls (NAPI).
        self.context.output(self.context.tool("ethtool"), "-K", NEAR, "gro", "on")
        self.ip("addr", "add", f"{LB}/24", "dev", NEAR)
        for backend, mac in zip(BACKENDS, BACKEND_MACS, strict=True):
            self.ip("neigh", "add", backend, "lladdr", mac.hex(":"), "dev", NEAR, "nud", "permanent")
        self.near, self.far = socket.if_nametoindex(NEAR), socket.if_nametoindex(FAR)
        self.program = stack.enter_context(bpf.Object(objects))
        self.frame = syn(self.mac(NEAR), self.mac(FAR))
        self.program.map("frame").update(0, self.frame)

    def ip(self, *line: str) -> str:
        return self.context.output("ip", "-n", self.netns, *line)

    def mac(self, name: str) -> bytes:
        return bytes.fromhex(str(json.loads(self.ip("-j", "link", "show", name))[0]["address"]).replace(":", ""))

    @contextmanager
    def sink(self, *, xdp: bool = False) -> Iterator[None]:
        """What comes to the far end is counted and dropped while in the context."""
        if xdp:
            with self.program.program("sink").attach_xdp(self.far, "native"):
                yield
            return
        link, _ = bpf.attach_tc(self.program.program("sink_tc"), self.far)
        try:
            yield
        finally:
            link.detach()
            link.destroy_hook()

    @contextmanager
    def receiving_on(self, cpu: int) -> Iterator[None]:
        """The load balancer's end polls in a thread on this CPU while in the context, not where the source is.

        Its NAPI must be on: by an XDP program, or GRO.
        """

        def threaded(value: int) -> None:
            # The sysfs of this network namespace, in a mount namespace of its own.
            line = f"mount -t sysfs sysfs /sys && echo {value} > /sys/class/net/{NEAR}/threaded"
            self.context.output("unshare", "--mount", "sh", "-c", line)

        before = set(kernel_threads(f"napi/{NEAR}-"))
        threaded(1)
        try:
            for pid in set(kernel_threads(f"napi/{NEAR}-")) - before:
                os.sched_setaffinity(pid, {cpu})
            yield
        finally:
            threaded(0)

    def _times(self) -> tuple[int, int]:
        """Ticks that the watched process spent in user space and in the kernel."""
        if not self.watched:
            return 0, 0
        fields = Path(f"/proc/{self.watched}/stat").read_text().rsplit(")", 1)[1].split()
        return int(fields[11]), int(fields[12])

    @contextmanager
    def watching(self, pid: int) -> Iterator[None]:
        self.watched = pid
        try:
            yield
        finally:
            self.watched = 0

    def sunk(self) -> int:
        """Frames that the sink has counted."""
        return self.program.map("received").sum_u64(0)

    def flood(self, counter: Callable[[], int], cpus: Sequence[int] | None = None) -> float:
        """Million frames a second that ``counter`` counts while SYNs come as fast as the source makes them."""
        cpus = cpus or self.cpus[:1]
        frames = self.context.pick(1 << 20, 1 << 19, 1 << 17)
        source = self.program.program("source")

        def run(cpu: int, repeat: int) -> None:
            with affinity(cpu):
                source.run_live(bytes(LENGTH), self.far, repeat)

        def all_run(repeat: int) -> None:
            others = [Thread(target=run, args=(cpu, repeat)) for cpu in cpus[1:]]
            for thread in others:
                thread.start()
            run(cpus[0], repeat)
            for thread in others:
                thread.join()

        all_run(1 << 12)  # what is done once
        self.program.map("span").update(0, bytes(24))
        before, times = counter(), self._times()
        all_run(frames)
        count = counter() - before
        user, kernel = (after - then for after, then in zip(self._times(), times, strict=True))
        self.user = 100 * user / (user + kernel) if user + kernel else 0.0
        spans = [struct.unpack("=3Q", value) for value in self.program.map("span").lookup_percpu(0)]
        spans = [span for span in spans if span[2]]
        took = max(last for _, last, _ in spans) - min(first for first, _, _ in spans)
        took = max(took, 1_000_000)  # the clock's step is some milliseconds
        self.offered = sum(n for _, _, n in spans) / took * 1e3
        return float(count / took * 1e3)


def kernel_threads(prefix: str) -> list[int]:
    """Process ids of the kernel's threads whose name begins so."""
    found = []
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            if path.read_text().startswith(prefix):
                found.append(int(path.parent.name))
        except OSError:  # it has ended
            continue
    return found


# ---- the floor ----


@contextmanager
def raw_tool(
    world: World, what: str, *options: str, batch: int, budget: int, mode: str
) -> Iterator[Callable[[], list[int]]]:
    """tools/xskraw.c on its CPU; a function that asks it for the numbers of frames received and sent so far."""
    with bpf.Object(bpf.object_path("xsk")) as program:
        sockets = program.map("sockets")
        with program.program("crab_xsk").attach_xdp(world.near, mode):  # type: ignore[arg-type]
            child = subprocess.Popen(
                ["taskset", "-c", str(world.cpus[1]), world.raw_tool, what, NEAR, "0", str(sockets.fd),
                 str(batch), str(budget), *options],
                pass_fds=[sockets.fd], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )  # fmt: skip
            assert child.stdin and child.stdout and child.stderr
            stdin, stdout = child.stdin, child.stdout

            def ask() -> list[int]:
                stdin.write("\n")
                stdin.flush()
                return [int(n) for n in stdout.readline().split()]

            try:
                if stdout.readline() != "ready\n":
                    raise Unavailable(child.stderr.read().strip())
                with world.watching(child.pid):
                    yield ask
            finally:
                stdin.close()
                child.wait()
                stdout.close()
                child.stderr.close()


def raw(world: World, what: str, *options: str, batch: int = 64, budget: int = 32, mode: str = "native") -> float:
    """Million frames a second of the floor."""
    with world.sink(), raw_tool(world, what, *options, batch=batch, budget=budget, mode=mode) as ask:
        if what == "receive":
            return world.flood(lambda: ask()[0])
        if what == "l2fwd":
            return world.flood(world.sunk)
        with affinity(world.cpus[0]):
            before, start = world.sunk(), time.monotonic()
            select.select([], [], [], world.context.pick(0.5, 0.25, 0.25))  # how long it is measured
            return (world.sunk() - before) / (time.monotonic() - start) / 1e6


# ---- crablb serve ----


def arguments(*more: str) -> list[str]:
    return crablb(
        "serve", "--iface", NEAR, "--service", f"tcp://{VIP}:80={','.join(BACKENDS)}", "--check", "none", *more
    )


@contextmanager
def daemon(world: World, *more: str, cpus: Sequence[int] | None = None) -> Iterator[int]:
    """``crablb serve`` on its CPU while in the context; its process id.  It serves when the context is entered."""
    where = ",".join(map(str, cpus or world.cpus[1:2]))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="crablb-xsk-")))
        path, wait = stack.enter_context(notify_socket(folder))
        log = stack.enter_context(open(folder / "log", "w+"))
        child = subprocess.Popen(
            ["taskset", "-c", where, *arguments(*more)], env={**os.environ, "NOTIFY_SOCKET": path}, stderr=log
        )
        try:
            try:
                state = wait()
            except TimeoutError:
                state = ""
            if state != "READY=1":
                log.seek(0)
                raise Unavailable(f"crablb serve did not start: {log.read()[-500:]}")
            with world.watching(child.pid):
                yield child.pid
        finally:
            child.send_signal(signal.SIGTERM)
            child.wait()


def served(world: World, *more: str) -> float:
    """Million SYNs a second in and out again."""
    with world.sink(), daemon(world, *more):
        return world.flood(world.sunk)


def served_by_two(context: Context, sources: Sequence[int], workers: Sequence[int]) -> float:
    """The same over two queues, a source (a veth's queue is that of the sending CPU) and a worker for each."""
    with World(context, queues=2) as world, world.sink(), daemon(world, cpus=workers):
        return world.flood(world.sunk, sources)


# ---- what else forwards SYNs ----


def redirected(world: World) -> float:
    """By an XDP program that does the same redirect, alone (tools/redirect.bpf.c)."""
    hops = [Hop(ip_address(backend), mac, world.mac(NEAR)) for backend, mac in zip(BACKENDS, BACKEND_MACS, strict=True)]
    services = {Vip(ip_address(VIP), 80): hops}
    with Redirect(world.context.bpf("redirect"), services, seed=bytes(16)) as redirect:
        return bounced(world, redirect.object.program("redirect"))


def turned_round(world: World) -> float:
    """By the least that an XDP program can do: other MAC addresses (tools/mac.bpf.c)."""
    with bpf.Object(world.context.bpf("mac")) as program:
        return bounced(world, program.program("mac"))


def bounced(world: World, program: bpf.Program) -> float:
    with (
        world.sink(xdp=True),
        program.attach_xdp(world.near, "native"),
        world.receiving_on(world.cpus[1]),
    ):
        return world.flood(world.sunk)


NFT = """
table ip crab {{
  chain pre {{
    type filter hook prerouting priority raw;
    ip daddr {vip} tcp dport 80 notrack ip daddr set numgen random mod {count} map {{ {backends} }}
  }}
}}
"""


def netfilter(world: World) -> float:
    """By the kernel's forwarding, with the destination rewritten by nftables, without connection tracking."""
    backends = ", ".join(f"{i} : {address}" for i, address in enumerate(BACKENDS))
    nft = world.context.tool("nft")
    text = NFT.format(vip=VIP, count=len(BACKENDS), backends=backends)
    world.context.output(nft, "-f", "-", input=text)
    forwarding = Path("/proc/sys/net/ipv4/ip_forward")
    forwarding.write_text("1")
    try:
        with world.sink(), world.receiving_on(world.cpus[1]):
            return world.flood(world.sunk)
    finally:
        forwarding.write_text("0")
        world.context.output(nft, "delete", "table", "ip", "crab")


# ---- the daemon itself ----


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


def start_up(world: World) -> float:
    """Seconds from exec to the first SYN forwarded, one being sent each millisecond."""
    with Probe(world) as probe, open(os.devnull, "w") as null:
        start = time.monotonic()
        child = subprocess.Popen(arguments(), stderr=null)
        try:
            while not probe.answered(0.001):
                if child.poll() is not None or time.monotonic() - start > 20:
                    raise Unavailable("crablb serve did not start")
                probe.send()
            return time.monotonic() - start
        finally:
            child.send_signal(signal.SIGTERM)
            child.wait()


def resident(pid: int) -> float:
    """MiB of a process in memory."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0]) / 1024


def cpu_time(pid: int) -> float:
    """Seconds that the threads of a process have run."""
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


#: What a daemon has beside its main job: by name, arguments and MiB at most.
BESIDE = {
    "admin off": (("--admin", "off"), 80.0),
    SERVE: ((), 95.0),
    "with metrics and the page": (("--metrics-listen", "127.0.0.1"), 95.0),
}


def at_rest(world: World, *more: str) -> dict[str, float]:
    """Memory, and CPU time in per cent of a core, of a daemon that has nothing to do."""
    with daemon(world, *more) as pid:
        before, start = cpu_time(pid), time.monotonic()
        select.select([], [], [], world.context.pick(5.0, 2.0, 0.1))  # how long it is watched
        share = (cpu_time(pid) - before) / (time.monotonic() - start) * 100
        return {"memory": resident(pid), "idle": share}


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


def throughput(world: World, suite: Suite) -> None:
    context = world.context

    def with_offered(name: str, measure: Callable[[], float]) -> Callable[[], dict[str, float]]:
        def subject() -> dict[str, float]:
            world.offered = world.user = 0.0
            rate = measure()
            if not rate:
                raise Unavailable(f"{name}: nothing came through; the machine is busy with other things")
            more = {"offered": world.offered, "user": world.user}
            return {"Mpps": rate, **{figure: value for figure, value in more.items() if value}}

        return subject

    floor: dict[str, Callable[[], float]] = {
        FLOOR: lambda: raw(world, "l2fwd"),
        "raw receive": lambda: raw(world, "receive"),
        "raw send": lambda: raw(world, "send"),
        "raw l2fwd, need_wakeup": lambda: raw(world, "l2fwd", "wakeup"),
        MORE_A_KICK: lambda: raw(world, "l2fwd", "wakeup", batch=256, budget=256),
        "raw l2fwd, busy poll": lambda: raw(world, "l2fwd", "wakeup", "busy"),
        "raw receive, generic": lambda: raw(world, "receive", mode="generic"),
        "raw l2fwd, generic": lambda: raw(world, "l2fwd", mode="generic"),
    }
    daemons: dict[str, Callable[[], float]] = {
        SERVE: lambda: served(world),
        f"{SERVE}, without turning": lambda: served(world, "--busy-poll", "0"),
        f"{SERVE}, generic": lambda: served(world, "--xdp-mode", "generic"),
    }
    others: dict[str, Callable[[], float]] = {
        "XDP redirect": lambda: redirected(world),
        "XDP, MAC addresses only": lambda: turned_round(world),
        "nftables": lambda: netfilter(world),
    }
    for name, measure in list(others.items()):
        try:
            measure()
        except Unavailable as reason:
            suite.left_out.append(f"{name}: {reason}")
            del others[name]
    subjects = {name: with_offered(name, measure) for name, measure in (floor | daemons | others).items()}
    found = context.in_turn("xsk", subjects, context.pick(7, 2, 1))
    rows = found["Mpps"]
    rows["raw l2fwd, busy poll"].note = "SO_PREFER_BUSY_POLL, without deferred interrupts"
    for name in others:
        rows[name].note = f"receives on CPU {world.cpus[1]} too: it has no other place to work"
    for name in rows:
        if name.endswith("generic") and name != "raw receive, generic":
            rows[name].baseline = "" if name == "raw l2fwd, generic" else "raw l2fwd, generic"
    suite.tables += [
        Table(
            "xsk-raw",
            "The floor: AF_XDP rings over a veth, copy mode, no work",
            "Mpps",
            [rows[name] for name in floor],
            "higher",
            FLOOR,
            f"Frames of {LENGTH} bytes; 64 are taken at once, the kernel sends 32 a kick, unless said otherwise. "
            + world.pinning,
        ),
        Table(
            "xsk-serve",
            "SYNs in and out again",
            "Mpps",
            [rows[FLOOR], rows["raw l2fwd, generic"], *(rows[name] for name in (*daemons, *others))],
            "higher",
            FLOOR,
            "Each SYN is a new connection. " + world.pinning,
        ),
        Table(
            "xsk-offered",
            "SYNs that the source made meanwhile",
            "Mpps",
            list(found["offered"].values()),
            "",
            note="More than was forwarded, so the source is not what limits; but in generic mode its CPU also makes a "
            "socket buffer of each SYN, and that CPU is the limit.",
        ),
    ]
    user = {name: row for name, row in found.get("user", {}).items() if name in daemons}
    if user:
        title = "`crablb serve`: share of its CPU time that it spent outside of the kernel"
        suite.tables.append(Table("xsk-user", title, "%", list(user.values()), ""))
    names = ["raw receive", "raw send", FLOOR, "raw l2fwd, generic", SERVE, f"{SERVE}, generic", *others]
    suite.plots.append(bars("xsk-mpps", "Frames a second on one core", {name: rows[name] for name in names}))
    suite.plots.append(figure_8(rows))
    suite.targets.append(judge(rows, user))


def bars(key: str, title: str, rows: Mapping[str, Row]) -> Plot:
    curve = Curve.of("here", list(rows.values()))
    ticks = [textwrap.fill(name, 12) for name in rows]
    return Plot(key, title, "", "Mpps", [curve], "bars", ticks)


def figure_8(rows: Mapping[str, Row]) -> Plot:
    """The paper's figure 8, and what does the like here."""
    ours = {"user space": SERVE, "XDP": "XDP redirect", "netfilter": "nftables"}
    here = [(i, rows[ours[kind]]) for i, kind in enumerate(PAPER) if ours[kind] in rows]
    return Plot(
        "paper-fig8",
        "SYNs a second on one core",
        "",
        "million SYN/s",
        [
            Curve.of("crablb's benchmark", [row for _, row in here], [i for i, _ in here]),
            Curve("figure 8", [0.0, 1.0, 2.0], list(PAPER.values()), source="paper"),
        ],
        "bars",
        ["user space\n(crablb serve; DPDK)", "XDP\n(redirect.bpf.c; eBPF)", "netfilter\n(nftables; module)"],
        note="The paper's are of a 10 GbE card, whose limit is 14.88, and a bare-metal Xeon. Here the SYNs go over a "
        "veth of a virtual machine, which has no zero-copy mode: the kernel makes and frees a socket buffer for each "
        "frame that user space sends, and its receiver's work is on the same core. The receiving side of crablb serve "
        "in the kernel is on the source's core, as a network card's may be; XDP and netfilter do all on one.",
    )


def judge(rows: Mapping[str, Row], user: Mapping[str, Row]) -> Target:
    """P2.  Another load on the machine only slows; so of rows that were disturbed, the fastest samples are compared."""
    disturbed = rows[SERVE].disturbed or rows[FLOOR].disturbed

    def ratio(name: str) -> float:
        if disturbed:
            return max(rows[name].samples) / max(rows[FLOOR].samples)
        return rows[name].over(rows[FLOOR])

    ours = ratio(SERVE)
    rate = max(rows[SERVE].samples) if disturbed else rows[SERVE].median
    value = f"{ours:.2f} times ({rate:.2f} Mpps{'; fastest samples, of disturbed rows' if disturbed else ''})"
    if ours >= 1.15:
        return Target("P2", value, True)
    why = (
        f"the kernel's copy-mode sending is the wall: raw send, which receives nothing and does no work, makes "
        f"{ratio('raw send'):.2f} of raw l2fwd, and 256 frames a kick {ratio(MORE_A_KICK):.2f}"
    )
    if SERVE in user:
        share = user[SERVE].median
        why += (
            f"; all that crablb serve does in user space is {share:.0f} % of its time, which alone, as with a card "
            f"that has a zero-copy mode, is good for {rate / share * 100:.0f} Mpps"
        )
    return Target("P2", value, False, why)


def the_daemon(world: World, suite: Suite) -> None:
    context = world.context
    rounds = context.pick(7, 3, 1)
    start = context.in_turn("daemon", {SERVE: lambda: {"start": start_up(world)}}, rounds)["start"]
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
            list(start.values()),
            note="One SYN is sent each millisecond until one comes out. Four backends, one queue; not pinned.",
        ),
        Table(
            "daemon-memory",
            "`crablb serve`: resident memory, one queue, four backends",
            "MiB",
            list(rest["memory"].values()),
            note="VmRSS: with the UMEM, the flow cache and the XDP program's flows, all of the default sizes.",
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
    seconds, memory = start[SERVE].median, {name: row.median for name, row in rest["memory"].items()}
    reached = seconds <= 0.5 and all(memory[name] <= most for name, (_, most) in BESIDE.items())
    why = "" if reached else "see daemon-start and daemon-memory"
    small, all_ = memory["admin off"], memory["with metrics and the page"]
    suite.targets.append(Target("P10", f"{seconds:.2f} s; {small:.1f} MiB; {all_:.1f} MiB with all", reached, why))


def run(context: Context) -> Suite:
    suite = Suite("xsk", "AF_XDP, `crablb serve` and the daemon")
    if os.geteuid():
        raise Unavailable("network namespaces and AF_XDP need root")
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        raise Unavailable("it needs two CPUs: one for the source of SYNs, one for what is measured")
    context.tool("taskset")
    with World(context) as world:
        throughput(world, suite)
        the_daemon(world, suite)
    if len(cpus) >= 4:
        with World(context) as world:
            one = {"one queue": lambda: {"Mpps": served(world)}}
            two = {"two queues": lambda: {"Mpps": served_by_two(context, cpus[:2], cpus[2:4])}}
            rows = context.in_turn("queues", one | two, context.pick(7, 2, 1))["Mpps"]
        suite.tables.append(
            Table("xsk-queues", "`crablb serve` by queues", "Mpps", list(rows.values()), "higher", "one queue")
        )
    else:
        suite.left_out.append(
            f"two queues: each needs a CPU for its source and one for its worker, and there are {len(cpus)} in all"
        )
    return suite
