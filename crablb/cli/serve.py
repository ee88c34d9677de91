"""``crablb serve``: the load balancer."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
from collections.abc import Callable

import structlog
import uvloop

from crablb import config, seed
from crablb import log as logging
from crablb.engine import Engine
from crablb.errors import ConfigError, KernelError
from crablb.model import Config, Service
from crablb.notify import notify
from crablb.options import OPTIONS

log = structlog.get_logger()


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("serve", help="run the load balancer")
    parser.add_argument("--config", metavar="FILE.toml", help="read all but the interface from a file (crablb config)")
    groups = {
        Config: parser.add_argument_group("the load balancer"),
        Service: parser.add_argument_group("services", "For all that are given by --service."),
    }
    for option in OPTIONS:
        if option.flags:
            groups[option.scope].add_argument(
                *option.flags,
                dest=option.name,
                action="append" if option.repeatable else "store",
                metavar=option.kind.metavar,
                help=option.explained.replace("%", "%%"),
            )
    parser.add_argument(
        "--log-level", default="info", choices=["debug", "info", "warning", "error"], help="the least that is logged"
    )
    parser.set_defaults(run=run)


def read_config(args: argparse.Namespace) -> Config:
    """The configuration that the arguments describe.  Raises :class:`ConfigError`."""
    given = {o.name: value for o in OPTIONS if o.flags and (value := getattr(args, o.name)) is not None}
    interfaces, services = given.pop("interface", []), given.pop("service", [])
    if args.config is None:
        return config.config_from_args(interfaces, services, **given)
    extra = [o.flags[0] for o in OPTIONS if o.name in given or (services and o.name == "service")]
    if extra:
        raise ConfigError(f"{', '.join(extra)} cannot be given with --config; say it in {args.config}")
    return config.load_config(args.config, interfaces)


def run(args: argparse.Namespace) -> int:
    settings = read_config(args)
    logging.set_up(args.log_level)
    if os.geteuid() != 0:
        raise KernelError("crablb serve attaches BPF programs and binds AF_XDP sockets; run it as root")
    engine = Engine(settings, settings.seed or seed.load())

    def reload() -> None:
        if not args.config:
            log.warning("nothing to reload: there is no --config file")
            return
        try:
            engine.apply(read_config(args))
        except ConfigError as error:
            engine.count("reloads_refused")
            for problem in error.problems:
                log.error("not reloaded", reason=problem)
        else:
            log.info("reloaded", services=[str(s.vip) for s in engine.config.services])

    return uvloop.run(serve(engine, reload))


async def serve(engine: Engine, reload: Callable[[], None]) -> int:
    """Serve until SIGTERM or SIGINT, ``reload`` at SIGHUP; returns the exit status."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, lambda: None)  # there is nothing to read again yet
    await engine.start()
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
        )
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
        await engine.close()
