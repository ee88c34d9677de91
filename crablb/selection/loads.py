"""What is known of the backends: their loads, whose turn it is, and how warm they are.  It outlives configurations."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from crablb._native import ffi
from crablb.model import Address, Backend, Service, Vip

__all__ = ["SILENT", "Backends", "Balance", "Load"]

#: Weights are multiplied by so much while one of them rises, in so many steps.
STEPS = 10
#: Seconds without a report after which a server's load is not known any more.
SILENT = 3.0
#: Connections of a backend at most, whatever it reports: what is assigned until the next report is added, in 32 bits.
MANY = 2**31 - 1

_LOAD = np.dtype([("assigned", "<u4"), ("base", "<u4"), ("open", "<u4"), ("figure", "<u4")])
assert _LOAD.itemsize == ffi.sizeof("struct crab_load")


@dataclass(frozen=True, slots=True)
class Load:
    """What is known of one backend of one service."""

    assigned: int  # connections given to it by redirection, modulo 2^32
    open: int  # connections: those its server reported, and those assigned since
    figure: float  # load that its server reported; 1.0: fully loaded


@dataclass(frozen=True, slots=True)
class Backends:
    """The backends of a service that can be redirected to, as arrays of shape (backends,), for a policy in Python."""

    addresses: tuple[Address, ...]
    weights: npt.NDArray[np.int64]  # at this moment; those of weight 0 are not here
    _loads: npt.NDArray[np.void] = field(repr=False)
    _slots: npt.NDArray[np.intp] = field(repr=False)

    def __len__(self) -> int:
        return len(self.addresses)

    @property
    def connections(self) -> npt.NDArray[np.int64]:
        """Those that the servers reported, and those assigned since."""
        loads = self._loads[self._slots]
        found: npt.NDArray[np.int64] = loads["open"].astype(np.int64) + (loads["assigned"] - loads["base"])
        return found

    @property
    def load(self) -> npt.NDArray[np.float64]:
        """What the servers reported; 1.0: fully loaded."""
        return self._loads["figure"][self._slots] / 1000.0

    def assigned(self, indices: npt.NDArray[np.intp]) -> None:
        """Count connections as assigned to these."""
        np.add.at(self._loads["assigned"], self._slots[indices], np.uint32(1))


class _Block:
    """The loads of a service's backends: never moved, because workers hold pointers."""

    SIZE = 4096  # loads at first; more are in blocks of as many

    def __init__(self) -> None:
        self._slots: dict[Address, int] = {}
        self._parts: list[Any] = []

    def load(self, backend: Address) -> Any:
        """``struct crab_load *``, which keeps what it points into: pools outlive configurations too."""
        slot = self._slots.setdefault(backend, len(self._slots))
        while slot >= len(self._parts) * self.SIZE:
            self._parts.append(ffi.new(f"struct crab_load[{self.SIZE}]"))
        part = self._parts[slot // self.SIZE]
        # A pool writes there as long as it lives, also when the service is gone: its pointer keeps the part alive.
        return ffi.gc(ffi.addressof(part, slot % self.SIZE), lambda _, part=part: None)

    def backends(self, weights: Mapping[Address, int]) -> Backends:
        for address in weights:
            self.load(address)
        views = [np.frombuffer(ffi.buffer(part), _LOAD) for part in self._parts]
        # More than one part is a copy: its loads are those of the moment when the snapshot was made.
        loads = views[0] if len(views) == 1 else np.concatenate(views) if views else np.empty(0, _LOAD)
        slots = np.array([self._slots[a] for a in weights], np.intp)
        return Backends(tuple(weights), np.array(list(weights.values()), np.int64), loads, slots)


class Balance:
    """The loads, turns and slow starts of all services.  Times are seconds of one monotonic clock."""

    def __init__(self) -> None:
        self._blocks: dict[Vip, _Block] = {}
        self._turns: dict[Vip, Any] = {}
        self._since: dict[tuple[Vip, Address], float] = {}  # when a backend that is starting slowly began
        self._serving: set[tuple[Vip, Address]] = set()  # who gets connections
        self._heard: dict[Address, float] = {}  # when a server that reports did so last

    def _block(self, vip: Vip) -> _Block:
        return self._blocks.setdefault(vip, _Block())

    def load(self, vip: Vip, backend: Address) -> Any:
        """``struct crab_load *``."""
        return self._block(vip).load(backend)

    def backends(self, vip: Vip, weights: Mapping[Address, int]) -> Backends:
        """What a policy in Python sees of a service's backends."""
        return self._block(vip).backends(weights)

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
        load.open, load.base, load.figure = min(connections, MANY), load.assigned, figure

    def heard(self, backend: Address, at: float) -> bool:
        """A server reported.  True if its load was not known before."""
        new = backend not in self._heard
        self._heard[backend] = at
        return new

    def silent(self, at: float) -> set[Address]:
        """The servers that have fallen silent since the last call: their loads are not known any more."""
        gone = {address for address, heard in self._heard.items() if at - heard > SILENT}
        for address in gone:
            del self._heard[address]
        return gone

    def follow(self, services: Iterable[Service], usable: Container[Address], at: float | None) -> None:
        """Note which backends get connections now: those that did not before begin slowly, ``at`` this time.

        ``at``: None at the start, where none is new.
        """
        serving = {
            (service.vip, b.address): service
            for service in services
            for b in service.backends
            if b.share and b.address in usable
        }
        if at is not None:
            for vip, address in serving.keys() - self._serving:
                self.begin(serving[vip, address], address, at)
        self._serving = set(serving)

    def begin(self, service: Service, backend: Address, at: float) -> None:
        """The backend gets connections from now on, and did not before: it starts slowly, if the service says so."""
        if service.slow_start:
            self._since[service.vip, backend] = at

    def weights(self, service: Service, backends: Iterable[Backend], at: float) -> dict[Address, int]:
        """The weights that these backends have at this moment; those of weight 0 are left out."""
        shares = {b.address: b.share for b in backends if b.share}
        steps = {address: self._step(service, address, at) for address in shares}
        if all(step == STEPS for step in steps.values()):
            return shares
        return {address: max(1, share * steps[address]) for address, share in shares.items()}

    def scale(self, service: Service, weights: Mapping[Address, int]) -> int:
        """What :meth:`weights` has a backend's full weight multiplied by: more than 1 while one of them warms up."""
        full = {b.address: b.weight for b in service.backends}
        return STEPS if any(weight != full[address] for address, weight in weights.items()) else 1

    def _step(self, service: Service, backend: Address, at: float) -> int:
        began = self._since.get((service.vip, backend))
        if began is None or at - began >= service.slow_start:
            self._since.pop((service.vip, backend), None)
            return STEPS
        return max(1, int((at - began) / service.slow_start * STEPS))

    def next_step(self, services: Iterable[Service], at: float) -> float | None:
        """When a weight rises next; None: none is rising."""
        steps = {service.vip: service.slow_start / STEPS for service in services}
        return min(
            (
                began + (int(max(0.0, at - began) / step) + 1) * step
                for (vip, _), began in self._since.items()
                # else it has risen, or is not there to rise
                if (step := steps.get(vip, 0.0)) and at - began < STEPS * step
            ),
            default=None,
        )

    def forget(self, services: Iterable[Service]) -> None:
        """Keep what these services need only."""
        services = list(services)
        pairs = {(service.vip, b.address) for service in services for b in service.backends}
        vips = {service.vip for service in services}
        self._blocks = {vip: block for vip, block in self._blocks.items() if vip in vips}
        self._since = {pair: began for pair, began in self._since.items() if pair in pairs}
        self._turns = {vip: turn for vip, turn in self._turns.items() if vip in vips}
        backends = {address for _, address in pairs}
        self._heard = {address: at for address, at in self._heard.items() if address in backends}

    def age(self, service: Service) -> None:
        """Give the backends that do not report a neutral load: connections for their weight as the others have on
        average, and of those assigned only what came since the last call."""
        told = {b.address: b for b in service.backends if b.address in self._heard}
        weight = sum(b.share for b in told.values())
        mean = sum(self.load(service.vip, a).open for a in told) / weight if weight else 0.0
        figures = [self.load(service.vip, a).figure for a in told]
        for backend in service.backends:
            if backend.address not in told:
                load = self.load(service.vip, backend.address)
                load.base = load.assigned
                load.open = min(round(mean * backend.share), MANY)
                load.figure = sum(figures) // len(figures) if figures else 0
