"""``--netns`` and ``--all-netns``: the network namespaces that a command is about."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TypeVar

from crablb.errors import Problems
from crablb.kernel import capabilities, netns, pins
from crablb.kernel.netns import Namespace

T = TypeVar("T")


def add_arguments(parser: argparse.ArgumentParser, every: str) -> None:
    """``every``: what --all-netns means."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--netns",
        action="append",
        default=[],
        metavar="NAME|PATH",
        help="in this network namespace instead of the command's own: by its name (ip netns), or a path as"
        " /proc/PID/ns/net; repeatable",
    )
    which.add_argument("--all-netns", action="store_true", help=every)


#: Of an agent in its own network namespace; in others it needs CAP_SYS_ADMIN as well (setns(2)).
AGENT = ("CAP_NET_ADMIN", "CAP_BPF", "CAP_PERFMON")


def require_rights() -> None:
    capabilities.require("crablb agent", AGENT)
    pins.prepare()


def named(args: argparse.Namespace, problems: Problems) -> list[Namespace]:
    """Those of --netns."""
    found = problems.each("--netns", args.netns, netns.find)
    first: dict[int, Namespace] = {}
    for one in found:
        if first.setdefault(one.inode, one) is not one:
            problems.add(f"--netns {one.name}", f"is the same as {first[one.inode].name}; name it once")
    return found


def chosen(args: argparse.Namespace) -> Sequence[Namespace | None]:
    """Those that there are now; None is the command's own, if no other was asked for.

    Raises :class:`crablb.errors.ConfigError`.
    """
    if args.all_netns:
        return netns.every()
    problems = Problems()
    found = named(args, problems)
    problems.finish()
    return found or [None]


def prefix(namespace: Namespace | None) -> str:
    """Of what is told about it."""
    return f"{namespace}: " if namespace else ""


def in_each(
    namespaces: Sequence[Namespace | None], problems: Problems, do: Callable[[Namespace | None], T]
) -> dict[Namespace | None, T]:
    """What it gives in each; where it fails is noted, and the next one comes."""

    def inside(namespace: Namespace | None) -> T:
        with netns.inside(namespace.path) if namespace else nullcontext():
            return do(namespace)

    done = {one: problems.attempt(str(one) if one else "", inside, one) for one in namespaces}
    return {one: each for one, each in done.items() if each is not None}
