"""The library: a load balancer inside a program of one's own.

As an asynchronous context manager in the program's event loop, or as a plain one with an event loop in a thread of its
own.  The packets are worked on by C in threads, without the GIL, in both cases; or by the program itself, by
:meth:`LoadBalancer.process_once`.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Self, TypeVar

from crablb.config import check_services, checked, parse_service
from crablb.control import seed as seeds
from crablb.control.supervisor import Supervisor
from crablb.dataplane.events import Event
from crablb.dataplane.handlers import Handle, Match, check
from crablb.errors import ConfigError, KernelError
from crablb.model import Address, Backend, Config, Service, State, Vip
from crablb.selection.loads import Load

__all__ = ["LoadBalancer", "Statistics"]

T = TypeVar("T")


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
    ``settings``: fields of :class:`crablb.model.Config`, like ``announce`` or ``flows``.

    ``async with LoadBalancer(...)`` uses the running event loop; ``with LoadBalancer(...)`` makes one in a thread.
    Methods may be called from any thread then; otherwise from the event loop's.

    Raises :class:`ConfigError` for what cannot be, :class:`KernelError` at the start for what the kernel refuses.
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
        names = (interfaces,) if isinstance(interfaces, str) else tuple(interfaces)
        self._config = checked(Config(names, (), seed=seed, **settings))
        self._config = self._checked([parse_service(s) if isinstance(s, str) else s for s in services])
        self._threads = threads
        self._handlers: dict[Match, Handle] = {}
        self._supervisor: Supervisor | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    # ---- life ----

    async def start(self) -> None:
        """Serve from now on.  On return every backend that answers is in use."""
        if self._supervisor:
            raise KernelError("the load balancer is running already")
        supervisor = Supervisor(self._config, self._config.seed or seeds.load(), threads=self._threads)
        await supervisor.start()
        for match, function in self._handlers.items():
            supervisor.engine.handle(match, function)
        self._supervisor, self._loop = supervisor, asyncio.get_running_loop()

    async def close(self) -> None:
        """Stop; leave nothing in the kernel.  Idempotent."""
        supervisor, self._supervisor = self._supervisor, None
        if supervisor:
            await supervisor.close()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, value: BaseException | None, where: TracebackType | None
    ) -> None:
        await self.close()

    def __enter__(self) -> Self:
        loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=loop.run_forever, name="crablb-control", daemon=True)
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self.start(), loop).result()
        except BaseException:
            self._end_thread(loop)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, where: TracebackType | None
    ) -> None:
        assert self._loop
        asyncio.run_coroutine_threadsafe(self.close(), self._loop).result()
        self._end_thread(self._loop)

    def _end_thread(self, loop: asyncio.AbstractEventLoop) -> None:
        loop.call_soon_threadsafe(loop.stop)
        assert self._thread
        self._thread.join()
        self._thread = None
        loop.close()

    async def wait(self) -> None:
        """Until it fails.  Raises :class:`KernelError` then: a task of its own has died, for example."""
        failure = self._running.engine.failure
        assert failure
        raise KernelError(await asyncio.shield(failure))

    @property
    def _running(self) -> Supervisor:
        if not self._supervisor:
            raise KernelError("the load balancer is not running")
        return self._supervisor

    def _in_loop(self, do: Callable[[], T]) -> T:
        """Run in the event loop's thread."""
        assert self._running and self._loop
        if not self._thread or threading.current_thread() is self._thread:
            return do()

        async def call() -> T:
            return do()

        return asyncio.run_coroutine_threadsafe(call(), self._loop).result()

    def process_once(self, timeout: float = 0.0) -> int:
        """Work on the frames that have come on all queues; wait at most ``timeout`` seconds for some if there are none.

        Returns how many there were.  For ``threads=False``.
        """
        return self._running.engine.process_once(timeout)

    # ---- what is served ----

    @property
    def services(self) -> tuple[Service, ...]:
        return self._config.services

    def service(self, vip: Vip) -> Service:
        """The service at a VIP.  Raises :class:`ConfigError` if there is none."""
        for service in self._config.services:
            if service.vip == vip:
                return service
        there = ", ".join(str(s.vip) for s in self.services) or "none"
        raise ConfigError(f"there is no service {vip}; there are: {there}")

    def _checked(self, services: Sequence[Service]) -> Config:
        problems: list[str] = []
        good = []
        for service in services:
            try:
                good.append(checked(service))
            except ConfigError as error:
                problems += [f"{service.vip}: {problem}" for problem in error.problems]
        problems += check_services([(str(s.vip), s) for s in good], self._config.table_size)
        if problems:
            raise ConfigError(problems)
        return replace(self._config, services=tuple(good))

    def replace_services(self, services: Iterable[Service]) -> None:
        """Serve these from now on.  Connections whose backend lives go on.  Nothing changes if it raises."""
        config = self._checked(list(services))
        if self._supervisor:
            supervisor = self._supervisor
            self._in_loop(lambda: supervisor.apply(config))
        self._config = config

    def add_service(self, service: Service | str) -> None:
        self.replace_services([*self.services, parse_service(service) if isinstance(service, str) else service])

    def remove_service(self, vip: Vip) -> None:
        gone = self.service(vip)
        self.replace_services([s for s in self.services if s is not gone])

    def add_backend(self, vip: Vip, backend: Backend) -> None:
        service = self.service(vip)
        self._change(vip, (*service.backends, backend))

    def remove_backend(self, vip: Vip, address: Address) -> None:
        """It gets nothing new; the connections that it has by the fallback go on."""
        gone = self.backend(vip, address)
        self._change(vip, tuple(b for b in self.service(vip).backends if b is not gone))

    def set_weight(self, vip: Vip, address: Address, weight: int) -> None:
        self._set(vip, address, weight=weight)

    def drain(self, vip: Vip, address: Address) -> None:
        """No new connections; those that it has go on."""
        self._set(vip, address, state=State.DRAIN)

    def set_state(self, vip: Vip, address: Address, state: State) -> None:
        self._set(vip, address, state=state)

    def backend(self, vip: Vip, address: Address) -> Backend:
        """A service's backend.  Raises :class:`ConfigError` if it is none."""
        for backend in self.service(vip).backends:
            if backend.address == address:
                return backend
        raise ConfigError(f"{address} is no backend of {vip}")

    def _set(self, vip: Vip, address: Address, **fields: Any) -> None:
        old = self.backend(vip, address)
        self._change(vip, tuple(replace(b, **fields) if b is old else b for b in self.service(vip).backends))

    def _change(self, vip: Vip, backends: tuple[Backend, ...]) -> None:
        old = self.service(vip)
        self.replace_services([replace(s, backends=backends) if s is old else s for s in self.services])

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
        check(match, self._handlers)
        if self._supervisor:
            engine = self._supervisor.engine
            self._in_loop(lambda: engine.handle(match, function))
        self._handlers[match] = function

    def unhandle(self, match: Match) -> None:
        """From now on the frames are the kernel's again.  Raises :class:`ConfigError` if there is no such handler."""
        if match not in self._handlers:
            raise ConfigError(f"there is no handler for {match}")
        if self._supervisor:
            engine = self._supervisor.engine
            self._in_loop(lambda: engine.unhandle(match))
        del self._handlers[match]

    # ---- what happens ----

    def statistics(self) -> Statistics:
        engine = self._running.engine

        def read() -> Statistics:
            counts = engine.statistics()
            loads = {s.vip: {b.address: engine.load(s.vip, b.address) for b in s.backends} for s in self.services}
            return Statistics(counts["xdp"], counts["total"], tuple(counts["workers"]), counts["daemon"], loads)

        return self._in_loop(read)

    async def events(self) -> AsyncIterator[Event]:
        """What happens from now on, as it happens; at most the last 1,000 that nobody has taken are kept.

        In the event loop that the load balancer runs in.
        """
        queue: asyncio.Queue[Event] = asyncio.Queue(1000)

        def put(event: Event) -> None:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(event)

        listeners = self._running.listeners
        listeners.append(put)
        try:
            while True:
                yield await queue.get()
        finally:
            with contextlib.suppress(ValueError):
                listeners.remove(put)
