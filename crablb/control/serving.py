"""Whether a backend gets new connections, and why: what the operator says, what was found out, and the way to it."""

from __future__ import annotations

from crablb.kernel.netlink import HopState, NextHop
from crablb.model import Backend, Service, State
from crablb.selection.standing import Standing, Verdict

__all__ = ["BACKUP", "UNCHECKED", "UNKNOWN_WAY", "serves"]

#: Why a backup does not serve: that is no fault.
BACKUP = "backup"
#: Neither are checks that have not ended yet; until then a backend is what `initially` says.
UNCHECKED = "not checked yet"
UNKNOWN_WAY = "the way to it is not known yet"


def serves(
    service: Service, backend: Backend, verdict: Verdict, standing: Standing, hop: NextHop | None, found: str
) -> tuple[bool, str]:
    """Whether a backend gets new connections; why not, or why although.

    ``service``, ``backend``: as the operator has them; ``found``: why it is not healthy, as checks found out.
    """
    if backend.state is not State.UP:
        return False, backend.state.value
    if not backend.weight:
        return False, "weight 0"
    if hop is None or hop.state is not HopState.RESOLVED:
        return False, (hop.reason if hop else "") or UNKNOWN_WAY
    spare = backend.backup and not verdict.backups and any(b.share and not b.backup for b in service.backends)
    if verdict.panic and standing.percent and not spare:
        return True, "" if standing.healthy else f"panic: health is disregarded, {found or UNCHECKED}"
    if not standing.healthy:
        return False, found or UNCHECKED
    if not standing.percent:
        return False, found or "its agent-check wants no new connections"
    return (False, BACKUP) if spare else (True, "")
