"""An engine and the tasks round it: started in their order, told of changes, ended in the opposite order."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from crablb.control.advice import Adviser
from crablb.control.announce import Announcer
from crablb.control.claim import Act
from crablb.control.keeping import remove_later
from crablb.control.reports import Reports
from crablb.dataplane.engine import Engine
from crablb.dataplane.events import Event, LinksChanged, Notice
from crablb.errors import KernelError
from crablb.kernel.netlink import Link
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
            for interface in self.engine.interfaces:
                announcer = Announcer(interface.name, self._vip_befell, self.engine.task)
                self._announcers.append(announcer)
                try:
                    announcer.start(service.vip.address for service in config.services)
                except OSError as error:
                    reason = f"cannot announce VIPs on {interface.name}: {error.strerror}"
                    raise KernelError(reason) from None
            self._links_are(self.engine.links)

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
        elif isinstance(notice, LinksChanged):
            self._links_are(notice.links)

    def _links_are(self, links: Mapping[int, Link]) -> None:
        served = [links[i.index] for i in self.engine.interfaces if i.index in links] if self._announcers else []
        for announcer, interface in zip(self._announcers, self.engine.interfaces, strict=False):
            if interface.index in links:
                announcer.link_is(links[interface.index], {link.mac for link in served})

    def _vip_befell(self, address: Address, act: Act, mac: bytes) -> None:
        """What became of a VIP that is announced; ``mac``: who else has it, or had."""
        if act is Act.TAKEN:
            kind, counter, reason = "vip-taken", "vips_taken", ""
        elif act is Act.YIELDED:
            kind, counter, reason = "vip-yielded", "vips_yielded", f"left to {mac.hex(':')}"
        else:
            kind, counter, reason = "vip-in-use", "vips_in_use", f"{mac.hex(':')} has it"
        self.engine.count(counter)
        for service in self.engine.config.services:
            if service.vip.address == address:
                self._tell(Event(kind, vip=service.vip, reason=reason))
