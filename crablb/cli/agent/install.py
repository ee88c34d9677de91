"""``crablb agent``: the endpoints, on servers and clients."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import structlog

from crablb import log as logging
from crablb.agent import ClientAgent, ServerAgent
from crablb.agent.base import Agent, find_cgroup
from crablb.agent.reporter import Reporter
from crablb.agent.server import open_connections, redirects
from crablb.config import parse_backend, parse_endpoint, parse_prefix, parse_vip
from crablb.control.notify import notify
from crablb.errors import ConfigError, CrablbError, KernelError
from crablb.kernel import bpf, pins, rtnetlink
from crablb.kernel.rtnetlink import Netlink
from crablb.model import OptionForm, Vip
from crablb.values import parse_interface, read_key

log = structlog.get_logger()
T = TypeVar("T")
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
    client.add_argument(
        "--wait",
        metavar="SECONDS",
        default="30",
        help="when it is to end: how long to wait for redirected connections to end; what is left then stays in the"
        " kernel, without offers, until the next agent or crablb agent remove",
    )
    repair = roles.add_parser(
        "repair", help="mend the routes, filters and attachments of this namespace's client agent"
    )
    repair.set_defaults(run=run_repair)
    remove = roles.add_parser("remove", help="take agents out of the kernel, once no connection needs them")
    remove.add_argument("role", nargs="?", choices=sorted(ROLES), help="which (default: both)")
    how = remove.add_mutually_exclusive_group()
    how.add_argument("--now", action="store_true", help="at once: redirected connections break")
    how.add_argument("--wait", metavar="SECONDS", help="wait so long at the most for redirected connections to end")
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


class _Problems:
    """Every fault of the arguments, before any of them is acted on."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def parse(self, flag: str, texts: Sequence[str], parse: Callable[[str], T]) -> list[T]:
        parsed = []
        for text in texts:
            try:
                parsed.append(parse(text))
            except ConfigError as error:
                self.found += [f"{flag} {text}: {problem}" for problem in error.problems]
        return parsed

    def cgroup(self, directory: str | None) -> None:
        try:
            find_cgroup(directory)
        except CrablbError as error:
            self.found.append(str(error))

    def end(self) -> None:
        if self.found:
            raise ConfigError(self.found)


def _seconds(text: str) -> float:
    if not re.fullmatch(r"\d{1,5}(\.\d+)?", text):
        raise ConfigError("is not a number of seconds (0 to 99999)")
    return float(text)


def run_server(args: argparse.Namespace) -> int:
    problems = _Problems()
    if not args.vip:
        problems.found.append("the following arguments are required: --vip (see crablb agent server --help)")
    vips = problems.parse("--vip", args.vip or [], parse_vip)
    interfaces = problems.parse("--interface", args.interface, parse_interface)
    problems.cgroup(args.cgroup)
    if args.interface and not args.dsr:
        problems.found.append("--interface says where tunnels come in, and is of use with --dsr only")
    try:
        reporting = _reporting(args)
    except ConfigError as error:
        problems.found += error.problems
    problems.end()
    logging.set_up()
    _warn_of_own(vips)

    def make() -> ServerAgent:
        agent = ServerAgent(vips, args.cgroup, dsr=args.dsr, interfaces=interfaces)
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


def _warn_of_own(vips: Sequence[Vip]) -> None:
    """On the loopback a VIP is for direct server return; elsewhere this host answers for it."""
    with Netlink() as netlink:
        own = rtnetlink.addresses(netlink)
    for vip in vips:
        name = _interface_name(own.get(str(vip.address), 0))
        if name not in ("", "lo"):
            log.warning("a VIP is an address of this host, which answers ARP for it", vip=str(vip), interface=name)


def _interface_name(index: int) -> str:
    try:
        return socket.if_indextoname(index)
    except OSError:
        return ""


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
    problems = _Problems()
    vips = problems.parse("--vip", args.vip, parse_vip)
    backends = problems.parse("--backends", args.backends, parse_prefix)
    interfaces = problems.parse("--interface", args.interface, parse_interface)
    wait = problems.parse("--wait", [args.wait], _seconds)
    problems.cgroup(args.cgroup)
    if os.geteuid() == 0 or problems.found:
        problems.found += ClientAgent.problems(vips, backends, interfaces)
    problems.end()
    return _run(
        lambda: ClientAgent(vips, backends, option=OptionForm(args.option), cgroup=args.cgroup, interfaces=interfaces),
        args.detach,
        ClientAgent.watched,
        wait[0],
    )


def _require_root() -> None:
    if os.geteuid() != 0:
        raise KernelError("crablb agent works with BPF programs; run it as root")


SIGNALS = {signal.SIGTERM, signal.SIGINT}


def _asked_to_end(seconds: float) -> bool:
    return signal.sigtimedwait(SIGNALS, seconds) is not None


def _run(
    make: Callable[[], Agent],
    detach: bool,
    meanwhile: Callable[[], AbstractContextManager[None]] = nullcontext,
    wait: float = 0,
) -> int:
    logging.set_up()
    _require_root()
    if detach and not bpf.pins_last():
        raise KernelError(
            "--detach: what is to stay would go with this mount namespace (ip netns exec makes one); mount the BPF file"
            " system outside of it: mount -t bpf bpf /sys/fs/bpf, or enter by nsenter --net=/run/netns/NAME"
        )
    agent = make()
    # Waited for below; blocked before anything is installed, so that none comes in between.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    with agent.owned():
        agent.install()
        if detach:
            return 0
        left = 0
        try:
            with meanwhile():
                notify("READY=1")
                print("ready", flush=True)
                signal.sigwait(SIGNALS)
                notify("STOPPING=1")
                agent.withdraw()
                left = agent.drain(wait, _asked_to_end)
        finally:
            if not left:
                agent.remove()
    if left:
        log.warning("connections go on by what stays in the kernel", connections=left, remove="crablb agent remove")
    return 0


def run_status(args: argparse.Namespace) -> int:
    _require_root()
    found = {role: status for role, cls in ROLES.items() if (status := cls.status())}
    wrong = any(status["faults"] for status in found.values())
    if args.json:
        print(json.dumps(found))
        return int(wrong)
    if not found:
        print("no agent in this network namespace")
    for role, status in found.items():
        where = f"process {status['pid']}" if status["pid"] else "detached"
        print(f"{role}: {where}, {', '.join(status['vips'])}, cgroup {status['cgroup']}")
        if role == "client":
            print(f"  backends {', '.join(status['backends'])}, {status['flows']} redirected connections")
            for vip in status["vips"]:
                print(f"  {vip:28} {_vip(status, vip)}")
        for vip, n in status.get("connections", {}).items():
            print(f"  {vip:28} {n:>14,} open connections")
        for name, value in status["counters"].items():
            if value:
                print(f"  {name:28} {value:>14,}")
        for fault in status["faults"]:
            print(f"  wrong: {fault}")
    return int(wrong)


ROUTES = {"agent": "by the agent's route", "other": "by a route that is not the agent's", "none": "no route"}


#: enum crab_client_failure, as a person says it.
REASONS = {
    "lost": "no redirect came",
    "source": "the backend is outside of --backends",
    "route": "the SYN left by another route",
    "no_echo": "the backend answers without the redirect",
    "not_taken": "this host drops the redirect (rp_filter, firewall)",
    "silent": "nothing came after the handshake",
}


def _vip(status: dict[str, Any], vip: str) -> str:
    said = "offers no more, removal is waited for" if status.get("withdrawn") else "offering"
    for entry in status["redirects"]:
        if entry["vip"] == vip and entry["backend"] is None and entry["reason"] and not status.get("withdrawn"):
            blamed = f" at {entry['blamed']}" if entry["blamed"] else ""
            reason = REASONS.get(entry["reason"], entry["reason"])
            said = f"no offers for {entry['backing_off']:.0f} s: {reason}{blamed}, for {entry['since']:.0f} s"
    return f"{said}, {ROUTES[status['routes'][vip]]}"


def run_repair(args: argparse.Namespace) -> int:
    _require_root()
    if ClientAgent.state() is None:
        raise KernelError("there is no client agent in this network namespace")
    found = ClientAgent.repair()
    left = ClientAgent.faults()
    for fault in found:
        if fault not in left:
            print(f"mended: {fault}")
    for fault in left:
        print(f"not mended: {fault}")
    return 1 if left else 0


def run_remove(args: argparse.Namespace) -> int:
    problems = _Problems()
    seconds = problems.parse("--wait", [args.wait] if args.wait is not None else [], _seconds)
    problems.end()
    _require_root()
    for role, cls in ROLES.items():
        if args.role not in (None, role):
            continue
        with cls.owned():
            left = 0
            if not args.now:
                cls.withdraw()
                if left := cls.live():
                    print(f"{role}: offers no more; {left} connections go on", flush=True)
                    left = cls.drain(seconds[0] if seconds else None, _pause)
            removed = cls.remove()
            cut = f", and {left} connections with it" if left else ""
            print(f"{role}: removed{cut}" if removed else f"{role}: there was none")
    return 0


def _pause(seconds: float) -> bool:
    time.sleep(seconds)
    return False
