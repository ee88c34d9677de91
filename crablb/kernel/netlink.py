"""Links, routes and neighbours: where frames for a backend go, from the kernel's own tables.

:class:`NextHops` follows the kernel (rtnetlink(7)) and keeps the neighbour entries that it needs alive by asking for
managed ones (``NTF_EXT_MANAGED``, Linux 5.16): the kernel then resolves them without traffic of its own.  It would take
20 to 40 s to notice that one is dead; so it is asked to look more often, which concerns these entries and no others of
their interfaces.
"""

from __future__ import annotations

import asyncio
import errno
import socket
import sys
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import structlog

from crablb import lasting
from crablb.kernel import pathmtu, routing, rtnetlink, sockfilter
from crablb.kernel.pathmtu import PathMtu
from crablb.kernel.reader import Reader
from crablb.kernel.routing import Hop, Route
from crablb.kernel.rtnetlink import LINK, NEIGHBOUR, ROUTE, Message, Netlink
from crablb.model import Address
from crablb.seldom import Seldom

__all__ = ["HopState", "Link", "NextHop", "NextHops", "next_hops", "release_managed"]

# include/uapi/linux/rtnetlink.h, neighbour.h
#: RTNLGRP_LINK, NEIGH, IPV4_IFADDR, IPV4_ROUTE, IPV4_RULE, IPV6_IFADDR, IPV6_ROUTE, IPV6_RULE, NEXTHOP
GROUPS = sum(1 << group - 1 for group in (1, 3, 5, 7, 8, 9, 11, 19, 32))
RTM_NEIGH = (28, 29)
NUD_VALID = 0x02 | 0x04 | 0x08 | 0x10 | 0x40 | 0x80  # reachable, stale, delay, probe, noarp, permanent
NUD_FAILED, NUD_PERMANENT = 0x20, 0x80
NUD_ASKED = NUD_VALID & ~(rtnetlink.NUD_PROBE | 0x40 | NUD_PERMANENT)  # those that may be dead, and are not asked now
NTF_EXT_MANAGED = 1
ARPHRD_ETHER = 1
NETDEV_XDP_ACT_NDO_XMIT, NETDEV_XDP_ACT_NDO_XMIT_SG = 4, 64
IFF_RUNNING, IFF_LOWER_UP = 0x40, 0x10000
SKF_AD_NLATTR = 0xFFFFF000 + 12  # linux/filter.h

#: Seconds between looks at the kernel's tables: a storm of events is one.
LEAST = 0.05
#: Bytes of events that may wait.
WAITING = 4 << 20
SO_RCVBUFFORCE = 33

#: What the kernel says that could not answer at the moment; no event would tell when it can.
MOMENTARY = {errno.ENOMEM, errno.ENOBUFS, errno.EINTR, errno.EAGAIN}
#: What an address is whose route is no other host's (RTN_*).
KINDS = {
    2: "an address of this machine itself, and frames go to others only; leave it out",
    3: "a broadcast address",
    4: "an anycast address of this machine itself",
    5: "a multicast address",
}

#: How often neighbours are asked whether they are there, in seconds; the kernel finds out with three probes, in 3 s.
PROBE_INTERVAL = 3.0

log = structlog.get_logger()


class HopState(Enum):
    RESOLVED = "resolved"
    UNRESOLVED = "unresolved"
    NO_ROUTE = "no-route"
    NOT_ETHERNET = "not-ethernet"
    NOT_A_HOST = "not-a-host"  # this machine's own address, or a group's


@dataclass(frozen=True, slots=True)
class NextHop:
    """Where to send frames for one backend; the MAC addresses are 6 bytes, empty unless the state is RESOLVED."""

    state: HopState
    reason: str = ""
    ifindex: int = 0  # of the interface to send on
    gateway: Address | None = None  # of either family
    dst_mac: bytes = b""
    src_mac: bytes = b""
    source: Address | None = None  # what the kernel would send from
    mtu: int = 0  # of the way: bytes of an IP packet
    redirect: bool = False  # the interface takes what an XDP program redirects to it
    frags: bool = False  # the same of frames of several buffers
    asking: bool = False  # UNRESOLVED, and it has not failed to answer yet

    @property
    def on_link(self) -> bool:
        return self.gateway is None


class _Way(NamedTuple):
    """One of the next hops of a route."""

    ifindex: int
    gateway: Address | None
    source: Address | None
    mtu: int

    @property
    def hop(self) -> tuple[int, Address | None]:
        return self.ifindex, self.gateway

    def neighbour(self, address: Address) -> tuple[int, str]:
        """Whose link-layer address frames to ``address`` need."""
        return self.ifindex, str(self.gateway or address)


class _Route(NamedTuple):
    """What the kernel's tables say of an address; ``ways``, the kernel's own choice first, if the state is RESOLVED."""

    state: HopState
    reason: str = ""
    ways: tuple[_Way, ...] = ()

    def neighbours(self, address: Address) -> set[tuple[int, str]]:
        return {way.neighbour(address) for way in self.ways}


class Link(NamedTuple):
    """An interface, as the kernel has it."""

    name: str
    mac: bytes
    mtu: int
    ethernet: bool
    redirect: bool
    frags: bool
    master: int  # index of the bridge or bond that it is a port of; 0: none
    running: bool  # it is up, and has a carrier
    ups: int  # how often it got a carrier
    carrier: bool


class _Tables(NamedTuple):
    """What the kernel said, all at once."""

    routes: dict[Address, _Route]
    neighbours: dict[tuple[int, str], tuple[int, bytes]]  # (ifindex, address) -> NUD state, MAC
    links: dict[int, Link]
    elsewhere: frozenset[Address]  # of those asked for, the addresses that are not this machine's


#: What is known of a neighbour that has no entry.
NOBODY = 0, b""


def _where(state: int, mac: bytes) -> tuple[bytes, bool]:
    """Where frames for a neighbour go, and whether the administrator has said so."""
    return mac if state & NUD_VALID else b"", bool(state & NUD_PERMANENT)


def _put(neighbours: dict[tuple[int, str], tuple[int, bytes]], key: tuple[int, str], state: tuple[int, bytes]) -> None:
    if state is NOBODY:
        neighbours.pop(key, None)
    else:
        neighbours[key] = state


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
        bool(features.get(index, 0) & NETDEV_XDP_ACT_NDO_XMIT_SG),
        rtnetlink.number(found.get(rtnetlink.IFLA_MASTER)),
        bool(flags & IFF_RUNNING),
        rtnetlink.number(found.get(rtnetlink.IFLA_CARRIER_UP_COUNT)),
        bool(flags & IFF_LOWER_UP),
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


def _way(netlink: Netlink, address: Address, out: int, links: Mapping[int, Link]) -> _Way | None:
    """The next hop that packets of this host take, if they leave by an interface (0: by any).  Raises OSError."""
    message = rtnetlink.route(netlink, address, out)
    found = message.attributes(ROUTE)
    hop = next(routing.hops(message), None)
    link = links.get(hop.ifindex) if hop else None
    if not hop or not link:
        return None
    source = rtnetlink.address(found.get(rtnetlink.RTA_PREFSRC))
    metrics = rtnetlink.attributes(found.get(rtnetlink.RTA_METRICS, b""))
    return _Way(
        hop.ifindex,
        hop.towards,
        type(address)(source) if source else None,
        rtnetlink.number(metrics.get(rtnetlink.RTAX_MTU)) or link.mtu,
    )


def _others(netlink: Netlink, address: Address, hops: Iterable[Hop], links: Mapping[int, Link]) -> Iterator[_Way]:
    for hop in hops:
        if hop.dead or hop.ifindex not in links:
            continue
        try:
            way = _way(netlink, address, hop.ifindex, links)
        except OSError as error:
            if error.errno in MOMENTARY:
                raise
            continue  # it has gone meanwhile, and an event will tell
        if way and way.ifindex == hop.ifindex:
            yield way._replace(gateway=hop.towards)


def _route(netlink: Netlink, address: Address, links: Mapping[int, Link], known: dict[bytes, Route | None]) -> _Route:
    """``known``: see :func:`.routing.lookup`."""
    try:
        route, chosen = routing.lookup(netlink, address, known), _way(netlink, address, 0, links)
    except OSError as error:
        if error.errno in MOMENTARY:
            raise
        return _Route(HopState.NO_ROUTE, f"no route: {error.strerror}")
    if route and not route.unicast:
        return _Route(HopState.NOT_A_HOST, f"it is {KINDS.get(route.kind, 'no address of a host')}")
    if not route or not chosen:
        return _Route(HopState.NO_ROUTE, "no route: its interface is gone")
    ways = [chosen]
    # Of several default routes by router advertisements the kernel's choice is not always the tables'.
    if len(route.hops) > 1 and chosen.hop in {(hop.ifindex, hop.towards) for hop in route.hops}:
        ways += [way for way in _others(netlink, address, route.hops, links) if way.hop != chosen.hop]
    wrapping = {(hop.ifindex, hop.towards) for hop in route.hops if hop.encap}
    usable = tuple(way for way in ways if links[way.ifindex].ethernet and way.hop not in wrapping)
    if usable:
        return _Route(HopState.RESOLVED, "", usable)
    if chosen.hop in wrapping:
        return _Route(HopState.NOT_ETHERNET, "its route wraps packets (ip route ... encap), as only the kernel does")
    reason = f"its route leads through {links[chosen.ifindex].name}, which is not an Ethernet interface"
    return _Route(HopState.NOT_ETHERNET, reason)


def _routes(netlink: Netlink, addresses: Iterable[Address], links: Mapping[int, Link]) -> dict[Address, _Route]:
    known: dict[bytes, Route | None] = {}
    return {address: _route(netlink, address, links, known) for address in addresses}


def _neighbours(netlink: Netlink) -> dict[tuple[int, str], tuple[int, bytes]]:
    found = (
        _neighbour(message)
        for family in (socket.AF_INET, socket.AF_INET6)
        for message in rtnetlink.neighbours(netlink, family)
    )
    return dict(filter(None, found))


def release_managed(backends: Iterable[tuple[Address, bytes]]) -> None:
    """Give up the managed neighbour entries of a process that died: those of these addresses, or of these MAC addresses
    (a gateway's)."""
    backends = list(backends)
    addresses, macs = {str(address) for address, _ in backends}, {mac for _, mac in backends if any(mac)}
    with Netlink() as netlink:
        for family in (socket.AF_INET, socket.AF_INET6):
            for message in rtnetlink.neighbours(netlink, family):
                found = _neighbour(message)
                flags = rtnetlink.number(message.attributes(NEIGHBOUR).get(rtnetlink.NDA_FLAGS_EXT))
                if found and flags & NTF_EXT_MANAGED:
                    (index, address), (_, mac) = found
                    if address in addresses or mac in macs:
                        with suppress(OSError):  # it has gone meanwhile
                            rtnetlink.delete_neighbour(netlink, index, address)


def next_hops(addresses: Iterable[Address]) -> dict[Address, NextHop]:
    """The next hops of these as the kernel knows them now: nobody is asked, and nothing is followed.

    Of those that are not resolved the interface is told as well, and what it could take.  In this thread's network
    namespace.  Raises OSError.
    """
    now = NextHops(lambda *_: None)
    now._wanted = frozenset(addresses)
    now._tables = now._ask()
    for key, (nud, _) in now._tables.neighbours.items():
        now._note_failure(key, nud)
    found = {address: now._hop(address) for address in now._wanted}
    for address, hop in found.items():
        if hop.state is HopState.UNRESOLVED:
            link, way = now.links[hop.ifindex], now._tables.routes[address].ways[0]
            found[address] = replace(hop, mtu=way.mtu, redirect=link.redirect, frags=link.frags)
    return found


class NextHops:
    """The next hops of a set of backends, through whatever Ethernet interfaces lead to them, kept current; and which of
    the VIPs are this machine's own addresses as well.

    ``on_change`` is called in the event loop with those that changed, as they were (those that were known) and as they
    are; ``on_links``, when interfaces or own addresses may have changed.  :attr:`current` is what is known now, of
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
        self._vips: frozenset[Address] = frozenset()
        self._tables = _Tables({}, {}, {}, frozenset())
        self._vias: set[tuple[int, str]] = set()  # the neighbours that the routes need
        self._failed: set[tuple[int, str]] = set()  # neighbours that did not answer, and have not since
        self._heard: dict[tuple[int, str], tuple[int, bytes]] = {}  # of neighbours, since they were last asked for
        self._managed: set[tuple[int, str]] = set()
        # Long tables take their time.  One thread for all calls, because setns(2) concerns threads.
        self._thread = ThreadPoolExecutor(1, "crablb-netlink")
        self._events: socket.socket | None = None
        self._readers: list[Reader] = []
        self._path_mtu: PathMtu | None = None
        self._narrower: set[Address] = set()  # those whose way has become so, as a router says
        self._seldom = Seldom()
        self._devices: socket.socket | None = None
        self._dirty = asyncio.Event()
        self._full = False
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, addresses: Iterable[Address], vips: Iterable[Address] = ()) -> None:
        """Resolve what the kernel knows now, and begin to follow it."""
        sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, 0)
        sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, WAITING)
        sockfilter.attach(sock, _events_about(self._vias))
        sock.bind((0, GROUPS))
        self._events = sock
        self._devices = rtnetlink.device_events()
        self._path_mtu = PathMtu()
        self._wanted, self._vips = frozenset(addresses), frozenset(vips)
        await self._refresh(full=True)
        self._readers.append(Reader(sock, rtnetlink.ROOM, self._take, self._lost))
        for errors in self._path_mtu.sockets:
            self._readers.append(Reader(errors, pathmtu.ROOM, partial(self._narrow, errors.family), self._lost))
        # What it says is of no matter, nor whether all of it arrived.
        self._readers.append(
            Reader(self._devices, rtnetlink.ROOM, lambda *_: self.look(), lambda _: self.look()),
        )
        self._tasks = [
            self._start_task("next hops", self._follow),
            self._start_task("neighbours", self._keep_asking),
        ]

    def follow(self, addresses: Iterable[Address], vips: Iterable[Address] = ()) -> None:
        """Follow these addresses from now on; ``on_change`` tells of those that are new."""
        self._wanted, self._vips = frozenset(addresses), frozenset(vips)
        self.look()

    def look(self) -> None:
        """Ask the kernel anew, for all that no event may have told; soon."""
        self._full = True
        self._dirty.set()

    @property
    def links(self) -> Mapping[int, Link]:
        """The interfaces by index, as they were when the kernel was last asked."""
        return MappingProxyType(self._tables.links)

    @property
    def elsewhere(self) -> frozenset[Address]:
        """The VIPs that are not addresses of this machine."""
        return self._tables.elsewhere & self._vips

    def macs(self, index: int) -> list[bytes]:
        """The MAC addresses that frames to an interface have: its own, and those of its bridge or bond."""
        found: dict[int, Link] = {}
        while index not in found and (link := self._tables.links.get(index)):
            found[index] = link
            index = link.master
        return [mac for mac in dict.fromkeys(link.mac for link in found.values()) if len(mac) == 6]

    async def close(self, *, leave: bool = False) -> None:
        """Stop following, and give up the managed neighbour entries; ``leave``: to another process, which has them."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        while self._readers:
            self._readers.pop().close()
        self._hear_no_more()
        if leave:
            self._thread.shutdown()
            return
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._forget)
        except RuntimeError:  # the interpreter ends, and gives threads no work any more
            self._forget()
        self._thread.shutdown()

    def abandon(self) -> None:
        """:meth:`close`, where the event loop is gone already."""
        self._hear_no_more()
        self._forget()
        self._thread.shutdown()

    def _hear_no_more(self) -> None:
        for sock in (self._events, self._path_mtu, self._devices):
            if sock:
                sock.close()

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

    def _narrow(self, family: int, message: bytes, _: Any) -> None:
        found = pathmtu.too_big(message, family)
        if not found:
            return
        address, room = found
        hop = self.current.get(address)
        if hop and room < hop.mtu:
            self._narrower.add(address)
            self._dirty.set()

    def _neighbour(self, message: Message, gone: bool = False) -> bool:
        """Note a neighbour's change; whether it concerns the way to a backend."""
        found = _neighbour(message)
        if not found:
            return False
        key, state = found
        before, asked = self._tables.neighbours.get(key, NOBODY), key in self._failed
        if gone:
            state = NOBODY
            self._managed.discard(key)
            # Whoever removes an entry (ip neigh flush) has it fail first.  It is asked for anew: nothing is known yet.
            self._failed.discard(key)
        else:
            self._note_failure(key, state[0])
        self._heard[key] = state
        _put(self._tables.neighbours, key, state)
        changed = _where(*before) != _where(*state) or asked != (key in self._failed)
        return key in self._vias and (gone or changed)

    def _note_failure(self, key: tuple[int, str], nud: int) -> None:
        """A managed entry is asked for again and again: that it is, says nothing."""
        if nud & NUD_FAILED:
            self._failed.add(key)
        elif nud & NUD_VALID:
            self._failed.discard(key)

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

    async def _keep_asking(self) -> None:
        """Have the kernel find out who is dead, and who is there again, sooner than it would by itself."""
        while True:
            await asyncio.sleep(PROBE_INTERVAL)
            await asyncio.get_running_loop().run_in_executor(self._thread, self._probe)

    async def _refresh(self, full: bool) -> None:
        loop = asyncio.get_running_loop()
        narrower, self._narrower = self._narrower & self._wanted, set()
        if full:
            self._heard.clear()
            self._tables = await loop.run_in_executor(self._thread, self._ask)
            self._know_neighbours()
            self._on_links()
        elif narrower:
            routes = await loop.run_in_executor(self._thread, self._ask_routes, narrower, self._tables.links)
            self._tables.routes.update(routes)
        routes, neighbours, *_ = self._tables
        vias = {via for address, route in routes.items() for via in route.neighbours(address)}
        if vias != self._vias:
            self._vias = vias
            if self._events:
                sockfilter.attach(self._events, _events_about(vias))
                # What befell the new ones between the dump and now was not told.
                self._heard.clear()
                neighbours = await loop.run_in_executor(self._thread, self._ask_neighbours)
                self._tables = self._tables._replace(neighbours=neighbours)
                self._know_neighbours()
        self._failed &= self._vias
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

    def _know_neighbours(self) -> None:
        """What follows from what all of them were found to be, and from what was told while they were asked for: the
        answer may be older.  Where it is newer, what was told since is still to be read."""
        for told, state in self._heard.items():
            _put(self._tables.neighbours, told, state)
        self._managed &= self._tables.neighbours.keys()  # a link that went down took its entries with it
        for key, (nud, _) in self._tables.neighbours.items():
            self._note_failure(key, nud)

    def _hop(self, address: Address) -> NextHop:
        """By the way that is in use, as long as its neighbour answers; else by the first whose neighbour does."""
        route = self._tables.routes[address]
        if not route.ways:
            return NextHop(route.state, route.reason)
        before = self.current.get(address)
        ways = sorted(route.ways, key=lambda way: before is None or way.hop != (before.ifindex, before.gateway))
        silent = []
        for way in ways:
            via = way.neighbour(address)
            link = self._tables.links[way.ifindex]
            if not link.carrier:
                silent.append(f"{link.name} has no link")
                continue
            nud, mac = self._tables.neighbours.get(via, NOBODY)
            if nud & NUD_VALID and len(mac) == 6:
                return NextHop(
                    HopState.RESOLVED, "", way.ifindex, way.gateway, mac, link.mac, way.source, way.mtu,
                    link.redirect, link.frags,
                )  # fmt: skip
            silent.append(f"{via[1]} does not answer on {link.name}")
        asking = any(way.neighbour(address) not in self._failed for way in ways)
        return NextHop(HopState.UNRESOLVED, ", ".join(silent), ways[0].ifindex, ways[0].gateway, asking=asking)

    # ---- in the netlink thread ----

    def _ask(self) -> _Tables:
        features = rtnetlink.xdp_features()
        with Netlink() as netlink:
            links = dict(_link(message, features) for message in rtnetlink.links(netlink))
            routes = _routes(netlink, self._wanted, links)
            elsewhere = frozenset(vip for vip in self._vips if not routing.is_local(netlink, vip))
            return _Tables(routes, _neighbours(netlink), links, elsewhere)

    def _ask_neighbours(self) -> dict[tuple[int, str], tuple[int, bytes]]:
        with Netlink() as netlink:
            return _neighbours(netlink)

    def _ask_routes(self, addresses: Iterable[Address], links: Mapping[int, Link]) -> dict[Address, _Route]:
        with Netlink() as netlink:
            return _routes(netlink, addresses, links)

    def _manage(self, wanted: set[tuple[int, str]]) -> None:
        with Netlink() as netlink:
            for index, address in wanted - self._managed:
                try:
                    rtnetlink.set_neighbour(netlink, index, address, 0, NTF_EXT_MANAGED)
                except OSError as error:
                    log.warning("cannot manage neighbour", neighbour=address, error=str(error))
            self._release(netlink, self._managed - wanted)
        self._managed = set(wanted)

    def _probe(self) -> None:
        with Netlink() as netlink:
            for index, address in list(self._managed):
                state, _ = self._tables.neighbours.get((index, address), NOBODY)
                try:
                    if state & NUD_ASKED:
                        rtnetlink.probe_neighbour(netlink, index, address)
                    if not state or state & (NUD_ASKED | NUD_FAILED):
                        rtnetlink.set_neighbour(netlink, index, address, 0, NTF_EXT_MANAGED)
                except OSError:  # its entry, or interface, has gone or changed since: events tell
                    continue

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
