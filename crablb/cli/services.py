"""``crablb services``: what is served."""

from __future__ import annotations

import argparse

from crablb.api import types
from crablb.cli import asking


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("services", help="the services of a running load balancer")
    asking.add_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    with asking.client(args) as client:
        services = client.get("/v1/services", list[types.Service])
    if args.json:
        asking.print_json(services)
        return 0
    rows = [
        [
            service.vip,
            f"{service.serving}/{service.backends}",
            f"{service.healthy_weight}/{service.weight}",
            service.policy,
            f"{service.flows:,}",
            f"{service.packets:,}",
            _remarks(service),
        ]
        for service in services
    ]
    asking.print_table(
        ["service", "serving", "weight", "policy", "flows", "packets", "remarks"], rows, numbers=(1, 2, 4, 5)
    )
    return 0


def _remarks(service: types.Service) -> str:
    remarks = {
        "no backend serves": not service.serving,
        "panic: health is disregarded": service.panic,
        "backups serve": service.backups,
        "withdrawn": not service.announced,
        f"in use at {_holders(service)}": bool(service.in_use),
        "changed at run time": service.changed,
    }
    return ", ".join(remark for remark, there in remarks.items() if there)


def _holders(service: types.Service) -> str:
    return " and ".join(f"{mac} on {interface}" for interface, mac in service.in_use.items())
