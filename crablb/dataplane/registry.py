"""The numbers that backends and services have in snapshots, flows and the kernel's maps.

A number is given out again when nothing holds it any more.  Three things hold one: the configuration, flows (in the
workers' caches and in map ``flows``), and snapshots that a worker may still look into.  So it goes two steps: released
when the first two have let go, it cools until no snapshot from before is in use (:meth:`Numbers.settle`).
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from crablb._native import lib
from crablb.errors import ConfigError
from crablb.model import Address, Config, Vip, mapped

__all__ = ["Numbers", "Registry"]

K = TypeVar("K", bound=Hashable)


class Numbers(Mapping[K, int]):
    """Who has which number: a mapping of keys to numbers from 0 to ``limit`` - 1, each given to one key at a time.

    ``held``: those that are given out already, as a daemon before did.
    """

    def __init__(self, limit: int, held: Mapping[K, int] | None = None) -> None:
        self.limit = limit
        self._held = dict(held or {})
        self._cooling: set[int] = set()
        #: Numbers from here on were never given.  Low ones are given first: arrays are as long as the highest.
        self._fresh = max(self._held.values(), default=-1) + 1
        self._free = sorted(set(range(self._fresh)) - set(self._held.values()))
        self.version = 0  # rises when somebody has another number

    def __getitem__(self, key: K) -> int:
        return self._held[key]

    def __iter__(self) -> Iterator[K]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    @property
    def end(self) -> int:
        """One above the highest number in use."""
        return max(self._held.values(), default=-1) + 1

    def lacking(self, keys: Iterable[K]) -> int:
        """For how many of these there is no number to give; 0: :meth:`give` will do."""
        room = self.limit - len(self._held) - len(self._cooling)
        return max(0, len(set(keys) - self._held.keys()) - room)

    def give(self, keys: Iterable[K]) -> list[K]:
        """Numbers for those that have none, in their order; returns who they are.

        Raises :class:`OverflowError`, and gives none, if there are not enough.
        """
        new = [key for key in dict.fromkeys(keys) if key not in self._held]
        if self.lacking(new):
            raise OverflowError(f"{len(new)} numbers are asked for, and there are too few of {self.limit}")
        self.version += bool(new)
        for key in new:
            if self._free:
                self._held[key] = heapq.heappop(self._free)
            else:
                self._held[key] = self._fresh
                self._fresh += 1
        return new

    def release(self, key: K) -> int:
        """Neither configuration nor flows hold the key's number, which is returned, any more.  It cools."""
        number = self._held.pop(key)
        self.version += 1
        self._cooling.add(number)
        return number

    def settle(self) -> None:
        """No worker uses a snapshot from before the last :meth:`release`: what cools may be given out."""
        for number in self._cooling:
            heapq.heappush(self._free, number)
        self._cooling.clear()


class Registry:
    """Ids of backends (what flows name them by), and indices of services (into map ``service_counters``)."""

    def __init__(
        self,
        service_room: int,
        backends: Mapping[Address, int] | None = None,
        services: Mapping[Vip, int] | None = None,
    ) -> None:
        self.backends: Numbers[Address] = Numbers(lib.CRAB_NO_BACKEND, backends)
        self.services: Numbers[Vip] = Numbers(service_room, services)

    @property
    def version(self) -> tuple[int, int]:
        """Another one when somebody has another number."""
        return self.backends.version, self.services.version

    def admit(self, config: Config) -> list[Vip]:
        """Numbers for all that the configuration names.  Returns the services that are new.

        Raises :class:`ConfigError`, and changes nothing, if they are used up.
        """
        backends = sorted(config.backends, key=mapped)
        services = [service.vip for service in config.services]
        problems = [
            f"{numbers.limit:,} {what} at most can be known at a time, those removed whose connections last included;"
            f" {lacking:,} too many: try again later, or restart crablb serve"
            for numbers, what, lacking in (
                (self.backends, "different backends", self.backends.lacking(backends)),
                (self.services, "services", self.services.lacking(services)),
            )
            if lacking
        ]
        if problems:
            raise ConfigError(problems)
        self.backends.give(backends)
        return self.services.give(services)

    def collect(self, configs: Sequence[Config], flows: npt.NDArray[np.uint32]) -> dict[Address, int]:
        """Let go of what nothing holds any more; returns the backends whose ids were released.

        ``configs``: those that were served since the count began; ``flows``: how many flows there are by backend id,
        shape (n,), n above every id, counted when no worker looked into a snapshot from before the current one.  (A
        worker that does may still give a flow to a backend that was removed; one that does not can only lose some.)
        """
        for numbers in (self.backends, self.services):
            numbers.settle()
        for vip in self.services.keys() - {service.vip for config in configs for service in config.services}:
            self.services.release(vip)
        named: set[Address] = set().union(*(config.backends for config in configs))
        gone = [address for address in self.backends.keys() - named if not flows[self.backends[address]]]
        return {address: self.backends.release(address) for address in gone}
