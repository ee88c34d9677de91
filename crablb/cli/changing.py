"""What the commands that change a backend have in common."""

from __future__ import annotations

import argparse

from crablb.api import types
from crablb.api.client import Client, of_vip
from crablb.cli import asking

__all__ = ["add_arguments", "change", "run_state"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("backend", metavar="BACKEND", help="its address")
    parser.add_argument("--vip", metavar="VIP", help="in this service alone (default: in all that it is in)")
    asking.add_arguments(parser)


def change(client: Client, args: argparse.Namespace, what: types.Patch) -> types.Applied:
    where = f"/v1/services/{of_vip(args.vip)}/backends" if args.vip else "/v1/backends"
    return client.patch(f"{where}/{of_vip(args.backend)}", types.Applied, what)


def run_state(args: argparse.Namespace) -> int:
    """Of those that give a state, which is ``args.state``."""
    with asking.client(args) as client:
        applied = change(client, args, types.Patch(state=args.state))
    if args.json:
        asking.print_json(applied)
    else:
        asking.print_changes(applied.changes, applied.warnings)
    return 0
