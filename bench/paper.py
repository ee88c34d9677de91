"""The paper's figures, as far as namespaces allow ("Bypassing the Load Balancer Without Regrets", SoCC 2020).

Figure 8 is in the suite ``xsk``.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bench.context import Context, Unavailable, one_cpu
from bench.farm import Farm, Way
from bench.figures import Curve, Plot, Row, Suite, Table, Target
from bench.lab import ECHO, HTTP, Peers
from bench.placement import APART, Cpus, two_cpus

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


def run(context: Context) -> Suite:
    suite = Suite("paper", "The paper's figures")
    suite.notes.append(
        "Of the paper's curves those points are drawn that its text tells. Its testbed: ten machines, 10 GbE, Xeon E5, "
        "Linux 4.19; all of ours is namespaces of one machine. Figure 8 is with AF_XDP, above."
    )
    for figures in (figure_4, figures_7_and_9, figure_10, figures_11_and_12):
        attempt(figures, context, suite)
    return suite


def attempt(figure: Callable[..., None], context: Context, suite: Suite, *more: Farm) -> None:
    """A figure, or the reason why there is none."""
    try:
        figure(context, suite, *more)
    except Unavailable as reason:
        suite.left_out.append(f"{figure.__name__.replace('_', ' ')}: {reason}")


# ---- figure 4: a simulation ----

CLIENTS = SERVERS = 16
LOADS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 1.0)


def response_times(arrivals: Floats, servers: Ints) -> Floats:
    """Times from arrival to the end of service, in service times, of requests in the order in which they arrive.

    ``arrivals``: shape (n,), ascending, in service times; ``servers``: shape (n,), who serves it.  Each server has one
    line, in order, and a request takes one.
    """
    times = np.empty_like(arrivals)
    for server in np.unique(servers):
        at = np.flatnonzero(servers == server)
        # The k-th ends 1 after the later of its arrival and the end before it, so
        # end(k) - k is the greatest arrival(j) - j of all until then, plus 1.
        turn = np.arange(len(at))
        times[at] = np.maximum.accumulate(arrivals[at] - turn) + turn + 1 - arrivals[at]
    return times


def by_chance(random: np.random.Generator, requests: int) -> Ints:
    return random.integers(SERVERS, size=requests)


def in_turn_by_client(random: np.random.Generator, requests: int) -> Ints:
    """Distributed round-robin: each client goes round by itself, and begins anywhere."""
    clients = random.integers(CLIENTS, size=requests)
    first = random.integers(SERVERS, size=CLIENTS)
    servers = np.empty(requests, np.int64)
    for client in range(CLIENTS):
        at = np.flatnonzero(clients == client)
        servers[at] = (first[client] + np.arange(len(at))) % SERVERS
    return servers


def in_turn(_: np.random.Generator, requests: int) -> Ints:
    """Central round-robin."""
    return np.arange(requests) % SERVERS


SIMULATED: dict[str, Callable[[np.random.Generator, int], Ints]] = {
    "random": by_chance,
    "round-robin of each client": in_turn_by_client,
    "central round-robin": in_turn,
}


def simulate(policy: str, load: float, requests: int, seed: int) -> float:
    """p99 of the response time, in service times, after the first tenth."""
    random = np.random.default_rng(seed)
    arrivals = np.cumsum(random.exponential(1 / (load * SERVERS), requests))
    times = response_times(arrivals, SIMULATED[policy](random, requests))
    return float(np.quantile(times[requests // 10 :], 0.99))


def figure_4(context: Context, suite: Suite) -> None:
    requests, seeds = context.pick(400_000, 100_000, 2_000), context.pick(5, 3, 1)
    context.say("  figure 4: simulation")
    rows = {
        (policy, load): Row(f"{policy}, load {load:g}", [simulate(policy, load, requests, s) for s in range(seeds)])
        for policy in SIMULATED
        for load in LOADS
    }
    suite.tables.append(
        Table("paper-fig4", "Figure 4: p99 by policy and load, simulated", "service times", list(rows.values()))
    )
    suite.plots.append(
        Plot(
            "paper-fig4",
            "Figure 4: p99 by policy, simulated",
            "load",
            "service times",
            [
                *(Curve.of(policy, [rows[policy, load] for load in LOADS], LOADS) for policy in SIMULATED),
                Curve("random", [0.9], [10.0], source="paper"),
            ],
            log_y=True,
            note=f"{CLIENTS} clients, {SERVERS} servers of a fixed service time, Poisson arrivals, {requests:,} "
            f"requests, {seeds} seeds. The paper's random is above 10 near load 0.9, its distributed round-robin "
            "between, its central one flat until saturation. At load 1 there is no end to the lines: what is drawn is "
            "how far they have grown in that many requests.",
        )
    )


# ---- figures 7 and 9: latency ----

WAYS = {"direct": "direct", "crablb, redirect": "CRAB", "crablb, DSR": "L4 DSR", "nginx stream": "nginx"}
PAPER_9 = {"CRR": {"direct": 175.0, "CRAB": 183.0, "L4 DSR": 188.0, "nginx": 425.0},
           "RR": {"direct": 48.0, "CRAB": 48.0, "L4 DSR": 54.5, "nginx": 98.0}}  # fmt: skip
#: Who redirects: here, and in the paper.
IMPLEMENTATIONS = {"crablb, redirect": "user space\n(AF_XDP; DPDK)", "XDP redirect": "XDP\n(redirect.bpf.c; eBPF)"}
PAPER_7 = {"CRR": [183.0, 187.0, 195.0, 177.0], "RR": [48.0] * 4}


def figures_7_and_9(context: Context, suite: Suite) -> None:
    """In two layouts: all on one CPU, and the load balancer on its own."""
    with one_cpu():
        found = p99s(context, suite, None)
    apart: P99s = {}
    try:
        with two_cpus() as cpus:
            apart = p99s(context, suite, cpus)
    except Unavailable as reason:
        suite.left_out.append(f"figures 7 and 9, {APART}: {reason}")
    for kind, what in (("CRR", "connect, 8 bytes there and back, close"), ("RR", "8 bytes there and back")):
        for rows, key, where in ((found, "paper", "all on one CPU"), (apart, "paper-apart", APART)):
            if rows:
                title = f"Figures 7 and 9: {what}: p99; {where}"
                table = Table(f"{key}-{kind.lower()}", title, "us", list(rows[kind].values()), "lower", "direct")
                suite.tables.append(table)

    def ours(names: Sequence[str]) -> list[Curve]:
        curves = []
        for rows, more in ((found, ""), (apart, f", {APART}")):
            for kind in PAPER_7 if rows else ():
                there = [(float(i), name) for i, name in enumerate(names) if name in rows[kind]]
                if there:
                    at = [i for i, _ in there]
                    curves.append(Curve.of(f"{kind}{more}", [rows[kind][name] for _, name in there], at))
        return curves

    places = [float(i) for i in range(4)]
    suite.plots += [
        Plot(
            "paper-fig7",
            "Figure 7: p99 by what redirects",
            "",
            "us",
            [*ours(list(IMPLEMENTATIONS)), *(Curve(kind, places, y, source="paper") for kind, y in PAPER_7.items())],
            "bars",
            [*IMPLEMENTATIONS.values(), "netfilter", "P4"],
            note="With all on one CPU, the kernel's part of it included, a client waits for all that the load balancer "
            f"does. With {APART} it waits for interrupts of that CPU and of its own, too, and each may have to wake. "
            "Neither layout has a network card in it; a module for netfilter and a P4 switch we do not have.",
        ),
        Plot(
            "paper-fig9",
            "Figure 9: p99 beside baselines",
            "",
            "us",
            [
                *ours(list(WAYS)),
                *(
                    Curve(kind, places, [y[name] for name in WAYS.values()], source="paper")
                    for kind, y in PAPER_9.items()
                ),
            ],
            "bars",
            [name.replace(", ", ",\n") for name in WAYS],
            note="As in figure 7. Direct ones have no interrupt to wait for, and no network: the paper's have both.",
        ),
    ]


#: Rows by kind of load and way.
P99s = Mapping[str, Mapping[str, Row]]


def p99s(context: Context, suite: Suite, cpus: Cpus | None) -> P99s:
    """Of the ways of figures 7 and 9.  ``cpus``: the load balancer's is its own."""
    names = tuple(WAYS | IMPLEMENTATIONS)
    samples = str(context.pick(4000, 1000, 100))
    what = f"figures 7 and 9, {APART}" if cpus else "figures 7 and 9"

    def subject(peers: Peers, name: str) -> Callable[[], Mapping[str, float]]:
        def measure() -> Mapping[str, float]:
            crr = peers.crr(name, "--samples", samples, "--seconds", "20", "--warmup", "0.05", port=ECHO)
            rr = peers.crr(name, "--mode", "rr", "--samples", samples, "--seconds", "20", "--warmup", "0.05", port=ECHO)
            return {"CRR": crr["p99"], "RR": rr["p99"]}

        return measure

    with tempfile.TemporaryDirectory() as folder, Peers(context, Path(folder), names, cpus) as peers:
        suite.left_out += [f"{what}, {name}: {reason}" for name, reason in peers.left_out.items()]
        if "direct" not in peers.ways:
            raise Unavailable(peers.left_out["direct"])
        return context.in_turn(what, {name: subject(peers, name) for name in peers.ways}, context.pick(7, 1, 1))


# ---- figure 10: goodput ----

LINK = 100  # Mbit/s
FARM = 3  # servers, and clients
PAPER_10 = {
    "RR": {"redirected": ([4096.0, 16384.0], [2.66, 2.77]), "DSR": ([4096.0, 16384.0], [0.93, 0.93])},
    "CRR": {"redirected": ([8192.0, 16384.0], [0.88, 1.51]), "DSR": ([8192.0, 16384.0], [0.88, 0.87])},
}
GOODPUT_WAYS = {
    "redirected": Way("round-robin"),
    "DSR": Way(redirect=False),
    "MPTCP": Way(redirect=False, mptcp=True),
}


def figure_10(context: Context, suite: Suite) -> None:
    sizes = context.pick((64, 256, 1024, 4096, 8192, 16384), (1024, 16384), (16384,))
    seconds = str(context.pick(1.5, 0.7, 0.2))

    def subject(farm: Farm, way: str, size: int) -> Callable[[], Mapping[str, float]]:
        def measure() -> Mapping[str, float]:
            goodput = {}
            for kind in PAPER_10:
                found = farm.together(
                    way, "--mode", kind.lower(), "--connections", "8", "--bytes", str(size), "--seconds", seconds,
                    "--warmup", "0.3",
                )  # fmt: skip
                # `bytes` are those of both directions.
                goodput[kind] = sum(client["bytes"] * 4 / client["seconds"] / 1e6 for client in found)
            return goodput

        return measure

    with (
        tempfile.TemporaryDirectory() as folder,
        Farm(context, Path(folder), "goodput", GOODPUT_WAYS, [0] * FARM, clients=FARM) as farm,
    ):
        farm.shape(LINK)
        subjects = {f"{way}, {size:,} bytes": subject(farm, way, size) for way in GOODPUT_WAYS for size in sizes}
        found = context.in_turn("figure 10", subjects, context.pick(5, 1, 1))
    for kind, what in (("RR", "on connections that stay"), ("CRR", "a connection for each")):
        rows = found[kind]
        for name, row in rows.items():
            way, size = name.split(", ", 1)
            if way != "DSR":
                row.baseline = f"DSR, {size}"
        suite.tables.append(
            Table(f"paper-fig10-{kind.lower()}", f"Figure 10: goodput, {what}", "Mbit/s", list(rows.values()), "higher")
        )
        # In link rates, to be beside the paper's.
        ours = [
            Curve.of(
                way,
                [Row("", [s / LINK for s in rows[f"{way}, {size:,} bytes"].samples]) for size in sizes],
                sizes,
            )
            for way in GOODPUT_WAYS
        ]
        paper = [Curve(way, *points, source="paper") for way, points in PAPER_10[kind].items()]
        suite.plots.append(
            Plot(
                f"paper-fig10-{kind.lower()}",
                f"Figure 10: goodput by message size, {what}",
                "bytes of a message",
                "goodput, in links",
                [*ours, *paper],
                log_x=True,
                note=f"{FARM} clients with 8 connections each, {FARM} servers that echo and a load balancer, each on a "
                f"link of {LINK} Mbit/s by tbf; the paper's: 10 Gbit/s. Small messages are limited by the machine's "
                "CPUs, which all nodes share, not by links. MPTCP's clients have MPTCP sockets and no offer to make; "
                "a connection that is over before its server's address is known goes as by DSR.",
            )
        )
    suite.targets.append(p5(found["RR"], sizes[-1]))


def p5(rows: Mapping[str, Row], size: int) -> Target:
    ours, dsr = rows[f"redirected, {size:,} bytes"], rows[f"DSR, {size:,} bytes"]
    ratio = ours.over(dsr)
    value = (
        f"{ratio:.2f} times, {ours.median:.0f} Mbit/s beside {dsr.median:.0f}: messages of {size // 1024} KiB, links "
        f"of {LINK} Mbit/s"
    )
    # Both carry headers and acknowledgements beside what counts; two in a hundred may be these.
    reached = ratio >= FARM * 0.98
    return Target("P5", value, reached, "" if reached else f"{FARM} links carry {ours.median / LINK:.2f} of {FARM}")


# ---- figures 11 and 12: p99 by load ----

SERVICE_US = 4000
LOAD_WAYS = {
    "round-robin, redirected": Way("round-robin"),
    "random, redirected": Way("random"),
    "random (hash), DSR": Way(redirect=False),
}
#: Shares of the servers' capacity, and p99 in service times.
PAPER_11 = {
    "round-robin, redirected": ([0.2, 0.81], [1.2, 2.0]),
    "random, redirected": ([0.2, 0.6, 0.8], [2.5, 3.0, 10.0]),
}
#: p99 in microseconds, at low load.
PAPER_12 = {"round-robin, redirected": 320.0, "random, redirected": 465.0}


def figures_11_and_12(context: Context, suite: Suite) -> None:
    servers = context.pick(16, 4, 2)
    with (
        tempfile.TemporaryDirectory() as folder,
        Farm(context, Path(folder), "load", LOAD_WAYS, [SERVICE_US] * servers) as farm,
    ):
        for figure in (figure_11, figure_12):
            attempt(figure, context, suite, farm)


def open_loop(farm: Farm, name: str, rate: float, *more: str, port: int, seeds: count[int]) -> float:
    """p99 in microseconds."""
    seconds = farm.context.pick(3.0, 1.0, 0.2)
    options = ["--rate", f"{rate:.1f}", "--seconds", str(seconds), "--warmup", "0.3", "--seed", str(next(seeds))]
    return float(farm.crr(name, *options, *more, port=port)["p99"])


def figure_11(context: Context, suite: Suite, farm: Farm) -> None:
    loads = context.pick((0.2, 0.4, 0.6, 0.7, 0.8, 0.9), (0.5,), (0.2,))
    capacity = len(farm.servers) * 1e6 / SERVICE_US

    def subject(way: str, load: float) -> Callable[[], Mapping[str, float]]:
        seeds = count(1)

        def measure() -> Mapping[str, float]:
            return {"p99": open_loop(farm, way, load * capacity, port=ECHO, seeds=seeds) / SERVICE_US}

        return measure

    subjects = {f"{way}, load {load:g}": subject(way, load) for load in loads for way in LOAD_WAYS}
    rows = context.in_turn("figure 11", subjects, context.pick(5, 1, 1), steady=False)["p99"]
    suite.tables.append(
        Table("paper-fig11", "Figure 11: p99 by load, a new connection each", "service times", list(rows.values()))
    )
    curves = [Curve.of(way, [rows[f"{way}, load {load:g}"] for load in loads], loads) for way in LOAD_WAYS]
    suite.plots.append(
        Plot(
            "paper-fig11",
            "Figure 11: p99 by load, a new connection for each request",
            "load, of what the servers can do",
            "service times",
            [*curves, *(Curve(way, *points, source="paper") for way, points in PAPER_11.items())],
            log_y=True,
            note=f"{len(farm.servers)} servers that answer one request at a time in {SERVICE_US / 1000:g} ms, Poisson "
            "arrivals; the paper's: 48 of 1 ms. They wait for the time, rather than compute: two CPUs could not be so "
            "many servers. Fewer servers make round-robin's advantage smaller: the arrivals at each are less even.",
        )
    )


def figure_12(context: Context, suite: Suite, farm: Farm) -> None:
    rates = context.pick((500, 1000, 2000, 4000), (500,), (200,))

    def subject(way: str, rate: int) -> Callable[[], Mapping[str, float]]:
        seeds = count(1)
        return lambda: {"p99": open_loop(farm, way, rate, "--get", "/8k", port=HTTP, seeds=seeds)}

    subjects = {f"{way}, {rate:,} a second": subject(way, rate) for rate in rates for way in LOAD_WAYS}
    rows = context.in_turn("figure 12", subjects, context.pick(5, 1, 1), steady=False)["p99"]
    suite.tables.append(
        Table(
            "paper-fig12",
            "Figure 12: p99 of a file of 8 kB from nginx, a new connection each",
            "us",
            list(rows.values()),
        )
    )
    low = [rows[f"{way}, {rates[0]:,} a second"] for way in LOAD_WAYS]
    suite.plots.append(
        Plot(
            "paper-fig12",
            f"Figure 12: p99 of 8 kB from nginx at low load ({rates[0]:,} a second)",
            "",
            "us",
            [
                Curve.of(f"{len(farm.servers)} nginx, one machine", low),
                Curve("48 nginx", [0.0, 1.0], list(PAPER_12.values()), source="paper"),
            ],
            "bars",
            [way.replace(", ", ",\n") for way in LOAD_WAYS],
            note="The paper's random: 430 to 500. Here all nginx share this machine's CPUs: a request waits for a CPU "
            "and not for its server's line, so the policy makes no difference.",
        )
    )
