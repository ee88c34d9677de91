"""An engine and the tasks round it: started in their order, told of changes, ended in the opposite order."""

from __future__ import annotations

from collections.abc import Callable

from crablb.control.advice import Adviser
from crablb.control.announce import Announcer
from crablb.control.reports import Reports
from crablb.dataplane.engine import Engine
from crablb.dataplane.events import Event, Notice
from crablb.errors import ConfigError
from crablb.kernel import rtnetlink
from crablb.kernel.rtnetlink import Netlink
from crablb.model import Address, Announce, Config

__all__ = ["Supervisor"]


def _check_own(config: Config) -> None:
    """Raises :class:`ConfigError` for VIPs that this machine itself is reached by, unless that is allowed."""
    if config.allow_own_address:
        return
    with Netlink() as netlink:
        own = rtnetlink.reached_by(netlink)
    problems = [
        f"{service.vip}: {service.vip.address} is this machine's own address: nobody would reach its port"
        f" {service.vip.port} any more; take an address beside it for the VIP, or say that it is meant:"
        " --allow-own-address (allow_own_address = true)"
        for service in config.services
        if str(service.vip.address) in own
    ]
    if problems:
        raise ConfigError(problems)


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
        """See :meth:`Engine.start`.  Raises :class:`KernelError` also if reports cannot be taken where they should, and
        :class:`ConfigError` for VIPs that are the machine's own addresses."""
        try:
            await self._start()
        except BaseException:
            await self.close()
            raise

    async def _start(self) -> None:
        config = self.engine.config
        _check_own(config)
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
        """Leave nothing in the kernel.  Idempotent."""
        for announcer in self._announcers:
            await announcer.close()
        self._announcers.clear()
        if self._reports:
            self._reports.close()
            self._reports = None
        await self.engine.close()

    def apply(self, config: Config) -> None:
        """See :meth:`Engine.apply`.  Raises :class:`ConfigError` also for VIPs that are the machine's own addresses."""
        _check_own(config)
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
