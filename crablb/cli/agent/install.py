"""``crablb agent server`` and ``client``: from arguments to agents."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import structlog

from crablb import log as logging
from crablb.agent import ClientAgent, ServerAgent, mptcp, offering, sockets
from crablb.agent.base import Agent, find_cgroup
from crablb.agent.moved import Moved
from crablb.agent.mptcp import Mptcp
from crablb.agent.reporter import Reporter
from crablb.agent.server import Leave, open_connections, redirects
from crablb.cli.agent.ask import seconds
from crablb.cli.agent.namespaces import AGENT, chosen, in_each, named, prefix, require_rights
from crablb.cli.agent.process import Signals, Work, endure, serve
from crablb.cli.agent.supervisor import Supervisor
from crablb.config import parse_backend, parse_endpoint, parse_prefix, parse_vip
from crablb.errors import ConfigError, KernelError, Problems
from crablb.kernel import bpf, capabilities, pins, rtnetlink
from crablb.kernel.interface import interface_name
from crablb.kernel.netns import Namespace
from crablb.kernel.rtnetlink import Netlink
from crablb.model import Address, OptionForm, Vip
from crablb.values import AGENT_METRICS_PORT, parse_address, parse_interface, read_backend_key, whole

log = structlog.get_logger()

#: Redirected connections that there may be room for: at least, and at most.
FLOWS = (1 << 10, 1 << 24)
#: The least time until a SYN that offered is sent again: shorter ones are sent again on ways that work.
SOONEST = 0.05


def _changed_vips(args: argparse.Namespace) -> list[Vip]:
    """Raises :class:`ConfigError`."""
    problems = Problems()
    if args.vip:
        problems.add("", "--vip is of use to install an agent only; name the VIPs behind add or remove")
    vips = [problems.attempt(text, parse_vip, text) for text in args.vips]
    problems.finish()
    return list(dict.fromkeys(vip for vip in vips if vip))


def _change(args: argparse.Namespace, change: Callable[[], dict[Vip, str]]) -> int:
    """``change`` is for the network namespace where it is called, and says what became of each VIP."""
    logging.set_up()
    require_rights()

    def make(namespace: Namespace | None) -> None:
        if ServerAgent.present() or not args.all_netns:
            for vip, said in change().items():
                print(f"{prefix(namespace)}{vip}: {said}")

    problems = Problems()
    in_each(chosen(args), problems, make)
    problems.finish()
    return 0


def run_server_add(args: argparse.Namespace) -> int:
    vips = _changed_vips(args)

    def change() -> dict[Vip, str]:
        new = ServerAgent.add(vips)
        return {vip: "added" if vip in new else "was served already" for vip in vips}

    return _change(args, change)


def run_server_remove(args: argparse.Namespace) -> int:
    vips = _changed_vips(args)

    def change() -> dict[Vip, str]:
        ServerAgent.drop(vips, now=args.now)
        return dict.fromkeys(vips, "removed")

    return _change(args, change)


def _run(work: Work, namespaces: list[Namespace], every: bool) -> int:
    """``namespaces``: others than the process's own; ``every``: all that there are, and will be."""
    logging.set_up()
    endure()
    require_rights()
    if work.detach and not bpf.pins_last():
        raise KernelError(
            "--detach: what is to stay would go with this mount namespace (ip netns exec makes one); mount the BPF file"
            " system outside of it: mount -t bpf bpf /sys/fs/bpf, or enter by nsenter --net=/run/netns/NAME"
        )
    if every or namespaces:
        Supervisor(work, namespaces, every).run()
    else:
        serve(work, Signals())
    return 0


def _metrics(args: argparse.Namespace) -> tuple[Address, int] | None:
    """Where metrics are to be served.  Raises :class:`ConfigError`."""
    if args.metrics is None:
        return None
    problems = Problems()
    where: tuple[Address, int] | None = problems.attempt("--metrics", parse_endpoint, args.metrics, AGENT_METRICS_PORT)
    if args.detach:
        problems.add("", "--metrics needs a process; leave out --detach")
    if args.all_netns or len(args.netns) > 1:
        problems.add("", "--metrics is one agent's; with it name one network namespace at the most: --netns")
    problems.finish()
    return where


def _measured(work: Work, agent: type[Agent], where: tuple[Address, int] | None) -> Work:
    """The same, with the agent's metrics at ``where`` while it works."""
    if where is None:
        return work
    from crablb.agent.metrics import Exporter

    bound: list[Exporter] = []

    def make() -> Agent:
        made = work.make()
        bound.append(Exporter(agent, *where))  # if it cannot be, nothing is installed
        return made

    @contextmanager
    def meanwhile() -> Iterator[None]:
        with bound.pop().serving(), work.meanwhile():
            yield

    return replace(work, make=make, meanwhile=meanwhile)


# ---- server ----


def run_server(args: argparse.Namespace) -> int:
    problems = Problems()
    if not args.vip:
        problems.add("", "the following arguments are required: --vip (see crablb agent server --help)")
    vips = problems.each("--vip", args.vip or [], parse_vip)
    interfaces = problems.each("--interface", args.interface, parse_interface)
    problems.attempt("", find_cgroup, args.cgroup)
    if args.interface and not args.dsr:
        problems.add("", "--interface says where tunnels come in, and is of use with --dsr only")
    sources = problems.each("--tunnels-from", args.tunnels_from, parse_prefix)
    if args.tunnels_from and not args.dsr:
        problems.add("", "--tunnels-from says where tunnels come from, and is of use with --dsr only")
    reporting = problems.attempt("", _reporting, args)
    metrics = problems.attempt("", _metrics, args)
    lead = _mptcp(args, problems)
    namespaces = named(args, problems)

    def agent() -> ServerAgent:
        agent = ServerAgent(
            vips,
            args.cgroup,
            dsr=args.dsr,
            interfaces=interfaces,
            tunnels_from=sources,
            mptcp=lead(vips),
            sockets=args.mptcp_listeners,
        )
        if agent.mptcp and (found := mptcp.problems(vips, agent.mptcp, (agent.state() or {}).get("mptcp"))):
            raise ConfigError(found)
        if agent.sockets and (found := sockets.problems()):
            raise ConfigError(found)
        # One that is run by a process cannot be replaced, and is told of.
        changes = agent.differs() if not args.replace and pins.owner(ServerAgent.role) is None else []
        if changes:
            raise ConfigError(
                [
                    "there is another server agent in this network namespace:",
                    *(f"  {change}" for change in changes),
                    "replace it: --replace; or change its VIPs: crablb agent server add VIP, ... remove VIP",
                ]
            )
        return agent

    def make() -> ServerAgent:
        _warn_of_own(vips)
        return agent()

    if not capabilities.lacking(AGENT) and not problems.found:
        in_each(namespaces, problems, lambda _: agent())
    problems.finish()

    @contextmanager
    def meanwhile() -> Iterator[None]:
        with ServerAgent.watched(), ServerAgent.leading() as leave, reporting(leave) if reporting else nullcontext():
            yield

    return _run(_measured(Work(make, args.detach, meanwhile), ServerAgent, metrics), namespaces, args.all_netns)


def _mptcp(args: argparse.Namespace, problems: Problems) -> Callable[[Sequence[Vip]], Mptcp | None]:
    """How clients that use MPTCP are led, in the network namespace where it is called: it raises
    :class:`ConfigError`."""
    asked = problems.each("--mptcp-address", args.mptcp_address, parse_address)
    clients = problems.each("--redirect-clients", args.redirect_clients, parse_prefix)
    port = problems.each("--mptcp-port", [args.mptcp_port] if args.mptcp_port is not None else [], _port)
    if args.mptcp is None:
        own = ("mptcp_address", "mptcp_port", "mptcp_listeners", "redirect_clients")
        extra = [name for name in own if getattr(args, name)]
        if extra:
            problems.add("", f"{', '.join('--' + name.replace('_', '-') for name in extra)}: of use with --mptcp only")
    if args.mptcp == "leave" and args.detach:
        problems.add("", "--mptcp=leave needs a process, which leads each connection; leave out --detach")
    if args.mptcp == "backup" and clients:
        problems.add(
            "",
            "--redirect-clients: with --mptcp=backup the kernel leads connections, and tells all clients; use"
            " --mptcp=leave",
        )

    def lead(vips: Sequence[Vip]) -> Mptcp | None:
        if args.mptcp is None:
            return None
        chosen = [*asked, *([parse_address(args.report_as)] if args.report_as and not asked else [])]
        targets = [parse_endpoint(text.strip())[0] for text in args.report.split(",")] if args.report else []
        addresses = mptcp.own_addresses(vips, chosen, targets)
        return Mptcp(tuple(addresses), args.mptcp, port[0] if port else 0, tuple(clients))

    return lead


def _port(text: str) -> int:
    return whole(1, 65535, int(text) if re.fullmatch(r"\d{1,9}", text) else text)


def _warn_of_own(vips: Sequence[Vip]) -> None:
    """On the loopback a VIP is for direct server return; elsewhere this host answers for it."""
    with Netlink() as netlink:
        own = rtnetlink.addresses(netlink)
    for vip in vips:
        name = interface_name(own.get(str(vip.address), 0), "")
        if name not in ("", "lo"):
            log.warning("a VIP is an address of this host, which answers ARP for it", vip=str(vip), interface=name)


def _reporting(args: argparse.Namespace) -> Callable[[Leave], AbstractContextManager[object]]:
    """A context in which reports are sent; to be told how connections leave load balancers.  Raises
    :class:`ConfigError`."""
    if args.report is None:
        extra = [name for name in ("report_key", "report_as", "report_figure") if getattr(args, name) is not None]
        if extra:
            flags = ", ".join("--" + name.replace("_", "-") for name in extra)
            raise ConfigError(f"{flags}: of use with --report only")
        return nullcontext
    problems = []
    if args.detach:
        problems.append("--report needs a process; leave out --detach")
    if args.all_netns or len(args.netns) > 1:
        problems.append("--report is one backend's; with it name one network namespace at the most: --netns")
    if args.report_key is None:
        problems.append("--report needs --report-key FILE (made where the master key is: crablb key backend ADDRESS)")
    if problems:
        raise ConfigError(problems)
    targets = [parse_endpoint(text.strip()) for text in args.report.split(",")]
    key = read_backend_key(args.report_key)
    backend = parse_backend(args.report_as).address if args.report_as is not None else None
    figure = Path(args.report_figure) if args.report_figure is not None else None

    @contextmanager
    def report(leave: Leave) -> Iterator[None]:
        with (
            bpf.Map.from_pin(ServerAgent.folder() / "server_connections") as opened,
            bpf.Map.from_pin(ServerAgent.folder() / "server_redirects") as begun,
        ):
            moved = Moved()
            reporter = Reporter(
                lambda: moved.added(open_connections(opened)) if args.mptcp else open_connections(opened),
                lambda: redirects(begun),
                targets,
                key,
                backend,
                figure,
                leave,
                leads=args.mptcp is not None,
            )
            reporter.start()
            try:
                yield
            finally:
                reporter.stop()

    return report


# ---- client ----


def _flows(text: str) -> int:
    return whole(*FLOWS, int(text) if re.fullmatch(r"-?\d{1,9}", text) else text)


def _retransmission(text: str) -> float:
    if re.fullmatch(r"\d(\.\d{1,9})?", text) and (not float(text) or SOONEST <= float(text) < offering.SYSTEM_RTO):
        return float(text)
    raise ConfigError(
        f"is neither 0, for the system's own time, nor seconds from {SOONEST} to less than {offering.SYSTEM_RTO:g}"
    )


#: What is of use with VIPs only, and what it is by default.
OF_VIPS: dict[str, object] = {"backends": None, "interface": [], "flows": None, "verify": None}


def run_client(args: argparse.Namespace) -> int:
    problems = Problems()
    if not (args.vip or args.mptcp):
        lacking = "--vip" if args.backends else "--vip, --backends"
        problems.add("", f"the following arguments are required: {lacking} (see crablb agent client --help)")
    elif args.vip and not args.backends:
        problems.add("", "the following arguments are required: --backends (see crablb agent client --help)")
    elif not args.vip and (extra := [name for name, none in OF_VIPS.items() if getattr(args, name) != none]):
        problems.add("", f"{', '.join('--' + name for name in extra)}: of use with --vip only")
    vips = problems.each("--vip", args.vip or [], parse_vip)
    backends = problems.each("--backends", args.backends or [], parse_prefix)
    interfaces = problems.each("--interface", args.interface, parse_interface)
    flows = problems.each("--flows", [args.flows] if args.flows is not None else [], _flows)
    retransmission = problems.each("--retransmission", [args.retransmission], _retransmission)
    wait = problems.each("--wait", [args.wait], seconds)
    if args.verify and args.detach:
        problems.add("", "--verify needs a process; leave out --detach")
    problems.attempt("", find_cgroup, args.cgroup)
    metrics = problems.attempt("", _metrics, args)
    namespaces = named(args, problems)

    def check(_: Namespace | None) -> None:
        if found := ClientAgent.problems(vips, backends, interfaces, mptcp=args.mptcp):
            raise ConfigError(found)

    # Who is not root may ask of this one only, and is told so if that is all that is wrong.
    if not capabilities.lacking(AGENT) or (problems.found and not args.netns):
        in_each([] if args.all_netns else namespaces if args.netns else [None], problems, check)
    problems.finish()

    def make() -> ClientAgent:
        return ClientAgent(
            vips,
            backends,
            option=OptionForm(args.option),
            cgroup=args.cgroup,
            interfaces=interfaces,
            flows=flows[0] if flows else None,
            retransmission=retransmission[0],
            mptcp=args.mptcp,
        )

    watched = partial(ClientAgent.watched, verify=args.verify is not False)
    work = Work(make, args.detach, watched, wait[0])
    return _run(_measured(work, ClientAgent, metrics), namespaces, args.all_netns)
