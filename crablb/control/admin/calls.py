"""What can be asked: one row a method and path, from which the application and its description are made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from crablb.api import types
from crablb.control.operator import MOST_FLOWS, Operator

__all__ = ["CALLS", "Call", "Query", "Stream"]

BODY = 1 << 20  # bytes
CONFIGURATION = 16 << 20

Do = Callable[[Operator, Mapping[str, Any], Any], Any]


@dataclass(frozen=True, slots=True)
class Query:
    """A parameter behind the question mark; None if it is not given and has no default."""

    type: Any
    says: str
    default: Any = None


@dataclass(frozen=True, slots=True)
class Stream:
    """An answer without an end; ``do`` gives an asynchronous iterator of bytes, or a coroutine that does."""

    media: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    method: str
    path: str  # with {names}, which are parameters; a {vip} may hold slashes
    name: str
    says: str
    do: Do  # the parameters by name, and the body; may be a coroutine
    answer: Any  # a type, or a Stream
    query: Mapping[str, Query] = field(default_factory=dict)
    body: Any = None  # a type; ``str``: text as it is; None: there is none
    limit: int = BODY  # of its bytes

    @property
    def body_needed(self) -> bool:
        """Something of it has no default; else none is an empty object."""
        try:
            msgspec.convert({}, self.body or str)
        except msgspec.ValidationError:
            return self.body is not None and self.body is not str
        return False


#: Of an event.
_NUMBER = Annotated[int, Meta(ge=0)]
_VIP = {"vip": Query(str, "of this service alone")}

CALLS: tuple[Call, ...] = (
    Call(
        method="GET",
        path="/v1/version",
        name="version",
        says="Which crablb runs, and since when",
        do=lambda op, p, body: op.version(),
        answer=types.Version,
    ),
    Call(
        method="GET",
        path="/v1/status",
        name="status",
        says="Whether all is well, and counters",
        do=lambda op, p, body: op.status(),
        answer=types.Status,
    ),
    Call(
        method="GET",
        path="/v1/services",
        name="services",
        says="All services",
        do=lambda op, p, body: op.services(),
        answer=list[types.Service],
    ),
    Call(
        method="GET",
        path="/v1/services/{vip}",
        name="service",
        says="One service",
        do=lambda op, p, body: op.service(p["vip"]),
        answer=types.Service,
    ),
    Call(
        method="GET",
        path="/v1/backends",
        name="backends",
        says="The backends of all services, or of one: whether each serves, and why",
        do=lambda op, p, body: op.backends(p["vip"]),
        answer=list[types.Backend],
        query=_VIP,
    ),
    Call(
        method="GET",
        path="/v1/health",
        name="health",
        says="What checks found out",
        do=lambda op, p, body: op.health(),
        answer=list[types.BackendHealth],
    ),
    Call(
        method="GET",
        path="/v1/statistics",
        name="statistics",
        says="All counters",
        do=lambda op, p, body: op.statistics(),
        answer=types.Statistics,
    ),
    Call(
        method="GET",
        path="/v1/flows/count",
        name="countFlows",
        says="How many fallback flows each backend has",
        do=lambda op, p, body: op.count_flows(),
        answer=types.FlowCount,
    ),
    Call(
        method="GET",
        path="/v1/flows",
        name="flows",
        says="Fallback flows",
        do=lambda op, p, body: op.flows(p["vip"], p["backend"], p["client"], p["limit"]),
        answer=types.Flows,
        query=_VIP
        | {
            "backend": Query(str, "of this backend alone"),
            "client": Query(str, "of this client alone: an address, or an address and a port"),
            "limit": Query(int, f"how many at most, up to {MOST_FLOWS}", 100),
        },
    ),
    Call(
        method="GET",
        path="/v1/events",
        name="events",
        says="What happens, as it happens: server-sent events, whose data is an Event as JSON",
        do=lambda op, p, body: op.follow(p["since"]),
        answer=Stream("text/event-stream"),
        query={"since": Query(_NUMBER, "with those after this number; 0: all that are kept. Else from now on")},
    ),
    Call(
        method="GET",
        path="/v1/events/kept",
        name="keptEvents",
        says="The last 1,000 events",
        do=lambda op, p, body: op.events(p["since"]),
        answer=list[types.Event],
        query={"since": Query(_NUMBER, "only those after this number", 0)},
    ),
    Call(
        method="GET",
        path="/v1/config",
        name="configuration",
        says="The configuration that is served, with the changes at run time",
        do=lambda op, p, body: op.configuration(),
        answer=types.Configuration,
    ),
    Call(
        method="POST",
        path="/v1/explain",
        name="explain",
        says="What becomes of a client's SYN, step by step, and why",
        do=lambda op, p, body: op.explain(body),
        answer=types.Explanation,
        body=types.Explain,
        limit=CONFIGURATION,
    ),
    Call(
        method="POST",
        path="/v1/reload",
        name="reload",
        says="Read the configuration file again, and serve it with the changes at run time; what that has changed",
        do=lambda op, p, body: op.wanted.reload(discard=p["discard"]),
        answer=types.Plan,
        query={"discard": Query(bool, "without the changes at run time", False)},
    ),
    Call(
        method="POST",
        path="/v1/plan",
        name="plan",
        says="What the text of a configuration, or without one the file as it is now, would change",
        do=lambda op, p, body: op.wanted.plan(body),
        answer=types.Plan,
        body=str,
        limit=CONFIGURATION,
    ),
    Call(
        method="GET",
        path="/v1/diff",
        name="diff",
        says="What was changed at run time, and is not in the configuration",
        do=lambda op, p, body: op.wanted.diff(),
        answer=types.Diff,
    ),
    Call(
        method="POST",
        path="/v1/save",
        name="save",
        says="Make the changes at run time part of the configuration file",
        do=lambda op, p, body: op.wanted.save(),
        answer=types.Applied,
    ),
    Call(
        method="POST",
        path="/v1/capture",
        name="capture",
        says="Packets that come in and go out, each with what became of it, as a pcapng file",
        do=lambda op, p, body: op.capture(body),
        answer=Stream("application/vnd.tcpdump.pcap"),
        body=types.Capture,
    ),
    Call(
        method="POST",
        path="/v1/trace",
        name="trace",
        says="The next connections of a client, step by step: server-sent events, whose data is a TraceStep as JSON",
        do=lambda op, p, body: op.trace(body),
        answer=Stream("text/event-stream"),
        body=types.Trace,
    ),
    Call(
        method="POST",
        path="/v1/log-level",
        name="logLevel",
        says="The least that is logged",
        do=lambda op, p, body: op.log_level(body),
        answer=types.Applied,
        body=types.LogLevel,
    ),
    Call(
        method="POST",
        path="/v1/takeover",
        name="takeover",
        says="Have the program that is installed now take over: when this is answered it serves, and the old one ends",
        do=lambda op, p, body: op.take_over(),
        answer=types.Applied,
    ),
    Call(
        method="GET",
        path="/v1/drain-lb",
        name="drained",
        says="Whether open connections are to leave the load balancer, and which are left",
        do=lambda op, p, body: op.drained(),
        answer=types.Drained,
    ),
    Call(
        method="POST",
        path="/v1/drain-lb",
        name="drainLb",
        says="Have open connections leave the load balancer, as far as their servers can move them, or no more",
        do=lambda op, p, body: op.drain_lb(body),
        answer=types.Drained,
        body=types.DrainLb,
    ),
    Call(
        method="POST",
        path="/v1/services",
        name="addService",
        says="Serve one more; the body is a [[service]] table of a configuration file, as JSON",
        do=lambda op, p, body: op.wanted.kept(op.add_service(body)),
        answer=types.Applied,
        body=dict[str, Any],
    ),
    Call(
        method="DELETE",
        path="/v1/services/{vip}",
        name="removeService",
        says="Serve it no more; its fallback flows end",
        do=lambda op, p, body: op.wanted.kept(op.remove_service(p["vip"])),
        answer=types.Applied,
    ),
    Call(
        method="POST",
        path="/v1/services/{vip}/backends",
        name="addBackend",
        says="Give a service one more backend",
        do=lambda op, p, body: op.wanted.kept(op.add_backend(p["vip"], body)),
        answer=types.Applied,
        body=types.AddBackend,
    ),
    Call(
        method="DELETE",
        path="/v1/services/{vip}/backends/{address}",
        name="removeBackend",
        says="It gets nothing new; the fallback flows that it has go on",
        do=lambda op, p, body: op.wanted.kept(op.remove_backend(p["vip"], p["address"])),
        answer=types.Applied,
    ),
    Call(
        method="PATCH",
        path="/v1/services/{vip}/backends/{address}",
        name="changeBackend",
        says="Give a backend of a service another weight, or state",
        do=lambda op, p, body: op.wanted.kept(op.patch(p["address"], body, p["vip"])),
        answer=types.Applied,
        body=types.Patch,
    ),
    Call(
        method="PATCH",
        path="/v1/backends/{address}",
        name="changeBackendEverywhere",
        says="Give a backend another weight, or state, in all services that it is in",
        do=lambda op, p, body: op.wanted.kept(op.patch(p["address"], body)),
        answer=types.Applied,
        body=types.Patch,
    ),
)
