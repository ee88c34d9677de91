"""The library: a load balancer inside a program of one's own.

As an asynchronous context manager in the program's event loop, or as a plain one with an event loop in a thread of its
own.  The packets are worked on by C in threads, without the GIL, in both cases; or by the program itself, by
:meth:`LoadBalancer.process_once`.
"""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self, TypeVar

from crablb import log
from crablb.config import check_services, checked, parse_backend, parse_service, parse_vip
from crablb.control import seed as seeds
from crablb.control.doors import Doors
from crablb.control.operator import Operator
from crablb.control.supervisor import Supervisor
from crablb.control.wanted import Wanted
from crablb.dataplane.events import Event
from crablb.dataplane.handlers import Handle, Match, check
from crablb.errors import ConfigError, KernelError, starved
from crablb.model import Address, Backend, Config, Service, State, Switch, Vip
from crablb.selection.loads import Load
from crablb.values import parse_address, shown

__all__ = ["LoadBalancer", "Statistics"]

T = TypeVar("T")
LAST = 10.0  # seconds that the end of the program waits for an event loop in another thread


@dataclass(frozen=True, slots=True)
class Statistics:
    """Counts since the start, by the names that docs/configuration.md explains."""

    xdp: dict[str, int]  # packets, by what the XDP program did with them
    workers: dict[str, int]  # packets, by what became of them in user space
    queues: tuple[dict[str, int], ...]  # the same, for each queue
    daemon: dict[str, int]  # what befell the load balancer
    loads: dict[Vip, dict[Address, Load]]  # of each backend, as the policies see it


class LoadBalancer:
    """Serve ``services`` on ``interfaces``, in the network namespace that it is started in.

    ``services``: :class:`Service` values, or strings like ``"tcp://10.0.0.100:80=10.0.0.11,10.0.0.12*3"``.  ``seed``:
    16 bytes, by default the machine's.  ``threads``: False to work on packets by :meth:`process_once` alone.
    ``settings``: fields of :class:`crablb.model.Config`, like ``announce`` or ``flows``; the API (``admin``) is off
    unless it is asked for.

    ``async with LoadBalancer(...)`` uses the running event loop; ``with LoadBalancer(...)`` makes one in a thread.
    Methods may be called from any thread; from others than the event loop's they wait for it.  Where a method takes a
    VIP, an address, a backend or a service, the text that a file has for it does as well.

    It may be started again when it has ended.  After a fork it is the parent's: the child can neither use nor end it.

    Raises :class:`ConfigError` for what cannot be, :class:`KernelError` at the start for what the kernel refuses, and
    by methods that need it to run if it does not.
    """

    def __init__(
        self,
        interfaces: str | Sequence[str],
        services: Iterable[Service | str] = (),
        *,
        seed: bytes | None = None,
        threads: bool = True,
        **settings: Any,
    ) -> None:
        unknown = settings.keys() - Config.__dataclass_fields__.keys() | settings.keys() & {"interfaces", "services"}
        if unknown:
            raise ConfigError(f"unknown settings: {', '.join(sorted(unknown))}; see crablb.model.Config")
        if not isinstance(threads, bool):
            raise ConfigError(f"threads: {shown(threads)} is not True or False")
        settings.setdefault("admin", Switch.OFF)
        names = (interfaces,) if isinstance(interfaces, str) else interfaces
        self._config = checked(Config(names, (), seed=seed, **settings))  # type: ignore[arg-type]  # what it checks
        self._config = self._checked(services)
        self._threads = threads
        self._handlers: dict[Match, Handle] = {}
        self._supervisor: Supervisor | None = None  # from the beginning of the start to the end of the close
        self._doors: Doors | None = None
        self._wanted: Wanted | None = None  # of those who ask by them
        self._serving = False  # what is told to the supervisor is done at once; else it is done after the start
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._claim = threading.Lock()  # of two who start it at once one does
        self._turn = threading.RLock()  # of those who change what is served: before the start, from any thread
        self._changing = asyncio.Lock()  # its life: starting and closing, one after the other
        self._ended: asyncio.Future[None] | None = None
        self._guard: asyncio.Task[None] | None = None
        self._process = self._loop_thread = 0  # that it runs in
        self._listening: weakref.WeakSet[Events] = weakref.WeakSet()

    # ---- life ----

    async def start(self) -> None:
        """Serve from now on.  On return every backend that answers is in use.

        Raises :class:`KernelError`, and leaves nothing in the kernel, if that cannot be, or it runs already.
        """
        with self._claim:
            if self._supervisor:
                self._in_this_process()
                raise KernelError("the load balancer is running already")
            log.to_standard_error()
            config = self._config
            supervisor = Supervisor(config, config.seed or seeds.load(), threads=self._threads)
            supervisor.listeners.append(self._hear)
            doors = None
            if config.admin is Switch.ON or config.metrics_listen:
                operator = Operator(supervisor)
                doors, self._wanted = Doors(operator, supervisor), operator.wanted
            self._loop, self._process = asyncio.get_running_loop(), os.getpid()
            self._loop_thread = threading.get_ident()
            self._changing = asyncio.Lock()
            self._ended = self._loop.create_future()
            self._supervisor, self._doors = supervisor, doors
            _open.add(self)
        async with self._changing:
            try:
                await supervisor.start()
                for match, function in self._handlers.items():
                    supervisor.engine.handle(match, function)
                if self._config is not config:
                    supervisor.apply(self._config)
                    if self._wanted:
                        self._wanted.follow(config, self._config)
                self._serving = True
                if doors:
                    doors.start()
                supervisor.engine.begun()
                self._guard = asyncio.create_task(self._until_ended(self._ended))
                await asyncio.sleep(0)  # it has begun: one that has not is cancelled without a trace
            except BaseException:
                await self._end()
                raise

    async def _until_ended(self, ended: asyncio.Future[None]) -> None:
        """An event loop that ends, as asyncio.run does, cancels its tasks: then so ends what nobody closed."""
        try:
            await asyncio.shield(ended)
        except asyncio.CancelledError:
            self._unclosed()
            await self.close()
            raise

    def _unclosed(self) -> None:
        if self._serving:
            names = ", ".join(self._config.interfaces)
            warnings.warn(f"unclosed LoadBalancer on {names}", ResourceWarning, stacklevel=2, source=self)

    async def close(self) -> None:
        """Stop; leave nothing in the kernel.  Idempotent; during the start, and during a close, it waits for that.

        Raises :class:`KernelError` in another event loop than it was started in.
        """
        if not self._supervisor or self._process != os.getpid():
            return
        if self._loop and self._loop.is_closed():
            return self._close_at_last()
        if asyncio.get_running_loop() is not self._loop:
            raise KernelError("the load balancer was started in another event loop; close it there")
        async with self._changing:
            await self._end()

    async def _end(self) -> None:
        """A close that is cancelled can be repeated."""
        if not self._supervisor:
            return
        self._serving = False
        if self._doors:
            await self._doors.close()
        await self._supervisor.close()
        self._let_go()
        if self._ended and not self._ended.done():
            self._ended.set_result(None)
        for events in self._listening:
            events._put(None)

    def _let_go(self) -> None:
        self._serving, self._supervisor, self._doors, self._wanted = False, None, None, None
        _open.discard(self)

    def _close_at_last(self) -> None:
        """From outside of its event loop, which may run elsewhere, or not at all any more."""
        assert self._supervisor and self._loop
        if self._thread:
            self._leave()
        elif self._loop.is_closed():
            if self._doors:
                self._doors.abandon()
            self._supervisor.engine.abandon()
            self._let_go()
        elif self._loop.is_running():
            asyncio.run_coroutine_threadsafe(self.close(), self._loop).result(LAST)
        else:
            self._loop.run_until_complete(self.close())

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, where: TracebackType | None
    ) -> None:
        await self.close()

    def __enter__(self) -> Self:
        ready: Future[asyncio.AbstractEventLoop] = Future()

        def run() -> None:
            if not ready.set_running_or_notify_cancel():
                return
            try:
                with asyncio.Runner() as runner:
                    loop = runner.get_loop()
                    ready.set_result(loop)
                    loop.run_forever()
            except BaseException as error:
                if ready.done():
                    raise
                ready.set_exception(error)

        thread = threading.Thread(target=run, name="crablb-control", daemon=True)
        starting: Future[None] | None = None
        try:
            with self._claim:
                if self._supervisor or self._thread:
                    self._in_this_process()
                    raise KernelError("the load balancer is running already")
                self._thread = thread
            try:
                thread.start()
            except RuntimeError as error:
                raise starved(error) or error from None
            self._loop = ready.result()
            starting = asyncio.run_coroutine_threadsafe(self.start(), self._loop)
            starting.result()
        except BaseException:  # Ctrl-C too, at whatever instant
            if self._thread is thread:
                if ready.cancel() or ready.exception():
                    self._thread = None  # it has ended, or does as soon as it begins
                else:
                    self._loop = ready.result()
                    if starting:
                        starting.cancel()
                    self._leave()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._thread and self._process == os.getpid():
            self._leave()

    def _leave(self) -> None:
        """Close, and end the thread, also if Ctrl-C comes meanwhile, at whatever instant."""
        assert self._loop and self._thread
        try:
            asyncio.run_coroutine_threadsafe(self.close(), self._loop).result()
        finally:
            asyncio.run_coroutine_threadsafe(self.close(), self._loop).exception()  # waits
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._thread = None

    async def wait(self) -> None:
        """Until it ends: returns when it is closed.  In whatever event loop.

        Raises :class:`KernelError` if it fails: a task of its own is given up.
        """
        running = self._running
        assert self._loop
        if asyncio.get_running_loop() is not self._loop:
            return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self.wait(), self._loop))
        failure, ended = running.engine.failure, self._ended
        assert failure and ended
        both: list[asyncio.Future[Any]] = [failure, ended]
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        if failure.done():
            raise KernelError(failure.result())

    def _in_this_process(self) -> None:
        if self._supervisor and self._process != os.getpid():
            raise KernelError(f"the load balancer belongs to the process that forked this one, {self._process}")

    @property
    def _running(self) -> Supervisor:
        self._in_this_process()
        if not self._supervisor or not self._serving:
            raise KernelError("the load balancer is not running")
        return self._supervisor

    def _in_loop(self, do: Callable[[], T]) -> T:
        """Run in the event loop's thread; at once if there is none."""
        self._in_this_process()
        if not self._supervisor or threading.get_ident() == self._loop_thread:
            return do()
        assert self._loop
        if self._loop.is_closed():
            raise KernelError("the event loop that the load balancer was started in has ended")

        async def call() -> T:
            return do()

        return asyncio.run_coroutine_threadsafe(call(), self._loop).result()

    def _alter(self, do: Callable[[], None]) -> None:
        """Change what is served, one after the other.

        Raises :class:`KernelError` in the middle of another change, by what a signal calls: that one would undo it.
        """

        def alone() -> None:
            if self._turn._is_owned():  # type: ignore[attr-defined]
                raise KernelError(
                    "the load balancer is being changed, by what was interrupted: note what is to be done, and do"
                    " it later, as loop.add_signal_handler() does"
                )
            with self._turn:
                do()

        self._in_loop(alone)

    def process_once(self, timeout: float = 0.0) -> int:
        """Work on the frames that have come on all queues; wait at most ``timeout`` seconds for some if there are none.

        Returns how many there were.  For ``threads=False``.  Raises :class:`KernelError` if threads work on them.
        """
        engine = self._running.engine
        if self._threads:
            raise KernelError("threads work on the frames; make it with threads=False")
        if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 <= timeout <= 86400:
            raise ConfigError(f"timeout: {shown(timeout)} is not a number of seconds from 0 to 86400")
        return engine.process_once(timeout)

    # ---- what is served ----

    @property
    def services(self) -> tuple[Service, ...]:
        """What is served now."""
        return self._config.services

    def service(self, vip: Vip | str) -> Service:
        """The service at a VIP.  Raises :class:`ConfigError` if there is none."""
        return _service(self._config, parse_vip(vip))

    def backend(self, vip: Vip | str, address: Address | str) -> Backend:
        """A service's backend.  Raises :class:`ConfigError` if it is none."""
        return _backend(self.service(vip), parse_address(address))

    def _checked(self, services: Iterable[Service | str]) -> Config:
        if isinstance(services, str | Service):
            raise ConfigError(f"services: {shown(services)} is one; give a list of them")
        if not isinstance(services, Iterable):
            raise ConfigError(f"services: {shown(services)} is not a list of services")
        problems: list[str] = []
        good = []
        for service in services:
            try:
                good.append(checked(_parsed(service)))
            except ConfigError as error:
                where = f"{service.vip}: " if isinstance(service, Service) else ""
                problems += [f"{where}{problem}" for problem in error.problems]
        problems += check_services([(str(s.vip), s) for s in good], self._config.table_size)
        if problems:
            raise ConfigError(problems)
        return replace(self._config, services=tuple(good))

    def replace_services(self, services: Iterable[Service | str]) -> None:
        """Serve these from now on.  Connections whose backend lives go on.

        Raises :class:`ConfigError` with every fault, and changes nothing then.
        """
        wanted = services if isinstance(services, str | Service) or not isinstance(services, Iterable) else [*services]
        self._change(lambda config: wanted, whole=True)

    def add_service(self, service: Service | str) -> None:
        """Serve this as well.  Raises :class:`ConfigError`, and changes nothing, if its VIP is served already."""
        new = _parsed(service)
        self._change(lambda config: [*config.services, new])

    def remove_service(self, vip: Vip | str) -> None:
        """Serve it no more; its connections by the fallback end.  Raises :class:`ConfigError` if there is none."""
        at = parse_vip(vip)

        def without(config: Config) -> list[Service]:
            gone = _service(config, at)
            return [s for s in config.services if s is not gone]

        self._change(without)

    def add_backend(self, vip: Vip | str, backend: Backend | str) -> None:
        """Give a service one more.  Raises :class:`ConfigError`, and changes nothing, if it has it already."""
        new = parse_backend(backend) if isinstance(backend, str) else backend
        self._change_backends(vip, lambda service: (*service.backends, new))

    def remove_backend(self, vip: Vip | str, address: Address | str) -> None:
        """It gets nothing new; the connections that it has by the fallback go on.

        Raises :class:`ConfigError`, and changes nothing, if it is none of the service's, or its last.
        """
        at = parse_address(address)

        def without(service: Service) -> tuple[Backend, ...]:
            gone = _backend(service, at)
            return tuple(b for b in service.backends if b is not gone)

        self._change_backends(vip, without)

    def set_weight(self, vip: Vip | str, address: Address | str, weight: int) -> None:
        """Its share of new connections, 0 to 65535.  Raises :class:`ConfigError`, and changes nothing."""
        self._set(vip, address, weight=weight)

    def drain(self, vip: Vip | str, address: Address | str) -> None:
        """No new connections; those that it has go on.  Raises :class:`ConfigError` if it is none of the service's."""
        self._set(vip, address, state=State.DRAIN)

    def set_state(self, vip: Vip | str, address: Address | str, state: State | str) -> None:
        """What you say of it: up, drain, dead.  Raises :class:`ConfigError`, and changes nothing."""
        self._set(vip, address, state=state)

    def _set(self, vip: Vip | str, address: Address | str, **fields: Any) -> None:
        at = parse_address(address)

        def with_it(service: Service) -> tuple[Backend, ...]:
            old = _backend(service, at)
            return tuple(replace(b, **fields) if b is old else b for b in service.backends)

        self._change_backends(vip, with_it)

    def _change_backends(self, vip: Vip | str, backends: Callable[[Service], tuple[Backend, ...]]) -> None:
        at = parse_vip(vip)

        def with_them(config: Config) -> list[Service]:
            old = _service(config, at)
            return [replace(s, backends=backends(s)) if s is old else s for s in config.services]

        self._change(with_them)

    def _change(self, services: Callable[[Config], Iterable[Service | str]], *, whole: bool = False) -> None:
        """From what is served to what is to be; of changes at once none is lost.

        ``whole``: whatever it was.
        """

        def change() -> None:
            before = self._config
            config = self._checked(services(before))
            if self._supervisor and self._serving:
                self._supervisor.apply(config)
                if self._wanted:
                    self._wanted.follow(None if whole else before, config)
            self._config = config

        self._alter(change)

    # ---- frames of one's own ----

    def handle(self, match: Match, function: Handle) -> None:
        """Have ``function`` handle the frames that match and are no service's, on all interfaces served.

        It is called with :class:`Frames`, once for all of a batch that match, by one worker at a time; the services'
        packets wait meanwhile.  It may rewrite frames, change their ``lengths`` and the ``interfaces`` that they go
        out by, and returns which to send, a boolean array; the others are done with, as are all if it returns None.
        What it does not send is gone: it cannot be given to the kernel.  If it raises or returns anything else, its
        frames are dropped, which is counted (``handler_failed``) and logged.  It must not call this object's methods.

        Of several that match the one added first counts.  Also before the start.  Raises :class:`ConfigError` if there
        is one for the match already, or there are 16.
        """

        def add() -> None:
            check(match, self._handlers)
            if not callable(function):
                raise ConfigError(f"{shown(function)} is no function")
            if self._supervisor and self._serving:
                self._supervisor.engine.handle(match, function)
            self._handlers[match] = function

        self._alter(add)

    def unhandle(self, match: Match) -> None:
        """From now on the frames are the kernel's again.  Raises :class:`ConfigError` if there is no such handler."""

        def remove() -> None:
            if not isinstance(match, Match) or match not in self._handlers:
                raise ConfigError(f"there is no handler for {shown(match) if not isinstance(match, Match) else match}")
            if self._supervisor and self._serving:
                self._supervisor.engine.unhandle(match)
            del self._handlers[match]

        self._alter(remove)

    # ---- what happens ----

    def statistics(self) -> Statistics:
        """Counts since the start.  Raises :class:`KernelError` if it does not run."""

        def read() -> Statistics:
            engine = self._running.engine
            counts = engine.statistics()
            loads = {s.vip: {b.address: engine.load(s.vip, b.address) for b in s.backends} for s in self.services}
            return Statistics(counts["xdp"], counts["total"], tuple(counts["workers"]), counts["daemon"], loads)

        return self._in_loop(read)

    def events(self) -> Events:
        """What happens from now on, as it happens; at most the last 1,000 that nobody has taken are kept.

        An iterator, which may be asked again when one was waited for in vain, as by ``wait_for(anext(events), 1)``.  It
        ends when the load balancer is closed; that it failed is an event, ``failed``.  In the event loop that the load
        balancer runs in; raises :class:`KernelError` in another one, or if it does not run.
        """
        failure = self._running.engine.failure
        if threading.get_ident() != self._loop_thread:
            raise KernelError("events() is for the event loop that the load balancer runs in: use async with")
        events = Events()
        self._listening.add(events)
        if failure and failure.done():
            events._put(Event("failed", reason=failure.result()))
        return events

    def _hear(self, event: Event) -> None:
        if event.kind == "changed" and self._supervisor and self._serving:
            self._config = self._supervisor.engine.config  # by the API
        for events in self._listening:
            events._put(event)


class Events:
    """An asynchronous iterator of what happens: :meth:`LoadBalancer.events`."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Event | None] = asyncio.Queue(1000)  # None, the last: the end
        self._ended = False  # that is in it

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        event = await self._queue.get()
        if event is None:
            self._queue.put_nowait(None)  # for whoever else waits, or asks again
            raise StopAsyncIteration
        return event

    async def aclose(self) -> None:
        """Nothing more is kept, and the iteration ends.  Idempotent."""
        while not self._queue.empty():
            self._queue.get_nowait()
        self._ended = True
        self._queue.put_nowait(None)

    def _put(self, event: Event | None) -> None:
        if self._ended:
            return
        self._ended = event is None
        if self._queue.full():
            self._queue.get_nowait()
        self._queue.put_nowait(event)


#: Those that serve, or begin to: what nobody has closed is closed when the program ends.
_open: set[LoadBalancer] = set()


@atexit.register
def _close_all() -> None:
    for balancer in list(_open):
        if balancer._process == os.getpid():
            balancer._unclosed()
            balancer._close_at_last()


def _parsed(service: object) -> Service:
    if isinstance(service, str):
        return parse_service(service)
    if not isinstance(service, Service):
        raise ConfigError(f"{shown(service)} is no crablb.Service, nor a string like 'tcp://10.0.0.100:80=10.0.0.11'")
    return service


def _service(config: Config, vip: Vip) -> Service:
    for service in config.services:
        if service.vip == vip:
            return service
    there = ", ".join(str(s.vip) for s in config.services) or "none"
    raise ConfigError(f"there is no service {vip}; there are: {there}")


def _backend(service: Service, address: Address) -> Backend:
    for backend in service.backends:
        if backend.address == address:
            return backend
    raise ConfigError(f"{address} is no backend of {service.vip}")
