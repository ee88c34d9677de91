"""``crablb key``: keys by which servers' reports are authenticated."""

from __future__ import annotations

import argparse
import os
import stat
import sys
from contextlib import suppress

from crablb.config import parse_backend
from crablb.errors import ConfigError
from crablb.selection.reports import derive, new_master
from crablb.values import read_master_key


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("key", help="keys for the servers' reports")
    kinds = parser.add_subparsers(title="keys", required=True, metavar="WHAT")
    new = kinds.add_parser("new", help="make a new master key, for the load balancers")
    new.set_defaults(run=run_new)
    backend = kinds.add_parser("backend", help="make the key of one backend, for its agent")
    backend.add_argument("address", metavar="ADDRESS", help="the backend's address")
    backend.add_argument("--master", metavar="FILE", required=True, help="the load balancers' key")
    backend.set_defaults(run=run_backend)
    for kind in (new, backend):
        kind.add_argument(
            "-o",
            "--output",
            metavar="FILE",
            help="write it to a new file, which nobody else can read (default: print it)",
        )


def run_new(args: argparse.Namespace) -> int:
    _put(new_master().hex(), args.output)
    return 0


def run_backend(args: argparse.Namespace) -> int:
    _put(derive(read_master_key(args.master), parse_backend(args.address).address).hex(), args.output)
    return 0


def _put(key: str, path: str | None) -> None:
    """Raises :class:`ConfigError` if there is such a file, or it cannot be written."""
    if path is None:
        _guard_output()
        print(key)
        return
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        raise ConfigError(f"--output {path}: is there already; remove it, or name another file") from None
    except (OSError, ValueError) as error:  # a NUL in the name
        raise ConfigError(f"--output {path}: cannot be made: {getattr(error, 'strerror', error)}") from None
    try:
        with open(file, "w") as out:
            out.write(key + "\n")
    except OSError as error:
        os.unlink(path)
        raise ConfigError(f"--output {path}: cannot be written: {error.strerror}") from None


def _guard_output() -> None:
    """Standard output may be a file, which the shell makes of the mode that its umask says."""
    with suppress(OSError, ValueError):  # it is somebody else's; or it has no number: it is in this process
        mode = os.fstat(sys.stdout.fileno()).st_mode
        if stat.S_ISREG(mode):
            os.fchmod(sys.stdout.fileno(), stat.S_IMODE(mode) & 0o700)
