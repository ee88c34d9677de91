"""crablb beside what else people use: connections, latency, goodput, and what the load balancer has of them."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

from bench.context import Context, Unavailable, one_cpu
from bench.figures import Curve, Plot, Row, Suite, Table, Target
from bench.lab import ECHO, HTTP, WAYS, Peers
from crablb.kernel import bpf
from crablb.lab.demo import status

BIG = 256 << 20
CONNECTIONS = 16
#: Key, title, unit, better.
TABLES = {
    "connections": ("peers-connections", "New connections: connect, GET of 8 bytes from nginx, close", "1/s", "higher"),
    "cpu": ("peers-cpu", "CPU time of a new connection, of all that takes part in it", "us", "lower"),
    "setup p50": ("peers-setup-p50", "Connect, send 8 bytes, have them back, close; one at a time: p50", "us", "lower"),
    "setup p99": ("peers-setup-p99", "The same: p99", "us", "lower"),
    "setup p999": ("peers-setup-p999", "The same: p99.9", "us", "lower"),
    "rr p50": ("peers-latency-p50", "8 bytes there and back on an established connection: p50", "us", "lower"),
    "rr p99": ("peers-latency-p99", "The same: p99", "us", "lower"),
    "rr p999": ("peers-latency-p999", "The same: p99.9", "us", "lower"),
    "requests": ("peers-requests", "Requests on connections that stay (wrk, nginx, 8 bytes)", "1/s", "higher"),
    "goodput": ("peers-goodput", "Download of 256 MiB (curl, nginx)", "MB/s", "higher"),
    "packets": ("peers-packets", "Packets that the load balancer receives for a GiB", "packets", "lower"),
}
NOTE = (
    "All of it shares one CPU: client, load balancer, server and the kernel's work for them. So a rate is what all of "
    "them cost together, and a time is without the wake-up of another CPU, which costs more here than all else. "
    "Clients leave checksums to their veth, but for DSR's: its packets come as a network would bring them. MPTCP's "
    "client is a stock one with a limit raised (`crablb agent client --mptcp`), its programs and nginx unmodified "
    "(mptcpize); what MPTCP itself costs is seen without a load balancer, and the remark says what crablb adds to it."
)


def run(context: Context) -> Suite:
    suite = Suite("peers", "Beside other load balancers", notes=[NOTE])
    rounds = context.pick(5, 2, 1)
    with one_cpu(), tempfile.TemporaryDirectory() as folder, Peers(context, Path(folder)) as peers:
        suite.left_out += [f"{name}: {reason}" for name, reason in peers.left_out.items()]
        for name in ("direct", "crablb, redirect"):
            if name not in peers.ways:
                raise Unavailable(f"{name}: {peers.left_out[name]}")
        big = peers.big(context.pick(BIG, BIG // 4, BIG // 64))
        subjects = {name: subject(context, peers, name, big) for name in WAYS if name in peers.ways}
        found = context.in_turn("peers", subjects, rounds)
        suite.tables = [table(found[figure], figure) for figure in TABLES if figure in found]
        programs = bpf_time(context, peers)
        suite.tables.append(programs)
        suite.targets = [*targets(found, programs), zero(peers, big)]
        suite.notes.append(generator(context, peers))
    suite.plots = plots(found)
    return suite


def subject(context: Context, peers: Peers, name: str, big: int) -> Callable[[], Mapping[str, float]]:
    seconds = str(context.pick(1.5, 0.5, 0.5))
    # Few enough that the client's closed connections, which wait for a minute, do not use up its ports.
    samples = str(context.pick(4000, 1000, 100))

    def measure() -> Mapping[str, float]:
        made = peers.crr(
            name, "--get", "/8", "--connections", str(CONNECTIONS), "--seconds", seconds, "--warmup", "0.1", port=HTTP
        )
        setup = peers.crr(name, "--samples", samples, "--seconds", "20", "--warmup", "0.05", port=ECHO)
        rr = peers.crr(name, "--mode", "rr", "--seconds", seconds, "--warmup", "0.05", port=ECHO)
        figures = {"connections": made["rate"], "cpu": 1e6 / made["rate"]}
        figures |= {f"setup {q}": setup[q] for q in ("p50", "p99", "p999")}
        figures |= {f"rr {q}": rr[q] for q in ("p50", "p99", "p999")}
        if context.size != "quick":  # wrk takes a second at the least
            figures["requests"] = peers.wrk(name, "/8", 1, CONNECTIONS, close=False)
        by = peers.ways[name].by
        before = by.counters()["rx_packets"] if by else 0
        figures["goodput"] = peers.download(name) / 1e6
        figures["packets"] = ((by.counters()["rx_packets"] if by else 0) - before) * (1 << 30) / big
        return figures

    return measure


def table(rows: Mapping[str, Row], figure: str) -> Table:
    key, title, unit, better = TABLES[figure]
    if figure != "packets" and {"MPTCP, direct", "crablb, MPTCP"} <= rows.keys():
        rows["crablb, MPTCP"].note = f"{ratio(rows, 'crablb, MPTCP', 'MPTCP, direct'):.2f} of MPTCP, direct"
    return Table(key, title, unit, list(rows.values()), better, "" if figure == "packets" else "direct")  # type: ignore[arg-type]


STATS = Path("/proc/sys/kernel/bpf_stats_enabled")
#: Ways on which BPF programs run for each connection.
PROGRAMMED = ("crablb, redirect", "crablb, DSR", "XDP redirect")


def bpf_time(context: Context, peers: Peers) -> Table:
    """What BPF programs take of a new connection, by the kernel's own count."""

    def run_times() -> tuple[Counter[str], Counter[str]]:
        """Nanoseconds that each of the lab's has run, and how often."""
        ns: Counter[str] = Counter()
        runs: Counter[str] = Counter()
        for program in bpf.programs():
            with program:
                if program.id not in own:
                    continue
                took, ran = program.run_time()
                ns[program.name] += took
                runs[program.name] += ran
        return ns, runs

    table = Table(
        "peers-bpf", "Run time of the BPF programs, of a new connection", "us",
        note="By kernel.bpf_stats_enabled, whose own readings of the clock are in it.",
    )  # fmt: skip
    own = peers.programs()
    was = STATS.read_text()
    STATS.write_text("1")
    try:
        for name in PROGRAMMED:
            if name not in peers.ways:
                continue
            ns, runs = run_times()
            # Without a warm-up: each connection counts.
            made = peers.crr(
                name, "--get", "/8", "--connections", str(CONNECTIONS), "--warmup", "0", "--seconds",
                str(context.pick(2, 0.5, 0.3)), port=HTTP,
            )["count"]  # fmt: skip
            ns_now, runs_now = run_times()
            for program, took in sorted((ns_now - ns).items()):
                # What ran less than once a connection ran for others': the last of the way before may end only now.
                if program.startswith(("crab_", "redirect")) and runs_now[program] - runs[program] >= made:
                    table.rows.append(Row(f"{name}: {program}", [took / made / 1e3]))
    finally:
        STATS.write_text(was)
    return table


def ratio(rows: Mapping[str, Row], name: str, base: str = "direct") -> float:
    return rows[name].over(rows[base])


def targets(found: Mapping[str, Mapping[str, Row]], programs: Table) -> list[Target]:
    ours, dsr = "crablb, redirect", "crablb, DSR"
    made = found["connections"]
    rate = ratio(made, ours)
    ran = sum(row.median for row in programs.rows if row.name.startswith(f"{ours}: "))
    rivals = {name: ratio(made, name) for name in ("nftables DNAT", "nginx stream", "HAProxy") if name in made}
    beside = ", ".join(f"{name} {value:.2f}" for name, value in rivals.items())
    p3 = Target("P3", f"{rate:.2f} of direct ({beside})", rate >= 0.95 and rate > max(rivals.values(), default=0))
    if not p3.reached:
        cpu = {name: row.median for name, row in found["cpu"].items()}
        p3.why = (
            f"a connection takes {cpu['direct']:.0f} us of the CPU direct, {cpu[ours] - cpu['direct']:.0f} us more "
            f"redirected: {ran:.0f} us in the BPF programs of both endpoints, the rest for the load balancer's turn on "
            "the same CPU (wake-up, system calls, two more hops of the SYN)"
        )
        if "XDP redirect" in cpu:
            p3.why += f"; with the redirect in the kernel {cpu['XDP redirect'] - cpu['direct']:.0f} us"
    p50, p99 = ratio(found["rr p50"], ours), ratio(found["rr p99"], ours)
    added = found["setup p50"][ours].median - found["setup p50"]["direct"].median
    value, held = f"p50 {p50:.2f}, p99 {p99:.2f} of direct; set-up adds {added:.0f} us", p50 <= 1.03 and p99 <= 1.03
    why = [] if held else ["the client translates every packet: about 0.35 us in each direction"]
    if dsr in found["setup p50"]:
        by_dsr = found["setup p50"][dsr].median - found["setup p50"]["direct"].median
        value += f", DSR {by_dsr:.0f} us"
        if added > by_dsr / 2:
            held = False
            why.append(
                f"the way through a process on the same CPU, and {ran:.0f} us of BPF programs at the endpoints; by DSR "
                "there are none of these"
            )
    return [p3, Target("P4", value, held, "; ".join(why))]


def zero(peers: Peers, big: int) -> Target:
    """What the load balancer has of bytes moved on a redirected connection, beside its SYN."""

    def packets() -> dict[str, int]:
        counted: dict[str, int] = status(peers.lab)["xdp"]
        return counted

    def cpu() -> float:
        """Milliseconds that the daemon's threads have run (proc_pid_schedstat(5))."""
        threads = Path(f"/proc/{peers.balancer.pid}/task").glob("*/schedstat")
        return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e6

    before, used = packets(), cpu()
    peers.download("crablb, redirect")
    used = cpu() - used
    more = {name: n - before[name] for name, n in packets().items()}
    others = more["other"] + more["flow"] + more["icmp"]
    value = f"{others} packets beside {more['syn']} SYN for {big >> 20} MiB; {used:.2f} ms of CPU, its timers included"
    return Target(
        "P6", value, others == 0 and used < 5, "" if others == 0 else "packets went through the load balancer"
    )


def generator(context: Context, peers: Peers) -> str:
    """How much of a direct connection's time is the generator's own."""
    found = peers.crr("direct", "--get", "/8", "--connections", str(CONNECTIONS), "--seconds", "0.3", port=HTTP)
    share = found["cpu"] / (found["seconds"] or 1)
    return (
        f"The generator (crr) takes {share:.0%} of the CPU in the direct case, its system calls included. It does the "
        "same for every way and the CPU is never idle, so it limits none more than another."
    )


def plots(found: Mapping[str, Mapping[str, Row]]) -> list[Plot]:
    def bars(figure: str, name: str) -> Curve:
        return Curve.of(name, list(found[figure].values()))

    names = [
        name.replace(", ", ",\n").replace(" ", "\n", 1) if len(name) > 8 else name for name in found["connections"]
    ]
    return [
        Plot("peers-connections", "New connections a second, on one CPU for everything", "", "1/s",
             [bars("connections", "connections")], "bars", names),
        Plot("peers-latency", "8 bytes there and back", "", "us",
             [bars("rr p50", "established, p50"), bars("rr p99", "established, p99"),
              bars("setup p50", "new connection, p50")], "bars", names),
    ]  # fmt: skip
