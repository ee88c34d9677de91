"""What an operator should know: small functions from state to advice, and the one place that calls them.

A piece of advice is a log line that says what is wrong and how to mend it, and a counter beside it where it can be
missed (``daemon`` in ``crablb status``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import structlog

from crablb.dataplane.engine import Engine
from crablb.dataplane.events import Event, HopsChanged, Notice, Started, Swept
from crablb.kernel.interface import Interface, interface_name
from crablb.kernel.netlink import HopState, NextHop
from crablb.model import Address, Config, Fallback, State
from crablb.seldom import Seldom

__all__ = ["Advice", "Adviser"]

log = structlog.get_logger()

#: Events of checks.
HEALTH = ("backend-healthy", "backend-unhealthy", "panic", "panic-over", "quorum-lost", "quorum-reached")
#: Whether checks are made when they are due.
TURNS = ("checks-late", "checks-in-time")
#: Lines of one kind at a time: of thousands of backends at once nobody reads each.
AT_ONCE = 20
#: From this share of `flows` on, the XDP program's table is named as nearly full.
NEARLY_FULL = 0.9
#: Packets between two sweeps that are too long, from which on in generic mode it is told: fewer are of path MTUs.
CRAWLING = 20
#: What a tunnel must carry for IPv6 (RFC 8200, 5), and what it takes of the way's MTU by the family outside.
IPV6_MTU = 1280
OUTER_HEADER = {4: 20, 6: 40}


@dataclass(frozen=True, slots=True)
class Advice:
    """``level``: info, warning or error; ``counter``: of :data:`crablb.dataplane.statistics.DAEMON_COUNTERS`."""

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
        former = before.get(address)
        if hop.state is HopState.RESOLVED and former and former.state is HopState.RESOLVED:
            yield from _changed(address, former, hop)
        elif hop.state is HopState.RESOLVED:
            yield Advice("info", "backend reachable", {"backend": str(address), "mac": hop.dst_mac.hex(":")})
        elif address not in before:
            yield from unusable({address: hop})
        elif before[address].state is HopState.RESOLVED:
            yield _warning("backend unreachable", "backends_lost", backend=str(address), reason=hop.reason)


def _changed(address: Address, before: NextHop, now: NextHop) -> Iterator[Advice]:
    """A backend that is reached as before, but by another way, or at another MAC address: which may be forged."""
    via = {"backend": str(address)} | ({"gateway": str(now.gateway)} if now.gateway else {})
    if (before.gateway, before.ifindex) != (now.gateway, now.ifindex):
        yield Advice("info", "another way to a backend", {**via, "mac": now.dst_mac.hex(":")})
    elif before.dst_mac != now.dst_mac:
        yield _warning(
            "a backend's MAC address changed; if nobody exchanged its card or machine, somebody pretends to be it",
            "backends_moved",
            **via,
            before=before.dst_mac.hex(":"),
            mac=now.dst_mac.hex(":"),
        )
    elif before.mtu != now.mtu:
        yield Advice("info", "the way to a backend has another MTU", {**via, "mtu": now.mtu})


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
        # It may have gone since.
        name = interface_name(hop.ifindex, "")
        if name and hop.state is HopState.RESOLVED and address not in reached:
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


def dropped(packets: int) -> Iterator[Advice]:
    """What came to a queue and not to its worker."""
    if packets:
        yield _warning(
            "the kernel dropped packets in front of the workers",
            "xsk_dropped",
            packets=packets,
            reason="crablb status has the kinds: xsk_rx_full, the worker had no time; xsk_rx_dropped, no frame was"
            " free, or none is long enough",
            remedy="more queues or CPUs; where one service is flooded with SYNs, a syn_rate keeps the others' room",
        )


def unsent(packets: int) -> Iterator[Advice]:
    """What the workers had decided, and could not send."""
    if packets:
        yield _warning(
            "the kernel refused to send packets, which are lost (drop_tx)",
            packets=packets,
            reason="an interface is down or its queue is full, a packet is too long for it, or there is no memory;"
            " ip -s link has the interfaces' counters",
        )


def too_long(interfaces: Iterable[Interface], narrow: Mapping[str, int]) -> Iterator[Advice]:
    """Interfaces whose MTU is larger than what a worker can be given."""
    for interface in interfaces:
        room = narrow.get(interface.name, interface.mtu)
        if interface.mtu > room:
            yield _warning(
                "long packets are dropped, unless they are known flows'",
                interface=interface.name,
                mtu=interface.mtu,
                reason=f"AF_XDP sockets of this kernel and driver take {room} bytes; lower the MTU, or use Linux 6.6",
            )


def unseen_tags(interfaces: Iterable[Interface]) -> Iterator[Advice]:
    """Interfaces that may lose the VLAN tags of what is forwarded."""
    for interface in interfaces:
        reason = "rx-vlan-offload cannot be switched off there: serve an interface of the VLAN itself"
        if interface.kind == "veth":
            reason = "the other end of a veth leaves tags beside the frames: ethtool -K PEER txvlan off there"
        yield Advice(
            "info", "packets with VLAN tags may go out without", {"interface": interface.name, "reason": reason}
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


def judged(event: Event) -> Iterator[Advice]:
    """What checks found out of a service, or a backend of it."""
    facts: dict[str, Any] = {"service": str(event.vip)} | ({"backend": str(event.backend)} if event.backend else {})
    match event.kind:
        case "backend-unhealthy":
            yield _warning("backend unhealthy", "backends_unhealthy", **facts, reason=event.reason)
        case "backend-healthy":
            yield Advice("info", "backend healthy", facts | ({"reason": event.reason} if event.reason else {}))
        case "panic":
            text = "too few backends of a service are healthy: all get connections as if they were (panic)"
            yield Advice("error", text, facts | {"weight": event.reason})
        case "panic-over":
            yield Advice("info", "enough backends of a service are healthy again: the others get nothing new", facts)
        case "quorum-lost":
            text = "a VIP is withdrawn: too few of its backends are healthy"
            yield Advice("error", text, facts | {"reason": event.reason}, "quorums_lost")
        case "quorum-reached":
            text = "a VIP is announced again: enough of its backends are healthy"
            yield Advice("info", text, facts | {"reason": event.reason})


def uncut(packets: int) -> Iterator[Advice]:
    """Generic mode sees what the sender's kernel or GRO has not cut yet."""
    yield _warning(
        "packets are too long for the way to their backend, in generic mode perhaps as segments that are not cut yet:"
        " uploads by the fallback crawl; ethtool -K IF gro off, ethtool -K PEER tso off gso off",
        packets=packets,
    )


def turns(event: Event) -> Iterator[Advice]:
    """Whether checks are made when they are due."""
    if event.kind == "checks-late":
        yield _warning("checks are late, or not made: what servers do is found out late", reason=event.reason)
    else:
        yield Advice("info", "checks are made in time again")


def interface(event: Event) -> Iterator[Advice]:
    """An interface that is served has changed."""
    facts = {"interface": event.interface}
    match event.kind:
        case "interface-gone":
            text = "an interface is gone; it is served again when there is one of its name, and others meanwhile"
            yield Advice("warning", text, facts, "interfaces_lost")
        case "interface-back":
            yield Advice("info", "an interface is there again, and served", facts)
        case "interface-renamed":
            text = "an interface has another name, and is served by it; name it so in the configuration"
            yield Advice("warning", text, facts | {"before": event.reason})
        case "interface-changed":
            yield Advice("info", "an interface has changed, and is served so", facts | {"now": event.reason})
        case "interface-unserved":
            text = "an interface, or a part of its queues, cannot be served; tried again within 30 s"
            yield Advice("warning", text, facts | {"reason": event.reason}, "interfaces_unserved")


class Adviser:
    """Listens to an engine, and tells what an operator should know: in the log, and by the daemon's counters."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._too_big = 0
        #: Packets that were too long for their way, between the last two sweeps, in generic mode; 0: few.
        self.uncut = 0
        self._seldom, self._often = Seldom(burst=5), Seldom(burst=50)

    def hear(self, notice: Notice) -> None:
        """A listener of the engine's."""
        said: Counter[str] = Counter()
        for advice in self._advise(notice):
            said[advice.text] += 1
            if said[advice.text] > AT_ONCE:
                if advice.counter:
                    self._engine.count(advice.counter)
                continue
            # Whoever forges what the kernel believes can have these come without end; servers that come and go as well.
            backend = advice.facts.get("backend")
            times = 1
            if isinstance(notice, HopsChanged) and backend:
                times = self._seldom.due((advice.text, backend))
            elif isinstance(notice, Event) and notice.kind in HEALTH:
                times = self._often.due(advice.text)
            if times:
                more = {"times": times} if times > 1 else {}
                getattr(log, advice.level)(advice.text, **advice.facts, **more)
            if advice.counter:
                self._engine.count(advice.counter)

        for text, times in said.items():
            if times > AT_ONCE:
                log.warning("the same of others; crablb backends has them all", what=text, others=times - AT_ONCE)

    def _swept(self) -> Iterator[Advice]:
        before, self._too_big = self._too_big, self._engine.statistics()["total"]["too_big"]
        more = self._too_big - before if "generic" in self._engine.modes.values() else 0
        was, self.uncut = self.uncut, more if more >= CRAWLING else 0
        if self.uncut and not was:
            yield from uncut(more)

    def _advise(self, notice: Notice) -> Iterable[Advice]:
        engine = self._engine
        match notice:
            case Started():
                yield from unusable(engine.hops)
                yield from idle(engine.config)
                yield from narrow_tunnels(engine.config, engine.hops)
                yield from too_long(engine.interfaces, engine.narrow)
                yield from unseen_tags(engine.tags_beside)
                if engine.bypass:
                    yield from unreached(engine.hops, engine.reached)
            case Event(kind="changed"):
                yield from idle(engine.config)
            case HopsChanged(before, now):
                yield from moved(before, now)
                if engine.bypass:  # GRO was switched off at the other end of a veth, for example
                    slower = {a: hop for a, hop in now.items() if a in before and before[a].redirect > hop.redirect}
                    yield from unreached(slower, engine.reached)
                if any(a not in before or hop.mtu != before[a].mtu for a, hop in now.items()):
                    yield from narrow_tunnels(engine.config, engine.hops)
            case Swept(flows, refused, lost, refused_tx):
                yield from full(flows, refused, engine.config.flows)
                yield from dropped(lost)
                yield from unsent(refused_tx)
                yield from self._swept()
            case Event(kind="server-silent"):
                yield from silent(notice.backend)
            case Event(kind="redirects-stopped"):
                yield from redirects_stopped(notice)
            case Event() if notice.kind in HEALTH:
                yield from judged(notice)
            case Event() if notice.kind in TURNS:
                yield from turns(notice)
            case Event() if notice.interface:
                yield from interface(notice)
            case Event(kind="redirects-resumed"):
                yield Advice(
                    "info", "redirects work again", {"service": str(notice.vip), "backend": str(notice.backend)}
                )
