"""How large a load balancer has to be, by a run's results: tables for docs/sizing.md, in Markdown."""

from __future__ import annotations

from bench.figures import Results
from crablb.errors import ConfigError

#: New connections a second, and packets of flows by the fallback, that shares of a core are told for.
RATES = (1_000, 10_000, 100_000, 1_000_000)


def median(results: Results, key: str, row: str) -> float:
    """Of a row.  Raises ConfigError if the run has not measured it."""
    table = results.table(key)
    found = table.row(row) if table else None
    if found is None:
        raise ConfigError(f"these results have no {row!r} of {key}; run all suites: crablb bench")
    return found.median


def capacities(results: Results) -> dict[str, tuple[float, str]]:
    """What one core does of each kind in a second, and how it is known."""

    def rate_of(key: str, row: str) -> float:
        """A second's worth of nanoseconds."""
        return 1e9 / median(results, key, row)

    return {
        "new connections, native mode": (
            1e6 * median(results, "xsk-serve", "crablb serve"),
            "`crablb serve`, SYN in to SYN out, over a veth in copy mode",
        ),
        "new connections, generic mode": (
            1e6 * median(results, "xsk-serve", "crablb serve, generic"),
            "the same; sending is the limit of both there",
        ),
        "new connections, what user space alone allows": (
            rate_of("micro-syn", "crablb, IPv4, 64 frames"),
            "the hot loop without the kernel: the bound of a card with a zero-copy mode, none of which was measured",
        ),
        "packets by the fallback, by MAC address": (
            rate_of("micro-bypass", "100,000 flows, by MAC address"),
            "the XDP program, of 100,000 known flows, cold, without the driver's own work",
        ),
        "packets by the fallback, by tunnels": (rate_of("micro-bypass", "100,000 flows, IP in IP"), "the same"),
        "decisions of a policy in Python": (
            1e6 * median(results, "micro-python", "by the hash, 1,000 backends"),
            "a short one, in NumPy; one core in all, as it has one lock",
        ),
    }


def share(of_one: float) -> str:
    return f"{100 * of_one:.2g} %"


def sizing(results: Results) -> str:
    """Tables of what a core does, of the share of one that a rate takes, and of time and memory."""
    able = capacities(results)
    lines = ["| of one core | a second | how it is known |", "|---|--:|---|"]
    lines += [f"| {what} | {rate / 1e6:.1f} million | {how} |" for what, (rate, how) in able.items()]
    syns, packets = able["new connections, native mode"][0], able["packets by the fallback, by MAC address"][0]
    # Each by itself: a wake-up a SYN, and what runs at both endpoints, which shared the CPU.
    alone = 1e6 / (median(results, "peers-cpu", "crablb, redirect") - median(results, "peers-cpu", "direct"))
    lines += ["", "| a second | new connections, one by one: at most | in full batches | packets by the fallback |"]
    lines += ["|--:|--:|--:|--:|"]
    for rate in RATES:
        one_by_one = share(rate / alone) if rate < alone else "-"
        lines.append(f"| {rate:,} | {one_by_one} | {share(rate / syns)} | {share(rate / packets)} |")
    two = median(results, "micro-queues", "two, on two") / median(results, "micro-queues", "one queue, one core")
    small = median(results, "micro-scale", "2 backends, 1 service, 1,000 flows")
    large = median(results, "micro-scale", "10,000 backends, 1,000 services, 1,000,000 flows")
    table = median(results, "micro-maglev", "65,537 entries")
    start = median(results, "daemon-start", "crablb serve")
    memory, idle = (median(results, f"daemon-{what}", "crablb serve") for what in ("memory", "idle"))
    rows = {
        "two queues on two cores, beside one": f"{two:.2f} times (hot loop)",
        "a SYN at 10,000 backends, 1,000 services, 1,000,000 flows, beside 2, 1, 1,000": f"{large / small:.2f} times",
        "a Maglev table, 1,000 backends, 65,537 slots": f"{table:.1f} ms",
        "from the start to the first SYN": f"{start:.2f} s",
        "memory, one queue, four backends": f"{memory:.0f} MiB",
        "CPU time with nothing to do": f"{share(idle / 100)} of a core",
    }
    lines += ["", "| | |", "|---|---|", *(f"| {what} | {found} |" for what, found in rows.items())]
    machine = results.machine
    where = f"{machine['cpus']} CPUs ({machine['cpu']}), Linux {machine['kernel']}, revision {machine['revision']}"
    lines += ["", f"Of {where}."]
    return "\n".join(lines)
