"""``crablb explain``: why a client goes where it goes."""

from __future__ import annotations

import argparse
import re
import shutil
import textwrap

from crablb.api.types import Explain, Explanation
from crablb.cli import asking
from crablb.errors import ConfigError
from crablb.values import shown


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("explain", help="why a client goes to the backend that it goes to, step by step")
    parser.add_argument("connection", metavar="'CLIENT:PORT -> VIP:PORT'", help="10.0.0.1:40000 -> 10.0.0.100:80")
    asking.add_arguments(parser)
    parser.add_argument("--offer", action="store_true", help="the client offers to be redirected, as its agent does")
    parser.add_argument("--mptcp", action="store_true", help="the client speaks MPTCP")
    parser.add_argument(
        "--join", default="", metavar="TOKEN", help="the SYN joins the MPTCP connection of this token (ss -M)"
    )
    parser.add_argument(
        "--backend-down",
        dest="down",
        action="append",
        default=[],
        metavar="BACKEND",
        help="as if this one were not healthy; repeatable",
    )
    parser.add_argument("--config", metavar="FILE.toml", help="as if this were served")
    parser.add_argument("--frame", action="store_true", help="with the frame that would go out, in hexadecimal digits")
    parser.set_defaults(run=run)


def parse(text: str) -> tuple[str, str]:
    """Client and VIP.  Raises :class:`ConfigError`."""
    match = re.fullmatch(r"\s*(\S+?)\s*(?:->|→|\s)\s*(\S+)\s*", text)
    if not match:
        raise ConfigError(f"{shown(text)} is not CLIENT:PORT -> VIP:PORT ('10.0.0.1:40000 -> 10.0.0.100:80')")
    return match[1], match[2]


def run(args: argparse.Namespace) -> int:
    client, vip = parse(args.connection)
    asked = Explain(
        client=client,
        vip=vip,
        offer=args.offer,
        mptcp=args.mptcp,
        join=args.join,
        down=args.down,
        configuration=asking.configuration(args.config) if args.config is not None else "",
        frame=args.frame,
    )
    with asking.sent(args.config), asking.client(args) as daemon:
        found = daemon.post("/v1/explain", Explanation, asked)
    if args.json:
        asking.print_json(found)
        return 0
    width = shutil.get_terminal_size().columns
    for step in found.steps:
        print(f"{step.what:<12} {step.outcome}")
        for line in textwrap.wrap(step.why, max(20, width - 15)):
            print(f"{'':12}   {line}")
    if found.frame:
        print(f"{'frame':<12} {found.frame}")
    return 0
