"""The metrics: one table, from which Prometheus' text, docs/metrics.md's table and its test are made.

Names are by Prometheus' conventions: base units, ``_total`` for what only rises.  Labels are what a configuration has
(services, backends, interfaces) or a fixed set of words, never what a packet says.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Literal

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest

from crablb._native import lib
from crablb.api import types
from crablb.control.metrics.facts import Facts
from crablb.dataplane.statistics import WORKER_COUNTERS, Rounds

__all__ = ["CONTENT_TYPE", "METRICS", "Metric", "render"]

PREFIX = "crablb_"

#: What became of packets; what was seen on the way, beside it; what the kernel counts: parts of ``enum crab_counter``.
_OUTCOME, _SEEN, _SOCKET = (WORKER_COUNTERS.index(first) for first in ("redirected", "reassigned", "xsk_rx_dropped"))
OUTCOMES, SEEN, SOCKET = WORKER_COUNTERS[_OUTCOME:_SEEN], WORKER_COUNTERS[_SEEN:_SOCKET], WORKER_COUNTERS[_SOCKET:]

Labels = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Buckets:
    """A histogram's: what is at most each bound (and more than the one before; the last one: more than all), and the
    sum of what was counted."""

    bounds: Sequence[float]
    counts: Sequence[int]
    total: float


@dataclass(frozen=True, slots=True)
class Metric:
    """``name``: without prefix and ``_total``; ``of``: its values, by labels."""

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    labels: Labels
    help: str
    of: Callable[[Facts], Iterable[tuple[Labels, float | Buckets]]]

    @property
    def full_name(self) -> str:
        return f"{PREFIX}{self.name}" + ("_total" if self.kind == "counter" else "")


def _one(of: Callable[[Facts], float]) -> Callable[[Facts], Iterable[tuple[Labels, float]]]:
    return lambda facts: [((), of(facts))]


def _by_service(of: Callable[[types.Service], float]) -> Callable[[Facts], Iterable[tuple[Labels, float]]]:
    return lambda facts: (((service.vip,), of(service)) for service in facts.services)


def _by_backend(of: Callable[[types.Backend], float | None]) -> Callable[[Facts], Iterable[tuple[Labels, float]]]:
    """None: nothing is known, and so there is no sample."""
    return lambda facts: (
        ((backend.service, backend.address), value) for backend in facts.backends if (value := of(backend)) is not None
    )


def _by_check(of: Callable[[types.CheckResult], float | None]) -> Callable[[Facts], Iterable[tuple[Labels, float]]]:
    return lambda facts: (
        ((backend.service, backend.address, check.type, number), value)
        for backend in facts.backends
        for number, check in _numbered(backend.checks)
        if (value := of(check)) is not None
    )


def _numbered(checks: Iterable[types.CheckResult]) -> Iterator[tuple[str, types.CheckResult]]:
    """Each with its number among those of its type, from 1, in the configuration's order."""
    seen: dict[str, int] = {}
    for check in checks:
        seen[check.type] = seen.get(check.type, 0) + 1
        yield str(seen[check.type]), check


def _by_counter(where: Literal["xdp", "daemon"]) -> Callable[[Facts], Iterable[tuple[Labels, float]]]:
    return lambda facts: (((name,), count) for name, count in facts.status.counters[where].items())


def _by_queue(names: Sequence[str], drop: str = "") -> Callable[[Facts], Iterable[tuple[Labels, float]]]:
    return lambda facts: (
        ((interface, str(queue), name.removeprefix(drop)), counts[name])
        for (interface, queue), counts in facts.workers.items()
        for name in names
    )


def _of_queue(name: str) -> Callable[[Facts], Iterable[tuple[Labels, float]]]:
    return lambda facts: (
        ((interface, str(queue)), counts[name]) for (interface, queue), counts in facts.workers.items()
    )


def _rounds(of: Callable[[Rounds], Buckets]) -> Callable[[Facts], Iterable[tuple[Labels, Buckets]]]:
    return lambda facts: (((interface, str(queue)), of(rounds)) for (interface, queue), rounds in facts.rounds.items())


SIZES = [float(1 << place) for place in range(lib.CRAB_ROUND_SIZES)]
TIMES = [(lib.CRAB_ROUND_NS << place) / 1e9 for place in range(lib.CRAB_ROUND_TIMES - 1)]

SERVICE, BACKEND, QUEUE = ("service",), ("service", "backend"), ("interface", "queue")
CHECK = (*BACKEND, "check", "number")

METRICS: tuple[Metric, ...] = (
    # ---- the daemon ----
    Metric(
        "build_info", "gauge", ("version", "python"), "Always 1; what runs.",
        lambda facts: [((facts.status.version.version, platform.python_version()), 1)],
    ),
    Metric("start_time_seconds", "gauge", (), "When it started, seconds since 1970.",
           _one(lambda facts: facts.status.version.started)),
    Metric("degraded", "gauge", (), "1: something is not as it should be; crablb status says what.",
           _one(lambda facts: facts.status.state == "degraded")),
    Metric("problems", "gauge", (), "Things that are not as they should be.",
           _one(lambda facts: len(facts.status.problems))),
    Metric("config_last_reload_successful", "gauge", (), "1: the last configuration that was read is served.",
           _one(lambda facts: facts.reload.well)),
    Metric("config_last_reload_success_timestamp_seconds", "gauge", (),
           "When a configuration was last read and served, seconds since 1970.",
           _one(lambda facts: facts.reload.since)),
    Metric("runtime_changes", "gauge", (), "Changes at run time that the configuration does not have (crablb diff).",
           _one(lambda facts: facts.status.changes)),
    Metric("draining", "gauge", (), "1: connections are to leave the load balancer (crablb drain-lb).",
           _one(lambda facts: facts.status.draining)),
    Metric("daemon_events", "counter", ("event",), "What befell the daemon; a log line told of each.",
           _by_counter("daemon")),
    Metric("snapshots_published", "counter", (), "Times that the workers were given something new to go by.",
           _one(lambda facts: facts.published)),
    Metric(
        "interface_up", "gauge", ("interface",), "1: it is served; 0: it is gone.",
        lambda facts: (((i.name,), bool(i.mode)) for i in facts.status.interfaces),
    ),
    Metric(
        "interface_native", "gauge", ("interface",), "1: the XDP program is in the driver; 0: generic mode, or gone.",
        lambda facts: (((i.name,), i.mode == "native") for i in facts.status.interfaces),
    ),
    Metric("zero_copy", "gauge", (), "1: all AF_XDP sockets are in zero-copy mode.",
           _one(lambda facts: facts.status.zero_copy)),
    # ---- packets ----
    Metric("xdp_packets", "counter", ("reason",), "Packets, by what the XDP program did with them.",
           _by_counter("xdp")),
    Metric("worker_received_packets", "counter", QUEUE, "Packets that a worker took off its queue.",
           _of_queue("received")),
    Metric("worker_sent_packets", "counter", QUEUE, "Packets that a worker gave to the kernel to be sent.",
           _of_queue("sent")),
    Metric("worker_packets", "counter", (*QUEUE, "reason"), "Packets, by what became of them in user space.",
           _by_queue(OUTCOMES)),
    Metric("worker_events", "counter", (*QUEUE, "event"), "What a worker saw on the way, beside what became of them.",
           _by_queue(SEEN)),
    Metric("worker_socket_events", "counter", (*QUEUE, "event"), "What the kernel counts of a worker's AF_XDP socket.",
           _by_queue(SOCKET, "xsk_")),
    Metric("worker_round_packets", "histogram", QUEUE, "Packets that a worker took off its queue at once.",
           _rounds(lambda rounds: Buckets(SIZES, rounds.sizes, rounds.frames))),
    Metric("worker_packet_seconds", "histogram", QUEUE,
           "What a packet, mostly a SYN, waited in a worker, from its queue to the kernel again; of one round in"
           f" {lib.CRAB_ROUND_SAMPLE}.",
           _rounds(lambda rounds: Buckets(TIMES, rounds.times, rounds.seconds))),
    Metric("flows", "gauge", (), "Fallback flows in the XDP program.", _one(lambda facts: facts.status.flows)),
    Metric("flows_limit", "gauge", (), "As many as `flows` gives room for.", _one(lambda facts: facts.flows_limit)),
    # ---- services ----
    Metric(
        "service_info", "gauge", ("service", "mode", "fallback", "policy"), "Always 1; how a service is served.",
        lambda facts: (((s.vip, s.mode, s.fallback, s.policy), 1) for s in facts.services),
    ),
    Metric("service_backends", "gauge", SERVICE, "Its backends.", _by_service(lambda s: s.backends)),
    Metric("service_backends_serving", "gauge", SERVICE, "Those that get new connections.",
           _by_service(lambda s: s.serving)),
    Metric("service_weight", "gauge", SERVICE, "Weight of its backends, without backups, that the operator has up.",
           _by_service(lambda s: s.weight)),
    Metric("service_healthy_weight", "gauge", SERVICE, "The same of those that are healthy.",
           _by_service(lambda s: s.healthy_weight)),
    Metric("service_quorum_weight", "gauge", SERVICE, "Healthy weight under which the VIP is withdrawn; 0: never.",
           _by_service(lambda s: s.quorum)),
    Metric("service_panic", "gauge", SERVICE, "1: too little is healthy, and health is disregarded.",
           _by_service(lambda s: s.panic)),
    Metric("service_backups_serving", "gauge", SERVICE, "1: its backups serve.", _by_service(lambda s: s.backups)),
    Metric("service_announced", "gauge", SERVICE, "0: withdrawn for want of a quorum.",
           _by_service(lambda s: s.announced)),
    Metric("service_flows", "gauge", SERVICE, "Its fallback flows.", _by_service(lambda s: s.flows)),
    Metric("service_packets", "counter", SERVICE, "Packets that the XDP program forwarded by itself.",
           _by_service(lambda s: s.packets)),
    Metric("service_bytes", "counter", SERVICE, "Bytes of these, as they came.", _by_service(lambda s: s.bytes)),
    # ---- backends ----
    Metric(
        "backend_state", "gauge", (*BACKEND, "state"), "Always 1; the operator's word: up, drain, maint, dead.",
        lambda facts: (((b.service, b.address, b.state), 1) for b in facts.backends),
    ),
    Metric("backend_serving", "gauge", BACKEND, "1: it gets new connections.", _by_backend(lambda b: b.serving)),
    Metric("backend_serving_change_timestamp_seconds", "gauge", BACKEND,
           "Since when it does, or does not, seconds since 1970.", _by_backend(lambda b: b.since)),
    Metric("backend_healthy", "gauge", BACKEND, "1: its checks say so.  None while it is not checked.",
           _by_backend(lambda b: b.healthy)),
    Metric("backend_weight", "gauge", BACKEND, "Its weight, as the operator has it.", _by_backend(lambda b: b.weight)),
    Metric("backend_weight_now", "gauge", BACKEND, "Its weight at this moment.", _by_backend(lambda b: b.weight_now)),
    Metric("backend_share_ratio", "gauge", BACKEND, "Its share of the service's table.",
           _by_backend(lambda b: b.share)),
    Metric("backend_redirected", "gauge", BACKEND, "1: clients are redirected to it; 0: it gets the fallback alone.",
           _by_backend(lambda b: b.cr)),
    Metric("backend_redirects", "counter", BACKEND,
           "Connections redirected to it.  None by policies that decide by a hash alone, which do not count.",
           _by_backend(lambda b: b.assigned)),
    Metric("backend_flows", "gauge", BACKEND, "Its fallback flows.", _by_backend(lambda b: b.flows)),
    Metric("backend_connections", "gauge", BACKEND, "Connections that its server reports.  None if it does not.",
           _by_backend(lambda b: b.connections)),
    Metric("backend_load_ratio", "gauge", BACKEND, "Load that its server reports; 1: full.  None if it does not.",
           _by_backend(lambda b: b.load)),
    # ---- checks ----
    Metric("checks_late_seconds", "gauge", (), "Longest that a check waits for its turn.",
           _one(lambda facts: facts.status.checks_late)),
    Metric("checks_untried", "gauge", (), "Checks that this host keeps from being made.",
           _one(lambda facts: facts.status.checks_untried)),
    Metric("check_healthy", "gauge", CHECK, "1: the check says that the backend is; none while nothing is known yet.",
           _by_check(lambda c: c.healthy)),
    Metric("check_consecutive_failures", "gauge", CHECK, "Failures in a row up to now.",
           _by_check(lambda c: c.streak if c.ok is False else 0)),
    Metric("check_duration_seconds", "gauge", CHECK, "What the last one took.", _by_check(lambda c: c.seconds)),
    Metric("check_timestamp_seconds", "gauge", CHECK, "When the last one ended, seconds since 1970.",
           _by_check(lambda c: c.at or None)),
)  # fmt: skip


#: Of Prometheus' text format.
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


def _lines(metric: Metric, facts: Facts, known: dict[Labels, str]) -> Iterator[str]:
    """``known``: the labels that were written down already, of metrics that have the same."""
    name = metric.full_name
    yield f"# HELP {name} {metric.help}\n# TYPE {name} {metric.kind}\n"
    for labels, value in metric.of(facts):
        text = known.get(labels)
        if text is None:
            pairs = zip(metric.labels, labels, strict=True)
            text = known[labels] = ",".join(f'{key}="{said.translate(_ESCAPES)}"' for key, said in pairs)
        if isinstance(value, Buckets):
            yield from _histogram(name, text, value)
        elif text:
            yield f"{name}{{{text}}} {value + 0}\n"  # truth is a number
        else:
            yield f"{name} {value + 0}\n"


def _histogram(name: str, labels: str, value: Buckets) -> Iterator[str]:
    count, before = 0, labels and f"{labels},"
    for bound, more in zip([*map(repr, value.bounds), "+Inf"], [*value.counts, 0], strict=False):
        count += more
        yield f'{name}_bucket{{{before}le="{bound}"}} {count}\n'
    of = labels and f"{{{labels}}}"
    yield f"{name}_sum{of} {value.total}\n{name}_count{of} {count}\n"


def render(facts: Facts) -> bytes:
    """The metrics in Prometheus' text format, and prometheus_client's own of the process.

    In whatever thread.  The lines are not prometheus_client's: that takes 15 us for each, and 10,000 backends have
    200,000 lines.
    """
    known: dict[Labels, dict[Labels, str]] = {}
    text = BytesIO()  # by metric, as all of them would be there three times over
    for metric in METRICS:
        text.write("".join(_lines(metric, facts, known.setdefault(metric.labels, {}))).encode())
    process = CollectorRegistry()
    ProcessCollector(registry=process)
    text.write(generate_latest(process))
    return text.getvalue()
