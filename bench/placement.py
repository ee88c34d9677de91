"""The load balancer's work on a CPU of its own, as in life; all else of a lab, its bridge included, on another.

A veth's frame is received on the CPU of whoever sends it, unless something takes it elsewhere.  What is polled for (all
frames where an XDP program is, and what such a program sends) is polled for in a thread of the kernel, which has a CPU
as any other has (Documentation/networking/napi.rst, "Threaded NAPI"); what is not is steered (scaling.rst, "RPS").
Either way it takes an interrupt of the other CPU, as a network card's frames do.
"""

from __future__ import annotations

import itertools
import os
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from bench.context import Context, Unavailable
from crablb.kernel import bpf
from crablb.kernel.netns import inside
from crablb.kernel.rtnetlink import GENERIC, NETLINK_GENERIC, Netlink, encode, number
from crablb.lab import Lab, Node

#: What the report calls it.
APART = "the load balancer on a CPU of its own"
#: Of netlink's family "netdev" (Documentation/netlink/specs/netdev.yaml).
NAPI_GET, NAPI_IFINDEX, NAPI_PID = 11, 1, 4
#: Share of a way's packets that another CPU may work on: an idle CPU's timers are run by one that is not.
STRAY = 0.01
#: What a thread's number is told by in ``tools/softirq.bpf.c``, where a cgroup's is not.
THREAD = 1 << 63
TOPOLOGY = Path("/sys/devices/system/cpu")
STAT = Path("/proc/stat")
TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Cpus:
    """Who works where."""

    endpoints: int
    balancer: int

    @property
    def one_core(self) -> bool:
        """Whether they are threads of one core, which is then shared after all."""
        return self.balancer in siblings(self.endpoints)


@contextmanager
def two_cpus() -> Iterator[Cpus]:
    """This process, and what it starts, on the endpoints' CPU while in the context: the last of those allowed.

    The load balancer's is the last before it of another core, if there is one.  Raises :class:`Unavailable` if but one
    CPU is allowed.
    """
    allowed = os.sched_getaffinity(0)
    *others, endpoints = sorted(allowed)
    if not others:
        raise Unavailable(f"it takes two CPUs, and this process may use one ({endpoints})")
    shared = siblings(endpoints)
    found = Cpus(endpoints, ([cpu for cpu in others if cpu not in shared] or others)[-1])
    with started_on(endpoints):
        yield found


def siblings(cpu: int) -> set[int]:
    """The CPUs that are threads of one core, this one among them; it alone if the kernel does not tell."""
    found = {cpu}
    with suppress(OSError):
        for part in (TOPOLOGY / f"cpu{cpu}/topology/thread_siblings_list").read_text().strip().split(","):
            first, _, last = part.partition("-")
            found |= set(range(int(first), int(last or first) + 1))
    return found


@contextmanager
def started_on(cpu: int | None) -> Iterator[None]:
    """This thread, and what it starts, on a CPU while in the context; None: where it may be anyway."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, allowed if cpu is None else {cpu})
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


# ---- CPU time ----


@dataclass(frozen=True)
class Used:
    """Seconds of CPU time of a lab's load balancer, and of all else of it; ``program``: of the first, its processes'.

    ``whole_balancer`` and ``whole_endpoints``: that their CPUs were busy, with whatever; ``elapsed``: that passed.
    """

    balancer: float = 0.0
    program: float = 0.0
    endpoints: float = 0.0
    whole_balancer: float = 0.0
    whole_endpoints: float = 0.0
    elapsed: float = 0.0

    def __sub__(self, other: Used) -> Used:
        return Used(*(mine - its for mine, its in zip(astuple(self), astuple(other), strict=True)))


def not_busy(stat: str, cpu: int) -> float:
    """Seconds that a CPU was idle, or taken by the hypervisor, by the text of ``/proc/stat`` (proc_stat(5)).

    In hundredths of a second; but they are measured (without CONFIG_HZ_PERIODIC), where a tick adds a whole one of the
    other columns' to whatever it meets.
    """
    for line in stat.splitlines():
        name, *fields = line.split()
        if name == f"cpu{cpu}":
            idle, iowait, steal = (int(fields[column]) for column in (3, 4, 7))
            return (idle + iowait + steal) / TICKS
    raise Unavailable(f"{STAT} does not have CPU {cpu}")


def run_time(threads: Sequence[int]) -> float:
    """Seconds that threads have run, and interrupts while they ran (proc_pid_schedstat(5))."""
    return sum(int(Path(f"/proc/{thread}/schedstat").read_text().split()[0]) for thread in threads) / 1e9


# ---- where threads and interfaces work ----


def tasks(node: Node) -> list[int]:
    """The threads of a node's processes."""
    found: list[int] = []
    for process in node.processes():
        with suppress(OSError):  # it has ended
            found += [int(thread) for thread in os.listdir(f"/proc/{process}/task")]
    return found


def pollers(node: Node, interface: str = "eth0") -> list[int]:
    """The threads that poll an interface; 0 in place of each that is not there, and nothing if it is not polled.

    Raises :class:`Unavailable` if the kernel does not tell.
    """
    try:
        with inside(node.path), Netlink(NETLINK_GENERIC) as netlink:
            which = encode({NAPI_IFINDEX: struct.pack("=I", socket.if_nametoindex(interface))})
            found = netlink.dump(netlink.family("netdev"), GENERIC.pack(NAPI_GET, 1) + which)
    except OSError as error:
        raise Unavailable(f"the kernel does not say what polls {interface}; Linux 6.8 does: {error.strerror}") from None
    return [number(napi.attributes(GENERIC).get(NAPI_PID)) for napi in found]


def tell(node: Node, place: str, value: str) -> None:
    """Write into a file of an interface in /sys, of which each network namespace has its own.

    Raises :class:`Unavailable` if the kernel refuses, or has no such file.
    """
    path = f"/sys/class/net/{place}"
    command = ["ip", "netns", "exec", node.netns, "tee", path]
    done = subprocess.run(command, input=value, text=True, capture_output=True, check=False)
    if done.returncode:
        raise Unavailable(f"{path} in {node.netns}: {done.stderr.strip()}")


def receive_on(node: Node, interface: str, cpu: int) -> list[int]:
    """Have an interface's packets received on a CPU; returns the kernel's threads that poll it, if it polls.

    Raises :class:`Unavailable` if the kernel does not do that.
    """
    if pollers(node, interface):
        tell(node, f"{interface}/threaded", "1")
    threads = pollers(node, interface)
    if not all(threads):
        raise Unavailable(f"{interface} of {node.netns} is polled, but not by threads")
    for thread in threads:
        os.sched_setaffinity(thread, {cpu})
    # One interface may have both: a veth's end does not poll for what its other end sends with segmentation offload.
    tell(node, f"{interface}/queues/rx-0/rps_cpus", mask(cpu))
    return threads


def mask(cpu: int) -> str:
    """A CPU as /sys takes it: hexadecimal, in groups of 32 bits."""
    words = [0] * (cpu // 32 + 1)
    words[-1] = 1 << cpu % 32
    return ",".join(f"{word:08x}" for word in reversed(words))


def stays(threads: Sequence[int], cpu: int, where: str) -> None:
    """Raises :class:`Unavailable` for a thread that may leave a CPU."""
    for thread in threads:
        with suppress(ProcessLookupError):  # it has ended
            allowed = os.sched_getaffinity(thread)
            if allowed != {cpu}:
                raise Unavailable(f"thread {thread} of {where} may be on CPU {min(allowed - {cpu})}, not {cpu} alone")


class Where:
    """Counts packets of TCP over IPv4 at interfaces, by CPU (``tools/where.bpf.c``).  A context manager."""

    def __init__(self, context: Context) -> None:
        self._object = bpf.Object(context.bpf("where"))
        self._filters: list[tuple[Node, bpf.TcFilter]] = []

    def attach(self, node: Node, interface: str, *directions: Literal["ingress", "egress"]) -> None:
        with inside(node.path):
            for direction in directions:
                hook, _ = bpf.attach_tc(self._object.program("where"), socket.if_nametoindex(interface), direction)
                self._filters.append((node, hook))

    def counts(self) -> dict[int, int]:
        """Packets by CPU."""
        each = self._object.map("packets").lookup_percpu(0)
        return {cpu: int.from_bytes(value, "little") for cpu, value in enumerate(each)}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, where: TracebackType | None
    ) -> None:
        for node, hook in self._filters:
            with inside(node.path):
                hook.destroy_hook()
        self._object.close()


def strays(what: str, counts: dict[int, int], cpu: int) -> str:
    """Why packets are not where they are to be; empty: they are."""
    everywhere = sum(counts.values())
    elsewhere = everywhere - counts.get(cpu, 0)
    return f"{elsewhere} of {everywhere} packets {what} were not on CPU {cpu}" if elsewhere > STRAY * everywhere else ""


class Placement:
    """A lab whose load balancers are to work on a CPU of their own.

    The processes are there already, each started on its CPU (:func:`started_on`).
    """

    def __init__(self, context: Context, lab: Lab, cpus: Cpus, balancers: Iterable[Node]) -> None:
        self.context, self.lab, self.cpus = context, lab, cpus
        self.balancers = {node.name for node in balancers}
        self._polling: dict[str, list[int]] = {}  # by load balancer's name
        self._bridge: list[int] = []

    def place(self, node: Node) -> None:
        """What a load balancer receives is its CPU's, and what it sends is the endpoints'.

        Raises :class:`Unavailable` if the kernel does not do that.
        """
        if node.name not in self._polling:
            self._bridge += receive_on(self.lab.middle, node.name, self.cpus.endpoints)
            self._polling[node.name] = receive_on(node, "eth0", self.cpus.balancer)

    def check(self, by: Node | None, load: Callable[[], object]) -> None:
        """Raises :class:`Unavailable` if something works on another CPU than it is to while there is ``load`` on a way.

        All packets of a lab come by the bridge's ports, where each is counted: what is received there has been sent on
        the same CPU, or taken from another.  Of the load balancer's own interface those are counted that the kernel
        has; what an XDP program takes it takes in the thread that polls.
        """
        cpus = self.cpus
        for node in self.lab.nodes.values():
            if node.name not in self.balancers:
                stays(tasks(node), cpus.endpoints, node.netns)
        stays(self._bridge, cpus.endpoints, "the bridge")
        if by:
            stays([*tasks(by), *self.polling(by)], cpus.balancer, by.netns)
        before = run_time(self.polling(by))
        with Where(self.context) as bridge, Where(self.context) as own:
            for name in self.lab.nodes:
                if name != self.lab.middle.name:
                    bridge.attach(self.lab.middle, name, "ingress")
            if by:
                own.attach(by, "eth0", "ingress", "egress")
            load()
            passed, had = bridge.counts(), own.counts()
        reasons = [strays("on the bridge", passed, cpus.endpoints), strays("of the load balancer", had, cpus.balancer)]
        if not sum(passed.values()):
            reasons.append("no packet was seen on the bridge")
        if by and not sum(had.values()) and run_time(self.polling(by)) == before:
            reasons.append("the load balancer had no packet")
        if any(reasons):
            raise Unavailable("; ".join(filter(None, reasons)))

    def polling(self, by: Node | None) -> list[int]:
        """The kernel's threads that poll for a load balancer; None: those that poll for the bridge."""
        return self._polling[by.name] if by else self._bridge

    def whole(self) -> Used:
        """That the CPUs were busy, until now."""
        stat, now = STAT.read_text(), time.monotonic()
        return Used(
            whole_balancer=now - not_busy(stat, self.cpus.balancer),
            whole_endpoints=now - not_busy(stat, self.cpus.endpoints),
            elapsed=now,
        )

    def at_rest(self, seconds: float) -> Used:
        """CPU time of a second in which nothing is asked of anybody."""
        before = self.whole()
        time.sleep(seconds)
        found = self.whole() - before
        return Used(
            whole_balancer=found.whole_balancer / found.elapsed,
            whole_endpoints=found.whole_endpoints / found.elapsed,
            elapsed=1.0,
        )

    @contextmanager
    def accounts(self) -> Iterator[Accounts]:
        """Accounts that are kept while in the context: of each softirq they take some 0.2 us.

        Raises :class:`Unavailable` if the kernel does not take the programs that keep them.
        """
        try:
            with bpf.Object(self.context.bpf("softirq")) as softirq, ExitStack() as stack:
                known = softirq.map("known")
                for node in self.lab.nodes.values():
                    known.update(os.stat(node.cgroup).st_ino, 1)
                for thread in (*self._bridge, *itertools.chain(*self._polling.values())):
                    known.update(THREAD | thread, 1)
                for name in ("leave", "entry"):
                    stack.enter_context(softirq.program(name).attach_tracepoint())
                yield Accounts(self, softirq.map("softirqs"))
        except bpf.BpfError as error:
            raise Unavailable(f"softirqs cannot be told apart: {error}") from None


class Accounts:
    """CPU time by whose it is: of processes by their cgroups, of the kernel's threads that poll, and of softirqs that
    interrupt none of these.

    The scheduler keeps the first two in nanoseconds, and charges a softirq to whom it interrupts.  What nobody has:
    interrupts themselves, entering and leaving idle, and the kernel's other threads, its work queues' for example.
    """

    def __init__(self, placement: Placement, softirqs: bpf.Map) -> None:
        self._placement, self._softirqs = placement, softirqs

    def used(self, by: Node | None) -> Used:
        """Until now, on a way by this load balancer."""
        placement, cpus = self._placement, self._placement.cpus
        nobodys = [int.from_bytes(value[8:16], "little") / 1e9 for value in self._softirqs.lookup_percpu(0)]
        program, polling = (usage(by), run_time(placement.polling(by))) if by else (0.0, 0.0)
        others = (node for node in placement.lab.nodes.values() if node.name not in placement.balancers)
        return replace(
            placement.whole(),
            balancer=program + polling + nobodys[cpus.balancer],
            program=program,
            endpoints=sum(map(usage, others)) + run_time(placement.polling(None)) + nobodys[cpus.endpoints],
        )


def usage(node: Node) -> float:
    """Seconds that a node's processes have run, those that have ended too (cgroup-v2.rst, cpu.stat)."""
    return int(dict(line.split() for line in (node.cgroup / "cpu.stat").read_text().splitlines())["usage_usec"]) / 1e6
