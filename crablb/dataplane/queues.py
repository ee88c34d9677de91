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
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from crablb import carried, lasting
from crablb._native import ffi, lib
from crablb.dataplane.flows import FlowTable, now
from crablb.dataplane.handlers import Entrance, Handlers
from crablb.dataplane.handover import Area, Known, Port, Queue
from crablb.dataplane.snapshot import Snapshot
from crablb.dataplane.statistics import Rounds
from crablb.errors import KernelError
from crablb.kernel import bpf, virtio
from crablb.kernel.interface import Interface
from crablb.kernel.xsk import HEADROOM, Given, XskError, XskSocket
from crablb.model import Bypass, Config
from crablb.selection.custom import Custom

__all__ = ["Queues"]

FRAMES = 4096  # a queue
AGAIN = 1.0  # seconds between two sockets in place of one that failed
TURN = 1.0  # seconds in which the thread of a worker that is woken turns, if it does at all
TOKENS = 1 << 18  # of MPTCP connections, of all queues together: 2 MiB when it is full


class _Worker:
    """One queue: a core, and while there is a socket, a thread."""

    def __init__(self, config: Config, counters: Any, handlers: Handlers, custom: Custom) -> None:
        self.counters = counters  # CRAB_COUNTERS of uint64_t
        self.xsk: XskSocket | None = None
        self.failed = False  # the socket did
        self.c: Any = ffi.NULL
        self.core = lib.crab_core_new(config.flows, counters)
        if not self.core:
            raise KernelError(f"no memory for {config.flows} flows a queue; ask for fewer: flows")
        self._spin = config.busy_poll
        self._handlers, self._custom = handlers, custom  # the core keeps handles of theirs
        self._entrance: Entrance | None = None
        self._thread: threading.Thread | None = None
        self.rounds = ffi.new("struct crab_rounds *")
        self._turns = 0  # of the thread, when last it was marked
        self._noted: npt.NDArray[np.uint8] | None = None  # memory that the thread may write into: see note
        lib.crab_core_ask(self.core, lib.crab_python_choose, custom.handle)

    def bind(self, xsk: XskSocket) -> None:
        """Work on this socket, which is ours from now on.  Raises :class:`KernelError`; then it is not."""
        c = lib.crab_worker_new(xsk.handle, self.core, self.counters)
        if not c:
            error = os.strerror(ffi.errno)
            raise KernelError(f"cannot make a worker for queue {xsk.queue} of {xsk.interface}: {error}")
        lib.crab_worker_free(self.c)
        self.c, self.xsk, self.failed = c, xsk, False
        if virtio.only_receives(xsk.interface, xsk.queue):
            lib.crab_worker_send_elsewhere(c)
        lib.crab_worker_spin(c, self._spin)
        lib.crab_worker_rounds(c, self.rounds)
        self._entrance = Entrance(self._handlers, xsk.memory, xsk.frame_size)
        lib.crab_core_handle(self.core, lib.crab_python_handle, self._entrance.handle)

    def start(self, cpu: int, failed: Callable[[str], None]) -> None:
        """Run in a thread on ``cpu``; ``failed`` is called from it, with the reason, if the socket fails."""
        assert self.xsk

        def run() -> None:
            lasting.show_name()
            with contextlib.suppress(OSError):  # the CPU was taken from us meanwhile; any other will do
                os.sched_setaffinity(0, {cpu})
            rc = lib.crab_worker_run(self.c)  # without the GIL
            if rc:
                failed(self.failure(os.strerror(-rc)))

        thread = threading.Thread(target=run, name=f"crablb-{self.xsk.interface}/{self.xsk.queue}", daemon=True)
        self._turns = 0
        thread.start()
        self._thread = thread

    @property
    def late(self) -> bool:
        """Whether it has a thread, which has not turned since :meth:`mark`."""
        return bool(self._thread) and lib.crab_worker_turns(self.c) == self._turns

    def mark(self) -> None:
        self._turns = lib.crab_worker_turns(self.c) if self._thread else 0

    def wake(self) -> None:
        lib.crab_worker_wake(self.c)

    def failure(self, what: str) -> str:
        assert self.xsk
        return f"queue {self.xsk.queue} of {self.xsk.interface} failed: {what}"

    @property
    def ended(self) -> bool:
        """Whether its thread is no more, though nobody has stopped it: an oops in the kernel takes the thread that was
        there, and no other, without a word."""
        return self._thread is not None and not os.path.exists(f"/proc/self/task/{self._thread.native_id}")

    def stop(self) -> None:
        """End the thread; the socket stays, for :meth:`bind` to begin anew with.  Idempotent."""
        if self.c:
            lib.crab_worker_stop(self.c)
        if self._thread:
            if not self.ended:  # CPython would wait for what such a thread had yet to do
                self._thread.join()
            self._thread = None

    def unbind(self) -> None:
        """End the thread, close the socket.  Idempotent."""
        self.stop()
        # Not by stop(), which may have no time: the kernel waits for all CPUs before a packet socket is closed.
        lib.crab_worker_free(self.c)
        self.c = ffi.NULL
        if self.xsk:
            self.xsk.close()
            self.xsk = None
        self.failed = False

    def lose(self) -> None:
        """:meth:`unbind`, and count what is lost in the socket's rings.  Idempotent."""
        self.stop()
        if self.c:
            lib.crab_worker_lose(self.c)
        self.unbind()

    def note(self, touched: npt.NDArray[np.uint8] | None) -> None:
        """Have it note from now on which parts of :attr:`cache` it changes: a bit each.  None: no more.

        Raises :class:`KernelError` if its thread does not turn: it may write there still, so that memory is kept.
        """
        if touched is not None:
            self._noted = touched
            lib.crab_core_note(self.core, ffi.cast("uint64_t *", ffi.from_buffer(touched)))
        elif self._noted is not None:
            lib.crab_core_note(self.core, ffi.NULL)
        if self._noted is not None:
            self._until_turned()
        self._noted = touched

    def _until_turned(self) -> None:
        """Wait until the thread, if there is one, is through with the batch under way.  Raises :class:`KernelError`."""
        if not self._thread:
            return
        before, end = lib.crab_worker_turns(self.c), time.monotonic() + TURN
        while lib.crab_worker_turns(self.c) == before:
            lib.crab_worker_wake(self.c)
            if time.monotonic() > end:
                assert self.xsk
                raise KernelError(f"the worker of {self.xsk.interface}/{self.xsk.queue} does not turn; restart")
            time.sleep(0.0001)

    @property
    def works(self) -> bool:
        """Whether it has a thread."""
        return self._thread is not None

    @property
    def cache(self) -> npt.NDArray[np.uint8]:
        """The flow cache's memory."""
        size = ffi.new("uint64_t *")
        entries = lib.crab_core_flows(self.core, size)
        return np.frombuffer(ffi.buffer(entries, size[0]), np.uint8)

    def close(self) -> None:
        self.unbind()
        lib.crab_core_free(self.core)


def _room(frame_size: int) -> int:
    """Bytes of the largest IP packet that fits into a frame, with Ethernet's header and two VLAN tags."""
    return frame_size - HEADROOM - 14 - 8


def _socket(interface: Interface, queue: int, *, copy: bool | None = None, size: int = 2048) -> XskSocket:
    """What does not fit into a frame lies in several; where a socket cannot have that, frames are as long as can be.

    In zero-copy mode as well: of 2048 bytes, less what is in front, a card that counts in kilobytes (igb) uses 1024.
    """
    if not lib.crab_xsk_knows_frags() or interface.mtu > _room(2048):
        size = 4096
    xsk = XskSocket(
        interface.name,
        queue,
        frames=FRAMES,
        frame_size=size,
        load_program=False,
        multi_buffer=True,
        copy=copy,
        memory_file=True,
    )
    if xsk.zero_copy and size < 4096:
        xsk.close()
        return _socket(interface, queue, copy=copy, size=4096)
    if xsk.zero_copy and not xsk.multi_buffer and interface.mtu > _room(4096):
        xsk.close()
        return _socket(interface, queue, copy=True)
    return xsk


def _takes(xsk: XskSocket, mtu: int) -> bool:
    """Whether no other socket would take more of such packets."""
    if xsk.multi_buffer or mtu <= _room(2048):
        return True
    return xsk.frame_size == 4096 and not (xsk.zero_copy and mtu > _room(4096))


def _by_queue(area: Area) -> Iterator[Sequence[npt.NDArray[np.uint8]]]:
    """Of each queue in turn: its worker's cache, which parts of it were touched since it was written, free frames."""
    return zip(area.parts[1::3], area.parts[2::3], area.parts[3::3], strict=True)


def _renew(to: npt.NDArray[np.uint8], cache: npt.NDArray[np.uint8], touched: npt.NDArray[np.uint8]) -> None:
    """Copy what was touched since ``to`` was as ``cache`` is."""
    lib.crab_flows_renew(
        ffi.from_buffer("uint8_t[]", to),
        ffi.from_buffer("uint8_t[]", cache),
        ffi.cast("uint64_t *", ffi.from_buffer(touched)),
        len(cache),
    )


class _Port:
    """An interface: its workers by queue, and where they are in the maps."""

    def __init__(self, first: int, room: int, cpu: int) -> None:
        self.first, self.room = first, room  # of slots in maps `sockets` and `worker_counters`
        self.cpu = cpu  # the first of those that work for it
        self.index = 0  # of the interface, in map `interfaces`
        self.workers: dict[int, _Worker] = {}
        self.renewed = -AGAIN  # when sockets that had failed were last made anew


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
        # program that calls once() again and again would hardly ever let go of the second.  The interpreter itself
        # takes and lets go of both: a generator (contextlib's) that a signal's handler interrupts in its last steps
        # keeps them for as long as somebody keeps the exception.
        self._turn, self._lock = threading.RLock(), threading.RLock()
        self._coming: list[tuple[_Port, int, XskSocket]] = []  # another process's sockets, until they are taken
        #: ``struct crab_joins *``: MPTCP connections' tokens, which all workers learn.
        self.joins = ffi.gc(lib.crab_joins_new(TOKENS), lib.crab_joins_free)
        if not self.joins:
            raise KernelError(f"no memory for {TOKENS} tokens of MPTCP connections")

    def _outside(self) -> None:
        """Before the locks are taken.  Raises :class:`KernelError` in the middle of frames: by a handler, a policy, or
        what a signal calls."""
        if self._lock._is_owned():  # type: ignore[attr-defined]
            raise KernelError("the load balancer is in the middle of frames: it cannot be called by what it has called")

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
    def some_zero_copy(self) -> bool:
        """Whether a socket is in zero-copy mode."""
        return any(worker.xsk.zero_copy for worker in self._workers if worker.xsk)

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

    # ---- from one process to the next: crablb.dataplane.handover ----

    def offer(self) -> tuple[dict[str, Port], int, list[int]]:
        """What there is to be taken over: ports by interface, bytes of the MPTCP tokens, two descriptors a queue."""
        ports: dict[str, Port] = {}
        fds: list[int] = []
        for name, port in self._ports.items():
            queues = {}
            for number, worker in port.workers.items():
                if worker.xsk:
                    queues[number] = Queue(worker.xsk.bound(), len(worker.cache))
                    fds += worker.xsk.files
            ports[name] = Port(port.first, port.room, port.cpu, queues)
        return ports, int(lib.crab_joins_size(self.joins)), fds

    def give(self, area: Area) -> Known:
        """Work no more, and say what is known; the sockets stay.  Only :meth:`resume` and :meth:`close` follow."""
        stopped = time.monotonic()
        frames: dict[str, dict[int, Given]] = {}
        rounds: dict[str, dict[int, str]] = {}
        self._outside()
        with self._turn, self._lock:
            for worker in self._workers:
                if worker.c:
                    lib.crab_worker_stop(worker.c)  # all of them before the first is waited for
            for worker in self._workers:
                worker.stop()
            lib.crab_joins_give(self.joins, ffi.from_buffer("uint8_t[]", area.parts[0]))
            parts = _by_queue(area)
            for name, port in self._ports.items():
                frames[name], rounds[name] = {}, {}
                for number, worker in port.workers.items():
                    if worker.xsk:
                        cache, touched, free = next(parts)
                        _renew(cache, worker.cache, touched)
                        frames[name][number] = worker.xsk.give(free.view(np.uint64))
                        rounds[name][number] = bytes(ffi.buffer(worker.rounds)).hex()
        return Known(frames, rounds, stopped)

    def show_memory(self, area: Area) -> None:
        """Write down what the workers remember, and from then on what of that they change: little is left to be
        written by :meth:`give`, however much they remember, and no page of it is new then.

        Raises :class:`KernelError`.  Followed by :meth:`give` or :meth:`resume`.
        """
        lib.crab_joins_give(self.joins, ffi.from_buffer("uint8_t[]", area.parts[0]))
        workers = (worker for port in self._ports.values() for worker in port.workers.values() if worker.xsk)
        for (cache, touched, _), worker in zip(_by_queue(area), workers, strict=True):
            worker.note(touched)
            cache[:] = worker.cache

    def forget_memory(self) -> None:
        """Write down no more; before its :class:`.Area` is closed.  Idempotent."""
        for worker in self._workers:
            with contextlib.suppress(KernelError):  # it keeps the memory, and who watches over threads tells
                worker.note(None)

    def resume(self, interfaces: Mapping[str, Interface]) -> None:
        """Work on after :meth:`give`.  A socket that somebody has used is made anew; of one that cannot be, the others
        work on, and it has failed (:meth:`failed`)."""
        for name, port in self._ports.items():
            for number, worker in port.workers.items():
                if not worker.xsk or worker.works:
                    continue
                try:
                    if worker.xsk.moved:
                        self._bind(port, name, number, interfaces[name])
                    else:
                        worker.bind(worker.xsk)
                        worker.xsk.register(self._maps["sockets"], port.first + number)  # see unregister
                        self._start(port, name, number)
                except Exception as error:  # no memory, no thread, an interface that is gone, whatever it is
                    self._has_failed(worker, name, f"queue {number} cannot be worked on again: {error}")

    def unregister(self, sockets: bpf.Map) -> None:
        """Take these sockets out of another process's map: as long as they live they keep each that they are in."""
        for slot in self.slots:
            with contextlib.suppress(KernelError):
                sockets.delete(slot)

    def accept(
        self,
        maps: Mapping[str, bpf.Map],
        interfaces: Mapping[str, Interface],
        table: FlowTable | None,
        ports: Mapping[str, Port],
        fds: Iterator[int],
    ) -> None:
        """Get ready for another process's queues, in place of :meth:`open`; it works on them until :meth:`take`."""
        self._maps, self._table = maps, table
        self._shared = maps["worker_counters"].mmap()
        for name, interface in interfaces.items():
            offered = ports[name]
            port = self._ports[name] = _Port(offered.first, offered.room, offered.cpu)
            for number, queue in offered.queues.items():
                xsk = XskSocket.adopt(queue.bound, (next(fds), next(fds)))
                self._coming.append((port, number, xsk))
                if queue.bound.ifindex != interface.index:
                    raise KernelError(f"{interface.name} has changed meanwhile; try again")
                port.workers[number] = self._worker(port.first, number)
            count = max(port.workers, default=-1) + 1
            maps["interfaces"].update(interface.index, struct.pack("=II", port.first, count))
            port.index = interface.index

    def take(self, known: Known, area: Area, *, same: bool) -> bool:
        """What another process has given is this one's from now on.  ``same``: its memory is of the same form.

        Whether this one's workers remember what its did; else they know what :meth:`adopt` said.
        """
        remembered = same and self._take_joins(area)
        names = {id(port): name for name, port in self._ports.items()}
        for (port, number, xsk), (cache, touched, free) in zip(self._coming, _by_queue(area), strict=True):
            worker, name = port.workers[number], names[id(port)]
            if same and len(worker.cache) == len(cache):
                _renew(worker.cache, cache, touched)
            else:
                remembered = False
            rounds = bytes.fromhex(known.rounds[name][number])
            if len(rounds) == ffi.sizeof("struct crab_rounds"):
                ffi.buffer(worker.rounds)[:] = rounds
            xsk.take(known.frames[name][number], free.view(np.uint64))
            worker.bind(xsk)
            xsk.register(self._maps["sockets"], port.first + number)
        self._coming.clear()
        return remembered

    def look_at_memory(self, area: Area) -> None:
        """Remember what another process's workers do, which :meth:`show_memory` wrote down; :meth:`take` has the
        rest."""
        self._take_joins(area)
        for (port, number, _), (cache, _, _) in zip(self._coming, _by_queue(area), strict=True):
            there = port.workers[number].cache
            if len(there) == len(cache):
                there[:] = cache

    def _take_joins(self, area: Area) -> bool:
        same = len(area.parts[0]) == int(lib.crab_joins_size(self.joins))
        if same:
            lib.crab_joins_take(self.joins, ffi.from_buffer("uint8_t[]", area.parts[0]))
        return same

    def fit(self, name: str, interface: Interface) -> None:
        """Have a socket on each queue that the interface has now, for frames as long as it takes now.

        Raises :class:`KernelError` if that cannot be; those are served then that could be.
        """
        port = self._ports[name]
        if any(worker.failed for worker in port.workers.values()):
            port.renewed = time.monotonic()
        try:
            for queue in range(interface.rx_queues):
                worker = port.workers.get(queue)
                if worker and worker.xsk and not worker.failed and _takes(worker.xsk, interface.mtu):
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
            self._outside()
            with self._turn, self._lock:
                self._lose(port, queue)  # a queue can have one socket only
        # What the XDP program sends is worth more than zero-copy.
        copy = self._config.ack_bypass is not Bypass.OFF and virtio.drops_in_zero_copy(interface.name)
        xsk = _socket(interface, queue, copy=copy or None)
        made = None
        try:
            worker = worker or (made := self._worker(port.first, queue))
            self._outside()
            with self._turn, self._lock:
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
        lib.crab_core_join(worker.core, self.joins)
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
        self._outside()
        with self._turn, self._lock:
            for queue in port.workers:
                self._lose(port, queue)

    def _lose(self, port: _Port, queue: int) -> None:
        """Close a socket.  The XDP program drops what comes then, and counts it; the kernel would not."""
        with contextlib.suppress(KernelError):
            self._maps["sockets"].delete(port.first + queue)
        port.workers[queue].lose()

    def failed(self, name: str) -> float | None:
        """In how many seconds sockets of this interface that have failed are to be made anew, by :meth:`fit`: at once,
        and no more often than each :data:`AGAIN`.  None: none has."""
        port = self._ports[name]
        if not any(worker.failed for worker in port.workers.values()):
            return None
        return max(port.renewed + AGAIN - time.monotonic(), 0.0)

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
        worker = port.workers[queue]
        worker.start(self._cpus[cpu % len(self._cpus)], lambda reason: self._has_failed(worker, name, reason))

    def _has_failed(self, worker: _Worker, name: str, reason: str) -> None:
        worker.failed = True
        self._failed(name, reason)

    def miss(self) -> None:
        """Tell of those whose threads have ended by themselves, as of those whose sockets have failed."""
        for name, port in self._ports.items():
            for worker in port.workers.values():
                if not worker.failed and worker.ended:
                    self._has_failed(worker, name, worker.failure("its thread has ended"))

    def late(self) -> list[str]:
        """The queues whose threads have not turned since the last time that there were none of those.  They are woken:
        they may merely sleep.  Whoever has failed is another matter."""
        workers = [
            (f"{name}/{n}", worker)
            for name, port in self._ports.items()
            for n, worker in sorted(port.workers.items())
            if not worker.failed
        ]
        late = [name for name, worker in workers if worker.late]
        for _, worker in workers:
            if not late:
                worker.mark()
            elif worker.late:
                worker.wake()
        return late

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
        self._outside()
        with self._turn:  # whoever waits for it
            pass
        with self._lock:
            for name, port in self._ports.items():
                for worker in port.workers.values():
                    if not worker.xsk or worker.failed:
                        continue
                    with carried.carrying():
                        n = lib.crab_worker_once(worker.c, 0)
                    if n < 0:
                        self._has_failed(worker, name, worker.failure(os.strerror(-n)))
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

    def count(self, counts: npt.NDArray[np.uint32], *, open_only: bool = False) -> None:
        """Add to ``counts``, by backend id, the flows in the workers' caches; ``open_only``: those whose client was
        answered, and has not begun to end them.  From any thread, until :meth:`close`."""
        self._outside()
        with self._turn, self._lock:
            for worker in self._workers:
                lib.crab_core_count(worker.core, ffi.from_buffer("uint32_t[]", counts), len(counts), now(), open_only)

    def keep_joins(self, backends: Iterable[int], services: Iterable[int]) -> None:
        """Forget the MPTCP connections of all backends and services but these, by number."""
        kept = [np.zeros(1 << 16, np.bool_) for _ in range(2)]
        for each, numbers in zip(kept, (backends, services), strict=True):
            each[list(numbers)] = True
        lib.crab_joins_keep(self.joins, *(ffi.from_buffer("bool[]", each) for each in kept))

    def recall(self, connection: int) -> list[tuple[str, int, Any]]:
        """What the workers remember of a connection, by its hash: interface, queue, and ``struct crab_memory``."""
        remembered = []
        self._outside()
        with self._turn, self._lock:
            for name, port in self._ports.items():
                for queue, worker in port.workers.items():
                    found = ffi.new("struct crab_memory[2]")
                    count = lib.crab_core_recall(worker.core, connection, now(), found)
                    remembered += [(name, queue, found[i]) for i in range(count)]
        return remembered

    def close(self) -> None:
        """Stop the workers, close the sockets, free the snapshots.  Idempotent."""
        self._outside()
        with self._turn, self._lock:
            for port in self._ports.values():
                for queue, worker in port.workers.items():
                    # One that another process has as well would keep the map for as long as that lives.
                    with contextlib.suppress(KernelError):
                        self._maps["sockets"].delete(port.first + queue)
                    worker.close()
            for _, _, xsk in self._coming:
                xsk.close()
            self._coming.clear()
            self._ports.clear()
        for snapshot in (*self._retired, *([self._snapshot] if self._snapshot else [])):
            snapshot.free()
        self._retired, self._snapshot = [], None
        self._shared = None
