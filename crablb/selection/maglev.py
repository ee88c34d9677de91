"""Maglev hashing: the table that serves the fallback, and the policies that need nothing else.

Source: Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer", NSDI 2016, 3.4.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from crablb._native import ffi, lib
from crablb.model import Address, mapped

__all__ = ["Table", "empty", "fill", "maglev_table"]

Table = npt.NDArray[np.uint16]


@lru_cache(2)
def empty(size: int) -> Table:
    """The table of nobody, which all share: at a start it is that of every service, until the backends are reached."""
    return np.full(size, lib.CRAB_NO_BACKEND, np.uint16)


def fill(table: Table, members: Mapping[int, tuple[Address, int, int]], seed: bytes) -> None:
    """Make it the table of :func:`maglev_table`.  Other threads run meanwhile.  Raises :class:`MemoryError`."""
    array = ffi.new("struct crab_maglev_member[]", max(len(members), 1))
    for entry, (backend_id, (address, weight, full)) in zip(array, members.items(), strict=False):
        entry.addr = mapped(address)
        entry.weight, entry.full = weight, full
        entry.backend = backend_id
    if lib.crab_maglev_build(ffi.from_buffer("uint16_t[]", table), len(table), array, len(members), seed):
        raise MemoryError("no memory for a Maglev table")


def maglev_table(members: Mapping[int, tuple[Address, int, int]], size: int, seed: bytes) -> Table:
    """The Maglev table of ``members``: ``size`` (a prime) ids of backends.

    ``members``: backend id -> address, weight, and the weight that it has when all is well with it.  Where it has less,
    only the slots that it lacks differ from the table of full weights.

    Slots hold ``lib.CRAB_NO_BACKEND`` if there is no member with a weight.  Source: Eisenbud et al., NSDI 2016, 3.4.
    """
    table: Table = np.empty(size, np.uint16)
    fill(table, members, seed)
    return table
