"""What programs and people come in by, beside the signals: the API, metrics, and the status page at both."""

from __future__ import annotations

import asyncio

from crablb.control.admin import Admin
from crablb.control.estate import Door, Heir
from crablb.control.metrics import Metrics
from crablb.control.metrics.facts import Gatherer
from crablb.control.operator import Operator
from crablb.control.supervisor import Supervisor

__all__ = ["Doors"]


class Doors:
    """Those that the configuration has.  The operator is theirs from now on.

    Raises :class:`ConfigError` for what is wrong with their settings, :class:`KernelError` for an address that cannot
    be bound.
    """

    def __init__(self, operator: Operator, supervisor: Supervisor, heir: Heir | None = None) -> None:
        """``heir``: what there is of another process, in whose place this one serves."""
        engine = supervisor.engine
        self._gatherer = Gatherer(operator, engine)
        self.admin = Admin(operator, engine.config, self._gatherer, heir)
        try:
            self.metrics = Metrics(self._gatherer, engine.config, heir)
        except BaseException:
            self.admin.abandon()
            raise
        supervisor.listeners.append(self._gatherer.hear)

    def start(self) -> None:
        """Open them, soon: what is imported for it takes its time."""
        self.admin.start()
        self.metrics.start()

    def offer(self) -> dict[Door, int]:
        """The open sockets, for a successor; they stay these doors' own."""
        return {**self.admin.offer(), **self.metrics.offer()}

    async def leave(self) -> None:
        """In place of :meth:`close`, when a successor has them: answer who has asked already."""
        await asyncio.gather(self.metrics.leave(), self.admin.leave())
        await self._gatherer.close()

    async def close(self) -> None:
        """Idempotent."""
        await self.metrics.close()
        await self.admin.close()
        await self._gatherer.close()

    def abandon(self) -> None:
        """Leave no socket behind, where there is no event loop any more to :meth:`close` in."""
        self.metrics.abandon()
        self.admin.abandon()
