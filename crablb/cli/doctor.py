"""``crablb doctor``: what keeps packets from their way, or will: of the machine, its network, a load balancer on it."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

from crablb import config
from crablb.cli.arguments import add_interfaces
from crablb.doctor import shown
from crablb.doctor.examine import examine
from crablb.doctor.finding import Finding, Severity, fault
from crablb.errors import Problems
from crablb.model import Config
from crablb.values import parse_interfaces


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("doctor", help="look for what is wrong, or will be, and say what mends it")
    add_interfaces(parser, "one that is or is to be served (default: the configuration's, or all that are served)")
    parser.add_argument(
        "--config", metavar="FILE.toml", help="of the load balancer (default: what a running one has in the kernel)"
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON, for programs")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    problems = Problems()
    names = (problems.attempt("--iface", parse_interfaces, args.interfaces) or ()) if args.interfaces else ()
    settings = problems.attempt("", config.load_config, args.config, names) if args.config is not None else None
    problems.finish()
    looked_at, findings = find(names, settings)
    sick = any(finding.severity in (Severity.WARNING, Severity.FAULT) for finding in findings)
    if args.json:
        print(json.dumps({"interfaces": looked_at, "sound": not sick, "findings": [one.plain() for one in findings]}))
    else:
        colour, width = shown.terminal()
        print("\n".join(shown.lines(findings, colour=colour, width=width)))
        print(shown.summary(findings))
    return int(sick)


def find(names: tuple[str, ...], settings: Config | None) -> tuple[tuple[str, ...], list[Finding]]:
    """The interfaces that were looked at, and what was found."""
    try:
        from crablb.doctor.plan import Subject, looks
    except ImportError as error:  # what is compiled, or what it is linked with
        lacking = fault(
            "libraries",
            f"a part of crablb does not load: {error}",
            "nothing but this can be looked at, and no load balancer or agent starts",
            "apt install libbpf1 (dnf install libbpf), or install crablb anew with this Python: pip install .",
        )
        return names, [replace(lacking, where="machine")]
    subjects = Subject.all(names, settings)
    return tuple(name for subject in subjects for name in subject.interfaces), examine(list(looks(subjects)))
