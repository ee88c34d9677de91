"""``crablb check``: every fault of a configuration file, and what of it is seldom meant."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator

from crablb import config, lint
from crablb.cli import streams
from crablb.cli.arguments import add_interfaces
from crablb.errors import ConfigError
from crablb.model import Config, Fallback

HELP = "say every fault of a configuration (exit status 2), and warn of what is legal and odd (exit status 0)"


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    add_arguments(commands.add_parser("check", help=HELP))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE.toml", help="as for crablb serve --config")
    add_interfaces(parser, "as for crablb serve")
    parser.add_argument(
        "--here",
        action="store_true",
        help="for this machine: also what its interfaces, addresses, routes and groups say of it",
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON, for programs")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    problems: list[str] = []
    warnings: list[str] = []
    try:
        found = config.load_config(args.file, args.interfaces)
        warnings = [*lint.odd(found), *lint.unreadable(found), *(_here(found) if args.here else ())]
    except ConfigError as error:
        problems = error.problems
    if args.json:
        print(json.dumps({"problems": problems, "warnings": warnings}, indent=2))
        return 2 if problems else 0
    if problems:
        raise ConfigError(problems)
    for warning in warnings:
        streams.complain(f"warning: {warning}")
    print("ok" if not warnings else f"ok, with {len(warnings)} warning{'s' if len(warnings) > 1 else ''}")
    sys.stdout.flush()
    return 0


def _here(found: Config) -> Iterator[str]:
    """What this machine says: all that has a load balancer refuse to start here, and its routes."""
    from crablb.control import admin, supervisor
    from crablb.errors import CrablbError, KernelError
    from crablb.kernel import routing
    from crablb.kernel.interface import interface_info
    from crablb.kernel.rtnetlink import Netlink

    for what in (supervisor.check, admin.check):
        try:
            what(found)
        except CrablbError as error:
            yield from error.problems if isinstance(error, ConfigError) else [str(error)]
    for address, why in supervisor.answered_twice(found):
        yield f"announce: {address} {why}"
    for name in found.interfaces:
        try:
            if not interface_info(name).up:
                yield f"interface: {name} is down"
        except KernelError as error:
            yield f"interface: {error}"
    with Netlink() as netlink:
        for service in found.services:
            for backend in service.backends:
                try:
                    route = routing.lookup(netlink, backend.address)
                except OSError:
                    yield f"{service.vip}: {backend.address}: no route leads there"
                    continue
                if route and service.fallback is Fallback.DSR_L2 and any(hop.towards for hop in route.hops):
                    yield f"{service.vip}: {backend.address} is behind a gateway, where dsr-l2 does not lead"
