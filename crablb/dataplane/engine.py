"""The engine: it owns the parts of the dataplane, calls them, and is the only one that does.

What is here is life (start, serve, sweep, close) and change: a configuration, a next hop, a weight that rises become a
snapshot (:mod:`.snapshot`) that is built beside the running one and published to the workers (:mod:`.queues`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from types import MappingProxyType
from typing import Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
import structlog

from crablb import lasting
from crablb._native import lib
from crablb.dataplane.attachment import Attachment, inherited, rename, reunite, ways
from crablb.dataplane.census import Census, FoundFlow, count, count_flows, find
from crablb.dataplane.events import Event, HopsChanged, Judged, LinksChanged, Notice, Started, Swept
from crablb.dataplane.flows import Inherited, flow_hash
from crablb.dataplane.handlers import Handle, Handlers, Match
from crablb.dataplane.handover import (
    Area,
    Gap,
    Known,
    Offer,
    Predecessor,
    fingerprint,
    forms,
    handed,
    lent,
    understood,
)
from crablb.dataplane.paths import Ways
from crablb.dataplane.program import Program, bypass
from crablb.dataplane.queues import Queues
from crablb.dataplane.registry import Registry
from crablb.dataplane.rehearsal import ACTIONS, Asked, Memory, Rehearsal, rehearse, syn
from crablb.dataplane.snapshot import Sight, at_once, build
from crablb.dataplane.statistics import Rounds
from crablb.dataplane.tap import Tap, Taps
from crablb.errors import ConfigError, KernelError, starved, why
from crablb.filters import Filter
from crablb.kernel import bpf
from crablb.kernel.interface import Interface, interface_info
from crablb.kernel.netlink import HopState, Link, NextHop, NextHops
from crablb.model import Address, Bypass, Config, Service, State, Vip, mapped
from crablb.options import fixed_fields, remedy
from crablb.seldom import Seldom
from crablb.selection.completion import Completions
from crablb.selection.custom import Custom
from crablb.selection.loads import WHOLE, Balance, Load
from crablb.selection.standing import Pair, Standing, Verdict, judge

__all__ = ["Engine"]

log = structlog.get_logger()

T = TypeVar("T")

#: How long the start waits for the backends' neighbours before it serves with those that answered, in seconds.
RESOLVE_TIMEOUT = 1.0
SWEEP_INTERVAL = 30.0  # seconds
#: Descriptors kept back for what is opened and closed while it serves, and as many for the end, which clears away.
SPARE = 8
#: How often schedules are worked out anew, and the loads of backends that do not report aged, in seconds.
REFRESH_INTERVAL = 0.1
AGE_INTERVAL = 1.0
#: How often what a takeover that failed has left otherwise is put right, if that is refused; seconds.
RECLAIM_INTERVAL = 1.0
#: Reasons why not, that are told.
TOLD = 3
#: What does what a takeover does not.
RESTART = "restart it: crablb serve without --takeover, when it has ended (keep = SECONDS there: no flow is lost)"


class Engine:
    """Serve the services of a configuration on its interfaces.

    Make it in the network namespace of the interfaces; then ``await start()`` and at the end ``await close()``, which
    leaves nothing in the kernel unless it is told to keep flows.  Methods are to be called from the event loop.

    ``listeners`` are called, in the event loop, with each :class:`.events.Notice`.

    Raises :class:`KernelError` (no such interface, it is down, it has an XDP program of somebody else, another process
    serves it) or one of its kinds; nothing stays in the kernel then.
    """

    def __init__(
        self, config: Config, seed: bytes, *, threads: bool = True, predecessor: Predecessor | None = None
    ) -> None:
        """``seed``: 16 bytes; ``threads``: False to work on packets by :meth:`process_once` alone; ``predecessor``: the
        engine of another process, in whose place this one serves (:mod:`.handover`)."""
        self._predecessor = predecessor
        self._area: Area | None = None  # what is given, or taken
        self._theirs: bpf.Map | None = None  # where another process has, or had, registered the sockets
        self._held = self._given = False  # a successor is to take all; it has
        self.config = config
        self.threads = threads
        self.seed = seed
        self.listeners: list[Callable[[Notice], None]] = []
        self.failure: asyncio.Future[str] | None = None  # why it cannot go on
        self._attachments = [Attachment(name) for name in config.interfaces]
        self._balance = Balance()
        self._completions = Completions()
        self._standings: dict[Pair, Standing] = {}
        self._verdicts: dict[Vip, Verdict] = {}
        self._judged: dict[Vip, Service] = {}  # what these are about
        self._news: set[Vip] = set()  # services of which more was found out since
        self._usable: tuple[object, frozenset[Address]] = None, frozenset()  # of hops
        self._warm: Collection[Pair] = ()  # who does not begin slowly if it begins to serve now
        self._served = config  # with the backends as their standing has them
        self._custom = Custom(self._policy_failed)
        self._handlers = Handlers(self._handler_failed)
        self._queues = Queues(config, self._handlers, self._custom, self._socket_failed)
        self._taps = Taps(self._queues, self._attachments, self._publish, lambda: self._registry.backends)
        # Made at the start:
        self._program: Program | None = None
        self._registry = Registry(0)
        self._answered: frozenset[Address] = frozenset()  # VIPs whose other packets are user space's
        self._nexthops: NextHops | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._sweeper = ThreadPoolExecutor(1, "crablb-sweep")
        self._stack = ExitStack()
        self._spare: list[int] = []
        self._locks: list[int] = []  # of a predecessor, by interface
        self._unclaimed: dict[str, list[str]] = {}  # why an interface is not wholly this one's, after a takeover failed
        self._same_memory = False  # as its workers' has
        self.gap: Gap | None = None  # of the takeover, if this one serves in another's place
        # What has happened:
        self._resolved = asyncio.Event()
        self._owed = asyncio.Event()  # a snapshot is to follow, with the tables that there was no time for
        self._attached = False
        self._seldom = Seldom()
        self._tried: dict[str, Interface] = {}  # interfaces as they were when last they were fitted
        self._unfit: dict[str, str] = {}  # those that could not be, and why
        self._sweep_soon = asyncio.Event()
        self._pathed: tuple[object, ...] = (None,)  # what the XDP program's paths were made of
        self._applied: list[Config] = []  # the configurations since the last sweep began
        self.task_failed: tuple[str, float] | None = None  # the last one, and when, of the monotonic clock
        self._stepped = time.monotonic()  # when weights were last looked at
        # Connections that the flow caches had no room for, packets that the kernel dropped, and those that it would not
        # send, when last looked at:
        self._refused = self._dropped = self._unsent = 0

    # ---- what there is to know ----

    @property
    def bypass(self) -> bool:
        """Whether the XDP program may forward known fallback flows by itself."""
        return bypass(self.config)

    @property
    def interfaces(self) -> list[Interface]:
        """Those that are served, as they are now; of one that is gone, as it was."""
        return [attachment.info for attachment in self._attachments]

    @property
    def tags_beside(self) -> list[Interface]:
        """Those whose frames' VLAN tags may be unseen, and lost."""
        return [attachment.info for attachment in self._attachments if attachment.tags_beside]

    @property
    def modes(self) -> dict[str, str]:
        """How the XDP program is attached, by interface: ``native`` or ``generic``; empty while that is gone."""
        return {attachment.info.name: attachment.mode for attachment in self._attachments}

    @property
    def queues(self) -> int:
        """How many queues are served, of all interfaces together."""
        return len(self._queues)

    @property
    def zero_copy(self) -> bool:
        """Whether all sockets are in zero-copy mode."""
        return self._queues.zero_copy

    @property
    def narrow(self) -> Mapping[str, int]:
        """Of the interfaces, those that take no IP packet, other than known flows', of more than so many bytes."""
        return self._queues.narrow

    @property
    def hops(self) -> Mapping[Address, NextHop]:
        """The ways to the backends, as they are now."""
        return MappingProxyType(self._nexthops.current) if self._nexthops else {}

    @property
    def links(self) -> Mapping[int, Link]:
        """The network namespace's interfaces, by index."""
        return self._nexthops.links if self._nexthops else {}

    @property
    def reached(self) -> frozenset[Address]:
        """The backends whose known fallback flows the XDP program forwards by itself."""
        return self._program.paths.reached if self._program else frozenset()

    @property
    def unclaimed(self) -> list[str]:
        """What is not as it was before a takeover that failed, and is tried again, by interface."""
        return [
            f"{name}: not all is as it was before the takeover that failed: {'; '.join(failed[:TOLD])}"
            for name, failed in self._unclaimed.items()
        ]

    @property
    def served(self) -> Config:
        """The configuration with each backend's state and cr as health has them now."""
        return self._served

    @property
    def verdicts(self) -> Mapping[Vip, Verdict]:
        """What health makes of each service."""
        return MappingProxyType(self._verdicts)

    @property
    def unredirected(self) -> frozenset[Pair]:
        """The backends of services that complete no redirects, and get none now."""
        return self._completions.stopped()

    @property
    def standings(self) -> Mapping[Pair, Standing]:
        """What checks found out, of those that something was found out about."""
        return MappingProxyType(self._standings)

    def load(self, vip: Vip, backend: Address) -> Load:
        """What the policies know of a backend."""
        return self._balance.read(vip, backend)

    def reports(self, backend: Address) -> bool:
        """Whether its server reports its load."""
        return self._balance.reports(backend)

    async def census(self, *, shares: bool = True) -> Census:
        """Count, in a thread of its own: the flows and, if ``shares``, the places in the tables of each backend of each
        service."""
        snapshot = self._queues.snapshot
        tables = dict(snapshot.chosen) if snapshot and shares else {}
        backends = {number: address for address, number in self._registry.backends.items()}
        services = {number: vip for vip, number in self._registry.services.items()}
        flows = self._running.flows
        return await self._aside(lambda: count(flows, tables, backends, services))

    async def open_flows(self) -> dict[tuple[Vip | None, Address], int]:
        """How many fallback flows each backend of each service has whose client has not begun to end them, counted in a
        thread of its own.  Where the XDP program forwards none, nobody knows of which service they are (None)."""
        backends = {number: address for address, number in self._registry.backends.items()}
        services = {number: vip for vip, number in self._registry.services.items()}
        flows = self._running.flows

        def look() -> dict[tuple[Vip | None, Address], int]:
            if flows:
                found = count_flows(flows, backends, services, open_only=True)
                return {(vip, address): n for (vip, address), n in found.items()}
            counts = np.zeros(1 << 16, np.uint32)
            self._queues.count(counts, open_only=True)
            return {(None, backends[int(n)]): int(counts[n]) for n in np.flatnonzero(counts) if int(n) in backends}

        return await self._aside(look)

    async def find_flows(
        self, limit: int, vip: Vip | None, backend: Address | None, client: Address | None, port: int | None
    ) -> tuple[int, int, list[FoundFlow]]:
        """How many of the XDP program's flows are of a service, of a backend, of a client (from one of its ports), how
        many of them are ending, and ``limit`` of them; None: whichever.  A client without a port is looked for by every
        port that it may have."""
        backends = {n: address for address, n in self._registry.backends.items() if backend in (None, address)}
        services = {n: v for v, n in self._registry.services.items() if vip in (None, v)}
        flows = self._running.flows
        if not flows:
            return 0, 0, []
        ports = range(1, 65536) if port is None else [port]

        def hashes() -> list[int] | None:
            if client is None:
                return None
            same = [v for v in services.values() if v.address.version == client.version]
            return [flow_hash(self.seed, client, p, v.address, v.port) for v in same for p in ports]

        return await self._aside(lambda: find(flows, backends, services, limit, hashes()))

    async def _aside(self, work: Callable[[], T]) -> T:
        """Do it in the sweeper's thread."""
        working = asyncio.get_running_loop().run_in_executor(self._sweeper, work)
        try:
            return await asyncio.shield(working)
        except asyncio.CancelledError:
            await working  # it reads what is freed when the engine is closed
            raise

    def part(self, service: Service, backend: Address) -> float:
        """Of a backend's weight, what counts at this moment: 1.0; less while it warms up; what its agent says."""
        return self._balance.part(service, backend, time.monotonic())

    def statistics(self) -> dict[str, Any]:
        """Packets by what became of them: see :func:`crablb.dataplane.statistics.read`."""
        return self._running.statistics(self._queues.slots)

    def rounds(self) -> dict[tuple[str, int], Rounds]:
        """How the workers' rounds were, by interface and queue, in the order of ``statistics()["workers"]``."""
        return self._queues.rounds()

    def late(self) -> list[str]:
        """The queues whose workers have not shown life since the last time that all had."""
        return self._queues.late()

    @property
    def published(self) -> int:
        """Snapshots given to the workers, since the start."""
        return self._queues.published

    async def stage(self) -> None:
        """Have what :meth:`rehearse` needs.  Raises :class:`KernelError`."""
        if any(attachment.mode for attachment in self._attachments):
            await asyncio.get_running_loop().run_in_executor(self._sweeper, self._running.load_aside)

    def rehearse(
        self,
        client: Address,
        port: int,
        vip: Vip,
        *,
        offer: bool = True,
        mptcp: bool = False,
        join: bytes | None = None,
        config: Config | None = None,
        standings: Mapping[Pair, Standing] | None = None,
        down: Collection[Address] = (),
    ) -> Rehearsal:
        """What would become of a SYN from ``client`` and ``port`` now, by the code that decides it; nothing that serves
        is changed.  After :meth:`stage`.

        ``offer``: it makes one; ``mptcp``, ``join``: as :func:`.rehearsal.syn` has them; ``config``: if that were
        served, with these ``standings``; ``down``: backends that are taken to be unhealthy.
        """
        config = config or self.config
        attachment = next((a for a in self._attachments if a.mode), self._attachments[0])
        form = config.option if offer else None
        frame = syn(client, port, vip, attachment.info.mac, form, mptcp=mptcp, join=join)
        action = ACTIONS[self._running.ask(frame, attachment.info.index)] if attachment.mode else "none"
        asked = Asked(client, port, vip, attachment.info, frame, action, frozenset(down))
        sight = self._sight(time.monotonic())
        found = self._standings if standings is None else standings
        joins = self._queues.joins
        return rehearse(asked, config, sight, found, self._custom, self._remembered, joins)

    def _remembered(self, connection: int) -> list[Memory]:
        """What is known of a connection that goes by fallback, by its hash."""
        states = {lib.CRAB_MEMORY_SYN: "new", lib.CRAB_MEMORY_OPEN: "open", lib.CRAB_MEMORY_ENDING: "ending"}
        found = [
            Memory(f"queue {queue} of {name}", memory.backend, states[memory.state], memory.idle)
            for name, queue, memory in self._queues.recall(connection)
        ]
        if self._program and self._program.flows and (written := self._program.flows.find(connection)):
            flow, idle = written
            state = "ending" if flow["state"] == lib.CRAB_FLOW_ENDING else "open"
            found.append(Memory("the XDP program", int(flow["backend"]), state, idle))
        return found

    def service_counters(self, vips: Iterable[Vip] | None = None) -> dict[Vip, tuple[int, int]]:
        """What the XDP program forwarded by itself, packets and bytes, of these services; None: of all."""
        program, indices = self._running, self._registry.services
        wanted = [s.vip for s in self.config.services] if vips is None else vips
        return {vip: program.forwarded(indices[vip]) for vip in wanted}

    # ---- what it is told ----

    def count(self, what: str) -> None:
        """Add one to a daemon counter, a name of :data:`crablb.dataplane.statistics.DAEMON_COUNTERS`."""
        if self._program:
            self._program.counters.add(what)

    def report(
        self,
        backend: Address,
        loads: Mapping[Vip, tuple[int, int]],
        redirects: Mapping[Vip, tuple[int, int]] | None = None,
    ) -> bool:
        """A server's report: by VIP its connections, and its load in thousandths; redirects begun and completed.

        True if it is the first.
        """
        now = time.monotonic()
        for service in self.config.services:
            if not any(b.address == backend for b in service.backends):
                continue
            if service.vip in loads:
                self._balance.report(service.vip, backend, *loads[service.vip])
            if redirects and service.vip in redirects:
                self._completed(service.vip, backend, *redirects[service.vip], now)
        return self._balance.heard(backend, now)

    def _completed(self, vip: Vip, backend: Address, begun: int, completed: int, at: float) -> None:
        verdict = self._completions.report(vip, backend, begun, completed, at)
        if verdict == "stopped":
            self._publish()
            seconds = self._completions.back_off(vip, backend)
            self._tell(Event("redirects-stopped", backend, vip, f"it completes none; tried again in {seconds:.0f} s"))
        elif verdict == "resumed":
            self._publish()
            self._tell(Event("redirects-resumed", backend, vip))

    def judge(self, standings: Mapping[Pair, Standing], warm: Collection[Pair] = ()) -> None:
        """What was found out about some backends of services, which takes the place of what was known of them.

        Also before the start.  Of a backend that nothing is said of all is well.  ``warm``: those that do not begin
        slowly if they begin to serve now.
        """
        before = self._standings
        self._learn(standings)
        if not self._attached or self._standings is before:
            return
        self._warm = warm
        try:
            self._publish()
        except BaseException:
            self._standings = before  # it can be said again
            self._news |= {vip for vip, _ in standings}
            raise
        finally:
            self._warm = ()
        self._tell(Judged())

    def _learn(self, standings: Mapping[Pair, Standing]) -> None:
        well = Standing()
        changed = {pair: s for pair, s in standings.items() if self._standings.get(pair, well) != s}
        if changed:
            self._standings = self._standings | changed
        for pair, standing in changed.items():
            self._balance.give(pair, standing.percent or WHOLE)
            self._news.add(pair[0])

    def _judge(self) -> None:
        """Work out how each service is served now; tell where health is disregarded, and where no more."""
        before, services = self._verdicts, self.config.services
        old = {vip: before[vip] for vip in before.keys() - self._news}
        self._verdicts = {
            service.vip: old[service.vip]
            if service.vip in old and self._judged[service.vip] is service
            else judge(service, self._standings)
            for service in services
        }
        self._judged = {service.vip: service for service in services}
        self._news.clear()
        made: list[Service] = [self._verdicts[service.vip].service for service in services]
        same = all(new is old for new, old in zip(made, services, strict=True))
        self._served = self.config if same else replace(self.config, services=tuple(made))
        for vip, verdict in self._verdicts.items():
            panicked = vip in before and before[vip].panic
            if verdict.panic and not panicked:
                self.count("panics")
                facts = f"{verdict.healthy} of {verdict.weight} of the weight is healthy"
                self._tell(Event("panic", vip=vip, reason=facts))
            elif panicked and not verdict.panic:
                self._tell(Event("panic-over", vip=vip))

    def export(self) -> dict[str, Any]:
        """What is known of the backends beside their standings, as plain values for :meth:`adopt`."""
        return {"balance": self._balance.export(), "completions": self._completions.export()}

    def adopt(self, known: Mapping[str, Any]) -> None:
        """Go on with what the engine of another process on this machine knew of the backends.

        Raises ``LookupError``, ``TypeError``, ``ValueError``, ``ArithmeticError`` for what is nothing of the kind.
        """
        self._balance.adopt(known["balance"], self.config.services)
        self._completions.adopt(known["completions"], self.config.services)
        self._publish()

    def handle(self, match: Match, function: Handle) -> None:
        """See :meth:`crablb.LoadBalancer.handle`."""
        self._handlers.add(match, function)
        self._publish()
        self._running.take_frames(self._handlers.matches())

    def unhandle(self, match: Match) -> None:
        """See :meth:`crablb.LoadBalancer.unhandle`."""
        self._handlers.remove(match)
        # Frames come only while the workers know what to do with them.
        self._running.take_frames(self._handlers.matches())
        self._publish()

    async def tap(self, wanted: Filter, snap: int) -> Tap:
        """See packets, and what becomes of them, until it is closed.  ``snap``: bytes of each frame, from 1 to
        :data:`.tap.MAX_SNAP`.

        Raises :class:`ConfigError` (there are enough of them, no such backend) and :class:`KernelError`.
        """
        if not self._attached:
            raise KernelError("nothing is served, so no packets can be seen")
        return await self._taps.open(self._running, wanted, snap, self._sweeper, self.task)

    def process_once(self, timeout: float) -> int:
        """See :meth:`crablb.LoadBalancer.process_once`."""
        return self._queues.once(timeout)

    # ---- life ----

    async def start(self) -> None:
        """Bind, attach, and serve.  On return every backend that answers is in use."""
        try:
            await self._start()
        except BaseException as error:
            self._attached = False  # what did not come to serve keeps nothing
            await self.close()
            raise starved(error) or error from None

    async def _start(self) -> None:
        loop = asyncio.get_running_loop()
        self.failure = loop.create_future()
        self._keep_back(2 * SPARE)
        for attachment in self._attachments:
            self._stack.enter_context(attachment.own(later=self._predecessor is not None))
        if not self._predecessor:
            reunite()
        for attachment in self._attachments:
            attachment.find(living=self._predecessor is not None)
        interfaces = {a.name: a.info for a in self._attachments}
        if self._predecessor:
            program, left = self._accept(self._predecessor, interfaces)
        else:
            left = inherited(self._attachments, self.seed) if self.bypass else None
            program = self._program = Program(self.config, self.seed, left)
            self._registry = Registry(
                program.service_room, left.backends if left else None, left.services if left else None
            )
            self._registry.admit(self.config)
            self._queues.open(program.maps, interfaces, program.flows)

        self._nexthops = NextHops(self._hops_changed, self._links_changed, self.task)
        await self._nexthops.start(self._registry.backends, self.config.vips)
        self._judge()
        await self._resolve()
        self._publish()
        flows = program.flows.flows() if left and program.flows else None
        if flows is not None:
            self._queues.adopt(flows)
        program.limits.publish(self.config.services, self._registry.services)
        program.serve((service.vip for service in self.config.services), self._registry.services)
        # Its thread from now on: later there may be no memory for one, and what was asked for would come at any time.
        await loop.run_in_executor(self._sweeper, lambda: None)
        self._tasks = [
            self.task("sweep", self._sweep),
            self.task("balance", self._keep_balance),
            self.task("publish", self._publish_owed),
        ]
        living = self._predecessor is not None
        stopped = self._take(self._predecessor) if self._predecessor else 0.0
        if self.threads:
            self._queues.start(sorted(os.sched_getaffinity(0)))
        if stopped:
            seconds = time.monotonic() - stopped
            self.gap = Gap(time.time() - seconds, seconds)
        self._forget_area()  # after the threads' start: it takes milliseconds, and packets wait no more
        if flows is not None:
            log.info("took over fallback flows", flows=len(flows))
        for attachment in self._attachments:
            attachment.attach(program, self.config.xdp_mode, living=living)
        self._attached = True
        # What another one bound was perhaps for another MTU, or fewer queues.
        self._tried = {} if living else {attachment.name: attachment.info for attachment in self._attachments}
        self._publish()  # what the XDP program can reach depends on how it is attached
        for attachment in self._attachments:
            attachment.settle()
        self._tell(Started())
        self._nexthops.look()  # what has changed since we looked at the interfaces
        self._keep_back(SPARE)

    def _keep_back(self, count: int) -> None:
        """Hold so many descriptors, so that a process that may have few fails at its start, and not afterwards."""
        while len(self._spare) > count:
            os.close(self._spare.pop())
        while len(self._spare) < count:
            self._spare.append(os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))

    async def _resolve(self) -> None:
        """Wait for all next hops that can still resolve, for a moment."""
        if any(hop.state is HopState.UNRESOLVED for hop in self.hops.values()):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RESOLVE_TIMEOUT):
                    await self._resolved.wait()

    # ---- from one process to the next: crablb.dataplane.handover ----

    def hold(self) -> None:
        """A successor is on its way: nothing changes until it has taken all, or :meth:`resume`.

        Raises :class:`KernelError` if nothing is served, or there is a successor already.
        """
        if not self._attached:
            raise KernelError("nothing is served yet")
        if self._held:
            raise KernelError("another process is taking over already")
        if not all(attachment.mode for attachment in self._attachments):
            gone = ", ".join(a.info.name for a in self._attachments if not a.mode)
            raise KernelError(f"{gone} is gone, and what is served in its place cannot be taken over")
        self._held = True

    def offer(self) -> tuple[Any, list[int]]:
        """What a successor's :class:`.handover.Predecessor` has: plain values, and descriptors, which stay ours."""
        ports, joins, fds = self._queues.offer()
        offer = Offer(
            interfaces=tuple(attachment.info.name for attachment in self._attachments),
            seed=fingerprint(self.seed),
            forms=forms(),
            backends={mapped(address).hex(): number for address, number in self._registry.backends.items()},
            services={vip.key().hex(): number for vip, number in self._registry.services.items()},
            ports=ports,
            joins=joins,
        )
        self._area = Area(offer.sizes)
        self._queues.show_memory(self._area)
        locks = [attachment.lock for attachment in self._attachments]
        return msgspec.to_builtins(offer), [*locks, self._area.fd, *fds, self._running.maps["sockets"].fd]

    def give(self, fds: list[int]) -> Any:
        """Work on no more packets, which wait; what the workers knew, as plain values.  ``fds``: see
        :meth:`.handover.Predecessor.take`; ours from now on.  Raises :class:`KernelError`."""
        assert self._held and self._area
        with handed(fds) as each:
            self._theirs = lent(next(each, -1))
        self._given = True
        return msgspec.to_builtins(self._queues.give(self._area))

    def resume(self) -> None:
        """Serve on, as the successor is gone; whatever it had done by then.

        Packets first.  What else cannot be as it was is told, and tried again.
        """
        self._held = self._given = False
        self._forget_area()
        self._queues.resume({attachment.name: attachment.info for attachment in self._attachments})
        self._running.paths.mistrust()
        self._pathed = (None,)
        self._owed.set()  # a task publishes, which is begun anew if it fails
        self._sweep_soon.set()
        if self._nexthops:
            self._nexthops.look()
        self._reclaim()
        self._running.counters.read()

    def _reclaim(self) -> None:
        """Have the interfaces be this one's again, as far as they are not."""
        if not self._attached or self._held:
            return
        before, self._unclaimed = self._unclaimed, {}
        for attachment in self._attachments:
            if failed := attachment.reclaim(self._running):
                self._unclaimed[attachment.name] = failed
                if before.get(attachment.name) != failed:
                    log.error(
                        "not all is as it was before the takeover that failed; packets are served, and it is tried"
                        " again",
                        interface=attachment.info.name,
                        seconds=RECLAIM_INTERVAL,
                        reason="; ".join(failed[:TOLD]),
                        more=max(len(failed) - TOLD, 0),
                    )
        if self._unclaimed:
            asyncio.get_running_loop().call_later(RECLAIM_INTERVAL, self._reclaim)
            return
        self._unregister()  # packets go by it no more
        if before:
            log.info("all is as it was before the takeover that failed", interfaces=sorted(before))

    def _unregister(self) -> None:
        """No other process's program gives the sockets packets any more: have its map be forgotten."""
        if self._theirs:
            self._queues.unregister(self._theirs)
            self._theirs.close()
            self._theirs = None

    async def leave(self) -> None:
        """In place of :meth:`close`, when the successor serves: all is its, and stays."""
        await self._stop_tasks()
        self._forget_area()
        for attachment in self._attachments:
            attachment.give()
        self._take_down(keep=True)
        if self._nexthops:
            await self._nexthops.close(leave=True)
        self._let_go()

    def _forget_area(self) -> None:
        if self._area:
            self._queues.forget_memory()
            self._area.close()
            self._area = None

    def _accept(
        self, predecessor: Predecessor, interfaces: Mapping[str, Interface]
    ) -> tuple[Program, Inherited | None]:
        """Get ready for what another process serves with."""
        names = tuple(interface.name for interface in interfaces.values())
        with handed(predecessor.fds) as fds:
            offer = understood(predecessor.values, Offer)
            if offer.interfaces != names:
                raise KernelError(f"{', '.join(offer.interfaces)} is served, not {', '.join(names)}; {RESTART}")
            if offer.seed != fingerprint(self.seed):
                raise KernelError(f"it has another seed, and would lead connections elsewhere; {RESTART}")
            for attachment in self._attachments:
                if self.config.xdp_mode.value not in ("auto", attachment.found):
                    found, wanted = attachment.found or "not attached", self.config.xdp_mode.value
                    raise KernelError(f"the XDP program of {attachment.info.name} is {found}, not {wanted}; {RESTART}")
            self._locks = [next(fds) for _ in self._attachments]
            self._area = Area(offer.sizes, next(fds))
            same = {name: offer.forms.get(name) == form for name, form in forms().items()}
            numbers = offer.numbers
            left = inherited(self._attachments, self.seed, numbers, counting=same["counters"])
            program = self._program = Program(self.config, self.seed, left)
            self._registry = Registry(program.service_room, numbers.backends, numbers.services)
            self._registry.admit(self.config)
            self._queues.accept(program.maps, interfaces, program.flows, offer.ports, fds)
            self._theirs = lent(next(fds, -1))
            if same["memory"]:
                self._queues.look_at_memory(self._area)
        self._same_memory = same["memory"]
        return program, left if self.bypass else None

    def _take(self, predecessor: Predecessor) -> float:
        """Be the one who serves, from now on.  When the other's workers were told to stop, as :class:`Known` has it."""
        assert self._area
        known = understood(predecessor.take([self._running.maps["sockets"].fd]), Known)
        if not self._queues.take(known, self._area, same=self._same_memory) and not self.bypass:
            log.warning("fallback flows are given up", reason="flows is another number, or it was another version")
        while self._locks:
            self._attachments[-len(self._locks)].inherit(self._locks.pop(0))
        return known.stopped

    def begun(self) -> None:
        """Have ``crablb status`` know that all is there that this one's owner starts."""
        self._predecessor = None
        self._unregister()  # perhaps it dies before it has done that itself
        for attachment in self._attachments:
            attachment.begun()

    async def close(self) -> list[str]:
        """Stop serving; leave nothing in the kernel, or for ``keep`` seconds what a daemon that is killed does.
        Returns the interfaces where something is left.  Idempotent.
        """
        await self._stop_tasks()
        kept = self._attached and bool(self.config.keep) and self.bypass and not self._predecessor
        self._take_down(keep=kept)
        if self._nexthops:
            await self._nexthops.close(leave=self._predecessor is not None)
        self._let_go()
        return [attachment.info.name for attachment in self._attachments] if kept else []

    async def _stop_tasks(self) -> None:
        self._keep_back(0)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()

    def abandon(self) -> None:
        """Leave nothing in the kernel, where there is no event loop any more to :meth:`close` in."""
        self._keep_back(0)
        self._take_down(keep=False)
        if self._nexthops:
            self._nexthops.abandon()
        self._let_go()

    def _take_down(self, *, keep: bool) -> None:
        """Take no packets any more.  ``keep``: leave the XDP program, and the flows."""
        self._taps.end()
        self._sweeper.shutdown()
        for attachment in self._attachments:
            if self._predecessor:
                attachment.back_out()
            elif keep:
                attachment.leave()
            else:
                attachment.detach()
        self._attached = False
        self._queues.close()

    def _let_go(self) -> None:
        self._nexthops = None
        if self._program:
            self._program.close()
            self._program = None
        self._stack.close()
        self._forget_area()
        if self._theirs:
            self._theirs.close()
            self._theirs = None
        while self._locks:
            os.close(self._locks.pop())

    @property
    def _running(self) -> Program:
        assert self._program, "the engine is not running"
        return self._program

    def _tell(self, notice: Notice) -> None:
        for listener in list(self.listeners):
            try:
                listener(notice)
            except Exception as error:  # whatever somebody's listener does is no matter of ours
                log.error("a listener failed", notice=str(notice), **why(error))

    def _from_thread(self, do: Callable[[], None]) -> None:
        """Run in the event loop what a worker's thread has to say."""
        if self.failure:
            self.failure.get_loop().call_soon_threadsafe(do)

    def task(self, name: str, work: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
        """Work that is never done.  If it fails it is begun anew, and counted; if for good, the engine fails.

        Nobody would notice what is not done any more.
        """

        def failed() -> None:
            self.task_failed = name, time.monotonic()
            self.count("tasks_failed")

        return lasting.task(name, work, failed, self._failed)

    def _failed(self, reason: str) -> None:
        if self.failure and not self.failure.done():
            self.failure.set_result(reason)
            self._tell(Event("failed", reason=reason))

    def _policy_failed(self, vip: Vip, reason: str) -> None:
        """From a worker's thread."""

        def note() -> None:
            self.count("policy_failed")
            self._tell(Event("policy-failed", vip=vip, reason=reason))

        self._from_thread(note)

    def _handler_failed(self, match: Match, reason: str) -> None:
        """From a worker's thread."""

        def note() -> None:
            self.count("handler_failed")
            self._tell(Event("handler-failed", reason=f"{match}: {reason}"))

        self._from_thread(note)

    # ---- changes ----

    def apply(self, config: Config, standings: Mapping[Pair, Standing] = MappingProxyType({})) -> None:
        """Serve another configuration from now on.  No connection is broken whose backend lives.

        ``standings``: what is known of its backends already, as for :meth:`judge`.

        Raises :class:`ConfigError`, and changes nothing, if it differs in what is fixed at the start.
        """
        names = tuple(attachment.info.name for attachment in self._attachments)
        if config.interfaces == names:  # some may have been renamed
            config = replace(config, interfaces=self.config.interfaces)
        if self._held:
            raise ConfigError(["another process is taking over just now; try again"])
        differ = [name for name in fixed_fields() if getattr(config, name) != getattr(self.config, name)]
        if differ:
            raise ConfigError([f"{name} cannot be changed while serving; {remedy(name)}" for name in differ])
        assert self._nexthops
        for vip in self._registry.admit(config):
            self._running.count_from_zero(self._registry.services[vip])
        served = {service.vip for service in config.services}
        # A VIP's packets come only while the workers know it.
        self._running.serve((s.vip for s in self.config.services if s.vip in served), self._registry.services)
        self.config = config
        self._learn(standings)
        self._own()
        self._applied.append(config)
        self._answered &= config.vips
        self._nexthops.follow(self._registry.backends, config.vips)
        self._publish()
        self._running.answer(self._answered, config)
        self._running.limits.publish(self.config.services, self._registry.services)
        self._running.serve(served, self._registry.services)
        self._tell(Event("changed"))
        self._sweep_soon.set()  # services that were removed lose their flows
        self.count("reloads")

    def _hops_changed(self, before: Mapping[Address, NextHop], now: Mapping[Address, NextHop]) -> None:
        if not before and not self._verdicts:
            return  # the first look
        if self._queues.snapshot:
            self._publish()
        elif all(hop.state is HopState.RESOLVED for hop in self.hops.values()):
            self._resolved.set()  # start() publishes what there is then: with many backends it takes its time
        self._tell(HopsChanged(before, now))
        for address, hop in now.items():
            if hop.state is HopState.RESOLVED:
                self._tell(Event("backend-up", address))
            elif address in before and before[address].state is HopState.RESOLVED:
                self._tell(Event("backend-down", address, reason=hop.reason))

    def _socket_failed(self, name: str, reason: str) -> None:
        """From whatever thread.  Why it did, and what to do, the interfaces tell."""

        def note() -> None:
            if times := self._seldom.due(name):
                log.warning("a socket failed; it is made anew", interface=name, reason=reason, times=times)
            asyncio.get_running_loop().call_later((self._queues.failed(name) or 0.0) + 0.01, look)

        def look() -> None:
            if self._nexthops:
                self._nexthops.look()

        self._from_thread(note)

    def _links_changed(self) -> None:
        """Serve the interfaces as they are now."""
        self._own()
        if not self._attached or self._held:
            return
        links = self._nexthops.links if self._nexthops else {}
        there = {a: link for a in self._attachments if a.mode and (link := links.get(a.info.index))}
        for attachment in self._attachments:
            if attachment.mode and attachment not in there:
                self._lose(attachment)
            if not attachment.mode and attachment.info.name in {link.name for link in there.values()}:
                attachment.lend_name()
        for attachment, before in rename({a: link.name for a, link in there.items()}):
            self._tell(Event("interface-renamed", interface=attachment.info.name, reason=before))
        for attachment in self._attachments:
            self._fit(attachment)
        self._tell(LinksChanged(links))

    def _lose(self, attachment: Attachment) -> None:
        self._give_up(attachment)
        self._tried.pop(attachment.name, None)
        self._tell(Event("interface-gone", interface=attachment.info.name))

    def _fit(self, attachment: Attachment) -> None:
        """Serve an interface as it is now: there again, with other queues or MTU, or a failed socket."""
        name = attachment.name
        if attachment.mode and (pause := self._queues.failed(name)) is not None:
            if not attachment.attached:  # it was gone, and has its index again
                self._lose(attachment)
            elif pause:
                return
            else:
                self._tried.pop(name, None)
        try:
            info = interface_info(attachment.info.name)
        except KernelError:  # its event is on its way
            return
        if any(other.mode and other.info.index == info.index for other in self._attachments if other is not attachment):
            return  # it has that one's name now
        if info == self._tried.get(name) or not info.up or (attachment.mode and info.index != attachment.info.index):
            return
        # What cannot be is tried again when the interface has changed, or at a sweep.
        self._tried[name] = info
        try:
            if attachment.mode:
                self._resize(attachment, info)
            else:
                self._take_up(attachment, info)
        except KernelError as error:
            if self._unfit.get(name) != str(error):
                self._tell(Event("interface-unserved", interface=info.name, reason=str(error)))
            self._unfit[name] = str(error)
        else:
            self._unfit.pop(name, None)

    def _resize(self, attachment: Attachment, info: Interface) -> None:
        """Sockets for all queues that an interface has now, for whatever its MTU lets come."""
        before, attachment.info = attachment.info, info
        sockets = len(self._queues)
        try:
            self._queues.fit(attachment.name, info)
        finally:
            if len(self._queues) > sockets:
                attachment.renew(self._running)
        if len(self._queues) > sockets or before.mtu != info.mtu:
            facts = f"{info.rx_queues} queues, MTU {info.mtu}"
            self._tell(Event("interface-changed", interface=info.name, reason=facts))

    def _take_up(self, attachment: Attachment, info: Interface) -> None:
        """Serve an interface that was gone."""
        attachment.info = info
        try:
            attachment.regain_name()
            attachment.find()
            self._queues.fit(attachment.name, info)
            self._own()
            attachment.attach(self._running, self.config.xdp_mode)
            attachment.settle()
        except BaseException:
            self._give_up(attachment)
            raise
        self._publish()
        self._tell(Event("interface-back", interface=info.name))

    def _give_up(self, attachment: Attachment) -> None:
        self._queues.close_interface(attachment.name)
        attachment.detach()
        self._running.disown(attachment.info.index)
        self._publish()

    def _own(self) -> None:
        """Have the XDP program know which frames are sent to us, and which VIPs are ours alone."""
        if not (self._program and self._nexthops):
            return
        if (answered := self._nexthops.elsewhere) != self._answered:
            self._answered = answered
            if self._queues.snapshot:
                self._publish()
            self._program.answer(answered, self.config)
        more = [bytes.fromhex(mac.replace(":", "")) for mac in self.config.macs]
        for attachment in self._attachments:
            if macs := self._nexthops.macs(attachment.info.index):  # it may be gone
                self._program.own(attachment.info.index, [*macs, *more])

    def _publish(self) -> None:
        """Have the XDP program and the workers see what is there now."""
        at, hops = time.monotonic(), self._nexthops.current if self._nexthops else {}
        self._judge()
        # Before and after, the map is another's: of a daemon that died, or of one that lives.
        if self._attached and not self._given:
            dead = {b.address for s in self._served.services for b in s.backends if b.state is State.DEAD}
            about = hops, self._registry.version, dead, self._ways_known()
            if about[0] is not self._pathed[0] or about[1:] != self._pathed[1:]:
                self._running.paths.publish(self._registry.backends, hops, self._ways, dead)
                self._pathed = about
        if self._usable[0] is not hops:
            self._usable = hops, frozenset(a for a, hop in hops.items() if hop.state is HopState.RESOLVED)
        self._balance.follow(self._served.services, self._usable[1], at if self._attached else None, self._warm)
        # Before there are packets, nobody asks anything meanwhile.
        most = at_once(self.config.table_size) if self._attached else None
        snapshot = build(self._served, self._sight(at), self._queues.snapshot, most)
        self._custom.publish(snapshot.custom)
        self._queues.publish(snapshot)
        if snapshot.owed:
            self._owed.set()
        else:
            self._owed.clear()

    def _sight(self, at: float) -> Sight:
        """What there is to be seen now, for a snapshot."""
        return Sight(
            self.seed,
            self._registry.backends,
            self._registry.services,
            self._nexthops.current if self._nexthops else {},
            self._balance,
            at,
            self._completions.stopped(),
            self._answered,
            self._handlers.matches(),
            self._registry.version,
            self._taps.filled(),
        )

    def _ways_known(self) -> list[object]:
        """What :meth:`_ways` goes by, beside a hop."""
        return [
            self.config.ack_bypass,
            self._queues.some_zero_copy,
            *((a.info, a.mode, a.sums) for a in self._attachments),
        ]

    def _ways(self, hop: NextHop) -> Ways:
        forced, room = self.config.ack_bypass is Bypass.ON, self._queues.some_zero_copy
        return ways(self._attachments, hop, forced=forced, room=room)

    # ---- now and then ----

    async def _publish_owed(self) -> None:
        """Make many tables bit by bit: whoever asks something has his answer in between."""
        while True:
            await self._owed.wait()
            await asyncio.sleep(0)
            if self._owed.is_set():
                self._publish()

    async def _keep_balance(self) -> None:
        """Work out schedules anew as connections come, and let weights rise."""
        aged = time.monotonic()
        while True:
            pools = self._queues.snapshot.pools if self._queues.snapshot else {}
            await asyncio.sleep(REFRESH_INTERVAL if pools else AGE_INTERVAL)
            now = time.monotonic()
            pools = self._queues.snapshot.pools if self._queues.snapshot else {}
            if now - aged >= AGE_INTERVAL:
                aged = now
                self._queues.miss()
                if silent := self._balance.silent(now):
                    for backend in silent & self.config.backends:
                        self._tell(Event("server-silent", backend))
                if pools:
                    for service in self._served.services:
                        if service.vip in pools:
                            self._balance.age(service)
            for _, pool in pools.values():
                pool.refresh()
            if self._completions.retry(now):
                self._publish()
            rises = self._balance.next_step(self._served.services, self._stepped)
            if rises is not None and rises <= now:
                self._stepped = now
                self._publish()

    async def _sweep(self) -> None:
        """Now and then: delete old flows, and forget what was removed and has no flow left."""
        while True:
            # wait_for of Python 3.11 may swallow a cancellation.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SWEEP_INTERVAL):
                    await self._sweep_soon.wait()
            self._sweep_soon.clear()
            if self._held:
                continue
            try:
                await self._sweep_once()
            except BaseException:  # what was not swept is swept the next time
                self._sweep_soon.set()
                raise

    async def _sweep_once(self) -> None:
        # Only when no worker looks into a snapshot from before can it be known who gets no new flows.
        # A service that is owed its table gives some to whom the configuration does not name any more.
        quiet = self._queues.settle() and not self._owed.is_set()
        self._applied = [self.config]
        services = np.zeros(1 << 16, np.bool_)
        services[[self._registry.services[service.vip] for service in self.config.services]] = True
        flows, left = await self._aside(lambda: self._count_flows(services))
        total = self.statistics()["total"]
        refused, dropped = total["flows_full"], total["xsk_rx_dropped"] + total["xsk_rx_full"]
        unsent = total["drop_tx"]
        self._tell(Swept(flows, refused - self._refused, dropped - self._dropped, unsent - self._unsent))
        self._refused, self._dropped, self._unsent = refused, dropped, unsent
        if quiet and not self._held:
            self._forget(left)
        for name in self._unfit:
            self._tried.pop(name, None)
        if self._nexthops:  # also for what no event tells: whether an interface takes redirected packets
            self._nexthops.follow(self._registry.backends, self.config.vips)

    def _count_flows(self, services: npt.NDArray[np.bool_]) -> tuple[int, npt.NDArray[np.uint32]]:
        """Sweep, in a thread of its own: delete the flows of all but these services, by index, and those too old.

        How many flows the XDP program has that have not ended, and how many of all each backend (by id) has there or in
        a worker's cache.
        """
        left = np.zeros(1 << 16, np.uint32)
        # The caches first: from there flows get into the XDP program's table, never back.
        self._queues.count(left)
        if not self._program or not self._program.flows:
            return 0, left
        swept = self._program.flows.sweep(services)
        left[: len(swept)] += swept.astype(np.uint32)
        return self._program.flows.count(), left

    def _forget(self, flows: npt.NDArray[np.uint32]) -> None:
        """Release what neither the configuration nor a flow (by backend id) holds any more."""
        self._balance.forget(self.config.services)
        self._completions.forget(self.config.services)
        pairs = {(service.vip, b.address) for service in self.config.services for b in service.backends}
        self._standings = {pair: s for pair, s in self._standings.items() if pair in pairs}
        # What came during the count, and perhaps went, was not counted.
        gone = self._registry.collect(self._applied, flows)
        for address, backend_id in gone.items():
            self._running.paths.forget(address, backend_id)
        self._queues.keep_joins(self._registry.backends.values(), self._registry.services.values())
        self._pathed = (None,)
        if gone:
            self._publish()
