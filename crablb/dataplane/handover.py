"""From one engine to the next, each in a process of its own: no packet is lost, no flow forgotten.

What goes over are the AF_XDP sockets themselves, with the memory that their frames lie in, and what the workers
remember.  Packets that come while neither of the two works wait in the sockets' rings.

===================== =================================================================
predecessor           successor
===================== =================================================================
``hold``, ``offer``   (is told by whoever speaks for the two: crablb.control.takeover)
serves                starts up to where it would bind sockets
``give``              calls :meth:`Predecessor.take`, serves
``leave``             ``begun``
===================== =================================================================

If the successor fails before that, the predecessor does :meth:`.Engine.resume`.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Annotated, Any, Protocol, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt

from crablb._native import lib
from crablb.dataplane.flows import Numbered
from crablb.dataplane.statistics import DAEMON_COUNTERS, WORKER_COUNTERS, XDP_COUNTERS
from crablb.errors import KernelError
from crablb.kernel import bpf
from crablb.kernel.xsk import Bound, Given
from crablb.model import Vip, unmapped

__all__ = [
    "Area",
    "Gap",
    "Known",
    "Offer",
    "Port",
    "Predecessor",
    "Queue",
    "fingerprint",
    "forms",
    "handed",
    "lent",
    "understood",
]


class Predecessor(Protocol):
    """Who serves until now, for its successor's engine."""

    #: What its engine offered: an :class:`Offer` as plain values, and descriptors, which are the taker's from now on.
    values: Any
    fds: list[int]

    def take(self, fds: Sequence[int] = ()) -> Any:
        """Have it stop, and give what its engine's :meth:`.Engine.give` says, which has copies of these descriptors:
        one, of the map that the sockets are registered in from now on.  Raises :class:`KernelError`."""


#: A number as flows and caches hold it; a size.
Id = Annotated[int, msgspec.Meta(ge=0, lt=65536)]
Bytes = Annotated[int, msgspec.Meta(ge=0)]


class Queue(msgspec.Struct, frozen=True):
    """A socket; two descriptors of the offer are its: the socket's, its memory's."""

    bound: Bound
    cache: Bytes  # of its worker's flow cache


class Port(msgspec.Struct, frozen=True):
    """An interface's places among the workers, and its queues by number."""

    first: int
    room: int
    cpu: int
    queues: dict[int, Queue]


class Offer(msgspec.Struct, frozen=True):
    """What a successor has to know before it takes.  Descriptors: a lock for each interface, in their order, one of
    :class:`Area`, then two a queue, then (not of versions before) the map that the sockets are registered in."""

    interfaces: tuple[str, ...]
    seed: str  # its fingerprint
    forms: dict[str, str]
    backends: dict[str, Id]  # by their 16 bytes, hexadecimal
    services: dict[str, Id]  # by Vip.key, likewise
    ports: dict[str, Port]
    joins: Bytes

    @property
    def numbers(self) -> Numbered:
        """Ids of the backends, indices of the services.  Raises :class:`KernelError`."""
        try:
            return Numbered(
                {unmapped(bytes.fromhex(key)): number for key, number in self.backends.items()},
                {Vip.from_key(bytes.fromhex(key)): number for key, number in self.services.items()},
            )
        except ValueError as error:
            raise KernelError(f"what is served is numbered otherwise than this version knows: {error}") from None

    @property
    def sizes(self) -> list[int]:
        """Bytes of what lies in :class:`Area`: MPTCP tokens, then of each queue its cache, which parts of that have
        changed since it was written (a bit each), and free frames."""
        found = [self.joins]
        for port in self.ports.values():
            for queue in port.queues.values():
                found += [queue.cache, -(-queue.cache // lib.CRAB_PART // 64) * 8, queue.bound.frames * 8]
        return found


class Known(msgspec.Struct, frozen=True):
    """What is given at the end, beside :class:`Area`, of each queue; ``rounds``: ``struct crab_rounds``."""

    frames: dict[str, dict[int, Given]]
    rounds: dict[str, dict[int, str]]
    stopped: float = 0.0  # time.monotonic() when the workers were told to stop; 0: a version before does not say


class Gap(msgspec.Struct, frozen=True):
    """When nobody worked on packets, which waited."""

    at: float  # time.time()
    seconds: float


def fingerprint(seed: bytes) -> str:
    """What may be told of a seed."""
    return hashlib.sha256(b"crablb takeover" + seed).hexdigest()[:16]


def forms() -> dict[str, str]:
    """Of what form this version's memory is, and what it counts; what differs in another one is not gone on with."""
    counters = " ".join((*XDP_COUNTERS, "/", *WORKER_COUNTERS, "/", *DAEMON_COUNTERS))
    return {
        "memory": str(lib.CRAB_MEMORY_FORM),
        "counters": hashlib.sha256(counters.encode()).hexdigest()[:16],
    }


class Area:
    """A memfd for what is too much for a message: byte arrays of given sizes, which both processes see.

    Raises :class:`KernelError`.
    """

    def __init__(self, sizes: Sequence[int], fd: int = -1) -> None:
        """``fd``: the other one's, ours from now on; -1: make one."""
        rounded = [-(-size // 8) * 8 for size in sizes]
        try:
            self.fd = os.memfd_create("crablb-handover", os.MFD_CLOEXEC) if fd < 0 else fd
            try:
                if fd < 0:
                    os.ftruncate(self.fd, max(1, sum(rounded)))
                # Its pages are there now, not when there is no time.
                self._map = mmap.mmap(self.fd, max(1, sum(rounded)), flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
            except BaseException:
                os.close(self.fd)
                raise
        except (OSError, ValueError) as error:
            raise KernelError(f"no memory for what is handed over: {error}") from None
        whole = np.frombuffer(self._map, np.uint8)
        starts = np.cumsum([0, *rounded])
        self.parts: list[npt.NDArray[np.uint8]] = [
            whole[start : start + size] for start, size in zip(starts, sizes, strict=False)
        ]

    def close(self) -> None:
        """Idempotent."""
        self.parts = []
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


T = TypeVar("T")


def understood(values: Any, kind: type[T]) -> T:
    """What another process said, perhaps of another version.  Raises :class:`KernelError`."""
    try:
        return msgspec.convert(values, kind, strict=False)  # JSON has no numbers as keys
    except msgspec.ValidationError as error:
        raise KernelError(f"what is served is another version's, which says otherwise what it has: {error}") from None


def lent(fd: int) -> bpf.Map | None:
    """Another process's map, by its descriptor, ours from now on; -1: it has given none.  Raises
    :class:`KernelError`."""
    if fd < 0:
        return None
    try:
        return bpf.Map(fd)
    except KernelError:
        os.close(fd)
        raise


@contextmanager
def handed(fds: list[int]) -> Iterator[Iterator[int]]:
    """Descriptors one by one; those that nobody took are closed at the end."""
    left = list(fds)
    fds.clear()

    def each() -> Iterator[int]:
        while left:
            yield left.pop(0)

    try:
        yield each()
    finally:
        for fd in left:
            with suppress(OSError):
                os.close(fd)
