"""A load balancer's end by takeover: it hands all over, to a process that it started or that somebody else did."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import Any

import structlog

from crablb import log as logging
from crablb.control.doors import Doors
from crablb.control.estate import Parts, Rest
from crablb.control.operator import ConflictError, Operator
from crablb.control.successor import Successor
from crablb.control.supervisor import Supervisor
from crablb.control.takeover import Host, Offer
from crablb.dataplane.events import Event
from crablb.errors import CrablbError, KernelError
from crablb.kernel import pins

__all__ = ["Succession"]

log = structlog.get_logger()

#: Seconds until the end of a process that has begun is seen where it began.
LAST = 5.0
#: Seconds for a process that was started, to come to the takeover and through it.
MOST = 60.0


class _Giver:
    """All that is handed over."""

    def __init__(self, supervisor: Supervisor, operator: Operator, doors: Doors) -> None:
        self._supervisor, self._engine = supervisor, supervisor.engine
        self._operator, self._doors = operator, doors

    @property
    def interfaces(self) -> Sequence[str]:
        return [interface.name for interface in self._engine.interfaces]

    def hold(self) -> None:
        self._engine.hold()
        self._operator.wanted.hold()

    def offer(self) -> tuple[Offer, list[int]]:
        values, fds = self._engine.offer()
        doors = {**self._doors.offer(), **self._supervisor.offer()}
        health = self._supervisor.health.export()
        config = self._engine.config
        parts = Parts(
            seed=b"" if config.seed else self._engine.seed,
            admin_group=config.admin_group,
            changes=self._operator.changes,
            health=health,
            doors=tuple(doors),
        )
        return Offer(engine=values, fds=len(fds), parts=parts), [*fds, *doors.values(), logging.STDERR]

    def give(self, fds: list[int]) -> Any:
        self._supervisor.pause()
        return self._engine.give(fds)

    def rest(self) -> Any:
        announced, reports = self._supervisor.export()
        known = self._engine.export()
        owed = self._operator.wanted.owed
        return Rest(announced=announced, reports=reports, backends=known, owed=owed, **self._operator.export())

    def resume(self) -> None:
        """Each part goes on, whatever becomes of the others."""
        for part in (self._engine, self._supervisor, self._operator.wanted):
            try:
                part.resume()
            except Exception as error:
                log.error("a part of the load balancer does not go on; restart it", exc_info=error)


class Succession:
    """Of a load balancer that serves, in its event loop."""

    def __init__(
        self,
        supervisor: Supervisor,
        operator: Operator,
        doors: Doors,
        command: Sequence[str] | None,
    ) -> None:
        """``command``: starts a successor; None: nothing can."""
        self._supervisor, self._command = supervisor, command
        self._host = Host(_Giver(supervisor, operator, doors), self._failed)
        self._child: Successor | None = None
        self._ready = False
        self._reason = ""  # why the child that had begun did not come to serve
        self._refused = asyncio.Event()  # the child does not come to serve any more
        self._asked: set[asyncio.Task[None]] = set()

    def prepare(self) -> None:
        """Be ready for :meth:`start`.  Raises :class:`KernelError` if nobody could take over."""
        try:
            self._host.prepare()
        except OSError as error:
            raise KernelError(f"nobody could take over: {error.filename or pins.RUN}: {error.strerror}") from None
        self._ready = True

    def start(self) -> None:
        """Whoever may can take over from now on."""
        try:
            if not self._ready:
                self._host.prepare()
            self._host.start(self._supervisor.engine.task)
        except OSError as error:
            log.error(
                "nobody can take over; the load balancer serves", reason=f"{error.filename or ''}: {error.strerror}"
            )
        self._supervisor.listeners.append(self._hear)

    @property
    def left(self) -> asyncio.Future[int]:
        """Done, with its process id, when another process serves in place of this one."""
        return self._host.left

    @property
    def trouble(self) -> list[str]:
        """What is not as it should be, after a takeover that failed."""
        return [*([self._host.stalled] if self._host.stalled else []), *self._supervisor.engine.unclaimed]

    def _hear(self, event: Event) -> None:
        if event.kind == "interface-renamed":
            try:
                self._host.name(event.interface)
            except OSError as error:
                log.warning("who takes over asks by the old name", now=event.interface, reason=error.strerror)

    def _failed(self, reason: str, pid: int) -> None:
        if self._child and pid == self._child.pid:
            self._reason = reason  # it may say more itself
            self._refused.set()
        else:
            self._tell(reason)

    def _tell(self, reason: str) -> None:
        self._supervisor.engine.count("takeovers_failed")
        self._supervisor.tell(Event("takeover-failed", reason=reason))

    async def ask(self, by: str = "") -> int:
        """Start a successor, and wait until it serves; its process id.

        Raises :class:`ConflictError` if there is one already or cannot be, :class:`KernelError` with the reason if it
        fails: this process goes on.
        """
        if self._child or self._host.busy:
            raise ConflictError("another process is taking over already; look again when it has, or has failed")
        if os.getpid() == 1:
            raise ConflictError(
                "process 1 of a container ends that with it: start another container with --takeover, or restart"
            )
        if not self._command:
            raise ConflictError(
                "this program cannot be started anew: it has no Python interpreter, or is another one's"
            )
        log.info("a successor is started", by=by)
        try:
            child = self._child = Successor(self._command)
            try:
                return await self._follow(child)
            finally:
                self._child = None
                child.close()
        except KernelError as error:
            log.error("the takeover failed; this process goes on", reason=str(error))
            self._tell(str(error))
            raise KernelError(f"{error}\nprocess {os.getpid()} serves on") from None

    async def _follow(self, child: Successor) -> int:
        self._reason = ""
        self._refused.clear()
        ended = asyncio.ensure_future(child.ended())
        refused = asyncio.ensure_future(self._refused.wait())
        try:
            either: list[asyncio.Future[Any]] = [ended, self.left, refused]
            await asyncio.wait(either, timeout=MOST, return_when=asyncio.FIRST_COMPLETED)
            if not (ended.done() or self.left.done() or refused.done()):
                self._reason = f"it did not come to serve within {MOST:g} s"
                await self._host.give_up(child.pid, self._reason)  # else it might come to serve just while it is ended
            if self.left.done():
                await child.let_go()
                return self.left.result()
            if not ended.done():  # it says why, and ends; or it is stopped, or hangs
                await asyncio.wait([ended], timeout=LAST)
                await child.end()
            words = await ended
            await self._host.over(LAST)  # it may have more to say of why
        except asyncio.CancelledError:
            await self._host.give_up(child.pid, "whoever asked for it has given up")
            if not self.left.done():
                await child.end()
            raise
        finally:
            ended.cancel()
            refused.cancel()
        reason = words if self._reason in words else f"{self._reason} ({words})" if words else self._reason
        raise KernelError(reason)

    def pass_on(self, reload: bool) -> None:
        """See :meth:`.takeover.Host.pass_on`."""
        self._host.pass_on(reload)

    def ask_soon(self) -> None:
        """As by a signal: nobody waits for an answer."""

        async def ask() -> None:
            try:
                await self.ask("a signal")
            except CrablbError as error:
                log.error("no takeover", reason=str(error))

        task = asyncio.ensure_future(ask())
        self._asked.add(task)
        task.add_done_callback(self._asked.discard)

    async def close(self) -> bool:
        """Hand over no more.  Whether all is another process' already, so that it has to be left to it."""
        await self._host.close("it was told to stop")
        for task in self._asked:
            if not self.left.done():
                task.cancel()
        await asyncio.gather(*self._asked, return_exceptions=True)
        if self._child and not self.left.done():
            await self._child.end()
        return self.left.done()
