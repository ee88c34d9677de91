"""What an operator should know: small functions from state to advice, and the one place that calls them.

A piece of advice is a log line that says what is wrong and how to mend it, and a counter beside it where it can be
missed (``daemon`` in ``crablb status``).
"""

from __future__ import annotations

import socket
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import structlog

from crablb.dataplane.engine import Engine
from crablb.dataplane.events import Event, HopsChanged, Notice, Started, Swept
from crablb.kernel.netlink import HopState, NextHop
from crablb.model import Address, Config, Fallback, State

__all__ = ["Advice", "Adviser"]

log = structlog.get_logger()

#: From this share of `flows` on, the XDP program's table is named as nearly full.
NEARLY_FULL = 0.9
#: What a tunnel must carry for IPv6 (RFC 8200, 5), and what it takes of the way's MTU by the family outside.
IPV6_MTU = 1280
OUTER_HEADER = {4: 20, 6: 40}


@dataclass(frozen=True, slots=True)
class Advice:
    """``level``: info or warning; ``counter``: of :data:`crablb.dataplane.statistics.DAEMON_COUNTERS`."""

    level: str
    text: str
    facts: Mapping[str, Any] = field(default_factory=dict)
    counter: str | None = None


def _warning(text: str, counter: str | None = None, **facts: Any) -> Advice:
    return Advice("warning", text, facts, counter)


def unusable(hops: Mapping[Address, NextHop]) -> Iterator[Advice]:
    """Backends that nothing can be sent to yet."""
    for address, hop in hops.items():
        if hop.state is not HopState.RESOLVED:
            yield _warning("backend not usable yet", backend=str(address), reason=hop.reason)


def moved(before: Mapping[Address, NextHop], now: Mapping[Address, NextHop]) -> Iterator[Advice]:
    """Backends that have become reachable, or are not any more."""
    for address, hop in now.items():
        if hop.state is HopState.RESOLVED:
            yield Advice("info", "backend reachable", {"backend": str(address), "mac": hop.dst_mac.hex(":")})
        elif address not in before:
            yield from unusable({address: hop})
        elif before[address].state is HopState.RESOLVED:
            yield _warning("backend unreachable", "backends_lost", backend=str(address), reason=hop.reason)


def narrow_tunnels(config: Config, hops: Mapping[Address, NextHop]) -> Iterator[Advice]:
    """Tunnels that IPv6 does not fit through (RFC 8200, 5)."""
    for service in config.services:
        for backend in service.backends:
            hop = hops.get(backend.address)
            if service.vip.address.version != 6 or not hop or hop.state is not HopState.RESOLVED:
                continue
            tunnel = service.fallback is Fallback.DSR_IPIP or (service.fallback is Fallback.AUTO and not hop.on_link)
            room = hop.mtu - OUTER_HEADER[backend.address.version]
            if tunnel and room < IPV6_MTU:
                yield _warning(
                    "clients that are not redirected may stall",
                    "narrow_tunnels",
                    service=str(service.vip),
                    backend=str(backend.address),
                    reason=f"its tunnel carries {room} bytes, and IPv6 needs {IPV6_MTU};"
                    " raise the MTU of the way to it",
                )


def idle(config: Config) -> Iterator[Advice]:
    """Services none of whose backends takes new connections, as the configuration has it."""
    for service in config.services:
        if not any(backend.share for backend in service.backends):
            states = sorted({"weight 0" if b.state is State.UP else b.state.value for b in service.backends})
            yield _warning(
                "no backend of a service takes new connections",
                "services_idle",
                service=str(service.vip),
                reason=f"all are set so: {', '.join(states)}",
            )


def unreached(hops: Mapping[Address, NextHop], reached: Collection[Address]) -> Iterator[Advice]:
    """Backends whose flows pass user space all their life."""
    for address, hop in hops.items():
        if hop.state is HopState.RESOLVED and address not in reached:
            try:
                name = socket.if_indextoname(hop.ifindex)
            except OSError:  # it has gone since
                continue
            reason = (
                f"interface {name} takes no packets from XDP programs"
                " (a veth does when GRO is on at its other end: ethtool -K PEER gro on)"
            )
            yield Advice("info", "fallback flows pass user space", {"backend": str(address), "reason": reason})


def full(flows: int, refused: int, room: int) -> Iterator[Advice]:
    """Tables of flows that have no room, or soon will not."""
    if flows > NEARLY_FULL * room:
        yield _warning(
            "as many flows as `flows` allows, nearly; some may be left to user space",
            "flows_nearly_full",
            flows=flows,
            room=room,
            remedy="raise `flows`",
        )
    if refused:
        yield _warning(
            "a worker's flow cache had no room for connections; they are decided by the hash alone",
            "cache_full",
            connections=refused,
            remedy="raise `flows`",
        )


def silent(backend: Address | None) -> Iterator[Advice]:
    """A server that reported its load, and does not any more."""
    yield _warning("server has fallen silent; its load is taken for average", "reports_silent", backend=str(backend))


def redirects_stopped(event: Event) -> Iterator[Advice]:
    """A backend whose server echoes redirects, and completes none."""
    yield _warning(
        "not redirected to a backend; it gets the fallback alone",
        "redirects_stopped",
        service=str(event.vip),
        backend=str(event.backend),
        reason=event.reason + "; see crablb agent status there, and what filters the way between clients and it",
    )


class Adviser:
    """Listens to an engine, and tells what an operator should know: in the log, and by the daemon's counters."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def hear(self, notice: Notice) -> None:
        """A listener of the engine's."""
        for advice in self._advise(notice):
            getattr(log, advice.level)(advice.text, **advice.facts)
            if advice.counter:
                self._engine.count(advice.counter)

    def _advise(self, notice: Notice) -> Iterable[Advice]:
        engine = self._engine
        match notice:
            case Started():
                yield from unusable(engine.hops)
                yield from idle(engine.config)
                yield from narrow_tunnels(engine.config, engine.hops)
                if engine.bypass:
                    yield from unreached(engine.hops, engine.reached)
            case Event(kind="changed"):
                yield from idle(engine.config)
            case HopsChanged(before, now):
                yield from moved(before, now)
                if any(a not in before or hop.mtu != before[a].mtu for a, hop in now.items()):
                    yield from narrow_tunnels(engine.config, engine.hops)
            case Swept(flows, refused):
                yield from full(flows, refused, engine.config.flows)
            case Event(kind="server-silent"):
                yield from silent(notice.backend)
            case Event(kind="redirects-stopped"):
                yield from redirects_stopped(notice)
            case Event(kind="redirects-resumed"):
                yield Advice(
                    "info", "redirects work again", {"service": str(notice.vip), "backend": str(notice.backend)}
                )
