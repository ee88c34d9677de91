"""Which backends get redirected SYNs and complete none of them: what their servers report, and when to try again.

A server that answers a redirected SYN and never hears from the client knows what the load balancer does not: something
between the two does not let redirects through.  Its clients pay for each of them with a retransmission, so it gets the
fallback alone for a while.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import Literal, Self

from crablb.model import Address, Service, Vip

__all__ = ["Completions", "Verdict"]

#: So many redirects begun, for so long (seconds: a handshake may lose a packet), and none completed: of a backend that
#: was sound, and of one on trial.
SEVERAL, PATIENCE = 5, 3.0
SEVERAL_ON_TRIAL, PATIENCE_ON_TRIAL = 2, 1.0
#: Seconds without redirects: the first time, and at most.
BACK_OFF, BACK_OFF_MOST = 10.0, 600.0

Pair = tuple[Vip, Address]
Verdict = Literal["stopped", "resumed"]


@dataclass(slots=True)
class _Backend:
    begun: int  # as reported last
    completed: int
    waiting: int = 0  # begun since the last that was completed
    since: float = 0.0  # when the first of those was reported
    back_off: float = 0.0  # how long redirects were stopped last; 0: they work
    until: float | None = None  # when they are tried again; None: they are being tried

    @classmethod
    def read(cls, begun: str, completed: str, waiting: str, since: str, back_off: str, until: str) -> Self:
        """From texts."""
        again = None if until == "None" else float(until)
        return cls(int(begun), int(completed), int(waiting), float(since), float(back_off), again)


class Completions:
    """What is known of each service's backends.  Times are seconds of one monotonic clock."""

    def __init__(self) -> None:
        self._known: dict[Pair, _Backend] = {}

    def report(self, vip: Vip, backend: Address, begun: int, completed: int, at: float) -> Verdict | None:
        """A server's report: redirects begun and completed, modulo 2^32.  What follows for redirecting, if anything."""
        known = self._known.get((vip, backend))
        if known is None or _less(begun, known.begun) or _less(completed, known.completed):  # it counts anew
            fresh = self._known[vip, backend] = _Backend(begun, completed)
            if known:
                fresh.back_off, fresh.until = known.back_off, known.until
            return None
        new, done = (begun - known.begun) % 2**32, (completed - known.completed) % 2**32
        known.begun, known.completed = begun, completed
        if done:
            recovered = known.back_off > 0
            known.waiting, known.back_off, known.until = 0, 0.0, None
            return "resumed" if recovered else None
        if new and not known.waiting:
            known.since = at
        known.waiting += new
        trial = known.back_off > 0
        several, patience = (SEVERAL_ON_TRIAL, PATIENCE_ON_TRIAL) if trial else (SEVERAL, PATIENCE)
        if known.until is not None or known.waiting < several or at - known.since < patience:
            return None
        known.back_off = min(2 * known.back_off, BACK_OFF_MOST) if trial else BACK_OFF
        known.until = at + known.back_off
        return "stopped"

    def back_off(self, vip: Vip, backend: Address) -> float:
        """For how many seconds redirecting is stopped, or was last; 0: it works."""
        known = self._known.get((vip, backend))
        return known.back_off if known else 0.0

    def stopped(self) -> frozenset[Pair]:
        """Who is not to be redirected to, since :meth:`report` said so and until :meth:`retry` says otherwise."""
        return frozenset(pair for pair, known in self._known.items() if known.until is not None)

    def retry(self, at: float) -> bool:
        """Try again with those whose time has come; whether there are any."""
        due = [known for known in self._known.values() if known.until is not None and known.until <= at]
        for known in due:
            known.until, known.waiting = None, 0
        return bool(due)

    def export(self) -> list[tuple[str, ...]]:
        """As texts, for :meth:`adopt` in another process of this machine, whose monotonic clock is the same."""
        return [(str(vip), str(address), *map(str, astuple(known))) for (vip, address), known in self._known.items()]

    def adopt(self, known: Iterable[Sequence[str]], services: Iterable[Service]) -> None:
        """Go on with what another process knew of these services' backends.  Raises ``ValueError``, ``TypeError``."""
        pairs = {(str(s.vip), str(b.address)): (s.vip, b.address) for s in services for b in s.backends}
        made = {(vip, address): _Backend.read(*fields) for vip, address, *fields in known}
        self._known |= {pairs[pair]: backend for pair, backend in made.items() if pair in pairs}

    def forget(self, services: Iterable[Service]) -> None:
        """Keep what these services need only."""
        pairs = {(service.vip, b.address) for service in services for b in service.backends}
        self._known = {pair: known for pair, known in self._known.items() if pair in pairs}


def _less(now: int, before: int) -> bool:
    """Whether a counter modulo 2^32 has gone back."""
    return (now - before) % 2**32 >= 2**31
