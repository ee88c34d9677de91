"""The daemon of ``crablb serve``: from start to signal, and reloads in between."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable

import structlog

from crablb import log as logging
from crablb.control.doors import Doors
from crablb.control.notify import notify
from crablb.control.operator import Operator
from crablb.control.state import Store
from crablb.control.supervisor import Supervisor
from crablb.control.wanted import Wanted, recall, remember
from crablb.model import Config

__all__ = ["serve"]

log = structlog.get_logger()


async def serve(
    config: Config, seed: bytes, read: Callable[[], Config] | None = None, path: str = "", store: Store | None = None
) -> int:
    """Serve until SIGTERM, SIGINT or SIGQUIT; at SIGHUP, ``read`` the configuration again; at SIGUSR1, open the log
    anew.  Returns the exit status.

    ``read``: raises :class:`ConfigError`; None: there is nothing to read again.  ``path``: where it reads.  ``store``:
    what was changed at run time before; None: that is forgotten.
    """
    settings, found = recall(config, store)
    supervisor = Supervisor(settings, seed)
    if store:
        remember(supervisor, store, found)
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    engine = supervisor.engine
    wanted = Wanted(supervisor, given=config, read=read, path=path, store=store)
    doors = Doors(Operator(supervisor, wanted=wanted, stop=stop.set), supervisor)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGUSR1, logging.reopen)
    loop.add_signal_handler(signal.SIGUSR2, lambda: None)
    loop.add_signal_handler(signal.SIGHUP, lambda: None)  # there is nothing to read again yet
    await supervisor.start()
    loop.add_signal_handler(signal.SIGHUP, wanted.reload_soon)
    assert engine.failure
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
        wanted.start()
        doors.start()
        notify("READY=1")
        stopped: asyncio.Future[object] = asyncio.ensure_future(stop.wait())
        failure: asyncio.Future[object] = engine.failure  # type: ignore[assignment]
        await asyncio.wait([stopped, failure], return_when=asyncio.FIRST_COMPLETED)
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
        notify("STOPPING=1")
        await doors.close()
        await wanted.close()
        await supervisor.close()
