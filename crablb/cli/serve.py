"""``crablb serve``: the load balancer."""

from __future__ import annotations

import argparse

import uvloop

from crablb import config
from crablb import log as logging
from crablb.control import admin, seed
from crablb.control.daemon import serve
from crablb.control.state import Store, place
from crablb.errors import ConfigError
from crablb.kernel import capabilities, pins
from crablb.model import Config, Service, Switch
from crablb.options import OPTIONS


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
                nargs="?" if option.kind.implied else None,
                const=option.kind.implied,
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
    extra = [o.flags[0] for o in OPTIONS if (o.flags and o.name in given) or (services and o.name == "service")]
    if extra:
        raise ConfigError(f"{', '.join(extra)} cannot be given with --config; say it in {args.config}")
    return config.load_config(args.config, interfaces)


def run(args: argparse.Namespace) -> int:
    settings = read_config(args)
    logging.set_up(args.log_level)
    capabilities.require("crablb serve", capabilities.SERVE)
    pins.prepare()
    admin.join(settings)
    # Files are read again, whosever they are, if this process could read them.
    capabilities.keep((*capabilities.SERVE, "CAP_DAC_READ_SEARCH"))
    key = settings.seed or seed.load()
    names = settings.interfaces
    store = Store(place(names[0]), names, key) if settings.persist is Switch.ON else None
    return uvloop.run(
        serve(settings, key, (lambda: read_config(args)) if args.config else None, args.config or "", store)
    )
