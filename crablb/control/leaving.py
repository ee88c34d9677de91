"""Draining the load balancer itself: open connections leave it, as far as their servers and clients can.

Redirected connections are not here.  Those by the fallback that are MPTCP ones can be led to their servers' own
addresses by these, who are told by the reports' channel (:mod:`.selection.reports`) for as long as it goes on.
"""

from __future__ import annotations

import structlog

from crablb.api import types
from crablb.control.supervisor import Supervisor
from crablb.errors import ConfigError
from crablb.model import Address, Announce, Vip

__all__ = ["Leaving"]

log = structlog.get_logger()

#: Why a backend's flows stay.
SILENT = "its server does not report by this address"
UNABLE = "its server does not lead MPTCP clients away (crablb agent server --mptcp)"
OTHERS = "TCP, or MPTCP clients that could not be led away"


class Leaving:
    """Of a supervisor's load balancer; in its event loop, between its start and its end."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor, self._engine = supervisor, supervisor.engine
        self._draining = False
        self._first = 0  # open flows when it last began

    def __bool__(self) -> bool:
        return self._draining

    def export(self) -> tuple[bool, int]:
        """For :meth:`adopt`."""
        return self._draining, self._first

    def adopt(self, draining: bool, first: int) -> None:
        """As another process had it that this one goes on for; VIPs are withdrawn, or not, already."""
        self._draining, self._first = draining, first
        self._supervisor.lead_away(draining, withdraw=self._supervisor.withdrawn)

    async def change(self, what: types.DrainLb, by: str) -> types.Drained:
        """Tell the servers from now on, or no more.  Raises :class:`ConfigError`."""
        if what.cancel and what.withdraw:
            raise ConfigError("cancel and withdraw exclude each other")
        if what.withdraw and self._engine.config.announce is not Announce.ARP:
            raise ConfigError(
                'withdraw: the VIPs are not announced from here (announce = "arp"): whoever sends them here is to stop'
            )
        flows = sum((await self._open()).values())
        if self and what.cancel:
            log.info("the load balancer is not drained any more", by=by)
        elif not (self or what.cancel):
            log.info("the load balancer is being drained", flows=flows, by=by)
            self._first = flows
        self._draining = not what.cancel
        withdrawn = not what.cancel and (what.withdraw or self._supervisor.withdrawn)
        self._supervisor.lead_away(bool(self), withdraw=withdrawn)
        return await self.tell()

    async def tell(self) -> types.Drained:
        """How far it has come."""
        found = sorted((await self._open()).items(), key=str)
        left = [
            types.Left(service=str(vip or ""), backend=str(backend), flows=n, reason=self._why(vip, backend))
            for (vip, backend), n in found
            if n
        ]
        return types.Drained(
            draining=bool(self),
            withdrawn=self._supervisor.withdrawn,
            told=self._supervisor.takes_reports,
            first=self._first,
            flows=sum(each.flows for each in left),
            left=left,
        )

    async def _open(self) -> dict[tuple[Vip | None, Address], int]:
        """Open flows; of a server that says how many it has so itself no more than these.  A subflow that a server ends
        by RST ends without us."""
        found = {}
        for (vip, backend), n in (await self._engine.open_flows()).items():
            most = self._supervisor.at_vip((vip, backend)) if vip else None
            found[vip, backend] = n if most is None else min(n, most)
        return found

    def _why(self, vip: Vip | None, backend: Address) -> str:
        if not self._supervisor.takes_reports or not self._engine.reports(backend):
            return SILENT
        leads = any(address == backend and vip in (None, served) for served, address in self._supervisor.leading)
        return OTHERS if leads else UNABLE
