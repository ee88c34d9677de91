"""Links, routes and neighbours: where frames for a backend go, from the kernel's own tables.

:class:`NextHops` follows the kernel (rtnetlink(7)) and keeps the neighbour entries that it needs alive by asking for
managed ones (``NTF_EXT_MANAGED``, Linux 5.16): the kernel then resolves them without traffic of its own.  It would take
20 to 40 s to notice that one is dead; so it is asked to look more often, which concerns these entries and no others of
their interfaces.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import structlog

from crablb.kernel import rtnetlink
from crablb.kernel.rtnetlink import LINK, NEIGHBOUR, ROUTE, Message, Netlink
from crablb.model import Address

__all__ = ["HopState", "Link", "NextHop", "NextHops"]

# include/uapi/linux/rtnetlink.h, neighbour.h
GROUPS = 1 << 0 | 1 << 2 | 1 << 4 | 1 << 6 | 1 << 8 | 1 << 10  # link, neigh, ipv4 addr + route, ipv6 addr + route
RTM_NEIGH = (28, 29)
NUD_VALID = 0x02 | 0x04 | 0x08 | 0x10 | 0x40 | 0x80  # reachable, stale, delay, probe, noarp, permanent
NUD_PERMANENT = 0x80
NUD_ASKED = NUD_VALID & ~(rtnetlink.NUD_PROBE | 0x40 | NUD_PERMANENT)  # those that may be dead, and are not asked now
NUD_FAILED = 0x20
NTF_EXT_MANAGED = 1
ARPHRD_ETHER = 1
IFF_UP, IFF_LOWER_UP = 0x1, 0x10000
NETDEV_XDP_ACT_NDO_XMIT = 4

#: How often neighbours are asked whether they are there, in seconds; the kernel finds out with three probes, in 3 s.
PROBE_INTERVAL = 3.0

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
    name: str
    mac: bytes
    mtu: int
    ethernet: bool
    redirect: bool
    master: int  # index of the bridge or bond that it is a port of; 0: none
    up: bool  # as the administrator wants it
    carrier: bool


class _Tables(NamedTuple):
    """What the kernel said, all at once."""

    routes: dict[Address, _Route]
    neighbours: dict[tuple[int, str], tuple[int, bytes]]  # (ifindex, address) -> NUD state, MAC
    links: dict[int, Link]


#: What is known of a neighbour that has no entry.
NOBODY = 0, b""


def _where(state: int, mac: bytes) -> tuple[bytes, bool]:
    """Where frames for a neighbour go, and whether the administrator has said so."""
    return mac if state & NUD_VALID else b"", bool(state & NUD_PERMANENT)


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
        bool(flags & IFF_UP),
        bool(flags & IFF_LOWER_UP),
    )


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
    are; ``on_links``, when anything of interfaces (:attr:`links`) may have changed.  :attr:`current` is what is known
    now, of those that are followed.  To be used in the network namespace of the load balancer: :meth:`start`, then
    :meth:`close`.
    """

    def __init__(
        self,
        on_change: Callable[[Mapping[Address, NextHop], Mapping[Address, NextHop]], None],
        on_links: Callable[[], None] = lambda: None,
    ) -> None:
        self.current: dict[Address, NextHop] = {}
        self._on_change = on_change
        self._on_links = on_links
        self._wanted: frozenset[Address] = frozenset()
        self._tables = _Tables({}, {}, {})
        self._vias: set[tuple[int, str]] = set()  # the neighbours that the routes need
        self._managed: set[tuple[int, str]] = set()
        # Long tables take their time.  One thread for all calls, because setns(2) concerns threads.
        self._thread = ThreadPoolExecutor(1, "crablb-netlink")
        self._events: socket.socket | None = None
        self._devices: socket.socket | None = None
        self._dirty = asyncio.Event()
        self._full = False
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self, addresses: Iterable[Address]) -> None:
        """Resolve what the kernel knows now, and begin to follow it."""
        sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, 0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        sock.bind((0, GROUPS))
        self._events = sock
        self._devices = rtnetlink.device_events()
        self._wanted = frozenset(addresses)
        await self._refresh(full=True)
        asyncio.get_running_loop().add_reader(sock, self._read)
        asyncio.get_running_loop().add_reader(self._devices, self._read_devices)
        self._tasks = [asyncio.create_task(self._follow()), asyncio.create_task(self._keep_asking())]

    def follow(self, addresses: Iterable[Address]) -> None:
        """Follow these addresses from now on; ``on_change`` tells of those that are new."""
        self._wanted = frozenset(addresses)
        self.look()

    def look(self) -> None:
        """Ask the kernel anew, for all that no event may have told; soon."""
        self._full = True
        self._dirty.set()

    @property
    def links(self) -> Mapping[int, Link]:
        """The interfaces there are, by index."""
        return self._tables.links

    def macs(self, index: int) -> list[bytes]:
        """The MAC addresses that frames to an interface have: its own, and its bridge's or bond's."""
        links = self._tables.links
        here = links.get(index)
        found = [link.mac for link in (here, links.get(here.master) if here else None) if link]
        return [mac for mac in dict.fromkeys(found) if len(mac) == 6]

    async def close(self) -> None:
        """Stop following, and give up the managed neighbour entries."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._events:
            asyncio.get_running_loop().remove_reader(self._events)
            self._events.close()
        if self._devices:
            asyncio.get_running_loop().remove_reader(self._devices)
            self._devices.close()
        await asyncio.get_running_loop().run_in_executor(self._thread, self._forget)
        self._thread.shutdown()

    def _read(self) -> None:
        assert self._events
        while True:
            try:
                data = self._events.recv(1 << 18)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
                self._full = True  # events were lost: ask for everything anew
                self._dirty.set()
                continue
            for message in rtnetlink.parse(data):
                if message.kind not in RTM_NEIGH:
                    self._full = True
                elif not self._neighbour(message, gone=message.kind == RTM_NEIGH[1]):
                    continue
                self._dirty.set()

    def _read_devices(self) -> None:
        assert self._devices
        with contextlib.suppress(BlockingIOError):
            while True:
                self._devices.recv(1 << 16)
        self.look()

    def _neighbour(self, message: Message, gone: bool = False) -> bool:
        """Note a neighbour's change; whether it concerns the way to a backend."""
        found = _neighbour(message)
        if not found:
            return False
        key, state = found
        before = self._tables.neighbours.get(key, NOBODY)
        if gone:
            state = NOBODY
            self._tables.neighbours.pop(key, None)
            self._managed.discard(key)
        else:
            self._tables.neighbours[key] = state
        return key in self._vias and (gone or _where(*before) != _where(*state))

    async def _follow(self) -> None:
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            full, self._full = self._full, False
            try:
                await self._refresh(full)
            except OSError as error:
                log.warning("cannot read routes and neighbours", error=str(error))

    async def _keep_asking(self) -> None:
        """Have the kernel find out who is dead, and who is there again, sooner than it would by itself."""
        while True:
            await asyncio.sleep(PROBE_INTERVAL)
            try:
                await asyncio.get_running_loop().run_in_executor(self._thread, self._probe)
            except OSError as error:
                log.warning("cannot ask neighbours", error=str(error))

    async def _refresh(self, full: bool) -> None:
        loop = asyncio.get_running_loop()
        if full:
            # Events that come meanwhile are newer than the dump; they wait in the socket and are read after it.
            self._tables = await loop.run_in_executor(self._thread, self._ask)
            self._managed &= self._tables.neighbours.keys()  # a link that went down took its entries with it
            self._on_links()
        routes, neighbours, _ = self._tables
        self._vias = {r.neighbour(address) for address, r in routes.items() if r.state is HopState.RESOLVED}
        # An entry that the administrator made permanent is his: not managed, and never removed by us.
        permanent = {key for key, (state, mac) in neighbours.items() if state & NUD_PERMANENT and mac}
        self._managed -= permanent
        missing = self._vias - permanent
        if missing != self._managed:
            await loop.run_in_executor(self._thread, self._manage, missing)
        hops = {address: self._hop(address) for address in routes}
        changed = {a: hop for a, hop in hops.items() if self.current.get(a) != hop}
        before = {a: self.current[a] for a in changed if a in self.current}
        self.current = hops
        if changed:
            self._on_change(before, changed)

    def _hop(self, address: Address) -> NextHop:
        route = self._tables.routes[address]
        if route.state is not HopState.RESOLVED:
            return NextHop(route.state, route.reason)
        via = route.neighbour(address)
        link = self._tables.links[route.ifindex]
        if not link.carrier:
            return NextHop(HopState.UNRESOLVED, f"{link.name} has no link", route.ifindex, route.gateway)
        nud, mac = self._tables.neighbours.get(via, NOBODY)
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
