"""What there is to look at, of a machine, some interfaces and a configuration."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

from crablb.agent import ClientAgent, ServerAgent
from crablb.agent.base import Agent
from crablb.api import types
from crablb.doctor import backends, daemon, filters, interfaces, machine, multipath, served, vips
from crablb.doctor.examine import Look, reason, unread
from crablb.doctor.finding import Finding, note, ok, warning
from crablb.doctor.vips import Told
from crablb.errors import KernelError
from crablb.kernel import pins, rtnetlink
from crablb.kernel.netlink import HopState, NextHop, next_hops
from crablb.model import Address, Announce, Config, Vip
from crablb.values import parse_vip

__all__ = ["Subject", "looks"]

T = TypeVar("T")


class Attempt(Protocol):
    """Read something; ``otherwise``, if it cannot be, which is noted."""

    def __call__(self, what: str, read: Callable[[], T], otherwise: T) -> T: ...


@dataclass(frozen=True, slots=True)
class Subject:
    """What is looked at beside the machine.  ``config``: None if it is not known; what a load balancer has in the
    kernel is known all the same."""

    interfaces: tuple[str, ...] = ()
    config: Config | None = None
    vips: tuple[Vip, ...] = ()
    backends: frozenset[Address] = frozenset()
    processes: tuple[int, ...] = ()  # that serve the interfaces

    asked: bool = False  # a process is there that may be asked
    sockets: tuple[Path, ...] = ()  # where
    unread: tuple[Finding, ...] = ()  # what could not be found out about it

    left: bool = False  # what a load balancer that does not run has in the kernel

    @classmethod
    def all(cls, names: Collection[str], config: Config | None) -> list[Subject]:
        """Of these interfaces, or else those of the configuration, or else what is served here; at least one.  Without
        a configuration each load balancer is one by itself, that tells its own."""
        unreadable: list[Finding] = []

        def attempt(what: str, read: Callable[[], T], otherwise: T) -> T:
            try:
                return read()
            except (OSError, KernelError) as error:
                unreadable.append(unread(what, reason(error)))
                return otherwise

        chosen = tuple(names) or (config.interfaces if config else ())
        chosen = chosen or tuple(attempt("what is served here", daemon.names, []))
        nobody: dict[str, int | None] = {}
        held = attempt("who serves here", pins.held, nobody)
        folders = attempt("what is in the kernel", pins.folders, dict[str, Path]())
        groups: dict[int | None, list[str]] = {}
        for name in chosen:
            groups.setdefault(None if config else held.get(f"lb-{name}"), []).append(name)
        found = [cls._of(tuple(group), config, held, folders, attempt) for group in groups.values() or [[]]]
        return [replace(found[0], unread=tuple(unreadable)), *found[1:]]

    @classmethod
    def _of(
        cls,
        chosen: tuple[str, ...],
        config: Config | None,
        held: Mapping[str, int | None],
        folders: Mapping[str, Path],
        attempt: Attempt,
    ) -> Subject:
        owners = {pid: None for name in chosen if (pid := held.get(f"lb-{name}")) is not None}
        processes = tuple(pid for pid in owners if pid != pins.ELSEWHERE)
        asked = bool(owners) and not any(daemon.stopped(pid) for pid in processes)
        nowhere: list[Path] = []
        sockets = tuple(attempt("whom to ask", partial(served.sockets, chosen), nowhere)) if asked else ()
        config = config or served.configuration(sockets)
        if config:
            vips, servers = {s.vip for s in config.services}, config.backends
        else:
            nothing: tuple[list[Vip], list[Address]] = [], []
            there = [attempt(f"what {name} serves", partial(daemon.served, name), nothing) for name in chosen]
            vips, servers = {vip for some, _ in there for vip in some}, {a for _, some in there for a in some}
        left = not owners and any(f"lb-{name}" in folders for name in chosen)
        return cls(chosen, config, _sorted(vips), frozenset(servers), processes, asked, sockets, left=left)

    def told(self, address: Address, services: Collection[types.Service]) -> Told:
        """What is known of a VIP's announcement.  ``services``: as the load balancer says, if it does."""
        config = self.config
        if config and config.announce is not Announce.ARP:
            return Told.NOT
        if self.left:
            return Told.NOBODY
        if not self.processes:
            return Told.PLANNED if config else Told.NOT
        if not self.asked:
            return Told.STOPPED
        said = [one.announced for one in services if parse_vip(one.vip).address == address]
        if said:
            announced = Told.ANNOUNCED if config else Told.UNKNOWN
            return announced if any(said) else Told.WITHDRAWN
        return Told.UNKNOWN


def _sorted(vips: Iterable[Vip]) -> tuple[Vip, ...]:
    return tuple(sorted(vips, key=lambda vip: (vip.address.version, int(vip.address), vip.port)))


def _once(read: Callable[[], T]) -> Callable[[], T]:
    """The same for all looks, read by the first of them."""
    lock = threading.Lock()
    kept: list[T] = []

    def get() -> T:
        with lock:
            if not kept:
                kept.append(read())
            return kept[0]

    return get


def looks(subjects: Sequence[Subject]) -> Iterator[Look[Any]]:
    yield from _machine(subjects)
    for subject in subjects:
        yield from _subject(subject)
    yield Look(str(pins.RUN), "locks and sockets", daemon.read_strays, daemon.strays)
    yield Look("agents", "agents", _read_agents, _agents)
    client = not any(subject.interfaces for subject in subjects)  # a load balancer seldom is one
    yield Look("MPTCP", "MPTCP", multipath.read, partial(multipath.judge, client=client))


def _subject(subject: Subject) -> Iterator[Look[Any]]:
    looked_at = backends.some(subject.backends)
    hops = _once(lambda: next_hops({*looked_at, *(vip.address for vip in subject.vips)}))
    ways = _once(lambda: backends.read({a: hop for a, hop in hops().items() if a in looked_at}))
    ports = {name: _once(partial(interfaces.read, name)) for name in subject.interfaces}
    for name, port in ports.items():
        yield Look(name, "the interface", port, partial(_interface, subject.config, hops))
        yield from _daemon(name, port)
    for pid in subject.processes:
        yield Look("log", "where the load balancer logs to", partial(daemon.read_log, pid), daemon.logs)
    said = [_once(partial(served.read, path)) for path in subject.sockets]
    for answers in said:
        yield Look("services", "what the load balancer says", answers, served.judge)
    if subject.asked and not subject.sockets:
        yield Look("services", "what the load balancer says", served.Answers, served.judge)
    if subject.vips:
        yield from _vips(subject, hops, ways, lambda: [one for answers in said for one in answers().services])
    if subject.backends:
        yield from _backends(subject, ways, ports)


def _machine(subjects: Sequence[Subject]) -> Iterator[Look[Any]]:
    yield Look("machine", "the kernel", machine.read_kernel, machine.kernel)
    serves = machine.serves()

    def own(judge: Callable[[Any], Iterable[Finding]]) -> Callable[[Any], Iterator[Finding]]:
        return lambda found: machine.of_process(judge(found), serves)

    yield Look("machine", "rights", machine.read_rights, own(machine.rights))
    yield Look("machine", "limits", machine.read_limits, own(machine.limits))
    yield Look("machine", "the BPF file system", machine.read_bpffs, own(machine.bpffs))
    if not any(subject.processes for subject in subjects):  # else it has been loaded, as is to be seen
        yield Look("machine", "whether the program loads", machine.read_load, machine.load)
    yield Look("machine", "/proc", machine.read_proc, machine.proc)
    for path in (pins.RUN, machine.STATE):
        yield Look("machine", str(path), partial(machine.read_place, path), machine.place)
    yield Look("machine", "the seed", machine.read_seed, machine.seeded)
    yield Look("machine", "the clock", machine.read_clock, machine.clock)
    yield Look("machine", "the table of neighbours", machine.read_neighbours, machine.neighbours)
    if unread := [finding for subject in subjects for finding in subject.unread]:
        yield Look("interfaces", "what is served", lambda: unread, iter)
    elif not any(subject.interfaces for subject in subjects):
        yield Look("interfaces", "what is served", tuple, _no_interface)


def _no_interface(_: object) -> Iterator[Finding]:
    yield note(
        "no-interface",
        "no interface is named, and none is served here",
        "interfaces, VIPs and backends are looked at if they are named",
        "crablb doctor --config FILE.toml, or --iface IF",
    )


Hops = Callable[[], dict[Address, NextHop]]


def _interface(config: Config | None, hops: Hops, port: interfaces.Port) -> Iterator[Finding]:
    far = backends.far(config, hops(), port.info.index) if port.info else None
    return interfaces.judge(port, config, far)


def _daemon(name: str, port: Callable[[], interfaces.Port]) -> Iterator[Look[Any]]:
    def read() -> daemon.Daemon:
        info = port().info
        # Of a driver that does not say how many it has in use, nobody knows whether they are all served.
        return daemon.read(name, (rtnetlink.rx_queues(info.index) or 0) if info else 0)

    where = f"load balancer of {name}"
    yield Look(where, "the load balancer", read, daemon.judge)
    yield Look(where, "the state file", partial(daemon.read_memory, name), daemon.memory)
    yield Look(where, "counters", partial(daemon.read_counters, name), daemon.counters)


def _vips(
    subject: Subject,
    hops: Hops,
    ways: Callable[[], list[backends.Way]],
    services: Callable[[], Collection[types.Service]],
) -> Iterator[Look[Any]]:
    places = _once(lambda: vips.read_places(subject.vips, hops()))
    arriving = _once(lambda: any(daemon.arriving(name) for name in subject.interfaces))
    config, addresses = subject.config, {vip.address for vip in subject.vips}
    yield Look("VIPs", "how many", lambda: len(addresses), vips.many)
    yield Look(
        "VIPs",
        "the VIPs",
        places,
        lambda found: (each for place in found for each in vips.addresses(place, config, arriving())),
    )
    yield Look("VIPs", "who listens at the VIPs", partial(vips.read_listeners, subject.vips), vips.listening)

    def whose(found: list[tuple[vips.Place, dict[str, str]]]) -> Iterator[Finding]:
        said = services() if found else ()
        for place, answers in found:
            told = subject.told(place.address, said)
            yield from vips.whose(place, answers, told, arriving() and subject.asked, backends.macs(ways()))

    there = _present(subject.interfaces)
    yield Look("VIPs", "who answers for the VIPs", lambda: vips.read_answers(there, places()), whose)
    yield Look("VIPs", "nftables", partial(filters.read_nft, addresses), filters.netfilter)
    yield Look("VIPs", "iptables", partial(filters.read_legacy, addresses), filters.netfilter)
    yield Look("VIPs", "IPVS", filters.read_ipvs, partial(filters.ipvs, vips=subject.vips))


def _present(names: Collection[str]) -> list[str]:
    return [name for _, name in socket.if_nameindex() if name in names]


def _backends(
    subject: Subject,
    ways: Callable[[], list[backends.Way]],
    ports: dict[str, Callable[[], interfaces.Port]],
) -> Iterator[Look[Any]]:
    yield Look("backends", "how many", lambda: len(subject.backends), backends.many)
    yield Look("backends", "the backends", ways, lambda found: (each for w in found for each in backends.judge(w)))
    if config := subject.config:
        yield Look(
            "backends",
            "how they fit",
            lambda: [port() for port in ports.values()],
            lambda found: backends.fits(config, backends.answering(ways()), found),
        )
    yield Look(
        "backends", "their routes", partial(backends.read_tables, backends.some(subject.backends)), backends.tables
    )

    yield Look("backends", "path MTU discovery", filters.read_pmtu, filters.pmtu)

    def read_filter() -> tuple[dict[str, int], set[str]]:
        leading = {way.interface for way in ways() if way.hop.state is HopState.RESOLVED and way.interface}
        return filters.read_rp_filter(_present(subject.interfaces)), leading

    yield Look("backends", "the reverse-path filter", read_filter, lambda found: filters.rp_filter(*found))


# ---- agents of this host ----

ROLES: tuple[type[Agent], ...] = (ClientAgent, ServerAgent)


def _read_agents() -> dict[str, list[str]]:
    """What is wrong with each agent of this network namespace, by role."""
    there = {*pins.folders(), *pins.held(), *daemon.noted("json")}
    found = {agent.role: agent.status() for agent in ROLES if agent.role in there}
    return {role: list(status["faults"]) for role, status in found.items() if status}


def _agents(found: dict[str, list[str]]) -> Iterator[Finding]:
    for role, faults in found.items():
        for each in faults:
            yield warning(
                "agent",
                f"{role} agent: {each}",
                "connections take the fallback, or no redirect",
                f"crablb agent repair {role}",
            )
        if not faults:
            yield ok("agent", f"the {role} agent is as it was installed")
