"""``crablb trace``: the next connections of a client, step by step."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from itertools import chain

import msgspec

from crablb.api import types
from crablb.cli import asking, streams
from crablb.cli.capture import number
from crablb.filters import parse_client, parse_target


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    default = types.Trace(client="")
    parser = commands.add_parser(
        "trace",
        help="the next connections of a client, live, step by step",
        description="The next connections of a client, live, step by step: what a running load balancer does with"
        " them, and why. Exit status 1: none came.",
    )
    parser.add_argument("client", metavar="CLIENT", help="its address")
    parser.add_argument("--vip", metavar="V[:PORT]", help="only those to this VIP")
    parser.add_argument("--timeout", type=number, default=default.timeout, metavar="S", help="end after so long")
    parser.add_argument(
        "--connections", type=int, default=default.connections, metavar="N", help="end when so many have been told"
    )
    asking.add_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    parse_client(args.client)
    if args.vip is not None:
        parse_target(args.vip)
    asked = types.Trace(client=args.client, vip=args.vip or "", timeout=args.timeout, connections=args.connections)
    before, some = "", False
    with asking.client(args) as client:
        pieces = asking.stream(client, "/v1/trace", asked, "the trace")
        first = next(pieces, b"")
        streams.complain(f"tracing the next connections of {args.client}; Ctrl-C ends it")
        for step in _steps(chain([first], pieces)):
            some = some or bool(step.connection)
            if args.json:
                print(msgspec.json.encode(step).decode(), flush=True)
                continue
            if step.connection and step.connection != before:
                before = step.connection
                stamp = time.strftime("%H:%M:%S", time.localtime(step.at)) + f"{step.at % 1:.6f}"[1:]
                print(f"{stamp}  {step.connection}")
            why = f"  ({step.why})" if step.why else ""
            print(f"  {step.what:10}{step.outcome}{why}", flush=True)
    return 0 if some else 1


def _steps(pieces: Iterator[bytes]) -> Iterator[types.TraceStep]:
    """Of server-sent events."""
    rest = b""
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data: "):
                yield msgspec.json.decode(line[6:], type=types.TraceStep)
