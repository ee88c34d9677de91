"""The daemon of ``crablb serve``: from start to signal, and reloads in between."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable

import structlog

from crablb import log as logging
from crablb.control.admin import Admin
from crablb.control.notify import notify
from crablb.control.operator import Operator
from crablb.control.supervisor import Supervisor
from crablb.errors import ConfigError
from crablb.model import Config

__all__ = ["serve"]

log = structlog.get_logger()


#: Seconds until what could not be applied, for want of memory perhaps, is tried again.
AGAIN = 1.0


def _reload(supervisor: Supervisor, read: Callable[[], Config]) -> None:
    """Read the configuration again and serve it; if it cannot be, say why and go on as before."""
    try:
        config = read()
        supervisor.apply(config)
    except ConfigError as error:
        supervisor.engine.count("reloads_refused")
        for problem in error.problems:
            log.error("not reloaded", reason=problem)
    except Exception:  # half of it may be served
        supervisor.engine.count("tasks_failed")
        log.exception("not reloaded; it is tried again", seconds=AGAIN)
        asyncio.get_running_loop().call_later(AGAIN, _reload, supervisor, read)
    else:
        log.info("reloaded", services=[str(s.vip) for s in config.services])


async def serve(supervisor: Supervisor, read: Callable[[], Config] | None, path: str = "") -> int:
    """Serve until SIGTERM, SIGINT or SIGQUIT; at SIGHUP, ``read`` the configuration again; at SIGUSR1, open the log
    anew.  Returns the exit status.

    ``read``: raises :class:`ConfigError`; None: there is nothing to read again.  ``path``: where it reads.
    """
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    engine = supervisor.engine
    operator = Operator(supervisor, read=read, path=path, stop=stop.set)
    admin = Admin(operator, engine.config)

    def reload() -> None:
        if read:
            _reload(supervisor, read)
        else:
            log.warning("nothing to reload: there is no --config file")

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGUSR1, logging.reopen)
    loop.add_signal_handler(signal.SIGUSR2, lambda: None)
    loop.add_signal_handler(signal.SIGHUP, lambda: None)  # there is nothing to read again yet
    await supervisor.start()
    loop.add_signal_handler(signal.SIGHUP, reload)
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
        notify("READY=1")
        admin.start()
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
        await admin.close()
        await supervisor.close()
