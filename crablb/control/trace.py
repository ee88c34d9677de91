"""A trace: the next connections of one client, step by step, as they happen."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterator
from dataclasses import dataclass

from crablb.api.types import Trace, TraceStep
from crablb.control.outcome import Packet, asides, choice, decision, headers
from crablb.control.pieces import Pieces
from crablb.dataplane.engine import Engine
from crablb.dataplane.tap import Seen, Tap
from crablb.errors import ConfigError, Problems
from crablb.filters import Filter, parse_client, parse_target
from crablb.model import Service, host_port
from crablb.values import counted

__all__ = ["checked", "trace"]

MAX_CONNECTIONS, MAX_SECONDS = 1000, 3600
#: Bytes of a frame that are looked at: all headers, two VLAN tags and an outer header.
SNAP = 256
#: Seconds without a packet after which a redirected connection is known to have left us.
GONE = 2.0
#: Of a connection, packets that are told one by one.
PACKETS = 20
#: Seconds after which the reader is told that there is nothing new.
SILENT = 10.0
#: Connections that are told of are traced for so long after their first FIN or RST.
ENDING = 1.0


def checked(asked: Trace) -> Filter:
    """Whose packets are traced.  Raises :class:`ConfigError`, which has every fault."""
    problems = Problems()
    client = problems.attempt("client", parse_client, asked.client)
    vip, port = (problems.attempt("vip", parse_target, asked.vip) if asked.vip else None) or (None, None)
    if not 1 <= asked.connections <= MAX_CONNECTIONS:
        problems.add("connections", f"a number from 1 to {MAX_CONNECTIONS:,}, not {asked.connections}")
    if not 0 < asked.timeout <= MAX_SECONDS:
        problems.add("timeout", f"seconds, up to {MAX_SECONDS:,}, not {asked.timeout}")
    problems.finish()
    assert client
    if vip and vip.version != client.version:
        raise ConfigError(f"no packet is from {asked.client} and to {asked.vip}: one is IPv4, one IPv6")
    return Filter(client=client, vip=vip, vip_port=port)


async def trace(engine: Engine, asked: Trace) -> Pieces[TraceStep | None]:
    """The steps of the connections that begin from now on; the last one, "end", says what ended it.  None, as it is at
    first: nothing new.

    Raises :class:`ConfigError` and :class:`KernelError` as :meth:`Engine.tap` does.
    """
    wanted = checked(asked)
    tap = await engine.tap(wanted, SNAP)
    return Pieces(tap, _Tracer(engine, asked).steps(tap))


@dataclass(slots=True)
class _Connection:
    """One that is traced.  Times are of time.monotonic()."""

    name: str
    last: float
    redirected: bool = False
    ended: bool = False  # a FIN or a RST was seen
    packets: int = 0  # behind its SYN
    over: bool = False


class _Tracer:
    def __init__(self, engine: Engine, asked: Trace) -> None:
        self._engine, self._asked = engine, asked
        self._wall = time.time() - time.monotonic()
        self._connections: dict[tuple[object, ...], _Connection] = {}

    async def steps(self, tap: Tap) -> AsyncGenerator[TraceStep | None, None]:
        end = time.monotonic() + self._asked.timeout
        yield None
        while not tap.over:
            now = time.monotonic()
            if now >= end:
                break
            for step in self._quiet(now):
                yield step
            if len(self._connections) == self._asked.connections and all(c.over for c in self._connections.values()):
                break
            waits = [c.last + (ENDING if c.ended else GONE) for c in self._connections.values() if self._awaited(c)]
            taken = await tap.take(max(0.01, min([end, now + SILENT, *waits]) - now))
            for seen in taken:
                for step in self._packet(seen):
                    yield step
            if not taken and time.monotonic() - now >= SILENT:
                yield None
        for connection in self._connections.values():
            if not connection.over:
                more = f", {counted(connection.packets, 'packet')} after its SYN" if connection.packets else ""
                yield self._step(time.monotonic(), connection.name, "over", f"still there{more}")
        yield self._step(time.monotonic(), "", "end", *self._summary(tap))

    def _summary(self, tap: Tap) -> tuple[str, str]:
        count = len(self._connections)
        said = f"{count} connection{'' if count == 1 else 's'}"
        if tap.lost:
            said += f"; {counted(tap.lost, 'packet')} missing: more came than could be told"
        if tap.over:
            return said, "the load balancer has ended"
        full = count == self._asked.connections and all(c.over for c in self._connections.values())
        why = "" if full else f"{self._asked.timeout:g} seconds are over"
        if not count:
            why += "; no SYN of this client came to a VIP here: does it reach this load balancer (crablb doctor)?"
        return said, why

    @staticmethod
    def _awaited(connection: _Connection) -> bool:
        return not connection.over and (connection.redirected or connection.ended)

    def _quiet(self, now: float) -> Iterator[TraceStep]:
        """Those of which nothing more is expected."""
        for connection in self._connections.values():
            if not self._awaited(connection):
                continue
            if connection.ended and now >= connection.last + ENDING:
                connection.over = True
                yield self._step(now, connection.name, "over", "it has ended", counted(connection.packets, "packet"))
            elif not connection.ended and now >= connection.last + GONE:
                connection.over = True
                yield self._step(
                    now, connection.name, "over", f"nothing more came for {GONE:g} s: it left us",
                    "a redirected client speaks to its backend directly: this is success",
                )  # fmt: skip

    def _step(self, at: float, connection: str, what: str, outcome: str, why: str = "") -> TraceStep:
        return TraceStep(at=self._wall + at, connection=connection, what=what, outcome=outcome, why=why)

    def _packet(self, seen: Seen) -> Iterator[TraceStep]:
        packet = headers(seen.frame)
        if not packet:
            return
        at = seen.at / 1e9
        if not packet.ports:  # an ICMP error, perhaps about one of these
            yield self._step(at, "", "packet", f"{seen.length} bytes, no TCP: {decision(seen)[1]}", self._where(seen))
            return
        key = (packet.source, packet.destination, packet.ports)
        known = self._connections.get(key)
        first = packet.syn and not packet.flags & 0x10
        if not known:
            if not first or len(self._connections) == self._asked.connections:
                return
            source = host_port(packet.source, packet.ports[0])
            known = _Connection(f"{source} -> {host_port(packet.destination, packet.ports[1])}", time.monotonic())
            self._connections[key] = known
        known.last = time.monotonic()
        if first:
            known.over = known.ended = False
            known.redirected = "redirected" in seen.counters
            yield from self._syn(at, known.name, seen, packet)
            return
        known.packets += 1
        known.ended |= bool(packet.flags & 5)
        if known.over or known.packets > PACKETS:
            if known.packets == PACKETS + 1:
                yield self._step(at, known.name, "packet", f"more than {PACKETS} packets; the rest is not told")
            return
        counter, said = decision(seen)
        if counter in ("flow", "fallback_established"):
            said = f"to {seen.backend or 'its backend'}"
        facts = "".join(f", {text}" for text in asides(seen))
        yield self._step(
            at, known.name, "packet", f"{packet.words}, {packet.data:,} bytes: {said}{facts}", self._where(seen)
        )

    def _syn(self, at: float, name: str, seen: Seen, packet: Packet) -> Iterator[TraceStep]:
        def step(what: str, outcome: str, why: str = "") -> TraceStep:
            return self._step(at, name, what, outcome, why)

        service = next((s for s in self._engine.config.services if s.vip == packet.vip), None)
        yield step("in", f"SYN, {seen.length} bytes, from {packet.source_mac}", self._where(seen))
        counter, said = decision(seen)
        if not seen.service or not service:
            yield step("service", "none", f"no service is {packet.vip}, or the packet is refused before")
            yield step("decision", said, counter)
            return
        yield step(
            "service", str(service.vip), f"mode {service.mode.value}, {counted(len(service.backends), 'backend')}"
        )
        if "retransmitted_syn" in seen.counters:
            yield step("flow", "known", "a copy of a SYN that came before")
        elif seen.known or seen.written:
            yield step("flow", "new", "the port had a connection before; this SYN begins another")
        else:
            yield step("flow", "new", "")
        yield step(
            "offer",
            "offered" if seen.offer else "none",
            "" if seen.offer else "no agent on the client, or it holds back",
        )
        if seen.backend:
            yield step("choice", str(seen.backend), self._chosen(seen, service))
        yield step("decision", said, "; ".join([counter, *asides(seen)]))
        sent = headers(seen.out) if seen.out_length else None
        if not sent:
            yield step("out", "nothing")
            return
        yield step("rewritten", self._rewritten(seen, packet, sent))
        link = self._engine.links.get(seen.out_interface)
        where = link.name if link else f"if{seen.out_interface}"
        yield step("out", f"{seen.out_length} bytes by {where} to {sent.destination_mac}", "")

    def _chosen(self, seen: Seen, service: Service) -> str:
        standing = next((b for b in service.backends if b.address == seen.backend), None)
        facts = f"weight {standing.weight}, {standing.state.value}" if standing else "not the service's any more"
        return f"{choice(seen, service)}; {facts}"

    @staticmethod
    def _rewritten(seen: Seen, before: Packet, after: Packet) -> str:
        facts = []
        if before.destination != after.destination:
            what = "outer destination" if after.ports is None else "destination"
            facts.append(f"{what} {after.destination}")
        else:
            facts.append("addresses as they were, by MAC address")
        if "redirected" in seen.counters:
            facts.append(f"a redirect to {before.destination} among the TCP options")
        elif after.ports is not None and before.options != after.options:
            facts.append("no offer among the TCP options")
        return "; ".join(facts)

    def _where(self, seen: Seen) -> str:
        link = self._engine.links.get(seen.interface)
        who = "worker" if seen.verdict is None else "XDP program alone"
        return f"{who}, {link.name if link else f'if{seen.interface}'} queue {seen.queue}"
