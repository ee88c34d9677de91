"""The daemon of ``crablb serve``: from start to signal, and reloads in between."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import os
import signal
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import structlog

from crablb import log as logging
from crablb.control import notify
from crablb.control.doors import Doors
from crablb.control.estate import Heir
from crablb.control.operator import Operator
from crablb.control.state import Store
from crablb.control.succession import Succession
from crablb.control.supervisor import Supervisor
from crablb.control.wanted import Wanted, recall, remember
from crablb.dataplane.engine import Engine
from crablb.dataplane.events import Event
from crablb.errors import KernelError
from crablb.kernel import pins
from crablb.model import Config

__all__ = ["serve"]

log = structlog.get_logger()

#: mallopt(3): M_MMAP_THRESHOLD, and bytes; M_ARENA_MAX, and how many.
MALLOC = ((-3, 128 << 10), (-8, 2))


def _give_back() -> None:
    """Have memory be the system's again once it is free: each table of a service is a piece of 128 KiB, and answers
    that threads make are megabytes.  By itself glibc begins to keep such pieces, each thread its own."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # musl has none, and keeps nothing
        for setting in MALLOC:
            libc.mallopt(*setting)


async def _live(watchdog: notify.Watchdog, interval: float) -> None:
    while True:
        watchdog.look()
        await asyncio.sleep(interval)


async def serve(
    config: Config,
    seed: bytes,
    read: Callable[[], Config] | None = None,
    path: str = "",
    known: str = "",
    store: Store | None = None,
    heir: Heir | None = None,
    again: Sequence[str] | None = None,
) -> int:
    """Serve until SIGTERM, SIGINT or SIGQUIT, or until another process has taken over; at SIGHUP, ``read`` the
    configuration again; at SIGUSR1, open the log anew; at SIGUSR2, have the program that is installed take over.
    Returns the exit status.

    ``read``: raises :class:`ConfigError`; None: there is nothing to read again.  ``path``: where it reads; ``known``:
    the fingerprint of that before ``config`` was read.  ``store``: what was changed at run time before; None: that is
    forgotten.  ``heir``: what there is of another process, in whose place this one is to serve; raises
    :class:`.takeover.Gone` if that ends too early.  ``again``: the command that starts a successor.
    """
    _give_back()
    settings, found = recall(config, store, heir.parts if heir else None)
    supervisor = Supervisor(settings, seed, heir=heir)
    remember(supervisor, store, found)
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    engine = supervisor.engine
    wanted = Wanted(supervisor, given=config, read=read, path=path, store=store)
    operator = Operator(supervisor, wanted=wanted)
    doors = Doors(operator, supervisor, heir)
    succession = Succession(supervisor, operator, doors, again)
    operator.succeed, operator.hindered = succession.ask, lambda: succession.trouble
    watchdog = notify.Watchdog(engine.late)
    watching: asyncio.Task[None] | None = None
    afterwards: asyncio.Future[None] | None = None
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGUSR1, logging.reopen)
    loop.add_signal_handler(signal.SIGUSR2, lambda: None)
    loop.add_signal_handler(signal.SIGHUP, wanted.owe)
    orphaned = False  # all is left to the process that the service manager starts
    gc.disable()  # nothing of a start is garbage
    try:
        await supervisor.start()
    except BaseException:
        doors.abandon()
        raise
    finally:
        gc.enable()
    loop.add_signal_handler(signal.SIGHUP, wanted.reload_soon)
    loop.add_signal_handler(signal.SIGUSR2, succession.ask_soon)
    assert engine.failure
    serves = heir is None  # what there is is this process' to clear away
    try:
        log.info(
            "serving",
            interfaces=engine.modes,
            queues=engine.queues,
            zero_copy=engine.zero_copy,
            ack_bypass=engine.bypass,
            services=[str(s.vip) for s in engine.config.services],
            remove_if_killed=" ".join(["crablb remove", *(f"--iface {name}" for name in engine.modes)]),
        )
        await asyncio.to_thread(logging.flush)  # whoever waits for us may read why something is not as it should be
        if heir:
            await _seen()
            if stop.is_set():
                raise KernelError("it was told to stop before it served")
            succession.prepare()
        # From here until the other process is told nothing waits, and nothing that is its is lost if something fails.
        if heir and heir.rest.owed:
            wanted.owe()
        wanted.start(known)
        if heir:
            operator.adopt(heir.rest)
            supervisor.tell(Event("taken-over", reason=f"from {pins.told(heir.predecessor.pid)}"))
        doors.start()
        # What is there now stays: with 10,000 backends it is half a million objects, and to look through them for
        # cycles holds everything up for 0.3 s.  Of what comes and goes references are counted, so cycles are few.
        gc.freeze()
        gc.set_threshold(10_000)
        if heir:
            if orphaned := not _succeed(heir, engine):
                log.error("ending: who served has died, and the service manager starts another one")
                return 1
            afterwards = asyncio.ensure_future(heir.predecessor.afterwards(wanted.reload_soon))
            heir.close()
        else:
            engine.begun()
            notify.notify("READY=1")
        serves = True
        operator.tell(notify.status)
        succession.start()
        if watchdog.interval:
            watching = engine.task("watchdog", partial(_live, watchdog, watchdog.interval))
        stopped: asyncio.Future[object] = asyncio.ensure_future(stop.wait())
        ends: list[asyncio.Future[Any]] = [stopped, engine.failure, succession.left]
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if succession.left.done():
            log.info("ending: another process serves", successor=succession.left.result() or pins.told(pins.ELSEWHERE))
            return 0
        if engine.failure.done():
            log.error("stopping", reason=engine.failure.result())
            return 1
        log.info(
            "stopping",
            reason="signal",
            **{k: v for k, v in engine.statistics()["total"].items() if v},
        )
        return 0
    finally:
        left = await succession.close() or orphaned
        if serves and not left:
            notify.notify("STOPPING=1")
        if watching:
            watching.cancel()
        if afterwards:
            afterwards.cancel()
        if left:
            await doors.leave()
            await wanted.close()
            try:
                await supervisor.leave()
            finally:
                succession.pass_on(wanted.owed)  # perhaps since the other one was told
        elif not serves:
            await doors.leave()
            wanted.hold()  # the file is the other process'
            await wanted.close()
            await supervisor.close()
        else:
            await doors.close()
            await wanted.close()
            await supervisor.close()


async def _seen() -> None:
    """Signals that came until now are known: a turn of the event loop looks for them, the next one tells."""
    for _ in range(3):
        await asyncio.sleep(0)


def _succeed(heir: Heir, engine: Engine) -> bool:
    """All is there: the other process may end.  False if it has died before the service manager knew this one: that
    starts another one, and will never know this one."""
    before, gap = heir.predecessor, engine.gap
    waited = {"packets_waited_ms": round(1000 * gap.seconds, 2)} if gap else {}
    log.info(
        "took over from another process",
        process=before.pid or pins.told(pins.ELSEWHERE),
        version=before.version,
        **waited,
    )
    if heir.log >= 0:
        logging.adopt(heir.log)
    # Before its end: the service manager would take that for the service's.
    told = notify.notify(f"MAINPID={os.getpid()}\nREADY=1")
    if told and heir.orphaned:
        return False
    engine.begun()
    before.served()
    return True
