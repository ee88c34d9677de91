"""``crablb top``: services and backends of a running load balancer, live, by keyboard."""

from __future__ import annotations

import argparse
import os
import re
import select
import signal
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from crablb.api.client import Client, of_vip
from crablb.api.types import Applied, Backend, Patch, Service, Status
from crablb.cli import asking
from crablb.errors import ConfigError, CrablbError

INTERVAL = 1.0  # seconds from one look to the next
HELP = "q quit  ↑↓ select  s sort  / filter  d drain  m maint  r ready  +- weight"
SORTS = ("address", "connections", "new", "flows", "share")
ACTIONS: dict[str, Literal["drain", "maint", "ready"]] = {"d": "drain", "m": "maint", "r": "ready"}
#: What an arrow key sends, and what it is taken for.
ARROWS = {"\x1b[A": "k", "\x1b[B": "j", "\x1bOA": "k", "\x1bOB": "j"}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("top", help="services and backends, live; change them by keyboard")
    asking.add_arguments(parser, json=False)
    parser.add_argument("--interval", type=float, default=INTERVAL, metavar="SECONDS", help="from one look to the next")
    parser.set_defaults(run=run)


@dataclass(frozen=True, slots=True)
class Seen:
    """What a load balancer said, at a time (CLOCK_MONOTONIC)."""

    at: float
    status: Status
    services: Sequence[Service]
    backends: Sequence[Backend]


@dataclass(slots=True)
class View:
    """What is shown: what was seen last, and what the keys have made of it."""

    seen: Seen | None = None
    before: Seen | None = None
    problem: str = ""  # why there is nothing newer
    selected: tuple[str, str] | None = None  # service, address
    sort: str = SORTS[0]
    filter: str = ""
    typing: bool = False  # the filter
    asking: str = ""  # what is to be confirmed
    help: bool = False
    message: str = ""
    act: Callable[[], str] | None = field(default=None, repr=False)  # if it is confirmed; what it did

    def see(self, seen: Seen) -> None:
        self.before, self.seen, self.problem = self.seen, seen, ""
        if self.selected not in [(b.service, b.address) for b in self.rows]:
            self.selected = next(((b.service, b.address) for b in self.rows), None)

    def rate(self, backend: Backend) -> float:
        """Connections a second that were redirected to it, since the look before."""
        if not self.seen or not self.before or self.seen.at <= self.before.at:
            return 0.0
        for old in self.before.backends:
            if (old.service, old.address) != (backend.service, backend.address):
                continue
            if backend.assigned is not None and old.assigned is not None:
                return ((backend.assigned - old.assigned) % 2**32) / (self.seen.at - self.before.at)
        return 0.0

    @property
    def rows(self) -> list[Backend]:
        """Backends in the order in which they are shown: by service, then as they are sorted."""
        if not self.seen:
            return []
        keys: dict[str, Callable[[Backend], object]] = {
            "address": lambda b: 0,
            "connections": lambda b: -(b.connections or 0),
            "new": lambda b: -self.rate(b),
            "flows": lambda b: -b.flows,
            "share": lambda b: -b.share,
        }
        order = {service.vip: i for i, service in enumerate(self.seen.services)}
        wanted = [b for b in self.seen.backends if self.filter in f"{b.service} {b.address} {b.reason}"]
        return sorted(wanted, key=lambda b: (order.get(b.service, len(order)), keys[self.sort](b)))

    @property
    def current(self) -> Backend | None:
        return next((b for b in self.rows if (b.service, b.address) == self.selected), None)

    def move(self, by: int) -> None:
        rows = self.rows
        if not rows:
            return
        here = next((i for i, b in enumerate(rows) if (b.service, b.address) == self.selected), 0)
        there = rows[max(0, min(len(rows) - 1, here + by))]
        self.selected = there.service, there.address

    def press(self, key: str, change: Callable[[Backend, Patch], str]) -> bool:
        """Do what a key says; whether to go on.  ``change``: of a backend; says what it did."""
        self.message = ""
        if self.typing:
            self._type(key)
        elif self.asking:
            self._answer(key)
        elif key in ("q", "\x03", "\x04"):
            return False
        elif key in ("j", "k"):
            self.move(1 if key == "j" else -1)
        elif key == "s":
            self.sort = SORTS[(SORTS.index(self.sort) + 1) % len(SORTS)]
        elif key == "/":
            self.typing, self.filter = True, ""
        elif key == "?":
            self.help = not self.help
        elif (backend := self.current) and key in ACTIONS:
            self.asking = f"{ACTIONS[key]} {backend.address} in {backend.service}? y/n"
            self.act = lambda: change(backend, Patch(state=ACTIONS[key]))
        elif (backend := self.current) and key in ("+", "-"):
            weight = max(0, backend.weight + (1 if key == "+" else -1))
            self.asking = f"weight of {backend.address} in {backend.service}: {backend.weight} -> {weight}? y/n"
            self.act = lambda: change(backend, Patch(weight=weight))
        return True

    def _type(self, key: str) -> None:
        if key in ("\r", "\n", "\x1b"):
            self.typing = False
            if key == "\x1b":
                self.filter = ""
        elif key in ("\x7f", "\b"):
            self.filter = self.filter[:-1]
        elif key.isprintable():
            self.filter += key
        self.move(0)

    def _answer(self, key: str) -> None:
        self.message = self.act() if key == "y" and self.act else "nothing changed"
        self.asking, self.act = "", None


# ---- how it looks ----


def render(view: View, width: int, height: int) -> RenderableType:
    """The screen: at most so many lines of so many columns."""
    if not view.seen:
        return Text(view.problem or "asking...", no_wrap=True, overflow="ellipsis")
    head = _head(view, width)
    foot = _foot(view)
    table, selected = _table(view, width)
    room = max(1, height - len(head) - len(foot) - 1)
    # The selected line is always to be seen.
    first = max(0, min(selected - room // 2, len(table) - room))
    return Group(*head, _grid(table[first : first + room], width), *foot)


def _head(view: View, width: int) -> list[Text]:
    assert view.seen
    status = view.seen.status
    serving = status.state == "serving"
    line = Text(no_wrap=True, overflow="ellipsis")
    line.append(" ".join(i.name for i in status.interfaces), style="bold")
    line.append("  ")
    line.append(status.state, style="green" if serving else "bold yellow")
    line.append(f"  {status.backends_serving}/{status.backends} backends  {status.flows:,} flows")
    if view.before and view.seen.at > view.before.at:
        passed = view.seen.at - view.before.at
        for name, title in (("received", "packets/s"), ("redirected", "redirected/s")):
            new = status.counters["workers"].get(name, 0) - view.before.status.counters["workers"].get(name, 0)
            line.append(f"  {max(0, new) / passed:,.0f} {title}")
    lines = [line]
    lines += [
        Text(f"! {problem}", style="yellow", no_wrap=True, overflow="ellipsis") for problem in status.problems[:3]
    ]
    if view.problem:
        lines.append(Text(view.problem, style="bold red", no_wrap=True, overflow="ellipsis"))
    return lines


def _foot(view: View) -> list[Text]:
    if view.typing:
        text = f"filter: {view.filter}_"
    elif view.asking:
        text = view.asking
    elif view.message:
        text = view.message
    else:
        text = HELP if view.help else f"sort: {view.sort}  {f'filter: {view.filter}  ' if view.filter else ''}? help"
    return [Text(text, style="reverse" if view.asking else "dim", no_wrap=True, overflow="ellipsis")]


def _table(view: View, width: int) -> tuple[list[tuple[list[str], str]], int]:
    """Lines of cells and their style, and which of them is selected."""
    assert view.seen
    lines: list[tuple[list[str], str]] = []
    selected = 0
    services = {service.vip: service for service in view.seen.services}
    last = ""
    for backend in view.rows:
        if backend.service != last:
            last = backend.service
            lines.append(([_service_line(services.get(last), last)], "bold"))
        if (backend.service, backend.address) == view.selected:
            selected = len(lines)
        lines.append((_cells(view, backend), _style(view, backend)))
    return lines, selected


def _service_line(service: Service | None, vip: str) -> str:
    if not service:
        return vip
    words = [vip, service.policy, f"{service.serving}/{service.backends} serve", f"{service.flows:,} flows"]
    if service.panic:
        words.append("PANIC")
    if service.backups:
        words.append("backups serve")
    if not service.announced:
        words.append("NO QUORUM")
    if service.in_use:
        words.append("standby")
    return "  ".join(words)


def _cells(view: View, backend: Backend) -> list[str]:
    mark = "+" if backend.serving else "-"
    connections = "" if backend.connections is None else f"{backend.connections:,}"
    return [
        f"{mark} {backend.address}",
        backend.state,
        {True: "up", False: "down", None: ""}[backend.healthy],
        f"{backend.weight_now}" if backend.weight_now == backend.weight else f"{backend.weight_now}/{backend.weight}",
        "cr" if backend.cr else "",
        connections,
        "" if backend.assigned is None else f"{view.rate(backend):,.0f}",
        f"{backend.flows:,}",
        backend.reason or backend.cr_reason,
    ]


TITLES = ("backend", "state", "health", "weight", "cr", "conns", "new/s", "flows", "why")
WIDTHS = (20, 5, 6, 7, 2, 7, 6, 7)


def _style(view: View, backend: Backend) -> str:
    if (backend.service, backend.address) == view.selected:
        return "reverse"
    if backend.serving:
        return ""
    return "red" if backend.healthy is False else "yellow"


def _grid(lines: Sequence[tuple[list[str], str]], width: int) -> Table:
    # A screen of 80 columns has room for the first eight, and some words.
    last = max(10, width - sum(WIDTHS) - len(WIDTHS))
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(no_wrap=True, overflow="ellipsis", width=width)
    grid.add_row(Text(_row(TITLES, last), style="dim", no_wrap=True, overflow="ellipsis"))
    for cells, style in lines:
        text = cells[0] if len(cells) == 1 else _row(cells, last)
        grid.add_row(Text(text, style=style, no_wrap=True, overflow="ellipsis"))
    return grid


def _row(cells: Sequence[str], last: int) -> str:
    right = (3, 5, 6, 7)
    parts = [
        (cell.rjust(width) if i in right else cell.ljust(width))[: max(width, len(cell) if i == 0 else width)]
        for i, (cell, width) in enumerate(zip(cells, WIDTHS, strict=False))
    ]
    return " ".join([*parts, cells[-1][:last]])


# ---- the terminal ----


def keys(text: str) -> list[str]:
    """What a terminal sends, key by key; of several at once, as of what is pasted, none is lost."""
    return [ARROWS.get(key, key) for key in re.findall(r"\x1b[\[O][0-9;]*.|.", text, re.DOTALL)]


@contextmanager
def _keys() -> Iterator[Callable[[float], str]]:
    """Keys as they are pressed, without an echo: a function that waits at most so many seconds for one."""
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    pressed: list[str] = []  # and not taken yet

    def key(timeout: float) -> str:
        if not pressed:
            if not select.select([fd], [], [], timeout)[0]:
                return ""
            pressed.extend(keys(os.read(fd, 256).decode(errors="replace")) or ["\x04"])
        return pressed.pop(0)

    try:
        tty.setcbreak(fd)
        yield key
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def look(client: Client) -> Seen:
    status = client.get("/v1/status", Status)
    services, backends = client.get("/v1/services", list[Service]), client.get("/v1/backends", list[Backend])
    return Seen(time.monotonic(), status, services, backends)


def run(args: argparse.Namespace) -> int:
    if not 0.1 <= args.interval <= 3600:
        raise ConfigError("--interval: not a number of seconds from 0.1 to 3600")
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ConfigError("crablb top is for a terminal; for programs there is crablb backends --json")
    client = asking.client(args)
    view = View()
    view.see(look(client))  # who cannot be asked is told before the screen is taken

    def change(backend: Backend, what: Patch) -> str:
        path = f"/v1/services/{of_vip(backend.service)}/backends/{of_vip(backend.address)}"
        try:
            return "; ".join(client.patch(path, Applied, what).changes) or "it is so already"
        except CrablbError as error:
            return str(error)

    console = Console()
    resized = False

    def resize(*_: object) -> None:
        nonlocal resized
        resized = True

    signal.signal(signal.SIGWINCH, resize)
    with _keys() as key, Live(console=console, screen=True, auto_refresh=False) as live:
        due = time.monotonic() + args.interval
        while True:
            live.update(render(view, console.width, console.height), refresh=True)
            pressed = key(max(0.0, due - time.monotonic()))
            if pressed and not view.press(pressed, change):
                return 0
            if time.monotonic() >= due or view.message:
                due = time.monotonic() + args.interval
                try:
                    view.see(look(client))
                except CrablbError as error:
                    view.problem = str(error)
