"""The VIPs' routes through the client's egress program.

A VIP's own route is left as it is.  In front of each policy rule whose table leads to a VIP stands a copy of the rule
that looks into a table of ours, and there are the same routes, each hop with our program.  So

- whatever decides about a packet to a VIP (a policy rule, the main table) decides as before, and its packets pass our
  program on the same way: all next hops, weights, metrics and sources are the operator's;
- nothing of the operator's is replaced, and nothing that he, or his network manager, adds, replaces or deletes is ours:
  a host route of the same metric in his table would be the first that ``ip route replace`` or ``del`` meets;
- ours are told by their protocol, and taking them away restores what was there, because that was never changed.

What it costs is one more, very short, table in each routing decision.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

from crablb.errors import KernelError
from crablb.kernel import routing, rtnetlink
from crablb.kernel.routing import Route, Rule
from crablb.kernel.rtnetlink import Netlink
from crablb.model import Address, Network

__all__ = ["EGRESS", "Paths", "leads", "look", "remove"]

#: Of our routes and rules (ip route show table all proto 67); nobody's in /etc/iproute2/rt_protos.
PROTOCOL = 67
#: Our tables have the number of the one that they stand for, with these bits turned.
TABLES = 0x43520000
#: Our program; its number is behind it in a route that we make.
EGRESS = "crab_egress"
#: What iproute2 called it in routes that agents of before had made by it.
OLD_EGRESS = "egress:"
FAMILIES = socket.AF_INET, socket.AF_INET6


def _table(rule: Rule) -> int:
    return rule.table ^ TABLES ^ (rule.suppressed + 1) << 24


def leads(netlink: Netlink, address: Address) -> str:
    """Whose route packets to an address take: "agent", "other" or "none"."""
    try:
        found = rtnetlink.route(netlink, address)
    except OSError:
        return "none"
    return "agent" if any(hop.program.startswith(EGRESS) for hop in routing.hops(found)) else "other"


@dataclass
class Paths:
    """What the kernel's tables say of ways to VIPs and backends."""

    vips: Sequence[Address]
    rules: list[Rule] = field(default_factory=list)
    routes: list[Route] = field(default_factory=list)
    ours: tuple[list[Rule], list[Route]] = field(default_factory=lambda: ([], []))
    links: dict[int, str] = field(default_factory=dict)
    local: set[Address] = field(default_factory=set)

    def to(self, address: Address) -> list[tuple[Rule, Route]]:
        """The routes that packets to an address may take, by the rules that choose them."""
        family = routing.family_of(address)
        found = ((rule, routing.best(self.routes, rule, address)) for rule in self.rules if rule.family == family)
        return [(rule, route) for rule, route in found if route and route.unicast]

    def within(self, prefix: Network) -> set[int]:
        """The interfaces that lead to addresses of a prefix."""
        tables = {rule.table for rule in self.rules}
        about = [r for r in self.routes if r.unicast and r.table in tables and r.to.version == prefix.version]
        inside = [r for r in about if r.to.subnet_of(prefix)]  # type: ignore[arg-type]
        around = [r for r in about if prefix.subnet_of(r.to)]  # type: ignore[arg-type]
        longest = max((r.to.prefixlen for r in around), default=0)
        chosen = inside + [r for r in around if r.to.prefixlen == longest]
        return {hop.ifindex for r in chosen for hop in r.hops if not hop.dead}

    def interfaces(self, backends: Iterable[Network]) -> list[str]:
        """By which packets of backends may come in, if they come by the ways that lead to them."""
        found = {hop.ifindex for vip in self.vips for _, route in self.to(vip) for hop in route.hops if not hop.dead}
        for prefix in backends:
            found |= self.within(prefix)
        return sorted(name for index in found if (name := self.links.get(index, "lo")) != "lo")

    def problems(self, backends: Iterable[Network]) -> list[str]:
        """What is wrong with these VIPs and prefixes here."""
        found = []
        for vip in self.vips:
            if vip in self.local:
                found.append(f"{vip} is an address of this host; a client cannot redirect connections to itself")
            elif not (ways := self.to(vip)):
                found.append(f"no route to {vip}; add one, as towards the load balancer")
            elif any(_own_encap(route) for _, route in ways):
                found.append(f"the route to {vip} has an encapsulation of its own, and a route can have one only")
        for prefix in backends:
            if not any(self.links.get(index, "lo") != "lo" for index in self.within(prefix)):
                found.append(f"--backends {prefix}: no route leads there; add one, or leave the prefix out")
        return found

    def wanted(self, program: str) -> tuple[list[Rule], list[Route]]:
        """The rules and routes that are to be ours."""
        rules: list[Rule] = []
        copies: dict[tuple[Address, int], Route] = {}
        for vip in self.vips:
            for rule, route in self.to(vip):
                if _own_encap(route):
                    continue
                table = _table(rule)
                copies[vip, table] = route.through(vip, table, PROTOCOL, program)
                before = max(rule.priority - 1, 0)
                rules.append(replace(rule, priority=before, table=table, protocol=PROTOCOL, suppressed=-1))
        return list(dict.fromkeys(rules)), list(copies.values())

    def sync(self, netlink: Netlink, descriptor: int, program: str, *, mend: bool = True) -> list[str]:
        """What is not as it is to be; ``mend``: make it so.  Raises :class:`KernelError`."""
        rules, routes = self.wanted(program)
        have_rules, have_routes = self.ours
        lacking = [route for route in routes if route not in have_routes]
        stale = {(route.to, route.table) for route in have_routes}
        found = [
            f"the route to {route.to.network_address} has changed, and the agent's copy has not"
            if (route.to, route.table) in stale
            else f"the agent's copy of the route to {route.to.network_address} is missing"
            for route in lacking
        ]
        lacking_rules = [rule for rule in rules if rule not in have_rules]
        found += [f"no rule leads packets to the agent's routes (priority {rule.priority})" for rule in lacking_rules]
        if not mend:
            return found
        what = ""
        try:
            for route in lacking:
                what = f"route to {route.to.network_address}"
                route.put(netlink, descriptor)
            for rule in lacking_rules:
                what = f"routing rule of priority {rule.priority}"
                rule.add(netlink)
        except OSError as error:
            raise KernelError(f"cannot make the agent's {what}: {error.strerror}") from None
        kept = {(route.to, route.table) for route in routes}
        _delete(netlink, [r for r in have_rules if r not in rules])
        _delete(netlink, [r for r in have_routes if (r.to, r.table) not in kept])
        return found


def _own_encap(route: Route) -> bool:
    """Whether a route has an encapsulation already that is not the program of an agent of before."""
    return any(hop.encap and not hop.program.startswith((EGRESS, OLD_EGRESS)) for hop in route.hops)


def _delete(netlink: Netlink, what: Iterable[Rule | Route]) -> None:
    for one in what:
        with suppress(OSError):  # it has gone meanwhile
            one.delete(netlink)


def look(netlink: Netlink, vips: Iterable[Address], backends: Iterable[Network] = ()) -> Paths:
    """Ask the kernel."""
    paths = Paths(list(dict.fromkeys(vips)))
    about = [*(ipaddress.ip_network(vip) for vip in paths.vips), *backends]
    for message in rtnetlink.links(netlink):
        _, _, index, *_ = message.fields(rtnetlink.LINK)
        paths.links[index] = rtnetlink.text(message.attributes(rtnetlink.LINK).get(rtnetlink.IFLA_IFNAME))
    for family in FAMILIES:
        for rule in routing.rules(netlink, family):
            if rule.protocol == PROTOCOL:
                paths.ours[0].append(rule)
            elif rule.table != routing.LOCAL_TABLE and rule.for_ours:
                paths.rules.append(rule)
        for route in routing.routes(netlink, family, about, PROTOCOL):
            if route.protocol == PROTOCOL:
                paths.ours[1].append(replace(route, priority=0))  # IPv6 routes have one, said or not
            else:
                paths.routes.append(route)
    paths.local = {vip for vip in paths.vips if routing.is_local(netlink, vip)}
    return paths


def remove(netlink: Netlink) -> None:
    """Take all of ours away."""
    rules, routes = look(netlink, ()).ours
    _delete(netlink, [*rules, *routes])
