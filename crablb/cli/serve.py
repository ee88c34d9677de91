"""``crablb serve``: the load balancer."""

from __future__ import annotations

import argparse
import os

import uvloop

from crablb import config
from crablb import log as logging
from crablb.control import seed
from crablb.control.daemon import serve
from crablb.control.supervisor import Supervisor
from crablb.errors import ConfigError, KernelError
from crablb.model import POLICIES as BUILTIN
from crablb.model import Announce, Bypass, Config, Fallback, OptionForm, XdpMode
from crablb.selection.reports import read_key


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("serve", help="run the load balancer")
    parser.add_argument(
        "--iface",
        "--interface",
        dest="interfaces",
        action="append",
        default=[],
        metavar="IF",
        help="where clients' packets come in; repeatable (backends may be behind any interface)",
    )
    parser.add_argument(
        "--service",
        action="append",
        default=[],
        metavar="VIP=BACKEND,...",
        help="tcp://10.0.0.100:80=10.0.0.11,10.0.0.12*3 (weights by *; IPv6 in brackets); repeatable",
    )
    parser.add_argument("--config", metavar="FILE.toml", help="instead of --service")
    parser.add_argument(
        "--fallback", choices=[f.value for f in Fallback], help="how clients that are not redirected are served"
    )
    parser.add_argument(
        "--policy", help=f"where connections are redirected to: {', '.join(BUILTIN)}, or module:function"
    )
    parser.add_argument(
        "--announce", choices=[a.value for a in Announce], help="answer ARP and neighbour discovery for the VIPs"
    )
    parser.add_argument(
        "--ack-bypass",
        choices=[b.value for b in Bypass],
        help="known fallback flows in the kernel alone (default: auto)",
    )
    parser.add_argument(
        "--report-listen",
        metavar="ADDRESS[:PORT]",
        help="where servers report their load to (crablb agent server --report)",
    )
    parser.add_argument("--report-key", metavar="FILE", help="the master key of their reports (crablb key new)")
    parser.add_argument("--option", choices=[f.value for f in OptionForm], help="the CR option's form")
    parser.add_argument("--xdp-mode", choices=[m.value for m in XdpMode], help="default: auto")
    parser.add_argument("--queues", type=int, help="RX queues to serve of each interface (default: all)")
    parser.add_argument(
        "--busy-poll",
        type=int,
        metavar="MICROSECONDS",
        help="how long a worker turns before it sleeps, when packets come close together (default: 20; 0: never)",
    )
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    parser.set_defaults(run=run)


def read_config(args: argparse.Namespace) -> Config:
    """The configuration that the arguments describe.  Raises :class:`ConfigError`."""
    if args.config:
        extra = [
            name
            for name, value in (
                ("--service", args.service),
                ("--fallback", args.fallback),
                ("--ack-bypass", args.ack_bypass),
                ("--policy", args.policy),
                ("--announce", args.announce),
                ("--report-listen", args.report_listen),
                ("--report-key", args.report_key),
                ("--option", args.option),
                ("--xdp-mode", args.xdp_mode),
                ("--queues", args.queues),
                ("--busy-poll", args.busy_poll is not None),
            )
            if value
        ]
        if extra:
            raise ConfigError(f"{', '.join(extra)} cannot be given with --config; say it in {args.config}")
        return config.load_config(args.config, args.interfaces)
    problems = []
    if not args.interfaces:
        problems.append("say which interface to serve: --iface eth0")
    if not args.service:
        problems.append("say what to serve: --service tcp://10.0.0.100:80=10.0.0.11,10.0.0.12, or --config FILE.toml")
    if args.queues is not None and not 1 <= args.queues <= 64:
        problems.append(f"--queues: {args.queues} is not a whole number from 1 to 64")
    if args.busy_poll is not None and not 0 <= args.busy_poll <= 1_000_000:
        problems.append(f"--busy-poll: {args.busy_poll} is not a whole number from 0 to 1000000")
    if bool(args.report_listen) != bool(args.report_key):
        problems.append("--report-listen and --report-key belong together (make a key: crablb key new)")
    if problems:
        raise ConfigError(problems)
    settings: dict[str, object] = {}
    if args.fallback:
        settings["fallback"] = Fallback(args.fallback)
    if args.policy:
        settings["policy"] = args.policy
    if args.announce:
        settings["announce"] = Announce(args.announce)
    if args.ack_bypass:
        settings["ack_bypass"] = Bypass(args.ack_bypass)
    if args.report_listen:
        settings["report_listen"] = config.parse_endpoint(args.report_listen)
        settings["report_key"] = read_key(args.report_key)
    if args.option:
        settings["option"] = OptionForm(args.option)
    if args.xdp_mode:
        settings["xdp_mode"] = XdpMode(args.xdp_mode)
    if args.queues:
        settings["queues"] = args.queues
    if args.busy_poll is not None:
        settings["busy_poll"] = args.busy_poll
    return config.config_from_args(args.interfaces, args.service, **settings)  # type: ignore[arg-type]


def run(args: argparse.Namespace) -> int:
    settings = read_config(args)
    logging.set_up(args.log_level)
    if os.geteuid() != 0:
        raise KernelError("crablb serve attaches BPF programs and binds AF_XDP sockets; run it as root")
    supervisor = Supervisor(settings, settings.seed or seed.load())
    return uvloop.run(serve(supervisor, (lambda: read_config(args)) if args.config else None))
