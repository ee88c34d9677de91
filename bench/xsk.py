"""AF_XDP: what the rings carry without work, what `crablb serve` carries over them, and what the daemon itself costs.

All over one veth (veth.py).  The floor is tools/xskraw.c: the same rings (native/xsk.c), driven in C, with no work on
the frames.
"""

from __future__ import annotations

import select
import subprocess
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path

from bench.context import Context, Unavailable
from bench.daemon import at_rest_and_start
from bench.figures import Curve, Plot, Row, Suite, Table, Target
from bench.redirect import Hop, Redirect
from bench.veth import (
    BACKEND_MACS,
    BACKENDS,
    LENGTH,
    NEAR,
    SERVE,
    VIP,
    World,
    affinity,
    daemon,
    two_cpus,
)  # fmt: skip
from crablb.kernel import bpf
from crablb.model import Vip

#: What the paper's figure 8 says, million SYN/s on one core.
PAPER = {"user space": 14.75, "XDP": 6.8, "netfilter": 1.5}
FLOOR = "raw l2fwd"
MORE_A_KICK = "raw l2fwd, 256 frames a kick"


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
    if ours >= 1:
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


def run(context: Context) -> Suite:
    suite = Suite("xsk", "AF_XDP, `crablb serve` and the daemon")
    cpus = two_cpus(context)
    with World(context) as world:
        throughput(world, suite)
        at_rest_and_start(world, suite)
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
