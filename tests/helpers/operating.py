"""An engine that serves nobody, for those who ask and tell one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from types import SimpleNamespace
from typing import Any, cast

from crablb.config import parse_service
from crablb.control.health.health import Found
from crablb.control.operator import Operator
from crablb.control.supervisor import Supervisor
from crablb.dataplane.census import Census, FoundFlow
from crablb.dataplane.events import Event, Notice
from crablb.dataplane.handover import Gap
from crablb.dataplane.statistics import DAEMON_COUNTERS, WORKER_COUNTERS, XDP_COUNTERS
from crablb.dataplane.tap import Tap
from crablb.filters import Filter
from crablb.kernel.interface import Interface
from crablb.kernel.netlink import HopState, Link, NextHop
from crablb.model import Address, Config, Service, Vip
from crablb.selection.loads import Load
from crablb.selection.standing import Pair, Standing, Verdict, judge

MAC = bytes([2, 0, 0, 0, 0, 1])

ONE = "tcp://10.0.0.100:80"
TWO = "tcp://[fd00::100]:80"


def config(*services: str) -> Config:
    described = services or (f"{ONE}=10.0.0.11,10.0.0.12", f"{TWO}=fd00::11")
    return Config(("eth0",), tuple(map(parse_service, described)))


class StillEngine:
    """What :class:`crablb.dataplane.engine.Engine` knows, as a test has it."""

    def __init__(self, served: Config) -> None:
        self.config = served
        self.listeners: list[Callable[[Notice], None]] = []
        self.standings: dict[Pair, Standing] = {}
        self.found: dict[Pair, Found] = {}  # what checks say
        self.awaited: set[Pair] = set()  # of which they have said nothing yet
        self.task_failed: tuple[str, float] | None = None
        self.gap: Gap | None = None
        self.hops: dict[Address, NextHop] = {
            address: NextHop(HopState.RESOLVED, ifindex=2, dst_mac=MAC, src_mac=MAC) for address in served.backends
        }
        self.links = {2: Link("eth0", MAC.hex(":"), 1500, True, True, True, 0, True, 1, True)}
        self.modes = {"eth0": "native"}
        self.interfaces = [Interface("eth0", 2, MAC, 1500, True, 1, 1, "veth")]
        self.queues, self.zero_copy, self.bypass = 1, False, True
        self.unredirected: frozenset[Pair] = frozenset()
        self.reporting: set[Address] = set()
        self.counted: dict[str, int] = {}
        self.flows: list[FoundFlow] = []
        self.refuse: Exception | None = None  # what applying raises
        self.counts = 0  # of censuses
        self.left_to: dict[Address, dict[str, str]] = {}  # VIPs that others have, as announcers say

    @property
    def verdicts(self) -> Mapping[Vip, Verdict]:
        return {service.vip: judge(service, self.standings) for service in self.config.services}

    async def stage(self) -> None:
        """Nobody's program is to be rehearsed."""

    def prepare(self, served: Config) -> SimpleNamespace:
        """Nothing else is found out with another configuration."""
        return SimpleNamespace(standings=self.standings)

    def apply(self, served: Config) -> None:
        if self.refuse:
            raise self.refuse
        self.config = served
        for address in served.backends:
            self.hops.setdefault(address, NextHop(HopState.UNRESOLVED, "neighbour does not answer"))
        self.tell(Event("changed"))

    async def tap(self, wanted: Filter, snap: int) -> Tap:
        """Of nothing more."""
        tap = Tap(wanted, snap, 0, Tap.end)
        tap.end()
        return tap

    def tell(self, notice: Notice) -> None:
        for listener in self.listeners:
            listener(notice)

    def count(self, what: str) -> None:
        assert what in DAEMON_COUNTERS
        self.counted[what] = self.counted.get(what, 0) + 1

    def load(self, vip: Vip, backend: Address) -> Load:
        return Load(7, 3, 0.5)

    def reports(self, backend: Address) -> bool:
        return backend in self.reporting

    def part(self, service: Service, backend: Address) -> float:
        return 1.0

    def service_counters(self, vips: Iterable[Vip] | None = None) -> dict[Vip, tuple[int, int]]:
        return {service.vip: (10, 1000) for service in self.config.services}

    def statistics(self) -> dict[str, Any]:
        zeros = [dict.fromkeys(names, 0) for names in (XDP_COUNTERS, WORKER_COUNTERS, DAEMON_COUNTERS)]
        return {"xdp": zeros[0], "workers": [zeros[1]], "total": zeros[1], "daemon": zeros[2] | self.counted}

    async def census(self) -> Census:
        self.counts += 1
        await asyncio.sleep(0)
        flows: dict[Pair, int] = {}
        for flow in self.flows:
            flows[flow.vip, flow.backend] = flows.get((flow.vip, flow.backend), 0) + 1
        pairs = [(s.vip, b.address, len(s.backends)) for s in self.config.services for b in s.backends]
        return Census(flows, {(vip, address): 1 / n for vip, address, n in pairs})

    async def open_flows(self) -> dict[tuple[Vip | None, Address], int]:
        flows: dict[tuple[Vip | None, Address], int] = {}
        for flow in self.flows:
            if flow.state == "open":
                flows[flow.vip, flow.backend] = flows.get((flow.vip, flow.backend), 0) + 1
        return flows

    async def find_flows(
        self, limit: int, vip: Vip | None, backend: Address | None, client: Address | None, port: int | None
    ) -> tuple[int, int, list[FoundFlow]]:
        found = [f for f in self.flows if vip in (None, f.vip) and backend in (None, f.backend)]
        return len(found), sum(f.state == "ending" for f in found), found[:limit]


def still(served: Config | None = None, **more: Any) -> tuple[Operator, StillEngine]:
    """An operator over such an engine."""
    engine = StillEngine(served or config())
    health = SimpleNamespace(
        of=engine.found.get,
        results=lambda pair: [],
        since=lambda pair: 0.0,
        awaited=engine.awaited.__contains__,
        withdrawn=set(),
        prepare=engine.prepare,
        late=0.0,
        untried=0,
        trouble=(),
    )
    supervisor = SimpleNamespace(engine=engine, listeners=[], apply=engine.apply, health=health, uncut=0)
    supervisor.takes_reports, supervisor.leading, supervisor.withdrawn, supervisor.leaving = False, set(), False, False
    supervisor.left_to = lambda address: engine.left_to.get(address, {})

    def tell(event: Event) -> None:
        for listener in supervisor.listeners:
            listener(event)

    def lead_away(leaving: bool, *, withdraw: bool) -> None:
        supervisor.leaving, supervisor.withdrawn = leaving, withdraw

    supervisor.tell, supervisor.lead_away, supervisor.at_vips = tell, lead_away, {}
    supervisor.at_vip = supervisor.at_vips.get
    engine.listeners.append(lambda notice: tell(notice) if isinstance(notice, Event) else None)
    return Operator(cast(Supervisor, supervisor), **more), engine
