"""The operator, over an engine that serves nobody."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from functools import partial
from ipaddress import ip_address
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from crablb.api import types
from crablb.control.estate import Rest, Told
from crablb.control.health.health import Found
from crablb.control.journal import KEPT, Journal
from crablb.control.operator import ConflictError, NotFoundError, Operator, asking
from crablb.dataplane.census import FoundFlow
from crablb.dataplane.events import Event
from crablb.errors import ConfigError
from crablb.kernel.netlink import HopState, NextHop
from crablb.model import Announce, State
from crablb.selection.standing import Standing
from tests.helpers.operating import ONE, TWO, StillEngine, config, still

A, B, SIX = ip_address("10.0.0.11"), ip_address("10.0.0.12"), ip_address("fd00::11")


def run(test: Callable[..., Coroutine[Any, Any, None]], **more: Any) -> None:
    async def within() -> None:
        operator, engine = still(**more)
        try:
            await test(operator, engine)
        finally:
            operator.close()

    asyncio.run(within())


def asked(test: Callable[[Operator, StillEngine], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """A test within an event loop."""

    def plain() -> None:
        run(test)

    plain.__name__, plain.__doc__ = test.__name__, test.__doc__
    return plain


async def of(operator: Operator, address: object, vip: str | None = ONE) -> types.Backend:
    return next(b for b in await operator.backends(vip) if b.address == str(address))


# ---- questions ----


@asked
async def test_all_is_well(operator, engine):
    status = await operator.status()
    assert (status.state, status.problems, status.backends, status.backends_serving) == ("serving", [], 3, 3)
    assert [s.vip for s in await operator.services()] == [ONE, TWO]
    told = await of(operator, A)
    assert (told.serving, told.reason, told.cr, told.cr_reason, told.share) == (True, "", True, "", 0.5)
    assert told.reached == "eth0 02:00:00:00:00:01"
    assert told.connections is None
    engine.reporting.add(A)
    assert ((told := await of(operator, A)).connections, told.load) == (3, 0.5)


@asked
async def test_who_was_not_checked_yet(operator, engine):
    """It serves, which is no trouble, and is not said to be well."""
    engine.awaited.add((engine.config.services[0].vip, A))
    status = await operator.status()
    assert (status.state, status.backends_serving, status.backends_unchecked) == ("serving", 3, 1)
    assert ((told := await of(operator, A)).serving, told.reason, told.healthy) == (True, "not checked yet", None)
    assert (await of(operator, B)).reason == ""


@asked
async def test_why_one_does_not_serve(operator, engine):
    """Each reason, and what it makes of the whole."""
    vip = engine.config.services[0].vip
    engine.hops[A] = NextHop(HopState.UNRESOLVED, "10.0.0.11 does not answer on eth0")
    assert (await of(operator, A)).reason == "10.0.0.11 does not answer on eth0"
    status = await operator.status()
    assert status.state == "degraded"
    assert status.problems == [f"{ONE}: 1 of 2 backends does not serve: 10.0.0.11: 10.0.0.11 does not answer on eth0"]
    engine.standings[vip, B] = Standing(healthy=False)
    engine.found[vip, B] = Found(healthy=False, known=True, reason="tcp: refused")
    assert (await operator.status()).problems[0].startswith(f"{ONE}: no backend serves: ")
    engine.hops[A] = engine.hops[B]
    assert ((told := await of(operator, B)).serving, told.healthy, told.reason) == (False, False, "tcp: refused")
    engine.standings[vip, B] = Standing(percent=0)
    engine.found[vip, B] = Found(known=True, reason="agent: drain", percent=0)
    assert ((told := await of(operator, B)).serving, told.reason) == (False, "agent: drain")
    engine.standings[vip, B] = Standing(cr=False)
    engine.found[vip, B] = Found(known=True, cr=False, cr_reason="redirect check")
    assert ((told := await of(operator, B)).serving, told.cr, told.cr_reason) == (True, False, "redirect check")
    del engine.standings[vip, B]
    engine.unredirected = frozenset({(vip, B)})
    assert ((told := await of(operator, B)).cr, told.cr_reason) == (False, "its clients complete no redirects")


@asked
async def test_a_standby_is_well(operator, engine):
    """What another machine has is told of each service, and counted by address."""
    address, holder = ip_address("10.0.0.100"), {"eth0": "02:00:00:00:00:99"}
    engine.left_to[address] = holder
    status = await operator.status()
    assert (status.state, status.problems, status.standby) == ("serving", [], 1)
    assert [s.in_use for s in await operator.services()] == [
        holder if f"//{address}:" in s.vip else {} for s in await operator.services()
    ]
    assert (await operator.service(ONE)).in_use == holder


@asked
async def test_panic_is_told(operator, engine):
    vip = engine.config.services[0].vip
    engine.standings |= {(vip, A): Standing(healthy=False), (vip, B): Standing(healthy=False)}
    status = await operator.status()
    assert status.problems == [f"{ONE}: panic: 0 of 2 of the weight is healthy, so that health is disregarded"]
    assert ((told := await of(operator, A)).serving, told.reason) == (
        True,
        "panic: health is disregarded, not checked yet",
    )
    assert (await operator.service(ONE)).panic


@asked
async def test_an_interface_that_is_gone(operator, engine):
    engine.modes["eth0"] = ""
    engine.hops = dict.fromkeys(engine.hops, NextHop(HopState.UNRESOLVED, "no way"))
    assert (problems := (await operator.status()).problems)[0] == "interface eth0 is gone"
    assert "no backend serves" in problems[1]  # which comes of it


@asked
async def test_an_interface_that_is_down(operator, engine):
    engine.links = {n: link._replace(running=False) for n, link in engine.links.items()}
    engine.hops = dict.fromkeys(engine.hops, NextHop(HopState.UNRESOLVED, "no way"))
    assert (problems := (await operator.status()).problems)[0] == "interface eth0 is down, or has no carrier"
    assert "no backend serves" in problems[1]


@asked
async def test_since_when_it_serves_outlives_a_restart(operator, engine):
    """As checks know it, where they know what it does; what changes from then on is from then."""
    vip = engine.config.services[0].vip
    operator._clock = lambda: 5000.0
    operator._supervisor.health.since = {(vip, A): 1000.0, (vip, B): 2000.0}.get
    engine.found |= {(vip, A): Found(known=True), (vip, B): Found(known=True)}
    engine.hops[B] = NextHop(HopState.UNRESOLVED, "no way")  # which no check says
    assert ((await of(operator, A)).since, (await of(operator, B)).since) == (1000.0, 5000.0)
    operator._look()
    engine.hops[A] = engine.hops[B]
    assert (await of(operator, A)).since == 5000.0


@asked
async def test_checks_that_get_no_turn(operator, engine):
    health = operator._supervisor.health
    health.late, health.untried, health.trouble = 7.5, 3, ("900 checks wait",)
    told = await operator.status()
    assert (told.state, told.problems[-1]) == ("degraded", "900 checks wait")
    assert (told.checks_late, told.checks_untried, told.checks_trouble) == (7.5, 3, ["900 checks wait"])


@asked
async def test_changes_of_before_that_are_lost(operator, engine):
    operator.wanted._store = SimpleNamespace(lost="/f.unreadable: put aside by a start", trouble="")
    status = await operator.status()
    assert status.state == "degraded"
    assert status.problems[0].startswith("changes at run time of before are not in force: /f.unreadable: put aside")


@asked
async def test_a_backend_is_added_with_the_weight_in_its_address(operator, engine):
    operator.add_backend(ONE, types.AddBackend(address="10.0.0.14*3"))
    operator.add_backend(ONE, types.AddBackend(address="10.0.0.15"))
    operator.add_backend(ONE, types.AddBackend(address="10.0.0.16", weight=0))
    assert [b.weight for b in engine.config.services[0].backends] == [1, 1, 3, 1, 0]


@asked
async def test_uncut_segments_are_a_problem(operator, engine):
    operator._supervisor.uncut = 211
    assert "211 packets between two sweeps were too long" in (await operator.status()).problems[-1]


def test_a_backup_is_no_problem():
    async def test(operator: Operator, engine: StillEngine) -> None:
        operator.patch(str(B), types.Patch(state="drain"))
        operator.add_backend(ONE, types.AddBackend(address="10.0.0.13", backup=True))
        engine.hops[ip_address("10.0.0.13")] = engine.hops[A]
        told = await of(operator, "10.0.0.13")
        assert (told.serving, told.reason, told.backup) == (False, "backup", True)
        assert (await operator.status()).problems == []

    run(test)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tcp://10.0.0.100:81", "there are: tcp://10.0.0.100:80, "),
        ("tcp:10.0.0.100:8", "there are: "),
        ("nonsense", "nonsense"),
        ("", ""),
    ],
)
def test_services_that_there_are_none_of(name, words):
    async def test(operator: Operator, engine: StillEngine) -> None:
        with pytest.raises(NotFoundError) as raised:
            await operator.backends(name)
        assert words in str(raised.value)

    run(test)


@asked
async def test_a_vip_is_written_in_several_ways(operator, engine):
    for name in (ONE, "tcp:10.0.0.100:80", "10.0.0.100:80"):
        assert (await operator.service(name)).vip == ONE
    assert (await operator.service("[fd00::100]:80")).vip == TWO


@asked
async def test_many_who_ask_at_once_are_one_count(operator, engine):
    await asyncio.gather(*(operator.backends() for _ in range(50)))
    assert engine.counts == 1


@asked
async def test_who_gives_up_takes_no_count_from_others(operator, engine):
    first = asyncio.ensure_future(operator.count_flows())
    second = asyncio.ensure_future(operator.count_flows())
    await asyncio.sleep(0)
    first.cancel()
    assert (await second).total == 0


@asked
async def test_flows(operator, engine):
    vips = [service.vip for service in engine.config.services]
    engine.flows = [FoundFlow(n, vips[0], A if n % 2 else B, 5, "open") for n in range(1, 8)]
    found = await operator.flows(limit=3)
    assert (found.total, len(found.flows), found.truncated) == (7, 3, True)
    assert found.flows[0].hash == "0000000000000001"
    assert (await operator.flows(backend="10.0.0.11")).total == 4
    assert (await operator.count_flows()).services == {ONE: {"10.0.0.11": 4, "10.0.0.12": 3}}
    with pytest.raises(NotFoundError, match=r"there is no backend 10\.0\.0\.99; there are: 10\.0\.0\.11, 10\.0\.0\.12"):
        await operator.flows(backend="10.0.0.99")
    engine.flows.append(FoundFlow(9, vips[0], ip_address("10.0.0.99"), 5, "ending"))  # of one that was removed
    assert ((found := await operator.flows(backend="10.0.0.99")).total, found.ending) == (1, 1)
    with pytest.raises(ConfigError, match="limit: 10001"):
        await operator.flows(limit=10001)
    with pytest.raises(ConfigError, match="say which"):
        await operator.flows(client="10.0.0.1")


# ---- changes ----


@asked
async def test_a_change_is_told_counted_and_an_event(operator, engine):
    applied = operator.patch("10.0.0.11", types.Patch(weight=5, state="drain"))
    assert applied.changes == [f"10.0.0.11 of {ONE}: weight 1 -> 5", f"10.0.0.11 of {ONE}: state up -> drain"]
    assert engine.counted == {"changes": 1}
    assert [event.kind for event in operator.events()] == ["weight", "state"]
    assert ((told := await of(operator, A)).changed, told.state, told.reason) == (True, "drain", "drain")
    assert not (await of(operator, B)).changed
    assert (await operator.status()).changes == 2
    assert operator.patch("10.0.0.11", types.Patch(weight=5)).changes == []
    assert engine.counted == {"changes": 1}
    operator.patch("10.0.0.11", types.Patch(weight=1, state="ready"))
    assert (await operator.status()).changes == 0


def test_a_backend_of_several_services():
    served = config(f"{ONE}=10.0.0.11,10.0.0.12", "tcp://10.0.0.100:81=10.0.0.11,10.0.0.12")

    async def test(operator: Operator, engine: StillEngine) -> None:
        assert len(operator.patch("10.0.0.11", types.Patch(state="maint")).changes) == 2
        assert len(operator.patch("10.0.0.11", types.Patch(state="up"), ONE).changes) == 1
        assert [s.backends[0].state for s in engine.config.services] == [State.UP, State.MAINT]

    run(test, served=served)


@asked
async def test_services_and_backends_come_and_go(operator, engine):
    assert operator.add_backend(ONE, types.AddBackend(address="10.0.0.13", weight=2)).changes == [
        f"10.0.0.13 of {ONE}: added"
    ]
    with pytest.raises(ConflictError):
        operator.add_backend(ONE, types.AddBackend(address="10.0.0.13"))
    operator.remove_backend(ONE, "10.0.0.13")
    with pytest.raises(NotFoundError):
        operator.remove_backend(ONE, "10.0.0.13")
    new = {"address": "tcp://10.0.0.101:80", "backends": ["10.0.0.11*2"], "policy": "random"}
    assert operator.add_service(new).changes == ["tcp://10.0.0.101:80: added"]
    with pytest.raises(ConflictError):
        operator.add_service(new)
    assert engine.config.services[-1].backends[0].weight == 2
    operator.remove_service("tcp:10.0.0.101:80")
    assert len(engine.config.services) == 2
    operator.remove_backend(ONE, "10.0.0.12")
    with pytest.raises(ConfigError, match="has no backends"):
        operator.remove_backend(ONE, "10.0.0.11")


WRONG = {
    "nothing": (lambda op: op.patch("10.0.0.11", types.Patch()), "nothing is to be changed"),
    "weight": (lambda op: op.patch("10.0.0.11", types.Patch(weight=65536)), "weight: "),
    "negative": (lambda op: op.patch("10.0.0.11", types.Patch(weight=-1)), "weight: "),
    "stranger": (lambda op: op.patch("10.0.0.99", types.Patch(weight=1)), "there is no backend"),
    "all weights 0": (
        lambda op: [op.patch(str(a), types.Patch(weight=0), ONE) for a in (A, B)],
        "weight",
    ),
    "its VIP": (lambda op: op.add_backend(ONE, types.AddBackend(address="10.0.0.100")), "is also a VIP"),
    "family": (lambda op: op.add_backend(ONE, types.AddBackend(address="fd00::12")), "only a tunnel leads"),
    "key": (lambda op: op.add_service({"address": "tcp://10.0.0.9:80", "backend": ["10.0.0.1"]}), "unknown key"),
    "program": (
        lambda op: op.add_service(
            {"address": "tcp://10.0.0.9:80", "backends": ["10.0.0.1"], "policy": "antigravity:x"}
        ),
        "own file alone",
    ),
    "exec": (
        lambda op: op.add_service(
            {
                "address": "tcp://10.0.0.9:80",
                "backends": ["10.0.0.1"],
                "check": [{"type": "exec", "command": ["/bin/true"]}],
            }
        ),
        "comes from the configuration file alone",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_changes_nothing(name):
    act, words = WRONG[name]

    async def test(operator: Operator, engine: StillEngine) -> None:
        before = engine.config
        with pytest.raises(ConfigError) as raised:
            act(operator)
        assert words in str(raised.value)
        if name != "all weights 0":  # the first of them can be
            assert engine.config is before

    run(test)
    assert "antigravity" not in sys.modules


@asked
async def test_a_background_task_that_failed_is_a_problem_for_a_while(operator, engine):
    engine.task_failed = "sweep", time.monotonic() - 10
    assert (await operator.status()).problems == [
        "background task sweep failed 10 s ago, and was begun anew: see the log"
    ]
    engine.task_failed = "sweep", time.monotonic() - 1000
    assert (await operator.status()).state == "serving"


@asked
async def test_takeover(operator, engine):
    """By whom it is asked for is told; what goes wrong is the answer."""
    with pytest.raises(ConflictError, match="within another program"):
        await operator.take_over()
    asking.set("uid 0 (process 7)")
    told: list[str] = []

    async def succeed(by: str) -> int:
        told.append(by)
        return 4711

    operator.succeed = succeed
    assert (await operator.take_over()).changes == [f"process 4711 serves in place of process {os.getpid()}"]
    assert told == ["uid 0 (process 7)"]


def test_what_another_process_knew():
    """It is gone on with, as plain values that went through a message."""
    given: list[Rest] = []

    async def before(operator: Operator, engine: StillEngine) -> None:
        engine.tell(Event("one"))
        engine.tell(Event("two", backend=A, vip=engine.config.services[0].vip, reason="why"))
        engine.standings[engine.config.services[0].vip, A] = Standing(healthy=False)
        operator._look()
        operator._leaving._draining, operator._leaving._first = True, 9
        values = msgspec.msgpack.decode(msgspec.msgpack.encode(Rest(**operator.export())))
        given.append(msgspec.convert(values, Rest))

    async def after(operator: Operator, engine: StillEngine) -> None:
        engine.tell(Event("three"))
        operator.adopt(given[0])
        assert [(e.number, e.kind, e.reason) for e in operator.events()] == [
            (1, "one", ""),
            (2, "two", "why"),
            (3, "three", ""),
        ]
        assert (await of(operator, B)).since == 1.0
        status = await operator.drained()
        assert (status.draining, status.first) == (True, 9)
        # Of another version, or nonsense: what is of no use is left out.
        operator.adopt(Rest(journal=Told(5, [{"x": 1}]), serving=[("x", "y", True, 1.0)], log_level="loud"))
        assert operator.journal.last == 3

    run(before, clock=lambda: 1.0)
    run(after, clock=lambda: 2.0)


# ---- events ----


def test_the_journal_tells_what_is_missed():
    journal = Journal(lambda: 1.0)
    for n in range(KEPT + 7):
        journal.add(Event("weight", reason=str(n)))
    told = journal.since(3)
    assert (told[0].kind, told[0].number, told[0].reason) == ("missed", 7, "4 events before this, not kept any more")
    assert [event.number for event in told[1:]] == list(range(8, KEPT + 8))
    assert journal.since(KEPT + 7) == []
    assert journal.since(-5) == journal.since(0)
    # Of a daemon before: all that there is.
    assert journal.since(10**9)[-1].number == KEPT + 7
    assert len(journal.since(0)) == KEPT + 1


def test_followers_get_what_comes_in_order():
    async def test() -> None:
        journal = Journal()
        got: list[int] = []

        async def follow() -> None:
            async for events in journal.follow(0, 60):
                got.extend(event.number for event in events)
                if len(got) >= 300:
                    return

        followers = [asyncio.ensure_future(follow()) for _ in range(1)]
        for n in range(300):
            journal.add(Event("weight"))
            if n % 7 == 0:
                await asyncio.sleep(0)
        async with asyncio.timeout(10):
            await asyncio.gather(*followers)
        assert got == list(range(1, 301))

    asyncio.run(test())


def test_nothing_comes_after_a_pause():
    async def test() -> None:
        async with asyncio.timeout(10):
            async for events in Journal().follow(0, 0.01):
                assert events == []
                return

    asyncio.run(test())


@asked
async def test_draining_the_load_balancer(operator, engine):
    """Servers are told, for as long as it is; whose flows stay, and why; the VIPs are announced again in the end."""
    one, two = (service.vip for service in engine.config.services)
    supervisor = operator._supervisor
    flow = partial(FoundFlow, 1, idle=0)
    engine.flows = [flow(one, A, state="open")] * 4 + [flow(one, B, state="open"), flow(two, SIX, state="open")]
    engine.flows += [flow(one, A, state="ending")] * 3
    told = await operator.drained()
    assert (told.draining, told.first, told.flows, supervisor.leaving) == (False, 0, 6, False)
    with pytest.raises(ConfigError, match="withdraw: the VIPs are not announced"):
        await operator.drain_lb(types.DrainLb(withdraw=True))
    assert not (await operator.status()).draining
    told = await operator.drain_lb(types.DrainLb())
    assert (told.draining, told.told, told.first, supervisor.leaving) == (True, False, 6, True)
    assert {each.reason for each in told.left} == {"its server does not report by this address"}
    assert (await operator.status()).draining
    supervisor.takes_reports = True
    engine.reporting |= {A, B}
    supervisor.leading.add((one, A))
    engine.flows = engine.flows[3:6]
    told = await operator.drained()
    assert (told.first, told.flows) == (6, 3)
    assert [(each.backend, each.flows, each.reason.split()[0]) for each in told.left] == [
        ("10.0.0.11", 1, "TCP,"),
        ("10.0.0.12", 1, "its"),
        ("fd00::11", 1, "its"),
    ]
    assert "does not lead MPTCP clients" in told.left[1].reason
    assert "does not report" in told.left[2].reason
    # A server that says how many it has has no more, whatever flows there are: those that it has ended itself.
    supervisor.at_vips |= {(one, A): 0, (one, B): 5}
    told = await operator.drained()
    assert [(each.backend, each.flows) for each in told.left] == [("10.0.0.12", 1), ("fd00::11", 1)]
    supervisor.at_vips.clear()
    # Said again it goes on: how many there were stays what it was.
    engine.config = replace(engine.config, announce=Announce.ARP)
    told = await operator.drain_lb(types.DrainLb(withdraw=True))
    assert (told.first, told.withdrawn, (await operator.services())[0].announced) == (6, True, False)
    assert (await operator.drain_lb(types.DrainLb())).withdrawn
    with pytest.raises(ConfigError, match="exclude"):
        await operator.drain_lb(types.DrainLb(cancel=True, withdraw=True))
    for _ in range(2):
        told = await operator.drain_lb(types.DrainLb(cancel=True))
        assert (told.draining, told.withdrawn, told.first, supervisor.leaving) == (False, False, 6, False)
    assert (await operator.services())[0].announced
