"""The figures that crablb is to reach.  A suite says what it found; the report has a line for each."""

from __future__ import annotations

from bench.figures import Results, Target

#: What, and the limit.
TARGETS: dict[str, tuple[str, str]] = {
    "P1": (
        "hot loop, all that it does in production, beside a bare C loop and an XDP program that does the same redirect",
        "at most 1.8 times the bare loop, and half of the XDP program",
    ),
    "P2": (
        "`crablb serve`, SYN in to SYN out, beside raw l2fwd with default settings, in copy mode",
        "at least 1.0 times",
    ),
    "P3": (
        "new connections a second through crablb, redirected, beside direct ones",
        "all on one CPU at least 0.80 of direct, and above DNAT, nginx stream and HAProxy; the load balancer on a CPU "
        "of its own at least 0.93",
    ),
    "P4": (
        "latency on an established redirected connection, and to set one up",
        "p50 and p99 at most 1.04 of direct; set-up adds at most half of what DSR adds with the load balancer on a CPU "
        "of its own",
    ),
    "P5": ("goodput with three servers, each on a link as fast as the load balancer's", "3 times what DSR reaches"),
    "P6": ("load balancer's CPU time and packets for bytes moved on redirected connections", "zero"),
    "P7": (
        "a SYN at 10,000 backends, 1,000 services and 1,000,000 cached flows, beside 2, 1 and 1,000",
        "at most 1.3 times",
    ),
    "P8": (
        "tables for 1,000 backends; disruption when one is removed, with each size",
        "65,537 entries in 2 ms, 655,373 in 25 ms; at most 1.5 times the ideal",
    ),
    "P9": ("two queues on two cores beside one, hot loop", "at least 1.8 times"),
    "P10": (
        "`crablb serve`: start to first SYN forwarded; resident memory",
        "at most 0.5 s; at most 80 MiB, 95 with the API, metrics and the page",
    ),
    "P13": (
        "new connections while the load balancer is reloaded and taken over: failed, SYNs lost, the longest that a "
        "takeover keeps a packet",
        "zero, zero, at most 5 ms",
    ),
    "P15": (
        "MPTCP client without an agent: packets of a connection by the load balancer",
        "at most 9, of any length; at 20 ms at most 1.5 % of 10 MB; `leave`: none after the first four round trips",
    ),
}


def found(results: Results) -> list[Target]:
    """One for each of :data:`TARGETS`, in order."""
    by_name = {target.name: target for suite in results.suites for target in suite.targets}
    return [by_name.get(name, Target(name, "not measured in this run", None)) for name in TARGETS]
