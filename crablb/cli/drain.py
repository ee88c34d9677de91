"""``crablb drain``: no new connections to a backend, and wait until it has none."""

from __future__ import annotations

import argparse
import sys
import time

from crablb.api import types
from crablb.api.client import ApiError, Client, NotRunning
from crablb.cli import asking, changing
from crablb.errors import ConfigError, CrablbError
from crablb.values import counted, parse_address, parse_short_vip

#: Seconds between two looks.
PAUSE = 1.0
#: Seconds that a load balancer which has ended is waited for.
ALONE = 60.0


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
    changing.add_timeout(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    timeout = changing.timeout(args)
    if timeout is not None and not args.wait:
        raise ConfigError("--timeout goes with --wait")
    with asking.client(args) as client:
        applied = changing.change(client, args, types.Patch(state="drain"))
        if not args.json:
            asking.print_changes(applied.changes, applied.warnings)
        left = _wait(client, args, timeout) if args.wait else None
    if args.json:
        asking.print_json({"changes": applied.changes, "warnings": applied.warnings, "left": left})
    return 1 if left else 0


def _wait(client: Client, args: argparse.Namespace, timeout: float | None) -> int:
    """Until it has nothing, or the time is over; says how many are left when that changes.

    Where the load balancer ends meanwhile, the next one is waited for: flows, and the drain, outlive it.
    """
    end = None if timeout is None else time.monotonic() + timeout
    before, answered = None, time.monotonic()
    while True:
        now = time.monotonic()
        over = end is not None and now >= end
        try:
            left, note = _left(client, args)
        except (ApiError, NotRunning) as error:
            if (isinstance(error, ApiError) and error.code) or over or now - answered > ALONE:
                raise
        else:
            if (left, note) != before and not args.json:
                print(f"{counted(left, 'connection')} left{note}", file=sys.stdout, flush=True)
            before, answered = (left, note), now
            if not left or over:
                return left
        time.sleep(PAUSE if end is None else min(PAUSE, max(0.0, end - now)))


def _left(client: Client, args: argparse.Namespace) -> tuple[int, str]:
    """How many connections it has, as far as is known, and what there is to say of them.

    Flows of one that has left the configuration meanwhile, or whose service has, count as well.
    Raises :class:`CrablbError` if it gets new ones again.
    """
    address = str(parse_address(args.backend))
    vip = str(parse_short_vip(args.vip)) if args.vip is not None else None
    mine = {
        b.service: b
        for b in client.get("/v1/backends", list[types.Backend])
        if b.address == address and vip in (None, b.service)
    }
    if again := [b.service for b in mine.values() if b.state == "up"]:
        raise CrablbError(f"{address} is not drained any more in {', '.join(again)}: somebody has it up again")
    flows = {
        service: backends[address]
        for service, backends in client.get("/v1/flows/count", types.FlowCount).services.items()
        if address in backends and vip in (None, service)
    }
    reported = {service: b.connections or 0 for service, b in mine.items()}
    left = sum(max(flows.get(service, 0), reported.get(service, 0)) for service in flows.keys() | reported.keys())
    ending = _ending(client, address, vip) if flows else 0
    notes = []
    if ending:
        notes.append(f"{'' if ending >= left else f'{ending:,} of them '}ending; forgotten within 2 minutes")
    if not mine:
        notes.append("it is not in the configuration any more: redirected connections are not seen")
    elif any(b.connections is None and b.cr and b.assigned != 0 for b in mine.values()):
        notes.append("its server does not report: redirected connections are not seen")
    return left, f" ({'; '.join(notes)})" if notes else ""


def _ending(client: Client, address: str, vip: str | None) -> int:
    try:
        return client.get("/v1/flows", types.Flows, backend=address, vip=vip, limit="0").ending
    except ApiError as error:
        if error.code != 404:  # the last one has gone just now
            raise
        return 0
