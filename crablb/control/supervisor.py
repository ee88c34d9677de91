"""An engine and the tasks round it: started in their order, told of changes, ended in the opposite order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from crablb.control.advice import Adviser
from crablb.control.announce import Announcer
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
        self._announcers: dict[str, Announcer] = {}  # by interface
        self._ending: set[asyncio.Task[None]] = set()  # of announcers
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
        for interface in self.engine.interfaces:
            self._announce(interface.name)

    async def close(self) -> None:
        """Leave nothing in the kernel.  Idempotent."""
        await asyncio.gather(*self._ending, *(announcer.close() for announcer in self._announcers.values()))
        self._announcers.clear()
        if self._reports:
            self._reports.close()
            self._reports = None
        await self.engine.close()

    def apply(self, config: Config) -> None:
        """See :meth:`Engine.apply`."""
        self.engine.apply(config)
        for announcer in self._announcers.values():
            announcer.follow(service.vip.address for service in config.services)
        if self._reports:
            self._reports.follow(config.services)

    def _announce(self, interface: str) -> None:
        """Answer for the VIPs on an interface; also on one that has come back or was renamed: sockets do not follow."""
        if self.engine.config.announce is not Announce.ARP:
            return
        names = {interface.name for interface in self.engine.interfaces}
        for name in self._announcers.keys() - (names - {interface}):
            task = asyncio.ensure_future(self._announcers.pop(name).close())
            self._ending.add(task)
            task.add_done_callback(self._ending.discard)
        ours = {interface.mac for interface in self.engine.interfaces}
        announcer = self._announcers[interface] = Announcer(interface, ours, self._vip_in_use)
        announcer.start(service.vip.address for service in self.engine.config.services)

    def _tell(self, notice: Notice) -> None:
        if isinstance(notice, Event):
            if notice.kind in ("interface-back", "interface-renamed"):
                self._announce(notice.interface)
            for listener in self.listeners:
                listener(notice)

    def _vip_in_use(self, address: Address, mac: bytes) -> None:
        self.engine.count("vips_in_use")
        for service in self.engine.config.services:
            if service.vip.address == address:
                self._tell(Event("vip-in-use", vip=service.vip, reason=f"{mac.hex(':')} has it"))
