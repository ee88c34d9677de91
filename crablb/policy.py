"""Policies: which backend a connection is redirected to.

The policies themselves are C (native/policy_*.c).  What is here keeps their loads and positions, which outlive changes
of the configuration, and lets the weight of a backend that is new rise slowly.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from crablb._native import ffi, lib
from crablb.model import Address, Backend, Service, Vip

__all__ = ["BUILTIN", "CONSISTENT", "Balance", "Load", "Pool"]

#: Decided by a hash alone, so alike by every load balancer of one configuration: they serve the fallback too.
CONSISTENT = ("maglev", "source-hash")
_C_POLICIES = [ffi.string(lib.crab_policy_name(i)).decode() for i in range(64) if lib.crab_policy_name(i)]
#: Every policy there is, by name.
BUILTIN = (*CONSISTENT, *_C_POLICIES)
#: Weights are multiplied by so much while one of them rises, in so many steps.
STEPS = 10


@dataclass(frozen=True, slots=True)
class Load:
    """What is known of one backend of one service."""

    assigned: int  # connections given to it by redirection, modulo 2^32
    open: int  # connections: those its server reported, and those assigned since
    figure: float  # load that its server reported; 1.0: fully loaded


class Pool:
    """Members of a service and a policy that chooses among them."""

    def __init__(self, policy: str, members: Mapping[int, tuple[Any, int]], turn: Any) -> None:
        """``members``: backend id -> (``struct crab_load *``, weight above 0), in the order of turns."""
        self.keep = members, turn
        array = ffi.new("struct crab_member[]", max(len(members), 1))
        for entry, (backend_id, (load, weight)) in zip(array, members.items(), strict=False):
            entry.backend, entry.weight, entry.load = backend_id, weight, load
        c = lib.crab_pool_new(policy.encode(), array, len(members), turn)
        if not c:
            raise MemoryError(f"no memory for policy {policy}")
        self.c = ffi.gc(c, lib.crab_pool_free)

    def pick(self, random: int) -> int:
        """The backend id that the policy chooses, given 64 random bits; ``lib.CRAB_NO_BACKEND`` without members."""
        chosen: int = lib.crab_pool_pick(self.c, random)
        return chosen

    def refresh(self) -> None:
        """Take the loads as they are now into account."""
        lib.crab_pool_refresh(self.c)


class Balance:
    """The loads, turns and slow starts of all services.  Times are seconds of one monotonic clock."""

    def __init__(self) -> None:
        self._loads: dict[tuple[Vip, Address], Any] = {}
        self._turns: dict[Vip, Any] = {}
        self._since: dict[tuple[Vip, Address], float] = {}  # when a backend that is starting slowly began

    def load(self, vip: Vip, backend: Address) -> Any:
        """``struct crab_load *``."""
        return self._loads.setdefault((vip, backend), ffi.new("struct crab_load *"))

    def turn(self, vip: Vip) -> Any:
        """``struct crab_turn *``."""
        return self._turns.setdefault(vip, ffi.new("struct crab_turn *"))

    def read(self, vip: Vip, backend: Address) -> Load:
        load = self.load(vip, backend)
        since = (load.assigned - load.base) % 2**32
        return Load(load.assigned, load.open + since, load.figure / 1000)

    def report(self, vip: Vip, backend: Address, connections: int, figure: int) -> None:
        """A server's report: its connections, and its load in thousandths.  What was assigned until now is in it."""
        load = self.load(vip, backend)
        load.open, load.base, load.figure = connections, load.assigned, figure

    def begin(self, service: Service, backend: Address, at: float) -> None:
        """The backend gets connections from now on, and did not before."""
        if service.slow_start:
            self._since[service.vip, backend] = at

    def weights(self, service: Service, backends: Iterable[Backend], at: float) -> dict[Address, int]:
        """The weights that these backends have at this moment; those of weight 0 are left out."""
        shares = {b.address: b.share for b in backends if b.share}
        steps = {address: self._step(service, address, at) for address in shares}
        if all(step == STEPS for step in steps.values()):
            return shares
        return {address: max(1, share * steps[address]) for address, share in shares.items()}

    def _step(self, service: Service, backend: Address, at: float) -> int:
        began = self._since.get((service.vip, backend))
        if began is None or at - began >= service.slow_start:
            self._since.pop((service.vip, backend), None)
            return STEPS
        return max(1, int((at - began) / service.slow_start * STEPS))

    def next_step(self, services: Iterable[Service], at: float) -> float | None:
        """When a weight rises next; None: none is rising."""
        known = {service.vip: service.slow_start for service in services}
        times = []
        for (vip, _), began in self._since.items():
            step = known.get(vip, 0.0) / STEPS
            times.append(began + (int((at - began) / step) + 1) * step if step else at)
        return min(times, default=None)

    def forget(self, services: Iterable[Service]) -> None:
        """Keep what these services need only."""
        services = list(services)
        pairs = {(service.vip, b.address) for service in services for b in service.backends}
        vips = {service.vip for service in services}
        self._loads = {pair: load for pair, load in self._loads.items() if pair in pairs}
        self._since = {pair: began for pair, began in self._since.items() if pair in pairs}
        self._turns = {vip: turn for vip, turn in self._turns.items() if vip in vips}

    def age(self, service: Service, reporting: Iterable[Address] = ()) -> None:
        """Give the backends that do not report a neutral load: connections for their weight as the others have on
        average, and of those assigned only what came since the last call."""
        told = {b.address: b for b in service.backends if b.address in set(reporting)}
        weight = sum(b.share for b in told.values())
        mean = sum(self.load(service.vip, a).open for a in told) / weight if weight else 0.0
        figures = [self.load(service.vip, a).figure for a in told]
        for backend in service.backends:
            if backend.address not in told:
                load = self.load(service.vip, backend.address)
                load.base = load.assigned
                load.open = round(mean * backend.share)
                load.figure = sum(figures) // len(figures) if figures else 0
