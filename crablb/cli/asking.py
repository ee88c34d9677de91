"""What the commands that ask a running load balancer have in common: arguments, who is asked, tables."""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import msgspec

from crablb.api import types
from crablb.api.client import ApiError, Client, NotRunning, discover
from crablb.config import read_file
from crablb.errors import ConfigError
from crablb.values import parse_interface

__all__ = [
    "TakenOver",
    "add_arguments",
    "client",
    "configuration",
    "print_changes",
    "print_json",
    "print_table",
    "sent",
    "since",
    "stream",
    "taken_over",
]


def add_arguments(parser: argparse.ArgumentParser, *, json: bool = True) -> None:
    parser.add_argument(
        "--iface",
        "--interface",
        dest="interface",
        metavar="IF",
        help="of the load balancer to ask (default: the only one in this network namespace)",
    )
    if json:
        parser.add_argument("--json", action="store_true", help="print it as JSON, for programs")


def client(args: argparse.Namespace) -> Client:
    """Raises :class:`crablb.api.client.NotRunning`, :class:`crablb.errors.ConfigError`."""
    name = parse_interface(args.interface) if args.interface is not None else None
    return Client(discover(name))


class TakenOver(ApiError):
    """What was followed has ended with its process: another one serves."""


def taken_over(client: Client, before: types.Version) -> bool:
    """Whether the load balancer is another process than before, one that has taken over."""
    try:
        now = client.get("/v1/version", types.Version)
    except (ApiError, NotRunning):
        return False
    return now.took_over is not None and now.started != before.started


def stream(client: Client, path: str, body: object, what: str) -> Iterator[bytes]:
    """What only one process can tell, as it comes.  Raises :class:`TakenOver`, and as :meth:`Client.stream` does."""
    before = client.get("/v1/version", types.Version)
    try:
        yield from client.stream("POST", path, body)
    except ApiError:
        if taken_over(client, before):
            raise TakenOver(
                [f"another process has taken over, and {what} ended with the one before: start it again"]
            ) from None
        raise


@contextmanager
def sent(file: str | None) -> Iterator[None]:
    """Have what the load balancer finds wrong with the configuration that was sent be the file's."""
    try:
        yield
    except ApiError as error:
        if not file:
            raise
        ours = "configuration: "
        told = [f"{file}: {each.removeprefix(ours)}" if each.startswith(ours) else each for each in error.problems]
        raise ApiError(told, error.code) from None


def configuration(path: str) -> str:
    """The text of a file.  Raises :class:`crablb.errors.ConfigError` also if there is none in it, which would stand for
    the daemon's own."""
    text = read_file(path)
    if not text.strip():
        raise ConfigError(f"{path}: is empty")
    return text


def print_json(value: object) -> None:
    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def print_changes(changes: Sequence[str], warnings: Sequence[str] = ()) -> None:
    """What was done, a line each."""
    for change in changes:
        print(change)
    if not changes:
        print("nothing to do: it is so already")
    for warning in warnings:
        print(f"crablb: {warning}", file=sys.stderr)


def print_table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[int] = ()) -> None:
    """Columns as wide as what is in them; those that are ``numbers`` to the right.  The last one is cut where the
    terminal ends, which is taken for 80 wide where there is none."""
    width = shutil.get_terminal_size().columns
    widths = [max(len(line[i]) for line in (heads, *rows)) for i in range(len(heads))]
    for row in (heads, *rows):
        cells = [cell.rjust(widths[i]) if i in numbers else cell.ljust(widths[i]) for i, cell in enumerate(row)]
        line = "  ".join(cells).rstrip()
        print(line[: width - 1] + "…" if sys.stdout.isatty() and len(line) > width else line)


def since(at: float) -> str:
    """How long ago, in few letters."""
    seconds = max(0, int(time.time() - at))
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"
