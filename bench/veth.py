"""A veth with SYNs on it, and `crablb serve` on its near end: where the suite `xsk` measures.

In a network namespace of its own.  SYNs come from an XDP program run on live frames at the veth's far end
(tools/syn.bpf.c), where what comes back is counted and dropped.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Thread

from bench.context import Context, Unavailable
from crablb.kernel import bpf
from crablb.lab.demo import crablb, notify_socket

NEAR, FAR = "veth0", "veth1"
LB, VIP = "10.0.0.2", "10.0.0.100"
BACKENDS = tuple(f"10.0.0.{11 + i}" for i in range(4))
BACKEND_MACS = tuple(bytes((2, 0, 0, 0, 1, i)) for i in range(4))
CLIENTS = bytes((10, 64, 0, 0))  # a network of 22 bits
#: As Linux sends them: MSS, SACK, timestamps, window scale; then the offer of connection redirection.
OPTIONS = bytes([2, 4, 5, 180, 4, 2, 8, 10, 0, 0, 0, 1, 0, 0, 0, 0, 1, 3, 3, 7, 42, 2, 1, 1])
LENGTH = 14 + 20 + 20 + len(OPTIONS)  # bytes of a frame
CLONE_NEWNET = 0x40000000
PACKET_OUTGOING = 4
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


def two_cpus(context: Context) -> list[int]:
    """The CPUs, of which a :class:`World` takes two.  Raises :class:`Unavailable` if it cannot be made."""
    if os.geteuid():
        raise Unavailable("network namespaces and AF_XDP need root")
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        raise Unavailable("it needs two CPUs: one for the source of SYNs, one for what is measured")
    context.tool("taskset")
    return cpus


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
