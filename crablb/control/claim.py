"""Who answers for an address of a segment: the rule, without a socket or a clock.

After RFC 5227, for ARP and, as the questions and claims are the same, for neighbour discovery (RFC 4862, 5.4):

- An address is probed before it is answered for, and announced twice (2.1, 2.3).  If somebody else claims it, or probes
  for it and has the lower MAC address, it is left to him, and probed again a little later: he may be gone, or the claim
  was forged.
- An address that is held is asked after now and then, as two that were parted do not hear each other's answers to
  others.  Whoever claims it is answered by an announcement, once in :data:`DEFEND_INTERVAL` (2.4), and asked.  Only if
  he answers question after question and has the lower MAC address, the address is left to him: of two load balancers
  that both hold it one stays, and forged claims take nothing, be they few or a flood.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from enum import Enum

__all__ = ["Act", "Claim", "State"]

PROBES = 3
PROBE_INTERVAL = 0.2  # seconds, as the others
ANNOUNCE_INTERVAL = 2.0
DEFEND_INTERVAL = 10.0
#: Between questions after an address that is held.
ASK_INTERVAL = 3.0
#: Before an address is probed again that somebody else has; at random, as others may wait for it too.
RETRY = 2.0, 4.0
#: Claims after one question that are an answer; more are a flood, and whoever sends it has not the address for that.
ANSWER = 20


class State(Enum):
    PROBING = "probing"
    HELD = "held"
    IN_USE = "in-use"  # by somebody else


class Act(Enum):
    """What is to be done, or said."""

    PROBE = "probe"
    ANNOUNCE = "announce"
    TAKEN = "taken"  # to be announced as well
    IN_USE = "in-use"
    DEFENDED = "defended"  # to be announced as well
    YIELDED = "yielded"


class Claim:
    """One address on one interface.  Times are in seconds, of whatever clock.

    :meth:`step` is to be called at :attr:`due`, :meth:`heard` with what others say.
    """

    def __init__(self, now: float, choose: Callable[[float, float], float] = random.uniform) -> None:
        self._choose = choose
        self.holder = b""  # the MAC address of who else has it, or had
        self.left_to = b""  # whose it is while this one waits for it, also while it is probed again
        self.claims = 0  # of others, that were heard; whoever tells of them begins to count anew
        self.ask_interval = ASK_INTERVAL
        # Of an address that is held:
        self._owed = 0  # announcements
        self._announce_at = self._defend_at = 0.0  # not earlier
        self._asked = self._ask_at = 0.0
        self._rival = b""  # who claimed it after the last question, or before the first one
        self._answers = 0  # questions that he answered, one after the other
        self._said = 0  # his claims since the last question
        self._contested = False  # somebody claimed it, and perhaps others believe him still
        self.begin(now)

    def begin(self, now: float) -> None:
        """Probe from the start: nothing is known of the segment, as after its link was down (RFC 5227, 2.1)."""
        self.left_to = b""
        self._begin(now)

    def _begin(self, now: float) -> None:
        self.state = State.PROBING
        self.due = now
        self._left = PROBES

    def inherit(self, now: float) -> None:
        """It is held already, by another process of this host that this one goes on for: nobody is left unanswered."""
        self._hold(now, announced=True)

    def move(self, now: float) -> None:
        """The MAC address is another one: announce an address that is held."""
        if self.state is State.HELD:
            self._hold(now, announced=False)

    def step(self, now: float, mac: bytes) -> Act | None:
        """What is due now; ``mac``: of the interface."""
        if self.state is State.IN_USE:
            self._begin(now)
        if self.state is State.PROBING:
            return self._probe(now)
        if self._owed and now >= self._announce_at:
            self._owed -= 1
            self._announce_at = now + ANNOUNCE_INTERVAL
            self._plan()
            return Act.ANNOUNCE
        if now < self._ask_at:
            return None
        return self._ask(now, mac)

    def heard(self, now: float, other: bytes, mac: bytes, *, probe: bool) -> Act | None:
        """``other``, a MAC address, claims the address, or probes for it."""
        if self.state is State.PROBING:
            if probe and other > mac:
                return None
            self.claims += 1
            return self._leave(now, other, Act.IN_USE)
        if probe:
            return None
        self.claims += 1
        if self.state is State.IN_USE:
            self.holder = self.left_to = other
            return None
        if not self._answers and other != self._rival:
            self._rival, self._said = other, 0
        self._said += other == self._rival
        self._ask_at = min(self._ask_at, self._asked + PROBE_INTERVAL)
        self._plan()
        if now < self._defend_at:
            return None
        self.holder = other
        self._defend_at = now + DEFEND_INTERVAL
        self._announce_at = now + ANNOUNCE_INTERVAL
        return Act.DEFENDED

    def _plan(self) -> None:
        self.due = min(self._ask_at, self._announce_at) if self._owed else self._ask_at

    def _probe(self, now: float) -> Act:
        self.due = now + PROBE_INTERVAL
        if self._left:
            self._left -= 1
            return Act.PROBE
        self.holder = self.left_to = b""
        self._hold(now, announced=True)
        return Act.TAKEN

    def _hold(self, now: float, *, announced: bool) -> None:
        self.state = State.HELD
        self._owed = 1 if announced else 2
        self._announce_at = now + (ANNOUNCE_INTERVAL if announced else 0)
        self._defend_at = now
        self._asked = now
        self._ask_at = now + self.ask_interval
        self._rival, self._answers, self._said = b"", 0, 0
        self._contested = False
        self._plan()

    def _leave(self, now: float, other: bytes, act: Act) -> Act:
        self.state, self.holder, self.left_to = State.IN_USE, other, other
        self.due = now + self._choose(*RETRY)
        return act

    def _ask(self, now: float, mac: bytes) -> Act:
        """Ask after an address that is held.  The first answer may have been a claim that nobody asked for."""
        if self._said:
            self._contested = True
        elif self._contested:  # he is silent now: the last word is ours
            self._contested = False
            self._owed = max(self._owed, 1)
        self._answers = self._answers + 1 if 0 < self._said <= ANSWER else 0
        if self._answers > PROBES:
            if self._rival < mac:
                return self._leave(now, self._rival, Act.YIELDED)
            self._answers = 0
        if not self._answers:
            self._rival = b""
        self._said = 0
        self._asked = now
        self._ask_at = now + (PROBE_INTERVAL if self._answers else self.ask_interval)
        self._plan()
        return Act.PROBE
