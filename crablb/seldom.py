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
    """Whether a line of a kind is due: ``burst`` of them in ``interval`` seconds."""

    def __init__(self, interval: float = INTERVAL, burst: int = 1) -> None:
        self._interval, self._burst = interval, burst
        # When the interval began, lines since, and what came and was not written.
        self._kinds: dict[Hashable, tuple[float, int, int]] = {}
        self._tidied = -interval

    def due(self, kind: Hashable, now: float | None = None) -> int:
        """0 if it is not; otherwise how many there were since the last line, this one among them."""
        now = time.monotonic() if now is None else now
        if kind not in self._kinds and len(self._kinds) >= KINDS:
            if now - self._tidied >= self._interval:
                self._tidied = now
                self._kinds = {k: v for k, v in self._kinds.items() if v[2] or now - v[0] < self._interval}
            if len(self._kinds) >= KINDS:
                kind = None
        began, lines, left_out = self._kinds.get(kind, (now, 0, 0))
        if now - began >= self._interval:
            began, lines = now, 0
        if lines >= self._burst:
            self._kinds[kind] = began, lines, left_out + 1
            return 0
        self._kinds[kind] = began, lines + 1, 0
        return left_out + 1
