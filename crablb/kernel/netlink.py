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
from pyroute2.netlink.exceptions import NetlinkError
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

log = structlog.get_logger()


class HopState(Enum):
    RESOLVED = "resolved"
    UNRESOLVED = "unresolved"
    NO_ROUTE = "no-route"
    OTHER_INTERFACE = "other-interface"


@dataclass(frozen=True, slots=True)
class NextHop:
    """Where to send frames for one backend; the MAC addresses are 6 bytes, empty unless the state is RESOLVED."""

    state: HopState
    reason: str = ""
    gateway: Address | None = None
    dst_mac: bytes = b""
    src_mac: bytes = b""
    source: Address | None = None  # what the kernel would send from
    mtu: int = 0  # of the way: bytes of an IP packet

    @property
    def on_link(self) -> bool:
        return self.gateway is None


class _Route(NamedTuple):
    """What the kernel's table says of an address; the other fields are set if the state is RESOLVED."""

    state: HopState
    reason: str = ""
    gateway: Address | None = None
    source: Address | None = None
    mtu: int = 0


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


def _mac(text: str | None) -> bytes:
    return bytes.fromhex(text.replace(":", "")) if text else b""


class NextHops:
    """The next hops of a set of backends through one interface, kept current.

    ``on_change`` is called in the event loop with those that changed.  To be used in the network namespace of the
    interface: :meth:`start`, then :meth:`close`.
    """

    def __init__(self, interface: Interface, on_change: Callable[[Mapping[Address, NextHop]], None]) -> None:
        self.interface = interface
        self.current: dict[Address, NextHop] = {}
        self._on_change = on_change
        self._wanted: frozenset[Address] = frozenset()
        self._routes: dict[Address, _Route] = {}
        self._neighbours: dict[str, tuple[int, bytes]] = {}  # of the interface: NUD state, MAC
        self._managed: set[str] = set()
        self._mac = interface.mac
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
                elif message["ifindex"] == self.interface.index:
                    self._neighbour(message, gone=kind == RTM_NEIGH[1])
                else:
                    continue
                self._dirty.set()

    def _neighbour(self, message: Any, gone: bool = False) -> None:
        address = message.get_attr("NDA_DST")
        if not address:
            return
        if gone:
            self._neighbours.pop(address, None)
            self._managed.discard(address)
        else:
            self._neighbours[address] = (message["state"], _mac(message.get_attr("NDA_LLADDR")))

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
            routes, neighbours, self._mac = await loop.run_in_executor(self._thread, self._ask)
            self._routes = routes
            # Events that came meanwhile are newer than the dump; they wait in the socket and are read after it.
            self._neighbours = neighbours
            self._managed &= neighbours.keys()  # a link that went down took its entries with it
        # An entry that the administrator made permanent is his: not managed, and never removed by us.
        permanent = {a for a, (state, mac) in self._neighbours.items() if state & NUD_PERMANENT and mac}
        self._managed -= permanent
        missing = self._hop_addresses() - permanent
        if missing != self._managed:
            await loop.run_in_executor(self._thread, self._manage, missing)
        hops = {address: self._hop(address) for address in self._routes}
        changed = {a: hop for a, hop in hops.items() if self.current.get(a) != hop}
        self.current = hops
        if changed:
            self._on_change(changed)

    def _hop_addresses(self) -> set[str]:
        return {
            str(route.gateway or address) for address, route in self._routes.items() if route.state is HopState.RESOLVED
        }

    def _hop(self, address: Address) -> NextHop:
        state, reason, gateway, source, mtu = self._routes[address]
        if state is not HopState.RESOLVED:
            return NextHop(state, reason)
        via = str(gateway or address)
        nud, mac = self._neighbours.get(via, (0, b""))
        if not nud & NUD_VALID or len(mac) != 6:
            return NextHop(HopState.UNRESOLVED, f"{via} does not answer on {self.interface.name}", gateway)
        return NextHop(HopState.RESOLVED, "", gateway, mac, self._mac, source, mtu)

    # ---- in the netlink thread ----

    def _ask(self) -> tuple[dict[Address, _Route], dict[str, tuple[int, bytes]], bytes]:
        name, index, wanted = self.interface.name, self.interface.index, self._wanted
        routes: dict[Address, _Route] = {}
        neighbours: dict[str, tuple[int, bytes]] = {}
        with IPRoute() as ipr:
            links = {link["index"]: link for link in ipr.get_links()}
            if index not in links:
                gone = _Route(HopState.NO_ROUTE, f"interface {name} is gone")
                return dict.fromkeys(wanted, gone), {}, b""
            for address in wanted:
                try:
                    route = next(iter(ipr.route("get", dst=str(address))))
                except NetlinkError as error:
                    routes[address] = _Route(HopState.NO_ROUTE, f"no route: {os.strerror(error.code)}")
                    continue
                out = route.get_attr("RTA_OIF")
                if out != index:
                    other = links[out].get_attr("IFLA_IFNAME") if out in links else out
                    reason = f"its route leads through {other}, which is not served"
                    routes[address] = _Route(HopState.OTHER_INTERFACE, reason)
                    continue
                gateway, source = route.get_attr("RTA_GATEWAY"), route.get_attr("RTA_PREFSRC")
                metrics = route.get_attr("RTA_METRICS")
                mtu = (metrics and metrics.get_attr("RTAX_MTU")) or links[index].get_attr("IFLA_MTU")
                routes[address] = _Route(
                    HopState.RESOLVED,
                    "",
                    type(address)(gateway) if gateway else None,
                    type(address)(source) if source else None,
                    int(mtu),
                )
            for family in (socket.AF_INET, socket.AF_INET6):
                for message in ipr.get_neighbours(family, ifindex=index):
                    if message.get_attr("NDA_DST"):
                        neighbours[message.get_attr("NDA_DST")] = (
                            message["state"],
                            _mac(message.get_attr("NDA_LLADDR")),
                        )
            return routes, neighbours, _mac(links[index].get_attr("IFLA_ADDRESS"))

    def _manage(self, wanted: set[str]) -> None:
        with IPRoute() as ipr:
            for address in wanted - self._managed:
                try:
                    ipr.neigh(
                        "replace",
                        dst=address,
                        ifindex=self.interface.index,
                        state=0,
                        flags_ext=NTF_EXT_MANAGED,
                    )
                except NetlinkError as error:
                    log.warning("cannot manage neighbour", neighbour=address, error=str(error))
            self._release(ipr, self._managed - wanted)
        self._managed = set(wanted)

    def _release(self, ipr: Any, addresses: Iterable[str]) -> None:
        for address in addresses:
            try:
                ipr.neigh("del", dst=address, ifindex=self.interface.index)
            except NetlinkError as error:
                if error.code not in (errno.ENOENT, errno.ENODEV):
                    log.warning("cannot release neighbour", neighbour=address, error=str(error))

    def _forget(self) -> None:
        with IPRoute() as ipr:
            self._release(ipr, self._managed)
        self._managed = set()
