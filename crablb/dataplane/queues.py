"""Sockets and workers: one AF_XDP socket, one C core and one thread for each queue of each interface served.

The packet path is C (native/) and never enters Python.  What the workers see is a snapshot, given to each by one
pointer store; one that was replaced is freed when no worker uses it any more.

Queues, and whole interfaces, come and go while the rest works on.  What a core knows (its flows) and its counters stay
meanwhile; only socket and thread are made anew.
"""

from __future__ import annotations

import contextlib
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
from crablb.dataplane.flows import FlowTable, now
from crablb.dataplane.handlers import Entrance, Handlers
from crablb.dataplane.snapshot import Snapshot
from crablb.dataplane.statistics import Rounds
from crablb.errors import KernelError
from crablb.kernel import bpf
from crablb.kernel.interface import Interface
from crablb.kernel.xsk import HEADROOM, XskError, XskSocket
from crablb.model import Config
from crablb.selection.custom import Custom

__all__ = ["Queues"]

FRAMES = 4096  # a queue


class _Worker:
    """One queue: a core, and while there is a socket, a thread."""

    def __init__(self, config: Config, counters: Any, handlers: Handlers, custom: Custom) -> None:
        self.counters = counters  # CRAB_COUNTERS of uint64_t
        self.xsk: XskSocket | None = None
        self.c: Any = ffi.NULL
        self.core = lib.crab_core_new(config.flows, counters)
        if not self.core:
            raise KernelError(f"no memory for {config.flows} flows a queue; ask for fewer: flows")
        self._spin = config.busy_poll
        self._handlers, self._custom = handlers, custom  # the core keeps handles of theirs
        self._entrance: Entrance | None = None
        self._thread: threading.Thread | None = None
        self.rounds = ffi.new("struct crab_rounds *")
        lib.crab_core_ask(self.core, lib.crab_python_choose, custom.handle)

    def bind(self, xsk: XskSocket) -> None:
        """Work on this socket, which is ours from now on.  Raises :class:`KernelError`; then it is not."""
        c = lib.crab_worker_new(xsk.handle, self.core, self.counters)
        if not c:
            error = os.strerror(ffi.errno)
            raise KernelError(f"cannot make a worker for queue {xsk.queue} of {xsk.interface}: {error}")
        self.c, self.xsk = c, xsk
        lib.crab_worker_spin(c, self._spin)
        lib.crab_worker_rounds(c, self.rounds)
        self._entrance = Entrance(self._handlers, xsk.memory, xsk.frame_size)
        lib.crab_core_handle(self.core, lib.crab_python_handle, self._entrance.handle)

    def start(self, cpu: int, failed: Callable[[str], None]) -> None:
        """Run in a thread on ``cpu``; ``failed`` is called from it, with the reason, if the socket fails."""
        assert self.xsk

        def run() -> None:
            with contextlib.suppress(OSError):  # the CPU was taken from us meanwhile; any other will do
                os.sched_setaffinity(0, {cpu})
            rc = lib.crab_worker_run(self.c)  # without the GIL
            if rc:
                failed(self.failure(-rc))

        self._thread = threading.Thread(target=run, name=f"crablb-{self.xsk.interface}/{self.xsk.queue}", daemon=True)
        self._thread.start()

    def failure(self, number: int) -> str:
        assert self.xsk
        return f"queue {self.xsk.queue} of {self.xsk.interface} failed: {os.strerror(number)}"

    def unbind(self) -> None:
        """End the thread, close the socket.  Idempotent."""
        if not self.xsk:
            return
        lib.crab_worker_stop(self.c)
        if self._thread:
            self._thread.join()
            self._thread = None
        lib.crab_worker_free(self.c)
        self.xsk.close()
        self.c, self.xsk = ffi.NULL, None

    def close(self) -> None:
        self.unbind()
        lib.crab_core_free(self.core)


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


def _takes(xsk: XskSocket, mtu: int) -> bool:
    """Whether no other socket would take more of such packets."""
    if xsk.multi_buffer or mtu <= _room(2048):
        return True
    return xsk.frame_size == 4096 and not (xsk.zero_copy and mtu > _room(4096))


class _Port:
    """An interface: its workers by queue, and where they are in the maps."""

    def __init__(self, first: int, room: int, cpu: int) -> None:
        self.first, self.room = first, room  # of slots in maps `sockets` and `worker_counters`
        self.cpu = cpu  # the first of those that work for it
        self.index = 0  # of the interface, in map `interfaces`
        self.workers: dict[int, _Worker] = {}
        self.failed = False  # a socket did, since they were bound


class Queues:
    """All workers, and the snapshots that they use."""

    def __init__(self, config: Config, handlers: Handlers, custom: Custom, failed: Callable[[str, str], None]) -> None:
        """``failed`` is called, from any thread, with an interface's name as the configuration has it and the reason,
        when a socket of it fails: see :meth:`close_interface`."""
        self._config, self._handlers, self._custom, self._failed = config, handlers, custom, failed
        self._maps: Mapping[str, bpf.Map] = {}
        self._ports: dict[str, _Port] = {}
        self._table: FlowTable | None = None
        self._cpus: Sequence[int] = ()  # of the threads; none: there are no threads
        self._snapshot: Snapshot | None = None
        self._retired: list[Snapshot] = []
        self.published = 0  # snapshots
        self._shared: Any = None  # map `worker_counters`, mapped
        self._showing = 0  # bytes of each worker's ring, while they show packets
        self._rings = False  # whether they have one: until no snapshot says that they should
        # Who looks at all workers, and who makes or ends some.  The first lock makes it fair to them: otherwise a
        # program that calls once() again and again would hardly ever let go of the second.
        self._turn, self._lock = threading.Lock(), threading.Lock()

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        with self._turn:
            self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()

    @property
    def _workers(self) -> list[_Worker]:
        return [worker for port in self._ports.values() for worker in port.workers.values()]

    def __len__(self) -> int:
        return sum(worker.xsk is not None for worker in self._workers)

    @property
    def slots(self) -> list[int]:
        """Where the workers' counters are in map `worker_counters`."""
        return sorted(port.first + queue for port in self._ports.values() for queue in port.workers)

    def rounds(self) -> dict[tuple[str, int], Rounds]:
        """How the workers' rounds were since the start, by interface (as the configuration has it) and queue, in the
        order of :attr:`slots`."""
        ports = sorted(self._ports.items(), key=lambda item: item[1].first)
        return {
            (name, queue): Rounds.of(worker.rounds)
            for name, port in ports
            for queue, worker in sorted(port.workers.items())
        }

    @property
    def zero_copy(self) -> bool:
        """Whether all sockets are in zero-copy mode."""
        return all(worker.xsk.zero_copy for worker in self._workers if worker.xsk)

    @property
    def narrow(self) -> dict[str, int]:
        """Interfaces whose sockets take no packet in several frames, and bytes of the largest IP packet they take."""
        sockets = (worker.xsk for worker in self._workers)
        return {xsk.interface: _room(xsk.frame_size) for xsk in sockets if xsk and not xsk.multi_buffer}

    @property
    def snapshot(self) -> Snapshot | None:
        """The one in use."""
        return self._snapshot

    def open(self, maps: Mapping[str, bpf.Map], interfaces: Mapping[str, Interface], table: FlowTable | None) -> None:
        """Make sockets and workers for these interfaces' queues (by the names that the configuration has), and give the
        sockets to the XDP program.  ``table``: where the workers write down the flows that they decide.

        Raises :class:`KernelError`; what was opened until then is closed by :meth:`close`.
        """
        self._maps, self._table = maps, table
        self._shared = maps["worker_counters"].mmap()
        slot = cpu = 0
        for left, (name, interface) in zip(range(len(interfaces), 0, -1), interfaces.items(), strict=True):
            # As many slots as it may need one day, if the others get theirs.
            fair = (lib.CRAB_MAX_QUEUES - slot) // left
            room = max(interface.rx_queues, min(interface.max_queues, fair))
            if slot + room > lib.CRAB_MAX_QUEUES:
                raise KernelError(
                    f"the interfaces have more than {lib.CRAB_MAX_QUEUES} queues;"
                    f" give them fewer: ethtool -L {interface.name} combined N"
                )
            port = self._ports[name] = _Port(slot, room, cpu)
            self.fit(name, interface)
            slot += room
            cpu += min(len(port.workers), self._config.queues or len(port.workers))

    def fit(self, name: str, interface: Interface) -> None:
        """Have a socket on each queue that the interface has now, for frames as long as it takes now.

        Raises :class:`KernelError` if that cannot be; those are served then that could be.
        """
        port = self._ports[name]
        try:
            for queue in range(interface.rx_queues):
                worker = port.workers.get(queue)
                if worker and worker.xsk and _takes(worker.xsk, interface.mtu):
                    continue
                if queue >= port.room:
                    raise KernelError(
                        f"{interface.name} has {interface.rx_queues} queues, and there was room for {port.room} at the"
                        " start; restart crablb serve"
                    )
                try:
                    self._bind(port, name, queue, interface)
                except XskError as error:
                    if queue and error.errno == errno.EINVAL:
                        break  # a driver that does not say how many are in use
                    raise
        finally:
            count = max(port.workers, default=-1) + 1
            self._maps["interfaces"].update(interface.index, struct.pack("=II", port.first, count))
            if port.index not in (0, interface.index):
                self._maps["interfaces"].delete(port.index)
            port.index = interface.index

    def _bind(self, port: _Port, name: str, queue: int, interface: Interface) -> None:
        """A socket for a queue, in place of the one that it has."""
        worker = port.workers.get(queue)
        if worker:
            with self._alone():
                worker.unbind()  # a queue can have one socket only
        xsk = _socket(interface, queue)
        made = None
        try:
            worker = worker or (made := self._worker(port.first, queue))
            with self._alone():
                worker.bind(xsk)
                port.workers[queue] = worker
        except BaseException:
            xsk.close()
            if made:
                made.close()
            raise
        xsk.register(self._maps["sockets"], port.first + queue)
        if self._cpus:
            self._start(port, name, queue)

    def _worker(self, first: int, queue: int) -> _Worker:
        base = ffi.cast("struct crab_worker_counters *", ffi.from_buffer(self._shared))
        worker = _Worker(self._config, base[first + queue].n, self._handlers, self._custom)
        if self._showing:
            self._show(worker, queue)
        if self._table:
            lib.crab_core_learn(worker.core, self._table.writer)
        if self._snapshot:  # it comes later than the others
            lib.crab_core_publish(worker.core, self._snapshot.c)
            if self._table:
                self._adopt(worker, self._table.flows())
        return worker

    def close_interface(self, name: str) -> None:
        """Close its sockets; :meth:`fit` makes others, on perhaps another interface."""
        port = self._ports[name]
        with self._alone():
            for worker in port.workers.values():
                worker.unbind()
            port.failed = False

    def failed(self, name: str) -> bool:
        """Whether a socket of this interface has failed, since it was bound."""
        return self._ports[name].failed

    def adopt(self, flows: npt.NDArray[np.void]) -> None:
        """Remember flows, an array of dtype :data:`crablb.dataplane.flows.FLOW`.  Before the workers work."""
        for worker in self._workers:
            self._adopt(worker, flows)

    def _adopt(self, worker: _Worker, flows: npt.NDArray[np.void]) -> None:
        lib.crab_core_adopt(worker.core, ffi.from_buffer("struct crab_flow[]", flows), len(flows), now())

    def start(self, cpus: Sequence[int]) -> None:
        """Run all workers in threads, those too that come later."""
        self._cpus = cpus
        for name, port in self._ports.items():
            for queue in port.workers:
                self._start(port, name, queue)

    def _start(self, port: _Port, name: str, queue: int) -> None:
        cpu = port.cpu + (queue % self._config.queues if self._config.queues else queue)
        port.workers[queue].start(
            self._cpus[cpu % len(self._cpus)], lambda reason: self._has_failed(port, name, reason)
        )

    def _has_failed(self, port: _Port, name: str, reason: str) -> None:
        port.failed = True
        self._failed(name, reason)

    def once(self, timeout: float) -> int:
        """Work on what has come on all queues, in this thread; wait at most ``timeout`` seconds if there is nothing.

        Returns how many frames there were.
        """
        done, waiting, sending = self._once()
        if done or not timeout:
            return done
        # Frames that the kernel has not sent yet are sent soon, not when the next one happens to come.
        poll = select.poll()
        for fd in waiting:  # or what has its number, if it was closed meanwhile
            poll.register(fd, select.POLLIN)
        poll.poll(1 if sending else timeout * 1000)
        return self._once()[0]

    def _once(self) -> tuple[int, list[int], bool]:
        """How many frames there were, the sockets to wait for, and whether some have frames to be sent."""
        done, waiting, sending = 0, [], False
        with self._alone():
            for name, port in self._ports.items():
                for worker in port.workers.values():
                    if not worker.xsk or port.failed:
                        continue
                    n = lib.crab_worker_once(worker.c, 0)
                    if n < 0:
                        self._has_failed(port, name, worker.failure(-n))
                        continue
                    done += n
                    waiting.append(worker.xsk.fd)
                    sending = sending or worker.xsk.frames()["sending"] > 0
        return done, waiting, sending

    def publish(self, snapshot: Snapshot) -> None:
        """Have the workers use this snapshot, which is ours from now on."""
        for worker in self._workers:
            lib.crab_core_publish(worker.core, snapshot.c)
        if self._snapshot:
            self._retired.append(self._snapshot)
        self._snapshot = snapshot
        self.published += 1
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
        if self._rings and not self._showing and not in_use:
            for worker in self._workers:
                lib.crab_core_hide(worker.core)
            self._rings = False
        return not in_use

    def show(self, room: int) -> None:
        """Have the workers show the packets that snapshots name in rings of ``room`` bytes (a power of two).

        Raises :class:`KernelError` if there is no memory.
        """
        self._showing, self._rings = room, True
        for port in self._ports.values():
            for queue, worker in port.workers.items():
                self._show(worker, queue)

    def hide(self) -> None:
        """Snapshots name no packets any more."""
        self._showing = 0
        self.settle()

    def _show(self, worker: _Worker, queue: int) -> None:
        if lib.crab_core_show(worker.core, queue, self._showing):
            raise KernelError(f"no memory to show packets, {self._showing} bytes a queue")

    def shown(self) -> Iterator[bytes]:
        """The workers' records since the last call, of each at a time."""
        buffer = ffi.new("uint8_t[]", self._showing)
        for worker in self._workers:
            yield bytes(ffi.buffer(buffer, lib.crab_core_shown(worker.core, buffer)))

    def unshown(self) -> int:
        """Packets that there was no room to show."""
        return sum(lib.crab_core_unshown(worker.core) for worker in self._workers)

    def count(self, counts: npt.NDArray[np.uint32]) -> None:
        """Add to ``counts``, by backend id, the flows in the workers' caches.  From any thread, until :meth:`close`."""
        with self._alone():
            for worker in self._workers:
                lib.crab_core_count(worker.core, ffi.from_buffer("uint32_t[]", counts), len(counts), now())

    def close(self) -> None:
        """Stop the workers, close the sockets, free the snapshots.  Idempotent."""
        with self._alone():
            for worker in self._workers:
                worker.close()
            self._ports.clear()
        for snapshot in (*self._retired, *([self._snapshot] if self._snapshot else [])):
            snapshot.free()
        self._retired, self._snapshot = [], None
        self._shared = None
