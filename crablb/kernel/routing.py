"""Routes and policy rules as the kernel's tables hold them: taken apart, compared, added and deleted.

All that makes a route what it is is kept (each next hop with its gateway, weight and flags, metrics, source, scope,
...), so that a route can be made that leads the same way.  Sources: rtnetlink(7), ip-route(8), ip-rule(8);
include/uapi/linux/rtnetlink.h, fib_rules.h, nexthop.h, lwtunnel.h.
"""

from __future__ import annotations

import ipaddress
import socket
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from crablb.kernel import rtnetlink
from crablb.kernel.rtnetlink import ROUTE, Message, Netlink, encode
from crablb.model import Address, Network

__all__ = [
    "LOCAL_TABLE",
    "Events",
    "Hop",
    "Route",
    "Rule",
    "best",
    "family_of",
    "hops",
    "is_local",
    "lookup",
    "routes",
    "rules",
    "table_of",
]

NLM_F_REPLACE, NLM_F_EXCL, NLM_F_CREATE = 0x100, 0x200, 0x400
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWRULE, RTM_DELRULE, RTM_GETRULE = 32, 33, 34
RTM_GETNEXTHOP = 106
RTN_UNICAST, RTN_LOCAL = 1, 2
RTNH_F_DEAD, RTNH_F_ONLINK = 1, 4
RTM_F_CLONED, RTM_F_LOOKUP_TABLE, RTM_F_FIB_MATCH = 0x200, 0x1000, 0x2000
RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PRIORITY, RTA_PREFSRC, RTA_METRICS, RTA_MULTIPATH = 1, 4, 5, 6, 7, 8, 9
RTA_FLOW, RTA_TABLE, RTA_VIA, RTA_PREF, RTA_ENCAP_TYPE, RTA_ENCAP, RTA_NH_ID = 11, 15, 18, 20, 21, 22, 30
NHA_ID, NHA_GROUP, NHA_OIF, NHA_GATEWAY, NHA_ENCAP_TYPE = 1, 2, 5, 6, 7
LWTUNNEL_ENCAP_BPF, LWT_BPF_XMIT, LWT_BPF_PROG_FD, LWT_BPF_PROG_NAME = 6, 3, 1, 2
FRA_IIFNAME, FRA_PRIORITY, FRA_SUPPRESS_IFGROUP, FRA_SUPPRESS_PREFIXLEN, FRA_TABLE = 3, 6, 13, 14, 15
FRA_PAD, FRA_L3MDEV, FRA_PROTOCOL = 18, 19, 21
FR_ACT_TO_TBL, FIB_RULE_INVERT = 1, 2
LOCAL_TABLE = 255
#: What a route is beside its next hops, and what of it a copy has too.
KEPT = (RTA_PREFSRC, RTA_METRICS, RTA_FLOW, RTA_PREF)
#: What a rule asks of packets is all but this.
NO_SELECTOR = {
    FRA_PRIORITY, FRA_SUPPRESS_IFGROUP, FRA_SUPPRESS_PREFIXLEN, FRA_TABLE, FRA_PAD, FRA_L3MDEV, FRA_PROTOCOL,
}  # fmt: skip

HOP = struct.Struct("=HBBi")  # struct rtnexthop: length, flags, weight - 1, ifindex
NEXTHOP = struct.Struct("=4BI")  # struct nhmsg: family, scope, protocol, -, flags
MEMBER = struct.Struct("=IBBH")  # struct nexthop_grp: id, weight - 1, its high bits, -


def family_of(what: Address | Network) -> int:
    return socket.AF_INET if what.version == 4 else socket.AF_INET6


@dataclass(frozen=True, slots=True)
class Hop:
    ifindex: int
    gateway: bytes = b""
    via: bytes = b""  # a gateway of the other family (struct rtvia)
    weight: int = 0  # less one
    onlink: bool = False
    flow: bytes = b""
    dead: bool = False
    encap: int = 0  # LWTUNNEL_ENCAP_*
    program: str = ""  # the name of the BPF program that packets are given to

    @property
    def towards(self) -> Address | None:
        """The address of the gateway, which may be of the other family (RFC 8950); None: there is none."""
        packed = self.gateway or self.via[2:]
        return ipaddress.ip_address(packed) if packed else None

    def _attributes(self, program: int | None) -> dict[int, bytes]:
        found = {RTA_GATEWAY: self.gateway, RTA_VIA: self.via, RTA_FLOW: self.flow}
        if program is not None:
            given = {LWT_BPF_PROG_FD: struct.pack("=I", program), LWT_BPF_PROG_NAME: self.program.encode() + b"\0"}
            found[RTA_ENCAP_TYPE] = struct.pack("=H", self.encap)
            found[RTA_ENCAP] = encode({LWT_BPF_XMIT: encode(given)})
        return {kind: value for kind, value in found.items() if value}


@dataclass(frozen=True, slots=True)
class Route:
    to: Network
    table: int
    protocol: int
    scope: int
    kind: int  # RTN_*
    priority: int
    tos: int
    hops: tuple[Hop, ...]
    more: tuple[tuple[int, bytes], ...]  # attributes in KEPT

    @property
    def unicast(self) -> bool:
        return self.kind == RTN_UNICAST

    def through(self, to: Address, table: int, protocol: int, program: str) -> Route:
        """The route to one address that leads the same way, by way of a BPF program."""
        live = [replace(hop, encap=LWTUNNEL_ENCAP_BPF, program=program) for hop in self.hops if not hop.dead]
        if len(live) == 1:
            live = [replace(live[0], weight=0)]
        # One next hop has its realm where the route has its own.
        more = dict(self.more)
        if len(live) == 1 and live[0].flow:
            more[RTA_FLOW] = live[0].flow
            live = [replace(live[0], flow=b"")]
        host = ipaddress.ip_network(to)
        return Route(host, table, protocol, self.scope, RTN_UNICAST, 0, 0, tuple(live), tuple(sorted(more.items())))

    def put(self, netlink: Netlink, program: int) -> None:
        """Add it, its program by file descriptor, in place of what is there."""
        more = {RTA_DST: self.to.network_address.packed, RTA_TABLE: struct.pack("=I", self.table), **dict(self.more)}
        flags = 0
        if len(self.hops) == 1:
            (hop,) = self.hops
            more |= {RTA_OIF: struct.pack("=I", hop.ifindex), **hop._attributes(program)}
            flags = RTNH_F_ONLINK if hop.onlink else 0
        else:
            packed = b""
            for hop in self.hops:
                inner = encode(hop._attributes(program))
                onlink = RTNH_F_ONLINK if hop.onlink else 0
                packed += HOP.pack(HOP.size + len(inner), onlink, hop.weight, hop.ifindex) + inner
            more[RTA_MULTIPATH] = packed
        body = ROUTE.pack(family_of(self.to), self.to.prefixlen, 0, 0, 0, self.protocol, self.scope, RTN_UNICAST, flags)
        netlink.ask(RTM_NEWROUTE, body, more, NLM_F_CREATE | NLM_F_REPLACE)

    def delete(self, netlink: Netlink) -> None:
        more = {RTA_DST: self.to.network_address.packed, RTA_TABLE: struct.pack("=I", self.table)}
        body = ROUTE.pack(family_of(self.to), self.to.prefixlen, 0, 0, 0, self.protocol, 255, RTN_UNICAST, 0)
        netlink.ask(RTM_DELROUTE, body, more)


def _hop(ifindex: int, flags: int, weight: int, found: Mapping[int, bytes], flow: bool) -> Hop:
    encap = rtnetlink.number(found.get(RTA_ENCAP_TYPE))
    name = ""
    if encap == LWTUNNEL_ENCAP_BPF:
        xmit = rtnetlink.attributes(found.get(RTA_ENCAP, b"")).get(LWT_BPF_XMIT, b"")
        name = rtnetlink.text(rtnetlink.attributes(xmit).get(LWT_BPF_PROG_NAME))
    return Hop(
        ifindex,
        found.get(RTA_GATEWAY, b""),
        found.get(RTA_VIA, b""),
        weight,
        bool(flags & RTNH_F_ONLINK),
        found.get(RTA_FLOW, b"") if flow else b"",
        bool(flags & RTNH_F_DEAD),
        encap,
        name,
    )


def hops(message: Message) -> Iterator[Hop]:
    """The next hops that a route's message names."""
    found = message.attributes(ROUTE)
    flags = message.fields(ROUTE)[8]
    if RTA_OIF in found:
        yield _hop(rtnetlink.number(found[RTA_OIF]), flags, 0, found, False)
    several, at = found.get(RTA_MULTIPATH, b""), 0
    while at + HOP.size <= len(several):
        length, hop_flags, weight, ifindex = HOP.unpack_from(several, at)
        if length < HOP.size:
            return
        inner = rtnetlink.attributes(several[at + HOP.size : at + length])
        yield _hop(ifindex, hop_flags, weight, inner, True)
        at += (length + 3) & ~3


def _nexthops(netlink: Netlink, number: int, family: int, weight: int = 0) -> Iterator[Hop]:
    """A next hop object's, or a group's; a kernel with ``nexthop_compat_mode`` 0 does not say them in routes."""
    try:
        (message,) = netlink.ask(RTM_GETNEXTHOP, NEXTHOP.pack(0, 0, 0, 0, 0), {NHA_ID: struct.pack("=I", number)})
    except OSError:
        return  # it has gone meanwhile, and an event will tell
    hop_family, _, _, _, flags = message.fields(NEXTHOP)
    found = message.attributes(NEXTHOP)
    group = found.get(NHA_GROUP, b"")
    for at in range(0, len(group) - MEMBER.size + 1, MEMBER.size):
        member, member_weight, _, _ = MEMBER.unpack_from(group, at)
        yield from _nexthops(netlink, member, family, member_weight)
    if NHA_OIF in found:
        gateway = found.get(NHA_GATEWAY, b"")
        other = gateway and hop_family != family
        yield Hop(
            rtnetlink.number(found[NHA_OIF]),
            b"" if other else gateway,
            struct.pack("=H", hop_family) + gateway if other else b"",
            weight,
            bool(flags & RTNH_F_ONLINK),
            b"",
            bool(flags & RTNH_F_DEAD),
            rtnetlink.number(found.get(NHA_ENCAP_TYPE)),
        )


def parse_route(message: Message) -> Route | None:
    """None for what is not a route that packets of everybody may take."""
    family, bits, source_bits, tos, table, protocol, scope, kind, flags = message.fields(ROUTE)
    if family not in (socket.AF_INET, socket.AF_INET6) or source_bits or flags & RTM_F_CLONED:
        return None
    found = message.attributes(ROUTE)
    size = 4 if family == socket.AF_INET else 16
    return Route(
        ipaddress.ip_network((found.get(RTA_DST, b"").ljust(size, b"\0"), bits)),
        rtnetlink.number(found.get(RTA_TABLE)) or table,
        protocol,
        scope,
        kind,
        rtnetlink.number(found.get(RTA_PRIORITY)),
        tos,
        tuple(hops(message)),
        tuple((attribute, found[attribute]) for attribute in KEPT if attribute in found),
    )


def _parse(netlink: Netlink, message: Message) -> Route | None:
    """As :func:`parse_route`, with the next hops that are objects of their own."""
    route = parse_route(message)
    if not route or route.hops:
        return route
    number = rtnetlink.number(message.attributes(ROUTE).get(RTA_NH_ID))
    return replace(route, hops=tuple(_nexthops(netlink, number, message.fields(ROUTE)[0]))) if number else route


def lookup(netlink: Netlink, to: Address, known: dict[bytes, Route | None] | None = None) -> Route | None:
    """The route to an address as it stands in the tables, with all its next hops.  Raises OSError: there is none.

    ``known``: routes by what the kernel said of them, which of addresses of one route is the same: what was taken apart
    there is not again, and what is new is added.
    """
    message, known = rtnetlink.route(netlink, to, flags=RTM_F_FIB_MATCH), {} if known is None else known
    if message.body not in known:
        known[message.body] = _parse(netlink, message)
    return known[message.body]


def table_of(netlink: Netlink, to: Address) -> int:
    """The number of the table that holds the route to an address.  Raises OSError: there is none."""
    message = rtnetlink.route(netlink, to, flags=RTM_F_LOOKUP_TABLE)
    return rtnetlink.number(message.attributes(ROUTE).get(RTA_TABLE)) or message.fields(ROUTE)[4]


def is_local(netlink: Netlink, address: Address) -> bool:
    """Whether an address is this host's own: the kernel keeps packets to it."""
    try:
        return rtnetlink.route(netlink, address).fields(ROUTE)[7] == RTN_LOCAL
    except OSError:  # no route
        return False


def _covers(message: Message, wanted: Iterable[tuple[int, int]]) -> bool:
    """Whether a route has something to do with any of these prefixes (address as a number, length)."""
    bits = message.fields(ROUTE)[1]
    to = int.from_bytes(message.attributes(ROUTE).get(RTA_DST, b""), "big")
    size = 32 if message.fields(ROUTE)[0] == socket.AF_INET else 128
    return any((to ^ number) >> (size - min(bits, length)) == 0 for number, length in wanted)


def routes(netlink: Netlink, family: int, about: Iterable[Network], protocol: int = 0) -> list[Route]:
    """The routes of every table that lead to, or lie inside, one of these prefixes, in the kernel's order; and all of
    one protocol."""
    wanted = [(int(prefix.network_address), prefix.prefixlen) for prefix in about if family_of(prefix) == family]
    found = []
    for message in netlink.dump(RTM_GETROUTE, ROUTE.pack(family, 0, 0, 0, 0, 0, 0, 0, 0)):
        if message.kind != RTM_NEWROUTE or message.fields(ROUTE)[0] != family:
            continue
        if message.fields(ROUTE)[5] != protocol and not _covers(message, wanted):
            continue
        if route := _parse(netlink, message):
            found.append(route)
    return found


@dataclass(frozen=True, slots=True)
class Rule:
    """A policy rule that names a table to look into."""

    family: int
    priority: int
    table: int
    protocol: int
    header: tuple[int, int, int]  # lengths of destination and source prefix, TOS
    inverted: bool
    selectors: tuple[tuple[int, bytes], ...]
    suppressed: int = -1  # routes with a prefix of this length or shorter do not count

    @property
    def for_ours(self) -> bool:
        """Whether packets of this host itself may be meant."""
        interface = dict(self.selectors).get(FRA_IIFNAME)
        return interface is None or rtnetlink.text(interface) == "lo"

    def _body(self) -> tuple[bytes, dict[int, bytes]]:
        to, source, tos = self.header
        flags = FIB_RULE_INVERT if self.inverted else 0
        more = {
            **dict(self.selectors),
            FRA_PRIORITY: struct.pack("=I", self.priority),
            FRA_TABLE: struct.pack("=I", self.table),
            FRA_PROTOCOL: bytes([self.protocol]),
        }
        return ROUTE.pack(self.family, to, source, tos, 0, 0, 0, FR_ACT_TO_TBL, flags), more

    def add(self, netlink: Netlink) -> None:
        netlink.ask(RTM_NEWRULE, *self._body(), NLM_F_CREATE | NLM_F_EXCL)

    def delete(self, netlink: Netlink) -> None:
        netlink.ask(RTM_DELRULE, *self._body())


def parse_rule(message: Message) -> Rule | None:
    family, to, source, tos, table, _, _, action, flags = message.fields(ROUTE)
    found = message.attributes(ROUTE)
    if action != FR_ACT_TO_TBL or rtnetlink.number(found.get(FRA_L3MDEV)):
        return None
    (suppressed,) = struct.unpack("=i", found.get(FRA_SUPPRESS_PREFIXLEN, b"\xff" * 4))
    return Rule(
        family,
        rtnetlink.number(found.get(FRA_PRIORITY)),
        rtnetlink.number(found.get(FRA_TABLE)) or table,
        rtnetlink.number(found.get(FRA_PROTOCOL)),
        (to, source, tos),
        bool(flags & FIB_RULE_INVERT),
        tuple(sorted((kind, value) for kind, value in found.items() if kind not in NO_SELECTOR)),
        suppressed,
    )


def rules(netlink: Netlink, family: int) -> list[Rule]:
    """The rules that name tables, in the order in which they are asked."""
    messages = netlink.dump(RTM_GETRULE, ROUTE.pack(family, 0, 0, 0, 0, 0, 0, 0, 0))
    found = [parse_rule(message) for message in messages if message.kind == RTM_NEWRULE]
    return [rule for rule in found if rule and rule.family == family]


def best(found: Iterable[Route], rule: Rule, to: Address) -> Route | None:
    """The route that packets to an address take in a rule's table; None if it does not say."""
    host = ipaddress.ip_network(to)
    fitting = [
        route
        for route in found
        if route.table == rule.table
        and route.to.version == to.version
        and not route.tos
        and host.subnet_of(route.to)  # type: ignore[arg-type]
        and not (route.unicast and all(hop.dead for hop in route.hops))
    ]
    # Of equals the first.
    chosen = min(fitting, key=lambda route: (-route.to.prefixlen, route.priority), default=None)
    return chosen if chosen and chosen.to.prefixlen > rule.suppressed else None


#: Datagrams that are read at a time.
AT_ONCE = 1024


class Events:
    """What changes of links, addresses, routes, rules, next hops and filters in this network namespace."""

    # RTNLGRP_LINK, TC, IPV4_IFADDR, IPV4_ROUTE, IPV4_RULE, IPV6_IFADDR, IPV6_ROUTE, IPV6_RULE, NEXTHOP
    GROUPS = sum(1 << group - 1 for group in (1, 4, 5, 7, 8, 9, 11, 19, 32))

    def __init__(self) -> None:
        self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, 0)
        self._sock.bind((0, self.GROUPS))

    def fileno(self) -> int:
        return self._sock.fileno()

    def concern(self, prefixes: Iterable[Network]) -> bool:
        """Read what has come, of a flood a part; whether any of it may concern packets to these prefixes."""
        wanted = {family: [] for family in (socket.AF_INET, socket.AF_INET6)}  # type: dict[int, list[tuple[int, int]]]
        for prefix in prefixes:
            wanted[family_of(prefix)].append((int(prefix.network_address), prefix.prefixlen))
        found = False
        for _ in range(AT_ONCE):
            try:
                data = self._sock.recv(rtnetlink.ROOM)
            except BlockingIOError:
                break
            except OSError:  # ENOBUFS: some are lost, and any of them may have concerned us
                found = True
                continue
            for message in rtnetlink.parse(data):
                if message.kind in (RTM_NEWROUTE, RTM_DELROUTE):
                    found |= _covers(message, wanted.get(message.fields(ROUTE)[0], ()))
                else:
                    found = True
        return found

    def close(self) -> None:
        self._sock.close()
