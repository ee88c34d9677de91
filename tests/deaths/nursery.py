"""Starts ``crablb`` in nodes, again and again: ``python -m tests.deaths.nursery RULES``, preloaded with the shim.

Each is a child, forked from here because a new interpreter takes longer to start than what is to be killed.  For a
line of standard input (:meth:`tests.deaths.farm.Nursery.start`) it answers the child's process id.

``python -m tests.deaths.nursery RULES ARGUMENT ...`` is ``crablb ARGUMENT ...``: what a load balancer starts in its
place (``crablb takeover``), and what is killed at the call whose number is in the file that :func:`next_kill` names, if
there is one.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import pkgutil
import signal
import sys
from pathlib import Path
from typing import Any

import crablb
from tests.helpers.namespaces import inside
from tests.helpers.shim import Shim


def load() -> None:
    """What children would have to."""
    for module in pkgutil.walk_packages(crablb.__path__, "crablb."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in ("uvloop", "uvicorn", "starlette.applications", "starlette.routing", "rich", "msgspec"):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()


def next_kill(rules: Path) -> Path:
    """Where the number of the call is that is to be the last one of the next successor, which takes it away."""
    return rules.with_name("next-kill")


def run(shim: Shim, asked: dict[str, Any]) -> None:
    """The child."""
    from crablb import cli

    os.setsid()
    Path(asked["cgroup"], "cgroup.procs").write_text(str(os.getpid()))
    os.environ["CRABLB_CGROUP"] = asked["cgroup"]
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    log = os.open(asked["log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(null, 0)
    for fd in (1, 2):
        os.dup2(log, fd)
    if asked["notify"]:
        os.environ["NOTIFY_SOCKET"] = asked["notify"]
    with inside(asked["netns"]):
        if number := asked["kill"]:
            shim.kill_at(os.getpid(), "step", number)
        # Its successors, which are programs of their own.
        sys.orig_argv[:] = [sys.executable, "-m", "tests.deaths.nursery", str(shim.path), *asked["args"]]
        os.environ.update(shim.env)
        sys.argv[1:] = asked["args"]
        sys.exit(cli.main())  # as a program


def succeed(shim: Shim, arguments: list[str]) -> int:
    from crablb import cli

    sys.argv[1:] = arguments
    place = next_kill(shim.path)
    if place.exists():
        number = int(place.read_text())
        place.unlink()
        shim.kill_at(os.getpid(), "step", number)
    return cli.main()


def main(rules: str, *arguments: str) -> int:
    if arguments:
        return succeed(Shim(Path(rules)), list(arguments))
    load()
    shim = Shim(Path(rules))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them here
    print("ready", flush=True)
    for line in sys.stdin:
        if pid := os.fork():
            print(pid, flush=True)
        else:
            run(shim, json.loads(line))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
