"""``crablb status``: what a load balancer did, whether its daemon lives or not."""

from __future__ import annotations

import argparse
import json

from crablb.dataplane import statistics
from crablb.errors import KernelError
from crablb.kernel import bpf, pins
from crablb.kernel.interface import interface_info
from crablb.values import parse_interface


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("status", help="counters of the load balancer on an interface")
    parser.add_argument(
        "--iface", "--interface", dest="interface", metavar="IF", required=True, help="one that is served"
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON, for programs")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    name = parse_interface(args.interface)
    try:
        interface = interface_info(name)
    except KernelError:
        if pid := pins.owner(f"lb-{name}"):
            raise KernelError(f"interface {name} is gone; process {pid} serves it again when it is back") from None
        raise
    folder = pins.folder(f"lb-{args.interface}")
    try:
        counters = statistics.read_pinned(folder)
    except bpf.BpfNotFoundError:
        raise KernelError(
            f"no load balancer serves {args.interface}; start one: crablb serve --iface {args.interface} ..."
        ) from None
    state = {
        "interface": args.interface,
        "mode": bpf.xdp_program(interface.index)[1],
        "pid": pins.owner(f"lb-{args.interface}"),
    }
    if args.json:
        print(json.dumps(state | counters))
        return 0
    dead = f"no process: new connections are dropped (start one again, or crablb remove --iface {args.interface})"
    daemon = f"process {state['pid']}" if state["pid"] else dead
    print(f"{args.interface}: {state['mode']} XDP, {daemon}")
    print(f"{counters['flows']:,} fallback flows in the XDP program; it forwarded by itself")
    for vip, forwarded in counters["services"].items():
        print(f"  {vip:28} {forwarded['packets']:>14,} packets {forwarded['bytes']:>16,} bytes")
    titles = {"xdp": "XDP program", "total": f"workers ({', '.join(counters['queues'])})", "daemon": "daemon"}
    for title, words in titles.items():
        print(words)
        for name, value in counters[title].items():
            if value:
                print(f"  {name:28} {value:>14,}")
    return 0
