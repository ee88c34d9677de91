"""crablb beside what else people use: connections, latency, goodput, and what the load balancer has of them."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from math import inf
from pathlib import Path

from bench.context import Context, Unavailable, one_cpu
from bench.figures import Curve, Plot, Row, Suite, Table, Target
from bench.lab import ECHO, HTTP, WAYS, Peers
from bench.placement import APART, Placement, Used, two_cpus
from crablb.kernel import bpf
from crablb.lab.demo import status

#: Rows by figure and way.
Found = Mapping[str, Mapping[str, Row]]

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
#: Of the layout in which the load balancer has a CPU of its own: key, title, unit, baseline.
COSTS = {
    "balancer": ("peers-cost-connection", "CPU time of a new connection: the load balancer's", "us", ""),
    "endpoints": ("peers-cost-connection-ends", "The same: of clients, servers and the bridge", "us", "direct"),
    "balancer GiB": ("peers-cost-gib", "CPU time of a GiB downloaded: the load balancer's", "ms", ""),
    "endpoints GiB": ("peers-cost-gib-ends", "The same: of clients, servers and the bridge", "ms", "direct"),
}
#: What of a figure is as good as nothing: softirqs and packets of others, or of ARP; of figures that are only remarked
#: on, any.
LEAST = {f"{one.name}{kind}": inf for one in fields(Used) for kind in ("", " GiB")} | {
    "balancer": 4.0, "balancer GiB": 40.0, "endpoints": 0.0, "endpoints GiB": 0.0, "packets": 100.0,
}  # fmt: skip
#: What of its CPU's whole time the load balancer's may be; the rest is interrupts and entering and leaving idle.
ACCOUNTED = (0.5, 1.1)
#: A CPU that is busier at rest is also others': its whole time says nothing.
QUIET = 0.05
#: Ways without a load balancer.
DIRECT = ("direct", "MPTCP, direct")
NOTE = (
    "Everything is measured in two layouts. In the first, all of it shares one CPU: client, load balancer, server and "
    "the kernel's work for them. So a rate is what all of them cost together, and a time is without the wake-up of "
    "another CPU, which costs more here than all else. It leaves out that in life the load balancer's work is no "
    "client's and no server's, and that it goes on beside theirs. "
    "Clients leave checksums to their veth, but for DSR's: its packets come as a network would bring them. MPTCP's "
    "client is a stock one with a limit raised (`crablb agent client --mptcp`), its programs and nginx unmodified "
    "(mptcpize); what MPTCP itself costs is seen without a load balancer, and the remark says what crablb adds to it."
)
NOTE_APART = (
    f"In the second, {APART} (CPU {{balancer}}: its program, its interface's packets), and clients, servers and the "
    "bridge between all on another (CPU {endpoints}), which is busy all the time while rates are measured: so a rate "
    "is what they cost, and what the load balancer costs is told by itself. Where packets are worked on was counted "
    "before, and a way that was not where it is to be is left out. It leaves out network cards: an interrupt of the "
    "other CPU, which wakes it if it is idle, stands for a card's on the way to the load balancer and on the way from "
    "it, where a direct way has none; segments are not cut to a network's size, which spares HAProxy, nginx and DNAT "
    "most of what packets cost; and clients and servers are not apart."
)
NOTE_COST = (
    "CPU time is that of a load of its own. It is what the scheduler says that processes ran (of clients and servers "
    "those that start and end with the load, too, some 10 ms), and the kernel's threads that poll interfaces; and what "
    "network softirqs took that interrupted none of these, on an idle CPU for example. The interrupts themselves, "
    "entering and leaving idle, and work queues (MPTCP's) are not in it. Softirqs of others that use the machine are: "
    "what a direct way has at the load balancer is theirs. "
)


def run(context: Context) -> Suite:
    suite = Suite("peers", "Beside other load balancers", notes=[NOTE])
    rounds = context.pick(5, 2, 1)
    size = context.pick(BIG, BIG // 4, BIG // 64)
    with one_cpu(), tempfile.TemporaryDirectory() as folder, Peers(context, Path(folder)) as peers:
        suite.left_out += [f"{name}: {reason}" for name, reason in peers.left_out.items()]
        needed(peers)
        big = peers.big(size)
        subjects = {name: subject(context, peers, name, big) for name in WAYS if name in peers.ways}
        found = context.in_turn("peers", subjects, rounds, least=LEAST)
        programs = bpf_time(context, peers)
        p6 = zero(peers, big)
        share = generator(context, peers)
    apart: Found = {}
    try:
        apart = measured_apart(context, suite, size, rounds)
    except Unavailable as reason:
        suite.left_out.append(f"{APART}: {reason}")
    suite.tables = [*tables(found, apart), *costs(apart), programs]
    if "balancer GiB" in apart:
        p6.value += "; " + of_a_gib(apart["balancer GiB"])
    suite.targets = [*targets(found, programs, apart), p6]
    suite.notes.append(share)
    suite.plots = plots(found, apart)
    return suite


def needed(peers: Peers) -> None:
    """Raises :class:`Unavailable` without the ways that the others are compared with."""
    for name in ("direct", "crablb, redirect"):
        if name not in peers.ways:
            raise Unavailable(f"{name}: {peers.left_out[name]}")


def measured_apart(context: Context, suite: Suite, size: int, rounds: int) -> Found:
    """The same with the load balancer on a CPU of its own, and what it takes of that.

    Raises :class:`Unavailable` where that cannot be.
    """
    with two_cpus() as cpus, tempfile.TemporaryDirectory() as folder, Peers(context, Path(folder), cpus=cpus) as peers:
        suite.left_out += [f"{name}, {APART}: {reason}" for name, reason in peers.left_out.items()]
        needed(peers)
        assert peers.placement
        counted: Placement | None = peers.placement
        try:
            with peers.placement.accounts():
                pass
        except Unavailable as reason:
            counted = None
            suite.left_out.append(f"CPU time, {APART}: {reason}")
        rest = peers.placement.at_rest(context.pick(2.0, 0.5, 0.1))
        big = peers.big(size)
        subjects = {name: subject(context, peers, name, big, counted) for name in WAYS if name in peers.ways}
        found = context.in_turn("peers, apart", subjects, rounds, least=LEAST)
    shared = " The two are threads of one core, which they share." if cpus.one_core else ""
    suite.notes.append(NOTE_APART.format(balancer=cpus.balancer, endpoints=cpus.endpoints) + shared)
    if "balancer" in found:
        suite.notes.append(NOTE_COST + beside_whole(found, rest))
    return found


def subject(
    context: Context, peers: Peers, name: str, big: int, counted: Placement | None = None
) -> Callable[[], Mapping[str, float]]:
    """``counted``: where CPU time is to be told, too."""
    seconds = str(context.pick(1.5, 0.5, 0.5))
    # Few enough that the client's closed connections, which wait for a minute, do not use up its ports.
    samples = str(context.pick(4000, 1000, 100))
    by = peers.ways[name].by

    def connect(warmup: str = "0.1") -> dict[str, float]:
        options = ["--connections", str(CONNECTIONS), "--seconds", seconds, "--warmup", warmup]
        return peers.crr(name, "--get", "/8", *options, port=HTTP)

    def cost(placement: Placement) -> dict[str, float]:
        figures: dict[str, float] = {}

        def add(used: Used, per: float, kind: str) -> None:
            figures.update({f"{what}{kind}": seconds * per for what, seconds in asdict(used).items()})

        with placement.accounts() as accounts:
            start = accounts.used(by)
            count = connect("0")["count"]  # without a warm-up: each counts
            made = accounts.used(by)
            peers.download(name)
            moved = accounts.used(by)
        add(made - start, 1e6 / count, "")
        add(moved - made, 1e3 * (1 << 30) / big, " GiB")
        return figures

    def measure() -> Mapping[str, float]:
        made = connect()
        setup = peers.crr(name, "--samples", samples, "--seconds", "20", "--warmup", "0.05", port=ECHO)
        rr = peers.crr(name, "--mode", "rr", "--seconds", seconds, "--warmup", "0.05", port=ECHO)
        figures = {"connections": made["rate"]}
        if not peers.placement:  # there is one CPU, and it is never idle meanwhile
            figures["cpu"] = 1e6 / made["rate"]
        figures |= {f"setup {q}": setup[q] for q in ("p50", "p99", "p999")}
        figures |= {f"rr {q}": rr[q] for q in ("p50", "p99", "p999")}
        if context.size != "quick":  # wrk takes a second at the least
            figures["requests"] = peers.wrk(name, "/8", 1, CONNECTIONS, close=False)
        before = by.counters()["rx_packets"] if by else 0
        figures["goodput"] = peers.download(name) / 1e6
        figures["packets"] = ((by.counters()["rx_packets"] if by else 0) - before) * (1 << 30) / big
        return figures | (cost(counted) if counted else {})

    return measure


def tables(found: Found, apart: Found) -> list[Table]:
    """Both layouts, figure by figure, one after the other."""
    made = []
    for figure in TABLES:
        if figure in found:
            made.append(table(found[figure], figure))
        if figure in apart:
            made.append(table(apart[figure], figure, apart=True))
    return made


def table(rows: Mapping[str, Row], figure: str, *, apart: bool = False) -> Table:
    key, title, unit, better = TABLES[figure]
    if apart:
        key, title = key.replace("peers-", "peers-apart-"), f"{title}; {APART}"
    if figure != "packets" and {"MPTCP, direct", "crablb, MPTCP"} <= rows.keys():
        rows["crablb, MPTCP"].note = f"{ratio(rows, 'crablb, MPTCP', 'MPTCP, direct'):.2f} of MPTCP, direct"
    return Table(key, title, unit, list(rows.values()), better, "" if figure == "packets" else "direct")  # type: ignore[arg-type]


def costs(apart: Found) -> list[Table]:
    """What the load balancer takes, and what the others do."""
    made = []
    for figure, (key, title, unit, baseline) in COSTS.items():
        if figure not in apart:
            continue
        rows = apart[figure]
        if figure.startswith("balancer"):
            for name, row in rows.items():
                if name not in DIRECT:
                    program = apart[figure.replace("balancer", "program")][name]
                    row.note = f"{program.median:.1f} of it in its program"
        made.append(Table(key, title, unit, list(rows.values()), "lower", baseline))
    return made


def beside_whole(apart: Found, rest: Used) -> str:
    """The time that was accounted for beside all that the load balancer's CPU was busy, and whether they agree."""
    if rest.whole_balancer > QUIET:
        return (
            f"How much of its CPU's whole time the load balancer's is could not be told: that was busy at rest, too "
            f"({rest.whole_balancer:.0%})."
        )
    shares = {
        name: row.median / whole
        for name, row in apart["balancer"].items()
        if name not in DIRECT
        and (whole := apart["whole_balancer"][name].median - rest.whole_balancer * apart["elapsed"][name].median) > 0
    }
    low, high = ACCOUNTED
    odd = [f"{name} {share:.2f}" for name, share in shares.items() if not low <= share <= high]
    said = (
        "Of what the load balancer's CPU was busy in all while connections were made, less what it is at rest, it is "
    )
    said += ", ".join(f"{name} {share:.2f}" for name, share in shares.items()) + "."
    return said + (f" That is more than interrupts and idling explain: {', '.join(odd)}." if odd else "")


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


def targets(found: Found, programs: Table, apart: Found) -> list[Target]:
    """``apart``: figures of the layout in which the load balancer has a CPU of its own; empty: not measured."""
    return [p3(found, programs, apart), p4(found, programs, apart)]


OURS, DSR = "crablb, redirect", "crablb, DSR"
#: New connections, of direct: at least.
RATE, RATE_APART = 0.80, 0.93
#: A request's time, of direct: at most.
TIME = 1.04
#: Of the endpoints' CPU: what is less was not all that they could do.
FULL = 0.9
NOT_APART = f"{APART}: not measured"


def run_time(programs: Table) -> float:
    """Of the endpoints' BPF programs, of a redirected connection, in us."""
    ours = (row for row in programs.rows if row.name.startswith(f"{OURS}: ") and not row.name.endswith(" crab_lb"))
    return sum(row.median for row in ours)


def beside(made: Mapping[str, Row]) -> tuple[float, float, str]:
    """crablb's rate and the best of its rivals', of direct, and both as text."""
    rate = ratio(made, OURS)
    rivals = {name: ratio(made, name) for name in ("nftables DNAT", "nginx stream", "HAProxy") if name in made}
    listed = ", ".join(f"{name} {value:.2f}" for name, value in rivals.items())
    return rate, max(rivals.values(), default=0.0), f"{rate:.2f} of direct ({listed})"


def p3(found: Found, programs: Table, apart: Found) -> Target:
    rate, best, text = beside(found["connections"])
    ran = run_time(programs)
    values, why = [f"on one CPU {text}"], []
    if rate < RATE or rate <= best:
        cpu = {name: row.median for name, row in found["cpu"].items()}
        reason = (
            f"on one CPU a connection takes {cpu['direct']:.0f} us direct, {cpu[OURS] - cpu['direct']:.0f} us more "
            f"redirected: {ran:.0f} us in the BPF programs of both endpoints, the rest for the load balancer's turn on "
            "the same CPU (wake-up, system calls, two more hops of the SYN)"
        )
        if "XDP redirect" in cpu:
            reason += f"; with the redirect in the kernel {cpu['XDP redirect'] - cpu['direct']:.0f} us"
        why.append(reason)
    if not apart:
        return Target("P3", "; ".join([*values, NOT_APART]), verdict(why, apart), "; ".join(why))
    rate, _, text = beside(apart["connections"])
    values.append(f"{APART} {text}")
    if rate < RATE_APART:
        reason = f"{APART}, {ran:.0f} us of a connection's BPF programs are the endpoints' still"
        if "endpoints" in apart:
            ends = {name: row.median for name, row in apart["endpoints"].items()}
            reason = (
                f"{APART}, a connection takes {ends['direct']:.0f} us of the clients' and servers' CPU direct, "
                f"{ends[OURS] - ends['direct']:.0f} us more redirected: {ran:.0f} us in BPF programs, the rest to send "
                "its SYN to another CPU and have it from there, where a direct one has no such hop; the load "
                f"balancer's own {apart['balancer'][OURS].median:.0f} us are not among them"
            )
            used = apart["connections"][OURS].median * ends[OURS] / 1e6
            if used < FULL:
                reason += (
                    f"; these take {used:.0%} of that CPU, so connections also waited for the load balancer's turn"
                )
        why.append(reason)
    return Target("P3", "; ".join(values), verdict(why, apart), "; ".join(why))


def verdict(why: Sequence[str], apart: Found) -> bool | None:
    """Reached only if both layouts say so."""
    return False if why else True if apart else None


def p4(found: Found, programs: Table, apart: Found) -> Target:
    values, why = [], []
    slow = False
    for where, figures in (("on one CPU", found), (APART, apart)):
        if not figures:
            values.append(NOT_APART)
            continue
        p50, p99 = ratio(figures["rr p50"], OURS), ratio(figures["rr p99"], OURS)
        slow |= p50 > TIME or p99 > TIME
        values.append(f"{where} p50 {p50:.2f}, p99 {p99:.2f} of direct; {added(figures)[2]}")
    if slow:
        why.append("the client translates every packet: about 0.35 us in each direction")
    ours, dsr, _ = added(apart) if apart else (0.0, 0.0, "")
    if ours > dsr / 2 > 0:
        why.append(
            f"{APART}, a SYN waits for two wake-ups of another CPU, the load balancer's and then the server's, beside "
            f"{run_time(programs):.0f} us of BPF programs; DSR's waits for as many, and each packet after it, but a "
            "client waits for few of those"
        )
    return Target("P4", "; ".join(values), verdict(why, apart), "; ".join(why))


def added(figures: Found) -> tuple[float, float, str]:
    """What redirection and DSR (0: not there) add to the median of a connection's set-up, in us, and both as text."""
    setup = {name: row.median for name, row in figures["setup p50"].items()}
    ours = setup[OURS] - setup["direct"]
    if DSR not in setup:
        return ours, 0.0, f"set-up adds {ours:.0f} us"
    dsr = setup[DSR] - setup["direct"]
    return ours, dsr, f"set-up adds {ours:.0f} us, DSR {dsr:.0f} us"


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


def of_a_gib(rows: Mapping[str, Row]) -> str:
    return f"{APART}, {rows[OURS].median:.1f} ms of it for a GiB where a direct way has {rows['direct'].median:.1f}"


def generator(context: Context, peers: Peers) -> str:
    """How much of a direct connection's time is the generator's own."""
    found = peers.crr("direct", "--get", "/8", "--connections", str(CONNECTIONS), "--seconds", "0.3", port=HTTP)
    share = found["cpu"] / (found["seconds"] or 1)
    return (
        f"The generator (crr) takes {share:.0%} of the CPU in the direct case, its system calls included. It does the "
        "same for every way and the CPU is never idle, so it limits none more than another."
    )


def plots(found: Found, apart: Found) -> list[Plot]:
    names = [
        name.replace(", ", ",\n").replace(" ", "\n", 1) if len(name) > 8 else name for name in found["connections"]
    ]

    def bars(figures: Found, figure: str, name: str) -> list[Curve]:
        """At the places of the ways that there are in the first layout."""
        at = [(float(i), way) for i, way in enumerate(found["connections"]) if way in figures.get(figure, {})]
        return [Curve.of(name, [figures[figure][way] for _, way in at], [i for i, _ in at])] if at else []

    def latencies(figures: Found) -> list[Curve]:
        return [
            *bars(figures, "rr p50", "established, p50"),
            *bars(figures, "rr p99", "established, p99"),
            *bars(figures, "setup p50", "new connection, p50"),
        ]

    made = [
        Plot("peers-connections", "New connections a second", "", "1/s",
             [*bars(found, "connections", "all on one CPU"), *bars(apart, "connections", APART)], "bars", names),
        Plot("peers-latency", "8 bytes there and back, all on one CPU", "", "us", latencies(found), "bars", names),
    ]  # fmt: skip
    if apart:
        made += [
            Plot("peers-apart-latency", f"8 bytes there and back, {APART}", "", "us", latencies(apart), "bars", names),
            Plot("peers-cost", "CPU time of a new connection", "", "us",
                 [*bars(apart, "balancer", "load balancer"),
                  *bars(apart, "endpoints", "clients, servers and the bridge")], "bars", names),
            Plot("peers-cost-gib", "CPU time of a GiB downloaded", "", "ms",
                 [*bars(apart, "balancer GiB", "load balancer"),
                  *bars(apart, "endpoints GiB", "clients, servers and the bridge")], "bars", names),
        ]  # fmt: skip
    return made
