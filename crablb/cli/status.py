"""``crablb status``: what a load balancer does, and did, whether its daemon lives or not."""

from __future__ import annotations

import argparse
import json
import socket
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from crablb.api import client as api
from crablb.api import types
from crablb.dataplane import statistics
from crablb.errors import ConfigError, KernelError
from crablb.kernel import bpf, pins
from crablb.kernel.interface import interface_info
from crablb.values import counted, parse_interface

#: Seconds that a load balancer may take to answer: one that is stopped by a debugger never does.
PATIENCE = 5.0
#: The command's status by what it says.
STATUS = {"serving": 0, "degraded": 1, "starting": 3, "dead": 3}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "status",
        help="whether the load balancer on an interface is well, and its counters",
        epilog="Exit status: 0, it serves; 1, it serves, and something is not as it should be; 3, it does not run,"
        " or has just begun.",
    )
    parser.add_argument(
        "--iface",
        "--interface",
        dest="interface",
        metavar="IF",
        help="one that is served (default: the only one in this network namespace)",
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON, for programs")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    asked = parse_interface(args.interface) if args.interface is not None else None
    try:
        seen = _look(asked or _only())
    except (PermissionError, bpf.BpfPermissionError):  # another user than root: the daemon knows who may
        seen = _asked(asked)
    if args.json:
        more = {"state": seen.state, "problems": seen.problems, "status": msgspec.to_builtins(seen.said)}
        pid = seen.found["pid"]  # in place of one that is not seen no number, which a script might end
        more |= {"pid": pid or None, "elsewhere": pid == pins.ELSEWHERE}
        print(json.dumps(seen.found | more | seen.counters))
    else:
        _show(seen)
    return STATUS[seen.state]


@dataclass(frozen=True, slots=True)
class Seen:
    found: dict[str, Any]  # interface, mode, pid
    counters: dict[str, Any]  # statistics.read_pinned; empty: not known
    state: str
    problems: list[str]
    said: types.Status | None


def _look(name: str) -> Seen:
    """Into the kernel, and ask.  Raises :class:`PermissionError` and such, :class:`KernelError`, NotRunning."""
    pid = pins.owner(f"lb-{name}")
    try:
        mode = bpf.xdp_program(interface_info(name).index)[1]
    except KernelError:  # its load balancer waits for it, and can be asked
        if pid is None:
            raise
        mode = ""
    try:
        counters = statistics.read_pinned(pins.folder(f"lb-{name}"))
    except bpf.BpfNotFoundError:
        if mode or pid is None:
            missing = f"no load balancer serves {name}; start one: crablb serve --iface {name} ..."
            raise api.NotRunning(missing) from None
        counters = {}
    state, problems, said = _state(name, pid)
    if not mode and state == "serving":  # it cannot be asked, or has not seen it yet
        state, problems = "degraded", [f"interface {name} is gone", *problems]
    return Seen({"interface": name, "mode": mode, "pid": pid}, counters, state, problems, said)


def _asked(name: str | None) -> Seen:
    """The same, of the daemon alone.  Raises :class:`crablb.api.client.NotRunning`, :class:`KernelError`."""
    path = api.discover(name)
    try:
        with api.Client(path, timeout=PATIENCE) as client:
            said = client.get("/v1/status", types.Status)
            counts = client.get("/v1/statistics", types.Statistics)
            services = client.get("/v1/services", list[types.Service])
    except api.ApiError as error:
        return Seen({"interface": name, "mode": "", "pid": None}, {}, "degraded", error.problems, None)
    interface = next((i for i in said.interfaces if i.name == name), said.interfaces[0])
    counters = {
        "xdp": counts.xdp,
        "workers": counts.queues,
        "total": counts.workers,
        "daemon": counts.daemon,
        "queues": [f"{i.name}/{queue}" for i in said.interfaces for queue in range(i.queues)][: len(counts.queues)],
        "services": {s.vip: {"packets": s.packets, "bytes": s.bytes} for s in services},
        "flows": said.flows,
    }
    pid: int | None = said.version.pid
    with suppress(OSError):
        pid = pins.held().get(f"lb-{interface.name}", pid)
    found = {"interface": interface.name, "mode": interface.mode, "pid": pid}
    return Seen(found, counters, said.state, said.problems, said)


def _only() -> str:
    """The only load balancer there is, alive or dead, by its interface.

    Raises :class:`crablb.api.client.NotRunning`, :class:`ConfigError`.
    """
    there = api.found()
    dead = {path.name.removeprefix("lb-").replace("%2e", ".").replace("%25", "%") for path in _pinned()}
    names = sorted(dead) or sorted(there)
    if len({path.resolve() for path in there.values()}) == 1 and set(names) <= set(there):
        left = {name for _, name in socket.if_nameindex()}
        return next((name for name in there if name in left), next(iter(there)))
    if len(names) == 1:
        return names[0]
    if names:
        raise ConfigError(f"there are load balancers on {', '.join(names)}; say which: --iface {names[0]}")
    raise api.NotRunning("no load balancer in this network namespace; start one: crablb serve --iface IF ...")


def _pinned() -> list[Path]:
    return list((pins.root() / pins.namespace()).glob("lb-*"))


def _state(name: str, pid: int | None) -> tuple[str, list[str], types.Status | None]:
    """How it is: the state, problems, and what it says itself."""
    if pid is None:
        return "dead", [], None
    if not pins.has_begun(f"lb-{name}"):  # a socket that is there is of the one before
        return "starting", ["it has not begun to serve yet"], None
    return _ask(name)


def _ask(name: str) -> tuple[str, list[str], types.Status | None]:
    """How it says that it is."""
    try:
        with api.Client(api.discover(name), timeout=PATIENCE) as client:
            said = client.get("/v1/status", types.Status)
    except api.NotRunning:
        if pins.says_it_cannot_be_asked(f"lb-{name}"):
            return "degraded", ["its API could not be started, so it cannot be asked; its log says why"], None
        return "serving", [], None  # admin = "off"
    except api.ApiError as error:
        return "degraded", error.problems, None
    except KernelError:  # another user's
        return "serving", [], None
    return said.state, said.problems, said


def _show(seen: Seen) -> None:
    name, pid, said, counters = seen.found["interface"], seen.found["pid"], seen.said, seen.counters
    dead = f"no process: new connections are dropped (start one again, or crablb remove --iface {name})"
    if counters:
        how = f"{seen.found['mode']} XDP" if seen.found["mode"] else "gone"
        print(f"{name}: {how}, {dead if pid is None else pins.told(pid)}")
    if said:
        backends, services = counted(said.backends, "backend"), counted(said.services, "service")
        unchecked = f"; {said.backends_unchecked} not checked yet" if said.backends_unchecked else ""
        verb = "serves" if said.backends == 1 else "serve"
        print(f"{said.state}: {said.backends_serving} of {backends} {verb}, in {services}{unchecked}")
        if said.draining:
            print("draining: connections are to leave it (crablb drain-lb)")
        if said.standby:
            has = "another machine has it" if said.standby == 1 else "another machine has them"
            print(f"standby for {counted(said.standby, 'VIP')}: {has} (crablb services)")
        if said.changes:
            print(f"{counted(said.changes, 'change')} at run time (crablb diff)")
    elif seen.problems:
        print(f"{seen.state}:")
    for problem in seen.problems:
        print(f"  {problem}")
    if not counters:
        return
    forwards = "; what it forwarded of each service, without user space:" if counters["services"] else ""
    print(f"{counted(counters['flows'], 'fallback flow')} in the XDP program{forwards}")
    for vip, forwarded in counters["services"].items():
        print(f"  {vip:28} {forwarded['packets']:>14,} packets {forwarded['bytes']:>16,} bytes")
    titles = {"xdp": "XDP program", "total": f"workers ({', '.join(counters['queues'])})", "daemon": "daemon"}
    for title, words in titles.items():
        print(words)
        for counter, value in counters[title].items():
            if value:
                print(f"  {counter:28} {value:>14,}")
