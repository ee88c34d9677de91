"""An engine and the tasks round it: started in their order, told of changes, ended in the opposite order."""

from __future__ import annotations

from collections.abc import Callable

from crablb.control.advice import Adviser
from crablb.control.announce import Announcer
from crablb.control.keeping import remove_later
from crablb.control.reports import Reports
from crablb.dataplane.engine import Engine
from crablb.dataplane.events import Event, Notice
from crablb.model import Address, Announce, Config

__all__ = ["Supervisor"]


class Supervisor:
    """All that ``crablb serve`` and :class:`crablb.LoadBalancer` run.

    Made, started and closed as an :class:`Engine` is.  ``listeners`` are called with each :class:`Event` of the engine
    and of the tasks.
    """

    def __init__(self, config: Config, seed: bytes, *, threads: bool = True) -> None:
        self.engine = Engine(config, seed, threads=threads)
        self.listeners: list[Callable[[Event], None]] = []
        self.engine.listeners += [Adviser(self.engine).hear, self._tell]
        self._announcers: list[Announcer] = []
        self._reports: Reports | None = None

    async def start(self) -> None:
        """See :meth:`Engine.start`.  Raises :class:`KernelError` also if reports cannot be taken where they should."""
        try:
            await self._start()
        except BaseException:
            await self.close()
            raise

    async def _start(self) -> None:
        config = self.engine.config
        if config.report_listen and config.report_key:
            self._reports = Reports(self.engine, config.report_key)
            self._reports.follow(config.services)
            await self._reports.start(*config.report_listen)
        await self.engine.start()
        if config.announce is Announce.ARP:
            ours = {interface.mac for interface in self.engine.interfaces}
            for interface in self.engine.interfaces:
                announcer = Announcer(interface.name, ours, self._vip_in_use)
                self._announcers.append(announcer)
                announcer.start(service.vip.address for service in config.services)

    async def close(self) -> None:
        """Leave nothing in the kernel, or for ``keep`` seconds.  Idempotent."""
        for announcer in self._announcers:
            await announcer.close()
        self._announcers.clear()
        if self._reports:
            self._reports.close()
            self._reports = None
        if kept := await self.engine.close():
            remove_later(kept, self.engine.config.keep)

    def apply(self, config: Config) -> None:
        """See :meth:`Engine.apply`."""
        self.engine.apply(config)
        for announcer in self._announcers:
            announcer.follow(service.vip.address for service in config.services)
        if self._reports:
            self._reports.follow(config.services)

    def _tell(self, notice: Notice) -> None:
        if isinstance(notice, Event):
            for listener in self.listeners:
                listener(notice)

    def _vip_in_use(self, address: Address, mac: bytes) -> None:
        self.engine.count("vips_in_use")
        for service in self.engine.config.services:
            if service.vip.address == address:
                self._tell(Event("vip-in-use", vip=service.vip, reason=f"{mac.hex(':')} has it"))
