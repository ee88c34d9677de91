"""The XDP program's flows (map ``flows`` of bpf/lb.bpf.c): to make, age, count and take them over.

A flow that goes by fallback is there twice: in the cache of the worker that decided it, and in this map, which the XDP
program goes by and which outlives the process.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from crablb._native import ffi, lib
from crablb.kernel.bpf import Map
from crablb.model import Address, Vip, mapped, unmapped

__all__ = ["FLOW", "FlowTable", "Inherited", "Numbered", "buckets_for", "flow_hash", "hashing", "now"]

#: ``struct crab_flow``.
FLOW = np.dtype(
    [("hash", "<u8"), ("backend", "<u2"), ("service", "<u2"), ("seen", "<u2"), ("state", "u1"), ("flags", "u1")]
)
#: Places in the table for each flow that is asked for: a bucket of four is full for one flow in some thousands then.
PLACES_A_FLOW = 4


def now() -> int:
    """The clock of ``seen``, before it is cut to 16 bits: seconds of CLOCK_MONOTONIC_COARSE, which Linux numbers 6."""
    return int(time.clock_gettime(6))


def buckets_for(flows: int) -> int:
    """How many buckets map ``flows`` needs for so many flows: a power of two."""
    bits: int = (flows * PLACES_A_FLOW // lib.CRAB_BUCKET - 1).bit_length()
    return 1 << max(4, bits)


def hashing(seed: bytes, buckets: int) -> bytes:
    """``struct crab_hashing``, the value of map ``hashing``."""
    return seed + struct.pack("=II", buckets - 1, 0)


def flow_hash(seed: bytes, client: Address, cport: int, vip: Address, vport: int) -> int:
    """What a connection's flow is found by."""
    ports = [int.from_bytes(port.to_bytes(2, "big"), "little") for port in (cport, vport)]
    found: int = lib.crab_flow_hash(seed, mapped(client), mapped(vip), *ports)
    return found


class FlowTable:
    """Map ``flows``, shared with the kernel: ``places``, a writable array of dtype :data:`FLOW`, one a place."""

    def __init__(self, flows: Map) -> None:
        self._memory = flows.mmap()
        self.buckets = flows.max_entries
        self.places = np.frombuffer(self._memory, FLOW, self.buckets * lib.CRAB_BUCKET)

    def alive(self, at: int) -> npt.NDArray[np.bool_]:
        """Which places hold flows that are not too old, shape (places,)."""
        age = self._ages(at)
        kept: npt.NDArray[np.bool_] = (self.places["hash"] != 0) & (
            (age <= lib.CRAB_AGE_OPEN) | (age > lib.CRAB_AGE_NEGATIVE)
        )
        return kept

    def _ages(self, at: int) -> npt.NDArray[np.uint16]:
        """Seconds since each place's last packet, modulo 2^16, as the XDP program reckons."""
        ages: npt.NDArray[np.uint16] = np.uint16(at & 0xFFFF) - self.places["seen"]
        return ages

    def _going_on(self) -> npt.NDArray[np.bool_]:
        """Which places hold flows that have not ended."""
        at = now()
        age = self._ages(at)
        ended = (self.places["state"] == lib.CRAB_FLOW_ENDING) & (age > lib.CRAB_AGE_ENDING)
        going_on: npt.NDArray[np.bool_] = self.alive(at) & ~(ended & (age <= lib.CRAB_AGE_NEGATIVE))
        return going_on

    def count(self) -> int:
        """How many flows there are, without those that have ended and would give way to others."""
        return int(np.count_nonzero(self._going_on()))

    def going_on(self) -> npt.NDArray[np.void]:
        """A copy of those that :meth:`count` counts, dtype :data:`FLOW`."""
        return self.places[self._going_on()]

    def flows(self) -> npt.NDArray[np.void]:
        """A copy of the flows whose packets find their way, dtype :data:`FLOW`: also those that have ended, as long as
        their places are not needed."""
        return self.places[self.alive(now())]

    def find(self, connection: int) -> tuple[np.void, int] | None:
        """The flow of a connection, by its hash: a copy, and seconds since its last packet."""
        bucket = (connection & (self.buckets - 1)) * lib.CRAB_BUCKET
        places = self.places[bucket : bucket + lib.CRAB_BUCKET].copy()
        for place, age in zip(places, (now() - places["seen"].astype(np.int64)) % 2**16, strict=True):
            idle = 0 if age > lib.CRAB_AGE_NEGATIVE else int(age)
            if int(place["hash"]) == connection and idle <= lib.CRAB_AGE_OPEN:
                return place, idle
        return None

    def sweep(self, services: npt.NDArray[np.bool_]) -> npt.NDArray[np.intp]:
        """Delete the flows that are too old, and those of services (by index) that are not there any more.

        Returns how many flows each backend (by id) has left.
        """
        kept = self.alive(now()) & services[self.places["service"]]
        self.places["hash"][~kept & (self.places["hash"] != 0)] = 0
        return np.bincount(self.places["backend"][kept])

    def add(self, hash_: int, backend: int, service: int, *, age: int = 0, flags: int = 0) -> bool:
        """Write a flow down as a worker does; False if its bucket has no room."""
        flow = ffi.new("struct crab_flow *", {"hash": hash_, "backend": backend, "service": service})
        flow.seen, flow.state, flow.flags = (now() - age) & 0xFFFF, lib.CRAB_FLOW_OPEN, flags
        return bool(lib.crab_table_write(self.writer, flow))

    @cached_property
    def writer(self) -> Any:
        """``struct crab_table *``, by which workers write flows down; valid as long as this object."""
        buckets = ffi.cast("struct crab_bucket *", ffi.from_buffer(self._memory))
        table = lib.crab_table_new(buckets, self.buckets)
        if not table:
            raise MemoryError("no memory for a table of flows")
        return ffi.gc(table, lib.crab_table_free)


class Numbered(NamedTuple):
    """The ids of backends, and the indices of services."""

    backends: Mapping[Address, int]
    services: Mapping[Vip, int]


#: Maps that go on counting for the next daemon, if the one before lives until then.
COUNTING = ("service_counters", "xdp_counters", "worker_counters", "daemon_counters")


class Inherited:
    """What another daemon left, or has: its flows, its backends' ids and its services' indices.

    Raises :class:`BpfNotFoundError` from :meth:`open` if there is nothing, ``ValueError`` if it is of no use.
    """

    def __init__(self, maps: Mapping[str, Map], numbers: Numbered, stack: ExitStack) -> None:
        self.maps = maps
        self.flows = maps["flows"]
        self.backends, self.services = numbers
        self._stack = stack

    @classmethod
    def open(cls, folder: Path, seed: bytes, numbers: Numbered | None = None, *, counting: bool = False) -> Self:
        """``numbers``: of a daemon that lives; else they are found in what is left.  ``counting``: with the maps that
        are counted in."""
        with ExitStack() as stack:

            def pinned(name: str) -> Map:
                return stack.enter_context(Map.from_pin(folder / name))

            old, keys, flows, paths = (pinned(name) for name in ("services", "hashing", "flows", "paths"))
            sizes = flows.value_size, paths.value_size, old.value_size
            if sizes != (FLOW.itemsize * lib.CRAB_BUCKET, ffi.sizeof("struct crab_path"), 4):
                raise ValueError("another version of crablb made them")
            if keys.lookup(0) != hashing(seed, flows.max_entries):
                raise ValueError("they were found by another seed")
            maps = {"flows": flows, "paths": paths}
            if counting:
                maps |= {name: pinned(name) for name in COUNTING}
            if not numbers:
                services = {Vip.from_key(key): int.from_bytes(value, "little") for key, value in old.items()}
                used = np.unique(FlowTable(flows).flows()["backend"]).tolist()
                numbers = Numbered({unmapped((paths.lookup(i) or bytes(16))[:16]): i for i in used}, services)
            return cls(maps, numbers, stack.pop_all())

    def close(self) -> None:
        self._stack.close()


assert FLOW.itemsize == ffi.sizeof("struct crab_flow")
