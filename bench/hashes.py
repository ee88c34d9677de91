"""Ways from a hash to a backend, those of crablb and others: what is measured, and what tests hold to their papers."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from cffi import FFI
from crablb._native import ffi as native
from crablb._native import lib as hotloop

from bench.context import HERE, Context
from crablb.model import Hashing, mapped

Hashes = npt.NDArray[np.uint64]
Backends = npt.NDArray[np.uint16]

HEADER = HERE / "tools" / "hashes.h"
#: DxHash's weight of the heaviest.
WHOLE = 1 << 16
#: Hashes that stand for all, where there is no table.
MANY = 1 << 20

ffi: Any = FFI()
ffi.cdef(HEADER.read_text())


def room(working: int) -> int:
    """How many buckets those that need room for more have, by those that work at first: a power of two, at least twice
    as many."""
    return 1 << (2 * working - 1).bit_length()


class Library:
    """``tools/hashes.c``."""

    def __init__(self, path: Path) -> None:
        self.lib: Any = ffi.dlopen(str(path))

    @classmethod
    def made(cls, context: Context) -> Library:
        """Raises :class:`bench.context.Unavailable` if it cannot be compiled."""
        return cls(context.make("hashes.so"))

    def owned(self, method: Any) -> Any:
        """A ``struct method``, which is freed with the last who knows it.  Raises :class:`MemoryError` for none."""
        if method == ffi.NULL:
            raise MemoryError("no memory for a table")
        return ffi.gc(method, self.lib.method_free)

    def look(self, method: Any, hashes: Hashes) -> Backends:
        chosen = np.empty(len(hashes), np.uint16)
        self.lib.method_look(
            method, ffi.from_buffer("uint64_t[]", hashes), len(hashes), ffi.from_buffer("uint16_t[]", chosen)
        )
        return chosen


def hashes(count: int, seed: int = 1) -> Hashes:
    """As many hashes of connections, shape (count,): random, and the same each time."""
    return np.random.default_rng(seed).integers(0, 2**64, count, np.uint64)


def backends_of(method: Any, count: int) -> Backends:
    """The backends of its first buckets or slots, to be read and written while the method is there, and no longer."""
    return np.frombuffer(ffi.buffer(method.backends, 2 * count), np.uint16)


class Method(ABC):
    """Backends (numbers) with weights, and who is meant by a hash.

    ``build_ns`` is what it took to make it as it is now.
    """

    name: ClassVar[str]

    def __init__(self, library: Library, members: Mapping[int, int]) -> None:
        self.library = library
        self.members = dict(members)
        self.method: Any = None
        self.build_ns = 0

    def timed(self, make: Callable[[], Any]) -> Any:
        start = time.perf_counter_ns()
        made = make()
        self.build_ns = time.perf_counter_ns() - start
        return made

    @abstractmethod
    def add(self, backend: int, weight: int = 1) -> None:
        """One more, the last of the list.  Raises :class:`ValueError` if there is no room."""

    @abstractmethod
    def remove(self, backend: int) -> None:
        """Raises :class:`KeyError` if it is not there, :class:`ValueError` if it is the only one."""

    def take_out(self, backend: int) -> None:
        if len(self.members) == 1 and backend in self.members:
            raise ValueError("the last backend cannot go")
        del self.members[backend]

    def whole(self) -> Backends:
        """All that it says: its slots, or the backends of :data:`MANY` hashes.  Of shape (slots,) or (MANY,)."""
        return self.look(hashes(MANY))

    def look(self, hashes: Hashes) -> Backends:
        return self.library.look(self.method, hashes)

    def look_ns(self, hashes: Hashes, *, cold: bool) -> float:
        """Nanoseconds for one of them; negative if it is to be cold and this machine's caches cannot be flushed."""
        found: float = self.library.lib.method_ns(self.method, ffi.from_buffer("uint64_t[]", hashes), len(hashes), cold)
        return found

    @property
    def bytes(self) -> int:
        return int(self.method.bytes)


# ---- tables of crablb ----


class Built(Method):
    """A table that is made anew for each list of backends: by nothing but that list, and a seed."""

    build: ClassVar[Any]

    def __init__(self, library: Library, members: Mapping[int, int], size: int, seed: int = 0) -> None:
        super().__init__(library, members)
        self.size = size
        self.seed = seed.to_bytes(16, "little")
        self.make()

    def make(self) -> None:
        listed = native.new("struct crab_table_member[]", len(self.members))
        for entry, (backend, weight) in zip(listed, self.members.items(), strict=True):
            entry.addr = mapped(IPv4Address(0x0A010000 + backend))
            entry.weight = entry.full = weight
            entry.backend = backend
        self.method = self.library.owned(self.library.lib.table_new(self.size))
        slots = native.from_buffer("uint16_t[]", backends_of(self.method, self.size))
        if self.timed(lambda: self.build(slots, self.size, listed, len(listed), self.seed)):
            raise MemoryError("no memory for a table")

    def add(self, backend: int, weight: int = 1) -> None:
        self.members[backend] = weight
        self.make()

    def remove(self, backend: int) -> None:
        self.take_out(backend)
        self.make()

    def whole(self) -> Backends:
        return backends_of(self.method, self.size).copy()


class Maglev(Built):
    name = Hashing.MAGLEV.value
    build = staticmethod(hotloop.crab_maglev_build)


class Rendezvous(Built):
    name = Hashing.RENDEZVOUS.value
    build = staticmethod(hotloop.crab_rendezvous_build)


# ---- without a table ----


class Copies(Method):
    """Who has a weight has as many buckets."""

    def __init__(self, library: Library, members: Mapping[int, int]) -> None:
        super().__init__(library, members)
        copies = list(members.values())
        working = sum(copies)
        self.method = self.timed(lambda: library.owned(self.new(working)))
        self.backends = backends_of(self.method, self.method.buckets)
        self.backends[:working] = np.repeat(np.fromiter(members, np.uint16), copies)
        first = np.cumsum([0, *copies[:-1]]).tolist()
        self.buckets = {
            backend: list(range(begin, begin + count))
            for backend, begin, count in zip(members, first, copies, strict=True)
        }

    @abstractmethod
    def new(self, working: int) -> Any: ...

    def room_for(self, weight: int) -> None:
        if self.method.working + weight > self.method.buckets:
            raise ValueError(f"there is room for {self.method.buckets} buckets, and no more")


class Anchor(Copies):
    """Its room is what it begins with; a newcomer gets the buckets of those who went last."""

    name = "AnchorHash"

    def new(self, working: int) -> Any:
        return self.library.lib.anchor_new(room(working), working)

    def add(self, backend: int, weight: int = 1) -> None:
        self.room_for(weight)
        self.members[backend] = weight
        self.buckets[backend] = [self.library.lib.anchor_add(self.method) for _ in range(weight)]
        self.backends[self.buckets[backend]] = backend

    def remove(self, backend: int) -> None:
        self.take_out(backend)
        for bucket in reversed(self.buckets.pop(backend)):
            self.library.lib.anchor_remove(self.method, bucket)


class JumpBack(Copies):
    """Only the last bucket can go: where another one is to go, the last takes its place."""

    name = "JumpBackHash"

    def new(self, working: int) -> Any:
        return self.library.lib.jumpback_new(room(working), working)

    def add(self, backend: int, weight: int = 1) -> None:
        self.room_for(weight)
        self.members[backend] = weight
        begin = self.method.working
        self.buckets[backend] = list(range(begin, begin + weight))
        self.backends[begin : begin + weight] = backend
        self.method.working += weight

    def remove(self, backend: int) -> None:
        self.take_out(backend)
        for bucket in reversed(self.buckets.pop(backend)):
            self.method.working -= 1
            last = self.method.working
            if bucket != last:
                mover = int(self.backends[last])
                self.backends[bucket] = mover
                self.buckets[mover][self.buckets[mover].index(last)] = bucket
                self.buckets[mover].sort()


class Dx(Method):
    """A weight is how likely a bucket takes a hash that comes to it; a newcomer gets the first bucket that is free.

    Its room, a power of two, can be doubled, which moves half of all hashes: see :meth:`double`.
    """

    name = "DxHash"

    def __init__(self, library: Library, members: Mapping[int, int]) -> None:
        super().__init__(library, members)
        self.heaviest = max(members.values())
        weights = np.array([self.share(weight) for weight in members.values()], np.uint32)
        capacity = room(len(members))
        self.method = self.timed(lambda: self.new(weights, capacity))
        self.backends = backends_of(self.method, capacity)
        self.backends[: len(members)] = np.fromiter(members, np.uint16)
        self.buckets = {backend: bucket for bucket, backend in enumerate(members)}

    def new(self, weights: npt.NDArray[np.uint32], capacity: int) -> Any:
        return self.library.owned(
            self.library.lib.dx_new(capacity, ffi.from_buffer("uint32_t[]", weights), len(weights))
        )

    def share(self, weight: int) -> int:
        """Raises :class:`ValueError` for one that is heavier than all were: their shares would all change."""
        if weight > self.heaviest:
            raise ValueError(f"a weight of {weight}, where {self.heaviest} was the greatest")
        return max(WHOLE * weight // self.heaviest, 1)

    def add(self, backend: int, weight: int = 1) -> None:
        share, taken = self.share(weight), set(self.buckets.values())
        bucket = next((b for b in range(self.method.buckets) if b not in taken), None)
        if bucket is None:
            raise ValueError(f"there is room for {self.method.buckets} buckets, and no more")
        self.members[backend] = weight
        self.buckets[backend] = bucket
        self.backends[bucket] = backend
        self.library.lib.dx_weigh(self.method, bucket, share)

    def remove(self, backend: int) -> None:
        self.take_out(backend)
        self.library.lib.dx_weigh(self.method, self.buckets.pop(backend), 0)

    def double(self) -> None:
        """Room for twice as many; each keeps its bucket."""
        kept, capacity = self.backends.copy(), 2 * self.method.buckets
        weights = np.zeros(capacity, np.uint32)
        for backend, bucket in self.buckets.items():
            weights[bucket] = self.share(self.members[backend])
        self.method = self.new(weights, capacity)
        self.backends = backends_of(self.method, capacity)
        self.backends[: len(kept)] = kept


# ---- a table that is filled by one of those ----


class Filled(Method):
    """A table of the same size as crablb's, each slot of which has been looked up in another method: so that a lookup
    is one memory access."""

    of: ClassVar[type[Method]]

    def __init__(self, library: Library, members: Mapping[int, int], size: int, seed: int = 0) -> None:
        super().__init__(library, members)
        self.size = size
        self.seed = seed
        self.inner = self.of(library, members)
        self.members = self.inner.members
        self.fill()
        self.build_ns += self.inner.build_ns

    def fill(self) -> None:
        self.method = self.library.owned(self.library.lib.table_new(self.size))
        self.timed(lambda: self.library.lib.method_fill(self.inner.method, self.method, self.seed))

    def add(self, backend: int, weight: int = 1) -> None:
        self.inner.add(backend, weight)
        self.fill()

    def remove(self, backend: int) -> None:
        self.inner.remove(backend)
        self.fill()

    def whole(self) -> Backends:
        return backends_of(self.method, self.size).copy()

    @property
    def bytes(self) -> int:
        return super().bytes + self.inner.bytes


class FilledAnchor(Filled):
    name = f"{Anchor.name}, filled"
    of = Anchor


class FilledDx(Filled):
    name = f"{Dx.name}, filled"
    of = Dx


class FilledJumpBack(Filled):
    name = f"{JumpBack.name}, filled"
    of = JumpBack


TABLES: tuple[type[Built] | type[Filled], ...] = (Maglev, Rendezvous, FilledAnchor, FilledDx, FilledJumpBack)
TABLELESS: tuple[type[Anchor] | type[Dx] | type[JumpBack], ...] = (Anchor, Dx, JumpBack)
