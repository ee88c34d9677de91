"""``crablb status``: what a load balancer does, and did, whether its daemon lives or not."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import msgspec

from crablb.api import client as api
from crablb.api import types
from crablb.dataplane import statistics
from crablb.errors import ConfigError, KernelError
from crablb.kernel import bpf, pins
from crablb.kernel.interface import interface_info
from crablb.values import parse_interface

#: Seconds that a load balancer may take to answer: one that is stopped by a debugger never does.
PATIENCE = 5.0
#: The command's status by what it says.
STATUS = {"serving": 0, "degraded": 1, "dead": 3}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "status",
        help="whether the load balancer on an interface is well, and its counters",
        epilog="Exit status: 0, it serves; 1, it serves, and something is not as it should be; 3, it does not run.",
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
    name = parse_interface(args.interface) if args.interface is not None else _only()
    try:
        interface = interface_info(name)
    except KernelError:
        if pid := pins.owner(f"lb-{name}"):
            raise KernelError(f"interface {name} is gone; process {pid} serves it again when it is back") from None
        raise
    try:
        counters = statistics.read_pinned(pins.folder(f"lb-{name}"))
    except bpf.BpfNotFoundError:
        raise api.NotRunning(f"no load balancer serves {name}; start one: crablb serve --iface {name} ...") from None
    pid = pins.owner(f"lb-{name}")
    state, problems, said = _ask(name) if pid else ("dead", [], None)
    found: dict[str, Any] = {"interface": name, "mode": bpf.xdp_program(interface.index)[1], "pid": pid}
    if args.json:
        more = {"state": state, "problems": problems, "status": msgspec.to_builtins(said)}
        print(json.dumps(found | more | counters))
    else:
        _show(found, counters, problems, said)
    return STATUS[state]


def _only() -> str:
    """The only load balancer there is, alive or dead, by its interface.

    Raises :class:`crablb.api.client.NotRunning`, :class:`ConfigError`.
    """
    there = api.found()
    dead = {path.name.removeprefix("lb-").replace("%2e", ".").replace("%25", "%") for path in _pinned()}
    names = sorted(dead) or sorted(there)
    if len({path.resolve() for path in there.values()}) == 1 and set(names) <= set(there):
        return next(iter(there))
    if len(names) == 1:
        return names[0]
    if names:
        raise ConfigError(f"there are load balancers on {', '.join(names)}; say which: --iface {names[0]}")
    raise api.NotRunning("no load balancer in this network namespace; start one: crablb serve --iface IF ...")


def _pinned() -> list[Path]:
    return list((pins.root() / pins.namespace()).glob("lb-*"))


def _ask(name: str) -> tuple[str, list[str], types.Status | None]:
    """How it says that it is."""
    try:
        with api.Client(api.discover(name), timeout=PATIENCE) as client:
            said = client.get("/v1/status", types.Status)
    except api.NotRunning:  # admin = "off", or it has just begun
        return "serving", [], None
    except api.ApiError as error:
        return "degraded", error.problems, None
    except KernelError:  # another user's
        return "serving", [], None
    return said.state, said.problems, said


def _show(found: dict[str, Any], counters: dict[str, Any], problems: list[str], said: types.Status | None) -> None:
    name, pid = found["interface"], found["pid"]
    dead = f"no process: new connections are dropped (start one again, or crablb remove --iface {name})"
    print(f"{name}: {found['mode']} XDP, {f'process {pid}' if pid else dead}")
    if said:
        print(f"{said.state}: {said.backends_serving} of {said.backends} backends serve, in {said.services} services")
        if said.changes:
            print(f"{said.changes} changed at run time")
    for problem in problems:
        print(f"  {problem}")
    print(f"{counters['flows']:,} fallback flows in the XDP program; it forwarded by itself")
    for vip, forwarded in counters["services"].items():
        print(f"  {vip:28} {forwarded['packets']:>14,} packets {forwarded['bytes']:>16,} bytes")
    titles = {"xdp": "XDP program", "total": f"workers ({', '.join(counters['queues'])})", "daemon": "daemon"}
    for title, words in titles.items():
        print(words)
        for counter, value in counters[title].items():
            if value:
                print(f"  {counter:28} {value:>14,}")
