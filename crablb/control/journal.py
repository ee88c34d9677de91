"""The last events of a load balancer, numbered, for whoever reads them as they come."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from typing import Any

import msgspec

from crablb.api import types
from crablb.dataplane.events import Event
from crablb.values import counted

__all__ = ["KEPT", "Journal"]

#: Events that are kept for those who come late, or read slowly.
KEPT = 1000


class Journal:
    """Readers have no queue of their own: whoever falls behind by more than is kept is told how much was missed."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._events: deque[types.Event] = deque(maxlen=KEPT)
        self._last = 0
        self._came = asyncio.Event()

    def add(self, event: Event) -> None:
        self._last += 1
        told = types.Event(
            number=self._last,
            at=self._clock(),
            kind=event.kind,
            service=str(event.vip) if event.vip else "",
            backend=str(event.backend) if event.backend else "",
            interface=event.interface,
            reason=event.reason,
        )
        self._events.append(told)
        came, self._came = self._came, asyncio.Event()
        came.set()

    def export(self) -> tuple[int, list[dict[str, Any]]]:
        """The last number, and the events that are kept, as plain values for :meth:`adopt`."""
        return self._last, [msgspec.to_builtins(event) for event in self._events]

    def adopt(self, last: int, events: list[dict[str, Any]]) -> None:
        """What another journal :meth:`export`-ed goes before what is here, whose numbers go on from there.

        Raises :class:`msgspec.ValidationError`, and changes nothing, if it is nothing of the kind.
        """
        before = msgspec.convert(events, list[types.Event])
        own = [msgspec.structs.replace(event, number=last + event.number) for event in self._events]
        self._events.clear()
        self._events.extend([*before, *own])
        self._last += last

    @property
    def last(self) -> int:
        """The number of the last event; 0: there was none."""
        return self._last

    def since(self, number: int) -> list[types.Event]:
        """Those after this number; if some of them are gone, an event ``missed`` first that says how many.

        A number that there was none of yet is one of a daemon before: everything came after it.
        """
        if not 0 <= number <= self._last:
            number = 0
        events = [event for event in self._events if event.number > number]
        lost = self._last - number - len(events)
        if lost:
            first = types.Event(
                number=number + lost,
                at=self._clock(),
                kind="missed",
                service="",
                backend="",
                interface="",
                reason=f"{counted(lost, 'event')} before this, not kept any more",
            )
            events.insert(0, first)
        return events

    async def follow(self, number: int, pause: float) -> AsyncGenerator[list[types.Event], None]:
        """Those after this number, and then as they come; an empty list after ``pause`` seconds without any."""
        while True:
            came = self._came
            if events := self.since(number):
                number = events[-1].number
                yield events
                continue
            try:
                async with asyncio.timeout(pause):
                    await came.wait()
            except TimeoutError:
                yield []
