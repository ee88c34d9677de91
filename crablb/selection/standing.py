"""From what an operator says of backends, and what was found out about them, to how they are served.

Functions of their arguments: no clock, no I/O.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from crablb.model import Address, Backend, Service, State, Vip

__all__ = ["Pair", "Standing", "Verdict", "judge"]

#: A service and a backend of it.
Pair = tuple[Vip, Address]


@dataclass(frozen=True, slots=True)
class Standing:
    """What checks found out about a backend of a service."""

    healthy: bool = True
    cr: bool = True  # it echoes redirects
    known: bool = True  # else nothing was found out yet
    percent: int = 100  # of its weight (selection.loads.Balance); 0: nothing new, as by "drain"


@dataclass(frozen=True, slots=True)
class Verdict:
    """A service as it is served."""

    service: Service  # its backends with the state and cr that they have for now
    panic: bool  # health is disregarded
    healthy: int  # weight of the primaries that are healthy
    weight: int  # of the primaries that the operator has up
    backups: bool  # they serve


_UNKNOWN = Standing()


def judge(service: Service, standings: Mapping[Pair, Standing]) -> Verdict:
    """What becomes of a service.  Of pairs that ``standings`` does not name all is well.

    With less than ``panic`` percent of the weight healthy, all that the operator has up serve; of whom nothing was
    found out yet may be.  Backups serve while no primary is healthy, before it comes to that.
    """

    found = {id(b): standings.get((service.vip, b.address), _UNKNOWN) for b in service.backends} if standings else {}

    def of(backend: Backend) -> Standing:
        return found.get(id(backend), _UNKNOWN)

    # What its agent drains is out by somebody's word, as what the operator does.
    up = [b for b in service.backends if b.share and of(b).percent]
    primaries = [b for b in up if not b.backup] or up
    weight = sum(b.share for b in primaries)
    healthy = sum(b.share for b in primaries if of(b).healthy)
    spare = [b for b in up if b.backup and of(b).healthy]
    backups = not healthy and bool(spare) and any(not b.backup for b in service.backends)
    perhaps = healthy + sum(b.share for b in primaries if not of(b).healthy and not of(b).known)
    panic = not backups and perhaps * 100 < service.panic * weight
    serving = {b.address for b in (spare if backups else primaries) if panic or of(b).healthy}

    def served(backend: Backend) -> Backend:
        standing = of(backend)
        cr = backend.cr and standing.cr
        state = backend.state
        if backend.share and (backend.address not in serving or not (standing.percent or panic)):
            state = State.DRAIN
        return backend if (state, cr) == (backend.state, backend.cr) else replace(backend, state=state, cr=cr)

    backends = tuple(map(served, service.backends))
    same = all(new is old for new, old in zip(backends, service.backends, strict=True))
    relied = any(b.backup and b.address in serving for b in up) and any(not b.backup for b in service.backends)
    return Verdict(service if same else replace(service, backends=backends), panic, healthy, weight, relied)
