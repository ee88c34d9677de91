"""Counters of the load balancer, read from the kernel's maps: they are there with the daemon alive or dead."""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from crablb._native import lib
from crablb.dataplane.flows import FlowTable
from crablb.errors import KernelError
from crablb.kernel.bpf import Map
from crablb.kernel.counters import counter_names
from crablb.kernel.interface import interface_name
from crablb.model import Vip

__all__ = [
    "DAEMON_COUNTERS",
    "WORKER_COUNTERS",
    "XDP_COUNTERS",
    "DaemonCounters",
    "Rounds",
    "forwarded",
    "read",
    "read_pinned",
]

XDP_COUNTERS = counter_names("crab_xdp_counter", "CRAB_XDP_")
WORKER_COUNTERS = counter_names("crab_counter", "CRAB_C_")
DAEMON_COUNTERS = counter_names("crab_daemon_counter", "CRAB_DAEMON_")


@dataclass(frozen=True, slots=True)
class Rounds:
    """How a worker's rounds were: what it took off its queue at once, worked on, and gave to the kernel again.

    ``sizes``: rounds by how many frames they had, at most 1, 2, 4, ...; ``frames``: of all of them.  ``times``: frames
    of rounds that were timed (one in CRAB_ROUND_SAMPLE) by how long that took, at most 256, 512, ... ns, the last any
    time; ``seconds``: their sum.  See ``struct crab_rounds`` of native/crablb.h.
    """

    sizes: tuple[int, ...]
    frames: int
    times: tuple[int, ...]
    seconds: float

    @classmethod
    def of(cls, rounds: Any) -> Self:
        """From a ``struct crab_rounds *``."""
        return cls(tuple(rounds.sizes), rounds.frames, tuple(rounds.times), rounds.timed_ns / 1e9)


class DaemonCounters:
    """What befell the daemon, counted in map ``daemon_counters``."""

    def __init__(self, held: Map) -> None:
        self._map = held
        self.read()

    def read(self) -> None:
        """Go on from what the map says: another process may have counted there."""
        self._counts = {
            name: int.from_bytes(self._map.lookup(i) or b"", sys.byteorder) for i, name in enumerate(DAEMON_COUNTERS)
        }

    def add(self, what: str) -> None:
        """Add one to a counter, a name of :data:`DAEMON_COUNTERS`."""
        self._counts[what] += 1
        with suppress(KernelError):  # it is what befell somebody who has more to do; the next one writes both
            self._map.update(DAEMON_COUNTERS.index(what), struct.pack("=Q", self._counts[what]))


def read(xdp: Map, workers: Map, daemon: Map, slots: Iterable[int]) -> dict[str, Any]:
    """Counts since the start: ``{"xdp": {...}, "workers": [{...} a queue], "total": {... over the workers},
    "daemon": {...}}``, packets all but the last.  ``slots``: of map ``worker_counters``, one a queue."""
    per_queue = []
    for slot in slots:
        values = struct.unpack(f"={lib.CRAB_WORKER_COUNTERS}Q", workers.lookup(slot) or b"")
        per_queue.append(dict(zip(WORKER_COUNTERS, values, strict=False)))
    return {
        "xdp": {name: xdp.sum_u64(i) for i, name in enumerate(XDP_COUNTERS)},
        "workers": per_queue,
        "total": {name: sum(q[name] for q in per_queue) for name in WORKER_COUNTERS},
        "daemon": {
            name: int.from_bytes(daemon.lookup(i) or b"", sys.byteorder) for i, name in enumerate(DAEMON_COUNTERS)
        },
    }


def read_pinned(folder: Path) -> dict[str, Any]:
    """The same from a load balancer's folder of pins."""
    with (
        Map.from_pin(folder / "xdp_counters") as xdp,
        Map.from_pin(folder / "worker_counters") as workers,
        Map.from_pin(folder / "daemon_counters") as daemon,
        Map.from_pin(folder / "interfaces") as interfaces,
        Map.from_pin(folder / "services") as services,
        Map.from_pin(folder / "service_counters") as counters,
        Map.from_pin(folder / "flows") as flows,
    ):
        queues = read_interfaces(interfaces)
        more = {
            "queues": list(queues.values()),
            "services": read_services(services, counters),
            "flows": FlowTable(flows).count(),
        }
        return read(xdp, workers, daemon, queues) | more


def read_interfaces(interfaces: Map) -> dict[int, str]:
    """The workers' queues by slot, in order: ``eth0/0``, ``eth0/1``, ``eth1/0``."""
    found = {}
    for key in interfaces.keys():  # noqa: SIM118 - a map, not a dict
        first, count = struct.unpack("=II", interfaces.lookup(key) or bytes(8))
        index = int.from_bytes(key, sys.byteorder)
        name = interface_name(index)
        found.update({first + queue: f"{name}/{queue}" for queue in range(count)})
    return dict(sorted(found.items()))


def read_services(services: Map, counters: Map) -> dict[str, dict[str, int]]:
    """What the XDP program forwarded by itself: packets and bytes by VIP."""
    found = {}
    for key, index in sorted(services.items()):
        packets, size = forwarded(counters, index)
        found[str(Vip.from_key(key))] = {"packets": packets, "bytes": size}
    return found


def forwarded(counters: Map, index: Any) -> tuple[int, int]:
    """Packets and bytes of one service."""
    counts = [struct.unpack("=QQ", value) for value in counters.lookup_percpu(index)]
    return sum(c[0] for c in counts), sum(c[1] for c in counts)
