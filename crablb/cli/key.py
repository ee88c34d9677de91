"""``crablb key``: keys by which servers' reports are authenticated."""

from __future__ import annotations

import argparse
import os
import stat
import sys
from contextlib import suppress

from crablb.config import parse_backend
from crablb.selection.reports import derive, new_master
from crablb.values import read_master_key


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("key", help="keys for the servers' reports")
    kinds = parser.add_subparsers(title="keys", required=True, metavar="WHAT")
    new = kinds.add_parser("new", help="print a new master key, for the load balancers")
    new.set_defaults(run=run_new)
    backend = kinds.add_parser("backend", help="print the key of one backend, for its agent")
    backend.add_argument("address", metavar="ADDRESS", help="the backend's address")
    backend.add_argument("--master", metavar="FILE", required=True, help="the load balancers' key")
    backend.set_defaults(run=run_backend)


def _print(key: bytes) -> None:
    """Also into a file, which nobody else may read then."""
    with suppress(OSError):  # the output is no file, or somebody else's
        mode = os.fstat(sys.stdout.fileno()).st_mode
        if stat.S_ISREG(mode):
            os.fchmod(sys.stdout.fileno(), stat.S_IMODE(mode) & 0o700)
    print(key.hex())


def run_new(_: argparse.Namespace) -> int:
    _print(new_master())
    return 0


def run_backend(args: argparse.Namespace) -> int:
    _print(derive(read_master_key(args.master), parse_backend(args.address).address))
    return 0
