"""What becomes of packets, for those who want to see it: the workers' records and the XDP program's, in one stream.

While nobody looks on this costs the workers a load and a branch a batch, and the XDP program nothing: for the time that
somebody does, another one that shows what it does by itself (``bpf/lbtap.bpf.c``) takes its place.
"""

from __future__ import annotations

import asyncio
import struct
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

import structlog

from crablb._native import ffi, lib
from crablb.dataplane.attachment import Attachment
from crablb.dataplane.program import Program
from crablb.dataplane.queues import Queues
from crablb.dataplane.statistics import WORKER_COUNTERS, XDP_COUNTERS
from crablb.errors import ConfigError, KernelError
from crablb.filters import Filter
from crablb.model import Address, mapped

__all__ = ["MAX_SNAP", "Seen", "Tap", "Taps"]

log = structlog.get_logger()

MAX_SNAP: int = lib.CRAB_TAP_SNAP
#: Bytes of each worker's ring, and of the XDP program's.
ROOM = 1 << 18
#: Seconds between two looks into the rings.
LOOK = 0.02
#: Seconds for which the XDP program shows packets without being told again, so that it stops when this process dies,
#: and how often it is told.
LEASE, RENEWED = 5.0, 1.0
#: Packets that a tap holds for its reader.
WAITING = 4096
#: Packets that are worked on before others have their turn in the event loop.
TURN = 64
#: ``struct crab_tapped``.
RECORD = struct.Struct("=QQQIIIIIHHHHBBBB")
assert RECORD.size == ffi.sizeof("struct crab_tapped")


@dataclass(frozen=True, slots=True)
class Seen:
    """A packet, and what became of it.  Times are nanoseconds of CLOCK_MONOTONIC, lengths bytes."""

    at: int
    done: int
    counters: frozenset[str]  # that counted it, names of XDP_COUNTERS or WORKER_COUNTERS
    frame: bytes  # the first bytes
    length: int
    interface: int  # index
    out: bytes  # the same of what went out
    out_length: int  # 0: nothing did
    out_interface: int
    backend: Address | None  # that it was sent to
    queue: int
    verdict: int | None  # of the XDP program, where it decided alone
    service: bool  # it is a service's
    known: bool  # a worker knew the connection
    written: bool  # so did the XDP program
    offer: bool  # a SYN with an offer
    chosen: bool  # a policy chose the backend; else a table


class Tap:
    """The packets that a filter names, for one reader.

    At most :data:`WAITING` are held for it; what is beyond is counted in ``lost``, and so are packets that there was no
    room for before, whosever they were.
    """

    def __init__(self, wanted: Filter, snap: int, number: int, close: Callable[[Tap], None]) -> None:
        self.wanted, self.snap, self.number = wanted, snap, number
        self._close = close
        self.lost = 0
        self.since = time.monotonic_ns()  # before that others had the number
        self._held: deque[Seen] = deque()
        self._some = asyncio.Event()
        self._over = False

    async def take(self, timeout: float | None = None) -> list[Seen]:
        """What has come, or some of it; waits for it, at most so many seconds.

        Empty: nothing came, or (``over``) nothing will.
        """
        if self._held:
            await asyncio.sleep(0)  # others have their turn
        elif not self._over:
            self._some.clear()
            try:
                async with asyncio.timeout(timeout):
                    await self._some.wait()
            except TimeoutError:
                return []
        return [self._held.popleft() for _ in range(min(len(self._held), TURN))]

    @property
    def over(self) -> bool:
        """Whether nothing comes any more: the load balancer has ended."""
        return self._over and not self._held

    def give(self, seen: Seen) -> None:
        if len(self._held) == WAITING:
            self.lost += 1
        else:
            self._held.append(seen)
            self._some.set()

    def end(self) -> None:
        self._over = True
        self._some.set()

    def close(self) -> None:
        """See no more.  Idempotent."""
        self._close(self)


class Taps:
    """All taps of a load balancer."""

    def __init__(
        self,
        queues: Queues,
        attachments: Sequence[Attachment],
        publish: Callable[[], None],
        backends: Callable[[], Mapping[Address, int]],
    ) -> None:
        """``publish``: have the workers see :meth:`filled`; ``backends``: their ids, as they are now."""
        self._queues, self._attachments, self._publish, self._backends = queues, attachments, publish, backends
        self._taps: dict[int, Tap] = {}  # by number
        self._next = 0
        self._wanted: Any = None  # ``struct crab_taps *``, as published last
        self._program: Program | None = None  # while it shows
        self._opening = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None
        self._lost = 0  # that have been told
        self._ended = False

    async def open(
        self,
        program: Program,
        wanted: Filter,
        snap: int,
        executor: Executor,
        keep: Callable[[str, Callable[[], Awaitable[None]]], asyncio.Task[None]],
    ) -> Tap:
        """A tap, to be closed.  ``snap``: bytes of a frame to be seen, 1 to :data:`MAX_SNAP`.

        ``executor``: where the XDP program is loaded, which takes up to a second; ``keep``: makes a lasting task.
        Raises :class:`ConfigError` (there are enough, or no such backend) and :class:`KernelError`.
        """
        known = self._backends()
        if wanted.backend and wanted.backend not in known:
            there = ", ".join(map(str, list(known)[:5]))
            raise ConfigError(f"filter: there is no backend {wanted.backend}; there are {there or 'none'}")
        if not 1 <= snap <= MAX_SNAP:
            raise ConfigError(f"snaplen is a number from 1 to {MAX_SNAP}, not {snap}")
        async with self._opening:
            if len(self._taps) == lib.CRAB_MAX_TAPS:
                raise ConfigError(
                    f"{lib.CRAB_MAX_TAPS} captures and traces are under way, and no more can be; wait for one to end"
                )
            if not self._program:
                await asyncio.get_running_loop().run_in_executor(executor, program.load_tap)
                if self._ended:  # meanwhile
                    raise KernelError("the load balancer ends, so no packets can be seen")
                self._show(program)
            while self._next in self._taps:
                self._next = (self._next + 1) % lib.CRAB_MAX_TAPS
            tap = self._taps[self._next] = Tap(wanted, snap, self._next, self.close)
            self._next = (self._next + 1) % lib.CRAB_MAX_TAPS  # the one that has been unused for longest
            self._changed()
            if not self._task:
                self._task = keep("tap", self._look)
        return tap

    def close(self, tap: Tap) -> None:
        """Idempotent."""
        if self._taps.get(tap.number) is not tap:
            return
        del self._taps[tap.number]
        tap.end()
        if self._taps:
            self._changed()
        else:
            self._hide()

    def end(self) -> None:
        """End all taps, and make no more; also where there is no event loop any more."""
        self._ended = True
        for tap in list(self._taps.values()):
            with suppress(RuntimeError):  # it is closed
                self.close(tap)

    def _show(self, program: Program) -> None:
        """Have workers and XDP program ready to show."""
        self._program = program
        program.use_tap()
        try:
            self._queues.show(ROOM)
            for attachment in self._attachments:
                if attachment.mode:
                    attachment.exchange(program)
        except BaseException:
            self._hide()
            raise
        self._lost = self._unshown()

    def _hide(self) -> None:
        program, self._program = self._program, None
        task, self._task = self._task, None
        if task:
            task.cancel()
        self._publish()
        self._queues.hide()
        if not program:
            return
        drop = program.drop_tap()
        for attachment in self._attachments:
            if attachment.mode:
                try:
                    attachment.exchange(program)
                except KernelError as error:  # the interface has gone, or goes
                    log.info("the XDP program was not exchanged", interface=attachment.info.name, reason=str(error))
        drop()

    def _changed(self) -> None:
        self._publish()
        self._lease()

    def _lease(self) -> None:
        wanted = self._wanted
        if self._program and wanted:
            wanted.until_ns = time.monotonic_ns() + int(LEASE * 1e9)
            self._program.show(bytes(ffi.buffer(wanted)))

    def filled(self) -> Any:
        """A ``struct crab_taps *`` for a snapshot, or None."""
        if not self._taps or not self._program:
            self._wanted = None
            return None
        wanted = self._wanted = ffi.new("struct crab_taps *")
        # A place that nobody has is between two that are taken: there nothing matches.
        wanted.count = max(self._taps) + 1
        wanted.snap = max(tap.snap for tap in self._taps.values())
        for number in range(wanted.count):
            entry = wanted.list[number]
            if number in self._taps:
                fill(entry, self._taps[number].wanted, self._backends())
            else:
                entry.fields = lib.CRAB_TAP_FOUR | lib.CRAB_TAP_SIX
        return wanted

    async def _look(self) -> None:
        """Take what is shown, and tell the XDP program that somebody still looks on."""
        renewed = time.monotonic()
        while True:
            await asyncio.sleep(LOOK)
            if time.monotonic() - renewed > RENEWED:
                renewed = time.monotonic()
                self._lease()
            records: list[tuple[int, Seen]] = []
            addresses = {number: address for address, number in self._backends().items()}
            for data in self._shown():
                parsed = parse(data, addresses)
                while some := list(islice(parsed, TURN)):
                    records += some
                    await asyncio.sleep(0)
            lost, self._lost = self._lost, self._unshown()
            for tap in self._taps.values():
                tap.lost += self._lost - lost
            records.sort(key=lambda record: record[1].at)
            for at in range(0, len(records), TURN):
                for taps, seen in records[at : at + TURN]:
                    for tap in self._taps.values():
                        if taps >> tap.number & 1 and seen.at >= tap.since:
                            tap.give(seen)
                await asyncio.sleep(0)

    def _shown(self) -> Iterator[bytes]:
        if self._program:
            yield self._program.shown()
        yield from self._queues.shown()

    def _unshown(self) -> int:
        return self._queues.unshown() + (self._program.unshown() if self._program else 0)


def fill(entry: Any, wanted: Filter, backends: Mapping[Address, int]) -> None:
    """Write a filter into a ``struct crab_tap``."""
    if wanted.client:
        entry.client = mapped(wanted.client.network_address)
        bits = wanted.client.prefixlen + (96 if wanted.client.version == 4 else 0)
        entry.client_mask = ((1 << bits) - 1 << 128 - bits).to_bytes(16, "big")
    if wanted.vip:
        entry.vip, entry.vip_mask = mapped(wanted.vip), b"\xff" * 16
    for address in (wanted.client, wanted.vip):
        if address:
            entry.fields |= lib.CRAB_TAP_FOUR if address.version == 4 else lib.CRAB_TAP_SIX
    if wanted.vip_port:
        entry.fields |= lib.CRAB_TAP_VPORT
        entry.vport = int.from_bytes(wanted.vip_port.to_bytes(2, "big"), "little")
    if wanted.port:
        entry.fields |= lib.CRAB_TAP_PORT
        entry.port = int.from_bytes(wanted.port.to_bytes(2, "big"), "little")
    if wanted.backend:
        entry.fields |= lib.CRAB_TAP_BACKEND
        # One that is gone has no packets, nor has a packet that goes nowhere.
        entry.backend = backends.get(wanted.backend, lib.CRAB_NO_BACKEND - 1)


@lru_cache(1024)
def _names(counted: int, xdp: bool) -> frozenset[str]:
    """Of the counters that these bits stand for."""
    return frozenset(name for bit, name in enumerate(XDP_COUNTERS if xdp else WORKER_COUNTERS) if counted >> bit & 1)


def parse(data: bytes, addresses: Mapping[int, Address]) -> Iterator[tuple[int, Seen]]:
    """Records one behind the other (``struct crab_tapped``), each with the taps that show it, a bit each.

    ``addresses``: backends by their ids.
    """
    at = 0
    while at < len(data):
        (began, done, counted, size, interface, out_interface, length, out_length, kept, out_kept, backend, queue, taps,
         xdp, verdict, flags) = RECORD.unpack_from(data, at)  # fmt: skip
        frame = data[at + RECORD.size : at + RECORD.size + kept]
        out = data[at + RECORD.size + kept : at + RECORD.size + kept + out_kept]
        yield (
            taps,
            Seen(
                at=began,
                done=done,
                counters=_names(counted, bool(xdp)),
                frame=frame,
                length=length,
                interface=interface,
                out=out,
                out_length=out_length,
                out_interface=out_interface,
                backend=addresses.get(backend),
                queue=queue,
                verdict=verdict if xdp else None,
                service=bool(flags & lib.CRAB_TAPPED_SERVICE),
                known=bool(flags & lib.CRAB_TAPPED_KNOWN),
                written=bool(flags & lib.CRAB_TAPPED_WRITTEN),
                offer=bool(flags & lib.CRAB_TAPPED_OFFER),
                chosen=bool(flags & lib.CRAB_TAPPED_CHOSEN),
            ),
        )
        at += size
