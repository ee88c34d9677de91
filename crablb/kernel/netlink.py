"""Links, routes and neighbours: where frames for a backend go, from the kernel's own tables.

:class:`NextHops` follows the kernel (rtnetlink(7)) and keeps the neighbour entries that it needs alive by asking for
managed ones (``NTF_EXT_MANAGED``, Linux 5.16): the kernel then resolves them without traffic of its own.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import structlog
from pyroute2 import IPRoute
from pyroute2.netlink import NLM_F_DUMP, NLM_F_REQUEST, genlmsg
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.generic import GenericNetlinkSocket
from pyroute2.netlink.rtnl.marshal import MarshalRtnl

from crablb.errors import KernelError
from crablb.model import Address

__all__ = ["HopState", "Interface", "NextHop", "NextHops", "interface_info"]

# include/uapi/linux/rtnetlink.h, neighbour.h
GROUPS = 1 << 0 | 1 << 2 | 1 << 4 | 1 << 6 | 1 << 8 | 1 << 10  # link, neigh, ipv4 addr + route, ipv6 addr + route
RTM_NEIGH = (28, 29)
NUD_VALID = 0x02 | 0x04 | 0x08 | 0x10 | 0x40 | 0x80  # reachable, stale, delay, probe, noarp, permanent
NUD_PERMANENT = 0x80
NTF_EXT_MANAGED = 1
ARPHRD_ETHER = 1
NETDEV_CMD_DEV_GET, NETDEV_XDP_ACT_NDO_XMIT = 1, 4

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


class _Link(NamedTuple):
    name: str
    mac: bytes
    mtu: int
    ethernet: bool
    redirect: bool


class _Tables(NamedTuple):
    """What the kernel said, all at once."""

    routes: dict[Address, _Route]
    neighbours: dict[tuple[int, str], tuple[int, bytes]]  # (ifindex, address) -> NUD state, MAC
    links: dict[int, _Link]


@dataclass(frozen=True, slots=True)
class Interface:
    name: str
    index: int
    mac: bytes
    mtu: int
    up: bool
    rx_queues: int
    kind: str  # "veth", "vlan", ...; empty for hardware


def interface_info(name: str) -> Interface:
    """What the current network namespace says of an interface.  Raises :class:`KernelError` if there is none."""
    try:
        index = socket.if_nametoindex(name)
    except OSError:
        names = ", ".join(n for _, n in socket.if_nameindex())
        raise KernelError(f"interface {name} does not exist; there are: {names}") from None

    def ask() -> Any:
        with IPRoute() as ipr:
            return ipr.get_links(index)[0]

    # pyroute2's synchronous API runs an event loop of its own, so a caller inside of one needs another thread.
    with ThreadPoolExecutor(1) as thread:
        link = thread.submit(ask).result()
    return Interface(
        name,
        index,
        bytes.fromhex((link.get_attr("IFLA_ADDRESS") or "").replace(":", "")),
        int(link.get_attr("IFLA_MTU")),
        bool(link["flags"] & 1),
        int(link.get_attr("IFLA_NUM_RX_QUEUES") or 1),
        str(((info := link.get_attr("IFLA_LINKINFO")) and info.get_attr("IFLA_INFO_KIND")) or ""),
    )


class _Device(genlmsg):  # type: ignore[misc]
    """A message of the generic netlink family "netdev" (Documentation/netlink/specs/netdev.yaml)."""

    nla_map = (
        ("NETDEV_A_DEV_UNSPEC", "none"),
        ("NETDEV_A_DEV_IFINDEX", "uint32"),
        ("NETDEV_A_DEV_PAD", "none"),
        ("NETDEV_A_DEV_XDP_FEATURES", "uint64"),
    )


def xdp_features() -> dict[int, int]:
    """What XDP programs can do with each interface, NETDEV_XDP_ACT_* by ifindex; empty before Linux 6.3."""
    try:
        with GenericNetlinkSocket() as sock:
            sock.bind("netdev", _Device)
            ask = _Device()
            ask["cmd"], ask["version"] = NETDEV_CMD_DEV_GET, 1
            answers = sock.nlm_request(ask, msg_type=sock.prid, msg_flags=NLM_F_REQUEST | NLM_F_DUMP)
            return {a.get_attr("NETDEV_A_DEV_IFINDEX"): a.get_attr("NETDEV_A_DEV_XDP_FEATURES") for a in answers}
    except NetlinkError:
        return {}


def _mac(text: str | None) -> bytes:
    return bytes.fromhex(text.replace(":", "")) if text else b""


class NextHops:
    """The next hops of a set of backends, through whatever Ethernet interfaces lead to them, kept current.

    ``on_change`` is called in the event loop with those that changed.  To be used in the network namespace of the load
    balancer: :meth:`start`, then :meth:`close`.
    """

    def __init__(self, on_change: Callable[[Mapping[Address, NextHop]], None]) -> None:
        self.current: dict[Address, NextHop] = {}
        self._on_change = on_change
        self._wanted: frozenset[Address] = frozenset()
        self._tables = _Tables({}, {}, {})
        self._vias: set[tuple[int, str]] = set()  # the neighbours that the routes need
        self._managed: set[tuple[int, str]] = set()
        # See interface_info for why in a thread; one for all calls, because setns(2) concerns threads.
        self._thread = ThreadPoolExecutor(1, "crablb-netlink")
        self._events: socket.socket | None = None
        self._dirty = asyncio.Event()
        self._full = False
        self._task: asyncio.Task[None] | None = None

    async def start(self, addresses: Iterable[Address]) -> None:
        """Resolve what the kernel knows now, and begin to follow it."""
        sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, 0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        sock.bind((0, GROUPS))
        self._events = sock
        self._marshal = MarshalRtnl()
        self._wanted = frozenset(addresses)
        await self._refresh(full=True)
        asyncio.get_running_loop().add_reader(sock, self._read)
        self._task = asyncio.create_task(self._follow())

    def follow(self, addresses: Iterable[Address]) -> None:
        """Follow these addresses from now on; ``on_change`` tells of those that are new."""
        self._wanted = frozenset(addresses)
        self._full = True
        self._dirty.set()

    async def close(self) -> None:
        """Stop following, and give up the managed neighbour entries."""
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._events:
            asyncio.get_running_loop().remove_reader(self._events)
            self._events.close()
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
            for message in self._marshal.parse(data):
                kind = message["header"]["type"]
                if kind not in RTM_NEIGH:
                    self._full = True
                elif not self._neighbour(message, gone=kind == RTM_NEIGH[1]):
                    continue
                self._dirty.set()

    def _neighbour(self, message: Any, gone: bool = False) -> bool:
        """Note a neighbour's change; whether it concerns a backend."""
        key = message["ifindex"], message.get_attr("NDA_DST")
        if gone:
            self._tables.neighbours.pop(key, None)
            self._managed.discard(key)
        elif key[1]:
            self._tables.neighbours[key] = (message["state"], _mac(message.get_attr("NDA_LLADDR")))
        return key in self._vias

    async def _follow(self) -> None:
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            full, self._full = self._full, False
            try:
                await self._refresh(full)
            except (NetlinkError, OSError) as error:
                log.warning("cannot read routes and neighbours", error=str(error))

    async def _refresh(self, full: bool) -> None:
        loop = asyncio.get_running_loop()
        if full:
            # Events that come meanwhile are newer than the dump; they wait in the socket and are read after it.
            self._tables = await loop.run_in_executor(self._thread, self._ask)
            self._managed &= self._tables.neighbours.keys()  # a link that went down took its entries with it
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
        self.current = hops
        if changed:
            self._on_change(changed)

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
        features = xdp_features()
        with IPRoute() as ipr:
            links = {
                link["index"]: _Link(
                    link.get_attr("IFLA_IFNAME"),
                    _mac(link.get_attr("IFLA_ADDRESS")),
                    int(link.get_attr("IFLA_MTU")),
                    link["ifi_type"] == ARPHRD_ETHER,
                    bool(features.get(link["index"], 0) & NETDEV_XDP_ACT_NDO_XMIT),
                )
                for link in ipr.get_links()
            }
            routes = {address: self._route(ipr, address, links) for address in self._wanted}
            neighbours = {
                (message["ifindex"], message.get_attr("NDA_DST")): (
                    message["state"],
                    _mac(message.get_attr("NDA_LLADDR")),
                )
                for family in (socket.AF_INET, socket.AF_INET6)
                for message in ipr.get_neighbours(family)
                if message.get_attr("NDA_DST")
            }
            return _Tables(routes, neighbours, links)

    @staticmethod
    def _route(ipr: Any, address: Address, links: Mapping[int, _Link]) -> _Route:
        try:
            route = next(iter(ipr.route("get", dst=str(address))))
        except NetlinkError as error:
            return _Route(HopState.NO_ROUTE, f"no route: {os.strerror(error.code)}")
        out = route.get_attr("RTA_OIF")
        link = links.get(out)
        if not link:
            return _Route(HopState.NO_ROUTE, f"no route: interface {out} is gone")
        if not link.ethernet:
            reason = f"its route leads through {link.name}, which is not an Ethernet interface"
            return _Route(HopState.NOT_ETHERNET, reason)
        gateway, source = route.get_attr("RTA_GATEWAY"), route.get_attr("RTA_PREFSRC")
        metrics = route.get_attr("RTA_METRICS")
        return _Route(
            HopState.RESOLVED,
            "",
            out,
            type(address)(gateway) if gateway else None,
            type(address)(source) if source else None,
            int((metrics and metrics.get_attr("RTAX_MTU")) or link.mtu),
        )

    def _manage(self, wanted: set[tuple[int, str]]) -> None:
        with IPRoute() as ipr:
            for index, address in wanted - self._managed:
                try:
                    ipr.neigh("replace", dst=address, ifindex=index, state=0, flags_ext=NTF_EXT_MANAGED)
                except NetlinkError as error:
                    log.warning("cannot manage neighbour", neighbour=address, error=str(error))
            self._release(ipr, self._managed - wanted)
        self._managed = set(wanted)

    def _release(self, ipr: Any, neighbours: Iterable[tuple[int, str]]) -> None:
        for index, address in neighbours:
            try:
                ipr.neigh("del", dst=address, ifindex=index)
            except NetlinkError as error:
                if error.code not in (errno.ENOENT, errno.ENODEV):
                    log.warning("cannot release neighbour", neighbour=address, error=str(error))

    def _forget(self) -> None:
        with IPRoute() as ipr:
            self._release(ipr, self._managed)
        self._managed = set()
