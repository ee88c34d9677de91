"""Tables of which a hash is a slot: they serve the fallback, and the policies that need nothing else.

Sources: Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer", NSDI 2016, 3.4;
Thaler and Ravishankar, "Using Name-Based Mappings to Increase Hit Rates", IEEE/ACM ToN 6(1), 1998 (rendezvous);
Mirrokni, Thorup and Zadimoghaddam, "Consistent Hashing with Bounded Loads", SODA 2018.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from crablb._native import ffi, lib
from crablb.model import Address, Hashing, mapped

__all__ = ["Table", "empty", "fill", "table_of"]

Table = npt.NDArray[np.uint16]
BUILDERS = {Hashing.MAGLEV: lib.crab_maglev_build, Hashing.RENDEZVOUS: lib.crab_rendezvous_build}


@lru_cache(2)
def empty(size: int) -> Table:
    """The table of nobody, which all share: at a start it is that of every service, until the backends are reached."""
    return np.full(size, lib.CRAB_NO_BACKEND, np.uint16)


def fill(table: Table, members: Mapping[int, tuple[Address, int, int]], seed: bytes, hashing: Hashing) -> None:
    """Make it the table of :func:`table_of`.  Other threads run meanwhile.  Raises :class:`MemoryError`."""
    array = ffi.new("struct crab_table_member[]", max(len(members), 1))
    for entry, (backend_id, (address, weight, full)) in zip(array, members.items(), strict=False):
        entry.addr = mapped(address)
        entry.weight, entry.full = weight, full
        entry.backend = backend_id
    if BUILDERS[hashing](ffi.from_buffer("uint16_t[]", table), len(table), array, len(members), seed):
        raise MemoryError("no memory for a table")


def table_of(members: Mapping[int, tuple[Address, int, int]], size: int, seed: bytes, hashing: Hashing) -> Table:
    """The table of ``members``: ``size`` (a prime) ids of backends.

    ``members``: backend id -> address, weight, and the weight that it has when all is well with it.  Where it has less,
    only the slots that it lacks differ from the table of full weights.

    Slots hold ``lib.CRAB_NO_BACKEND`` if there is no member with a weight.  Raises :class:`MemoryError`.
    """
    table: Table = np.empty(size, np.uint16)
    fill(table, members, seed, hashing)
    return table
