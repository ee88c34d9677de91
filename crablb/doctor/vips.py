"""A VIP: whose address it is, who answers for it, who listens there."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

from crablb.doctor import asking
from crablb.doctor.finding import Finding, fault, note, ok, warning
from crablb.kernel import routing, rtnetlink
from crablb.kernel.netlink import HopState, NextHop
from crablb.kernel.rtnetlink import LINK, Listener, Netlink
from crablb.model import Address, Announce, Closed, Config, Vip

__all__ = [
    "Place",
    "Told",
    "addresses",
    "listening",
    "many",
    "read_answers",
    "read_listeners",
    "read_places",
    "whose",
]


class Told(Enum):
    """What its load balancer does for a VIP, as far as that is known."""

    ANNOUNCED = "it answers for it"
    WITHDRAWN = "it does not, for want of a quorum"
    NOT = "it is not to"
    UNKNOWN = "nobody knows what it is to do"
    NOBODY = "none runs"
    STOPPED = "its process is there and does nothing"
    PLANNED = "it is to from its first start on"


@dataclass(frozen=True, slots=True)
class Place:
    """A VIP's address, and what is known of it here."""

    address: Address
    port: int = 80  # of one of its services
    main: bool = False  # this machine itself is reached by it
    local: bool = False  # it is an address of this machine
    segment: str = ""  # the interface whose segment it lies on; empty: routers have to know the way
    forwards: bool = False  # the machine forwards packets of its family


# ---- read ----


def _forwards(address: Address) -> bool:
    name = "ipv4/ip_forward" if address.version == 4 else "ipv6/conf/all/forwarding"
    with open(f"/proc/sys/net/{name}") as file:
        return file.read().strip() == "1"


def read_places(vips: Iterable[Vip], hops: Mapping[Address, NextHop]) -> list[Place]:
    """``hops``: those of the VIPs' addresses.  Raises OSError."""
    ports: dict[Address, int] = {}
    for vip in vips:
        ports.setdefault(vip.address, vip.port)
    with Netlink() as netlink:
        main = rtnetlink.reached_by(netlink)
        local = {address for address in ports if routing.is_local(netlink, address)}
        links = [(link.fields(LINK)[2], link.attributes(LINK)) for link in rtnetlink.links(netlink)]
    names = {index: rtnetlink.text(found.get(rtnetlink.IFLA_IFNAME)) for index, found in links}

    def segment(address: Address) -> str:
        hop = hops.get(address)
        near = hop and hop.on_link and hop.state in (HopState.RESOLVED, HopState.UNRESOLVED)
        return names.get(hop.ifindex, "") if hop and near else ""

    return [Place(a, port, str(a) in main, a in local, segment(a), _forwards(a)) for a, port in ports.items()]


def read_answers(interfaces: Iterable[str], places: Iterable[Place]) -> list[tuple[Place, dict[str, str]]]:
    """Who else answers for each: MAC address -> interface.  Raises OSError, :class:`crablb.errors.KernelError`."""
    foreign = [place for place in places if not place.local]
    answers = asking.ask_all({interface: [place.address for place in foreign] for interface in interfaces})
    found: dict[Address, dict[str, str]] = {}
    for (interface, address), macs in answers.items():
        found[address] = found.get(address, {}) | dict.fromkeys(macs, interface)
    return [(place, found[place.address]) for place in foreign if place.address in found]


def read_listeners(vips: Iterable[Vip]) -> list[Listener]:
    """Programs of this machine that listen at a VIP and its port, or would get its connections if they came so far."""
    listeners = list(rtnetlink.tcp_listeners())
    with Netlink() as netlink:
        return [
            Listener(vip.address, vip.port)
            for vip in vips
            if any(_takes(one, vip, routing.is_local(netlink, vip.address)) for one in listeners)
        ]


def _takes(one: Listener, vip: Vip, local: bool) -> bool:
    if one.port != vip.port:
        return False
    everybody = one.address.is_unspecified and (one.both or one.address.version == vip.address.version)
    return one.address == vip.address or (local and everybody)


# ---- judge ----


def many(count: int) -> Iterator[Finding]:
    """``count``: of addresses."""
    if count > asking.MOST:
        yield note(
            "vips-many",
            f"who answers is asked for {asking.MOST} of {count:,} addresses",
            "questions for all of them would be a flood",
        )


def addresses(place: Place, config: Config | None, arriving: bool) -> Iterator[Finding]:
    """Whose address it is.  ``arriving``: SYNs have come in."""
    if place.main and not (config and config.allow_own_address):
        yield fault(
            "vip-own-address",
            f"{place.address} is this machine's own address",
            f"nobody would reach its port {place.port} any more; crablb serve is refused",
            "an address beside it for the VIP, or if it is meant: --allow-own-address",
        )
    elif place.local and config and config.announce is Announce.ARP:
        yield warning(
            "vip-local",
            f"{place.address} is an address of this machine, and announce = 'arp'",
            "the kernel answers for it too, also while another machine has it",
            f"take it off: ip addr del {place.address} dev IF; or leave announce out, if keepalived moves it",
        )
    elif place.local:
        yield note(
            "vip-local",
            f"{place.address} is an address of this machine, as keepalived makes it",
            "the kernel answers for it, and at ports that are no service's",
        )
    elif config and config.closed is Closed.PASS and place.forwards:
        yield warning(
            "vip-loop",
            f"closed = 'pass', and the machine forwards packets to {place.address}",
            "what is no service's goes round between it and a router until its TTL is used up",
            "closed = 'auto'",
        )
    if not place.local and not place.segment and not arriving:
        yield note(
            "vip-routed",
            f"{place.address} lies on no segment of this machine",
            "a router has to send its packets here",
            f"on it: ip route add {place.address} via ADDRESS-OF-THIS-MACHINE",
        )


def listening(found: Collection[Listener]) -> Iterator[Finding]:
    for one in found:
        yield warning(
            "vip-listener",
            f"a program of this machine listens at {one.address}, port {one.port}",
            "it gets nothing while crablb serves: XDP is in front of it",
            f"ss -ltnp sport = :{one.port}",
        )


def whose(
    place: Place,
    answers: Mapping[str, str],
    told: Told,
    arriving: bool,
    backends: Mapping[str, list[Address]],
) -> Iterator[Finding]:
    """Who answers for it.  ``answers``: MAC address -> interface, of others; ``arriving``: its load balancer has seen
    SYNs, to it or to another VIP; ``backends``: by MAC address."""
    for mac, interface in sorted(answers.items()):
        if mac in backends:
            names = ", ".join(map(str, backends[mac]))
            yield fault(
                "vip-at-backend",
                f"backend {names} ({mac}) answers for {place.address} on {interface}",
                "clients on the segment go there, past the load balancer",
                "on that server: sysctl -w net.ipv4.conf.all.arp_ignore=1 net.ipv4.conf.all.arp_announce=2, or crablb"
                " agent server --dsr",
            )
        else:
            yield warning(
                "vip-elsewhere",
                f"{mac} answers for {place.address} on {interface}",
                "its packets go there, not here; as they should if that is the other one of two load balancers",
                f"ip neigh show | grep {mac}; arping -I {interface} {place.address}",
            )
    if not answers and place.segment:
        yield _unanswered(place, told, arriving)


def _unanswered(place: Place, told: Told, arriving: bool) -> Finding:
    """On its segment nobody else answers for it.  What came in before counts only for a load balancer that runs."""
    what = f"nobody answers for {place.address} on {place.segment}"
    lost = "who is on the segment and does not know it yet, as the router perhaps, cannot find it"
    match told:
        case Told.ANNOUNCED:
            return ok("vip", f"nobody else answers for {place.address}, and it is announced")
        case Told.PLANNED:
            return ok("vip", f"nobody answers for {place.address} yet; crablb serve will")
        case Told.WITHDRAWN:
            return warning("vip-unanswered", f"{what}: it is withdrawn", f"{lost}; see quorum-lost", "crablb backends")
        case Told.NOBODY:
            return warning(
                "vip-unanswered", f"{what}: its load balancer does not run", lost, "start crablb serve again"
            )
        case Told.STOPPED:
            return warning("vip-unanswered", f"{what}: its load balancer is stopped", lost, "see daemon-stopped")
        case Told.NOT | Told.UNKNOWN if arriving:
            return ok("vip", f"nobody else answers for {place.address}, and SYNs to VIPs have come in")
        case _:
            tell = note if told is Told.UNKNOWN else warning
            return tell(
                "vip-unanswered",
                what,
                f"{lost}, unless it has a route by this machine",
                "announce = 'arp' (--announce arp), keepalived, or a route to it by this machine",
            )
