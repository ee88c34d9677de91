"""``crablb remove``: take a load balancer that is dead, or that left its flows to the next, out of the kernel."""

from __future__ import annotations

import argparse
import os
import time

from crablb.api import client as api
from crablb.cli.arguments import add_interfaces
from crablb.control import takeover
from crablb.dataplane import attachment
from crablb.errors import KernelError, Problems
from crablb.values import parse_interface, whole


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "remove", help="take out of the kernel what a load balancer has left there that was killed, or had --keep"
    )
    which = parser.add_mutually_exclusive_group(required=True)
    add_interfaces(which, "one that was served, be it there or gone")
    which.add_argument("--all", action="store_true", help="all that dead load balancers of this network namespace left")
    parser.add_argument(
        "--after", metavar="SECONDS", default="0", help="wait so long first, and leave alone what has been taken over"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    problems = Problems()
    names = problems.each("--iface", args.interfaces, parse_interface)
    after = problems.attempt("--after", _seconds, args.after)
    problems.finish()
    if os.geteuid() != 0:
        raise KernelError("crablb remove works with BPF programs; run it as root")
    renamed = attachment.reunite()
    if args.all:
        names = attachment.abandoned()
        if not names:
            print("nothing is left")
    there = set(renamed.values())  # one that has another's old name is meant itself
    asked, names = names, [name if name in there else renamed.get(name, name) for name in names]
    known = {name: was if was == name else f"{was} (it is {name} now)" for was, name in zip(asked, names, strict=True)}
    old = dict(zip(names, asked, strict=True))  # what it was called when its socket was made
    left = {name: attachment.left(name) for name in names}
    if after:
        print(f"{', '.join(known.values())}: in {after} s, unless it is taken over", flush=True)
        end = time.monotonic() + after
        while (still := end - time.monotonic()) > 0 and any(attachment.left(name) == left[name] for name in names):
            time.sleep(min(still, 1.0))
    for name, program in left.items():
        if after and attachment.left(name) != program:
            print(f"{known[name]}: has been taken over")
        else:
            gone = attachment.remove(name)
            gone = any([gone, *map(api.forget, {name, old[name]})])
            for each in {name, old[name]}:
                takeover.forget(each)
            print(f"{known[name]}: {'removed' if gone else 'there was none'}")
    return 0


def _seconds(text: str) -> int:
    return whole(0, 86400, int(text) if text.isascii() and text.isdigit() else text)
