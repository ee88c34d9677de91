"""How the XDP program gets frames to the backends by itself: map ``paths`` of bpf/lb.bpf.c, by backend id."""

from __future__ import annotations

import struct
from collections.abc import Callable, Container, Iterator, Mapping
from typing import NamedTuple

from crablb._native import ffi, lib
from crablb.kernel.bpf import Map
from crablb.kernel.netlink import HopState, NextHop
from crablb.model import Address, mapped, unmapped

__all__ = ["Paths", "Ways", "backends", "no_path", "path"]

PATH_SIZE = ffi.sizeof("struct crab_path")


class Ways(NamedTuple):
    """How the XDP program can send to a backend; as in ``struct crab_path``."""

    tx: bool = False
    redirect: bool = False
    partial: int = lib.CRAB_PARTIAL_ASK
    frags: bool = False
    room: bool = False


def path(backend: Address, macs: bytes, mtu: int, source: Address | None, ifindex: int, ways: Ways) -> bytes:
    """``struct crab_path``, a value of map ``paths``.  ``macs``: destination, source; ``mtu``: of an IP packet."""
    outer = mapped(source) if source else bytes(16)
    return mapped(backend) + outer + macs + struct.pack("=IIBBBBBB6x", mtu, ifindex, backend.version == 6, *ways)


def no_path(backend: Address) -> bytes:
    """The value for a backend that the XDP program does not reach: its packets go to user space."""
    return path(backend, bytes(12), 0, None, 0, Ways())


def backends(held: Map) -> Iterator[tuple[Address, bytes]]:
    """Every backend in the map, and the MAC address that its frames go to (zero if there is none)."""
    for backend_id in range(held.max_entries):
        value = held.lookup(backend_id) or bytes(PATH_SIZE)
        if any(value[:16]):
            yield unmapped(value[:16]), value[32:38]


class Paths:
    """What the map holds.  The XDP program goes by it, with the daemon alive or dead; the next daemon learns from it
    whose the ids are that flows name."""

    def __init__(self, held: Map) -> None:
        self._map = held
        self._known: dict[Address, bytes] = {}
        #: The backends that the XDP program reaches; what goes to the others passes user space.
        self.reached: frozenset[Address] = frozenset()

    def publish(
        self,
        ids: Mapping[Address, int],
        hops: Mapping[Address, NextHop],
        ways: Callable[[NextHop], Ways],
        dead: Container[Address],
    ) -> None:
        """Write down how to get to each backend, if ``ways`` says that there is one.

        ``dead``: those that are dead for some service, whose own entries the program does not know: user space
        decides about their packets.
        """
        reached = set()
        for address, backend_id in ids.items():
            found, hop = no_path(address), hops.get(address)
            if hop and hop.state is HopState.RESOLVED and address not in dead:
                how = ways(hop)
                if how.tx or how.redirect:
                    reached.add(address)
                    found = path(address, hop.dst_mac + hop.src_mac, hop.mtu, hop.source, hop.ifindex, how)
            if self._known.get(address) != found:
                self._map.update(backend_id, found)
                self._known[address] = found
        self.reached = frozenset(reached)

    def mistrust(self) -> None:
        """Somebody else may have written to the map."""
        self._known.clear()

    def forget(self, address: Address, backend_id: int) -> None:
        """The id is nobody's any more."""
        self._known.pop(address, None)
        self._map.update(backend_id, bytes(PATH_SIZE))
