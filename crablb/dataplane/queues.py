"""Sockets and workers: one AF_XDP socket, one C core and one thread for each queue of each interface served.

The packet path is C (native/) and never enters Python.  What the workers see is a snapshot, given to each by one
pointer store; one that was replaced is freed when no worker uses it any more.
"""

from __future__ import annotations

import errno
import os
import select
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from crablb._native import ffi, lib
from crablb.dataplane.flows import now
from crablb.dataplane.handlers import Entrance, Handlers
from crablb.dataplane.snapshot import Snapshot
from crablb.errors import KernelError
from crablb.kernel import bpf
from crablb.kernel.interface import Interface
from crablb.kernel.xsk import HEADROOM, XskError, XskSocket
from crablb.model import Config
from crablb.selection.custom import Custom

__all__ = ["Queues"]

FRAMES = 4096  # a queue


class _Worker:
    """One queue: socket, core, thread."""

    def __init__(self, xsk: XskSocket, config: Config, counters: Any, handlers: Handlers, custom: Custom) -> None:
        self.xsk = xsk
        self._entrance = Entrance(handlers, xsk.memory, xsk.frame_size)
        self._custom = custom  # the core keeps its handle
        self.counters = counters  # CRAB_COUNTERS of uint64_t
        self.core = lib.crab_core_new(config.flows, counters)
        self.c = lib.crab_worker_new(xsk.handle, self.core, counters) if self.core else ffi.NULL
        if not self.c:
            error = os.strerror(ffi.errno)
            lib.crab_core_free(self.core)
            raise KernelError(f"cannot make a worker for queue {xsk.queue} of {xsk.interface}: {error}")
        lib.crab_worker_spin(self.c, config.busy_poll)
        lib.crab_core_handle(self.core, lib.crab_python_handle, self._entrance.handle)
        lib.crab_core_ask(self.core, lib.crab_python_choose, custom.handle)
        self._thread: threading.Thread | None = None

    def start(self, cpu: int, failed: Callable[[str], None]) -> None:
        """Run in a thread on ``cpu``; ``failed`` is called from it, with the reason, if the socket fails."""

        def run() -> None:
            os.sched_setaffinity(0, {cpu})
            rc = lib.crab_worker_run(self.c)  # without the GIL
            if rc:
                failed(self.failure(-rc))

        self._thread = threading.Thread(target=run, name=f"crablb-{self.xsk.interface}/{self.xsk.queue}", daemon=True)
        self._thread.start()

    def failure(self, number: int) -> str:
        return f"queue {self.xsk.queue} of {self.xsk.interface} failed: {os.strerror(number)}"

    def close(self) -> None:
        lib.crab_worker_stop(self.c)
        if self._thread:
            self._thread.join()
        lib.crab_worker_free(self.c)
        lib.crab_core_free(self.core)
        self.xsk.close()


def _room(frame_size: int) -> int:
    """Bytes of the largest IP packet that fits into a frame, with Ethernet's header and two VLAN tags."""
    return frame_size - HEADROOM - 14 - 8


def _socket(interface: Interface, queue: int, *, copy: bool | None = None) -> XskSocket:
    """What does not fit into a frame lies in several; where a socket cannot have that, frames are as long as can be."""
    several = bool(lib.crab_xsk_knows_frags()) and interface.mtu <= _room(2048)
    size = 2048 if several else 4096
    xsk = XskSocket(
        interface.name, queue, frames=FRAMES, frame_size=size, load_program=False, multi_buffer=True, copy=copy
    )
    if xsk.zero_copy and not xsk.multi_buffer and interface.mtu > _room(4096):
        xsk.close()
        return _socket(interface, queue, copy=True)
    return xsk


def _sockets(interface: Interface, queues: int | None) -> Iterator[XskSocket]:
    for queue in range(queues or interface.rx_queues):
        try:
            yield _socket(interface, queue)
        except XskError as error:
            # A device may have fewer queues in use than it has in all.
            if queue and queues is None and error.errno == errno.EINVAL:
                return
            raise


class Queues:
    """All workers, and the snapshots that they use."""

    def __init__(self) -> None:
        self._workers: list[_Worker] = []
        self._snapshot: Snapshot | None = None
        self._retired: list[Snapshot] = []
        self._shared: Any = None  # map `worker_counters`, mapped

    def __len__(self) -> int:
        return len(self._workers)

    @property
    def zero_copy(self) -> bool:
        """Whether all sockets are in zero-copy mode."""
        return all(worker.xsk.zero_copy for worker in self._workers)

    @property
    def narrow(self) -> dict[str, int]:
        """Interfaces whose sockets take no packet in several frames, and bytes of the largest IP packet they take."""
        sockets = (worker.xsk for worker in self._workers)
        return {xsk.interface: _room(xsk.frame_size) for xsk in sockets if not xsk.multi_buffer}

    @property
    def snapshot(self) -> Snapshot | None:
        """The one in use."""
        return self._snapshot

    def open(
        self, interface: Interface, config: Config, maps: Mapping[str, bpf.Map], handlers: Handlers, custom: Custom
    ) -> None:
        """Make sockets and workers for an interface's queues, and give the sockets to the XDP program.

        Raises :class:`KernelError`; what was opened until then is closed by :meth:`close`.
        """
        if self._shared is None:
            self._shared = maps["worker_counters"].mmap()
        base = ffi.cast("struct crab_worker_counters *", ffi.from_buffer(self._shared))
        first = len(self._workers)
        for xsk in _sockets(interface, config.queues):
            slot = len(self._workers)
            try:
                if slot == lib.CRAB_MAX_QUEUES:
                    raise KernelError(f"the interfaces have more than {slot} queues; serve fewer of each: --queues N")
                worker = _Worker(xsk, config, base[slot].n, handlers, custom)
            except BaseException:
                xsk.close()
                raise
            self._workers.append(worker)
            xsk.register(maps["sockets"], slot)
        maps["interfaces"].update(interface.index, struct.pack("=II", first, len(self._workers) - first))

    def learn(self, table: Any) -> None:
        """Have the workers write the flows that they decide into a ``struct crab_table *``.  Before they work."""
        for worker in self._workers:
            lib.crab_core_learn(worker.core, table)

    def adopt(self, flows: npt.NDArray[np.void]) -> None:
        """Remember flows, an array of dtype :data:`crablb.dataplane.flows.FLOW`.  Before the workers work."""
        for worker in self._workers:
            lib.crab_core_adopt(worker.core, ffi.from_buffer("struct crab_flow[]", flows), len(flows), now())

    def start(self, cpus: Sequence[int], failed: Callable[[str], None]) -> None:
        """Run all workers in threads; ``failed`` is called from one of them, with the reason, when its socket fails."""
        for i, worker in enumerate(self._workers):
            worker.start(cpus[i % len(cpus)], failed)

    def once(self, timeout: float) -> int:
        """Work on what has come on all queues, in this thread; wait at most ``timeout`` seconds if there is nothing.

        Returns how many frames there were.  Raises :class:`KernelError` if an interface is gone.
        """
        done = 0
        for worker in self._workers:
            # Only one can be waited for; the others have their turn after it.
            wait = 0 if done or len(self._workers) > 1 else max(0, int(timeout * 1000))
            n = lib.crab_worker_once(worker.c, wait)
            if n < 0:
                raise KernelError(worker.failure(-n))
            done += n
        if not done and timeout and len(self._workers) > 1:
            select.select([worker.xsk.fd for worker in self._workers], [], [], timeout)
            return self.once(0)
        return done

    def publish(self, snapshot: Snapshot) -> None:
        """Have the workers use this snapshot, which is ours from now on."""
        for worker in self._workers:
            lib.crab_core_publish(worker.core, snapshot.c)
        if self._snapshot:
            self._retired.append(self._snapshot)
        self._snapshot = snapshot
        self.settle()

    def settle(self) -> bool:
        """Free the snapshots that no worker uses any more.  True if the one in use is the only one left."""
        in_use = []
        for snapshot in self._retired:
            if any(lib.crab_core_uses(worker.core, snapshot.c) for worker in self._workers):
                in_use.append(snapshot)
            else:
                snapshot.free()
        self._retired = in_use
        return not in_use

    def count(self, counts: npt.NDArray[np.uint32]) -> None:
        """Add to ``counts``, by backend id, the flows in the workers' caches.  From any thread, until :meth:`close`."""
        for worker in self._workers:
            lib.crab_core_count(worker.core, ffi.from_buffer("uint32_t[]", counts), len(counts), now())

    def close(self) -> None:
        """Stop the workers, close the sockets, free the snapshots.  Idempotent."""
        for worker in self._workers:
            worker.close()
        self._workers.clear()
        for snapshot in (*self._retired, *([self._snapshot] if self._snapshot else [])):
            snapshot.free()
        self._retired, self._snapshot = [], None
        self._shared = None
