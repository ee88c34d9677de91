"""A capture: what came in and what went out, each packet with the decision and its reason, as a pcapng file.

A driver in native mode gives the XDP program its packets before tcpdump on the same interface could see them, and they
leave by AF_XDP or by the program itself: only the load balancer can show its own packets.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncGenerator

from crablb.api.types import Capture
from crablb.control import outcome, pcapng
from crablb.control.pieces import Pieces
from crablb.dataplane.engine import Engine
from crablb.dataplane.tap import MAX_SNAP, Seen, Tap
from crablb.errors import Problems
from crablb.filters import Filter, parse_filter
from crablb.model import Config, Service, Vip
from crablb.values import counted

__all__ = ["capture", "checked"]

#: Seconds after which the reader is told, by counts, that there is nothing new.
SILENT = 10.0
#: Bytes for the words at the end.
LAST = 256
#: Where the limits may be.
WITHIN = {
    "seconds": (0, 86_400),
    "packets": (1, 10_000_000),
    "bytes": (4096, 1 << 32),
    "snaplen": (1, MAX_SNAP),
}


def checked(asked: Capture) -> Filter:
    """The filter of a capture.  Raises :class:`ConfigError`, which has every fault."""
    problems = Problems()
    wanted = problems.attempt("", parse_filter, asked.filter)
    for name, (low, high) in WITHIN.items():
        value = getattr(asked, name)
        if not low <= value <= high:  # which no NaN is
            problems.add(name, f"a number from {low:,} to {high:,}, not {value}")
    problems.finish()
    assert wanted
    return wanted


async def capture(engine: Engine, asked: Capture) -> Pieces[bytes]:
    """The file, piece by piece, each of whole blocks.  What comes from now on is in it.

    What comes faster than it is read is left out, and counted.  Raises :class:`ConfigError` and :class:`KernelError` as
    :meth:`Engine.tap` does.
    """
    wanted = checked(asked)
    tap = await engine.tap(wanted, asked.snaplen)
    return Pieces(tap, _File(engine, wanted, asked).pieces(tap))


class _File:
    """A capture file in the making."""

    def __init__(self, engine: Engine, wanted: Filter, limits: Capture) -> None:
        self._engine, self._wanted, self._limits = engine, wanted, limits
        self._began, self._wall = time.monotonic_ns(), time.time_ns()  # wall clocks may be set meanwhile
        self._numbers: dict[int, int] = {}  # of interfaces, by index
        self._counts: dict[int, int] = {}  # packets of each
        self._config: Config | None = None  # whose services these are
        self._services: dict[Vip, Service] = {}
        self._packets = 0
        self._missing = 0  # that have been told

    async def pieces(self, tap: Tap) -> AsyncGenerator[bytes, None]:
        limits, engine = self._limits, self._engine
        what = str(self._wanted) or "what the load balancer takes"
        first = pcapng.section("crablb", f"crablb capture on {os.uname().nodename}: {what}")
        for info in engine.interfaces:
            first += self._interface(info.index)
        written = len(first)
        yield first
        end = time.monotonic() + limits.seconds
        why = ""
        while not why:
            left = end - time.monotonic()
            if left <= 0:
                why = f"{limits.seconds:g} seconds are over"
                break
            piece = b""
            for seen in await tap.take(min(left, SILENT)):
                blocks = self._blocks(seen, tap.lost)
                if written + len(piece) + len(blocks) + LAST + len(self._statistics(tap.lost)) > limits.bytes:
                    why = f"{limits.bytes:,} bytes are full"
                    break
                piece += blocks
                self._packets += 1
                if self._packets == limits.packets:
                    why = f"{counted(limits.packets, 'packet')} came: no more was asked for"
                    break
            if not why and tap.over:
                why = "the load balancer has ended"
            piece = piece or self._statistics(tap.lost)
            written += len(piece)
            yield piece
        yield self._end(why, tap.lost)

    def _at(self, stamp: int) -> int:
        return self._wall + stamp - self._began

    def _interface(self, index: int) -> bytes:
        link = self._engine.links.get(index)
        name = link.name if link else f"if{index}"
        mode = self._engine.modes.get(name)
        self._numbers[index], self._counts[index] = len(self._numbers), 0
        described = f"served by crablb, {mode or 'no'} XDP" if mode is not None else "packets went out here"
        return pcapng.interface(name, described, self._limits.snaplen)

    def _service(self, packet: outcome.Packet | None) -> Service | None:
        config = self._engine.config
        if config is not self._config:
            self._config, self._services = config, {service.vip: service for service in config.services}
        return self._services.get(packet.vip) if packet and packet.vip else None

    def _blocks(self, seen: Seen, lost: int) -> bytes:
        """A packet as it came in, and as it went out, if it did."""
        packet = outcome.headers(seen.frame)
        comment = outcome.told(seen, packet, self._service(packet))
        dropped, self._missing = lost - self._missing, lost
        snap = self._limits.snaplen
        made = b""
        ways = [(seen.interface, seen.at, seen.frame, seen.length, False)]
        if seen.out_length:
            ways.append((seen.out_interface, seen.done, seen.out, seen.out_length, True))
        for index, stamp, data, length, outbound in ways:
            if index not in self._numbers:
                made += self._interface(index)
            self._counts[index] += 1
            made += pcapng.packet(
                self._numbers[index],
                self._at(stamp),
                data[:snap],
                length,
                comment=comment,
                outbound=outbound,
                id=self._packets + 1,
                queue=None if outbound else seen.queue,
                verdict=seen.verdict,
                dropped=0 if outbound else dropped,
            )
        return made

    def _end(self, why: str, lost: int) -> bytes:
        """How many packets there were, and are missing, and what ended the capture."""
        missing = f"; {counted(lost, 'packet')} missing: more came than could be read" if lost else ""
        return self._statistics(lost, f"{why}{missing}")

    def _statistics(self, lost: int, comment: str = "") -> bytes:
        """Of each interface; what is missing stands with the first, as nobody knows by which it came."""
        now = self._at(time.monotonic_ns())
        return b"".join(
            pcapng.statistics(
                number, self._wall, now, self._counts[index], 0 if number else lost, "" if number else comment
            )
            for index, number in self._numbers.items()
        )
