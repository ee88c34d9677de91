"""``crablb doctor``: what keeps packets from their way, or will: of the machine, its network, a load balancer on it."""

from __future__ import annotations

import argparse
import json

from crablb import config
from crablb.doctor import shown
from crablb.doctor.examine import examine
from crablb.doctor.finding import Severity
from crablb.doctor.plan import Subject, looks
from crablb.errors import Problems
from crablb.values import parse_interface


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("doctor", help="look for what is wrong, or will be, and say what mends it")
    parser.add_argument(
        "--iface",
        "--interface",
        dest="interfaces",
        action="append",
        default=[],
        metavar="IF",
        help="one that is or is to be served; repeatable (default: the configuration's, or all that are served)",
    )
    parser.add_argument(
        "--config", metavar="FILE.toml", help="of the load balancer (default: what a running one has in the kernel)"
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON, for programs")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    problems = Problems()
    names = tuple(dict.fromkeys(problems.each("--iface", args.interfaces, parse_interface)))
    settings = problems.attempt("", config.load_config, args.config, names) if args.config else None
    problems.finish()
    subject = Subject.of(names, settings)
    findings = examine(list(looks(subject)))
    sick = any(finding.severity in (Severity.WARNING, Severity.FAULT) for finding in findings)
    if args.json:
        print(
            json.dumps(
                {"interfaces": subject.interfaces, "sound": not sick, "findings": [one.plain() for one in findings]}
            )
        )
    else:
        colour, width = shown.terminal()
        print("\n".join(shown.lines(findings, colour=colour, width=width)))
        print(shown.summary(findings))
    return int(sick)
