"""``crablb key``: keys by which servers' reports are authenticated."""

from __future__ import annotations

import argparse
import secrets

from crablb.config import parse_backend
from crablb.selection.reports import derive, read_key


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("key", help="keys for the servers' reports")
    kinds = parser.add_subparsers(title="keys", required=True, metavar="WHAT")
    new = kinds.add_parser("new", help="print a new master key, for the load balancers")
    new.set_defaults(run=run_new)
    backend = kinds.add_parser("backend", help="print the key of one backend, for its agent")
    backend.add_argument("address", metavar="ADDRESS", help="the backend's address")
    backend.add_argument("--master", metavar="FILE", required=True, help="the load balancers' key")
    backend.set_defaults(run=run_backend)


def run_new(_: argparse.Namespace) -> int:
    print(secrets.token_hex(32))
    return 0


def run_backend(args: argparse.Namespace) -> int:
    print(derive(read_key(args.master), parse_backend(args.address).address).hex())
    return 0
