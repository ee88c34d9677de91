"""What a running load balancer is asked and answers, as JSON: one struct a thing; a field's name is the JSON's.

VIPs are text as in a configuration (``tcp://10.0.0.100:80``), addresses plain text, times seconds since 1970 (``at``)
or durations in seconds, weights and counts whole numbers.  Counts are since the daemon's start unless it says
otherwise.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

__all__ = [
    "AddBackend",
    "Applied",
    "Backend",
    "BackendHealth",
    "Capture",
    "CheckResult",
    "Configuration",
    "Diff",
    "DrainLb",
    "Drained",
    "Event",
    "Explain",
    "Explanation",
    "Flow",
    "FlowCount",
    "Flows",
    "Interface",
    "Left",
    "LogLevel",
    "Moved",
    "Patch",
    "Plan",
    "PlanService",
    "Problems",
    "Service",
    "Statistics",
    "Status",
    "Step",
    "Trace",
    "TraceStep",
    "Version",
]

StateWord = Literal["up", "drain", "maint", "dead"]


class Struct(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, gc=False):
    """What all have in common: immutable, and nothing in them that is not named here.

    They are trees, so Python's collector need not follow them: of 10,000 backends there are 50,000.
    """


class Answer(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The same of what a daemon says; a newer one may say more."""


# ---- what there is ----


class Version(Answer, frozen=True, kw_only=True):
    version: str  # of crablb
    api: int  # 1
    pid: int  # in its own PID namespace: a container's is another one than the host's
    started: float  # at
    took_over: float | None = None  # at, if it serves in another process's place
    gap: float | None = None  # seconds in which packets waited then


class Interface(Answer, frozen=True, kw_only=True):
    name: str
    mode: Literal["native", "generic", ""]  # empty: it is gone
    mtu: int
    queues: int
    mac: str


class Status(Answer, frozen=True, kw_only=True):
    state: Literal["serving", "degraded"]
    problems: list[str]  # what is not as it should be, in words, the worst first
    version: Version
    interfaces: list[Interface]
    queues: int
    zero_copy: bool
    ack_bypass: bool
    services: int
    backends: int  # pairs of a service and a backend
    backends_serving: int
    backends_unchecked: int = 0  # of which no check has said anything yet: they are what `initially` says
    flows: int  # fallback flows in the XDP program
    configuration: str  # the file's path; empty: arguments
    changes: int  # at run time that the file does not have
    standby: int = 0  # VIPs (addresses) that another machine has on a segment, and that are taken when it is gone
    checks_late: float = 0.0  # seconds that a check waits for its turn, the longest
    checks_untried: int = 0  # that this host keeps from being made
    checks_trouble: list[str] = []  # why checks are late, or not made, in words; also of `problems`
    draining: bool = False  # connections are to leave it (crablb drain-lb)
    counters: dict[str, dict[str, int]]  # "xdp", "workers", "daemon"


class CheckResult(Answer, frozen=True, kw_only=True):
    """A check of a backend of a service."""

    type: str
    healthy: bool | None  # None: nothing is known yet
    ok: bool | None  # the last one; None: it could not be tried
    reason: str  # the last answer, in words
    at: float  # of the last one
    seconds: float  # that it took
    streak: int  # results alike in a row
    since: float  # at: `healthy` is so
    history: str  # the last 60 results, the newest last: "+" well, "-" not, "?" not tried


class Backend(Answer, frozen=True, kw_only=True):
    """A backend of a service."""

    service: str  # VIP
    address: str
    state: StateWord  # the operator's word
    serving: bool  # it gets new connections
    reason: str  # why not; or why it is as it is ("tcp: refused", "neighbour does not answer", "drain", "backup")
    healthy: bool | None  # None: it is not checked
    weight: int  # the operator's
    weight_now: int  # that it has at this moment
    backup: bool
    cr: bool  # redirected to
    cr_reason: str  # why not
    reached: str  # "eth0 02:00:00:00:00:0b", "eth0 via 10.0.0.1", or why it is not
    connections: int | None  # that its server reports; None: it does not
    load: float | None  # that its server reports
    assigned: int | None  # connections redirected to it; None: its service's policy, a hash, does not count them
    flows: int  # fallback flows
    share: float  # of the service's table, 0 to 1
    checks: list[CheckResult]
    since: float  # at: its `serving` is so
    changed: bool  # at run time, not by the configuration


class Service(Answer, frozen=True, kw_only=True):
    vip: str
    mode: str
    fallback: str
    policy: str
    backends: int
    serving: int
    healthy_weight: int
    weight: int
    panic: bool
    backups: bool  # they serve
    quorum: int
    announced: bool  # false: withdrawn for want of a quorum
    in_use: dict[str, str] = {}  # interface -> MAC address of who else has the VIP there; it is taken when he is gone
    flows: int
    packets: int  # that the XDP program forwarded by itself
    bytes: int
    changed: bool


class BackendHealth(Answer, frozen=True, kw_only=True):
    """What checks found out about a backend of a service."""

    service: str
    address: str
    healthy: bool | None  # None: it is not checked
    checks: list[CheckResult]


class Statistics(Answer, frozen=True, kw_only=True):
    """Counters, by the names that docs/configuration.md explains."""

    xdp: dict[str, int]  # packets, by what the XDP program did with them
    workers: dict[str, int]  # packets, by what became of them in user space
    queues: list[dict[str, int]]  # the same, for each queue
    daemon: dict[str, int]  # what befell the load balancer


class Configuration(Answer, frozen=True, kw_only=True):
    """What is served now: the configuration, with the changes at run time."""

    path: str  # the file's; empty: arguments
    settings: dict[str, Any]  # as in a file; what is by default is not there, nor are keys


class FlowCount(Answer, frozen=True, kw_only=True):
    """Fallback flows in the XDP program."""

    total: int
    services: dict[str, dict[str, int]]  # by VIP and backend


class Flow(Answer, frozen=True, kw_only=True):
    """A fallback flow.  The table holds its hash, not its addresses."""

    hash: str  # 16 hexadecimal digits
    service: str
    backend: str
    idle: float  # seconds
    state: Literal["new", "open", "ending"]


class Flows(Answer, frozen=True, kw_only=True):
    total: int
    ending: int = 0  # of them: a FIN or RST of the client was seen
    flows: list[Flow]
    truncated: bool


class Event(Answer, frozen=True, kw_only=True):
    number: int  # rises by one
    at: float
    kind: str  # crablb.dataplane.events.Event
    service: str
    backend: str
    interface: str
    reason: str


# ---- what is changed ----


class Applied(Answer, frozen=True, kw_only=True):
    """What a change did; nothing, if there was nothing to do."""

    changes: list[str]  # in words
    warnings: list[str] = []


class Patch(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    weight: int | None = None
    state: Literal["up", "drain", "maint", "dead", "ready"] | None = None  # ready: up


class AddBackend(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    address: str  # "10.0.0.11", "10.0.0.11*3"
    weight: int | None = None  # None: the one in the address, or 1
    cr: bool = True
    state: StateWord = "up"
    backup: bool = False


class LogLevel(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    level: Literal["debug", "info", "warning", "error"]


class DrainLb(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    cancel: bool = False  # no more
    withdraw: bool = False  # do not announce the VIPs either


class Left(Answer, frozen=True, kw_only=True):
    """A backend's open fallback flows."""

    service: str  # empty: any, where the XDP program forwards no flows (ack_bypass)
    backend: str
    flows: int
    reason: str  # why they stay


class Drained(Answer, frozen=True, kw_only=True):
    """How far the draining of the load balancer has come."""

    draining: bool
    withdrawn: bool  # the VIPs are not announced
    told: bool  # servers report here, so that they can be told
    first: int  # open fallback flows when it began
    flows: int  # now
    left: list[Left]  # whose these are


class Problems(Answer, frozen=True, kw_only=True):
    """Why it was not done."""

    problems: list[str]


# ---- plan ----


class Moved(Answer, frozen=True, kw_only=True):
    """Live fallback flows by what becomes of them."""

    stay: int = 0
    move: int = 0  # to another backend
    lost: int = 0  # their service goes, or their backend is dead


class PlanService(Answer, frozen=True, kw_only=True):
    vip: str
    change: Literal["added", "removed", "changed", "same"]
    settings: list[str]  # "policy: maglev -> random"
    backends_added: list[str]
    backends_removed: list[str]
    backends_changed: list[str]  # "10.0.0.11: weight 1 -> 3"
    moved: float  # share of the table that another backend gets, 0 to 1
    flows: Moved
    serving: list[str] = []  # who begins or ceases to by health: "10.0.0.11 gets new connections again: ..."


class Plan(Answer, frozen=True, kw_only=True):
    services: list[PlanService]  # without those that stay the same
    settings: list[str]
    restart: list[str]  # what a reload cannot change, in words, and what does: a takeover, or only a restart
    warnings: list[str]


class Diff(Answer, frozen=True, kw_only=True):
    """What was changed at run time, and is not in the configuration."""

    configuration: str  # the file's path; empty: arguments
    changes: list[str]  # in words
    unsaved: str  # why they are not written down for the next start; empty: they are


# ---- explain ----


class Explain(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    client: str  # "10.0.0.1:40000"
    vip: str  # "10.0.0.100:80", "tcp://10.0.0.100:80"
    offer: bool = False
    mptcp: bool = False  # the client speaks MPTCP
    join: str = ""  # token of the MPTCP connection that the SYN joins, hexadecimal; empty: of none
    down: list[str] = []  # backends that are taken to be unhealthy
    configuration: str = ""  # TOML; empty: what is served
    frame: bool = False  # with the frame that goes out


class Step(Answer, frozen=True, kw_only=True):
    what: str  # "XDP program", "service", "flow", "hash", "slot", "policy", "health", "redirect", "next hop", "out"
    outcome: str
    why: str = ""


class Explanation(Answer, frozen=True, kw_only=True):
    steps: list[Step]
    backend: str  # empty: none
    redirected: bool
    frame: str  # hexadecimal; empty: not asked for, or none goes out


# ---- capture and trace ----


class Capture(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The answer is a pcapng file, which ends at the first of its limits."""

    filter: str = ""  # crablb.filters
    seconds: float = 60.0
    packets: int = 10_000  # that came in
    bytes: int = 16_777_216  # of the file
    snaplen: int = 256  # bytes of each frame that are kept


class Trace(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The answers are steps, as they happen."""

    client: str  # an address
    vip: str = ""  # with a port or without; empty: any
    timeout: float = 60.0  # seconds
    connections: int = 1  # the next so many


class TraceStep(Answer, frozen=True, kw_only=True):
    at: float
    connection: str  # "10.0.0.1:40000 -> 10.0.0.100:80"; empty: of none
    what: str  # "in", "service", "flow", "offer", "choice", "decision", "rewritten", "out", "packet", "over", "end"
    outcome: str
    why: str = ""
