"""The engine: it owns the parts of the dataplane, calls them, and is the only one that does.

What is here is life (start, serve, sweep, close) and change: a configuration, a next hop, a weight that rises become a
snapshot (:mod:`.snapshot`) that is built beside the running one and published to the workers (:mod:`.queues`).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import structlog

from crablb import lasting
from crablb.dataplane.attachment import Attachment, inherited, rename, reunite, ways
from crablb.dataplane.events import Event, HopsChanged, LinksChanged, Notice, Started, Swept
from crablb.dataplane.handlers import Handle, Handlers, Match
from crablb.dataplane.paths import Ways
from crablb.dataplane.program import Program, bypass
from crablb.dataplane.queues import Queues
from crablb.dataplane.registry import Registry
from crablb.dataplane.snapshot import Sight, build
from crablb.errors import ConfigError, KernelError, starved
from crablb.kernel.interface import Interface, interface_info
from crablb.kernel.netlink import HopState, Link, NextHop, NextHops
from crablb.model import Address, Bypass, Config, State, Vip
from crablb.options import fixed_fields
from crablb.selection.completion import Completions
from crablb.selection.custom import Custom
from crablb.selection.loads import Balance, Load

__all__ = ["Engine"]

log = structlog.get_logger()

#: How long the start waits for the backends' neighbours before it serves with those that answered, in seconds.
RESOLVE_TIMEOUT = 1.0
SWEEP_INTERVAL = 30.0  # seconds
#: Descriptors kept back for what is opened and closed while it serves, and as many for the end, which clears away.
SPARE = 8
#: How often schedules are worked out anew, and the loads of backends that do not report aged, in seconds.
REFRESH_INTERVAL = 0.1
AGE_INTERVAL = 1.0


class Engine:
    """Serve the services of a configuration on its interfaces.

    Make it in the network namespace of the interfaces; then ``await start()`` and at the end ``await close()``, which
    leaves nothing in the kernel unless it is told to keep flows.  Methods are to be called from the event loop.

    ``listeners`` are called, in the event loop, with each :class:`.events.Notice`.

    Raises :class:`KernelError` (no such interface, it is down, it has an XDP program of somebody else, another process
    serves it) or one of its kinds; nothing stays in the kernel then.
    """

    def __init__(self, config: Config, seed: bytes, *, threads: bool = True) -> None:
        """``seed``: 16 bytes; ``threads``: False to work on packets by :meth:`process_once` alone."""
        self.config = config
        self.threads = threads
        self.seed = seed
        self.listeners: list[Callable[[Notice], None]] = []
        self.failure: asyncio.Future[str] | None = None  # why it cannot go on
        self._attachments = [Attachment(name) for name in config.interfaces]
        self._balance = Balance()
        self._completions = Completions()
        self._custom = Custom(self._policy_failed)
        self._handlers = Handlers(self._handler_failed)
        self._queues = Queues(config, self._handlers, self._custom, self._socket_failed)
        # Made at the start:
        self._program: Program | None = None
        self._registry = Registry(0)
        self._answered: frozenset[Address] = frozenset()  # VIPs whose other packets are user space's
        self._nexthops: NextHops | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._sweeper = ThreadPoolExecutor(1, "crablb-sweep")
        self._stack = ExitStack()
        self._spare: list[int] = []
        # What has happened:
        self._resolved = asyncio.Event()
        self._attached = False
        self._tried: dict[str, Interface] = {}  # interfaces as they were when last they were fitted
        self._unfit: dict[str, str] = {}  # those that could not be, and why
        self._sweep_soon = asyncio.Event()
        self._applied: list[Config] = []  # the configurations since the last sweep began
        self._stepped = time.monotonic()  # when weights were last looked at
        # Connections that the flow caches had no room for, and packets that the kernel dropped, when last looked at:
        self._refused = self._dropped = 0

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

    def load(self, vip: Vip, backend: Address) -> Load:
        """What the policies know of a backend."""
        return self._balance.read(vip, backend)

    def statistics(self) -> dict[str, Any]:
        """Packets by what became of them: see :func:`crablb.dataplane.statistics.read`."""
        return self._running.statistics(self._queues.slots)

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
            self._stack.enter_context(attachment.own())
        reunite()
        for attachment in self._attachments:
            attachment.find()
        left = inherited(self._attachments, self.seed) if self.bypass else None
        program = self._program = Program(self.config, self.seed, left)
        self._registry = Registry(
            program.service_room, left.backends if left else None, left.services if left else None
        )
        self._registry.admit(self.config)
        self._queues.open(program.maps, {a.name: a.info for a in self._attachments}, program.flows)

        self._nexthops = NextHops(self._hops_changed, self._links_changed, self.task)
        await self._nexthops.start(self._registry.backends, self.config.vips)
        self._publish()
        await self._resolve()
        if left and program.flows:
            flows = program.flows.flows()
            self._queues.adopt(flows)
            log.info("took over fallback flows", flows=len(flows))
        program.serve((service.vip for service in self.config.services), self._registry.services)
        # Its thread from now on: later there may be no memory for one, and what was asked for would come at any time.
        await loop.run_in_executor(self._sweeper, lambda: None)
        self._tasks = [self.task("sweep", self._sweep), self.task("balance", self._keep_balance)]
        if self.threads:
            self._queues.start(sorted(os.sched_getaffinity(0)))
        for attachment in self._attachments:
            attachment.attach(program, self.config.xdp_mode)
        self._attached = True
        self._tried = {attachment.name: attachment.info for attachment in self._attachments}
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

    async def close(self) -> list[str]:
        """Stop serving; leave nothing in the kernel, or for ``keep`` seconds what a daemon that is killed does.
        Returns the interfaces where something is left.  Idempotent.
        """
        self._keep_back(0)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        kept = self._attached and bool(self.config.keep) and self.bypass
        self._take_down(keep=kept)
        if self._nexthops:
            await self._nexthops.close()
        self._let_go()
        return [attachment.info.name for attachment in self._attachments] if kept else []

    def abandon(self) -> None:
        """Leave nothing in the kernel, where there is no event loop any more to :meth:`close` in."""
        self._keep_back(0)
        self._take_down(keep=False)
        if self._nexthops:
            self._nexthops.abandon()
        self._let_go()

    def _take_down(self, *, keep: bool) -> None:
        """Take no packets any more.  ``keep``: leave the XDP program, and the flows."""
        self._sweeper.shutdown()
        for attachment in self._attachments:
            if keep:
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

    @property
    def _running(self) -> Program:
        assert self._program, "the engine is not running"
        return self._program

    def _tell(self, notice: Notice) -> None:
        for listener in list(self.listeners):
            try:
                listener(notice)
            except Exception:  # whatever somebody's listener does is no matter of ours
                log.exception("a listener failed", notice=str(notice))

    def _from_thread(self, do: Callable[[], None]) -> None:
        """Run in the event loop what a worker's thread has to say."""
        if self.failure:
            self.failure.get_loop().call_soon_threadsafe(do)

    def task(self, name: str, work: Callable[[], Awaitable[None]]) -> asyncio.Task[None]:
        """Work that is never done.  If it fails it is begun anew, and counted; if for good, the engine fails.

        Nobody would notice what is not done any more.
        """
        return lasting.task(name, work, lambda: self.count("tasks_failed"), self._failed)

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

    def apply(self, config: Config) -> None:
        """Serve another configuration from now on.  No connection is broken whose backend lives.

        Raises :class:`ConfigError`, and changes nothing, if it differs in what is fixed at the start.
        """
        names = tuple(attachment.info.name for attachment in self._attachments)
        if config.interfaces == names:  # some may have been renamed
            config = replace(config, interfaces=self.config.interfaces)
        differ = [name for name in fixed_fields() if getattr(config, name) != getattr(self.config, name)]
        if differ:
            raise ConfigError([f"{name} cannot be changed while serving; restart crablb serve" for name in differ])
        assert self._nexthops
        for vip in self._registry.admit(config):
            self._running.count_from_zero(self._registry.services[vip])
        served = {service.vip for service in config.services}
        # A VIP's packets come only while the workers know it.
        self._running.serve((s.vip for s in self.config.services if s.vip in served), self._registry.services)
        self.config = config
        self._own()
        self._applied.append(config)
        self._answered &= config.vips
        self._nexthops.follow(self._registry.backends, config.vips)
        self._publish()
        self._running.answer(self._answered, config)
        self._running.serve(served, self._registry.services)
        self._tell(Event("changed"))
        self._sweep_soon.set()  # services that were removed lose their flows
        self.count("reloads")

    def _hops_changed(self, before: Mapping[Address, NextHop], now: Mapping[Address, NextHop]) -> None:
        if not self._queues.snapshot:
            return  # the first resolution: start() publishes it
        self._publish()
        self._tell(HopsChanged(before, now))
        for address, hop in now.items():
            if hop.state is HopState.RESOLVED:
                self._tell(Event("backend-up", address))
            elif address in before and before[address].state is HopState.RESOLVED:
                self._tell(Event("backend-down", address, reason=hop.reason))

    def _socket_failed(self, name: str, reason: str) -> None:
        """From whatever thread.  Why it did, and what to do, the interfaces tell."""

        def note() -> None:
            log.warning("a socket failed", interface=name, reason=reason)
            if self._nexthops:
                self._nexthops.look()

        self._from_thread(note)

    def _links_changed(self) -> None:
        """Serve the interfaces as they are now."""
        self._own()
        if not self._attached:
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
        if attachment.mode and self._queues.failed(name):
            self._lose(attachment)
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
        at, hops = time.monotonic(), self.hops
        if self._attached:  # until then the map may be in use still, by the program of a daemon that died
            dead = {b.address for s in self.config.services for b in s.backends if b.state is State.DEAD}
            self._running.paths.publish(self._registry.backends, hops, self._ways, dead)
        usable = {address for address, hop in hops.items() if hop.state is HopState.RESOLVED}
        self._balance.follow(self.config.services, usable, at if self._attached else None)
        sight = Sight(
            self.seed,
            self._registry.backends,
            self._registry.services,
            hops,
            self._balance,
            at,
            self.reached,
            self._completions.stopped(),
            self._answered,
            self._handlers.matches(),
        )
        snapshot = build(self.config, sight, self._queues.snapshot)
        self._custom.publish(snapshot.custom)
        self._queues.publish(snapshot)
        if all(hop.state is HopState.RESOLVED for hop in hops.values()):
            self._resolved.set()

    def _ways(self, hop: NextHop) -> Ways:
        return ways(self._attachments, hop, forced=self.config.ack_bypass is Bypass.ON)

    # ---- now and then ----

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
                for backend in self._balance.silent(now) & self.config.backends:
                    self._tell(Event("server-silent", backend))
                for service in self.config.services:
                    if service.vip in pools:
                        self._balance.age(service)
            for _, pool in pools.values():
                pool.refresh()
            if self._completions.retry(now):
                self._publish()
            rises = self._balance.next_step(self.config.services, self._stepped)
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
            try:
                await self._sweep_once()
            except BaseException:  # what was not swept is swept the next time
                self._sweep_soon.set()
                raise

    async def _sweep_once(self) -> None:
        # Only when no worker looks into a snapshot from before can it be known who gets no new flows.
        quiet = self._queues.settle()
        self._applied = [self.config]
        services = np.zeros(1 << 16, np.bool_)
        services[[self._registry.services[service.vip] for service in self.config.services]] = True
        counting = asyncio.get_running_loop().run_in_executor(self._sweeper, self._count_flows, services)
        try:
            flows, left = await asyncio.shield(counting)
        except asyncio.CancelledError:
            await counting  # it reads what is freed when this task has ended
            raise
        total = self.statistics()["total"]
        refused, dropped = total["flows_full"], total["xsk_rx_dropped"] + total["xsk_rx_full"]
        self._tell(Swept(flows, refused - self._refused, dropped - self._dropped))
        self._refused, self._dropped = refused, dropped
        if quiet:
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
        # What came during the count, and perhaps went, was not counted.
        gone = self._registry.collect(self._applied, flows)
        for address, backend_id in gone.items():
            self._running.paths.forget(address, backend_id)
        if gone:
            self._publish()
