"""From configuration and state to a snapshot: what the workers look up, immutable (``struct crab_snapshot``).

:func:`build` is a function of its arguments: it has no clock, asks nobody, and keeps nothing.
"""

from __future__ import annotations

import errno
from collections.abc import Container, Mapping
from dataclasses import dataclass
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
from crablb.selection.maglev import Table, maglev_table
from crablb.selection.pool import Pool
from crablb.values import resolve

__all__ = ["Sight", "Snapshot", "build"]

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


@dataclass(frozen=True, slots=True)
class Sight:
    """What a snapshot is made of, beside the configuration."""

    seed: bytes  # 16
    backends: Mapping[Address, int]  # ids; of those that were removed too, for the flows that they have
    services: Mapping[Vip, int]  # indices into map `service_counters`
    hops: Mapping[Address, NextHop]
    balance: Balance
    at: float = 0.0  # seconds, of the balance's clock
    reached: Container[Address] = ()  # backends that the XDP program reaches by itself
    unredirected: Container[tuple[Vip, Address]] = ()  # backends of services that are not redirected to now
    answered: Container[Address] = ()  # VIPs whose packets that are no service's are user space's
    matches: Any = None  # ``struct crab_matches *``: frames of one's own


class Snapshot:
    """A C snapshot, and the Maglev tables and pools that it points to.  To be freed when no worker uses it."""

    def __init__(self) -> None:
        self.c: Any = ffi.NULL  # ``struct crab_snapshot *``
        self.tables: dict[Any, Table] = {}  # by members
        self.chosen: dict[Vip, Table] = {}  # by service
        self.pools: dict[Vip, tuple[Any, Pool]] = {}  # by service: what it was made of, and itself
        self.custom: dict[int, Asked] = {}  # by index: the services whose policy is Python

    def free(self) -> None:
        """Idempotent."""
        c, self.c = self.c, ffi.NULL
        lib.crab_snapshot_free(c)


def build(config: Config, sight: Sight, before: Snapshot | None = None) -> Snapshot:
    """A snapshot; it shares with the one ``before`` the tables and pools whose members are the same, so that a
    schedule goes on.

    Raises :class:`MemoryError`.  Every backend and service of the configuration has its number in ``sight``.
    """
    made = Snapshot()
    backends, count = _backends(config, sight)
    services = ffi.new("struct crab_service[]", max(len(config.services), 1))
    prefixes: list[tuple[bytes, int]] = []
    exceptions: list[tuple[int, int]] = []
    for entry, service in zip(services, config.services, strict=False):
        _describe(entry, service, sight.services[service.vip])
        entry.refuses = config.closed in (Closed.AUTO, Closed.RESET) and _is_given_up(service, sight)
        entry.first_prefix, entry.prefix_count = len(prefixes), len(service.redirect_clients)
        for prefix in service.redirect_clients:
            bits = prefix.prefixlen + (96 if prefix.version == 4 else 0)
            prefixes.append((mapped(prefix.network_address), bits))
        own = _exceptions(service, sight, backends)
        entry.first_exception, entry.exception_count = len(exceptions), len(own)
        exceptions += own
        _choose(made, entry, service, config.table_size, sight, before)
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
    vips = ffi.new("struct crab_address[]", [(mapped(vip),) for vip in config.vips if vip in sight.answered])
    if lib.crab_snapshot_answer(made.c, vips, len(vips), config.ping, config.closed is not Closed.DROP):
        raise MemoryError("no memory for a snapshot")
    return made


def _is_given_up(service: Service, sight: Sight) -> bool:
    """Whether no backend of a service can take connections, now or in a moment."""
    hops = (sight.hops.get(backend.address) for backend in service.backends if backend.share)
    return all(hop is not None and hop.state is not HopState.RESOLVED and not hop.asking for hop in hops)


def _redirected(vip: Vip, backend: Backend, sight: Sight) -> bool:
    """Whether a service redirects to a backend."""
    return backend.cr and (vip, backend.address) not in sight.unredirected


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
            if address in sight.reached:
                entry.flags |= lib.CRAB_BACKEND_BYPASS
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
    made: Snapshot, entry: Any, service: Service, table_size: int, sight: Sight, before: Snapshot | None
) -> None:
    """Fill in how a service chooses: its table, and its pool or policy in Python."""
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
        table = maglev_table(members, table_size, sight.seed)
    made.tables[key] = made.chosen[service.vip] = table
    entry.table = ffi.from_buffer("uint16_t[]", table)
    if service.policy in CONSISTENT:
        return
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
        return
    entry.custom = 1
    choose = resolve(service.policy) if isinstance(service.policy, str) else service.policy
    made.custom[entry.index] = Asked(
        service.vip, choose, balance.backends(service.vip, eligible), np.array(ids, np.uint16)
    )


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
