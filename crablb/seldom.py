"""Log lines that others could have us write without end: of each kind one in a while, with how many there were."""

from __future__ import annotations

import time
from collections.abc import Hashable

__all__ = ["INTERVAL", "Seldom"]

#: Seconds between lines of one kind.
INTERVAL = 10.0
#: Kinds that are told apart; those beyond are one.
KINDS = 1000


class Seldom:
    """Whether a line of a kind is due."""

    def __init__(self, interval: float = INTERVAL) -> None:
        self._interval = interval
        self._kinds: dict[Hashable, tuple[float, int]] = {}  # when the last was written, how many came since
        self._tidied = -interval

    def due(self, kind: Hashable, now: float | None = None) -> int:
        """0 if it is not; otherwise how many there were since the last line, this one among them."""
        now = time.monotonic() if now is None else now
        if kind not in self._kinds and len(self._kinds) >= KINDS:
            if now - self._tidied >= self._interval:
                self._tidied = now
                self._kinds = {k: v for k, v in self._kinds.items() if v[1] or now - v[0] < self._interval}
            if len(self._kinds) >= KINDS:
                kind = None
        at, count = self._kinds.get(kind, (None, 0))
        if at is not None and now - at < self._interval:
            self._kinds[kind] = at, count + 1
            return 0
        self._kinds[kind] = now, 0
        return count + 1
