"""What is known of the backends: their loads, whose turn it is, and how warm they are.  It outlives configurations."""

from __future__ import annotations

import mmap
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from crablb._native import ffi, lib
from crablb.model import Address, Backend, Service, Vip

__all__ = ["SILENT", "WHOLE", "Backends", "Balance", "Load"]

#: Weights are multiplied by so much while one of them rises, in so many steps.
STEPS = 10
#: And by so much while one of them is another percentage.
WHOLE = 100
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

    ROOM = lib.CRAB_NO_BACKEND  # as many as there are ids of backends; what is not touched takes no memory

    def __init__(self) -> None:
        # Not the heap's: what was somebody's before is cleared there, and so touched.
        self._loads = np.frombuffer(mmap.mmap(-1, self.ROOM * _LOAD.itemsize), _LOAD)
        self._first = ffi.cast("struct crab_load *", ffi.from_buffer(self._loads))
        self._slots: dict[Address, int] = {}
        self._cooling: dict[Address, int] = {}  # of backends that were removed, which workers may be assigning to yet
        self._free: list[int] = []

    def load(self, backend: Address) -> Any:
        """``struct crab_load *``, which keeps what it points into: pools outlive configurations too."""
        # A pool writes there as long as it lives, also when the service is gone: its pointer keeps the loads alive.
        return ffi.gc(self._first + self._slot(backend), lambda _, loads=self._loads: None)

    def _slot(self, backend: Address) -> int:
        if backend in self._cooling:
            self._slots[backend] = self._cooling.pop(backend)
        elif backend not in self._slots:
            fresh = len(self._slots) + len(self._cooling)
            self._slots[backend] = self._free.pop() if self._free else fresh
        return self._slots[backend]

    @property
    def known(self) -> Iterable[Address]:
        """Those that have a place here."""
        return self._slots.keys()

    def numbers(self, backend: Address) -> Any:
        """What is known of one that is :attr:`known`, in the order of ``struct crab_load``."""
        return self._loads[self._slots[backend]].item()

    def backends(self, weights: Mapping[Address, int]) -> Backends:
        slots = np.array([self._slot(address) for address in weights], np.intp)
        return Backends(tuple(weights), np.array(list(weights.values()), np.int64), self._loads, slots)

    def copy(self) -> Self:
        made = type(self)()
        for address, slot in self._slots.items():
            made._loads[made._slot(address)] = self._loads[slot]
        return made

    def forget(self, kept: Container[Address]) -> None:
        """See :meth:`Balance.forget`."""
        for slot in self._cooling.values():
            self._loads[slot] = 0
            self._free.append(slot)
        gone = [address for address in self._slots if address not in kept]
        self._cooling = {address: self._slots.pop(address) for address in gone}


_NOTHING = Load(0, 0, 0.0)


class Balance:
    """The loads, turns and slow starts of all services.  Times are seconds of one monotonic clock."""

    def __init__(self) -> None:
        self._blocks: dict[Vip, _Block] = {}
        self._turns: dict[Vip, Any] = {}
        self._since: dict[tuple[Vip, Address], float] = {}  # when a backend that is starting slowly began
        self._serving: dict[Vip, tuple[Service, Container[Address], set[Address]]] = {}  # of whom, who gets connections
        self._percents: dict[tuple[Vip, Address], int] = {}  # of their weight, where that is not all of it
        self._heard: dict[Address, float] = {}  # when a server that reports did so last

    def copy(self, vip: Vip) -> Self:
        """What is known of one service's backends, apart: what is assigned there is assigned nowhere else."""
        made = type(self)()
        if vip in self._blocks:
            made._blocks[vip] = self._blocks[vip].copy()
        made.turn(vip).next = self.turn(vip).next
        made._since = {pair: began for pair, began in self._since.items() if pair[0] == vip}
        made._percents = {pair: percent for pair, percent in self._percents.items() if pair[0] == vip}
        return made

    def _block(self, vip: Vip) -> _Block:
        block = self._blocks.get(vip)
        if block is None:
            block = self._blocks[vip] = _Block()
        return block

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
        if vip not in self._blocks:  # nothing was reported or assigned, and to look takes no memory
            return _NOTHING
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

    def reports(self, backend: Address) -> bool:
        """Whether the load of this server is known."""
        return backend in self._heard

    def silent(self, at: float) -> set[Address]:
        """The servers that have fallen silent since the last call: their loads are not known any more."""
        gone = {address for address, heard in self._heard.items() if at - heard > SILENT}
        for address in gone:
            del self._heard[address]
        return gone

    def follow(
        self,
        services: Iterable[Service],
        usable: Container[Address],
        at: float | None,
        warm: Container[tuple[Vip, Address]] = (),
    ) -> None:
        """Note which backends get connections now: those that did not before begin slowly, ``at`` this time.

        ``at``: None at the start, where none is new.  ``warm``: of whom it is the start all the same.  Of a service
        that is the same object, as ``usable`` is, nothing is new.
        """
        serving = {}
        for service in services:
            before = self._serving.get(service.vip)
            if before and before[0] is service and before[1] is usable:
                serving[service.vip] = before
                continue
            own = {b.address for b in service.backends if b.share and b.address in usable}
            if at is not None:
                for address in own - before[2] if before else own:
                    if (service.vip, address) not in warm:
                        self.begin(service, address, at)
            serving[service.vip] = service, usable, own
        self._serving = serving

    def begin(self, service: Service, backend: Address, at: float) -> None:
        """The backend gets connections from now on, and did not before: it starts slowly, if the service says so."""
        if service.slow_start:
            self._since[service.vip, backend] = at

    def give(self, pair: tuple[Vip, Address], percent: int) -> None:
        """Have a backend so much of its weight from now on; at least 1."""
        if percent == WHOLE:
            self._percents.pop(pair, None)
        else:
            self._percents[pair] = percent

    def unsettled(self) -> set[Vip]:
        """The services of which a backend has another weight than its own, or had when it was last asked for."""
        return {vip for vip, _ in (*self._since, *self._percents)}

    def weights(self, service: Service, backends: Iterable[Backend], at: float) -> dict[Address, int]:
        """The weights that these backends have at this moment; those of weight 0 are left out."""
        shares = {b.address: b.share for b in backends if b.share}
        if not (self._since or self._percents):
            return shares
        steps = {address: self._step(service, address, at) for address in shares}
        for address in (address for address, step in steps.items() if step == STEPS):
            self._since.pop((service.vip, address), None)  # it has risen
        if any(step != STEPS for step in steps.values()):
            shares = {address: max(1, share * steps[address]) for address, share in shares.items()}
        percents = {address: self._percents.get((service.vip, address), WHOLE) for address in shares}
        if any(percent != WHOLE for percent in percents.values()):
            shares = {address: share * percents[address] for address, share in shares.items()}
        return shares

    def scale(self, service: Service, weights: Iterable[Address]) -> int:
        """What the last call of :meth:`weights`, which gave these, has a full weight multiplied by: more than 1 while
        one of them warms up, or has another percentage of it."""
        if not (self._since or self._percents):
            return 1
        pairs = [(service.vip, address) for address in weights]
        rising = STEPS if any(pair in self._since for pair in pairs) else 1
        return rising * (WHOLE if any(pair in self._percents for pair in pairs) else 1)

    def part(self, service: Service, backend: Address, at: float) -> float:
        """Of a backend's weight, what counts at this moment.  To ask changes nothing."""
        percent = self._percents.get((service.vip, backend), WHOLE)
        return self._step(service, backend, at) / STEPS * percent / WHOLE

    def _step(self, service: Service, backend: Address, at: float) -> int:
        began = self._since.get((service.vip, backend))
        if began is None or at - began >= service.slow_start:
            return STEPS
        return max(1, int((at - began) / service.slow_start * STEPS))

    def next_step(self, services: Iterable[Service], at: float) -> float | None:
        """When a weight rises next; None: none is rising."""
        if not self._since:
            return None
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

    def export(self) -> dict[str, Any]:
        """As plain values, for :meth:`adopt` in another process of this machine, whose monotonic clock is the same."""
        loads = [
            (str(vip), str(address), *map(int, block.numbers(address)))
            for vip, block in self._blocks.items()
            for address in block.known
        ]
        return {
            "loads": loads,  # assigned, base, open, figure
            "turns": [(str(vip), int(turn.next)) for vip, turn in self._turns.items()],
            "since": [(str(vip), str(address), began) for (vip, address), began in self._since.items()],
            "heard": [(str(address), at) for address, at in self._heard.items()],
        }

    def adopt(self, known: Mapping[str, Any], services: Iterable[Service]) -> None:
        """Go on with what another process knew of these services' backends; what was assigned here meanwhile counts.

        Raises ``LookupError``, ``TypeError``, ``ValueError``, ``ArithmeticError`` for what is nothing of the kind.
        """
        services = list(services)
        pairs = {(str(s.vip), str(b.address)): (s.vip, b.address) for s in services for b in s.backends}
        vips = {str(service.vip): service.vip for service in services}
        backends = {str(address): address for _, address in pairs.values()}
        for vip, address, assigned, base, opened, figure in known["loads"]:
            if pair := pairs.get((vip, address)):
                load = self.load(*pair)
                load.open, load.figure = min(opened + (assigned - base) % 2**32, MANY), figure
        for vip, turn in known["turns"]:
            if vip in vips:
                self.turn(vips[vip]).next = turn
        for vip, address, began in known["since"]:
            if pair := pairs.get((vip, address)):
                self._since[pair] = float(began)
        self._heard |= {backends[address]: float(at) for address, at in known["heard"] if address in backends}

    def forget(self, services: Iterable[Service]) -> None:
        """Keep what these services need only.

        To be called when no worker uses a snapshot from before the last call: what was let go of then is others' now.
        """
        services = list(services)
        pairs = {(service.vip, b.address) for service in services for b in service.backends}
        vips = {service.vip for service in services}
        self._blocks = {vip: block for vip, block in self._blocks.items() if vip in vips}
        for service in services:
            if service.vip in self._blocks:
                self._blocks[service.vip].forget({b.address for b in service.backends})
        self._since = {pair: began for pair, began in self._since.items() if pair in pairs}
        self._percents = {pair: percent for pair, percent in self._percents.items() if pair in pairs}
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
