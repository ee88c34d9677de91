"""The heart: one XDP program, one worker thread a queue of each interface, and the snapshot that they look into.

The packet path is C (native/) and never enters Python.  What is here decides what the workers see: it turns the
configuration and the state of the backends' next hops into an immutable snapshot and publishes it with one pointer
store a worker.  A snapshot that was replaced is freed when no worker uses it any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import structlog

from crablb import flowmap, statistics
from crablb._native import ffi, lib
from crablb.announce import Announcer
from crablb.errors import ConfigError, KernelError
from crablb.feedback import Feedback
from crablb.handler import Entrance, Handle, Handlers, Match
from crablb.kernel import bpf, pins
from crablb.kernel.interface import Interface, interface_info
from crablb.kernel.netlink import HopState, NextHop, NextHops
from crablb.kernel.xsk import XskError, XskSocket
from crablb.model import (
    Address,
    Announce,
    Bypass,
    Config,
    Fallback,
    Mode,
    OnDead,
    OptionForm,
    Service,
    State,
    Vip,
    XdpMode,
    mapped,
)
from crablb.policy import BUILTIN, CONSISTENT, Balance, Custom, Load, Pool, resolve

__all__ = ["Engine", "Event", "maglev_table"]

log = structlog.get_logger()

MODES = {
    Mode.NEGOTIATED: lib.CRAB_MODE_NEGOTIATED,
    Mode.ALWAYS: lib.CRAB_MODE_ALWAYS,
    Mode.NEVER: lib.CRAB_MODE_NEVER,
}
FALLBACKS = {
    Fallback.AUTO: lib.CRAB_FALLBACK_AUTO,
    Fallback.DSR_L2: lib.CRAB_FALLBACK_L2,
    Fallback.DSR_IPIP: lib.CRAB_FALLBACK_IPIP,
}
ON_DEAD = {OnDead.REASSIGN: lib.CRAB_ON_DEAD_REASSIGN, OnDead.RESET: lib.CRAB_ON_DEAD_RESET}
FORMS = {OptionForm.CRAB: lib.CRAB_FORM_CRAB, OptionForm.EXPERIMENTAL: lib.CRAB_FORM_EXPERIMENTAL}
FRAMES = 4096  # a queue
#: How long the start waits for the backends' neighbours before it serves with those that answered, in seconds.
RESOLVE_TIMEOUT = 1.0
SWEEP_INTERVAL = 30.0  # seconds
#: How often schedules are worked out anew, and the loads of backends that do not report aged, in seconds.
REFRESH_INTERVAL = 0.1
AGE_INTERVAL = 1.0
#: From this share of `flows` on, the XDP program's table is named as nearly full.
NEARLY_FULL = 0.9
#: How many services can be added at the least without a restart.
SERVICES = 4096
#: What ``crablb status`` reads, and the next daemon takes over.
PINNED = (
    "services",
    "service_counters",
    "hashing",
    "sockets",
    "interfaces",
    "flows",
    "paths",
    "xdp_counters",
    "worker_counters",
    "daemon_counters",
)

Table = npt.NDArray[np.uint16]


def maglev_table(members: Mapping[int, tuple[Address, int, int]], size: int, seed: bytes) -> Table:
    """The Maglev table of ``members``: ``size`` (a prime) ids of backends.

    ``members``: backend id -> address, weight, and the weight that it has when all is well with it.  Where it has less,
    only the slots that it lacks differ from the table of full weights.

    Slots hold ``lib.CRAB_NO_BACKEND`` if there is no member with a weight.  Source: Eisenbud et al., NSDI 2016, 3.4.
    """
    table: Table = np.empty(size, np.uint16)
    array = ffi.new("struct crab_maglev_member[]", max(len(members), 1))
    for entry, (backend_id, (address, weight, full)) in zip(array, members.items(), strict=False):
        entry.addr = mapped(address)
        entry.weight, entry.full = weight, full
        entry.backend = backend_id
    if lib.crab_maglev_build(ffi.from_buffer("uint16_t[]", table), size, array, len(members), seed):
        raise MemoryError("no memory for a Maglev table")
    return table


class _Snapshot:
    """A C snapshot, and the Maglev tables and pools that it points to."""

    def __init__(
        self,
        config: Config,
        seed: bytes,
        ids: Mapping[Address, int],
        hops: Mapping[Address, NextHop],
        bypassed: Container[Address],
        indices: Mapping[bytes, int],
        balance: Balance,
        before: _Snapshot | None,
    ) -> None:
        self.pools: dict[Vip, tuple[Any, Pool]] = {}
        self.custom: dict[int, Any] = {}  # see Custom.publish
        self.tables: dict[Any, Table] = {}
        known = {b.address: b for service in config.services for b in service.backends}
        dead = {address for address, b in known.items() if b.state is State.DEAD}
        count = max(ids.values(), default=-1) + 1
        backends = ffi.new("struct crab_backend[]", max(count, 1))
        for address, backend_id in ids.items():
            entry, hop = backends[backend_id], hops.get(address)
            entry.addr = mapped(address)
            # One that was removed stays for the flows that it has.
            if address in known and known[address].cr:
                entry.flags |= lib.CRAB_BACKEND_CR
            if address in dead:
                entry.flags |= lib.CRAB_BACKEND_DEAD
            if address.version == 6:
                entry.flags |= lib.CRAB_BACKEND_V6
            if hop and hop.state is HopState.RESOLVED:
                entry.mtu = hop.mtu
                if hop.source:
                    entry.tunnel_src = mapped(hop.source)
                entry.flags |= lib.CRAB_BACKEND_USABLE
                entry.ifindex = hop.ifindex
                if address in bypassed:
                    entry.flags |= lib.CRAB_BACKEND_BYPASS
                entry.dst_mac, entry.src_mac = hop.dst_mac, hop.src_mac
                if hop.on_link:
                    entry.flags |= lib.CRAB_BACKEND_ON_LINK
        services = ffi.new("struct crab_service[]", max(len(config.services), 1))
        prefixes: list[tuple[bytes, int]] = []
        for entry, service in zip(services, config.services, strict=False):
            entry.addr = mapped(service.vip.address)
            entry.port_be = int.from_bytes(service.vip.port.to_bytes(2, "big"), "little")
            entry.protocol = 6
            entry.mode = MODES[service.mode]
            entry.fallback = FALLBACKS[service.fallback]
            entry.on_dead = ON_DEAD[service.on_dead]
            entry.index = indices[service.vip.key()]
            entry.first_prefix, entry.prefix_count = len(prefixes), len(service.redirect_clients)
            for prefix in service.redirect_clients:
                bits = prefix.prefixlen + (96 if prefix.version == 4 else 0)
                prefixes.append((mapped(prefix.network_address), bits))
            usable = {
                b.address: b for b in service.backends if backends[ids[b.address]].flags & lib.CRAB_BACKEND_USABLE
            }
            weights = balance.weights(service, usable.values(), time.monotonic())
            # Those that are not usable keep their places in the table, for others to sit in.
            scale = balance.scale(service, weights)
            members = {
                ids[b.address]: (b.address, weights.get(b.address, 0), b.weight * scale) for b in service.backends
            }
            # Services with the same backends share a table, and so does the next snapshot.
            key = frozenset(members.items())
            table = self.tables.get(key)
            if table is None and before:
                table = before.tables.get(key)
            if table is None:
                table = maglev_table(members, config.table_size, seed)
            self.tables[key] = table
            entry.table = ffi.from_buffer("uint16_t[]", table)
            if service.policy == "source-hash":
                entry.source4, entry.source6 = service.source_prefix
            if service.policy in CONSISTENT:
                continue
            # Who cannot be redirected to is the fallback's.
            eligible = {
                address: weight
                for address, weight in weights.items()
                if usable[address].cr and address.version == service.vip.address.version
            }
            if service.policy not in BUILTIN:
                entry.custom = 1
                self.custom[entry.index] = (
                    service.vip,
                    resolve(service.policy) if isinstance(service.policy, str) else service.policy,
                    balance.backends(service.vip, eligible),
                    np.array([ids[a] for a in eligible], np.uint16),
                )
            else:
                entry.pool = self._pool(service, eligible, ids, balance, before).c
        c_prefixes = ffi.new("struct crab_prefix[]", max(len(prefixes), 1))
        for entry, (addr, bits) in zip(c_prefixes, prefixes, strict=False):
            entry.addr, entry.bits = addr, bits
        self.c = lib.crab_snapshot_new(
            services, len(config.services), backends, count, c_prefixes, len(prefixes), ffi.NULL, 0,
            config.table_size, FORMS[config.option], seed,
        )  # fmt: skip
        if not self.c:
            raise MemoryError("no memory for a snapshot")

    def _pool(
        self,
        service: Service,
        weights: Mapping[Address, int],
        ids: Mapping[Address, int],
        balance: Balance,
        before: _Snapshot | None,
    ) -> Pool:
        """The service's pool: that of the snapshot before, if nothing has changed, so that its schedule goes on."""
        key = service.policy, tuple((address, ids[address], weight) for address, weight in weights.items())
        old = before.pools.get(service.vip) if before else None
        if old and old[0] == key:
            pool = old[1]
        else:
            members = {ids[a]: (balance.load(service.vip, a), weight) for a, weight in weights.items()}
            pool = Pool(str(service.policy), members, balance.turn(service.vip))
        self.pools[service.vip] = key, pool
        return pool

    def free(self) -> None:
        lib.crab_snapshot_free(self.c)


class _Worker:
    """One queue: socket, core, thread."""

    def __init__(self, xsk: XskSocket, config: Config, counters: Any, table: Any, handlers: Handlers) -> None:
        self.xsk = xsk
        self._entrance = Entrance(handlers, xsk.umem, xsk.frame_size)
        self.counters = counters  # CRAB_COUNTERS of uint64_t
        self.core = lib.crab_core_new(config.flows, counters)
        self.c = lib.crab_worker_new(xsk.handle, self.core, counters) if self.core else ffi.NULL
        if not self.c:
            error = os.strerror(ffi.errno)
            lib.crab_core_free(self.core)
            raise KernelError(f"cannot make a worker for queue {xsk.queue} of {xsk.interface}: {error}")
        lib.crab_worker_spin(self.c, config.busy_poll)
        lib.crab_core_learn(self.core, table)
        lib.crab_core_handle(self.core, lib.crab_python_handle, self._entrance.handle)
        self._thread: threading.Thread | None = None

    def start(self, cpu: int, failed: Callable[[XskSocket, int], None]) -> None:
        """Run in a thread on ``cpu``; ``failed(socket, errno)`` is called from it if the socket fails."""

        def run() -> None:
            os.sched_setaffinity(0, {cpu})
            rc = lib.crab_worker_run(self.c)  # without the GIL
            if rc:
                failed(self.xsk, -rc)

        self._thread = threading.Thread(target=run, name=f"crablb-{self.xsk.interface}/{self.xsk.queue}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        lib.crab_worker_stop(self.c)
        if self._thread:
            self._thread.join()
        lib.crab_worker_free(self.c)
        lib.crab_core_free(self.core)
        self.xsk.close()


class _Served:
    """An interface that clients' packets come in by."""

    def __init__(self, info: Interface) -> None:
        self.info = info
        self.role = f"lb-{info.name}"
        self.pins = pins.folder(self.role)
        self.old: bpf.Link | None = None  # what a daemon that died left behind
        self.link: bpf.Link | None = None
        self.mode = ""

    def find_old(self) -> None:
        """The link of a daemon that died, to be taken over.  Raises BpfBusyError if there is somebody else's."""
        try:
            link = bpf.Link.from_pin(self.pins / "link")
        except bpf.BpfNotFoundError:
            link = None
        attached, mode = bpf.xdp_program(self.info.index)
        if link and attached == link.program_id:
            link.mode = mode
            self.old = link
            return
        if link:  # of an interface that is gone
            link.close()
            pins.remove(self.pins)
        if attached:
            raise bpf.BpfBusyError(
                f"interface {self.info.name} has an XDP program already (id {attached}, see bpftool net);"
                f" remove it: ip link set {self.info.name} xdp off"
            )

    def attach(self, program: bpf.Program, want: XdpMode, maps: Mapping[str, bpf.Map]) -> None:
        link, self.old = self.old, None
        if link and want.value in ("auto", link.mode):
            link.update(program)
            log.info("took over from a load balancer that had died", interface=self.info.name)
        else:
            if link:
                link.detach()
                link.close()
            link = program.attach_xdp(self.info.index, want.value)
        self.link, self.mode = link, link.mode
        pins.remove(self.pins)
        link.pin(self.pins / "link")
        for name in PINNED:
            maps[name].pin(self.pins / name)

    def detach(self) -> None:
        """Idempotent."""
        if self.link:
            self.link.detach()
            self.link.close()
            pins.remove(self.pins)
            self.link = None
        if self.old:
            self.old.close()
            self.old = None


@dataclass(frozen=True, slots=True)
class Event:
    """Something that befell a load balancer."""

    #: "backend-up", "backend-down", "policy-failed", "handler-failed", "vip-in-use", "server-silent", "changed"
    kind: str
    backend: Address | None = None
    vip: Vip | None = None
    reason: str = ""


class Engine:
    """Serve the services of a configuration on its interfaces.

    Make it outside of an event loop, in the network namespace of the interfaces; then ``await start()`` and at the end
    ``await close()``, which leaves nothing in the kernel.

    Raises :class:`KernelError` (no such interface, it is down, it has an XDP program of somebody else, another process
    serves it) or one of its kinds; nothing stays in the kernel then.
    """

    def __init__(self, config: Config, seed: bytes, *, threads: bool = True) -> None:
        """``threads``: False to work on packets by :meth:`process_once` alone."""
        self.config = config
        self.threads = threads
        self.listeners: list[Callable[[Event], None]] = []
        self.seed = seed
        self._served = [_Served(interface_info(name)) for name in config.interfaces]
        for served in self._served:
            if not served.info.up:
                name = served.info.name
                raise KernelError(f"interface {name} is down; bring it up: ip link set {name} up")
        self.failure: asyncio.Future[str] | None = None
        # Ids are never used again: the workers' flow caches may still hold them.
        self._next_id = 0
        self._ids: dict[Address, int] = {}
        self._indices: dict[bytes, int] = {}  # of services, by their key; those removed until a sweep has found no flow
        self._known_paths: dict[Address, bytes] = {}  # what map `paths` holds
        self._paths: dict[Address, bytes] = {}  # of those that the XDP program reaches
        self._flows: flowmap.FlowTable | None = None
        self._table: Any = ffi.NULL
        self._attached = False
        self._sweep_soon = asyncio.Event()
        self._balance = Balance()
        self._custom = Custom(self._policy_failed)
        self._handlers = Handlers(self._handler_failed)
        self._stepped = time.monotonic()  # when weights were last looked at
        self._serving: set[tuple[Vip, Address]] = set()  # backends that get connections
        self._balancer: asyncio.Task[None] | None = None
        self._feedback: Feedback | None = None
        self._sweeper: asyncio.Task[None] | None = None
        self._announcers: list[Announcer] = []
        self._hops: dict[Address, NextHop] = {}
        self._workers: list[_Worker] = []
        self._snapshot: _Snapshot | None = None
        self._retired: list[_Snapshot] = []
        self._counted = dict.fromkeys(statistics.DAEMON_COUNTERS, 0)
        self._refused = 0  # connections that the flow caches had no room for, when last looked at
        self._stack = ExitStack()
        self._nexthops: NextHops | None = None
        self._maps: Mapping[str, bpf.Map] = {}
        self._resolved = asyncio.Event()

    def _assign_ids(self, addresses: Iterable[Address]) -> bool:
        """Ids for those that have none yet; False if they are used up."""
        for address in sorted(set(addresses) - self._ids.keys(), key=mapped):
            if self._next_id == lib.CRAB_NO_BACKEND:
                return False
            self._ids[address] = self._next_id
            self._next_id += 1
        return True

    def _name_backends(self, config: Config) -> None:
        if not self._assign_ids(b.address for s in config.services for b in s.backends):
            raise ConfigError("65,535 different backends have been served since the start; restart crablb serve")

    @property
    def bypass(self) -> bool:
        """Whether the XDP program may forward known fallback flows by itself."""
        return self.config.ack_bypass is not Bypass.OFF

    @property
    def modes(self) -> dict[str, str]:
        """How the XDP program is attached, by interface: ``native`` or ``generic``."""
        return {served.info.name: served.mode for served in self._served}

    @property
    def queues(self) -> int:
        return len(self._workers)

    @property
    def zero_copy(self) -> bool:
        return all(worker.xsk.zero_copy for worker in self._workers)

    async def start(self) -> None:
        """Bind, attach, and serve.  On return every backend that answers is in use."""
        try:
            await self._start()
        except BaseException:
            await self.close()
            raise

    async def _start(self) -> None:
        loop = asyncio.get_running_loop()
        self.failure = loop.create_future()
        for served in self._served:
            self._stack.enter_context(pins.own(served.role, f"the load balancer of {served.info.name}"))
        for served in self._served:
            served.find_old()
        inherited = self._inherited() if self.bypass else None
        if inherited:
            self._ids, self._indices = inherited.backends, inherited.services
            self._next_id = max(self._ids.values(), default=-1) + 1
        self._name_backends(self.config)
        program = self._load(inherited)
        self._index_services(self.config)
        self._open_queues()

        self._nexthops = NextHops(self._changed)
        await self._nexthops.start(self._ids)
        self._hops = dict(self._nexthops.current)
        self._publish()
        try:
            async with asyncio.timeout(RESOLVE_TIMEOUT):
                await self._all_resolved()
        except TimeoutError:
            self._name_unusable()

        def failed(xsk: XskSocket, number: int) -> None:
            loop.call_soon_threadsafe(self._failed, xsk, number)

        if inherited and self._flows:
            self._adopt(self._flows.flows())
        self._serve_vips(service.vip for service in self.config.services)
        self._sweeper = asyncio.create_task(self._sweep())
        self._balancer = asyncio.create_task(self._keep_balance())
        if self.config.report_listen and self.config.report_key:
            self._feedback = Feedback(self._balance, self.config.report_key, self.count, self._server_silent)
            self._feedback.follow(self.config.services)
            await self._feedback.start(*self.config.report_listen)
        self._name_narrow()
        cpus = sorted(os.sched_getaffinity(0))
        for i, worker in enumerate(self._workers if self.threads else ()):
            worker.start(cpus[i % len(cpus)], failed)
        for served in self._served:
            served.attach(program.program("crab_lb"), self.config.xdp_mode, self._maps)
        self._attached = True
        self._publish()  # what the XDP program can reach depends on how it is attached
        self._name_unreached()
        if self.config.announce is Announce.ARP:
            ours = {served.info.mac for served in self._served}
            for served in self._served:
                announcer = Announcer(served.info.name, ours, self._vip_in_use)
                self._announcers.append(announcer)
                announcer.start(service.vip.address for service in self.config.services)

    def _open_queues(self) -> None:
        counters = self._maps["worker_counters"]
        shared = counters.mmap()
        base = ffi.cast("struct crab_worker_counters *", ffi.from_buffer(shared))
        self._stack.callback(lambda: shared)  # the mapping lives as long as the workers
        for served in self._served:
            first = len(self._workers)
            for xsk in self._sockets(served.info):
                slot = len(self._workers)
                if slot == lib.CRAB_MAX_QUEUES:
                    xsk.close()
                    raise KernelError(f"the interfaces have more than {slot} queues; serve fewer of each: --queues N")
                worker = _Worker(xsk, self.config, base[slot].n, self._table, self._handlers)
                lib.crab_core_ask(worker.core, lib.crab_python_choose, self._custom.handle)
                self._workers.append(worker)
                xsk.register(self._maps["sockets"], slot)
            self._maps["interfaces"].update(served.info.index, struct.pack("=II", first, len(self._workers) - first))

    def _sockets(self, interface: Interface) -> Iterator[XskSocket]:
        for queue in range(self.config.queues or interface.rx_queues):
            try:
                yield XskSocket(
                    interface.name,
                    queue,
                    frames=FRAMES,
                    frame_size=2048 if interface.mtu <= 1700 else 4096,
                    load_program=False,
                )
            except XskError as error:
                # A device may have fewer queues in use than it has in all.
                if queue and self.config.queues is None and error.errno == errno.EINVAL:
                    return
                raise

    def _inherited(self) -> flowmap.Inherited | None:
        """What a daemon that died left, if it is of use."""
        for served in self._served:
            if not served.old:
                continue
            try:
                return flowmap.Inherited.open(served.pins, self.seed)
            except bpf.BpfNotFoundError:  # it died before it had pinned them, or it was of another version
                continue
            except ValueError as error:
                log.warning("fallback flows are given up", interface=served.info.name, reason=str(error))
        return None

    def _load(self, inherited: flowmap.Inherited | None) -> bpf.Object:
        """The XDP program with its maps."""
        buckets = flowmap.buckets_for(self.config.flows) if self.bypass else 1
        needed = max(self._indices.values(), default=-1) + 1 + len(self.config.services)
        sizes = {"service_counters": min(max(2 * needed, SERVICES), lib.CRAB_MAX_SERVICES)}
        reuse = {}
        if inherited:
            reuse = {"flows": inherited.flows, "paths": inherited.paths}
            buckets = inherited.flows.max_entries
        else:
            sizes["flows"] = buckets
        try:
            program = bpf.Object(bpf.object_path("lb"), reuse=reuse, max_entries=sizes)
        finally:
            if inherited:
                inherited.close()
        self._stack.enter_context(program)
        self._maps = program.maps
        self._maps["hashing"].update(0, flowmap.hashing(self.seed, buckets))
        if self.bypass:
            self._flows = flowmap.FlowTable(self._maps["flows"])
            self._table = lib.crab_table_new(self._flows.pointer, buckets)
            if not self._table:
                raise MemoryError("no memory for a table of flows")
            self._stack.callback(lib.crab_table_free, self._table)
        return program

    def _adopt(self, flows: npt.NDArray[np.void]) -> None:
        for worker in self._workers:
            array = ffi.from_buffer("struct crab_flow[]", flows)
            lib.crab_core_adopt(worker.core, array, len(flows), flowmap.now())
        log.info("took over fallback flows", flows=len(flows))

    async def close(self) -> None:
        """Stop serving; leave nothing in the kernel.  Idempotent."""
        for announcer in self._announcers:
            await announcer.close()
        self._announcers.clear()
        if self._feedback:
            self._feedback.close()
            self._feedback = None
        for task in (self._sweeper, self._balancer):
            if task:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        self._sweeper = self._balancer = None
        for served in self._served:
            served.detach()
        for worker in self._workers:
            worker.close()
        self._workers.clear()
        if self._nexthops:
            await self._nexthops.close()
            self._nexthops = None
        for snapshot in (*self._retired, *([self._snapshot] if self._snapshot else [])):
            snapshot.free()
        self._retired, self._snapshot = [], None
        self._stack.close()

    # ---- changes ----

    def _changed(self, changes: Mapping[Address, NextHop]) -> None:
        if not self._hops:
            return  # the first resolution: start() publishes it
        for address, hop in changes.items():
            usable = hop.state is HopState.RESOLVED
            if usable:
                log.info("backend reachable", backend=str(address), mac=hop.dst_mac.hex(":"))
                self._tell(Event("backend-up", address))
            elif address not in self._hops:
                log.warning("backend not usable yet", backend=str(address), reason=hop.reason)
            elif self._hops[address].state is HopState.RESOLVED:
                log.warning("backend unreachable", backend=str(address), reason=hop.reason)
                self.count("backends_lost")
                self._tell(Event("backend-down", address, reason=hop.reason))
        narrowed = any(a not in self._hops or hop.mtu != self._hops[a].mtu for a, hop in changes.items())
        self._hops.update(changes)
        self._publish()
        if narrowed:
            self._name_narrow()

    def _publish(self) -> None:
        self._publish_paths()
        self._begin_slowly()
        snapshot = _Snapshot(
            self.config, self.seed, self._ids, self._hops, self._paths, self._indices, self._balance, self._snapshot
        )
        self._custom.publish(snapshot.custom)
        lib.crab_snapshot_match(snapshot.c, self._handlers.matches())
        for worker in self._workers:
            lib.crab_core_publish(worker.core, snapshot.c)
        if self._snapshot:
            self._retired.append(self._snapshot)
        self._snapshot = snapshot
        self._free_retired()
        if all(hop.state is HopState.RESOLVED for hop in self._hops.values()):
            self._resolved.set()

    def _begin_slowly(self) -> None:
        """Note the backends that get connections now and did not before."""
        usable = {a for a, hop in self._hops.items() if hop.state is HopState.RESOLVED}
        serving = {
            (service.vip, b.address)
            for service in self.config.services
            for b in service.backends
            if b.share and b.address in usable
        }
        if self._attached:  # those that are there at the start are not new
            services = {service.vip: service for service in self.config.services}
            for vip, address in serving - self._serving:
                self._balance.begin(services[vip], address, time.monotonic())
        self._serving = serving

    async def _keep_balance(self) -> None:
        """Work out schedules anew as connections come, and let weights rise."""
        aged = time.monotonic()
        while True:
            await asyncio.sleep(REFRESH_INTERVAL if self._snapshot and self._snapshot.pools else AGE_INTERVAL)
            now = time.monotonic()
            snapshot = self._snapshot
            if not snapshot:
                continue
            if now - aged >= AGE_INTERVAL:
                aged = now
                reporting = self._feedback.reporting() if self._feedback else set()
                for service in self.config.services:
                    if service.vip in snapshot.pools:
                        self._balance.age(service, reporting)
            for _, pool in snapshot.pools.values():
                pool.refresh()
            rises = self._balance.next_step(self.config.services, self._stepped)
            if rises is not None and rises <= now:
                self._stepped = now
                self._publish()

    def _publish_paths(self) -> None:
        """Tell the XDP program how frames get to the backends; the workers get the flows of those it cannot reach."""
        if not self._attached:  # what is there may be in use still, by the program of a daemon that died
            return
        dead = {b.address for s in self.config.services for b in s.backends if b.state is State.DEAD}
        paths = {}
        for address in self._ids:
            hop = self._hops.get(address)
            if not hop or hop.state is not HopState.RESOLVED or address in dead:
                continue
            tx, redirect = self._ways(hop)
            if tx or redirect:
                paths[address] = flowmap.path(
                    address, hop.dst_mac + hop.src_mac, hop.mtu, hop.source, hop.ifindex, tx=tx, redirect=redirect
                )
        for address, backend_id in self._ids.items():
            path = paths.get(address, flowmap.no_path(address))
            if self._known_paths.get(address) != path:
                self._maps["paths"].update(backend_id, path)
                self._known_paths[address] = path
        self._paths = paths

    def _ways(self, hop: NextHop) -> tuple[bool, bool]:
        """How the XDP program can send on the interface of a next hop: by XDP_TX what came in there, by a redirect."""
        served = {s.info.index: s for s in self._served}.get(hop.ifindex)
        # XDP_TX into a veth wakes its other end only if that has an XDP program too (veth_xdp_flush); a redirect wakes
        # it always, if it polls.
        tx = served is not None and bool(served.mode) and (served.mode == "generic" or served.info.kind != "veth")
        generic = all(s.mode == "generic" for s in self._served)
        return tx, hop.redirect or generic or self.config.ack_bypass is Bypass.ON

    def _index_services(self, config: Config) -> None:
        """Indices for services that have none yet.  Raises :class:`ConfigError` if there is no room."""
        new = [service.vip.key() for service in config.services if service.vip.key() not in self._indices]
        room = self._maps["service_counters"].max_entries
        used = set(self._indices.values())
        free = (i for i in range(room) if i not in used)
        if len(new) > room - len(used):
            raise ConfigError(f"{room} services at most can be added without a restart; restart crablb serve")
        self._indices.update(zip(new, free, strict=False))

    def _serve_vips(self, vips: Iterable[Vip]) -> None:
        """Make the XDP program take these VIPs' packets, and no others."""
        wanted = {vip.key() for vip in vips}
        there = set(self._maps["services"].keys())
        for key in there - wanted:
            self._maps["services"].delete(key)
        for key in wanted - there:
            self._maps["services"].update(key, self._indices[key])

    def apply(self, config: Config) -> None:
        """Serve another configuration from now on.  No connection is broken whose backend lives.

        Raises :class:`ConfigError`, and changes nothing, if it differs in what is fixed at the start.
        """
        fixed = (
            "interfaces",
            "seed",
            "xdp_mode",
            "queues",
            "busy_poll",
            "table_size",
            "flows",
            "ack_bypass",
            "announce",
            "report_listen",
            "report_key",
        )
        differ = [name for name in fixed if getattr(config, name) != getattr(self.config, name)]
        if differ:
            raise ConfigError([f"{name} cannot be changed while serving; restart crablb serve" for name in differ])
        assert self._nexthops
        self._index_services(config)
        self._name_backends(config)
        served = {service.vip for service in config.services}
        # A VIP's packets come only while the workers know it.
        self._serve_vips(s.vip for s in self.config.services if s.vip in served)
        self.config = config
        self._nexthops.follow(self._ids)
        self._publish()
        self._serve_vips(served)
        for announcer in self._announcers:
            announcer.follow(vip.address for vip in served)
        if self._feedback:
            self._feedback.follow(config.services)
        self._tell(Event("changed"))
        self._sweep_soon.set()  # services that were removed lose their flows
        self.count("reloads")

    def handle(self, match: Match, function: Handle) -> None:
        """See :meth:`crablb.LoadBalancer.handle`."""
        self._handlers.add(match, function)
        self._publish()
        self._match_frames()

    def unhandle(self, match: Match) -> None:
        """See :meth:`crablb.LoadBalancer.unhandle`."""
        self._handlers.remove(match)
        self._match_frames()  # frames come only while the workers know what to do with them
        self._publish()

    def _match_frames(self) -> None:
        """Make the XDP program take the handlers' frames, and no others."""
        matches = self._handlers.matches()
        if matches.count:
            self._maps["handlers"].update(0, bytes(ffi.buffer(matches)))
        else:
            self._maps["handlers"].delete(0)

    async def _sweep(self) -> None:
        """Now and then: delete old flows, and forget removed services, and removed backends that have no flow left."""
        loop = asyncio.get_running_loop()
        while True:
            # wait_for of Python 3.11 may swallow a cancellation.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(SWEEP_INTERVAL):
                    await self._sweep_soon.wait()
            self._sweep_soon.clear()
            keys = {service.vip.key() for service in self.config.services}
            services = np.zeros(1 << 16, np.bool_)
            services[[self._indices[key] for key in keys]] = True
            counting = loop.run_in_executor(None, self._count_flows, services)
            try:
                flows, left = await asyncio.shield(counting)
            except asyncio.CancelledError:
                await counting  # it reads what is freed when this task has ended
                raise
            self._name_full(flows)
            # What was added meanwhile stays, too.
            keys |= {service.vip.key() for service in self.config.services}
            self._indices = {key: index for key, index in self._indices.items() if key in keys}
            self._balance.forget(self.config.services)
            configured = {b.address for s in self.config.services for b in s.backends}
            gone = {a for a, i in self._ids.items() if a not in configured and not left[i]}
            for address in gone:
                self._known_paths.pop(address, None)
                self._maps["paths"].update(self._ids.pop(address), bytes(flowmap.PATH_SIZE))
                self._hops.pop(address, None)
            if self._nexthops:  # also for what no event tells: whether an interface takes redirected packets
                self._nexthops.follow(self._ids)
            if gone:
                self._publish()

    def _count_flows(self, services: npt.NDArray[np.bool_]) -> tuple[int, npt.NDArray[np.uint32]]:
        """Sweep, in a thread of its own.

        How many flows the XDP program has, and how many each backend (by id) has there or in a worker's cache.
        """
        left = np.zeros(1 << 16, np.uint32)
        if self._flows:
            swept = self._flows.sweep(services)
            left[: len(swept)] += swept.astype(np.uint32)
        flows = int(left.sum())
        for worker in self._workers:
            lib.crab_core_count(worker.core, ffi.from_buffer("uint32_t[]", left), len(left), flowmap.now())
        return flows, left

    def _free_retired(self) -> None:
        in_use = []
        for snapshot in self._retired:
            if any(lib.crab_core_uses(worker.core, snapshot.c) for worker in self._workers):
                in_use.append(snapshot)
            else:
                snapshot.free()
        self._retired = in_use

    async def _all_resolved(self) -> None:
        """Wait for all that can still resolve."""
        if all(h.state is not HopState.UNRESOLVED for h in self._hops.values()):
            self._name_unusable()
            return
        await self._resolved.wait()

    def _name_narrow(self) -> None:
        """Name the tunnels that IPv6 does not fit through (RFC 8200, 5)."""
        for service in self.config.services:
            for backend in service.backends:
                hop = self._hops.get(backend.address)
                if not hop:
                    continue
                tunnel = service.fallback is Fallback.DSR_IPIP or (
                    service.fallback is Fallback.AUTO and not hop.on_link
                )
                room = hop.mtu - (20 if backend.address.version == 4 else 40)
                if hop.state is HopState.RESOLVED and tunnel and service.vip.address.version == 6 and room < 1280:
                    log.warning(
                        "clients that are not redirected may stall",
                        service=str(service.vip),
                        backend=str(backend.address),
                        reason=f"its tunnel carries {room} bytes, and IPv6 needs 1280; raise the MTU of the way to it",
                    )
                    self.count("narrow_tunnels")

    def _name_unreached(self) -> None:
        """Name the backends whose flows pass user space all their life."""
        for address, hop in self._hops.items():
            if self.bypass and hop.state is HopState.RESOLVED and address not in self._paths:
                log.info(
                    "fallback flows pass user space",
                    backend=str(address),
                    reason=f"interface {socket.if_indextoname(hop.ifindex)} takes no packets from XDP programs"
                    " (a veth does when GRO is on at its other end: ethtool -K PEER gro on)",
                )

    def _name_full(self, flows: int) -> None:
        """Name the tables that have no room, as the sweep found them."""
        room = self.config.flows
        if flows > NEARLY_FULL * room:
            self.count("flows_nearly_full")
            log.warning(
                "as many flows as `flows` allows, nearly; some may be left to user space",
                flows=flows,
                room=room,
                remedy="raise `flows`",
            )
        refused = self.statistics()["total"]["flows_full"]
        if refused > self._refused:
            self.count("cache_full")
            log.warning(
                "a worker's flow cache had no room for connections; they are decided by the hash alone",
                connections=refused - self._refused,
                remedy="raise `flows`",
            )
        self._refused = refused

    def _name_unusable(self) -> None:
        for address, hop in self._hops.items():
            if hop.state is not HopState.RESOLVED:
                log.warning("backend not usable yet", backend=str(address), reason=hop.reason)

    def _failed(self, xsk: XskSocket, number: int) -> None:
        if self.failure and not self.failure.done():
            self.failure.set_result(f"queue {xsk.queue} of {xsk.interface} failed: {os.strerror(number)}")

    def _policy_failed(self, vip: Vip, reason: str) -> None:
        """From a worker's thread."""

        def note() -> None:
            self.count("policy_failed")
            self._tell(Event("policy-failed", vip=vip, reason=reason))

        if self.failure:
            self.failure.get_loop().call_soon_threadsafe(note)

    def _handler_failed(self, match: Match, reason: str) -> None:
        """From a worker's thread."""

        def note() -> None:
            self.count("handler_failed")
            self._tell(Event("handler-failed", reason=f"{match}: {reason}"))

        if self.failure:
            self.failure.get_loop().call_soon_threadsafe(note)

    def _vip_in_use(self, address: Address, mac: bytes) -> None:
        self.count("vips_in_use")
        for service in self.config.services:
            if service.vip.address == address:
                self._tell(Event("vip-in-use", vip=service.vip, reason=f"{mac.hex(':')} has it"))

    def _server_silent(self, backend: Address) -> None:
        self._tell(Event("server-silent", backend))

    def _tell(self, event: Event) -> None:
        for listener in self.listeners:
            listener(event)

    def process_once(self, timeout: float) -> int:
        """See :meth:`crablb.LoadBalancer.process_once`."""
        done = 0
        for worker in self._workers:
            # Only one can be waited for; the others have their turn after it.
            wait = 0 if done or len(self._workers) > 1 else max(0, int(timeout * 1000))
            n = lib.crab_worker_once(worker.c, wait)
            if n < 0:
                raise KernelError(f"queue {worker.xsk.queue} of {worker.xsk.interface} failed: {os.strerror(-n)}")
            done += n
        if not done and timeout and len(self._workers) > 1:
            select.select([worker.xsk.fd for worker in self._workers], [], [], timeout)
            return self.process_once(0)
        return done

    def load(self, vip: Vip, backend: Address) -> Load:
        """What the policies know of a backend."""
        return self._balance.read(vip, backend)

    def count(self, what: str) -> None:
        """Add one to a daemon counter, a name of :data:`crablb.statistics.DAEMON_COUNTERS`."""
        self._counted[what] += 1
        if self._maps:
            index = statistics.DAEMON_COUNTERS.index(what)
            self._maps["daemon_counters"].update(index, struct.pack("=Q", self._counted[what]))

    def statistics(self) -> dict[str, Any]:
        """Packets by what became of them: see :func:`crablb.statistics.read`."""
        maps = self._maps
        return statistics.read(maps["xdp_counters"], maps["worker_counters"], maps["daemon_counters"], self.queues)
