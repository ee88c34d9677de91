"""From configuration and state to a snapshot: what the workers look up, immutable (``struct crab_snapshot``).

:func:`build` is a function of its arguments: it has no clock, asks nobody, and keeps nothing.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Collection, Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from crablb._native import ffi, lib
from crablb.kernel.netlink import HopState, NextHop
from crablb.model import (
    CONSISTENT,
    POLICIES,
    Address,
    Backend,
    Closed,
    Config,
    Fallback,
    Mode,
    OnDead,
    OptionForm,
    Service,
    State,
    Vip,
    mapped,
)
from crablb.selection.custom import Asked
from crablb.selection.loads import Balance
from crablb.selection.pool import Pool
from crablb.selection.tables import Table, empty, fill
from crablb.values import resolve

__all__ = ["Sight", "Snapshot", "at_once", "build"]

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


#: Tables from which on all CPUs make them.
MANY = 16
#: Places of tables that a CPU makes in about 30 ms.
A_MOMENT = 3 << 20


@dataclass(frozen=True, slots=True)
class Sight:
    """What a snapshot is made of, beside the configuration."""

    seed: bytes  # 16
    backends: Mapping[Address, int]  # ids; of those that were removed too, for the flows that they have
    services: Mapping[Vip, int]  # indices into map `service_counters`
    hops: Mapping[Address, NextHop]
    balance: Balance
    at: float = 0.0  # seconds, of the balance's clock
    unredirected: Collection[tuple[Vip, Address]] = ()  # backends of services that are not redirected to now
    answered: Container[Address] = ()  # VIPs whose packets that are no service's are user space's
    matches: Any = None  # ``struct crab_matches *``: frames of one's own
    version: Any = None  # of the numbers: as long as it is the same, and ``hops`` the same object; None: look
    taps: Any = None  # ``struct crab_taps *``: packets that somebody wants to see


class Snapshot:
    """A C snapshot, and the tables and pools that it points to.  To be freed when no worker uses it."""

    def __init__(self) -> None:
        self.c: Any = ffi.NULL  # ``struct crab_snapshot *``
        self.tables: dict[Any, Table] = {}  # by members
        self.chosen: dict[Vip, Table] = {}  # by service
        self.parts: dict[Vip, _Part] = {}  # by service
        self.made_of: tuple[Any, ...] = ()  # what all parts have in common
        self.backends: tuple[Any, int] = ffi.NULL, 0  # ``struct crab_backend[]``, and how many
        self.pools: dict[Vip, tuple[Any, Pool]] = {}  # by service: what it was made of, and itself
        self.custom: dict[int, Asked] = {}  # by index: the services whose policy is Python
        self.owed: set[Vip] = set()  # services that choose as before yet: the next snapshots have what they shall do

    def free(self) -> None:
        """Idempotent."""
        c, self.c = self.c, ffi.NULL
        lib.crab_snapshot_free(c)


@dataclass(slots=True)
class _Part:
    """What a snapshot has of a service, and the next one takes over where it has not changed."""

    service: Service
    settled: bool  # its weights do not change by themselves
    refuses: bool
    members: list[tuple[Address, bool]]  # its backends, and whether they speak connection redirection
    exceptions: list[tuple[int, int]]
    key: Any  # of its table


def at_once(table_size: int) -> int:
    """Tables that can be made while everything else waits."""
    return max(1, len(os.sched_getaffinity(0)) * A_MOMENT // table_size)


def build(config: Config, sight: Sight, before: Snapshot | None = None, most: int | None = None) -> Snapshot:
    """A snapshot; it shares with the one ``before`` the tables and pools whose members are the same, so that a
    schedule goes on; and of a service that is the same object, seen as before, it looks at nothing anew.

    ``most``: tables that are made; the services that need more choose as they did before, and are ``owed``: they come
    first in the next snapshot.  New services are never owed anything.  None: all are made.

    Raises :class:`MemoryError`.  Every backend and service of the configuration has its number in ``sight``.
    """
    made = Snapshot()
    made.made_of = (
        sight.hops, sight.version, sight.unredirected, config.closed, config.table, config.table_size, sight.seed,
    )  # fmt: skip
    parts = before.parts if before and _as_before(made.made_of, before.made_of) else {}
    unsettled = sight.balance.unsettled()

    def lasting(service: Service) -> _Part | None:
        """Its part of the snapshot before, if that is as it would be made."""
        part = parts.get(service.vip)
        return part if part and part.service is service and part.settled and service.vip not in unsettled else None

    kept = {service.vip: part for service in config.services if (part := lasting(service))}
    members = {s.vip: _members(s) for s in config.services if s.vip not in kept}
    alike = (
        bool(parts)
        and parts.keys() == {service.vip for service in config.services}
        and all(parts[vip].members == own for vip, own in members.items())
    )
    if before and alike:
        made.backends = before.backends
    else:
        made.backends = _backends(config, sight)
    backends, count = made.backends
    services = ffi.new("struct crab_service[]", max(len(config.services), 1))
    prefixes: list[tuple[bytes, int]] = []
    exceptions: list[tuple[int, int]] = []
    owed = before.owed if before else set()
    # By whether a service was owed one: those that change again and again are not in the others' way.
    tables: dict[bool, list[Callable[[], None]]] = {True: [], False: []}
    room = {True: most, False: None if most is None else max(1, most - len(owed))}

    def waits(vip: Vip) -> bool:
        """Whether enough tables are made, or others' turn comes first."""
        limit = room[vip in owed]
        return limit is not None and len(tables[vip in owed]) >= limit

    for entry, service in zip(services, config.services, strict=False):
        _describe(entry, service, sight.services[service.vip])
        entry.first_prefix, entry.prefix_count = len(prefixes), len(service.redirect_clients)
        for prefix in service.redirect_clients:
            bits = prefix.prefixlen + (96 if prefix.version == 4 else 0)
            prefixes.append((mapped(prefix.network_address), bits))
        part = kept.get(service.vip)
        if part and before:
            _take_over(made, entry, service, part.key, before)
        elif before and service.vip in before.chosen and waits(service.vip):
            key = before.parts[service.vip].key
            _take_over(made, entry, service, key, before)
            part = _Part(service, False, _refuses(config, service, sight), members[service.vip], [], key)
            made.owed.add(service.vip)
        else:
            key = _choose(made, entry, service, config, sight, before, tables[service.vip in owed])
            settled = service.vip not in unsettled
            part = _Part(service, settled, _refuses(config, service, sight), members[service.vip], [], key)
        if not alike or service.vip not in kept:
            part = replace(part, exceptions=_exceptions(service, sight, backends))
        made.parts[service.vip] = part
        entry.refuses = part.refuses
        entry.first_exception, entry.exception_count = len(exceptions), len(part.exceptions)
        exceptions += part.exceptions
    _fill(tables[True] + tables[False])
    c_prefixes = ffi.new("struct crab_prefix[]", max(len(prefixes), 1))
    for entry, (addr, bits) in zip(c_prefixes, prefixes, strict=False):
        entry.addr, entry.bits = addr, bits
    c_exceptions = ffi.new("struct crab_exception[]", max(len(exceptions), 1))
    for entry, (backend_id, flags) in zip(c_exceptions, exceptions, strict=False):
        entry.backend, entry.flags = backend_id, flags
    made.c = lib.crab_snapshot_new(
        services, len(config.services), backends, count, c_prefixes, len(prefixes), c_exceptions, len(exceptions),
        config.table_size, FORMS[config.option], sight.seed,
    )  # fmt: skip
    if not made.c:
        assert ffi.errno != errno.EINVAL, "what is said of prefixes or exceptions is wrong"
        raise MemoryError("no memory for a snapshot")
    if sight.matches:
        lib.crab_snapshot_match(made.c, sight.matches)
    if sight.taps:
        lib.crab_snapshot_tap(made.c, sight.taps)
    vips = ffi.new("struct crab_address[]", [(mapped(vip),) for vip in config.vips if vip in sight.answered])
    if lib.crab_snapshot_answer(made.c, vips, len(vips), config.ping, config.closed is not Closed.DROP):
        raise MemoryError("no memory for a snapshot")
    return made


def _as_before(now: tuple[Any, ...], before: tuple[Any, ...]) -> bool:
    """Whether what all services' parts are made of is the same."""
    return bool(before) and now[1] is not None and now[0] is before[0] and now[1:] == before[1:]


def _members(service: Service) -> list[tuple[Address, bool]]:
    return [(backend.address, backend.cr) for backend in service.backends]


def _take_over(made: Snapshot, entry: Any, service: Service, key: Any, before: Snapshot) -> None:
    """How a service chooses, as before."""
    table = made.tables[key] = made.chosen[service.vip] = before.tables[key]
    entry.table = ffi.from_buffer("uint16_t[]", table)
    if pool := before.pools.get(service.vip):
        made.pools[service.vip] = pool
        entry.pool = pool[1].c
    elif asked := before.custom.get(entry.index):
        made.custom[entry.index] = asked
        entry.custom = 1


def _fill(tables: Sequence[Callable[[], None]]) -> None:
    """Make the tables, of many by all CPUs.  Raises :class:`MemoryError`."""
    cpus = len(os.sched_getaffinity(0))
    if len(tables) >= MANY and cpus > 1:
        try:
            with ThreadPoolExecutor(cpus, "crablb-tables") as pool:
                list(pool.map(lambda make: make(), tables))
            return
        except RuntimeError:  # there can be no more threads
            pass
    for make in tables:
        make()


def _refuses(config: Config, service: Service, sight: Sight) -> bool:
    """Whether a service's SYNs are reset: no backend can take connections, now or in a moment."""
    if config.closed not in (Closed.AUTO, Closed.RESET):
        return False
    hops = (sight.hops.get(backend.address) for backend in service.backends if backend.share)
    return all(hop is not None and hop.state is not HopState.RESOLVED and not hop.asking for hop in hops)


def _redirected(vip: Vip, backend: Backend, sight: Sight) -> bool:
    """Whether a service redirects to a backend."""
    return backend.cr and not (sight.unredirected and (vip, backend.address) in sight.unredirected)


def _own_flags(vip: Vip, backend: Backend, sight: Sight) -> int:
    """What a service's own entry of a backend says, and what was found out about it there."""
    flags: int = lib.CRAB_BACKEND_CR if _redirected(vip, backend, sight) else 0
    return flags | (lib.CRAB_BACKEND_DEAD if backend.state is State.DEAD else 0)


def _backends(config: Config, sight: Sight) -> tuple[Any, int]:
    """``struct crab_backend[]`` by id, and how many: what holds for a backend in every service."""
    count = max(sight.backends.values(), default=-1) + 1
    backends = ffi.new("struct crab_backend[]", max(count, 1))
    without_cr = {b.address for service in config.services for b in service.backends if not b.cr}
    configured = config.backends
    for address, backend_id in sight.backends.items():
        entry, hop = backends[backend_id], sight.hops.get(address)
        entry.addr = mapped(address)
        if address.version == 6:
            entry.flags |= lib.CRAB_BACKEND_V6
        if address in configured and address not in without_cr:
            entry.flags |= lib.CRAB_BACKEND_CR
        if hop and hop.state is HopState.RESOLVED:
            entry.flags |= lib.CRAB_BACKEND_USABLE
            if hop.on_link:
                entry.flags |= lib.CRAB_BACKEND_ON_LINK
            entry.mtu, entry.ifindex = hop.mtu, hop.ifindex
            entry.dst_mac, entry.src_mac = hop.dst_mac, hop.src_mac
            if hop.source:
                entry.tunnel_src = mapped(hop.source)
    return backends, count


def _exceptions(service: Service, sight: Sight, backends: Any) -> list[tuple[int, int]]:
    """Where the service's own entry says otherwise than what holds for a backend everywhere: id and flags, by id.

    That a backend is dead is always a service's own word: another one, from which it was removed, may have flows to it.
    """
    own = lib.CRAB_BACKEND_CR | lib.CRAB_BACKEND_DEAD
    told = ((sight.backends[b.address], _own_flags(service.vip, b, sight)) for b in service.backends)
    return sorted((i, flags) for i, flags in told if backends[i].flags & own != flags)


def _describe(entry: Any, service: Service, index: int) -> None:
    """Fill in what a service's settings say."""
    entry.addr = mapped(service.vip.address)
    entry.port_be = int.from_bytes(service.vip.port.to_bytes(2, "big"), "little")
    entry.protocol = 6
    entry.mode = MODES[service.mode]
    entry.fallback = FALLBACKS[service.fallback]
    entry.on_dead = ON_DEAD[service.on_dead]
    entry.index = index
    if service.policy == "source-hash":
        entry.source4, entry.source6 = service.source_prefix


def _choose(
    made: Snapshot,
    entry: Any,
    service: Service,
    config: Config,
    sight: Sight,
    before: Snapshot | None,
    tables: list[Callable[[], None]],
) -> Any:
    """Fill in how a service chooses: its table, and its pool or policy in Python.  The table's key; if it is a new one,
    ``tables`` gets what makes it."""
    balance = sight.balance
    usable = {b.address: b for b in service.backends if _usable(sight.hops.get(b.address))}
    weights = balance.weights(service, usable.values(), sight.at)
    # Those that are not usable keep their places in the table, for others to sit in.
    scale = balance.scale(service, weights)
    members = {
        sight.backends[b.address]: (b.address, weights.get(b.address, 0), b.weight * scale) for b in service.backends
    }
    # Services with the same backends share a table, and so does the next snapshot.
    key = frozenset(members.items())
    table = made.tables.get(key)
    if table is None and before:
        table = before.tables.get(key)
    if table is None:
        if any(weight for _, weight, _ in members.values()):
            table = np.empty(config.table_size, np.uint16)
            tables.append(partial(fill, table, members, sight.seed, config.table))
        else:
            table = empty(config.table_size)
    made.tables[key] = made.chosen[service.vip] = table
    entry.table = ffi.from_buffer("uint16_t[]", table)
    if service.policy in CONSISTENT:
        return key
    # Who cannot be redirected to is the fallback's.
    eligible = {
        address: weight
        for address, weight in weights.items()
        if _redirected(service.vip, usable[address], sight) and address.version == service.vip.address.version
    }
    ids = [sight.backends[address] for address in eligible]
    if service.policy in POLICIES:
        made.pools[service.vip] = _pool(service, eligible, ids, balance, before)
        entry.pool = made.pools[service.vip][1].c
        return key
    entry.custom = 1
    choose = resolve(service.policy) if isinstance(service.policy, str) else service.policy
    made.custom[entry.index] = Asked(
        service.vip, choose, balance.backends(service.vip, eligible), np.array(ids, np.uint16)
    )
    return key


def _usable(hop: NextHop | None) -> bool:
    return hop is not None and hop.state is HopState.RESOLVED


def _pool(
    service: Service, weights: Mapping[Address, int], ids: list[int], balance: Balance, before: Snapshot | None
) -> tuple[Any, Pool]:
    """The service's pool, and what it is made of: that of the snapshot before, if nothing has changed."""
    key = service.policy, tuple(zip(weights.items(), ids, strict=True))
    old = before.pools.get(service.vip) if before else None
    if old and old[0] == key:
        return old
    members = {
        backend_id: (balance.load(service.vip, address), weight)
        for (address, weight), backend_id in zip(weights.items(), ids, strict=True)
    }
    return key, Pool(str(service.policy), members, balance.turn(service.vip))
