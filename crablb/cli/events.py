"""``crablb events``: what happened, and what happens."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator

import msgspec

from crablb.api import types
from crablb.api.client import ApiError, Client
from crablb.cli import asking
from crablb.errors import ConfigError


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("events", help="what happened to a running load balancer: its last 1,000 events")
    parser.add_argument(
        "-f",
        "--follow",
        action="store_true",
        help="go on with those that come; ends with the daemon, but not by a takeover",
    )
    parser.add_argument("--since", metavar="N", help="only those after this number")
    asking.add_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    since = args.since if args.since is not None else "0"
    if not (since.isascii() and since.isdigit() and len(since) < 16):
        raise ConfigError(f"--since: {since!r} is not the number of an event")
    with asking.client(args) as client:
        events = (
            _followed(client, int(since))
            if args.follow
            else client.get("/v1/events/kept", list[types.Event], since=since)
        )
        for event in events:
            print(msgspec.json.encode(event).decode() if args.json else _told(event), flush=args.follow)
    return 0


def _followed(client: Client, since: int) -> Iterator[types.Event]:
    """Events after a number, and then as they come, whichever process serves."""
    while True:
        before, broken = client.get("/v1/version", types.Version), None
        try:
            for event in client.events(since):
                since = event.number
                yield event
        except ApiError as error:
            broken = error
        if not asking.taken_over(client, before):
            if broken:
                raise broken
            return


def _told(event: types.Event) -> str:
    at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.at))
    about = " ".join(part for part in (event.service, event.backend, event.interface) if part)
    return f"{event.number:6} {at} {event.kind:20} {': '.join(part for part in (about, event.reason) if part)}"
