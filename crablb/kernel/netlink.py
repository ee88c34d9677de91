"""Links, routes and neighbours: where frames for a backend go, from the kernel's own tables.

:class:`NextHops` follows the kernel (rtnetlink(7)) and keeps the neighbour entries that it needs alive by asking for
managed ones (``NTF_EXT_MANAGED``, Linux 5.16): the kernel then resolves them without traffic of its own.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import sys
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Any, NamedTuple

import structlog

from crablb import lasting
from crablb.kernel import rtnetlink, sockfilter
from crablb.kernel.reader import Reader
from crablb.kernel.rtnetlink import LINK, NEIGHBOUR, ROUTE, Message, Netlink
from crablb.model import Address
from crablb.seldom import Seldom

__all__ = ["HopState", "Link", "NextHop", "NextHops"]

# include/uapi/linux/rtnetlink.h, neighbour.h
GROUPS = 1 << 0 | 1 << 2 | 1 << 4 | 1 << 6 | 1 << 8 | 1 << 10  # link, neigh, ipv4 addr + route, ipv6 addr + route
RTM_NEIGH = (28, 29)
NUD_VALID = 0x02 | 0x04 | 0x08 | 0x10 | 0x40 | 0x80  # reachable, stale, delay, probe, noarp, permanent
NUD_PERMANENT = 0x80
NTF_EXT_MANAGED = 1
ARPHRD_ETHER = 1
NETDEV_XDP_ACT_NDO_XMIT = 4
IFF_RUNNING = 0x40
SKF_AD_NLATTR = 0xFFFFF000 + 12  # linux/filter.h

#: Seconds between looks at the kernel's tables: a storm of events is one.
LEAST = 0.05
#: Bytes of events that may wait.
WAITING = 4 << 20
SO_RCVBUFFORCE = 33

log = structlog.get_logger()


class HopState(Enum):
    RESOLVED = "resolved"
    UNRESOLVED = "unresolved"
    NO_ROUTE = "no-route"
    NOT_ETHERNET = "not-ethernet"


@dataclass(frozen=True, slots=True)
class NextHop:
    """Where to send frames for one backend; the MAC addresses are 6 bytes, empty unless the state is RESOLVED."""

    state: HopState
    reason: str = ""
    ifindex: int = 0  # of the interface to send on
    gateway: Address | None = None
    dst_mac: bytes = b""
    src_mac: bytes = b""
    source: Address | None = None  # what the kernel would send from
    mtu: int = 0  # of the way: bytes of an IP packet
    redirect: bool = False  # the interface takes what an XDP program redirects to it

    @property
    def on_link(self) -> bool:
        return self.gateway is None


class _Route(NamedTuple):
    """What the kernel's table says of an address; the other fields are set if the state is RESOLVED."""

    state: HopState
    reason: str = ""
    ifindex: int = 0
    gateway: Address | None = None
    source: Address | None = None
    mtu: int = 0

    def neighbour(self, address: Address) -> tuple[int, str]:
        """Whose link-layer address frames to ``address`` need."""
        return self.ifindex, str(self.gateway or address)


class Link(NamedTuple):
    """An interface, as the kernel has it."""

    name: str
    mac: bytes
    mtu: int
    ethernet: bool
    redirect: bool
    master: int  # index of the bridge or bond that it is a port of; 0: none
    running: bool  # it is up, and has a carrier
    ups: int  # how often it got a carrier


class _Tables(NamedTuple):
    """What the kernel said, all at once."""

    routes: dict[Address, _Route]
    neighbours: dict[tuple[int, str], tuple[int, bytes]]  # (ifindex, address) -> NUD state, MAC
    links: dict[int, Link]


def _neighbour(message: Message) -> tuple[tuple[int, str], tuple[int, bytes]] | None:
    """A neighbour's place in the tables and what is known of it; None for what is no neighbour of an IP address."""
    family, index, state, *_ = message.fields(NEIGHBOUR)
    found = message.attributes(NEIGHBOUR)
    if family not in (socket.AF_INET, socket.AF_INET6) or rtnetlink.NDA_DST not in found:
        return None
    mac = found.get(rtnetlink.NDA_LLADDR, b"")
    return (index, rtnetlink.address(found[rtnetlink.NDA_DST])), (state, mac)


def _link(message: Message, features: Mapping[int, int]) -> tuple[int, Link]:
    """A link by its index."""
    _, kind, index, flags, _ = message.fields(LINK)
    found = message.attributes(LINK)
    return index, Link(
        rtnetlink.text(found.get(rtnetlink.IFLA_IFNAME)),
        found.get(rtnetlink.IFLA_ADDRESS, b""),
        rtnetlink.number(found.get(rtnetlink.IFLA_MTU)),
        kind == ARPHRD_ETHER,
        bool(features.get(index, 0) & NETDEV_XDP_ACT_NDO_XMIT),
        rtnetlink.number(found.get(rtnetlink.IFLA_MASTER)),
        bool(flags & IFF_RUNNING),
        rtnetlink.number(found.get(rtnetlink.IFLA_CARRIER_UP_COUNT)),
    )


def _events_about(neighbours: Collection[tuple[int, str]]) -> list[sockfilter.Step]:
    """A filter for events: all but those of other neighbours, which whoever sends ARP here can make without end.

    Addresses by their last four bytes; of too many, all are taken.
    """
    words: dict[int, set[int]] = {socket.AF_INET: set(), socket.AF_INET6: set()}
    for _, address in neighbours:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        words[family].add(int.from_bytes(socket.inet_pton(family, address)[-4:], "big"))
    four, six = (sockfilter.among(w) for w in words.values())
    if len(four) + len(six) > sockfilter.MOST - 20:
        return [sockfilter.TAKE]
    neigh = [int.from_bytes(kind.to_bytes(2, sys.byteorder), "big") for kind in RTM_NEIGH]
    return [
        (0x28, 0, 0, 4),  # ldh [4]: the message's type
        (0x15, 2, 0, neigh[0]),
        (0x15, 1, 0, neigh[1]),
        sockfilter.TAKE,
        (0x00, 0, 0, rtnetlink.HEADER.size + NEIGHBOUR.size),  # ld #: where attributes begin
        (0x01, 0, 0, rtnetlink.NDA_DST),  # ldx #
        (0x20, 0, 0, SKF_AD_NLATTR),  # the offset of that attribute, 0: there is none
        (0x15, 0, 1, 0),
        sockfilter.LEAVE,
        (0x07, 0, 0, 0),  # tax
        (0x30, 0, 0, rtnetlink.HEADER.size),  # ldb: the family
        (0x15, 1, 0, socket.AF_INET),
        (0x05, 0, 0, len(four) + 2),  # ja
        (0x40, 0, 0, 4),  # ld [x + 4]: the address
        *four,
        sockfilter.LEAVE,
        (0x40, 0, 0, 16),  # ld [x + 16]: its last word
        *six,
        sockfilter.LEAVE,
    ]


def _route(netlink: Netlink, address: Address, links: Mapping[int, Link]) -> _Route:
    try:
        found = rtnetlink.route(netlink, address).attributes(ROUTE)
    except OSError as error:
        return _Route(HopState.NO_ROUTE, f"no route: {error.strerror}")
    out = rtnetlink.number(found.get(rtnetlink.RTA_OIF))
    link = links.get(out)
    if not link:
        return _Route(HopState.NO_ROUTE, f"no route: interface {out} is gone")
    if not link.ethernet:
        reason = f"its route leads through {link.name}, which is not an Ethernet interface"
        return _Route(HopState.NOT_ETHERNET, reason)
    gateway, source = (rtnetlink.address(found.get(kind)) for kind in (rtnetlink.RTA_GATEWAY, rtnetlink.RTA_PREFSRC))
    metrics = rtnetlink.attributes(found.get(rtnetlink.RTA_METRICS, b""))
    return _Route(
        HopState.RESOLVED,
        "",
        out,
        type(address)(gateway) if gateway else None,
        type(address)(source) if source else None,
        rtnetlink.number(metrics.get(rtnetlink.RTAX_MTU)) or link.mtu,
    )


class NextHops:
    """The next hops of a set of backends, through whatever Ethernet interfaces lead to them, kept current.

    ``on_change`` is called in the event loop with those that changed, as they were (those that were known) and as they
    are; ``on_links``, when interfaces may have changed.  :attr:`current` is what is known now, of
    those that are followed.  To be used in the network namespace of the load balancer: :meth:`start`, then
    :meth:`close`.
    """

    def __init__(
        self,
        on_change: Callable[[Mapping[Address, NextHop], Mapping[Address, NextHop]], None],
        on_links: Callable[[], None] = lambda: None,
        task: Callable[[str, Callable[[], Awaitable[None]]], asyncio.Task[None]] = lasting.task,
    ) -> None:
        """``task`` runs what is never done; see :func:`crablb.lasting.task`."""
        self.current: dict[Address, NextHop] = {}
        self._on_change = on_change
        self._on_links = on_links
        self._start_task = task
        self._wanted: frozenset[Address] = frozenset()
        self._tables = _Tables({}, {}, {})
        self._vias: set[tuple[int, str]] = set()  # the neighbours that the routes need
        self._managed: set[tuple[int, str]] = set()
        # Long tables take their time.  One thread for all calls, because setns(2) concerns threads.
        self._thread = ThreadPoolExecutor(1, "crablb-netlink")
        self._events: socket.socket | None = None
        self._reader: Reader | None = None
        self._seldom = Seldom()
        self._dirty = asyncio.Event()
        self._full = False
        self._task: asyncio.Task[None] | None = None

    async def start(self, addresses: Iterable[Address]) -> None:
        """Resolve what the kernel knows now, and begin to follow it."""
        sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, 0)
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, WAITING)
        sockfilter.attach(sock, _events_about(self._vias))
        sock.bind((0, GROUPS))
        self._events = sock
        self._wanted = frozenset(addresses)
        await self._refresh(full=True)
        self._reader = Reader(sock, rtnetlink.ROOM, self._take, self._lost)
        self._task = self._start_task("next hops", self._follow)

    def follow(self, addresses: Iterable[Address]) -> None:
        """Follow these addresses from now on; ``on_change`` tells of those that are new."""
        self._wanted = frozenset(addresses)
        self._full = True
        self._dirty.set()

    @property
    def links(self) -> Mapping[int, Link]:
        """The interfaces by index, as they were when the kernel was last asked."""
        return MappingProxyType(self._tables.links)

    def macs(self, index: int) -> list[bytes]:
        """The MAC addresses that frames to an interface have: its own, and its bridge's or bond's."""
        links = self._tables.links
        here = links.get(index)
        found = [link.mac for link in (here, links.get(here.master) if here else None) if link]
        return [mac for mac in dict.fromkeys(found) if len(mac) == 6]

    async def close(self) -> None:
        """Stop following, and give up the managed neighbour entries."""
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._reader:
            self._reader.close()
        if self._events:
            self._events.close()
        await asyncio.get_running_loop().run_in_executor(self._thread, self._forget)
        self._thread.shutdown()

    def _take(self, data: bytes, _: Any) -> None:
        for message in rtnetlink.parse(data):
            if message.kind not in RTM_NEIGH:
                self._full = True
            elif not self._neighbour(message, gone=message.kind == RTM_NEIGH[1]):
                continue
            self._dirty.set()

    def _lost(self, error: Exception) -> None:
        """Events were lost: ask for everything anew."""
        self._full = True
        self._dirty.set()
        if count := self._seldom.due("lost"):
            log.warning("events of the kernel were lost; it is asked for everything", error=repr(error), times=count)

    def _neighbour(self, message: Message, gone: bool = False) -> bool:
        """Note a neighbour's change; whether it concerns a backend."""
        found = _neighbour(message)
        if not found:
            return False
        key, state = found
        if gone:
            self._tables.neighbours.pop(key, None)
            self._managed.discard(key)
        else:
            self._tables.neighbours[key] = state
        return key in self._vias

    async def _follow(self) -> None:
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            full, self._full = self._full, False
            try:
                await self._refresh(full)
            except BaseException:  # what was not learned is asked for the next time
                self._full = True
                self._dirty.set()
                raise
            await asyncio.sleep(LEAST)

    async def _refresh(self, full: bool) -> None:
        loop = asyncio.get_running_loop()
        if full:
            # Events that come meanwhile are newer than the dump; they wait in the socket and are read after it.
            self._tables = await loop.run_in_executor(self._thread, self._ask)
            self._managed &= self._tables.neighbours.keys()  # a link that went down took its entries with it
            self._on_links()
        routes, neighbours, _ = self._tables
        vias = {r.neighbour(address) for address, r in routes.items() if r.state is HopState.RESOLVED}
        if vias != self._vias:
            self._vias = vias
            if self._events:
                sockfilter.attach(self._events, _events_about(vias))
                # What befell the new ones between the dump and now was not told.
                self._full = True
                self._dirty.set()
        # An entry that the administrator made permanent is his: not managed, and never removed by us.
        permanent = {key for key, (state, mac) in neighbours.items() if state & NUD_PERMANENT and mac}
        self._managed -= permanent
        missing = self._vias - permanent
        if missing != self._managed:
            await loop.run_in_executor(self._thread, self._manage, missing)
        hops = {address: self._hop(address) for address in routes}
        changed = {a: hop for a, hop in hops.items() if self.current.get(a) != hop}
        before = {a: self.current[a] for a in changed if a in self.current}
        former, self.current = self.current, hops
        if changed:
            try:
                self._on_change(before, changed)
            except BaseException:  # told again the next time
                self.current = former
                raise

    def _hop(self, address: Address) -> NextHop:
        route = self._tables.routes[address]
        if route.state is not HopState.RESOLVED:
            return NextHop(route.state, route.reason)
        via = route.neighbour(address)
        link = self._tables.links[route.ifindex]
        nud, mac = self._tables.neighbours.get(via, (0, b""))
        if not nud & NUD_VALID or len(mac) != 6:
            reason = f"{via[1]} does not answer on {link.name}"
            return NextHop(HopState.UNRESOLVED, reason, route.ifindex, route.gateway)
        return NextHop(
            HopState.RESOLVED, "", route.ifindex, route.gateway, mac, link.mac, route.source, route.mtu, link.redirect
        )

    # ---- in the netlink thread ----

    def _ask(self) -> _Tables:
        features = rtnetlink.xdp_features()
        with Netlink() as netlink:
            links = dict(_link(message, features) for message in rtnetlink.links(netlink))
            routes = {address: _route(netlink, address, links) for address in self._wanted}
            neighbours = [
                _neighbour(message)
                for family in (socket.AF_INET, socket.AF_INET6)
                for message in rtnetlink.neighbours(netlink, family)
            ]
            return _Tables(routes, dict(filter(None, neighbours)), links)

    def _manage(self, wanted: set[tuple[int, str]]) -> None:
        with Netlink() as netlink:
            for index, address in wanted - self._managed:
                try:
                    rtnetlink.set_neighbour(netlink, index, address, 0, NTF_EXT_MANAGED)
                except OSError as error:
                    log.warning("cannot manage neighbour", neighbour=address, error=str(error))
            self._release(netlink, self._managed - wanted)
        self._managed = set(wanted)

    def _release(self, netlink: Netlink, neighbours: Iterable[tuple[int, str]]) -> None:
        for index, address in neighbours:
            try:
                rtnetlink.delete_neighbour(netlink, index, address)
            except OSError as error:
                if error.errno not in (errno.ENOENT, errno.ENODEV):
                    log.warning("cannot release neighbour", neighbour=address, error=str(error))

    def _forget(self) -> None:
        with Netlink() as netlink:
            self._release(netlink, self._managed)
        self._managed = set()
