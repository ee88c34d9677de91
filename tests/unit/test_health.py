"""The checks' schedule, what follows from them, and what outlives a configuration and a daemon.

The engine is a stand-in that notes what it is told, servers are a table, time passes by itself.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import time
from collections import Counter
from dataclasses import replace
from ipaddress import ip_address

import pytest

from crablb.control.health import health as module
from crablb.control.health.dialogs import Answer
from crablb.control.health.health import Health, automatic
from crablb.control.health.syn import Answer as SynAnswer
from crablb.dataplane.events import Event, HopsChanged
from crablb.errors import ConfigError
from crablb.kernel.netlink import HopState, NextHop
from crablb.model import Backend, Check, CheckKind, Config, Initially, Mode, Service, State, Vip
from crablb.selection.standing import Standing, judge
from tests.helpers.hours import hours

WEB, MAIL = Vip(ip_address("10.0.0.100"), 80), Vip(ip_address("10.0.0.100"), 25)
A, B, C = (ip_address(f"10.0.0.{n}") for n in (11, 12, 13))
THERE, GONE = NextHop(HopState.RESOLVED), NextHop(HopState.UNRESOLVED, "the neighbour does not answer")
TCP, REDIRECT, FALLBACK = (Check(kind) for kind in (CheckKind.TCP, CheckKind.REDIRECT, CheckKind.FALLBACK))
HTTP = Check(CheckKind.HTTP)
AGENT = Check(CheckKind.AGENT, port=9999)


class Engine:
    """What :class:`Health` needs of one."""

    def __init__(self, config: Config) -> None:
        self.config, self.hops = config, dict.fromkeys(config.backends, THERE)
        self.listeners = []
        self.standings: dict = {}
        self.warm: list = []
        self.publishes = 0
        self.verdicts: dict = {}
        self.fails = 0

    def judge(self, standings, warm=()):
        if self.fails:
            self.fails -= 1
            raise MemoryError
        self.publishes += 1
        self.standings |= standings
        self.warm += warm
        self.look()

    def look(self):
        self.verdicts = {s.vip: judge(s, self.standings) for s in self.config.services}

    def hop(self, address, hop):
        before, self.hops[address] = self.hops[address], hop
        for listener in list(self.listeners):
            listener(HopsChanged({address: before}, {address: hop}))


class Sounder:
    """Checks by SYNs."""

    def __init__(self, world: Bed) -> None:
        self._world = world

    def follow(self, services): ...
    def close(self): ...

    async def redirect(self, hop, dip, vip, form, timeout):
        return self._answer(CheckKind.REDIRECT, dip, vip.port)

    async def fallback(self, hop, dip, vip, way, timeout):
        return self._answer(CheckKind.FALLBACK, dip, vip.port)

    def _answer(self, kind, dip, port):
        answer = self._world.asked(kind, dip, port)
        return SynAnswer(answer.ok, answer.reason)


class Bed:
    """Backends as a table: (kind, address) or (kind, address, port) -> answer; others are well."""

    def __init__(self, *services: Service, kept: object = None) -> None:
        self.config = Config(("eth0",), services)
        self.engine = Engine(self.config)
        self.events: list[Event] = []
        self.answers: dict = {}
        self.asks: list[tuple[float, CheckKind, object, int]] = []
        self.health = Health(self.engine, self.events.append)
        self.health._sounder = Sounder(self)
        if kept is not None:
            self.health.adopt(kept)
        found = self.health.prepare(self.config)
        self.engine.standings |= found.standings
        self.engine.look()
        self.health.follow(found)

    def start(self) -> Bed:
        self.health.start()
        return self

    def apply(self, *services: Service) -> None:
        config = replace(self.config, services=services)
        found = self.health.prepare(config)
        self.config = self.engine.config = config
        for address in config.backends:
            self.engine.hops.setdefault(address, THERE)
        self.engine.standings |= found.standings
        self.engine.look()
        self.health.follow(found)

    def asked(self, kind, address, port):
        self.asks.append((asyncio.get_running_loop().time(), kind, address, port))
        return self.answers.get((kind, address, port)) or self.answers.get((kind, address)) or Answer(True, "well")

    def times(self, kind, address):
        return [at for at, k, a, _ in self.asks if (k, a) == (kind, address)]

    def kinds(self):
        return [event.kind for event in self.events]

    def healthy(self, vip=WEB):
        return {a: s.healthy for (v, a), s in self.engine.standings.items() if v == vip}


@pytest.fixture(autouse=True)
def servers(monkeypatch):
    """Checks by conversations are answered by the bed that is under test."""

    def ask(check, target):
        bed = current[0]
        answer = bed.asked(check.kind, target.address, target.port)
        return answer
        yield

    monkeypatch.setattr(module.probes, "ask", ask)
    monkeypatch.setattr(time, "monotonic", lambda: asyncio.get_running_loop().time())


current: list[Bed] = []


def bed(*services: Service, **more: object) -> Bed:
    current[:] = [Bed(*services, **more)]
    return current[0]


def service(*backends: Backend, vip: Vip = WEB, checks=(TCP,), **more: object) -> Service:
    return Service(vip, backends or (Backend(A), Backend(B)), checks=checks, **more)


DOWN = Answer(False, "refused")


# ---- whether they get their turn ----

CANNOT = Answer(None, "could not be tried: Too many open files", own=True)
EXEC = Check(CheckKind.EXEC, command=("/bin/true",))


def no_room(kind: str):
    def hinder(t: Bed, monkeypatch) -> None:
        getattr(t.health, kind).room = 0

    def relieve(t: Bed, monkeypatch) -> None:
        held = getattr(t.health, kind)
        held.room = 8
        held._fill_soon()

    return hinder, relieve


HINDRANCES = {
    "descriptors": (TCP, *no_room("_dialogs"), "checks wait for one of 0 descriptors, the first for "),
    "programs": (EXEC, *no_room("_programs"), "exec checks wait, the first for "),
    "CPU time": (
        TCP,
        lambda t, monkeypatch: monkeypatch.setattr(module, "BEGUN", 0),
        lambda t, monkeypatch: monkeypatch.setattr(module, "BEGUN", 32),
        "late, for want of CPU time",
    ),
    "sockets": (
        TCP,
        lambda t, monkeypatch: t.answers.update({(CheckKind.TCP, A): CANNOT}),
        lambda t, monkeypatch: t.answers.clear(),
        "1 checks cannot be made on this host: could not be tried: Too many open files",
    ),
}


@pytest.mark.parametrize("name", HINDRANCES)
def test_checks_that_get_no_turn(name, monkeypatch):
    """It is said once, while it lasts, and when it is over."""
    check, hinder, relieve, said = HINDRANCES[name]

    async def main():
        t = bed(service(checks=(check,))).start()
        await asyncio.sleep(30)
        assert t.kinds() == [] and t.health.trouble == () and t.health.late < 1
        hinder(t, monkeypatch)
        await asyncio.sleep(30)
        (event,) = t.events
        assert event.kind == "checks-late" and said in event.reason
        (trouble,) = t.health.trouble
        assert said in trouble
        assert (t.health.late > 20, t.health.untried) == (name != "sockets", int(name == "sockets"))
        assert t.healthy() == {} or set(t.healthy().values()) == {True}  # it says nothing of the servers
        relieve(t, monkeypatch)
        await asyncio.sleep(module.CALM / 2)
        assert t.health.trouble == () and t.kinds() == ["checks-late"]
        await asyncio.sleep(module.CALM)
        assert t.kinds() == ["checks-late", "checks-in-time"]
        assert t.health.late < 1 and not t.health.untried

    hours(main())


def test_what_nobody_wants_is_no_trouble():
    async def main():
        t = bed(service()).start()
        t.answers[CheckKind.TCP, A] = CANNOT
        await asyncio.sleep(5)
        assert t.health.untried == 1
        t.apply(service(Backend(A, state=State.MAINT), Backend(B)))
        await asyncio.sleep(2)
        assert not t.health.untried and t.health.trouble == ()
        t.apply(service(Backend(B)))
        assert not t.health._untried

    hours(main())


# ---- the schedule ----


def test_intervals():
    """Spread over the interval at first, then at it with jitter; faster while something changes."""

    async def main():
        many = [Backend(ip_address(f"10.1.{n // 250}.{n % 250 + 1}")) for n in range(1000)]
        t = bed(service(*many)).start()
        began = asyncio.get_running_loop().time()
        await asyncio.sleep(2.3)
        first = {}
        for at, _, address, _ in t.asks:
            first.setdefault(address, at - began)
        assert len(first) == 1000
        per_tenth = Counter(int(at * 10) for at in first.values())
        assert max(per_tenth) <= 20
        assert 20 < min(per_tenth[n] for n in range(20)) <= max(per_tenth.values()) < 90
        await asyncio.sleep(60)
        times = t.times(CheckKind.TCP, many[0].address)
        gaps = [b - a for a, b in itertools.pairwise(times)]
        assert all(1.8 <= gap <= 2.21 for gap in gaps)
        assert len({round(gap, 3) for gap in gaps}) > 10
        t.answers[CheckKind.TCP, many[0].address] = DOWN
        before = len(times)
        await asyncio.sleep(6)
        times = t.times(CheckKind.TCP, many[0].address)[before:]
        assert all(0.45 <= b - a <= 0.56 for a, b in itertools.pairwise(times[:3]))
        assert times[3] - times[2] >= 1.8  # it is known to be down: nothing changes any more
        t.health.close()

    random.seed(1)
    hours(main())


def test_fall_and_rise():
    async def main():
        t = bed(service()).start()
        await asyncio.sleep(5)
        assert t.events == []
        t.answers[CheckKind.TCP, A] = DOWN
        before = len(t.times(CheckKind.TCP, A))
        await asyncio.sleep(10)
        assert t.events == [Event("backend-unhealthy", A, WEB, "tcp: refused")]
        assert t.healthy() == {A: False, B: True}
        result = t.health.results((WEB, A))[0]
        assert (result.type, result.healthy, result.ok, result.reason) == ("tcp", False, False, "refused")
        assert result.history.endswith("---")
        assert result.history.count("-") == len(t.times(CheckKind.TCP, A)) - before == result.streak
        del t.answers[CheckKind.TCP, A]
        await asyncio.sleep(5)
        assert t.kinds() == ["backend-unhealthy", "backend-healthy"]
        assert t.healthy() == {A: True, B: True}
        assert (WEB, A) not in t.engine.warm, "it begins slowly"
        t.health.close()

    hours(main())


def test_what_cannot_be_tried_is_nothing():
    async def main():
        t = bed(service()).start()
        await asyncio.sleep(5)
        t.answers[CheckKind.TCP, A] = Answer(None, "no descriptor")
        await asyncio.sleep(600)
        assert t.events == []
        result = t.health.results((WEB, A))[0]
        assert (result.healthy, result.ok, result.reason) == (True, None, "no descriptor")
        assert result.history == "?" * 60
        t.health.close()

    hours(main())


def test_a_mass_failure_is_one_change():
    async def main():
        many = tuple(Backend(ip_address(f"10.1.0.{n + 1}")) for n in range(200))
        t = bed(service(*many), service(*many, vip=MAIL)).start()
        await asyncio.sleep(5)
        published = t.engine.publishes
        for backend in many:
            t.engine.hop(backend.address, GONE)
        await asyncio.sleep(0.5)
        assert t.engine.publishes == published + 1
        assert t.kinds() == ["backend-unhealthy"] * 400
        t.health.close()

    hours(main())


def test_a_check_that_fails_by_itself_is_nothing(monkeypatch):
    """It is asked again, and the others are not disturbed."""

    async def main():
        t = bed(service()).start()
        await asyncio.sleep(5)
        ask = module.probes.ask

        def broken(check, target):
            if target.address == A:
                raise MemoryError
            return ask(check, target)

        monkeypatch.setattr(module.probes, "ask", broken)
        before = len(t.times(CheckKind.TCP, B))
        await asyncio.sleep(20)
        assert t.kinds() == ["checks-late"]
        assert t.health.results((WEB, A))[0].history.endswith("?????")
        assert 8 <= len(t.times(CheckKind.TCP, B)) - before <= 12
        t.health.close()

    hours(main())


def test_the_engine_cannot_take_it_now():
    async def main():
        t = bed(service()).start()
        await asyncio.sleep(5)
        t.engine.fails = 2
        t.answers[CheckKind.TCP, A] = DOWN
        await asyncio.sleep(10)
        assert t.kinds() == ["backend-unhealthy"]
        assert t.healthy()[A] is False
        t.health.close()

    hours(main())


@pytest.mark.parametrize("own", [False, True])
def test_a_machine_without_time_delays_no_verdict(monkeypatch, own):
    """Telling the engine took a minute, of others' time or our own: what is found out next does not wait for it."""

    async def main():
        t = bed(service()).start()
        told, spent = t.engine.judge, [0.0]
        monkeypatch.setattr(module.time, "thread_time", lambda: spent[0])

        def slowly(*args):
            asyncio.get_running_loop().passed += 60
            spent[0] += 60 * own
            told(*args)

        t.engine.judge = slowly
        t.answers[CheckKind.TCP, A] = DOWN
        while t.healthy()[A] is not False:
            await asyncio.sleep(0.1)
        t.engine.judge = told
        t.answers[CheckKind.TCP, B] = DOWN
        await asyncio.sleep((TCP.interval + TCP.fall * TCP.fast_interval) * (1 + 2 * module.JITTER) + module.AGAIN)
        assert t.healthy()[B] is False
        t.health.close()

    hours(main())


# ---- whom, and where ----


def test_automatic_checks():
    one, other = Backend(A), Backend(B, cr=False)
    kinds = lambda *args: [c.kind.value for c in automatic(*args)]  # noqa: E731
    assert kinds(Service(WEB, (one,)), one) == ["tcp", "redirect", "fallback"]
    assert kinds(Service(WEB, (one,), mode=Mode.ALWAYS), one) == ["tcp", "redirect"]
    assert kinds(Service(WEB, (one,), mode=Mode.NEVER), one) == ["fallback"]
    assert kinds(Service(WEB, (one,)), other) == ["fallback"]


def test_targets():
    async def main():
        elsewhere = Backend(A, check_address=C, check_port=8080)
        port = replace(HTTP, port=81)
        t = bed(
            service(elsewhere, Backend(B), checks=(TCP, port, FALLBACK)),
            service(Backend(B, state=State.MAINT), Backend(C, state=State.DEAD), vip=MAIL),
        ).start()
        await asyncio.sleep(10)
        assert {ask[1:] for ask in t.asks} == {
            (CheckKind.TCP, C, 8080), (CheckKind.HTTP, C, 8080), (CheckKind.FALLBACK, A, 80),
            (CheckKind.TCP, B, 80), (CheckKind.HTTP, B, 81), (CheckKind.FALLBACK, B, 80),
        }  # fmt: skip
        t.health.close()

    hours(main())


def test_one_target_of_several_services_is_checked_once():
    async def main():
        checks = (replace(TCP, port=7), replace(HTTP, port=8), replace(HTTP, port=9, host="name"), FALLBACK)
        t = bed(service(Backend(A), checks=checks), service(Backend(A), vip=MAIL, checks=checks)).start()
        await asyncio.sleep(200)
        counts = Counter(ask[1:] for ask in t.asks)
        for one in (
            (CheckKind.TCP, A, 7),
            (CheckKind.HTTP, A, 9),
            (CheckKind.FALLBACK, A, 80),
            (CheckKind.FALLBACK, A, 25),
        ):
            assert 90 <= counts[one] <= 112
        assert 180 <= counts[CheckKind.HTTP, A, 8] <= 224  # for each VIP as its host
        t.answers[CheckKind.TCP, A] = DOWN
        await asyncio.sleep(10)
        assert t.healthy() == t.healthy(MAIL) == {A: False}
        t.health.close()

    hours(main())


def test_a_backend_is_healthy_when_all_checks_but_the_redirect_are():
    async def main():
        t = bed(service(checks=None)).start()
        await asyncio.sleep(5)
        t.answers[CheckKind.REDIRECT, A] = Answer(False, "SYN-ACK without the redirect")
        await asyncio.sleep(10)
        assert t.engine.standings[WEB, A] == Standing(cr=False)
        assert t.events == [Event("redirects-stopped", A, WEB, "redirect: SYN-ACK without the redirect")]
        t.answers[CheckKind.FALLBACK, A] = DOWN
        await asyncio.sleep(10)
        assert t.engine.standings[WEB, A] == Standing(healthy=False, cr=False)
        assert t.health.of((WEB, A)).reason == "fallback: refused"
        t.answers.clear()
        await asyncio.sleep(10)
        assert t.engine.standings[WEB, A] == Standing()
        assert sorted(t.kinds()[1:]) == ["backend-healthy", "backend-unhealthy", "redirects-resumed"]
        t.health.close()

    hours(main())


def test_agents_and_programs_say_percentages():
    async def main():
        run = Check(CheckKind.EXEC, command=("/bin/check",))
        t = bed(service(checks=(AGENT, run))).start()

        async def standing(agent=None, program=None):
            t.answers[CheckKind.AGENT, A] = agent
            t.answers[CheckKind.EXEC, A] = program
            await asyncio.sleep(10)
            return t.engine.standings[WEB, A]

        assert await standing(Answer(None, "75%", 75)) == Standing(percent=75)
        assert await standing(Answer(True, "up", decisive=True), Answer(True, "2", 50)) == Standing(percent=50)
        assert await standing(Answer(None, "drain", drain=True)) == Standing(percent=0)
        # As with HAProxy: it lasts until it says ready.
        assert await standing(Answer(True, "up", decisive=True), Answer(True, "0", 100)) == Standing(percent=0)
        assert await standing(Answer(None, "ready 150%", 150, drain=False)) == Standing(percent=100)
        t.events.clear()
        t.answers[CheckKind.AGENT, A] = Answer(False, "down # for a moment", decisive=True)
        before = len(t.times(CheckKind.AGENT, A))
        while t.events == []:
            await asyncio.sleep(0.1)
        assert len(t.times(CheckKind.AGENT, A)) == before + 1, "what an agent says holds at once"
        assert t.events == [Event("backend-unhealthy", A, WEB, "agent: down # for a moment")]
        t.health.close()

    hours(main())


# ---- at the start ----


def test_what_no_check_has_said_yet():
    """Until the first has ended a backend is as it was configured to be; which is told."""
    backends = (Backend(A), Backend(B, state=State.MAINT), Backend(C))

    async def main():
        t = bed(service(*backends, checks=(TCP, REDIRECT)), service(vip=MAIL, checks=()))
        pairs = list(itertools.product((WEB, MAIL), (A, B, C)))
        assert {pair for pair in pairs if t.health.awaited(pair)} == {(WEB, A), (WEB, C)}, "those that are checked"
        t.answers[CheckKind.TCP, C] = CANNOT
        t.start()
        await asyncio.sleep(10)
        assert {pair for pair in pairs if t.health.awaited(pair)} == {(WEB, C)}, "whose check cannot be made"
        t.answers[CheckKind.TCP, C] = DOWN
        await asyncio.sleep(10)
        assert not any(map(t.health.awaited, pairs))
        t.apply(service(checks=(REDIRECT,)))
        assert not any(map(t.health.awaited, pairs)), "which says nothing of whether it serves"
        t.health.close()

    hours(main())


def test_down_at_the_start():
    async def main():
        t = bed(service(initially=Initially.DOWN)).start()
        assert t.engine.standings[WEB, A] == Standing(healthy=False, known=False)
        assert not t.engine.verdicts[WEB].panic
        t.answers[CheckKind.TCP, B] = DOWN
        await asyncio.sleep(10)
        assert t.healthy() == {A: True, B: False}
        assert t.events == [Event("backend-healthy", A, WEB)]
        assert t.engine.warm == [(WEB, A)], "it is our start, and no recovery"
        assert t.engine.standings[WEB, B].known
        t.apply(service(Backend(A), Backend(B), Backend(C), initially=Initially.DOWN))
        assert t.healthy()[C] is False
        await asyncio.sleep(10)
        assert t.healthy()[C] is True
        assert t.engine.warm == [(WEB, A)], "what is new begins slowly"
        t.health.close()

    hours(main())


# ---- over configurations ----


def test_a_reload_brings_no_dead_backend_back():
    async def main():
        t = bed(service()).start()
        t.answers[CheckKind.TCP, A] = DOWN
        await asyncio.sleep(10)
        asked = len(t.times(CheckKind.TCP, A))
        for _ in range(20):  # the same again, often: neither a burst of checks nor none
            t.apply(service())
            await asyncio.sleep(0.5)
        assert 3 <= len(t.times(CheckKind.TCP, A)) - asked <= 7
        other = replace(TCP, interval=5.0, fall=5)
        for checks in ((other,), (replace(other, port=81),), (HTTP,), (HTTP, TCP), None, (TCP,)):
            t.answers[CheckKind.HTTP, A] = t.answers[CheckKind.FALLBACK, A] = DOWN
            t.apply(service(checks=checks))
            assert t.healthy() == {A: False, B: True}, checks
            await asyncio.sleep(20)
            assert t.healthy() == {A: False, B: True}, checks
        t.apply(service(Backend(A, weight=5), Backend(B), Backend(C)))
        assert t.healthy() == {A: False, B: True, C: True}
        t.apply(service(Backend(A, state=State.MAINT), Backend(B)))
        await asyncio.sleep(20)
        t.apply(service())
        assert (t.healthy()[A], t.healthy()[B]) == (False, True)
        assert t.kinds() == ["backend-unhealthy"]
        t.answers.clear()
        await asyncio.sleep(10)
        assert t.healthy()[A]
        t.apply(service(checks=()))
        assert t.health.results((WEB, A)) == []
        t.health.close()

    hours(main())


def test_who_is_not_checked_any_more_serves_again_and_it_is_said():
    async def main():
        t = bed(service(checks=(TCP, REDIRECT))).start()
        t.answers[CheckKind.TCP, A] = t.answers[CheckKind.REDIRECT, B] = DOWN
        await asyncio.sleep(10)
        assert sorted(t.kinds()) == ["backend-unhealthy", "redirects-stopped"]
        t.events.clear()
        prepared = t.health.prepare(replace(t.config, services=(service(checks=()),))).standings
        assert t.events == []
        assert t.healthy() == {A: False, B: True}
        began = time.time()
        t.apply(service(checks=()))
        assert t.engine.standings == prepared
        assert t.healthy() == {A: True, B: True}
        why = "it is not checked any more"
        assert t.events == [
            Event("backend-healthy", A, WEB, why), Event("redirects-resumed", B, WEB, why)
        ]  # fmt: skip
        assert t.health.since((WEB, A)) >= began - 1
        # Somebody's word is no news of its health.
        t.apply(service(Backend(A, state=State.DEAD), Backend(B), checks=()))
        t.apply(service())
        assert len(t.events) == 2
        t.health.close()

    hours(main())


def test_maintenance_is_not_checked_and_ends_at_once():
    async def main():
        t = bed(service(Backend(A, state=State.MAINT), Backend(B))).start()
        await asyncio.sleep(30)
        assert t.times(CheckKind.TCP, A) == []
        t.apply(service())
        await asyncio.sleep(2.3)
        assert t.times(CheckKind.TCP, A)
        t.apply(service(Backend(A, state=State.MAINT), Backend(B)))
        asked = len(t.times(CheckKind.TCP, A))
        await asyncio.sleep(30)
        assert len(t.times(CheckKind.TCP, A)) == asked
        t.apply(service(Backend(B)))
        assert t.health.of((WEB, A)) is None
        t.health.close()

    hours(main())


# ---- over daemons ----


def restarted(after: float, *services: Service, then: object = None):
    """Of A, which was down: what the next daemon thinks at once, and a moment later, with a server that is well by
    then; and how soon it asked."""

    async def first():
        t = bed(service()).start()
        t.answers[CheckKind.TCP, A] = DOWN
        await asyncio.sleep(10)
        kept = json.loads(json.dumps(t.health.export()))
        t.health.close()
        return kept

    kept = hours(first())
    for entry in kept:
        for check in entry["checks"]:
            check["at"] -= after

    async def second():
        t = bed(*(services or (service(),)), kept=kept)
        at_once = t.healthy(), t.health.results((WEB, A))[0]
        t.since = t.health.since((WEB, B))
        t.answers[CheckKind.TCP, A] = then
        t.start()
        await asyncio.sleep(0.3)
        soon = bool(t.times(CheckKind.TCP, A))
        await asyncio.sleep(10)
        t.health.close()
        return (*at_once, soon, t)

    return hours(second())


def test_results_outlive_a_daemon():
    healthy, result, _, t = restarted(0)
    assert healthy == {A: False, B: True}
    assert (result.healthy, result.ok, result.reason) == (False, False, "refused")
    assert result.streak >= 3
    assert result.history.endswith("---")
    assert t.kinds() == ["backend-healthy"]
    assert (WEB, A) not in t.engine.warm, "it has recovered"
    assert t.since, "it has been so since before"


def test_old_results_are_not_certain():
    healthy, result, soon, t = restarted(300)
    assert healthy == {A: False, B: True}
    assert result.healthy is None
    assert soon
    assert t.kinds() == ["backend-healthy"]
    changed = service(checks=(replace(TCP, interval=5.0),))
    healthy, result, soon, _ = restarted(0, changed)
    assert (healthy, result.healthy, soon) == ({A: False, B: True}, None, True)


def test_a_clock_that_was_set_back():
    healthy, result, soon, _ = restarted(-7200)
    assert (healthy, result.healthy, soon) == ({A: False, B: True}, None, True)


@pytest.mark.parametrize(
    "entries",
    [None, 5, {}, [5], [{}], [{"service": "tcp://10.0.0.100:80", "backend": "x", "since": 0, "checks": []}],
     [{"service": "nothing", "backend": "10.0.0.11", "since": 0, "checks": []}],
     [{"service": "tcp://10.0.0.100:80", "backend": "10.0.0.11", "since": 0, "checks": [{"type": "tcp"}]}]],
)  # fmt: skip
def test_no_results(entries):
    with pytest.raises(ConfigError, match="no results of checks"):
        Health(Engine(Config(("eth0",), ())), lambda _: None).adopt(entries)


# ---- what is seen without checks ----


def test_a_neighbour_that_does_not_answer():
    async def main():
        t = bed(service(checks=None)).start()
        await asyncio.sleep(5)
        t.engine.hop(A, GONE)
        t.asks.clear()
        await asyncio.sleep(10)
        assert t.events == [Event("backend-unhealthy", A, WEB, "the neighbour does not answer")]
        assert not any(ask[2] == A for ask in t.asks), "nothing is sent into nothing"
        assert {r.reason for r in t.health.results((WEB, A))} == {"the neighbour does not answer"}
        assert t.engine.standings[WEB, A].cr
        # Its kernel answers again, and its server does not yet.
        t.answers[CheckKind.TCP, A] = DOWN
        t.engine.hop(A, THERE)
        await asyncio.sleep(10)
        assert t.healthy()[A] is False
        t.answers.clear()
        await asyncio.sleep(3)
        assert t.healthy()[A] is True
        assert t.kinds() == ["backend-unhealthy", "backend-healthy"]
        # Of who is not checked it is known as well; and who is asked for the first time is not gone.
        t.apply(service(checks=()))
        t.engine.hop(A, replace(GONE, asking=True))
        await asyncio.sleep(1)
        assert t.healthy()[A] is True
        t.engine.hop(A, GONE)
        await asyncio.sleep(1)
        assert t.healthy()[A] is False
        t.health.close()

    hours(main())


def test_servers_that_report_that_nothing_listens():
    async def main():
        t = bed(service(), service(vip=MAIL)).start()
        await asyncio.sleep(5)
        t.health.listening((WEB, A), False)
        t.health.listening((WEB, C), False)  # none of ours
        await asyncio.sleep(10)
        assert t.events == [Event("backend-unhealthy", A, WEB, "its server reports that nothing listens")]
        assert t.healthy(MAIL)[A]
        t.apply(service(), service(vip=MAIL))
        assert not t.healthy()[A]
        t.health.listening((WEB, A), True)
        await asyncio.sleep(1)
        assert t.healthy()[A]
        t.health.listening((WEB, A), False)
        await asyncio.sleep(1)
        for listener in t.engine.listeners:
            listener(Event("server-silent", A))
        await asyncio.sleep(1)
        assert t.healthy()[A], "checks decide when its agent is gone"
        t.health.close()

    hours(main())


def test_quorum():
    async def main():
        three = (Backend(A), Backend(B), Backend(C))
        checked = service(*three, quorum=2, quorum_hysteresis=1, panic=0)
        t = bed(checked, service(*three, vip=MAIL, panic=0)).start()
        await asyncio.sleep(5)

        async def down(*addresses):
            t.answers.clear()
            t.answers |= {(CheckKind.TCP, address): DOWN for address in addresses}
            t.events.clear()
            await asyncio.sleep(10)
            return t.health.withdrawn, [k for k in t.kinds() if k.startswith("quorum")]

        assert await down(A) == (set(), [])
        assert await down(A, B) == ({WEB}, ["quorum-lost"])
        assert await down(A) == ({WEB}, [])
        assert await down() == (set(), ["quorum-reached"])
        assert await down(A, B) == ({WEB}, ["quorum-lost"])
        t.apply(replace(checked, quorum=0), service(*three, vip=MAIL, panic=0))
        assert t.health.withdrawn == set()
        t.health.close()

    hours(main())


def test_quorum_at_the_start():
    async def main():
        t = bed(service(quorum=1, initially=Initially.DOWN)).start()
        assert t.health.withdrawn == {WEB}
        await asyncio.sleep(10)
        assert t.health.withdrawn == set()
        t.apply()
        assert t.health.withdrawn == set()
        t.health.close()

    hours(main())


def test_closed_in_between():
    async def main():
        t = bed(service(checks=None)).start()
        await asyncio.sleep(1)
        t.health.close()
        asked = len(t.asks)
        await asyncio.sleep(10)
        assert len(t.asks) == asked
        assert t.engine.listeners == []
        t.health.close()

    hours(main())
