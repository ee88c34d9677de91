"""A server's side of Multipath TCP: clients without an agent are told, inside the connection, to come to this host's
own address, and not by the load balancer.

Source: RFC 8684 (3.1 the C flag, 3.3.8 MP_PRIO, 3.4.1 ADD_ADDR); Documentation/networking/mptcp-sysctl.rst.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from ipaddress import ip_address, ip_network
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import structlog

from crablb.agent import limits
from crablb.errors import ConfigError, KernelError, Problems
from crablb.kernel import mptcp, pins, rtnetlink
from crablb.kernel.mptcp import Endpoint, Flag, Limits, PathManager, Subflow, Unsupported
from crablb.kernel.rtnetlink import Netlink
from crablb.model import Address, Network, Vip

Mode = Literal["backup", "leave"]
MODES: tuple[Mode, ...] = get_args(Mode)
Note = Callable[[dict[str, Any]], None]

log = structlog.get_logger()

#: Peers open no further subflows to the VIP, which the load balancer would send to any server (RFC 8684, 3.1: C).
JOINS_AT_VIP = "allow_join_initial_addr_port"
#: Further subflows that a connection has room for: one for each of the client's ways.
SUBFLOWS = 2
#: Of net.mptcp, who leads connections: its name today, and before Linux 6.15.
MANAGERS = ("path_manager", "pm_type")
ROLE = "server"
#: Seconds between looks at all connections.
LOOK = 1.0
#: Looks at which somebody's other way may give no answer before those that can leave do so without waiting for it.
PATIENCE = 3
#: Endpoints that the kernel takes (MPTCP_PM_ADDR_MAX).
ENDPOINTS = 8
TIMESTAMPS = Path("/proc/sys/net/ipv4/tcp_timestamps")  # for IPv6 too


@dataclass(frozen=True, slots=True)
class Mptcp:
    """What an agent is asked to do.

    ``addresses``: this host's own, that clients are told; ``port``: where the kernel listens for further subflows, 0:
    where the application does; ``clients``: who is told (empty: all; ``leave`` only).
    """

    addresses: tuple[Address, ...]
    mode: Mode = "backup"
    port: int = 0
    clients: tuple[Network, ...] = ()

    def __str__(self) -> str:
        addresses = [f"--mptcp-address {address}" for address in self.addresses]
        clients = [f"--redirect-clients {prefix}" for prefix in self.clients]
        port = [f"--mptcp-port {self.port}"] if self.port else []
        return " ".join([f"--mptcp={self.mode}", *addresses, *port, *clients])


def own_addresses(vips: Iterable[Vip], asked: Sequence[Address], peers: Iterable[Address]) -> list[Address]:
    """The addresses of this network namespace that clients of the VIPs are to be told.

    ``asked``: what somebody chose; otherwise, by family, the one that packets to ``peers``, the load balancers, come
    from, or the one that there is.  Raises :class:`ConfigError`.
    """
    vips = list(vips)
    taken = {vip.address for vip in vips}
    problems = Problems()
    with Netlink() as netlink:
        here = {ip_address(text) for text in rtnetlink.addresses(netlink) if text}
        for address in asked:
            if address not in here:
                problems.add("--mptcp-address", f"{address} is no address of this host (see ip addr)")
            elif address in taken:
                problems.add("--mptcp-address", f"{address} is a VIP; name this host's own address")
        if asked:
            problems.finish()
            return list(dict.fromkeys(asked))
        reached = [ip_address(text) for text in rtnetlink.reached_by(netlink)]
        found = []
        for version in dict.fromkeys(vip.address.version for vip in vips):
            sources = [_source(netlink, peer) for peer in peers if peer.version == version]
            known = [source for source in sources if source in here]
            candidates = sorted(
                a for a in known or reached if a.version == version and not a.is_link_local and a not in taken
            )
            if len(set(candidates)) == 1:
                found.append(candidates[0])
                continue
            said = ", ".join(map(str, candidates)) or "none"
            problems.add(
                "",
                f"--mptcp: which address of this host clients are to be told is not clear (IPv{version}: {said}); name"
                " the one that load balancers know this backend by: --mptcp-address ADDRESS",
            )
    problems.finish()
    return found


def _source(netlink: Netlink, peer: Address) -> Address | None:
    try:
        text = rtnetlink.address(rtnetlink.route(netlink, peer).attributes(rtnetlink.ROUTE).get(rtnetlink.RTA_PREFSRC))
    except OSError:  # no route
        return None
    return ip_address(text) if text else None


def problems(vips: Collection[Vip], wanted: Mptcp, state: Mapping[str, Any] | None) -> list[str]:
    """Why it cannot be in this network namespace, whose agent before left ``state``; empty if it can."""
    try:
        mptcp.require()
        _sysctls(wanted.mode)
        with PathManager() as manager:
            there = manager.endpoints()
    except Unsupported as error:
        return [f"--mptcp: {error}"]
    found = misfits(vips, wanted, there, state)
    mine = _ours(state)
    for key, flags in _endpoints(vips, wanted).items():
        for one in there:
            if (one.address, one.port) == key and key not in mine and one.flags not in (flags, Flag.IMPLICIT):
                own = flags == Flag.SIGNAL and not key[1] and port_of(key[0], 1)
                found.append(
                    f"--mptcp: {one} is an MPTCP endpoint of another program's (NetworkManager makes such: nmcli"
                    f" connection modify NAME connection.mptcp-flags disabled); remove it: ip mptcp endpoint delete id"
                    f" {one.id}{', or let the kernel listen on a port of its own: --mptcp-port PORT' if own else ''}"
                )
    name = next((name for name in MANAGERS if mptcp.sysctl(name).exists()), "")
    _, set_ = (state or {}).get("sysctls", {}).get(name, ("", ""))
    if name and _read(name) not in ("kernel", "0", set_):
        found.append(
            f"--mptcp: connections are led by another program (net.mptcp.{name} is {_read(name)}; mptcpd?); end it,"
            f" and: sysctl -w net.mptcp.{name}={'kernel' if name == 'path_manager' else 0}"
        )
    if wanted.mode == "leave":
        others = [one for one in there if Flag.SIGNAL in one.flags and (one.address, one.port) not in mine]
        found += [
            f"--mptcp=leave: {one} is announced by the kernel for another program, and would not be any more; remove"
            f" it: ip mptcp endpoint delete id {one.id}, or use --mptcp=backup"
            for one in others
        ]
    return found


def misfits(
    vips: Collection[Vip], wanted: Mptcp, there: Iterable[Endpoint], state: Mapping[str, Any] | None
) -> list[str]:
    """Why these VIPs cannot be led together, beside the kernel's endpoints that are there."""
    found = [
        f"--mptcp-port {wanted.port}: it is {vip}'s, and for further subflows alone; choose one that no VIP has"
        for vip in vips
        if vip.port == wanted.port
    ]
    ours = _endpoints(vips, wanted)
    others = {(one.address, one.port) for one in there} - ours.keys() - _ours(state)
    if len(ours) + len(others) > ENDPOINTS:
        theirs = f", beside {len(others)} of others" if others else ""
        found.append(
            f"--mptcp={wanted.mode}: the kernel takes {ENDPOINTS} MPTCP endpoints; the VIPs' addresses and this host's"
            f" are {len(ours)}{theirs}; use --mptcp=leave, or fewer VIPs"
        )
    return found


def check(vips: Collection[Vip], state: Mapping[str, Any]) -> None:
    """Raises :class:`ConfigError` if the agent that noted ``state`` cannot lead clients of all these VIPs."""
    with PathManager() as manager:
        if found := misfits(vips, of(state), manager.endpoints(), state):
            raise ConfigError(found)


def unled(vips: Iterable[Vip], wanted: Mptcp) -> list[str]:
    """Which clients are not led, or not all, by what was asked for; in words."""
    vips = list(vips)
    told = {address.version for address in wanted.addresses}
    found = []
    for vip in vips:
        if vip.address.version not in told:
            stay = "clients" if wanted.mode == "leave" else "clients that have no other"
            found.append(
                f"{vip}: no IPv{vip.address.version} address of this host is told; {stay} stay with the load balancer"
                " (--mptcp-address)"
            )
    served = {vip.address.version for vip in vips}
    return found + [
        f"--redirect-clients {prefix}: no VIP is of IPv{prefix.version}"
        for prefix in wanted.clients
        if prefix.version not in served
    ]


def _key(address: str, port: int) -> tuple[Address, int]:
    return ip_address(address), port


def _sysctls(mode: Mode) -> dict[str, str]:
    """What sysctls of net.mptcp are to be.  Raises :class:`Unsupported`."""
    if not mptcp.sysctl(JOINS_AT_VIP).exists():
        raise Unsupported(
            f"the kernel cannot keep clients from joining at the VIP (net.mptcp.{JOINS_AT_VIP}, Linux 5.14)"
        )
    wanted = {JOINS_AT_VIP: "0"}
    try:
        name, kernel, program = mptcp.manager_sysctl()
    except Unsupported:
        if mode == "leave":
            raise
    else:
        wanted[name] = program if mode == "leave" else kernel
    return wanted


def _read(name: str) -> str:
    return mptcp.sysctl(name).read_text().strip()


def port_of(address: Address, port: int) -> int:
    """An IPv6 address with a port has no room in a segment beside timestamps: 30 of 40 bytes, and 12."""
    return port if address.version == 4 or not int(TIMESTAMPS.read_text()) else 0


def _endpoints(vips: Iterable[Vip], wanted: Mptcp) -> dict[tuple[Address, int], Flag]:
    """The kernel's endpoints that there are to be, by address and port."""
    told = {(address, port_of(address, wanted.port)): Flag.SIGNAL for address in wanted.addresses}
    if wanted.mode == "leave":  # the kernel tells nobody of them; it listens
        return {key: flags for key, flags in told.items() if key[1]}
    return told | {(vip.address, 0): Flag.BACKUP for vip in vips}


def of(state: Mapping[str, Any]) -> Mptcp:
    """What was asked for, of what was noted."""
    return Mptcp(
        tuple(map(ip_address, state["addresses"])),
        state["mode"],
        state["port"],
        tuple(ip_network(text) for text in state["clients"]),
    )


# ---- what is to be, and what is ----


def set_up(vips: Sequence[Vip], wanted: Mptcp, before: Mapping[str, Any] | None, note: Note) -> None:
    """Prepare this network namespace.  ``note(state)`` is told, before each step, what :func:`tear_down` must undo.

    ``before``: what an agent that was there noted; what is the same stays, and with it the connections that live by it.
    """
    sysctls = _sysctls(wanted.mode)
    state: dict[str, Any] = {
        "mode": wanted.mode,
        "addresses": [str(address) for address in wanted.addresses],
        "port": wanted.port,
        "clients": [str(prefix) for prefix in wanted.clients],
        "endpoints": [[str(address), port] for address, port in sorted(_ours(before), key=str)],
        "sysctls": {},
    }
    held = dict((before or {}).get("sysctls", {}))
    for name, value in sysctls.items():
        state["sysctls"][name] = [held.pop(name, [_read(name)])[0], value]
    note(state)
    _restore(held)
    pins.forget(_left_path())
    with PathManager() as manager:
        unwanted = _ours(state) - _endpoints(vips, wanted).keys()
        _forget(state, _withdraw(manager, unwanted), unwanted, note)
    for said in unled(vips, wanted):
        log.warning("some clients are not led past the load balancer", which=said)
    for address in wanted.addresses:
        if port_of(address, wanted.port) != wanted.port:
            log.warning(
                "an IPv6 address with a port does not fit beside TCP timestamps (net.ipv4.tcp_timestamps); it is told"
                " without, so that the application must listen on it too",
                address=str(address),
            )
    sync(vips, state, note, mend=True)


def sync(vips: Iterable[Vip], state: dict[str, Any], note: Note, *, mend: bool) -> list[str]:
    """What is not as it is to be; ``mend``: make it so.  Raises :class:`KernelError` if some of it cannot be."""
    mptcp.require()
    found, wanted = [], of(state)
    for name, (_, value) in state["sysctls"].items():
        if (now := _read(name)) != value:
            what = "further subflows come to the VIP"
            if name in MANAGERS:
                other = "another program leads connections (mptcpd?)"
                what = "clients are told nothing" if wanted.mode == "leave" else other
            found.append(f"net.mptcp.{name} is {now}, not {value}: {what}")
            if mend:
                mptcp.sysctl(name).write_text(value)
    with Netlink() as netlink:
        here = {ip_address(text) for text in rtnetlink.addresses(netlink) if text}
    found += [
        f"{address} is no address of this host any more: clients are told of it in vain; give it back, or start the"
        " agent anew with the new one"
        for address in wanted.addresses
        if address not in here
    ]
    with PathManager() as manager:
        subflows = manager.limits().subflows
        if subflows < SUBFLOWS:
            found.append(f"connections may have {subflows} further subflows, not {SUBFLOWS} (ip mptcp limits)")
        if mend:
            limits.ask(ROLE, Limits(0, SUBFLOWS))
        there = {(one.address, one.port): one for one in manager.endpoints()}
        for (address, port), flags in _endpoints(vips, wanted).items():
            one = there.get((address, port))
            if one and one.flags & flags == flags:
                continue
            what = "the way by it is not for emergencies only" if flags == Flag.BACKUP else "clients are not told of it"
            found.append(f"{address} is no MPTCP endpoint: {what}")
            if mend:
                if [str(address), port] not in state["endpoints"]:
                    state["endpoints"].append([str(address), port])
                    note(state)
                if one and (address, port) in _ours(state) and flags == Flag.BACKUP:
                    manager.set_flags(Endpoint(address, one.id, one.flags | flags))
                else:
                    _add(manager, Endpoint(address, flags=flags, port=port))
    return found


def _add(manager: PathManager, endpoint: Endpoint) -> None:
    try:
        manager.add(endpoint)
    except KernelError as error:
        if not endpoint.port:
            raise
        raise KernelError(
            f"{error}; the kernel is to listen on port {endpoint.port} of {endpoint.address} itself: choose one that"
            " nobody has: --mptcp-port"
        ) from None


def remove(addresses: Iterable[Address], state: dict[str, Any], note: Note) -> None:
    """Serve these VIPs' addresses no more."""
    gone = {(address, 0) for address in addresses} & _ours(state)
    with PathManager() as manager:
        _forget(state, _withdraw(manager, gone), gone, note)


def tear_down(state: Mapping[str, Any]) -> None:
    """Undo what :func:`set_up` noted, but for what somebody has changed since, and endpoints that connections live by:
    these stay, and are the next agent's."""
    try:
        with PathManager() as manager:
            stay = _withdraw(manager, _ours(state))
        limits.release(ROLE)
    except Unsupported:
        return
    _restore(state.get("sysctls", {}))
    if stay:
        pins.note(_left_path(), json.dumps([[str(address), port] for address, port in stay]))
    else:
        pins.forget(_left_path())


def _restore(sysctls: Mapping[str, Sequence[str]]) -> None:
    """Put back what nobody has changed since: name, and what it was before and what we made of it."""
    for name, (before, ours) in sysctls.items():
        with suppress(FileNotFoundError):
            if _read(name) == ours:
                mptcp.sysctl(name).write_text(before)


def _ours(state: Mapping[str, Any] | None) -> set[tuple[Address, int]]:
    """The endpoints that agents have made, by address and port."""
    return {_key(*entry) for entry in (state or {}).get("endpoints", ())} | left()


def _left_path() -> Path:
    return pins.RUN / f"{pins.namespace()}-mptcp.json"


def left() -> set[tuple[Address, int]]:
    """Endpoints that stayed when an agent went."""
    try:
        return {_key(*entry) for entry in json.loads(_left_path().read_text())}
    except FileNotFoundError:
        return set()
    except (ValueError, TypeError) as error:  # somebody else's writing
        log.warning("endpoints that an agent has left are not known", file=str(_left_path()), reason=str(error))
        return set()


def staying() -> list[Endpoint]:
    """Those of :func:`left` that are there yet."""
    keys = left()
    if not keys:
        return []
    with suppress(Unsupported), PathManager() as manager:
        return [one for one in manager.endpoints() if (one.address, one.port) in keys]
    return []


def left_in_words() -> list[str]:
    """What :func:`staying` finds, and what follows for clients."""
    return [
        f"MPTCP endpoint {one}, as connections live by it"
        + ("; new MPTCP clients are told of it" if Flag.SIGNAL in one.flags else "")
        for one in staying()
    ]


def _forget(state: dict[str, Any], stay: set[tuple[Address, int]], gone: set[tuple[Address, int]], note: Note) -> None:
    state["endpoints"] = [entry for entry in state["endpoints"] if _key(*entry) in stay or _key(*entry) not in gone]
    note(state)


def _withdraw(manager: PathManager, keys: set[tuple[Address, int]]) -> set[tuple[Address, int]]:
    """Remove endpoints, by address and port, but for those that connections would end by; which these are.

    With an endpoint the kernel closes the subflows of its address, the VIP's being the first; a connection without
    another one hangs until its application gives up.
    """
    stay: set[tuple[Address, int]] = set()
    mine = [one for one in manager.endpoints() if (one.address, one.port) in keys]
    told = [one for one in mine if Flag.SIGNAL in one.flags]
    for one in (*told, *(one for one in mine if one not in told)):  # connections go back to the VIP's way first
        if Flag.BACKUP in one.flags and stay.isdisjoint((other.address, other.port) for other in told):
            manager.set_flags(replace(one, flags=one.flags & ~Flag.BACKUP))
        if live := leaving(one.address).cannot:
            log.warning(
                "an MPTCP endpoint stays, as connections live by it; it is the next agent's",
                endpoint=str(one),
                connections=live,
                remove="crablb agent remove server",
            )
            stay.add((one.address, one.port))
        else:
            with suppress(KernelError):  # somebody else has removed it
                manager.remove(one)
    return stay


# ---- connections ----


def connections() -> dict[int, list[Subflow]]:
    """The subflows of each MPTCP connection of this network namespace, by its token."""
    found = defaultdict(list)
    for subflow in mptcp.subflows():
        found[subflow.token].append(subflow)
    return found


class Ready(NamedTuple):
    """Connections with a subflow at an address, that are to leave it."""

    can: list[list[Subflow]]  # their subflows there; they have another way, which is proven to work
    cannot: int  # those without, which would hang without the address
    silent: int  # of these, how many have another way, which did not answer


def leaving(address: Address) -> Ready:
    """Those at this local address."""

    def here() -> list[list[Subflow]]:
        return [ways for ways in connections().values() if any(one.local == address for one in ways)]

    def others(ways: Iterable[Subflow]) -> list[Subflow]:
        return [one for one in ways if one.established and one.local != address]

    proven = mptcp.answering([one for ways in here() for one in others(ways)])
    can, stuck = [], []
    for ways in here():  # more may have come while answers were waited for
        if any(one.ends in proven for one in ways):
            can.append([one for one in ways if one.local == address])
        else:
            stuck.append(ways)
    return Ready(can, len(stuck), sum(bool(others(ways)) for ways in stuck))


def ways(vips: Collection[Vip], told: Collection[Address]) -> dict[str, int]:
    """Open MPTCP connections to VIPs by the ways that they have: by the load balancer, by both, only directly."""
    at = {(vip.address, vip.port) for vip in vips}
    counts = dict.fromkeys(("load_balancer", "both", "direct"), 0)
    for subflows in connections().values():
        first = any((one.local, one.local_port) in at for one in subflows)
        # What was led away has an id of its own; what came by redirection was there first.
        direct = any(one.local in told and one.id and one.established for one in subflows)
        if first or direct:
            counts["both" if first and direct else "direct" if direct else "load_balancer"] += 1
    return counts


class Leaving:
    """Lets open connections leave the way by the load balancer, where the kernel leads them."""

    def __init__(self) -> None:
        self._looked = -LOOK
        self._waited: dict[Address, int] = {}
        self._said: tuple[int, int] | None = None

    def __call__(self, vips: Iterable[Vip]) -> None:
        """Those to these VIPs' addresses.  Called as often as somebody wants it, it looks once in a while."""
        now = time.monotonic()
        if now - self._looked < LOOK:
            return
        self._looked = now
        said = leave_now(vips, self._waited)
        if said != self._said and any(said):
            log.info("MPTCP connections leave the load balancer", left=said[0], cannot=said[1])
        self._said = said


def leave_now(vips: Iterable[Vip], waited: dict[Address, int] | None = None) -> tuple[int, int]:
    """Have the first subflows of these VIPs' addresses closed; how many connections leave so, and how many cannot yet.

    The kernel closes those of all connections to an address or of none, and a connection without another subflow that
    works would hang: where there are such, the others are ended each by itself, by a RST, of which load balancers see
    nothing.  One that is made between the last look and the closing, a millisecond or so, is not seen, and hangs.

    ``waited``: how many looks in a row somebody's other way gave no answer, by address, to be kept by whoever looks
    again and again: a busy host answers late, so for :data:`PATIENCE` looks nobody is ended by RST for that.
    """
    left = stay = 0
    with PathManager() as manager:
        for address in dict.fromkeys(vip.address for vip in vips):
            can, cannot, silent = leaving(address)
            stay += cannot
            if waited is not None:
                waited[address] = waited.get(address, 0) + 1 if silent else 0
                if 0 < waited[address] <= PATIENCE:
                    stay += len(can)
                    continue
            left += len(can)
            if cannot:
                for one in chain.from_iterable(can):
                    _destroy(one)
            elif can:
                manager.flush_initial(address)
    return left, stay


def _destroy(one: Subflow) -> None:
    rtnetlink.destroy_tcp(one.local, one.local_port, one.remote, one.remote_port)


def lacking(vips: Iterable[Vip]) -> dict[Vip, str]:
    """Why MPTCP clients find nobody at these VIPs, of those where it is so."""
    found = {}
    listeners = list(rtnetlink.tcp_listeners())
    for vip in vips:
        here = [one for one in listeners if one.port == vip.port]
        if here and not any(one.upper == "mptcp" for one in here):
            found[vip] = (
                f"{vip}: what listens there takes no MPTCP; have it open MPTCP sockets (many programs have an option"
                " for it), or start it by: mptcpize run"
            )
    return found


def status(vips: Collection[Vip], state: Mapping[str, Any]) -> dict[str, Any]:
    """``state``; what clients are told, and which are not led; the open connections by the ways that they have."""
    wanted = of(state)
    told = [(address, port_of(address, wanted.port)) for address in wanted.addresses]
    return {
        **state,
        "told": [f"{address} port {port}" if port else str(address) for address, port in told],
        "unled": unled(vips, wanted),
        "connections": ways(vips, wanted.addresses),
    }
