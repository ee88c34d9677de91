"""Policies in C (native/policy_*.c): a pool of a service's backends, and the policy that chooses among them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from crablb._native import ffi, lib

__all__ = ["Pool"]


class Pool:
    """Members of a service and a policy that chooses among them."""

    def __init__(self, policy: str, members: Mapping[int, tuple[Any, int]], turn: Any) -> None:
        """``members``: backend id -> (``struct crab_load *``, weight above 0), in the order of turns."""
        self.keep = members, turn
        array = ffi.new("struct crab_member[]", max(len(members), 1))
        for entry, (backend_id, (load, weight)) in zip(array, members.items(), strict=False):
            entry.backend, entry.weight, entry.load = backend_id, weight, load
        c = lib.crab_pool_new(policy.encode(), array, len(members), turn)
        if not c:
            raise MemoryError(f"no memory for policy {policy}")
        self.c = ffi.gc(c, lib.crab_pool_free)

    def pick(self, random: Any, count: int = 1) -> list[int]:
        """The backend ids that the policy chooses, one after the other; none without members.

        ``random``: ``uint64_t *``, the state of the random numbers; ``count``: at most ``lib.CRAB_BATCH``.
        """
        chosen = ffi.new("uint16_t[]", count)
        chose: int = lib.crab_pool_pick(self.c, random, chosen, count)
        return list(chosen[0:chose])

    def refresh(self) -> None:
        """Take the loads as they are now into account."""
        lib.crab_pool_refresh(self.c)
