"""``crablb agent``: the endpoints, on servers and clients."""

from __future__ import annotations

import argparse
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

from crablb import log as logging
from crablb.agent import ClientAgent, ServerAgent
from crablb.agent.base import Agent
from crablb.agent.reporter import Reporter
from crablb.agent.server import open_connections, redirects
from crablb.config import parse_backend, parse_endpoint, parse_prefix, parse_vip
from crablb.control.notify import notify
from crablb.errors import ConfigError, KernelError
from crablb.kernel import bpf, pins
from crablb.model import OptionForm, Vip
from crablb.values import parse_interface, read_key

ROLES: dict[str, type[Agent]] = {"client": ClientAgent, "server": ServerAgent}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("agent", help="the endpoints: on servers and on clients")
    roles = parser.add_subparsers(title="roles", required=True, metavar="ROLE")

    server = roles.add_parser("server", help="answer redirected connections")
    client = roles.add_parser("client", help="offer redirection, and take it up")
    for role in (server, client):
        role.add_argument(
            "--vip",
            action="append",
            required=role is client,  # of a server only to install it
            metavar="tcp://ADDRESS:PORT",
            help="a VIP (IPv6 in brackets); repeatable",
        )
        role.add_argument(
            "--cgroup",
            metavar="DIR",
            default=os.environ.get("CRABLB_CGROUP"),
            help="only processes in this cgroup v2 (default: $CRABLB_CGROUP, else all)",
        )
        role.add_argument("--detach", action="store_true", help="leave it in the kernel, without a process")
    client.add_argument(
        "--backends",
        action="append",
        required=True,
        metavar="PREFIX",
        help="where backends may be; repeatable",
    )
    client.add_argument(
        "--option", default="crab", choices=[f.value for f in OptionForm], help="the form of the CR option"
    )
    server.add_argument(
        "--dsr",
        action="store_true",
        help="serve clients that are not redirected too: the VIP on the loopback, and decapsulation",
    )
    server.add_argument(
        "--interface",
        action="append",
        default=[],
        metavar="IF",
        help="with --dsr: where tunnels come in (default: every Ethernet interface that is up); repeatable",
    )
    server.add_argument(
        "--report",
        metavar="LB[:PORT],...",
        help="tell these load balancers how many connections there are, and how loaded the machine is",
    )
    server.add_argument("--report-key", metavar="FILE", help="this backend's key (crablb key backend)")
    server.add_argument(
        "--report-as", metavar="ADDRESS", help="the backend that this is (default: the address that reports come from)"
    )
    server.add_argument(
        "--report-figure", metavar="FILE", help="report the number in this file as load, 1.0 for full (default: CPU)"
    )
    server.add_argument(
        "--replace", action="store_true", help="replace the agent that is there, also if it serves other VIPs"
    )
    _add_changes(server)
    client.add_argument(
        "--interface",
        action="append",
        default=[],
        metavar="IF",
        help="where backends' packets come in (default: by the routes); repeatable",
    )
    server.set_defaults(run=run_server)
    client.set_defaults(run=run_client)

    status = roles.add_parser("status", help="what runs in this network namespace")
    status.add_argument("--json", action="store_true", help="print it as JSON, for programs")
    status.set_defaults(run=run_status)
    remove = roles.add_parser("remove", help="take agents out of the kernel")
    remove.add_argument("role", nargs="?", choices=sorted(ROLES), help="which (default: both)")
    remove.set_defaults(run=run_remove)


def _add_changes(server: argparse.ArgumentParser) -> None:
    changes = server.add_subparsers(title="changes of the agent that is installed", metavar="add, remove")
    add = changes.add_parser("add", help="serve more VIPs")
    remove = changes.add_parser("remove", help="serve VIPs no more")
    for change in (add, remove):
        change.add_argument("vips", nargs="+", metavar="tcp://ADDRESS:PORT", help="a VIP (IPv6 in brackets)")
    remove.add_argument(
        "--now", action="store_true", help="also if connections end by it, of clients that were not redirected"
    )
    add.set_defaults(run=run_server_add)
    remove.set_defaults(run=run_server_remove)


def _changed_vips(args: argparse.Namespace) -> list[Vip]:
    """Raises :class:`ConfigError`."""
    problems, vips = [], []
    if args.vip:
        problems.append("--vip is of use to install an agent only; name the VIPs behind add or remove")
    for text in args.vips:
        try:
            vips.append(parse_vip(text))
        except ConfigError as error:
            problems += [f"{text}: {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(problems)
    return vips


def run_server_add(args: argparse.Namespace) -> int:
    vips = _changed_vips(args)
    logging.set_up()
    _require_root()
    new = ServerAgent.add(vips)
    for vip in dict.fromkeys(vips):
        print(f"{vip}: {'added' if vip in new else 'was served already'}")
    return 0


def run_server_remove(args: argparse.Namespace) -> int:
    vips = list(dict.fromkeys(_changed_vips(args)))
    logging.set_up()
    _require_root()
    ServerAgent.drop(vips, now=args.now)
    for vip in vips:
        print(f"{vip}: removed")
    return 0


def _parse_all(args: argparse.Namespace) -> tuple[list[object], list[object]]:
    problems: list[str] = []
    parsed: dict[str, list[object]] = {"vip": [], "backends": [], "interface": []}
    for name, parse in (("vip", parse_vip), ("backends", parse_prefix), ("interface", parse_interface)):
        for text in getattr(args, name, []):
            try:
                parsed[name].append(parse(text))
            except ConfigError as error:
                problems += [f"--{name} {text}: {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(problems)
    return parsed["vip"], parsed["backends"]


def run_server(args: argparse.Namespace) -> int:
    if not args.vip:
        raise ConfigError("the following arguments are required: --vip (see crablb agent server --help)")
    vips, _ = _parse_all(args)
    if args.interface and not args.dsr:
        raise ConfigError("--interface says where tunnels come in, and is of use with --dsr only")
    reporting = _reporting(args)

    def make() -> ServerAgent:
        agent = ServerAgent(vips, args.cgroup, dsr=args.dsr, interfaces=args.interface)  # type: ignore[arg-type]
        # One that is run by a process cannot be replaced, and is told of.
        changes = agent.differs() if not args.replace and not pins.owner(ServerAgent.role) else []
        if changes:
            raise ConfigError(
                [
                    "there is another server agent in this network namespace:",
                    *(f"  {change}" for change in changes),
                    "replace it: --replace; or change its VIPs: crablb agent server add VIP, ... remove VIP",
                ]
            )
        return agent

    return _run(make, args.detach, reporting)


def _reporting(args: argparse.Namespace) -> Callable[[], AbstractContextManager[None]]:
    """A context in which reports are sent.  Raises :class:`ConfigError`."""
    if args.report is None:
        extra = [name for name in ("report_key", "report_as", "report_figure") if getattr(args, name) is not None]
        if extra:
            flags = ", ".join("--" + name.replace("_", "-") for name in extra)
            raise ConfigError(f"{flags}: of use with --report only")
        return nullcontext
    problems = []
    if args.detach:
        problems.append("--report needs a process; leave out --detach")
    if args.report_key is None:
        problems.append("--report needs --report-key FILE (made where the master key is: crablb key backend ADDRESS)")
    if problems:
        raise ConfigError(problems)
    targets = [parse_endpoint(text.strip()) for text in args.report.split(",")]
    key = read_key(args.report_key)
    backend = parse_backend(args.report_as).address if args.report_as is not None else None
    figure = Path(args.report_figure) if args.report_figure else None

    @contextmanager
    def report() -> Iterator[None]:
        with (
            bpf.Map.from_pin(ServerAgent.folder() / "server_connections") as opened,
            bpf.Map.from_pin(ServerAgent.folder() / "server_redirects") as begun,
        ):
            reporter = Reporter(
                lambda: open_connections(opened), lambda: redirects(begun), targets, key, backend, figure
            )
            reporter.start()
            try:
                yield
            finally:
                reporter.stop()

    return report


def run_client(args: argparse.Namespace) -> int:
    vips, backends = _parse_all(args)
    return _run(
        lambda: ClientAgent(
            vips,  # type: ignore[arg-type]
            backends,  # type: ignore[arg-type]
            option=OptionForm(args.option),
            cgroup=args.cgroup,
            interfaces=args.interface,
        ),
        args.detach,
    )


def _require_root() -> None:
    if os.geteuid() != 0:
        raise KernelError("crablb agent works with BPF programs; run it as root")


def _run(make: object, detach: bool, meanwhile: Callable[[], AbstractContextManager[None]] = nullcontext) -> int:
    logging.set_up()
    _require_root()
    agent: Agent = make()  # type: ignore[operator]
    # Waited for below; blocked before anything is installed, so that none comes in between.
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    with agent.owned():
        agent.install()
        if detach:
            return 0
        try:
            with meanwhile():
                notify("READY=1")
                print("ready", flush=True)
                signal.sigwait(signals)
        finally:
            agent.remove()
    return 0


def run_status(args: argparse.Namespace) -> int:
    _require_root()
    found = {role: status for role, cls in ROLES.items() if (status := cls.status())}
    if args.json:
        print(json.dumps(found))
        return 0
    if not found:
        print("no agent in this network namespace")
    for role, status in found.items():
        where = f"process {status['pid']}" if status["pid"] else "detached"
        print(f"{role}: {where}, {', '.join(status['vips'])}, cgroup {status['cgroup']}")
        if role == "client":
            print(f"  backends {', '.join(status['backends'])}, {status['flows']} redirected connections")
        for vip, n in status.get("connections", {}).items():
            print(f"  {vip:28} {n:>14,} open connections")
        for name, value in status["counters"].items():
            if value:
                print(f"  {name:28} {value:>14,}")
    return 0


def run_remove(args: argparse.Namespace) -> int:
    _require_root()
    for role, cls in ROLES.items():
        if args.role in (None, role):
            with cls.owned():
                print(f"{role}: {'removed' if cls.remove() else 'there was none'}")
    return 0
