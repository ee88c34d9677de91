"""What metrics and the status page are made of: one look at a running load balancer, shared by all who ask at once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from crablb.api import types
from crablb.dataplane.events import Event
from crablb.dataplane.statistics import Rounds

__all__ = ["Engine", "Facts", "Gatherer", "Source"]

#: Seconds that a look is good for.
FRESH = 1.0
#: Events told at most, the newest.
EVENTS = 50


class Source(Protocol):
    """What :class:`crablb.control.operator.Operator` answers."""

    async def look(self) -> tuple[types.Status, list[types.Service], list[types.Backend]]: ...
    def events(self, since: int = 0) -> list[types.Event]: ...


class Engine(Protocol):
    """What :class:`crablb.dataplane.engine.Engine` tells beside it."""

    @property
    def config(self) -> Any: ...
    @property
    def published(self) -> int: ...
    def rounds(self) -> dict[tuple[str, int], Rounds]: ...
    def statistics(self) -> dict[str, Any]: ...


@dataclass(frozen=True, slots=True)
class Reload:
    """The last time that a configuration was read: of the start, at first."""

    well: bool
    since: float  # at: the last one that went well


@dataclass(frozen=True, slots=True)
class Facts:
    at: float  # when the look began, seconds since 1970
    status: types.Status
    services: list[types.Service]
    backends: list[types.Backend]
    events: list[types.Event]
    workers: Mapping[tuple[str, int], Mapping[str, int]]  # counters, by interface and queue
    rounds: Mapping[tuple[str, int], Rounds]
    flows_limit: int
    published: int
    reload: Reload


class Gatherer:
    """Looks, at most once in :data:`FRESH` seconds, however many ask.

    To be made in the load balancer's event loop; its :meth:`hear` is a listener of the supervisor's.
    """

    def __init__(self, source: Source, engine: Engine, clock: Callable[[], float] = time.time) -> None:
        self._source, self._engine, self._clock = source, engine, clock
        self._reload = Reload(True, clock())
        self._look: tuple[float, asyncio.Future[Facts]] | None = None

    def hear(self, event: Event) -> None:
        if event.kind == "reloaded":
            self._reload = Reload(True, self._clock())
        elif event.kind == "not-reloaded":
            self._reload = Reload(False, self._reload.since)

    async def facts(self) -> Facts:
        now = time.monotonic()
        if self._look is None or now - self._look[0] >= FRESH:
            self._look = now, asyncio.ensure_future(self._gather())
        look = self._look
        try:
            # Who asked first may go away; the others wait on.
            return await asyncio.shield(look[1])
        except Exception:
            if self._look is look:
                self._look = None
            raise

    async def close(self) -> None:
        """Look no more: what is looked at goes.  Idempotent."""
        if self._look:
            self._look[1].cancel()
            await asyncio.gather(self._look[1], return_exceptions=True)

    async def _gather(self) -> Facts:
        at, source, engine = self._clock(), self._source, self._engine
        status, services, backends = await source.look()
        # From here on nothing is waited for, so that these are of one moment.
        rounds, workers = engine.rounds(), engine.statistics()["workers"]
        return Facts(
            at,
            status,
            services,
            backends,
            source.events()[-EVENTS:],
            dict(zip(rounds, workers, strict=True)),
            rounds,
            engine.config.flows,
            engine.published,
            self._reload,
        )
