"""An engine and the tasks round it: started in their order, told of changes, ended in the opposite order."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterator, Mapping

import structlog

from crablb.control.advice import Adviser
from crablb.control.announce import Announcer
from crablb.control.claim import Act
from crablb.control.health.health import Health
from crablb.control.keeping import remove_later
from crablb.control.reports import Reports
from crablb.dataplane.engine import Engine
from crablb.dataplane.events import Event, LinksChanged, Notice
from crablb.errors import ConfigError, KernelError
from crablb.kernel import rtnetlink
from crablb.kernel.netlink import Link
from crablb.kernel.rtnetlink import Netlink
from crablb.model import Address, Announce, Config

__all__ = ["Supervisor", "check"]

log = structlog.get_logger()


def _own_addresses(config: Config) -> Iterator[str]:
    """What is wrong with VIPs that this machine itself is reached by, unless that is allowed."""
    if config.allow_own_address:
        return
    with Netlink() as netlink:
        own = rtnetlink.reached_by(netlink)
    for service in config.services:
        if str(service.vip.address) in own:
            yield (
                f"{service.vip}: {service.vip.address} is this machine's own address: nobody would reach its port"
                f" {service.vip.port} any more; take an address beside it for the VIP, or say that it is meant:"
                " --allow-own-address (allow_own_address = true)"
            )


def check(config: Config) -> None:
    """Raises :class:`ConfigError` for what would harm this machine, or cannot be done by this user."""
    problems = list(_own_addresses(config))
    if config.keep and os.geteuid() != 0:
        problems.append("keep: a process of its own removes what is kept, as root; leave keep out, or run as root")
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
        self._adviser = Adviser(self.engine)
        self.engine.listeners += [self._adviser.hear, self._tell]
        self.health = Health(self.engine, self._judged)
        self._announcers: dict[tuple[str, int], Announcer] = {}  # by an interface's name and index
        self._announcing = False
        self._ending: set[asyncio.Task[None]] = set()  # of announcers
        self._reports: Reports | None = None

    async def start(self) -> None:
        """See :meth:`Engine.start`.  Raises :class:`KernelError` also if reports cannot be taken where they should, and
        :class:`ConfigError` for VIPs that are the machine's own addresses, and ``keep`` for another user than root."""
        try:
            await self._start()
        except BaseException:
            await self.close()
            raise

    async def _start(self) -> None:
        config = self.engine.config
        check(config)
        if config.report_listen and config.report_key:
            self._reports = Reports(self.engine, config.report_key, self.health.listening)
            self._reports.follow(config.services)
            await self._reports.start(*config.report_listen)
        found = self.health.prepare(config) if self.health.foreknown(config) else None
        if found:
            self.engine.judge(found.standings)
        await self.engine.start()
        self.health.follow(found or self.health.prepare(config))
        self.health.start()
        self._announcing = config.announce is Announce.ARP
        self._announce()
        self._tell_links(self.engine.links)

    async def close(self) -> None:
        """Leave nothing in the kernel, or for ``keep`` seconds.  Idempotent."""
        self._announcing = False
        self.health.close()
        await asyncio.gather(*self._ending, *(announcer.close() for announcer in self._announcers.values()))
        self._announcers.clear()
        if self._reports:
            self._reports.close()
            self._reports = None
        if kept := await self.engine.close():
            remove_later(kept, self.engine.config.keep)

    def apply(self, config: Config) -> None:
        """See :meth:`Engine.apply`.  Raises :class:`ConfigError` also as :meth:`start` does."""
        check(config)
        found = self.health.prepare(config)
        self.engine.apply(config, found.standings)
        self.health.follow(found)
        self._follow_vips()
        if self._reports:
            self._reports.follow(config.services)

    def tell(self, event: Event) -> None:
        """Have the listeners know of an event that neither the engine nor a task of this one saw."""
        self._tell(event)

    def _vips(self) -> set[Address]:
        """Those to announce: each that a service has which has its quorum."""
        withdrawn = self.health.withdrawn
        return {service.vip.address for service in self.engine.config.services if service.vip not in withdrawn}

    def _follow_vips(self) -> None:
        for announcer in self._announcers.values():
            announcer.follow(self._vips())

    def _announce(self) -> None:
        """Have one who answers for the VIPs on each interface there is: sockets follow none that goes or is renamed.

        Raises :class:`KernelError` if that cannot be.
        """
        if not self._announcing:
            return
        modes = self.engine.modes
        there = {(interface.name, interface.index) for interface in self.engine.interfaces if modes[interface.name]}
        for key in self._announcers.keys() - there:
            self._end(self._announcers.pop(key))
        for name, index in there - self._announcers.keys():
            announcer = Announcer(name, self._vip_befell, self.engine.task)
            try:
                announcer.start(self._vips())
            except OSError as error:
                self._end(announcer)
                raise KernelError(f"cannot announce VIPs on {name}: {error.strerror or error}") from None
            self._announcers[name, index] = announcer

    def _end(self, announcer: Announcer) -> None:
        task = asyncio.ensure_future(announcer.close())
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    def _judged(self, event: Event) -> None:
        """What checks found out."""
        self._adviser.hear(event)
        self._tell(event)
        if event.kind in ("quorum-lost", "quorum-reached"):
            self._follow_vips()

    def _tell(self, notice: Notice) -> None:
        if isinstance(notice, Event):
            for listener in self.listeners:
                listener(notice)
        elif isinstance(notice, LinksChanged):
            try:
                self._announce()
            except KernelError as error:  # tried again the next time, which comes at each sweep
                log.warning("VIPs are not announced", reason=str(error))
            self._tell_links(notice.links)

    def _tell_links(self, links: Mapping[int, Link]) -> None:
        served = {i.index: links[i.index] for i in self.engine.interfaces if i.index in links}
        for (_, index), announcer in self._announcers.items():
            if index in served:
                announcer.link_is(served[index], {link.mac for link in served.values()})

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
