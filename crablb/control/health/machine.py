"""What is thought of a backend by one of its checks: a value, and a function from it and a result to the next one.

No clock, no I/O: when a check is due, the schedule knows (:mod:`.health`).
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Thought", "think"]


class Thought(NamedTuple):
    """What is thought, and the results that speak for it or against it."""

    up: bool
    known: bool = False  # a result said so; else it is what was to be thought at the start
    ok: bool | None = None  # the last result that told something; None: there was none
    streak: int = 0  # results like it, in a row

    @property
    def moving(self) -> bool:
        """The last result differs from what is thought: it is looked at more often."""
        return self.ok is not None and self.ok is not self.up


def think(before: Thought, ok: bool | None, fall: int, rise: int) -> Thought:
    """What is thought after a result; ``ok`` None: the check could not be tried, which tells nothing.

    ``fall`` failures in a row make it down, ``rise`` successes in a row up.  A result that agrees with what was
    thought at the start confirms it at once.
    """
    if ok is None:
        return before
    streak = before.streak + 1 if ok is before.ok else 1
    up = ok if streak >= (rise if ok else fall) else before.up
    return Thought(up, before.known or ok is up, ok, streak)
