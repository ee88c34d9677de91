"""``crablb demo``: the main job, shown and checked."""

from __future__ import annotations

import argparse
import os
import sys

from crablb.errors import KernelError
from crablb.lab.demo import Demo, Report


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("demo", help="real connections through the load balancer, in a lab")
    parser.add_argument("--topology", default="bridge", choices=["bridge", "routed"], help="of the lab")
    parser.add_argument("--json", action="store_true", help="print everything as JSON, for programs")
    parser.add_argument("--keep", action="store_true", help="leave the lab (crablb lab down --name demo)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if os.geteuid() != 0:
        raise KernelError("crablb demo makes network namespaces; run it as root")
    demo = Demo(args.topology, lambda text: print(f"==> {text}", file=sys.stderr, flush=True))
    report = demo.run(keep=args.keep)
    print(report.json() if args.json else table(report))
    return 0 if report.held else 1


def table(report: Report) -> str:
    packets = report.client_packets
    rows = [
        ("connections made by the client", f"{report.connection_attempts:,}"),
        *((f"  answered by {name} (short ones)", f"{n:,}") for name, n in report.connections_per_backend.items()),
        ("packets between client and servers", f"{packets['sent'] + packets['received']:,}"),
        ("packets that the load balancer saw", ""),
        *((f"  {kind}", f"{n:,}") for kind, n in report.load_balancer_packets.items()),
        ("what the client saw as its peer", ", ".join(report.peers_seen)),
    ]
    width = max(len(name) for name, _ in rows)
    lines = ["", *(f"{name:{width}}  {value:>10}" for name, value in rows), "", *_kinds(report), ""]
    lines += [f"{'ok  ' if c.held else 'FAIL'}  {c.what}\n        {c.evidence}" for c in report.claims]
    return "\n".join(lines)


def _kinds(report: Report) -> list[str]:
    """Kinds of client side by side: what a download cost the load balancer, and what it survived."""
    rows = [("", list(report.costs)), ("packets that the load balancer saw", [f"{n:,}" for n in report.costs.values()])]
    for what, pauses in report.survival.items():
        rows.append((f"{what} dies", ["breaks" if ms is None else f"lives ({ms:.0f} ms)" for ms in pauses.values()]))
    left = "one client's download"
    width = max(len(left), *(len(name) for name, _ in rows))
    return [f"{name or left:{width}}" + "".join(f"{value:>18}" for value in values) for name, values in rows]
