"""The load balancer's XDP program, loaded, and what it is told by its maps.

What the maps hold is there a second time, in this process: the maps are what the program goes by, and, pinned, what
``crablb status`` and the next daemon read.

================== ==============================================================================
map                in this process
================== ==============================================================================
services           :class:`.registry.Registry` (which VIPs, by which index)
hashing            the seed
flows              each worker's flow cache, which decides; the map is learned from it
paths              :class:`.paths.Paths`
interfaces sockets :class:`.queues.Queues`
macs               the configuration, and :class:`crablb.kernel.netlink.NextHops`
limits             the configuration; their tokens nowhere
handlers           :class:`.handlers.Handlers`
vips               the configuration, and :class:`crablb.kernel.netlink.NextHops`
worker_counters    the same memory, mapped; so are flows
daemon_counters    :class:`.statistics.DaemonCounters`
xdp_counters       nowhere; nor are service_counters, passed.  What :meth:`Program.ask` asks has its own
taps               :class:`.tap.Taps`; of the one that shows what it does, which has tapping, tapped, untapped too
================== ==============================================================================
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from crablb._native import ffi, lib
from crablb.dataplane.flows import FlowTable, Inherited, buckets_for, hashing
from crablb.dataplane.limits import Limits
from crablb.dataplane.paths import Paths
from crablb.dataplane.statistics import DaemonCounters, forwarded, read
from crablb.kernel import bpf
from crablb.model import Address, Bypass, Closed, Config, Vip, mapped

__all__ = ["MAIN", "NAMES", "PINNED", "Program", "bypass"]

#: The program's name, and that of the one that stands in for it while somebody looks on.
MAIN, TAP = NAMES = ("crab_lb", "crab_lb_tap")
#: Of the latter's records, how many are taken at once.
RECORDS = 2048

#: What ``crablb status`` reads, and the next daemon takes over.  The flows, without which the others are of no use, are
#: pinned last.
PINNED = (
    "services",
    "service_counters",
    "hashing",
    "sockets",
    "interfaces",
    "paths",
    "xdp_counters",
    "worker_counters",
    "daemon_counters",
    "flows",
)
#: What the program itself writes to, or finds flows by.
WRITTEN = ("flows", "hashing", "limits", "passed", "pieces", "service_counters", "xdp_counters")
#: How many services can be added at the least without a restart.
SERVICES = 4096


def bypass(config: Config) -> bool:
    """Whether the XDP program may forward known fallback flows by itself."""
    return config.ack_bypass is not Bypass.OFF


def _load(
    reuse: Mapping[str, bpf.Map], sizes: Mapping[str, int] = MappingProxyType({}), name: str = "lb"
) -> bpf.Object:
    # Without sockets of that kind an interface whose MTU exceeds a page takes the program in generic mode, where it
    # forwards known flows at least.
    frags = bool(lib.crab_xsk_knows_frags())
    return bpf.Object(bpf.object_path(name), reuse=reuse, max_entries=sizes, frags=frags)


class Program:
    """The program with its maps, for one process; several interfaces may have it attached.

    ``inherited``: the maps of another daemon, taken over; closed in any case.  Raises
    :class:`crablb.kernel.bpf.BpfError`.
    """

    def __init__(self, config: Config, seed: bytes, inherited: Inherited | None = None) -> None:
        buckets = buckets_for(config.flows) if bypass(config) else 1
        known = inherited.services.values() if inherited else ()
        needed = max(known, default=-1) + 1 + len(config.services)
        room = min(max(2 * needed, SERVICES), lib.CRAB_MAX_SERVICES)
        reuse = dict(inherited.maps) if inherited else {}
        if not bypass(config) or ("flows" in reuse and reuse["flows"].max_entries == 1):  # it had none
            for name in ("flows", "paths"):
                reuse.pop(name, None)
        if "service_counters" in reuse and reuse["service_counters"].max_entries < needed:
            del reuse["service_counters"]
        if "service_counters" in reuse:
            room = reuse["service_counters"].max_entries
        if "flows" in reuse:
            buckets = reuse["flows"].max_entries
        sizes = {"service_counters": room, "limits": room, "flows": buckets}
        sizes = {name: size for name, size in sizes.items() if name not in reuse}
        try:
            self._object = _load(reuse, sizes)
        finally:
            if inherited:
                inherited.close()
        self.maps: Mapping[str, bpf.Map] = self._object.maps
        self.maps["hashing"].update(0, hashing(seed, buckets))
        self.flows = FlowTable(self.maps["flows"]) if bypass(config) else None
        self.paths = Paths(self.maps["paths"])
        self.counters = DaemonCounters(self.maps["daemon_counters"])
        self.limits = Limits(self.maps["limits"])
        self._tap: _Tap | None = None  # in place of it
        self._ready: _Tap | None = None
        self._aside: bpf.Object | None = None

    @property
    def main(self) -> bpf.Program:
        """What is attached to interfaces."""
        return self._tap.object.program(TAP) if self._tap else self._object.program(MAIN)

    @property
    def service_room(self) -> int:
        """How many services there may be."""
        return self.maps["service_counters"].max_entries

    def serve(self, vips: Iterable[Vip], indices: Mapping[Vip, int]) -> None:
        """Take these VIPs' packets, and no others."""
        services = self.maps["services"]
        wanted = {vip.key(): vip for vip in vips}
        there = set(services.keys())
        for key in there - wanted.keys():
            services.delete(key)
        for key in wanted.keys() - there:
            services.update(key, indices[wanted[key]])

    def answer(self, vips: Iterable[Address], config: Config) -> None:
        """Take what comes to these VIPs but is no service's, as far as the configuration says so, and no others'."""
        taken = {
            Closed.AUTO: lib.CRAB_VIP_CLOSED,
            Closed.RESET: lib.CRAB_VIP_CLOSED | lib.CRAB_VIP_ALL,
            Closed.DROP: lib.CRAB_VIP_CLOSED | lib.CRAB_VIP_ALL,
            Closed.PASS: 0,
        }[config.closed]
        if config.ping or taken:
            taken |= lib.CRAB_VIP_ECHO
        held = self.maps["vips"]
        wanted = {mapped(vip) for vip in vips} if taken else set()
        for key in set(held.keys()) - wanted:
            held.delete(key)
        for key in wanted:
            held.update(key, taken)

    def own(self, index: int, macs: Sequence[bytes]) -> None:
        """Take what comes to these MAC addresses (those that there is room for) by an interface, and no others."""
        kept = macs[: lib.CRAB_MAX_MACS]
        filled = [*kept, *[kept[0]] * (lib.CRAB_MAX_MACS - len(kept))]
        self.maps["macs"].update(index, b"".join(mac + bytes(2) for mac in filled))

    def disown(self, index: int) -> None:
        """An interface has gone."""
        self.maps["macs"].delete(index)

    def again(self) -> bpf.Object:
        """What is attached once more, on the same maps; to be closed."""
        return _load(self._tap.object.maps, name="lbtap") if self._tap else _load(self.maps)

    def load_tap(self) -> None:
        """Load the one that shows what it does, for :meth:`use_tap`; takes up to a second, in any thread."""
        self._ready = self._ready or _Tap(_load(self.maps, name="lbtap"))

    def use_tap(self) -> None:
        """It is the main one from now on, to be attached."""
        self._tap, self._ready = self._ready, None

    def drop_tap(self) -> Callable[[], None]:
        """The other one is the main one again, to be attached; then call what is returned."""
        tap, self._tap = self._tap, None
        return tap.close if tap else lambda: None

    def show(self, taps: bytes) -> None:
        """Have it show the packets that these (``struct crab_taps``) name, if it is the main one."""
        if self._tap:
            self._tap.object.maps["taps"].update(0, taps)

    def shown(self) -> bytes:
        """Its records, as many as are taken at once: each a ``struct crab_tapped``, and frames."""
        return self._tap.take() if self._tap else b""

    def unshown(self) -> int:
        """Packets that there was no room to show."""
        return self._tap.object.maps["untapped"].sum_u64(0) if self._tap else 0

    def count_from_zero(self, index: int) -> None:
        """A service has got this index, which may have been another one's."""
        counters = self.maps["service_counters"]
        counters.update(index, bytes(counters.value_size))
        self.limits.fill(index)

    def take_frames(self, matches: Any) -> None:
        """Take the frames that these (``struct crab_matches *``) name, and no others."""
        if matches.count:
            self.maps["handlers"].update(0, bytes(ffi.buffer(matches)))
        else:
            self.maps["handlers"].delete(0)

    def statistics(self, slots: Sequence[int]) -> dict[str, Any]:
        """See :func:`crablb.dataplane.statistics.read`."""
        maps = self.maps
        return read(maps["xdp_counters"], maps["worker_counters"], maps["daemon_counters"], slots)

    def load_aside(self) -> None:
        """Load the program that :meth:`ask` asks; takes up to a second, in any thread."""
        shared = {name: held for name, held in self.maps.items() if name not in WRITTEN}
        self._aside = self._aside or _load(shared, {"flows": 1})

    def ask(self, frame: bytes, index: int) -> int:
        """What the program returns for a frame that came in by queue 0 of an interface, and belongs to no known flow.

        One that counts for itself is asked, after :meth:`load_aside`, and what it says is not done.
        """
        assert self._aside
        context = struct.pack("=6I", 0, len(frame), 0, index, 0, 0)  # struct xdp_md
        return self._aside.program(MAIN).test_run(frame, context=context).retval

    def forwarded(self, index: int) -> tuple[int, int]:
        """Packets and bytes of the service with this index that it forwarded by itself."""
        return forwarded(self.maps["service_counters"], index)

    def close(self) -> None:
        """Forget it; what is pinned or attached stays."""
        for tap in (self._tap, self._ready):
            if tap:
                tap.close()
        self._tap = self._ready = None
        if self._aside:
            self._aside.close()
            self._aside = None
        self._object.close()


class _Tap:
    """The program that shows what it does, loaded, and the reader of what it shows."""

    def __init__(self, loaded: bpf.Object) -> None:
        self.object = loaded
        self._records: list[bytes] = []
        self._ring = bpf.Ring(loaded.maps["tapped"], self._records.append)

    def take(self) -> bytes:
        self._ring.consume(RECORDS)
        taken = b"".join(self._records)
        self._records.clear()
        return taken

    def close(self) -> None:
        self._ring.close()
        self.object.close()
