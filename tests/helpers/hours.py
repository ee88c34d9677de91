"""An event loop whose time passes as fast as nothing happens: hours are milliseconds, and no clock decides."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _Selector(selectors.EpollSelector):
    """Instead of waiting, time passes."""

    def __init__(self, loop: Loop) -> None:
        super().__init__()
        self._clock = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready and timeout:
            self._clock.passed += timeout
        return ready


class Loop(asyncio.SelectorEventLoop):
    """``time()`` begins at 1,000,000 s."""

    def __init__(self) -> None:
        self.passed = 0.0
        super().__init__(_Selector(self))

    def time(self) -> float:
        return 1_000_000 + self.passed


def hours(main: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=Loop) as runner:
        return runner.run(main)
