"""What is wanted: the configuration as it was read last, and over it the changes at run time.

Whoever reads the configuration again, whatever for, does it here; so does who saves it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import structlog

from crablb import values
from crablb.api import types
from crablb.config import parse_config
from crablb.control.estate import Parts
from crablb.control.plan import Seen, plan, summary
from crablb.control.state import Store, write
from crablb.control.supervisor import Supervisor, check
from crablb.control.watch import Watch
from crablb.dataplane.events import Event
from crablb.errors import ConfigError, why
from crablb.kernel.netlink import HopState
from crablb.lint import odd
from crablb.model import Config
from crablb.overlay import Changes, between, diff, overlay, save
from crablb.selection.standing import Pair, Standing
from crablb.values import read_text

__all__ = ["Wanted", "recall", "remember"]

log = structlog.get_logger()

#: Seconds until what could not be applied, for want of memory perhaps, is tried again.
AGAIN = 1.0
#: Seconds that whoever changes something waits at most until it is written down.
WRITTEN = 1.0
#: What is answered while a successor is on its way.
HELD = "another process is taking over just now; try again in a moment"
#: Lines of what a reload did that are logged; the rest is for who asks.
TOLD = 20


def recall(given: Config, store: Store | None, living: Parts | None = None) -> tuple[Config, Any]:
    """The configuration with the changes in it that were made to it at run time, and what its checks had found out.

    What does not fit any more is told, and left out.  ``living``: as a process has them that lives, whatever is in the
    file.
    """
    saved = store.load() if store else None
    known = living or saved
    if not known:
        return given, None
    wanted, warnings = overlay(given, known.changes)
    _warn(warnings)
    try:
        check(wanted)
    except ConfigError as error:
        if wanted is given:
            raise
        _warn([f"{problem}; what was changed at run time is given up" for problem in error.problems])
        wanted = given
    if lines := diff(between(given, wanted)):
        log.info("changes at run time hold on; crablb diff tells them", changes=lines[:TOLD], count=len(lines))
    if store:
        store.keep(between(given, wanted))
    return wanted, known.health


def remember(supervisor: Supervisor, store: Store | None, found: Any) -> None:
    """Have the checks of a supervisor that has not started go on from what was ``found`` out before, and keep that."""
    try:
        supervisor.health.adopt(found or [])
    except ConfigError as error:
        log.warning("what checks had found out is not known; backends are checked anew", reason=str(error))
    if not store:
        return
    store.health = supervisor.health.export

    def hear(event: Event) -> None:
        if event.kind in ("backend-healthy", "backend-unhealthy"):
            store.touch()

    supervisor.listeners.append(hear)


def _warn(warnings: Sequence[str]) -> None:
    for warning in warnings:
        log.warning("a change at run time holds no more", reason=warning)


def _same(before: Config, after: Config) -> Config:
    """The second, with services that are as before the same objects: of these nothing is made anew."""
    old = {service.vip: service for service in before.services}
    services = (old[s.vip] if old.get(s.vip) == s else s for s in after.services)
    return replace(after, services=tuple(services))


class Wanted:
    """Of a supervisor that has what is wanted; to be asked in its event loop."""

    def __init__(
        self,
        supervisor: Supervisor,
        *,
        given: Config | None = None,
        read: Callable[[], Config] | None = None,
        path: str = "",
        store: Store | None = None,
    ) -> None:
        """``given``: the configuration without changes; None: there are none.  ``read``: it again, from the file
        ``path``; None: there is no file."""
        self._supervisor, self._engine = supervisor, supervisor.engine
        self.given = given or supervisor.engine.config
        self.path = path
        self.applying = False  # whoever asked for that tells what has changed
        self._read, self._store = read, store
        self._one = asyncio.Lock()  # a reload, or a save, at a time
        self._compared: tuple[Config, Config, Changes] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._watch: asyncio.Task[None] | None = None
        self._watching: Watch | None = None
        self._again: asyncio.TimerHandle | None = None
        self._asked: set[asyncio.Future[object]] = set()
        self._held = False  # a successor is on its way
        self.owed = False  # the configuration is to be read again when there is none any more
        if store:
            store.failed = lambda: supervisor.engine.count("state_unsaved")

    def start(self, known: str = "") -> None:
        """Write changes down, and watch the file if that is wanted, until :meth:`close`; do what is owed.

        ``known``: the fingerprint that the file had before what is ``given`` was read; empty: nobody has looked."""
        if self._store:
            self._tasks.append(self._engine.task("state", self._store.run))
        self._rewatch(known)
        self._pay()

    def owe(self) -> None:
        """Read the configuration again when it has started: that was asked for after it was read."""
        self.owed = True

    def _pay(self) -> None:
        if self.owed:
            self.owed = False
            self.reload_soon()

    def hold(self) -> None:
        """A successor is on its way, which reads the configuration itself: change nothing, until :meth:`resume`."""
        self._held = True
        if self._store:
            self._store.hold()

    def resume(self) -> None:
        """There is none any more; what a signal asked for meanwhile, or another file does, is done."""
        self._held = False
        if self._store:
            self._store.resume()
        self._pay()

    async def close(self) -> None:
        """Idempotent."""
        if self._again:
            self._again.cancel()
        tasks: list[asyncio.Future[Any]] = [*self._tasks, *([self._watch] if self._watch else []), *self._asked]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._tasks.clear()
        self._watch = None
        if self._store:
            await self._store.close()

    # ---- what there is ----

    @property
    def changes(self) -> Changes:
        """How what is wanted differs from what the configuration says."""
        compared = self._compared
        if not compared or compared[0] is not self.given or compared[1] is not self._engine.config:
            made = between(self.given, self._engine.config)
            compared = self._compared = self.given, self._engine.config, made
        return compared[2]

    def diff(self) -> types.Diff:
        return types.Diff(configuration=self.path, changes=diff(self.changes), unsaved=self.unsaved)

    @property
    def trouble(self) -> str:
        """Why changes that are to be written down are not; empty: they are."""
        return self._store.trouble if self._store else ""

    @property
    def lost(self) -> str:
        """What was changed at run time before, is not in force, and waits for somebody to look into it; empty:
        nothing."""
        return self._store.lost if self._store else ""

    @property
    def unsaved(self) -> str:
        """Why changes are not written down; empty: they are."""
        return self._store.trouble if self._store else "persist is off, or there is no place for it"

    # ---- changes ----

    def apply(self, config: Config) -> None:
        """Serve it, for one who tells what has changed.  Raises :class:`ConfigError`."""
        self.applying = True
        try:
            self._supervisor.apply(config)
        finally:
            self.applying = False

    def changed(self) -> None:
        """What is wanted was changed at run time: write it down."""
        if self._store:
            self._store.keep(self.changes)

    def follow(self, before: Config | None, after: Config) -> None:
        """The program that it runs in has changed this itself: that is its configuration, no change at run time.

        So is a whole service that it has changed and others had changed as well; ``before`` None: so is all.
        """
        if before is None:
            self.given = after
            return
        was, now = ({service.vip: service for service in config.services} for config in (before, after))
        given = {s.vip: s for s in self.given.services if s.vip in now or s.vip not in was}
        given |= {vip: service for vip, service in now.items() if was.get(vip) != service}
        self.given = replace(after, services=tuple(given.values()))

    async def kept(self, applied: types.Applied) -> types.Applied:
        """What was done, when it is written down; or with a warning that it is not."""
        if not (self._store and applied.changes) or await self._store.written(WRITTEN):
            return applied
        why = self._store.trouble or "the disk is slow"
        warning = f"it is done, but not written down, and gone after a restart: {self._store.path}: {why}"
        return types.Applied(changes=applied.changes, warnings=[*applied.warnings, warning])

    # ---- reading it again ----

    async def plan(self, text: str = "") -> types.Plan:
        """What the text of a configuration would change; empty: what the file would.  Raises :class:`ConfigError`."""
        read = (lambda: self.parse(text)) if text else self._reader()
        new = await asyncio.to_thread(read)
        wanted, warnings = overlay(new, self.changes)
        seen = replace(await self._seen(), then=self._supervisor.health.prepare(wanted).standings)
        before = self._engine.config
        return await asyncio.to_thread(plan, before, wanted, seen, [*warnings, *odd(wanted)])

    async def proposed(self, text: str) -> tuple[Config, Mapping[Pair, Standing]]:
        """What a reload of such a text would serve, and with which standings.  Raises :class:`ConfigError`."""
        wanted, _ = overlay(await asyncio.to_thread(self.parse, text), self.changes)
        return wanted, self._supervisor.health.prepare(wanted).standings

    def parse(self, text: str) -> Config:
        """What somebody has sent, who need not be allowed to have programs run.

        Raises :class:`ConfigError`, each fault with "configuration" in front.
        """
        served = {service.policy for service in self._engine.config.services}
        with values.without_imports(served):
            return parse_config(text, self._names(), "configuration")

    async def reload(self, *, discard: bool = False) -> types.Plan:
        """Read the configuration again, and serve it with the changes at run time, or without.  What that has changed.

        Raises :class:`ConfigError` with every fault, and changes nothing; so does what has it not read again at all.
        """
        read = self._reader()
        async with self._one:
            try:
                return await self._reload(read, discard=discard)
            except ConfigError as error:
                self._engine.count("reloads_refused")
                for problem in error.problems:
                    log.error("not reloaded", reason=problem)
                self._supervisor.tell(Event("not-reloaded", reason="; ".join(error.problems)[:1000]))
                raise

    async def _reload(self, read: Callable[[], Config], *, discard: bool) -> types.Plan:
        if self._held:
            raise ConfigError(HELD)
        if self._watching:
            await self._watching.look()
        new = await asyncio.to_thread(read)  # of a great file it takes its time
        seen = await self._seen()
        before = self._engine.config
        wanted, warnings = overlay(new, Changes() if discard else self.changes)
        wanted = _same(before, wanted)
        self.apply(wanted)
        seen = replace(seen, then=dict(self._engine.standings))
        self.given = new
        self.changed()
        _warn(warnings)
        self._rewatch()
        told = await asyncio.to_thread(plan, before, wanted, seen, [*warnings, *odd(wanted)])
        lines = summary(told)
        more = {"more": len(lines) - TOLD} if len(lines) > TOLD else {}
        log.info("reloaded", services=len(new.services), changes=lines[:TOLD], **more)
        self._supervisor.tell(Event("reloaded", reason="; ".join(lines[:TOLD]) or "nothing has changed"))
        return told

    def _reader(self) -> Callable[[], Config]:
        """Raises :class:`ConfigError` if there is nothing to read again."""
        if not self._read:
            raise ConfigError(
                "there is nothing to read again: it was started without --config; start it with one (crablb quickstart"
                " makes it), or change it as it runs (crablb weight, drain, ...)"
            )
        return self._read

    def reload_soon(self) -> None:
        """As by a signal: nobody waits for an answer, and what fails for want of memory is tried again."""
        if not self._read:
            log.warning("nothing to reload: there is no --config file")
            return
        if self._held:
            self.owed = True
            return
        self._ask(self._reload_as_told())

    async def _reload_as_told(self) -> None:
        try:
            if not self._held:
                await self.reload()
        except ConfigError:
            pass  # it is in the log
        except Exception as error:  # half of it may be served
            self._engine.count("tasks_failed")
            log.error("not reloaded; it is tried again", seconds=AGAIN, **why(error))
            self._again = asyncio.get_running_loop().call_later(AGAIN, self.reload_soon)
        if self._held:  # perhaps since it began
            self.owed = True

    def _ask(self, work: Awaitable[object]) -> None:
        task = asyncio.ensure_future(work)
        self._asked.add(task)
        task.add_done_callback(self._asked.discard)

    def _rewatch(self, known: str = "") -> None:
        """Watch the file, or do not any more, as the configuration says."""
        if self._engine.config.watch and self._read and not self._watch:
            self._watching = Watch(Path(self.path), self._reload_as_told, known)
            self._watch = self._engine.task("watch", self._watching.run)
        elif not self._engine.config.watch and self._watch:
            # It may be what asks for this: it ends when it has.
            asyncio.get_running_loop().call_soon(self._watch.cancel)
            self._watch = self._watching = None

    def _names(self) -> tuple[str, ...]:
        return tuple(interface.name for interface in self._engine.interfaces)

    async def _seen(self) -> Seen:
        census = await self._engine.census(shares=False)
        lost = {a for a, hop in self._engine.hops.items() if hop.state is not HopState.RESOLVED}
        standings = dict(self._engine.standings)
        return Seen(
            self._engine.seed,
            standings,
            standings,
            lost,
            dict(census.flows),
            self._names(),
        )

    # ---- into the file ----

    async def save(self) -> types.Applied:
        """Make the changes part of the configuration's file; the one before is kept beside it, as FILE.bak.

        Raises :class:`ConfigError` if that cannot be, and changes nothing.
        """
        read = self._reader()
        async with self._one:
            if self._held:
                raise ConfigError(HELD)
            changes = self.changes
            if not changes:
                return types.Applied(changes=[])
            given = await asyncio.to_thread(self._save, read, changes)
            self.given = given
            self.changed()
            if self._watching:
                await self._watching.look()
            lines = diff(changes)
            log.info("saved", path=self.path, changes=lines[:TOLD])
            left = diff(self.changes)
            return types.Applied(changes=lines, warnings=[f"changed meanwhile, and not saved: {line}" for line in left])

    def _save(self, read: Callable[[], Config], changes: Changes) -> Config:
        """In a thread.  Raises :class:`ConfigError`."""
        path = Path(self.path).resolve()  # what a link leads to, not the link
        now = read()
        if now != self.given:
            raise ConfigError(f"{self.path} has been changed since it was read: crablb reload, and save then")
        text = read_text(path)
        made = save(text, changes)
        try:
            found = path.stat()
            owner, mode = (found.st_uid, found.st_gid), found.st_mode & 0o7777
            write(path.with_name(f"{path.name}.bak"), text.encode(), mode, owner)
            write(path, made.encode(), mode, owner)
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be written: {error.strerror}; nothing was saved") from None
        return read()
