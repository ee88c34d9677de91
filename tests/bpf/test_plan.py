"""A plan, and an explanation of what a file would do, beside what a reload of that file does to the table."""

from __future__ import annotations

import asyncio
from ipaddress import ip_address

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from crablb.api import types
from crablb.config import parse_config
from crablb.control.health.dialogs import Answer
from crablb.control.health.health import Health
from crablb.control.operator import Operator
from crablb.control.supervisor import Supervisor
from crablb.control.wanted import Wanted
from crablb.dataplane.rehearsal import choice_hash, slot
from crablb.kernel.netlink import HopState
from crablb.model import CheckKind, Config

VIPS = ("tcp://10.0.0.100:80", "tcp://10.0.0.100:81")
BACKENDS = [f"10.0.0.{n}" for n in range(11, 16)]
SIZE = 251
SEED = bytes(range(16))
CLIENT = ip_address("10.0.0.1"), 40000
AGENT = 'check = [{ type = "agent", port = 9999 }]'
CHECKS = ("", "check = []", 'check = ["tcp"]', 'check = ["http"]', 'check = ["tcp", "redirect"]', AGENT)


@pytest.fixture
def wired(namespace):
    namespace.ip("address", "add", "10.0.0.2/24", "dev", "veth0")
    for n, address in enumerate(BACKENDS, 11):
        namespace.ip("neighbor", "add", address, "lladdr", f"02:00:00:00:00:{n:02x}", "dev", "veth0")
    return namespace


@st.composite
def services(draw: st.DrawFn) -> str:
    """Their tables in a file."""
    told = []
    for vip in draw(st.lists(st.sampled_from(VIPS), min_size=1, unique=True)):
        lines = [f'[[service]]\naddress = "{vip}"', draw(st.sampled_from(CHECKS))]
        lines.append(f"panic = {draw(st.sampled_from((0, 50)))}\ninitially = '{draw(st.sampled_from(('up', 'down')))}'")
        entries = []
        for address in draw(st.lists(st.sampled_from(BACKENDS), min_size=1, unique=True)):
            state = draw(st.sampled_from(("up", "up", "up", "drain", "maint", "dead")))
            weight, backup = draw(st.integers(1, 3)), draw(st.sampled_from(("false", "false", "true")))
            entries.append(f'{{address = "{address}", weight = {weight}, state = "{state}", backup = {backup}}}')
        told.append("\n".join([*lines, f"backends = [{', '.join(entries)}]"]))
    return "\n".join(told)


def file(text: str) -> str:
    """With a service that has all backends, so that the ways to them stay known."""
    all_ = f'[[service]]\naddress = "tcp://10.0.0.100:82"\ncheck = []\nbackends = {BACKENDS}\n'
    return f'interface = "veth0"\ntable_size = {SIZE}\nflows = 64\nqueues = 1\n{text}\n{all_}'


def service(check: str, *backends: str, more: str = "") -> str:
    named = ", ".join(f'"{b}"' for b in backends)
    return f'[[service]]\naddress = "{VIPS[0]}"\n{check}\n{more}\nbackends = [{named}]'


class World:
    """A load balancer of which the test says what its checks find."""

    def __init__(self) -> None:
        self.text = file(service("", *BACKENDS))
        first = self.read()
        self.supervisor = Supervisor(first, SEED)
        self.engine = self.supervisor.engine
        self.wanted = Wanted(self.supervisor, given=first, read=self.read, path="lb.toml")
        self.operator = Operator(self.supervisor, wanted=self.wanted)

    def read(self) -> Config:
        return parse_config(self.text)

    async def settled(self) -> None:
        """Until the ways to all backends are known."""
        async with asyncio.timeout(10):
            while not self.engine.config.backends <= {
                address for address, hop in self.engine.hops.items() if hop.state is HopState.RESOLVED
            }:
                await asyncio.sleep(0.001)

    def find(self, down: set[str], percents: dict[str, int]) -> None:
        """Have the checks of all services say so."""
        health = self.supervisor.health
        for (_, address), backend in health._backends.items():
            for job in backend.jobs:
                weighs = job.kind is CheckKind.AGENT
                percent = percents.get(str(address), 100) if weighs else None
                answer = Answer(str(address) not in down, "refused", percent=percent)
                for _ in range(3):
                    job.take(answer, 0.0, health._now())
            health._dirty.add(backend)
        health._tell_engine()

    def tables(self) -> dict[str, list[str]]:
        """Who has each slot, by service."""
        snapshot = self.engine._queues.snapshot
        assert snapshot
        names = {number: str(address) for address, number in self.engine._registry.backends.items()}
        return {str(vip): [names.get(int(n), "") for n in table] for vip, table in snapshot.chosen.items()}

    def serving(self) -> set[tuple[str, object]]:
        """Who gets new connections, by health."""
        verdicts = self.engine.verdicts.items()
        return {(str(vip), b.address) for vip, verdict in verdicts for b in verdict.service.backends if b.share}


def test_a_plan_and_what_a_reload_does_are_the_same(wired, monkeypatch):
    monkeypatch.setattr(Health, "_run", lambda *_: None)  # nobody answers there: the test says what checks find
    loop = asyncio.new_event_loop()
    world = loop.run_until_complete(_made())

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        services(),
        services(),
        st.sets(st.sampled_from(BACKENDS)),
        st.dictionaries(st.sampled_from(BACKENDS), st.sampled_from((0, 50, 100))),
    )
    # The last check is taken away; another one takes its place; one that weighs goes; what is added starts down.
    @example(service("", *BACKENDS), service("check = []", *BACKENDS), {BACKENDS[0]}, {})
    @example(service("", *BACKENDS), service('check = ["http"]', *BACKENDS), {BACKENDS[0]}, {})
    @example(service(AGENT, *BACKENDS), service('check = ["tcp"]', *BACKENDS), set(), {BACKENDS[0]: 50})
    @example(
        service("", *BACKENDS[:3], more="initially = 'down'"),
        service("", *BACKENDS, more="initially = 'down'"),
        {BACKENDS[0]},
        {},
    )
    def same(first: str, second: str, down: set[str], percents: dict[str, int]) -> None:
        loop.run_until_complete(_compare(world, first, second, down, percents))

    try:
        same()
    finally:
        world.operator.close()
        loop.run_until_complete(world.supervisor.close())
        loop.close()


async def _made() -> World:
    world = World()
    await world.supervisor.start()
    return world


async def _compare(world: World, first: str, second: str, down: set[str], percents: dict[str, int]) -> None:
    world.text = file(first)
    await world.wanted.reload()
    await world.settled()
    world.find(down, percents)
    before, was, served = world.tables(), world.engine.config, world.serving()

    world.text = file(second)
    planned = await world.wanted.plan(world.text)
    foretold = {
        str(s.vip): await world.operator.explain(
            types.Explain(client="10.0.0.1:40000", vip=str(s.vip), configuration=world.text)
        )
        for s in was.services
        if s.vip in {new.vip for new in parse_config(world.text).services}
    }
    told = await world.wanted.reload()
    assert told == planned
    await world.settled()
    after = world.tables()
    moved = {s.vip: s.moved for s in planned.services if s.change == "changed"}
    for vip in before.keys() & after.keys():
        real = float(np.mean([a != b for a, b in zip(before[vip], after[vip], strict=True)]))
        assert moved.get(vip, 0.0) == pytest.approx(real), vip
        (new,) = [s for s in world.engine.config.services if str(s.vip) == vip]
        place = slot(choice_hash(SEED, new, *CLIENT), SIZE)
        seat = next(step.outcome for step in foretold[vip].steps if step.what == "slot").split(": ")[1]
        assert seat == (after[vip][place] or "nobody"), vip
    # Who begins or ceases to serve is told, and nobody else.
    now = world.serving()
    meant = {(str(s.vip), b.address) for s in was.services for b in s.backends if b.share}
    meant &= {(str(s.vip), b.address) for s in world.engine.config.services for b in s.backends if b.share}
    differ = {pair: pair in now for pair in meant if (pair in now) is not (pair in served)}
    lines = [(s.vip, *words.split(" ", 1)) for s in planned.services for words in s.serving]
    again = "gets new connections again"
    assert {(vip, ip_address(address)): words.startswith(again) for vip, address, words in lines} == differ
    assert len(lines) == len(differ)


def test_an_explanation_says_of_each_backend_why_it_does_not_serve(wired, monkeypatch):
    """As ``crablb backends`` does; and what is not known of a backend that nobody has yet."""
    monkeypatch.setattr(Health, "_run", lambda *_: None)
    stranger = "10.0.0.99"

    async def explained(world: World, text: str = "", **more: object) -> dict[str, types.Step]:
        asked = types.Explain(client="10.0.0.1:40000", configuration=file(text) if text else "", **more)
        steps = (await world.operator.explain(asked)).steps
        health = {s.outcome.split(" ")[0]: s for s in steps if s.what == "health"}
        return health | {s.what: s for s in steps if s.what != "health"}

    async def main() -> None:
        world = await _made()
        try:
            text = service('check = ["tcp"]', *BACKENDS[:4]).replace(
                f'"{BACKENDS[1]}"', f'{{ address = "{BACKENDS[1]}", backup = true }}'
            )
            world.text = file(text.replace(f'"{BACKENDS[2]}"', f'{{ address = "{BACKENDS[2]}", state = "drain" }}'))
            await world.wanted.reload()
            await world.settled()
            world.find({BACKENDS[0]}, {})
            said = {b.address: b.reason for b in await world.operator.backends(VIPS[0])}
            assert said == dict(zip(BACKENDS, ("tcp: refused", "backup", "drain", ""), strict=False))
            steps = await explained(world, vip=VIPS[0])
            assert {a: steps[a].why for a in BACKENDS[:3]} == {a: said[a] for a in BACKENDS[:3]}
            assert BACKENDS[3] not in steps
            assert "1 of 4 backends takes new connections" in steps["service"].why
            # A VIP, and a backend, that are not there yet.
            new = service("", stranger).replace(":80", ":8080")
            steps = await explained(world, new, vip="tcp://10.0.0.100:8080")
            assert steps["XDP program"].outcome.startswith("would be handed to user space")
            assert steps["backend"].outcome == stranger
            assert "MAC address that is not known yet" in steps["out"].outcome
            assert "00:00:00" not in steps["out"].outcome
        finally:
            world.operator.close()
            await world.supervisor.close()

    asyncio.run(main())
