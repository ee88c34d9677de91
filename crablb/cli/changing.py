"""What the commands that change a backend have in common."""

from __future__ import annotations

import argparse

from crablb.api import types
from crablb.api.client import Client, of_vip
from crablb.cli import asking
from crablb.errors import ConfigError

__all__ = ["add_arguments", "change", "run_state", "timeout"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("backend", metavar="BACKEND", help="its address")
    parser.add_argument("--vip", metavar="VIP", help="in this service alone (default: in all that it is in)")
    asking.add_arguments(parser)


def change(client: Client, args: argparse.Namespace, what: types.Patch) -> types.Applied:
    where = f"/v1/services/{of_vip(args.vip)}/backends" if args.vip is not None else "/v1/backends"
    return client.patch(f"{where}/{of_vip(args.backend)}", types.Applied, what)


def add_timeout(parser: argparse.ArgumentParser) -> None:
    """What :func:`timeout` reads."""
    parser.add_argument("--timeout", metavar="SECONDS", help="wait so long at most (default: as long as it takes)")


def timeout(args: argparse.Namespace) -> float | None:
    """Seconds, of ``--timeout``; None: it is not given.  Raises :class:`ConfigError`."""
    if args.timeout is None:
        return None
    try:
        seconds = float(args.timeout)
    except ValueError:
        seconds = -1
    if not 0 <= seconds <= 86400:
        raise ConfigError(f"--timeout: {args.timeout!r} is not a number of seconds from 0 to 86400")
    return seconds


def run_state(args: argparse.Namespace) -> int:
    """Of those that give a state, which is ``args.state``."""
    with asking.client(args) as client:
        applied = change(client, args, types.Patch(state=args.state))
    if args.json:
        asking.print_json(applied)
    else:
        asking.print_changes(applied.changes, applied.warnings)
    return 0
