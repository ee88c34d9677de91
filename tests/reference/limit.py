"""What SYNs a service with ``syn_rate`` takes, from docs/configuration.md: a bucket of tokens, counted one by one.

Written apart from bpf/, which tells tokens by the time at which the bucket is full.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction

SECOND = 1_000_000_000


@dataclass
class Bucket:
    """``rate`` tokens a second (one comes in a whole number of nanoseconds), up to a tenth of a second's, 16 at least.

    It is full at first.
    """

    rate: int
    room: int = field(init=False)
    held: Fraction = field(init=False)
    at: int = 0  # nanoseconds

    def __post_init__(self) -> None:
        self.room = max(self.rate // 10, 16)
        self.held = Fraction(self.room)

    def take(self, now: int) -> bool:
        """Whether there is one at this time, which is then taken."""
        self.held = min(Fraction(self.room), self.held + Fraction(now - self.at, SECOND // self.rate))
        self.at = now
        if self.held < 1:
            return False
        self.held -= 1
        return True
