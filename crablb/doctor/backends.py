"""The ways to the backends: routes, neighbours, tunnels."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

from crablb.control import advice
from crablb.doctor import asking
from crablb.doctor.finding import Finding, fault, note, ok, warning
from crablb.doctor.interfaces import Port
from crablb.kernel import routing
from crablb.kernel.interface import interface_name
from crablb.kernel.netlink import HopState, NextHop
from crablb.kernel.rtnetlink import Netlink
from crablb.model import Address, Bypass, Config, Fallback, Service

__all__ = ["Way", "answering", "far", "fits", "judge", "macs", "many", "read", "read_tables", "some", "tables"]

MAIN_TABLE = 254
#: Backends that are looked at; the way to each costs some 200 us.
MOST = 2000


@dataclass(frozen=True, slots=True)
class Way:
    """To one backend.  ``asked``: MAC addresses that answered when it (or its gateway) was asked for; None: it was not,
    as the kernel knows its own."""

    address: Address
    hop: NextHop
    interface: str = ""
    asked: Collection[str] | None = None


def read(hops: Mapping[Address, NextHop]) -> list[Way]:
    """Those that the kernel has not resolved are asked for.  Raises OSError, :class:`crablb.errors.KernelError`."""
    names = {index: interface_name(index, "") for index in {hop.ifindex for hop in hops.values() if hop.ifindex}}
    silent: dict[str, set[Address]] = {}
    for address, hop in hops.items():
        if hop.state is HopState.UNRESOLVED and (name := names.get(hop.ifindex)):
            silent.setdefault(name, set()).add(hop.gateway or address)
    answers = asking.ask_all(silent)
    return [
        Way(address, hop, name := names.get(hop.ifindex, ""), answers.get((name, hop.gateway or address)))
        for address, hop in sorted(hops.items(), key=lambda one: (one[0].version, int(one[0])))
    ]


def answering(ways: Collection[Way]) -> dict[Address, NextHop]:
    """The next hops, those that answered as if the kernel had resolved them."""
    return {way.address: replace(way.hop, state=HopState.RESOLVED) if way.asked else way.hop for way in ways}


def macs(ways: Collection[Way]) -> dict[str, list[Address]]:
    """The backends on the segment by their MAC addresses."""
    found: dict[str, list[Address]] = {}
    for way in ways:
        known = {way.hop.dst_mac.hex(":")} if way.hop.dst_mac else set(way.asked or ())
        for mac in known if way.hop.on_link else ():
            found.setdefault(mac, []).append(way.address)
    return found


def read_tables(addresses: Collection[Address]) -> dict[Address, int]:
    """The tables that the routes to these stand in."""
    found = {}
    with Netlink() as netlink:
        for address in addresses:
            with suppress(OSError):  # no route, which is told elsewhere
                found[address] = routing.table_of(netlink, address)
    return found


def some(addresses: Collection[Address]) -> frozenset[Address]:
    """Those of them that are looked at."""
    return frozenset(sorted(addresses, key=lambda address: (address.version, int(address)))[:MOST])


def many(count: int) -> Iterator[Finding]:
    """``count``: of all backends."""
    if count > MOST:
        yield note(
            "backends-many",
            f"{MOST:,} of {count:,} backends are looked at",
            "the ways to all of them take too long",
            "the load balancer's log names each that it cannot send to",
        )


def tables(found: Mapping[Address, int]) -> Iterator[Finding]:
    for address, table in found.items():
        if table not in (MAIN_TABLE, routing.LOCAL_TABLE):
            yield note(
                "backend-table",
                f"the route to {address} stands in table {table}, not in the main one",
                "a policy rule chose it, for packets of this machine itself; the load balancer goes the same way",
                f"ip route get {address}; ip rule",
            )


def judge(way: Way) -> Iterator[Finding]:
    address, hop, interface = way.address, way.hop, way.interface
    via = f"gateway {hop.gateway} of backend {address}" if hop.gateway else f"backend {address}"
    match hop.state:
        case HopState.RESOLVED:
            yield ok("backend", f"{address} by {interface}" + (f" via {hop.gateway}" if hop.gateway else ""))
        case HopState.UNRESOLVED if way.asked:
            yield ok("backend", f"{via} answers on {interface}")
        case HopState.UNRESOLVED if way.asked is None and hop.asking:
            yield note(
                "backend-unasked",
                f"{via} is not known to the kernel yet, and was not asked for",
                f"{asking.MOST} addresses are asked for on each interface",
            )
        case HopState.UNRESOLVED:
            yield fault(
                "backend-silent",
                f"{via}: {hop.reason}",
                "nothing can be sent there: it gets no connections",
                f"see whether it is up, and on that segment: arping -I {interface} {hop.gateway or address}",
            )
        case HopState.NO_ROUTE:
            yield fault(
                "backend-route",
                f"backend {address}: {hop.reason or 'no route'}",
                "nothing can be sent there: it gets no connections",
                f"ip route get {address}; add one: ip route add {address} via GATEWAY",
            )
        case HopState.NOT_ETHERNET:
            yield fault(
                "backend-not-ethernet",
                f"backend {address}: {hop.reason}",
                "frames are sent, to MAC addresses: it gets no connections",
                "a route without, or another backend",
            )
        case HopState.NOT_A_HOST:
            yield fault(
                "backend-own",
                f"backend {address}: {hop.reason}",
                "it gets no connections",
                "leave it out: the load balancer's own server cannot be one of its backends",
            )


def fits(config: Config, hops: Mapping[Address, NextHop], ports: Collection[Port]) -> Iterator[Finding]:
    """How a configuration and the ways to its backends go together.  ``ports``: the interfaces that are served."""
    for told in advice.narrow_tunnels(config, hops):
        yield warning(
            "tunnel-narrow",
            f"{told.facts['service']}, backend {told.facts['backend']}: {told.text}",
            str(told.facts["reason"]),
            f"ip link set IF mtu 1500 (or more) along the way to {told.facts['backend']}",
        )
    yield from _tunnels(config, hops, ports)
    for service in config.services:
        for backend in service.backends:
            hop = hops.get(backend.address)
            if hop and hop.gateway and service.fallback is Fallback.DSR_L2:
                yield fault(
                    "backend-behind-gateway",
                    f"{service.vip}, backend {backend.address}: fallback = 'dsr-l2', and it is behind {hop.gateway}",
                    "by MAC address the gateway is reached, not the backend: its clients that are not redirected are"
                    " dropped (drop_no_path)",
                    "fallback = 'auto' or 'dsr-ipip'",
                )
    for told in advice.idle(config):
        yield warning(
            "service-idle", f"{told.facts['service']}: {told.text}", str(told.facts["reason"]), "state = 'up'"
        )
    for told in advice.unreached(hops, set(_reached(config, hops, ports))):
        yield note(
            "bypass",
            f"backend {told.facts['backend']}: {told.text}",
            str(told.facts["reason"]),
            "ethtool -K PEER gro on, at the other end of a veth",
        )


def _tunnelled(service: Service, hop: NextHop) -> bool:
    return service.fallback is Fallback.DSR_IPIP or (service.fallback is Fallback.AUTO and not hop.on_link)


def _tunnels(config: Config, hops: Mapping[Address, NextHop], ports: Collection[Port]) -> Iterator[Finding]:
    """Told once: it is so wherever there are tunnels and nobody has made the links on their way wider."""
    most = max((port.info.mtu for port in ports if port.info), default=0)
    rooms = {
        hop.mtu - advice.OUTER_HEADER[backend.address.version]
        for service in config.services
        for backend in service.backends
        if (hop := hops.get(backend.address)) and hop.mtu and _tunnelled(service, hop)
    }
    if rooms and min(rooms) < most:
        yield note(
            "tunnel-mtu",
            f"packets of up to {most} bytes come in, and the tunnels to backends carry {min(rooms)}",
            "clients that are not redirected are told by ICMP errors; where those are filtered, their uploads stall",
            f"an MTU of {most + 40} on the way to the backends, or let ICMP errors reach clients",
        )


def _reached(config: Config, hops: Mapping[Address, NextHop], ports: Collection[Port]) -> Iterator[Address]:
    """Backends that the XDP program reaches, as :func:`crablb.dataplane.attachment.ways` has it, or need not reach."""
    there = {port.info.index: port for port in ports if port.info}
    generic = bool(there) and all(port.native is False for port in there.values())
    for address, hop in hops.items():
        port = there.get(hop.ifindex)
        sends = port is not None and (port.native is False or (port.info is not None and port.info.kind != "veth"))
        if sends or hop.redirect or generic or config.ack_bypass is not Bypass.AUTO:
            yield address


def far(config: Config | None, hops: Mapping[Address, NextHop], index: int) -> bool | None:
    """Whether fallback packets go by tunnels, or out by another interface than one; None: not known."""
    if config is None:
        return None
    for service in config.services:
        for backend in service.backends:
            hop = hops.get(backend.address)
            if not hop or hop.state not in (HopState.RESOLVED, HopState.UNRESOLVED):
                continue
            if _tunnelled(service, hop) or hop.ifindex != index:
                return True
    return False
