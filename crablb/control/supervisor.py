"""An engine and the tasks round it: started in their order, told of changes, ended in the opposite order."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from ipaddress import ip_address
from types import MappingProxyType
from typing import Any

import structlog

from crablb.control.advice import Adviser
from crablb.control.announce import Announcer
from crablb.control.claim import Act
from crablb.control.claim import State as Held
from crablb.control.estate import Announced, Door, Heir
from crablb.control.health.health import Health
from crablb.control.keeping import remove_later
from crablb.control.reports import Reports
from crablb.dataplane.engine import Engine
from crablb.dataplane.events import Event, LinksChanged, Notice
from crablb.errors import ConfigError, KernelError
from crablb.kernel import rtnetlink
from crablb.kernel.netlink import Link
from crablb.kernel.rtnetlink import Netlink
from crablb.model import Address, Announce, Config, host_port
from crablb.selection.standing import Pair

__all__ = ["Supervisor", "answered_twice", "check"]

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


def answered_twice(config: Config) -> list[tuple[Address, str]]:
    """VIPs that the load balancer answers for and the kernel as well, and in words why that is odd."""
    if config.announce is not Announce.ARP:
        return []
    with Netlink() as netlink:
        own = rtnetlink.addresses(netlink)
    why = (
        "is an address of this machine, and announce = 'arp': the kernel answers for it too, also while another machine"
        " has it; take it off (ip addr del), or leave announce out if keepalived moves it"
    )
    vips = dict.fromkeys(service.vip.address for service in config.services)
    return [(address, why) for address in vips if str(address) in own]


class Supervisor:
    """All that ``crablb serve`` and :class:`crablb.LoadBalancer` run.

    Made, started and closed as an :class:`Engine` is.  ``listeners`` are called with each :class:`Event` of the engine
    and of the tasks.
    """

    def __init__(self, config: Config, seed: bytes, *, threads: bool = True, heir: Heir | None = None) -> None:
        """``heir``: what there is of another process, in whose place this one serves."""
        self.engine = Engine(config, seed, threads=threads, predecessor=heir.predecessor if heir else None)
        self._heir = heir
        self.listeners: list[Callable[[Event], None]] = []
        self._adviser = Adviser(self.engine)
        self.engine.listeners += [self._adviser.hear, self._tell]
        self.health = Health(self.engine, self._judged)
        self._announcers: dict[tuple[str, int], Announcer] = {}  # by an interface's name and index
        self._announcing = False
        self._warned: set[Address] = set()  # of VIPs that the kernel answers for too
        self._ending: set[asyncio.Task[None]] = set()  # of announcers
        self._reports: Reports | None = None
        #: Whether no VIP is announced, as the load balancer is being drained.
        self.withdrawn = False

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
            given = self._heir.door("reports", host_port(*config.report_listen)) if self._heir else None
            self._reports.bind(*config.report_listen, given)
        found = self.health.prepare(config) if self.health.foreknown(config) else None
        if found:
            self.engine.judge(found.standings)
        await self.engine.start()
        held = self._inherit() if self._heir else {}
        if self._reports:
            await self._reports.start()
        self.health.follow(found or self.health.prepare(config))
        self.health.start()
        self._announcing = config.announce is Announce.ARP
        self._warn(config)
        self._announce(held)
        self._tell_links(self.engine.links)

    def _inherit(self) -> dict[str, list[str]]:
        """Go on with what another process has handed over; the VIPs that it answered for, by interface."""
        assert self._heir
        rest, self._heir = self._heir.read_rest(), None
        self.withdrawn = rest.announced.withdrawn
        try:
            if rest.backends:
                self.engine.adopt(rest.backends)
        except (LookupError, TypeError, ValueError, ArithmeticError) as error:
            log.warning("backends' loads are not known yet", reason=str(error))
        if self._reports and rest.reports is not None:
            try:
                self._reports.adopt(rest.reports)
            except ValueError as error:  # msgspec's is one
                log.warning("servers' reports are judged anew", reason=str(error))
        return rest.announced.held

    # ---- from one process to the next ----

    def offer(self) -> dict[Door, int]:
        """The socket that reports come to."""
        where = self.engine.config.report_listen
        return {Door("reports", host_port(*where)): self._reports.fd} if self._reports and where else {}

    def pause(self) -> None:
        """Read no more reports: they are a successor's, or wait."""
        if self._reports:
            self._reports.pause()

    def resume(self) -> None:
        """After :meth:`pause`."""
        if self._reports:
            self.engine.task("reports", self._reports.start)

    def export(self) -> tuple[Announced, Any]:
        """The VIPs that are answered for, and what is known of servers that report."""
        held = {
            name: [str(address) for address, state in announcer.states.items() if state is Held.HELD]
            for (name, _), announcer in self._announcers.items()
        }
        return Announced(held, self.withdrawn), self._reports.export() if self._reports else None

    async def leave(self) -> None:
        """In place of :meth:`close`: a successor serves, and all that is in the kernel is its."""
        await self._end_tasks()
        await self.engine.leave()

    async def close(self) -> None:
        """Leave nothing in the kernel, or for ``keep`` seconds.  Idempotent."""
        await self._end_tasks()
        if kept := await self.engine.close():
            remove_later(kept, self.engine.config.keep)

    async def _end_tasks(self) -> None:
        self._announcing = False
        self.health.close()
        await asyncio.gather(*self._ending, *(announcer.close() for announcer in self._announcers.values()))
        self._announcers.clear()
        if self._reports:
            self._reports.close()
            self._reports = None

    def apply(self, config: Config) -> None:
        """See :meth:`Engine.apply`.  Raises :class:`ConfigError` also as :meth:`start` does."""
        check(config)
        found = self.health.prepare(config)
        self.engine.apply(config, found.standings)
        self.health.follow(found)
        self._warn(config)
        self._follow_vips()
        if self._reports:
            self._reports.follow(config.services)

    @property
    def uncut(self) -> int:
        """See :class:`Adviser`."""
        return self._adviser.uncut

    @property
    def takes_reports(self) -> bool:
        """Whether servers report here."""
        return self._reports is not None

    @property
    def leading(self) -> Collection[Pair]:
        """The services' servers that lead MPTCP clients past load balancers, of those that report."""
        return self._reports.leading if self._reports else ()

    def at_vip(self, pair: Pair) -> int | None:
        """How many connections by load balancers' fallback a service's server has, as it says while connections are to
        leave; None: it does not."""
        return self._reports.at_vips.get(pair) if self._reports and self.engine.reports(pair[1]) else None

    def lead_away(self, leaving: bool, *, withdraw: bool) -> None:
        """Whether servers are told that connections are to leave this load balancer, and VIPs are not announced."""
        if self._reports:
            self._reports.leaving = leaving
        self.withdrawn = withdraw
        self._follow_vips()

    def left_to(self, address: Address) -> dict[str, str]:
        """Who else has a VIP that is to be announced, and is taken when he is gone: interface -> MAC address."""
        return {
            announcer.interface: mac.hex(":")
            for announcer in self._announcers.values()
            if (mac := announcer.left_to(address))
        }

    def tell(self, event: Event) -> None:
        """Have the listeners know of an event that neither the engine nor a task of this one saw."""
        self._tell(event)

    def _vips(self) -> set[Address]:
        """Those to announce: each that a service has which has its quorum."""
        if self.withdrawn:
            return set()
        withdrawn = self.health.withdrawn
        return {service.vip.address for service in self.engine.config.services if service.vip not in withdrawn}

    def _warn(self, config: Config) -> None:
        found = answered_twice(config)
        for address, why in found:
            if address not in self._warned:
                log.warning("the kernel answers for a VIP too", vip=str(address), reason=f"{address} {why}")
        self._warned = {address for address, _ in found}

    def _follow_vips(self) -> None:
        for announcer in self._announcers.values():
            announcer.follow(self._vips())

    def _announce(self, held: Mapping[str, Sequence[str]] = MappingProxyType({})) -> None:
        """Have one who answers for the VIPs on each interface there is: sockets follow none that goes or is renamed.

        ``held``: VIPs that another process answered for until now, by interface.
        Raises :class:`KernelError` if that cannot be.
        """
        if not self._announcing:
            return
        modes = self.engine.modes
        there = {(interface.name, interface.index) for interface in self.engine.interfaces if modes[interface.name]}
        for key in self._announcers.keys() - there:
            self._end(self._announcers.pop(key))
        failed = []
        for name, index in sorted(there - self._announcers.keys()):
            announcer = Announcer(name, self._vip_befell, self.engine.task)
            try:
                announcer.start(self._vips(), {ip_address(text) for text in held.get(name, ())})
            except OSError as error:  # the other interfaces' go on
                self._end(announcer)
                failed.append(f"cannot announce VIPs on {name}: {error.strerror or error}")
            else:
                self._announcers[name, index] = announcer
        if failed:
            raise KernelError("; ".join(failed))

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
