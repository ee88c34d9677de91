"""``crablb agent``: the endpoints, on servers and clients."""

from __future__ import annotations

import argparse
import os

from crablb.agent import mptcp, offering
from crablb.cli.agent import namespaces
from crablb.cli.agent.ask import ROLES, run_remove, run_repair, run_status
from crablb.cli.agent.install import run_client, run_server, run_server_add, run_server_remove
from crablb.model import OptionForm
from crablb.values import AGENT_METRICS_PORT


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("agent", help="the endpoints: on servers and on clients")
    roles = parser.add_subparsers(title="roles", required=True, metavar="ROLE")

    server = roles.add_parser("server", help="answer redirected connections")
    client = roles.add_parser("client", help="offer redirection, and take it up")
    for role in (server, client):
        role.add_argument(
            "--vip",
            action="append",
            metavar="tcp://ADDRESS:PORT",
            help="a VIP (IPv6 in brackets); repeatable",
        )
        role.add_argument(
            "--cgroup",
            metavar="DIR",
            default=os.environ.get("CRABLB_CGROUP"),
            help="only processes in this cgroup v2 (default: $CRABLB_CGROUP, else all)",
        )
        role.add_argument(
            "--metrics",
            metavar="ADDRESS[:PORT]",
            help=f"where metrics for Prometheus are served, at /metrics (port {AGENT_METRICS_PORT} if none is given)",
        )
        role.add_argument("--detach", action="store_true", help="leave it in the kernel, without a process")
        namespaces.add_arguments(role, "in every network namespace where it can be, and in those that appear later")
    client.add_argument(
        "--backends",
        action="append",
        metavar="PREFIX",
        help="where backends may be; repeatable",
    )
    client.add_argument(
        "--mptcp",
        action="store_true",
        help="let MPTCP sockets take up the addresses that servers tell them (the kernel's limits, nothing else);"
        " without --vip that alone, and no program in the kernel",
    )
    client.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="find out whether a backend hears this client, before its first redirect is taken up (default: yes, but"
        " not with --detach, as that takes a process)",
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
        "--tunnels-from",
        action="append",
        default=[],
        metavar="PREFIX",
        help="with --dsr: where the load balancers are; tunnels from elsewhere are dropped (default: they may be"
        " anywhere); repeatable",
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
        "--mptcp",
        nargs="?",
        const="backup",
        choices=mptcp.MODES,
        help="lead clients that use MPTCP past the load balancer, without an agent of theirs: backup (default): the way"
        " by it stays, for emergencies; leave: it is given up once the direct one stands",
    )
    server.add_argument(
        "--mptcp-address",
        action="append",
        default=[],
        metavar="ADDRESS",
        help="the address of this host that these clients are told (default: --report-as, or the one that there is);"
        " repeatable",
    )
    server.add_argument(
        "--mptcp-port",
        metavar="PORT",
        help="have the kernel listen there for what such clients open beside, where the application listens on the VIP"
        " alone",
    )
    server.add_argument(
        "--mptcp-listeners",
        action="store_true",
        help="with --mptcp: programs that ask for TCP sockets get MPTCP ones (those of --cgroup, started from now on;"
        " Linux 6.6)",
    )
    server.add_argument(
        "--redirect-clients",
        action="append",
        default=[],
        metavar="PREFIX",
        help="with --mptcp=leave: lead only these clients past the load balancer (default: all); repeatable",
    )
    server.add_argument(
        "--replace",
        action="store_true",
        help="replace the agent that is there, also if it is another one (VIPs, --mptcp, ...): one that was detached or"
        " killed; one that runs is to be ended first",
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
    client.add_argument(
        "--flows",
        metavar="N",
        help="redirected connections that there is room for (default: as many as the agent before had, else"
        f" {offering.FLOWS})",
    )
    client.add_argument(
        "--retransmission",
        metavar="SECONDS",
        default=f"{offering.RETRANSMISSION:g}",
        help="when a SYN that offered is sent again if nothing answers it; 0: as the system does",
    )
    client.add_argument(
        "--wait",
        metavar="SECONDS",
        default="30",
        help="when it is to end: how long to wait for redirected connections to end; what is left then stays in the"
        " kernel, without offers, until the next agent or crablb agent remove",
    )
    client.set_defaults(run=run_client)

    status = roles.add_parser("status", help="what runs in this network namespace")
    status.add_argument("--json", action="store_true", help="print it as JSON, for programs")
    status.set_defaults(run=run_status)
    repair = roles.add_parser("repair", help="mend what an agent has put into the kernel, and has been lost")
    repair.set_defaults(run=run_repair)
    remove = roles.add_parser("remove", help="take agents out of the kernel, once no connection needs them")
    for command in (repair, remove):
        command.add_argument("role", nargs="?", choices=sorted(ROLES), help="which (default: both)")
    for command in (status, repair, remove):
        namespaces.add_arguments(command, "in every network namespace that has an agent")
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
