"""``crablb drain``: no new connections to a backend, and wait until it has none."""

from __future__ import annotations

import argparse
import sys
import time

from crablb.api import types
from crablb.api.client import Client
from crablb.cli import asking, changing
from crablb.errors import ConfigError
from crablb.values import parse_address, parse_vip

#: Seconds between two looks.
PAUSE = 1.0


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "drain",
        help="give a backend no new connections; those that it has go on",
        epilog="Exit status with --wait: 0, it has no connections any more; 1, it has some at the timeout.",
    )
    changing.add_arguments(parser)
    parser.add_argument(
        "--wait",
        action="store_true",
        help="until it has no fallback flows, and its server, if it reports (crablb agent server --report), no"
        " connections",
    )
    parser.add_argument("--timeout", metavar="SECONDS", help="wait so long at most (default: as long as it takes)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    timeout = _seconds(args.timeout) if args.timeout is not None else None
    if timeout is not None and not args.wait:
        raise ConfigError("--timeout goes with --wait")
    with asking.client(args) as client:
        applied = changing.change(client, args, types.Patch(state="drain"))
        if not args.json:
            asking.print_changes(applied.changes, applied.warnings)
        left = _wait(client, args, timeout) if args.wait else None
    if args.json:
        asking.print_json({"changes": applied.changes, "left": left})
    return 1 if left else 0


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1
    if not 0 <= seconds <= 86400:
        raise ConfigError(f"--timeout: {text!r} is not a number of seconds from 0 to 86400")
    return seconds


def _wait(client: Client, args: argparse.Namespace, timeout: float | None) -> int:
    """Until it has nothing, or the time is over; says how many are left when that changes."""
    end = None if timeout is None else time.monotonic() + timeout
    before = None
    while True:
        left, silent = _left(client, args)
        if left != before and not args.json:
            note = "" if not silent else " (its server does not report: redirected connections are not seen)"
            print(f"{left:,} connections left{note}", file=sys.stdout, flush=True)
        before = left
        if not left or (end is not None and time.monotonic() >= end):
            return left
        time.sleep(PAUSE if end is None else min(PAUSE, max(0.0, end - time.monotonic())))


def _left(client: Client, args: argparse.Namespace) -> tuple[int, bool]:
    """How many connections it has, as far as is known, and whether its server does not say."""
    address = str(parse_address(args.backend))
    vip = str(parse_vip(args.vip)) if args.vip else None
    mine = [b for b in client.get("/v1/backends", list[types.Backend], vip=vip) if b.address == address]
    return (
        sum(max(b.flows, b.connections or 0) for b in mine),
        any(b.connections is None and b.cr and b.assigned != 0 for b in mine),
    )
