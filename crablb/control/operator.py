"""Everything that a person or a program may ask of a running load balancer, and tell it.

Methods take and return values of :mod:`crablb.api.types`.  They know nothing of HTTP, which is
:mod:`crablb.control.admin`.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import replace
from enum import Enum
from typing import Any

import msgspec
import structlog

from crablb import log as logging
from crablb import overlay, values
from crablb.api import types
from crablb.config import check_services, read_service
from crablb.control.capture import capture
from crablb.control.estate import Rest, Told
from crablb.control.explain import explain
from crablb.control.journal import Journal
from crablb.control.leaving import Leaving
from crablb.control.pieces import Pieces
from crablb.control.serving import BACKUP, UNCHECKED, UNKNOWN_WAY, serves
from crablb.control.state import REMEDY
from crablb.control.supervisor import Supervisor
from crablb.control.trace import trace
from crablb.control.wanted import Wanted
from crablb.dataplane.census import Census
from crablb.dataplane.events import Event, HopsChanged, Judged, Notice, Started
from crablb.errors import ConfigError
from crablb.filters import parse_target
from crablb.kernel import pins
from crablb.kernel.netlink import HopState
from crablb.model import CONSISTENT, Address, Backend, CheckKind, Config, Mode, Service, State, Vip, mapped
from crablb.options import table
from crablb.selection.standing import Pair, Standing
from crablb.values import counted, parse_address, parse_backend, parse_short_vip, parse_weight
from crablb.version import VERSION

__all__ = ["ConflictError", "NotFoundError", "Operator", "asking"]

log = structlog.get_logger()

#: Seconds that a count of flows and tables is good for: many who ask at once are answered by one.
FRESH = 1.0
#: Seconds after which what serves, and since when, is looked at anew once something has happened.
SETTLE = 0.1
#: Backends described at one go: more would keep the event loop too long.
AT_ONCE = 200
#: Services or backends that are named at most, where one is not there.
LISTED = 20
#: Flows listed at most.
MOST_FLOWS = 10_000
#: Seconds for which a failure of a background task is a problem.
LATELY = 300.0

#: Seconds without an event after which those who follow are sent something nevertheless.
PAUSE = 15.0

#: Who asks, for the log: "uid 0 (process 4711)".
asking: ContextVar[str] = ContextVar("asking", default="")


class NotFoundError(ConfigError):
    """There is no such service, or backend."""


class ConflictError(ConfigError):
    """It is there already, or cannot be just now."""


def _no(what: str, known: Iterable[str]) -> NotFoundError:
    """No guess who is meant: of addresses a similar one is another server."""
    there = tuple(known)
    more = f", and {len(there) - LISTED:,} more" if len(there) > LISTED else ""
    return NotFoundError(f"{what}; there are: {', '.join(there[:LISTED]) or 'none'}{more}")


def _service(config: Config, vip: Vip) -> Service:
    for service in config.services:
        if service.vip == vip:
            return service
    raise _no(f"there is no service {vip}", (str(s.vip) for s in config.services))


def _backend(service: Service, address: Address) -> Backend:
    for backend in service.backends:
        if backend.address == address:
            return backend
    known = (str(b.address) for b in service.backends)
    raise _no(f"{address} is no backend of {service.vip}", known)


def _vip(text: str) -> Vip:
    """``tcp://10.0.0.100:80``, ``tcp:10.0.0.100:80``, ``10.0.0.100:80``.  Raises :class:`NotFoundError`."""
    try:
        return parse_short_vip(text)
    except ConfigError as error:  # there is none of that name
        raise NotFoundError(error.problems) from None


def _address(text: str) -> Address:
    """Raises :class:`NotFoundError`."""
    if "*" in text:
        raise NotFoundError(f"{text!r} has a weight; an address alone says which backend is meant")
    try:
        return parse_address(text)
    except ConfigError as error:
        raise NotFoundError(error.problems) from None


class Operator:
    """Made round a supervisor before it starts; asked in its event loop, once it has started and until it is closed."""

    def __init__(
        self,
        supervisor: Supervisor,
        *,
        wanted: Wanted | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """``wanted``: None: there is no file, and nothing is kept."""
        self._supervisor, self._engine = supervisor, supervisor.engine
        self.wanted = wanted or Wanted(supervisor)
        self._clock = clock
        self._looked: Callable[[str], object] = lambda _: None
        #: Have another process take over, for who asks; its process id, or :class:`KernelError`.  None: this is another
        #: program's.
        self.succeed: Callable[[str], Awaitable[int]] | None = None
        #: What a takeover that failed has left.
        self.hindered: Callable[[], list[str]] = list
        self._started = clock()
        self.journal = Journal(clock)
        self._leaving = Leaving(supervisor)
        self._level = logging.level()
        self._counted: tuple[float, asyncio.Future[Census]] | None = None
        self._since: dict[Pair, tuple[bool, float]] = {}  # whether it serves, and since when
        self._looking: asyncio.TimerHandle | None = None
        self._pause = SETTLE
        supervisor.listeners.append(self._note)
        self._engine.listeners.append(self._hear)

    @property
    def listeners(self) -> list[Callable[[Event], None]]:
        """Called with each event."""
        return self._supervisor.listeners

    # ---- questions ----

    def version(self) -> types.Version:
        gap = self._engine.gap
        return types.Version(
            version=VERSION,
            api=1,
            pid=os.getpid(),
            started=self._started,
            took_over=gap.at if gap else None,
            gap=gap.seconds if gap else None,
        )

    async def status(self) -> types.Status:
        return await self._status(await self._standing())

    async def look(self) -> tuple[types.Status, list[types.Service], list[types.Backend]]:
        """Status, services and backends, for who wants all of them."""
        backends = await self.backends()
        found: dict[str, list[tuple[bool, str]]] = {}
        for backend in backends:
            found.setdefault(backend.service, []).append((backend.serving, backend.reason))
        # What is another way since, while others had their turn, is there the next time.
        services = self._engine.config.services
        standing = {s.vip: there for s in services if len(there := found.get(str(s.vip), [])) == len(s.backends)}
        return await self._status(standing), await self._services(standing), backends

    async def _slowly(self) -> AsyncIterator[Service]:
        """The services, one after the other; others have their turn in between."""
        done = 0
        for service in self._engine.config.services:
            if service.vip in self._engine.verdicts:  # it may have been removed meanwhile
                yield service
            done += len(service.backends)
            if done >= AT_ONCE:
                done = 0
                await asyncio.sleep(0)

    async def _status(self, standing: Mapping[Vip, list[tuple[bool, str]]]) -> types.Status:
        """``standing``: see :meth:`_standing`."""
        engine, health = self._engine, self._supervisor.health
        counters = engine.statistics()
        problems = self._problems(standing)
        return types.Status(
            state="degraded" if problems else "serving",
            problems=problems,
            version=self.version(),
            interfaces=[
                types.Interface(
                    name=interface.name,
                    mode=engine.modes[interface.name],  # type: ignore[arg-type]
                    mtu=interface.mtu,
                    queues=interface.rx_queues,
                    mac=interface.mac.hex(":"),
                )
                for interface in engine.interfaces
            ],
            queues=engine.queues,
            zero_copy=engine.zero_copy,
            ack_bypass=engine.bypass,
            services=len(engine.config.services),
            backends=sum(map(len, standing.values())),
            backends_serving=sum(serves for there in standing.values() for serves, _ in there),
            backends_unchecked=sum(map(health.awaited, self._pairs())),
            flows=sum((await self._census()).flows.values()),
            configuration=self.wanted.path,
            changes=len(self.changes),
            standby=sum(map(bool, map(self._supervisor.left_to, {s.vip.address for s in engine.config.services}))),
            checks_late=health.late,
            checks_untried=health.untried,
            checks_trouble=list(health.trouble),
            draining=bool(self._leaving),
            counters={"xdp": counters["xdp"], "workers": counters["total"], "daemon": counters["daemon"]},
        )

    def _problems(self, standing: Mapping[Vip, list[tuple[bool, str]]]) -> list[str]:
        """What is not as it should be, in words, the worst first.  ``standing``: see :meth:`_standing`."""
        engine, less = self._engine, []
        found = [*self.hindered(), *(f"interface {name} is gone" for name, mode in engine.modes.items() if not mode)]
        links = [engine.links[i.index] for i in engine.interfaces if engine.modes[i.name] and i.index in engine.links]
        found += [f"interface {link.name} is down, or has no carrier" for link in links if not link.running]
        for service in engine.config.services:
            there = standing.get(service.vip, [])
            if len(there) != len(service.backends):
                continue
            if not any(serves for serves, _ in there):
                reasons = ", ".join(dict.fromkeys(reason for _, reason in there))
                found.append(f"{service.vip}: no backend serves: {reasons}")
                continue
            wrong = [
                f"{backend.address}: {reason}"
                for backend, (serves, reason) in zip(service.backends, there, strict=True)
                if backend.share and not serves and reason != BACKUP
            ]
            if wrong:
                verb = "does" if len(wrong) == 1 else "do"
                of = counted(len(there), "backend")
                less.append(f"{service.vip}: {len(wrong)} of {of} {verb} not serve: {wrong[0]}")
        for vip, verdict in engine.verdicts.items():
            if verdict.panic:
                what = f"{verdict.healthy} of {verdict.weight} of the weight is healthy"
                found.append(f"{vip}: panic: {what}, so that health is disregarded")
        for vip in self._supervisor.health.withdrawn:
            found.append(f"{vip}: is not announced: too little of its weight is healthy for its quorum")
        found += less
        found += self._supervisor.health.trouble
        if uncut := self._supervisor.uncut:
            found.append(
                f"{uncut} packets between two sweeps were too long for their way (too_big), in generic mode perhaps as"
                " segments that are not cut yet: uploads crawl; ethtool -K IF gro off, ethtool -K PEER tso off gso off"
            )
        if self.changes and (trouble := self.wanted.trouble):
            found.append(f"changes at run time are not written down, and gone after a restart: {trouble}")
        if lost := self.wanted.lost:
            found.append(f"changes at run time of before are not in force: {lost}; {REMEDY}")
        if engine.task_failed and (ago := time.monotonic() - engine.task_failed[1]) < LATELY:
            found.append(
                f"background task {engine.task_failed[0]} failed {ago:.0f} s ago, and was begun anew: see the log"
            )
        return found

    async def services(self) -> list[types.Service]:
        return await self._services(await self._standing())

    async def _standing(self) -> dict[Vip, list[tuple[bool, str]]]:
        """See :meth:`_serves`, of each backend by service."""
        found: dict[Vip, list[tuple[bool, str]]] = {}
        async for service in self._slowly():
            found[service.vip] = [self._serves(service, b) for b in service.backends]
        return found

    async def _services(self, standing: Mapping[Vip, list[tuple[bool, str]]]) -> list[types.Service]:
        census, told = await self._census(), []
        async for service in self._slowly():
            serving = sum(serves for serves, _ in standing.get(service.vip, ()))
            told.append(self._describe(service, census, self._engine.service_counters([service.vip]), serving))
        return told

    async def service(self, vip: str) -> types.Service:
        service = _service(self._engine.config, _vip(vip))
        packets = self._engine.service_counters([service.vip])
        serving = sum(self._serves(service, b)[0] for b in service.backends)
        return self._describe(service, await self._census(), packets, serving)

    def _describe(
        self, service: Service, census: Census, packets: Mapping[Vip, tuple[int, int]], serving: int
    ) -> types.Service:
        verdict, forwarded = self._engine.verdicts[service.vip], packets.get(service.vip, (0, 0))
        return types.Service(
            vip=str(service.vip),
            mode=service.mode.value,
            fallback=service.fallback.value,
            policy=_policy(service),
            backends=len(service.backends),
            serving=serving,
            healthy_weight=verdict.healthy,
            weight=verdict.weight,
            panic=verdict.panic,
            backups=verdict.backups,
            quorum=service.quorum,
            announced=not (self._supervisor.withdrawn or service.vip in self._supervisor.health.withdrawn),
            in_use=self._supervisor.left_to(service.vip.address),
            flows=sum(census.flows.get((service.vip, b.address), 0) for b in service.backends),
            packets=forwarded[0],
            bytes=forwarded[1],
            changed=str(service.vip) in self.changes.services,
        )

    async def backends(self, vip: str | None = None) -> list[types.Backend]:
        """Of a service; None: of all."""
        config = self._engine.config
        services = config.services if vip is None else (_service(config, _vip(vip)),)
        census, edits = await self._census(), self.changes.services
        told: list[types.Backend] = []
        for service in services:
            verdict = self._engine.verdicts.get(service.vip)
            # It may have been removed while others had their turn.
            for backend, served in zip(service.backends, verdict.service.backends if verdict else (), strict=False):
                told.append(self._tell(service, backend, served, census, edits.get(str(service.vip))))
                if len(told) % AT_ONCE == 0:
                    await asyncio.sleep(0)
        return told

    def _tell(
        self, service: Service, backend: Backend, served: Backend, census: Census, edit: overlay.ServiceEdit | None
    ) -> types.Backend:
        engine = self._engine
        pair = service.vip, backend.address
        serving, reason = self._serves(service, backend)
        cr, cr_reason = self._redirected(service, backend, served)
        load = engine.load(*pair)
        reports = engine.reports(backend.address)
        health = self._health(pair)
        return types.Backend(
            service=str(service.vip),
            address=str(backend.address),
            state=backend.state.value,
            serving=serving,
            reason=reason,
            healthy=health.healthy,
            weight=backend.weight,
            weight_now=self._weight_now(service, served) if serving else 0,
            backup=backend.backup,
            cr=cr,
            cr_reason=cr_reason,
            reached=self._reached(backend.address),
            connections=load.open if reports else None,
            load=load.figure if reports else None,
            assigned=None if service.policy in CONSISTENT else load.assigned,
            flows=census.flows.get(pair, 0),
            share=census.shares.get(pair, 0.0),
            checks=health.checks,
            since=self._serving_since(pair, serving),
            changed=edit is not None and (edit.added is not None or str(backend.address) in edit.backends),
        )

    def _weight_now(self, service: Service, served: Backend) -> int:
        part = self._engine.part(service, served.address)
        return max(1, round(served.weight * part)) if served.weight else 0

    def _serves(self, service: Service, backend: Backend) -> tuple[bool, str]:
        """Whether a backend gets new connections; why not, or why although."""
        pair = service.vip, backend.address
        standing = self._engine.standings.get(pair, Standing())
        hop = self._engine.hops.get(backend.address)
        verdict = self._engine.verdicts[service.vip]
        serving, reason = serves(service, backend, verdict, standing, hop, self._unhealthy(pair))
        if serving and not reason and self._supervisor.health.awaited(pair):
            reason = UNCHECKED
        return serving, reason

    def _unhealthy(self, pair: Pair) -> str:
        """Why checks say that a backend is not."""
        found = self._supervisor.health.of(pair)
        return found.reason if found else ""

    def _redirected(self, service: Service, backend: Backend, served: Backend) -> tuple[bool, str]:
        """Whether clients are redirected to a backend, and why not."""
        if service.mode is Mode.NEVER:
            return False, "mode is never"
        if not backend.cr:
            return False, "cr is false"
        if backend.address.version != service.vip.address.version:
            return False, "another address family"
        if not served.cr:
            found = self._supervisor.health.of((service.vip, backend.address))
            return False, (found.cr_reason if found else "") or UNCHECKED
        if (service.vip, backend.address) in self._engine.unredirected:
            return False, "its clients complete no redirects"
        return True, ""

    def _reached(self, address: Address) -> str:
        hop = self._engine.hops.get(address)
        if hop is None:
            return UNKNOWN_WAY
        link = self._engine.links.get(hop.ifindex)
        where = link.name if link else f"if{hop.ifindex}"
        if hop.state is not HopState.RESOLVED:
            return hop.reason or hop.state.value
        return f"{where} {hop.dst_mac.hex(':')}" + (f" via {hop.gateway}" if hop.gateway else "")

    async def health(self) -> list[types.BackendHealth]:
        """What checks found out, of all backends of all services."""
        told: list[types.BackendHealth] = []
        for pair in self._pairs():
            told.append(self._health(pair))
            if len(told) % AT_ONCE == 0:
                await asyncio.sleep(0)
        return told

    def _pairs(self) -> list[Pair]:
        return [(s.vip, b.address) for s in self._engine.config.services for b in s.backends]

    def _health(self, pair: Pair) -> types.BackendHealth:
        found = self._supervisor.health.of(pair)
        return types.BackendHealth(
            service=str(pair[0]),
            address=str(pair[1]),
            healthy=found.healthy if found and found.known else None,
            checks=self._supervisor.health.results(pair),
        )

    def statistics(self) -> types.Statistics:
        counts = self._engine.statistics()
        return types.Statistics(
            xdp=counts["xdp"], workers=counts["total"], queues=counts["workers"], daemon=counts["daemon"]
        )

    def configuration(self) -> types.Configuration:
        return types.Configuration(path=self.wanted.path, settings=table(self._engine.config))

    async def count_flows(self) -> types.FlowCount:
        flows = (await self._census()).flows
        services: dict[str, dict[str, int]] = {}
        for (vip, address), n in flows.items():
            services.setdefault(str(vip), {})[str(address)] = n
        return types.FlowCount(total=sum(flows.values()), services=services)

    async def flows(
        self, vip: str | None = None, backend: str | None = None, client: str | None = None, limit: int = 100
    ) -> types.Flows:
        """``client``: an address, or an address and a port.  What has left the configuration may have flows yet."""
        if not 0 <= limit <= MOST_FLOWS:
            raise ConfigError(f"limit: {limit} is not a whole number from 0 to {MOST_FLOWS}")
        service = _vip(vip) if vip is not None else None
        address = _address(backend) if backend is not None else None
        who, port = parse_target(client) if client is not None else (None, None)
        if who and port is None and service is None and len(self._engine.config.services) > 1:
            raise ConfigError("client: without a port it is looked for in one service: say which (vip)")
        total, ending, found = await self._engine.find_flows(limit, service, address, who, port)
        if not total:
            if service:
                _service(self._engine.config, service)
            if address:
                self._known(address)
        told = [
            types.Flow(
                hash=f"{flow.hash:016x}",
                service=str(flow.vip),
                backend=str(flow.backend),
                idle=float(flow.idle),
                state=flow.state,
            )
            for flow in found
        ]
        return types.Flows(total=total, ending=ending, flows=told, truncated=total > len(told))

    def events(self, since: int = 0) -> list[types.Event]:
        """Those that are kept, after a number."""
        return self.journal.since(since)

    async def follow(self, since: int | None) -> AsyncGenerator[bytes, None]:
        """Events after a number (None: from now on), and then as they come, each as a server-sent event (WHATWG HTML,
        9.2); a comment now and then, so that who has gone is noticed."""
        yield b": crablb\n\n"
        async for events in self.journal.follow(self.journal.last if since is None else since, PAUSE):
            yield b"".join(map(_sent, events)) or b":\n\n"

    async def capture(self, asked: types.Capture) -> Pieces[bytes]:
        """See :func:`crablb.control.capture.capture`."""
        return await capture(self._engine, asked)

    async def trace(self, asked: types.Trace) -> Pieces[bytes]:
        """See :func:`crablb.control.trace.trace`; each step as a server-sent event, as of :meth:`follow`."""
        steps = await trace(self._engine, asked)
        return steps.each(lambda step: b"data: %b\n\n" % msgspec.json.encode(step) if step else b":\n\n")

    async def _census(self) -> Census:
        now = time.monotonic()
        if self._counted is None or now - self._counted[0] >= FRESH:
            self._counted = now, asyncio.ensure_future(self._engine.census())
        try:
            return await asyncio.shield(self._counted[1])
        except BaseException:
            if self._counted[1].done():
                self._counted = None
            raise

    async def explain(self, asked: types.Explain) -> types.Explanation:
        """Why a client goes where it goes.  Raises :class:`ConfigError` with every fault."""
        config = standings = None
        if asked.configuration:
            config, standings = await self.wanted.proposed(asked.configuration)
        await self._engine.stage()
        return explain(
            self._engine,
            asked.client,
            asked.vip,
            offer=asked.offer,
            mptcp=asked.mptcp,
            join=asked.join,
            down=asked.down,
            config=config,
            standings=standings,
            unhealthy=self._unhealthy,
            frame=asked.frame,
        )

    # ---- changes ----

    def patch(self, address: str, what: types.Patch, vip: str | None = None) -> types.Applied:
        """Give a backend another weight or state, in one service; None: in all that it is in."""
        given = self._checked_patch(what)
        at = _address(address)
        config = self._engine.config
        services = (
            [_service(config, _vip(vip))]
            if vip is not None
            else [s for s in config.services if any(b.address == at for b in s.backends)]
        )
        if not services:
            self._known(at)
        events, made = [], {}
        for service in services:
            old = _backend(service, at)
            new = replace(old, **given)
            for name in given:
                before, after = getattr(old, name), getattr(new, name)
                if before != after:
                    events.append(Event(name, at, service.vip, f"{_word(before)} -> {_word(after)}"))
            made[service.vip] = replace(service, backends=tuple(new if b is old else b for b in service.backends))
        return self._change(tuple(made.get(s.vip, s) for s in config.services), events)

    @staticmethod
    def _checked_patch(what: types.Patch) -> dict[str, Any]:
        given: dict[str, Any] = {}
        if what.weight is not None:
            try:
                given["weight"] = parse_weight(what.weight)
            except ConfigError as error:
                raise ConfigError([f"weight: {problem}" for problem in error.problems]) from None
        if what.state is not None:
            given["state"] = State("up" if what.state == "ready" else what.state)
        if not given:
            raise ConfigError("nothing is to be changed: give weight or state")
        return given

    def add_backend(self, vip: str, what: types.AddBackend) -> types.Applied:
        service = _service(self._engine.config, _vip(vip))
        parsed = parse_backend(what.address)
        if "*" in what.address and what.weight is not None:
            raise ConfigError(f"weight: is given twice, by {what.address!r} as well")
        new = replace(
            parsed,
            weight=parsed.weight if what.weight is None else parse_weight(what.weight),
            cr=what.cr,
            state=State(what.state),
            backup=what.backup,
        )
        if any(b.address == new.address for b in service.backends):
            raise ConflictError(f"{new.address} is a backend of {service.vip} already")
        made = replace(service, backends=(*service.backends, new))
        return self._change(
            self._with(made), [Event("backend-added", new.address, service.vip, f"weight {new.weight}")]
        )

    def remove_backend(self, vip: str, address: str) -> types.Applied:
        """It gets nothing new; the flows that it has go on."""
        service = _service(self._engine.config, _vip(vip))
        gone = _backend(service, _address(address))
        made = replace(service, backends=tuple(b for b in service.backends if b is not gone))
        return self._change(self._with(made), [Event("backend-removed", gone.address, service.vip)])

    def add_service(self, entry: dict[str, Any]) -> types.Applied:
        """``entry``: as [[service]] in a file."""
        with values.without_imports():
            new = read_service(entry)
        _harmless(new)
        if any(s.vip == new.vip for s in self._engine.config.services):
            raise ConflictError(f"{new.vip} is served already")
        backends = ", ".join(str(b.address) for b in new.backends)
        return self._change(
            (*self._engine.config.services, new), [Event("service-added", vip=new.vip, reason=f"backends {backends}")]
        )

    def remove_service(self, vip: str) -> types.Applied:
        """Its flows end."""
        gone = _service(self._engine.config, _vip(vip))
        left = tuple(s for s in self._engine.config.services if s is not gone)
        return self._change(left, [Event("service-removed", vip=gone.vip)])

    def _with(self, made: Service) -> tuple[Service, ...]:
        return tuple(made if s.vip == made.vip else s for s in self._engine.config.services)

    def _change(self, services: tuple[Service, ...], events: list[Event]) -> types.Applied:
        """Serve these; ``events`` say what is another way then."""
        if not events:
            return types.Applied(changes=[])
        config = replace(self._engine.config, services=services)
        if problems := check_services([(str(s.vip), s) for s in services], config.table_size):
            raise ConfigError(problems)
        self.wanted.apply(config)
        self.wanted.changed()
        self._engine.count("changes")
        by = asking.get()
        for event in events:
            reason = f"{event.reason}, by {by}".removeprefix(", ") if by else event.reason
            self._supervisor.tell(replace(event, reason=reason))
            log.info("changed", what=_told(event), by=by or "this program")
        return types.Applied(changes=[_told(event) for event in events])

    @property
    def changes(self) -> overlay.Changes:
        """How what is served differs from what the configuration says."""
        return self.wanted.changes

    # ---- the daemon ----

    def log_level(self, what: types.LogLevel) -> types.Applied:
        before = logging.level()
        logging.set_level(what.level)
        if before == what.level:
            return types.Applied(changes=[])
        log.info("the log's level is another", before=before, now=what.level, by=asking.get())
        return types.Applied(changes=[f"log level {before} -> {what.level}"])

    async def take_over(self) -> types.Applied:
        """Have the program that is installed now take over.  When that is answered it serves, and this one ends.

        Raises :class:`KernelError` with the reason if it does not come to that: this one goes on.
        """
        if not self.succeed:
            raise ConflictError("it runs within another program: end that one")
        process = await self.succeed(asking.get())
        return types.Applied(changes=[f"{pins.told(process)} serves in place of process {os.getpid()}"])

    def export(self) -> dict[str, Any]:
        """What is known of what has happened, and was said at run time: of :class:`.estate.Rest`."""
        return {
            "journal": Told(*self.journal.export()),
            "serving": [(str(vip), str(address), *since) for (vip, address), since in self._since.items()],
            "draining": self._leaving.export(),
            "log_level": logging.level() if logging.level() != self._level else "",
        }

    def adopt(self, rest: Rest) -> None:
        """Go on for another process, whose this was."""
        try:
            self.journal.adopt(rest.journal.last, rest.journal.events)
        except ValueError as error:  # msgspec's is one
            log.warning("events of before are not known", reason=str(error))
        known = {
            (str(s.vip), str(b.address)): (s.vip, b.address) for s in self._engine.config.services for b in s.backends
        }
        self._since = {
            known[vip, at]: (serving, since) for vip, at, serving, since in rest.serving if (vip, at) in known
        }
        self._leaving.adopt(*rest.draining)
        with suppress(ValueError):  # of another version, perhaps
            if rest.log_level:
                logging.set_level(rest.log_level)

    async def drain_lb(self, what: types.DrainLb) -> types.Drained:
        """Have open connections leave this load balancer, as far as they can."""
        told = await self._leaving.change(what, asking.get())
        self._looked(self._summary())
        return told

    async def drained(self) -> types.Drained:
        return await self._leaving.tell()

    # ---- what happens ----

    def _note(self, event: Event) -> None:
        if not (event.kind == "changed" and self.wanted.applying):  # what it was is told beside
            self.journal.add(event)

    def _hear(self, notice: Notice) -> None:
        if not isinstance(notice, Event | HopsChanged | Judged | Started):
            return
        self._counted = None  # tables may be others
        if self._looking is None:
            self._looking = asyncio.get_running_loop().call_later(self._pause, self._look)

    def _look(self) -> None:
        """Note who serves, and since when."""
        self._looking = None
        began = time.thread_time()  # a machine that has no time for us is no reason to look later still
        found = {}
        for service in self._engine.config.services:
            for backend in service.backends:
                pair = service.vip, backend.address
                serving = self._serves(service, backend)[0]
                before = self._since.get(pair)
                found[pair] = before if before and before[0] is serving else (serving, self._begun(pair, serving))
        self._since = found
        self._looked(self._summary())
        self._pause = max(SETTLE, 20 * (time.thread_time() - began))  # of many backends it takes its time

    def tell(self, looked: Callable[[str], object]) -> None:
        """Have it called with how it serves, in a line: now, and whenever that may have changed."""
        self._looked = looked
        self.close()
        self._look()

    def _summary(self) -> str:
        serving = sum(serves for serves, _ in self._since.values())
        backends, services = counted(len(self._since), "backend"), counted(len(self._engine.config.services), "service")
        gone = [f"interface {name} is gone" for name, mode in self._engine.modes.items() if not mode]
        draining = ["being drained"] if self._leaving else []
        return "; ".join([f"serving {services}, {serving} of {backends}", *gone, *draining])

    def _serving_since(self, pair: Pair, serving: bool) -> float:
        known = self._since.get(pair)
        return known[1] if known and known[0] is serving else self._begun(pair, serving)

    def _begun(self, pair: Pair, serving: bool) -> float:
        """Since when a backend serves, or does not, that has not been looked at, or was another way: now; where it is
        met first, as long as its checks, of before a restart too, say so."""
        health = self._supervisor.health
        judged = health.of(pair)
        if pair not in self._since and judged and judged.known and judged.healthy is serving:
            return health.since(pair) or self._clock()
        return self._clock()

    def close(self) -> None:
        """Listen no more.  Idempotent."""
        if self._looking:
            self._looking.cancel()
            self._looking = None

    def _known(self, address: Address) -> Address:
        """Raises :class:`NotFoundError` if it is no service's backend."""
        known = self._engine.config.backends
        if address not in known:
            raise _no(f"there is no backend {address}", map(str, sorted(known, key=mapped)))
        return address


def _sent(event: types.Event) -> bytes:
    return b"id: %d\nevent: %s\ndata: %s\n\n" % (event.number, event.kind.encode(), msgspec.json.encode(event))


def _policy(service: Service) -> str:
    return service.policy if isinstance(service.policy, str) else getattr(service.policy, "__name__", "a function")


def _word(value: object) -> str:
    return str(value.value) if isinstance(value, Enum) else str(value)


def _told(event: Event) -> str:
    """What a change did, in words."""
    match event.kind:
        case "weight" | "state":
            return f"{event.backend} of {event.vip}: {event.kind} {event.reason}"
        case "backend-added" | "backend-removed":
            return f"{event.backend} of {event.vip}: {event.kind.removeprefix('backend-')}"
        case _:
            return f"{event.vip}: {event.kind.removeprefix('service-')}"


def _harmless(service: Service) -> None:
    """Who may use the API need not be root, so no program comes in by it.  Raises :class:`ConfigError`."""
    if any(check.kind is CheckKind.EXEC for check in service.checks or ()):
        raise ConfigError("check: exec runs a program: it comes from the configuration file alone")
