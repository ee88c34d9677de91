"""The XDP program's flows (map ``flows`` of bpf/lb.bpf.c), as arrays: to age them, and to take them over."""

from __future__ import annotations

import struct
import time

import numpy as np
import numpy.typing as npt

from crablb._native import lib
from crablb.kernel.bpf import Map
from crablb.model import Address, mapped, unmapped

__all__ = ["ENTRY", "KEY", "now", "path", "read", "sweep"]

#: ``struct crab_flow_id``: addresses of 16 bytes (IPv4-mapped), ports.
KEY = np.dtype([("client", "u1", 16), ("vip", "u1", 16), ("cport", ">u2"), ("vport", ">u2")])
#: ``struct crab_flow_entry``; ``backend`` is an address, as two words.
ENTRY = np.dtype(
    [("backend", "<u8", 2), ("seen", "<u4"), ("state", "u1"), ("tunnel", "u1"), ("ask", "u1"), ("pad", "u1")]
)


def now() -> int:
    """The clock of ``seen``: seconds of CLOCK_MONOTONIC_COARSE, which Linux numbers 6."""
    return int(time.clock_gettime(6))


def path(
    backend: Address, macs: bytes, mtu: int, source: Address | None, ifindex: int, *, tx: bool, redirect: bool
) -> bytes:
    """``struct crab_path``, a value of map ``paths``.  ``macs``: destination, source; ``mtu``: of an IP packet."""
    outer = mapped(source) if source else bytes(16)
    return macs + struct.pack("=I16sIBBBx", mtu, outer, ifindex, backend.version == 6, tx, redirect)


def read(flows: Map) -> tuple[npt.NDArray[np.void], npt.NDArray[np.void]]:
    """Keys (dtype :data:`KEY`) and entries (:data:`ENTRY`) of all flows, shape (n,) each."""
    keys, values = flows.dump()
    return np.frombuffer(keys, KEY), np.frombuffer(values, ENTRY)


def alive(entries: npt.NDArray[np.void], at: int) -> npt.NDArray[np.bool_]:
    """Which entries are not too old, shape (n,)."""
    age = (at - entries["seen"].astype(np.int64)) % 2**32  # as the XDP program reckons
    limit = np.where(entries["state"] == lib.CRAB_FLOW_OPEN, lib.CRAB_AGE_OPEN, lib.CRAB_AGE_ENDING)
    kept: npt.NDArray[np.bool_] = age <= limit
    return kept


def by_backend(entries: npt.NDArray[np.void]) -> tuple[list[Address], npt.NDArray[np.intp]]:
    """The backends there are, and for each entry the index of its own."""
    if not len(entries):
        return [], np.empty(0, np.intp)
    unique, inverse = np.unique(entries["backend"], axis=0, return_inverse=True)
    return [unmapped(row.tobytes()) for row in unique], inverse.reshape(-1)


def sweep(flows: Map) -> dict[Address, int]:
    """Delete the flows that are too old; how many each backend has left."""
    keys, entries = read(flows)
    kept = alive(entries, now())
    for key in keys[~kept]:
        flows.delete(key.tobytes())
    addresses, which = by_backend(entries[kept])
    return dict(zip(addresses, np.bincount(which, minlength=len(addresses)).tolist(), strict=True))
