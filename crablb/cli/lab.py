"""``crablb lab``: networks of namespaces to try things in."""

from __future__ import annotations

import argparse
import os
import sys

from crablb.errors import ConfigError, KernelError, printable
from crablb.lab import VIP4, VIP6, Lab, existing, mine


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("lab", help="networks of namespaces to try crablb in")
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION")

    up = actions.add_parser("up", help="make a lab")
    up.add_argument(
        "--topology", default="bridge", choices=["bridge", "routed"], help="one segment, or three subnets and a router"
    )
    up.add_argument("--servers", type=int, default=3, metavar="N", help="how many")
    up.add_argument("--no-offload", action="store_true", help="no checksum or segmentation offload")
    up.set_defaults(run=run_up)

    down = actions.add_parser("down", help="remove a lab and end what runs in it")
    which = down.add_mutually_exclusive_group()
    which.add_argument("--all", action="store_true", help="every lab, whoever made it; tells them, and asks")
    which.add_argument("--mine", action="store_true", help="every lab that this user has made (of sudo: who asked)")
    down.add_argument("--yes", action="store_true", help="do not ask")
    down.set_defaults(run=run_down)

    status = actions.add_parser("status", help="the labs there are, their nodes and processes")
    status.set_defaults(run=run_status)

    execute = actions.add_parser("exec", help="run a command in a node: exec client -- curl ...")
    execute.add_argument("node", metavar="NODE", help="client, lb, server1, ...")
    execute.add_argument(
        "command", nargs=argparse.REMAINDER, metavar="COMMAND", help="with its arguments (default: a shell)"
    )
    execute.set_defaults(run=run_exec)

    for action in (up, down, execute):
        action.add_argument("--name", metavar="LAB", default="lab", help="of the lab")


def _require_root() -> None:
    if os.geteuid() != 0:
        raise KernelError("crablb lab makes network namespaces; run it as root")


def run_up(args: argparse.Namespace) -> int:
    _require_root()
    Lab.create(args.name, args.topology, args.servers, offload=not args.no_offload)
    print(f"lab {args.name} is up; look at it: crablb lab status")
    return 0


def run_down(args: argparse.Namespace) -> int:
    _require_root()
    several = [name for name in existing() if args.all or mine(name)]
    labs = [
        Lab.open(name, "see which there are: crablb lab status")
        for name in (several if args.all or args.mine else [args.name])
    ]
    if args.all and labs and not args.yes and not _agreed(labs):
        print("nothing was removed")
        return 1
    for lab in labs:
        lab.destroy()
        print(f"lab {lab.name} is gone")
    return 0


def _agreed(labs: list[Lab]) -> bool:
    """Whether these labs are meant, and what runs in them.  Raises :class:`ConfigError` if nobody can say."""
    for lab in labs:
        whose = "" if mine(lab.name) else ", which somebody else has made"
        print(f"lab {lab.name}{whose}")
        for node in lab.nodes.values():
            if running := [_command(pid) for pid in node.processes()]:
                print(f"  {node.name:10} {', '.join(running)}")
    if not (sys.stdin and sys.stdin.isatty()):
        raise ConfigError("--all ends all of these; say that it is meant: --yes, or take your own alone: --mine")
    try:
        return input("remove them, and end what runs there? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def run_status(args: argparse.Namespace) -> int:
    names = existing()
    if not names:
        print("no lab; make one: crablb lab up")
    for name in names:
        lab = Lab.open(name)
        print(f"{name}: {lab.topology}, VIPs {VIP4} and {VIP6}")
        for node in lab.nodes.values():
            running = [_command(pid) for pid in node.processes()]
            print(f"  {node.name:10} {node.ip4:12} {node.ip6:12} {', '.join(running)}".rstrip())
    return 0


def _command(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm") as comm:
            return printable(f"{comm.read().strip()} ({pid})")
    except FileNotFoundError:
        return f"({pid})"


def run_exec(args: argparse.Namespace) -> int:
    _require_root()
    node = Lab.open(args.name).node(args.node)
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    argv = node.command(command or [os.environ.get("SHELL", "/bin/sh")])
    os.execvp(argv[0], argv)
