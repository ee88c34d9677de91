"""How many SYNs a second each service takes, as the XDP program is told by its map ``limits``.

A bucket of tokens a service, for all CPUs and interfaces together.  It is in front of the workers' rings, so a flood
to one service does not fill them.  The program takes the tokens, and drops (``drop_syn_rate``) the SYNs that there are
none for: never another packet.

A rate is one word, so a change of it is seen whole.  Its bucket is full then, as are those of a process that takes over
from another one; what is not changed goes on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from crablb._native import ffi
from crablb.kernel.bpf import Map
from crablb.model import Service, Vip

__all__ = ["Limits", "word"]

LIMIT = np.dtype([("full_ns", np.uint64), ("rate", np.uint64)])


def word(rate: int) -> int:
    """``struct crab_rate`` as a number: of so many SYNs a second, and a tenth of a second's at once, 16 at least.

    0 for 0: all.
    """
    if not rate:
        return 0
    made = ffi.new("struct crab_rate *", {"token_ns": 1_000_000_000 // rate, "burst": max(rate // 10, 16)})
    return int(ffi.cast("uint64_t *", made)[0])


class Limits:
    """Map ``limits``, mapped; by services' indices."""

    def __init__(self, limits: Map) -> None:
        whole = np.frombuffer(limits.mmap(), LIMIT, limits.max_entries)
        self._full, self._rates = whole["full_ns"], whole["rate"]

    def publish(self, services: Iterable[Service], indices: Mapping[Vip, int]) -> None:
        """Have these services take as many as they say.  Those whose rate is the same are not touched."""
        for service in services:
            index, rate = indices[service.vip], word(service.syn_rate)
            if self._rates[index] != rate:
                self._rates[index] = rate
                self.fill(index)

    def fill(self, index: int) -> None:
        """Have a service have all tokens that there is room for."""
        self._full[index] = 0


assert LIMIT.itemsize == ffi.sizeof("struct crab_limit")
