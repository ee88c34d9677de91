"""Which backends serve: the checks' schedule, what is thought of each, and what the engine is told.

A check of one target is made once, whatever services share it.  All of them are in one heap, by when they are due, so
that there is no task for each; what they find out is gathered for a moment, so that a mass failure is one change.
"""

from __future__ import annotations

import asyncio
import hashlib
import heapq
import random
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import structlog

from crablb.control.health import probes
from crablb.control.health.dialogs import Answer, Dialogs, room
from crablb.control.health.machine import Thought, think
from crablb.control.health.probes import Target
from crablb.dataplane.events import Event, HopsChanged, Notice
from crablb.errors import KernelError, why
from crablb.kernel.netlink import HopState, NextHop
from crablb.model import (
    Address,
    Backend,
    Check,
    CheckKind,
    Config,
    Fallback,
    Initially,
    Mode,
    Service,
    State,
    Vip,
)
from crablb.seldom import Seldom
from crablb.selection.standing import Pair, Standing, Verdict

if TYPE_CHECKING:
    from crablb.api.types import CheckResult
    from crablb.control.health.kept import Kept
    from crablb.control.health.syn import Sounder

__all__ = ["Found", "Health", "automatic"]

log = structlog.get_logger()

#: Results that are remembered of each check.
HISTORY = 60
#: Seconds that what was found out is gathered for, and how much of the time may go into telling the engine.
GATHERED, TELLING = 0.02, 0.2
#: Seconds until what the engine could not take is tried again; and what was found out waits no longer, ever.
AGAIN = 1.0
#: An interval's part by which one check's is longer or shorter than another's.
JITTER = 0.1
#: Checks that are begun before the event loop has its turn, and seconds until it is looked again, at least.
BEGUN, LEAST = 32, 0.005
#: Programs (exec) at a time.
PROGRAMS = 16
#: Seconds between looks whether checks get their turn, that one may wait for it, and until they do again for certain.
LOOK, LATE, CALM = 1.0, 2.0, 10.0
#: Seconds after which what was found out before a restart is not taken for certain, and within which such a backend
#: is checked.
CERTAIN, AT_ONCE = 60.0, 0.25
#: Why a backend is healthy again of which its last check was taken.
UNCHECKED = "it is not checked any more"

BY_SYN = (CheckKind.REDIRECT, CheckKind.FALLBACK)
WEIGHING = (CheckKind.AGENT, CheckKind.EXEC)
TCP, REDIRECT, FALLBACK = map(Check, (CheckKind.TCP, *BY_SYN))


def automatic(service: Service, backend: Backend) -> tuple[Check, ...]:
    """How a backend is checked of whose service no check is configured: as its clients come."""
    if service.mode is Mode.NEVER or not backend.cr:
        return (FALLBACK,)  # its server may listen on the VIP alone
    return (TCP, REDIRECT) if service.mode is Mode.ALWAYS else (TCP, REDIRECT, FALLBACK)


class _Asks(NamedTuple):
    """What a configuration says that concerns a backend's checks."""

    checks: tuple[Check, ...] | None
    mode: Mode
    fallback: Fallback
    initially: Initially
    checked: bool
    dead: bool
    cr: bool
    address: Address | None
    port: int | None


def _asks(service: Service, backend: Backend) -> _Asks:
    state = backend.state
    return _Asks(
        service.checks, service.mode, service.fallback, service.initially, state not in (State.MAINT, State.DEAD),
        state is State.DEAD, backend.cr, backend.check_address, backend.check_port,
    )  # fmt: skip


class _Key:
    """What makes two checks the same one.  There are many, in dictionaries: its hash is made once, of little."""

    __slots__ = ("_digest", "_hash", "address", "backend", "check", "port", "up", "vip", "way")

    def __init__(
        self,
        check: Check,
        backend: Address,
        address: Address,
        port: int,
        vip: Vip | None,
        way: Fallback | None,
        up: bool,
    ) -> None:
        self.check, self.backend, self.address, self.port = check, backend, address, port
        self.vip = vip  # None: it does not concern the check
        self.way = way  # of a fallback check
        self.up = up  # what is thought at first
        self._digest = ""  # made when it is asked for
        self._hash = hash((check.kind.value, int(backend), port, int(vip.address) if vip else 0))

    @property
    def what(self) -> tuple[Check, Address, Address, int, Vip | None, Fallback | None]:
        """All but what is thought at first."""
        return self.check, self.backend, self.address, self.port, self.vip, self.way

    @property
    def digest(self) -> str:
        """A text that is another one where the check is."""
        if not self._digest:
            self._digest = hashlib.blake2s(repr(self.what).encode(), digest_size=8).hexdigest()
        return self._digest

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, _Key) and self.up is other.up and self.what == other.what)


def _key(service: Service, backend: Backend, check: Check) -> _Key:
    own = check.kind in (*BY_SYN, CheckKind.EXEC)
    address = backend.address if own else backend.check_address or backend.address
    port = backend.check_port or check.port or service.vip.port
    if check.kind in BY_SYN:
        port = service.vip.port
    named = check.kind in (CheckKind.TCP, CheckKind.AGENT) or (check.host and not own)
    way = service.fallback if check.kind is CheckKind.FALLBACK else None
    vip = None if named else service.vip
    return _Key(check, backend.address, address, port, vip, way, service.initially is Initially.UP)


class _Job:
    """A check of one target."""

    __slots__ = (
        "at", "backends", "began", "drained", "due", "failure", "gone", "history", "key", "percent", "reason",
        "running", "seconds", "since", "target", "thought", "within",
    )  # fmt: skip

    def __init__(self, key: _Key, vip: Vip) -> None:
        self.key = key
        self.target = Target(vip, key.backend, key.address, key.port)
        self.backends: list[_Backend] = []
        self.thought = Thought(key.up)
        self.percent, self.drained = 100, False
        self.reason = self.failure = "not checked yet"
        self.history = ""
        self.at = self.since = self.seconds = self.began = 0.0
        self.due: float | None = None  # None: it is under way, or nobody wants it
        self.within = key.check.interval  # of which the first is due
        self.running = self.gone = False

    @property
    def kind(self) -> CheckKind:
        return self.key.check.kind

    @property
    def to_hop(self) -> bool:
        """It goes to the backend's own address."""
        return self.key.address == self.key.backend

    @property
    def wanted(self) -> bool:
        """Somebody wants to know."""
        return any(backend.asks.checked for backend in self.backends)

    def take(self, answer: Answer, seconds: float, at: float) -> bool:
        """Whether it changes what is thought of the backend.  ``at``: seconds of the event loop's clock."""
        check, before = self.key.check, self.thought
        said = self.percent, self.drained
        fall, rise = (1, 1) if answer.decisive else (check.fall, check.rise)
        self.thought = think(before, answer.ok, fall, rise)
        new = self.thought[:2] != before[:2]
        if new:
            self.since = at
        self.reason, self.seconds, self.at = answer.reason, seconds, at
        if answer.ok is False:
            self.failure = answer.reason
        if answer.percent is not None:
            self.percent = answer.percent
        if answer.drain is not None:
            self.drained = answer.drain
        self.history = (self.history + ("?" if answer.ok is None else "+" if answer.ok else "-"))[-HISTORY:]
        return new or (self.percent, self.drained) != said

    def fail(self, reason: str, at: float) -> None:
        """As many failures as it takes."""
        self.thought = Thought(False, True, False, self.key.check.fall)
        self.failure, self.since = reason, at

    def go_on_from(self, before: _Job) -> None:
        """It is the same check with other settings: what was thought stays until it has said something itself."""
        self.thought = Thought(before.thought.up, before.thought.known)
        self.percent, self.drained = before.percent, before.drained
        self.reason, self.failure, self.history = before.reason, before.failure, before.history
        self.at, self.since, self.seconds = before.at, before.since, before.seconds


class Found(NamedTuple):
    """What was found out about a backend of a service."""

    healthy: bool = True
    known: bool = False  # else nothing was found out yet, or it is not checked
    reason: str = ""  # why it is not healthy
    cr: bool = True
    cr_reason: str = ""  # why it is not redirected to
    percent: int = 100

    @property
    def standing(self) -> Standing:
        return Standing(self.healthy, self.cr, self.known or self.healthy, self.percent)


class _Backend:
    """A backend of a service."""

    __slots__ = ("asks", "cr_told", "deserted", "first", "found", "jobs", "obstacle", "pair", "since")

    def __init__(self, pair: Pair, asks: _Asks, jobs: tuple[_Job, ...], *, first: bool) -> None:
        self.pair, self.asks, self.jobs = pair, asks, jobs
        self.obstacle = ""  # why nothing can be sent to it
        self.deserted = False  # its server says that nothing listens
        self.first = first  # nothing was found out yet, since our start
        self.cr_told = True
        self.since = 0.0
        self.found = Found()

    def look(self) -> Found:
        """What follows from all that is known."""
        healthy, known, reason, cr, cr_reason = True, False, "", True, ""
        if self.obstacle or (self.deserted and self.jobs):
            healthy, known, reason = False, True, self.obstacle or "its server reports that nothing listens"
        for job in self.jobs:
            up = job.thought.up
            if job.kind is CheckKind.REDIRECT:
                cr, cr_reason = up, "" if up else f"redirect: {job.failure}"
                continue
            known = known or job.thought.known
            if not up:
                healthy, reason = False, reason or f"{job.kind.value}: {job.failure}"
        said = (0 if job.drained else job.percent for job in self.jobs if job.kind in WEIGHING)
        return Found(healthy, known, reason, cr, cr_reason, min(said, default=100))


@dataclass(frozen=True, slots=True)
class Followed:
    """What there is to check for a configuration; :meth:`Health.follow` begins with it."""

    config: Config
    backends: Mapping[Pair, _Backend]
    jobs: Mapping[_Key, _Job]
    standings: Mapping[Pair, Standing]


class Engine(Protocol):
    """What is needed of :class:`crablb.dataplane.engine.Engine`."""

    listeners: list[Callable[[Notice], None]]

    @property
    def config(self) -> Config: ...
    @property
    def hops(self) -> Mapping[Address, NextHop]: ...
    @property
    def verdicts(self) -> Mapping[Vip, Verdict]: ...
    def judge(self, standings: Mapping[Pair, Standing], warm: Collection[Pair] = ()) -> None: ...


class Health:
    """Checks the backends of an engine, from :meth:`start` to :meth:`close`.

    Before the start, and with each other configuration: what :meth:`prepare` returns has the standings to serve it
    with, and :meth:`follow` begins to check it.  ``tell`` is told each :class:`Event`.
    """

    def __init__(self, engine: Engine, tell: Callable[[Event], None]) -> None:
        self._engine, self._tell = engine, tell
        self._backends: dict[Pair, _Backend] = {}
        self._jobs: dict[_Key, _Job] = {}
        self._kept: Mapping[Pair, Kept] = {}
        self._by_address: dict[Address, list[_Backend]] = {}
        self._due: list[tuple[float, int, _Job]] = []
        self._serial = 0
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._dialogs, self._programs = Dialogs(room()), Dialogs(PROGRAMS)
        self._dirty: set[_Backend] = set()
        self._telling: asyncio.TimerHandle | None = None
        self._told = 0.0  # when the engine may be told next
        self._sounder: Sounder | None = None
        self._asking: set[asyncio.Task[None]] = set()  # by SYNs
        self._seldom = Seldom()
        self._untried: set[_Job] = set()  # that this host kept from being made, the last time
        self._looking: asyncio.TimerHandle | None = None
        self._late_since: float | None = None  # last seen; None: checks are in time
        self._started = False
        #: Seconds that a check waits for its turn, the longest, a second ago at most.
        self.late = 0.0
        #: What keeps checks from being made in time, in words.
        self.trouble: tuple[str, ...] = ()
        #: Services that have not enough healthy backends to be announced.
        self.withdrawn: set[Vip] = set()

    # ---- what there is to check ----

    def foreknown(self, config: Config) -> bool:
        """Whether there is something that a configuration has to be served with from the start.

        If not, it may be served before it is prepared, which takes 0.3 s for 10,000 backends.
        """
        down = any(service.initially is Initially.DOWN for service in config.services)
        checks = (check for kept in self._kept.values() for check in kept.checks)
        return down or any(not check.up or check.drained or check.percent != 100 for check in checks)

    def prepare(self, config: Config) -> Followed:
        """What there is to check for a configuration; nothing changes yet."""
        backends: dict[Pair, _Backend] = {}
        jobs: dict[_Key, _Job] = {}
        for service in config.services:
            for backend in service.backends:
                pair = service.vip, backend.address
                before, asks = self._backends.get(pair), _asks(service, backend)
                if before and before.asks == asks:
                    backends[pair] = before
                    jobs.update((job.key, job) for job in before.jobs)
                else:
                    made = tuple(self._job(key, service.vip, jobs) for key in self._wanted(service, backend))
                    backends[pair] = self._backend(pair, asks, made)
        standings = {pair: backend.found.standing for pair, backend in backends.items()}
        return Followed(config, backends, jobs, standings)

    def _wanted(self, service: Service, backend: Backend) -> Iterable[_Key]:
        if backend.state is State.DEAD:
            return ()
        checks = automatic(service, backend) if service.checks is None else service.checks
        redirected = service.mode is not Mode.NEVER and backend.cr
        wanted = (_key(service, backend, c) for c in checks if redirected or c.kind is not CheckKind.REDIRECT)
        return dict.fromkeys(wanted)

    def _job(self, key: _Key, vip: Vip, jobs: dict[_Key, _Job]) -> _Job:
        return jobs.get(key) or jobs.setdefault(key, self._jobs.get(key) or _Job(key, vip))

    def _backend(self, pair: Pair, asks: _Asks, jobs: tuple[_Job, ...]) -> _Backend:
        before, kept = self._backends.get(pair), self._kept.get(pair)
        made = _Backend(pair, asks, jobs, first=before.first if before else not self._started and not kept)
        fresh = [job for job in jobs if job.key not in self._jobs]
        if before:
            made.obstacle, made.deserted = before.obstacle, before.deserted
            made.since, made.cr_told = before.since, before.cr_told
            for job in fresh:
                alike = [old for old in before.jobs if old.kind is job.kind]
                if alike:
                    job.go_on_from(alike[0])
                elif before.jobs and job.kind is not CheckKind.REDIRECT:
                    job.thought = Thought(before.found.healthy)
                    job.failure = before.found.reason or job.failure
        elif kept:
            made.since = self._loop_time(kept.since)
            for job in fresh:
                self._take_up(job, kept)
        made.found = made.look()
        return made

    def follow(self, followed: Followed) -> None:
        """Check these from now on."""
        for key in self._jobs.keys() - followed.jobs.keys():
            self._jobs[key].gone = True
            self._jobs[key].backends = []  # a cycle, which perhaps no collector looks for (control/daemon.py)
        before = self._backends
        self._backends, self._jobs = dict(followed.backends), dict(followed.jobs)
        self._kept = {}
        self._by_address = {}
        for job in self._jobs.values():
            job.backends = []
        for (_, address), backend in self._backends.items():
            self._by_address.setdefault(address, []).append(backend)
            for job in backend.jobs:
                job.backends.append(backend)
        self._dirty = {self._backends[backend.pair] for backend in self._dirty if backend.pair in self._backends}
        self._untried = {job for job in self._untried if not job.gone}
        self.withdrawn &= {service.vip for service in followed.config.services}
        if self._started:
            self._tell_changed(before)
            self._begin()

    def _tell_changed(self, before: Mapping[Pair, _Backend]) -> None:
        """Tell of the backends that other checks, or none, have made healthy, or unhealthy."""
        at = self._now()
        for pair, backend in self._backends.items():
            old = before.get(pair)
            if old and old is not backend and not backend.asks.dead and not old.asks.dead:
                for event in self._became(backend, old.found, at):
                    self._tell(event if event.reason or backend.jobs else replace(event, reason=UNCHECKED))

    # ---- life ----

    def start(self) -> None:
        """Begin to check, in the running event loop; the engine serves.  Raises :class:`KernelError`."""
        self._loop = asyncio.get_running_loop()
        try:
            self._dialogs.start()
            self._programs.start()
        except OSError as error:
            raise KernelError(f"cannot check backends: {error.strerror}; see ulimit -n, LimitNOFILE=") from None
        self._started = True
        self._engine.listeners.append(self._hear)
        self._begin()
        self._looking = self._loop.call_later(LOOK, self._look_at_turns)

    def _begin(self) -> None:
        """Whatever is new of what is followed."""
        self._hops_are(self._engine.hops)
        self._sound()
        now = self._now()
        phases: dict[Address, float] = {}
        for job in self._jobs.values():
            if job.due is None and not job.running and job.wanted:
                phase = phases.setdefault(job.key.backend, random.random())
                self._schedule(job, now + job.within * phase)
        self._look_at_quorums()

    def _sound(self) -> None:
        """Have SYNs sent, where a check is by them."""
        if not any(key.check.kind in BY_SYN for key in self._jobs):
            return
        if self._sounder is None:
            from crablb.control.health.syn import Sounder

            sounder = Sounder()
            try:
                sounder.start()
            except KernelError as error:
                log.warning("backends are not checked by SYNs", reason=str(error))
                return
            self._sounder = sounder
        self._sounder.follow(self._engine.config.services)

    def close(self) -> None:
        """Break off all checks.  Idempotent."""
        if not self._started:
            return
        self._started = False
        self._engine.listeners.remove(self._hear)
        for handle in (self._timer, self._telling, self._looking):
            if handle:
                handle.cancel()
        self._timer = self._telling = self._looking = None
        for task in self._asking:
            task.cancel()
        self._dialogs.close()
        self._programs.close()
        if self._sounder:
            self._sounder.close()
            self._sounder = None

    def _now(self) -> float:
        return self._loop.time()

    # ---- the schedule ----

    def _schedule(self, job: _Job, at: float) -> None:
        job.due = at
        self._serial += 1
        heapq.heappush(self._due, (at, self._serial, job))
        if self._timer is None or at < self._timer_at:
            self._wake(at)

    def _wake(self, at: float) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer_at = max(at, self._now() + LEAST)
        self._timer = self._loop.call_at(self._timer_at, self._tick)

    def _tick(self) -> None:
        self._timer = None
        now = self._now()
        for _ in range(BEGUN):
            if not self._due or self._due[0][0] > now:
                break
            at, _, job = heapq.heappop(self._due)
            if job.due == at and not job.gone:  # else it was put off, or is no more
                job.due = None
                if job.wanted and not job.running:
                    self._try(job, now)
        if self._due:
            self._wake(self._due[0][0])

    def _try(self, job: _Job, now: float) -> None:
        try:
            self._run(job, now)
        except Exception as fault:  # ours, or for want of memory; the others go on
            self._failed(job, fault)

    def _failed(self, job: _Job, fault: Exception) -> None:
        if times := self._seldom.due("failed"):
            log.error("a check could not be made", times=times, **why(fault))
        self._done(job, Answer(None, f"could not be tried: {fault!r}", own=True), 0.0)

    def _run(self, job: _Job, now: float) -> None:
        job.running, job.began = True, now
        hop = self._engine.hops.get(job.key.backend)
        done = partial(self._done, job)
        if job.to_hop and (hop is None or hop.state is not HopState.RESOLVED):
            done(Answer(None, hop.reason if hop else "the way to it is not known"), 0.0)
        elif job.kind in BY_SYN:
            if hop and self._sounder:
                task = self._loop.create_task(self._ask(job, hop))
                self._asking.add(task)
                task.add_done_callback(self._asking.discard)
            else:
                done(Answer(None, "no SYNs can be sent; the log has the reason", own=True), 0.0)
        else:
            dialogs = self._programs if job.kind is CheckKind.EXEC else self._dialogs
            dialogs.hold(probes.ask(job.key.check, job.target), job.key.check.timeout, done)

    async def _ask(self, job: _Job, hop: NextHop) -> None:
        """By a SYN."""
        key, vip = job.key, job.target.vip
        assert self._sounder
        try:
            if job.kind is CheckKind.REDIRECT:
                form = self._engine.config.option
                answer = await self._sounder.redirect(hop, key.backend, vip, form, key.check.timeout)
            else:
                answer = await self._sounder.fallback(
                    hop, key.backend, vip, key.way or Fallback.AUTO, key.check.timeout
                )
        except Exception as fault:
            self._failed(job, fault)
        else:
            self._done(job, Answer(answer.ok, answer.reason), answer.seconds)

    def _done(self, job: _Job, answer: Answer, seconds: float) -> None:
        job.running = False
        if job.gone or not self._started:
            return
        now = self._now()
        (self._untried.add if answer.own else self._untried.discard)(job)
        if job.take(answer, seconds, now):
            self._dirty.update(job.backends)
            self._tell_soon()
        if job.thought.moving and job.thought.streak == 1:
            self._hurry(job, now)
        check = job.key.check
        interval = min(check.interval, check.fast_interval) if job.thought.moving else check.interval
        due = job.began + interval * random.uniform(1 - JITTER, 1 + JITTER)
        near = 2 * JITTER * interval
        # With the backend's other checks, if one is due about then: to wake up for each costs more than the check.
        together = (other.due for other in job.backends[0].jobs if other.due and abs(other.due - due) < near)
        self._schedule(job, max(now, next(together, due)))

    # ---- whether they get their turn ----

    def _look_at_turns(self) -> None:
        """Whatever bounds checks, it is by their being late, or not made, that it is seen."""
        now = self._now()
        self._looking = self._loop.call_later(LOOK, self._look_at_turns)
        (sockets, socket_late), (programs, program_late) = self._dialogs.waiting, self._programs.waiting
        loop_late = now - self._due[0][0] if self._due else 0.0
        self.late = max(0.0, loop_late, socket_late, program_late)
        untried = [job for job in self._untried if job.wanted]
        found = (
            (socket_late > LATE, f"{sockets} checks wait for one of {self._dialogs.room} descriptors, the first for"
             f" {socket_late:.0f} s: raise LimitNOFILE= (ulimit -n), or shorten their timeout"),
            (program_late > LATE, f"{programs} exec checks wait, the first for {program_late:.0f} s, as"
             f" {PROGRAMS} run at a time: fewer, a longer interval or a shorter timeout"),
            (loop_late > LATE, f"checks are {loop_late:.0f} s late, for want of CPU time: longer intervals, fewer"
             " checks, or a faster machine"),
            (untried, f"{len(untried)} checks cannot be made on this host: {untried[0].reason if untried else ''}"),
        )  # fmt: skip
        self.trouble = tuple(text for there, text in found if there)
        if self.trouble:
            if self._late_since is None:
                self._tell(Event("checks-late", reason="; ".join(self.trouble)))
            self._late_since = now
        elif self._late_since is not None and now - self._late_since >= CALM:
            self._late_since = None
            self._tell(Event("checks-in-time"))

    @property
    def untried(self) -> int:
        """Checks that this host kept from being made, the last time."""
        return sum(job.wanted for job in self._untried)

    def _hurry(self, job: _Job, now: float) -> None:
        """Something has changed there: what the backend's other checks say is of interest now."""
        for other in {other for backend in job.backends for other in backend.jobs} - {job}:
            soon = now + random.uniform(0, other.key.check.fast_interval)
            if other.due is not None and other.due > soon:
                self._schedule(other, soon)

    # ---- what is found out otherwise ----

    def _hear(self, notice: Notice) -> None:
        if isinstance(notice, HopsChanged):
            self._hops_are(notice.now)
        elif isinstance(notice, Event) and notice.kind == "server-silent" and notice.backend:
            # What it said last is not known to be so any more; checks are.
            for backend in self._by_address.get(notice.backend, ()):
                self._listens(backend, True)

    def listening(self, pair: Pair, listens: bool) -> None:
        """A server's report, whether something listens for the service."""
        if backend := self._backends.get(pair):
            self._listens(backend, listens)

    def _listens(self, backend: _Backend, listens: bool) -> None:
        if backend.deserted is listens:
            backend.deserted = not listens
            self._dirty.add(backend)
            self._tell_soon()

    def _hops_are(self, hops: Mapping[Address, NextHop]) -> None:
        """A neighbour that does not answer is as many failures as it takes: nothing is sent there any more."""
        for address, hop in hops.items():
            obstacle = "" if hop.state is HopState.RESOLVED or hop.asking else hop.reason
            for backend in self._by_address.get(address, ()):
                if backend.obstacle != obstacle:
                    self._obstructed(backend, obstacle)

    def _obstructed(self, backend: _Backend, obstacle: str) -> None:
        before, backend.obstacle = backend.obstacle, obstacle
        self._dirty.add(backend)
        self._tell_soon()
        now = self._now()
        for job in backend.jobs:
            if job.to_hop and obstacle and not before and job.kind is not CheckKind.REDIRECT:
                job.fail(obstacle, now)
            elif job.to_hop and not obstacle and not job.running and job.wanted:
                self._schedule(job, now + random.uniform(0, AT_ONCE))

    # ---- what follows ----

    def _tell_soon(self) -> None:
        if self._telling is None and self._started:
            self._telling = self._loop.call_at(max(self._now() + GATHERED, self._told), self._tell_engine)

    def _tell_engine(self) -> None:
        """All that was found out since the last time, at once."""
        self._telling = None
        # A machine that has no time for us is no reason to take some more: the thread's own time counts.
        began, spent = self._now(), time.thread_time()
        found = {backend: backend.look() for backend in self._dirty}
        standings = {backend.pair: now.standing for backend, now in found.items()}
        warm = {backend.pair for backend, now in found.items() if backend.first and now.healthy > backend.found.healthy}
        try:
            self._engine.judge(standings, warm)
        except Exception as error:  # for want of memory, perhaps
            log.error("what checks found out is not served yet; it is tried again", seconds=AGAIN, **why(error))
            self._told = began + AGAIN
            self._tell_soon()
            return
        self._dirty.clear()
        for backend, now in found.items():
            before, backend.found = backend.found, now
            for event in self._became(backend, before, began):
                self._tell(event)
        self._look_at_quorums()
        self._told = self._now() + min((time.thread_time() - spent) / TELLING, AGAIN)

    def _became(self, backend: _Backend, before: Found, at: float) -> Iterator[Event]:
        (vip, address), now = backend.pair, backend.found
        backend.first = backend.first and not now.known
        if now.healthy is not before.healthy:
            backend.since = at
            yield Event("backend-healthy" if now.healthy else "backend-unhealthy", address, vip, now.reason)
        if now.cr is not backend.cr_told and now.healthy:  # of who gets nothing it does not matter
            backend.cr_told = now.cr
            yield Event("redirects-resumed" if now.cr else "redirects-stopped", address, vip, now.cr_reason)

    def _look_at_quorums(self) -> None:
        for vip, verdict in self._engine.verdicts.items():
            quorum, more = verdict.service.quorum, verdict.service.quorum_hysteresis
            if vip in self.withdrawn and verdict.healthy >= quorum + (more if quorum else 0):
                self.withdrawn.discard(vip)
                self._tell(Event("quorum-reached", vip=vip, reason=f"weight {verdict.healthy} is healthy"))
            elif vip not in self.withdrawn and verdict.healthy < quorum:
                self.withdrawn.add(vip)
                reason = f"weight {verdict.healthy} is healthy, of {quorum} at least"
                self._tell(Event("quorum-lost", vip=vip, reason=reason))

    # ---- what there is to know ----

    def of(self, pair: Pair) -> Found | None:
        """What was found out about a backend of a service; None: it is none."""
        backend = self._backends.get(pair)
        return backend.found if backend else None

    def awaited(self, pair: Pair) -> bool:
        """Whether a backend is as it was configured to be at first, as none of its checks has said anything yet."""
        backend = self._backends.get(pair)
        if not backend or backend.found.known or not backend.asks.checked:
            return False
        return any(job.kind is not CheckKind.REDIRECT for job in backend.jobs)

    def since(self, pair: Pair) -> float:
        """At what time (seconds since 1970), of before a restart too, a backend became healthy or unhealthy, or its
        checks first said what they say; 0: that is not known."""
        backend = self._backends.get(pair)
        if not backend:
            return 0.0
        at = backend.since or max((job.since for job in backend.jobs if job.thought.known), default=0.0)
        return self._at(at) if at else 0.0

    def results(self, pair: Pair) -> list[CheckResult]:
        """The checks of a backend of a service; none, if there are none, or it is none."""
        from crablb.api.types import CheckResult

        backend = self._backends.get(pair)
        return [
            CheckResult(
                type=job.kind.value,
                healthy=job.thought.up if job.thought.known else None,
                ok={"+": True, "-": False}.get(job.history[-1:]),
                reason=job.reason,
                at=self._at(job.at) if job.at else 0.0,
                seconds=job.seconds,
                streak=job.thought.streak,
                since=self._at(job.since) if job.since else 0.0,
                history=job.history,
            )
            for job in (backend.jobs if backend else ())
        ]

    def _at(self, moment: float) -> float:
        return time.time() - (time.monotonic() - moment)

    # ---- over restarts ----

    def export(self) -> list[dict[str, Any]]:
        """All that is known, as plain values for :meth:`adopt`: an entry for each backend of a service.

        May be called in another thread: of many it takes its time.
        """
        return [
            {
                "service": str(backend.pair[0]),
                "backend": str(backend.pair[1]),
                "since": self._at(backend.since) if backend.since else 0.0,
                "checks": [self._exported(job) for job in backend.jobs],
            }
            for backend in list(self._backends.values())
        ]

    def _exported(self, job: _Job) -> dict[str, Any]:
        up, known, ok, streak = job.thought
        return {
            "type": job.kind.value, "check": job.key.digest, "up": up, "known": known, "ok": ok, "streak": streak,
            "percent": job.percent, "drained": job.drained, "reason": job.reason, "failure": job.failure,
            "history": job.history, "seconds": job.seconds, "at": self._at(job.at) if job.at else 0.0,
            "since": self._at(job.since) if job.since else 0.0,
        }  # fmt: skip

    def adopt(self, entries: object) -> None:
        """What another daemon :meth:`export`-ed, before the first :meth:`prepare`.

        What is older than a minute, or was found out by a check that is another one now, is not taken for certain: the
        backend starts as it was, and is checked at once.  Raises :class:`ConfigError` if it is no such thing.
        """
        from crablb.control.health.kept import read  # msgspec is no small thing

        self._kept = read(entries)

    def _loop_time(self, at: float) -> float:
        """Of a time since 1970 that is not in the future; 0.0 if it is."""
        return max(0.0, time.monotonic() - max(0.0, time.time() - at)) if at else 0.0

    def _take_up(self, job: _Job, kept: Kept) -> None:
        """Go on from what the check found out before, or the one that is most like it."""
        alike = [old for old in kept.checks if old.type == job.kind.value]
        old = next((old for old in alike if old.check == job.key.digest), alike[0] if alike else None)
        if old is None:
            return
        certain = old.check == job.key.digest and abs(time.time() - old.at) <= CERTAIN
        if certain:
            job.thought = Thought(old.up, old.known, old.ok, old.streak)
        else:
            job.thought = Thought(old.up)
            job.within = min(AT_ONCE, job.within)
        job.percent, job.drained = old.percent, old.drained
        job.reason, job.failure, job.history = old.reason, old.failure, old.history[-HISTORY:]
        job.at, job.since, job.seconds = self._loop_time(old.at), self._loop_time(old.since), old.seconds
