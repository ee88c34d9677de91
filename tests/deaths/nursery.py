"""Starts ``crablb`` in nodes, again and again: ``python -m tests.deaths.nursery RULES``, preloaded with the shim.

Each is a child, forked from here because a new interpreter takes longer to start than what is to be killed.  For a
line of standard input (:meth:`tests.deaths.farm.Nursery.start`) it answers the child's process id.
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
from tests.helpers.shim import KILL, Shim


def load() -> None:
    """What children would have to."""
    for module in pkgutil.walk_packages(crablb.__path__, "crablb."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in ("uvloop", "uvicorn", "starlette.applications", "starlette.routing", "rich", "msgspec"):
        importlib.import_module(name)
    gc.collect()
    gc.freeze()


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
            shim.end()
            shim.only(os.getpid())
            shim.add("step", does=KILL, first=number)
        sys.exit(cli.main(asked["args"]))


def main(rules: str) -> None:
    load()
    shim = Shim(Path(rules))
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them here
    print("ready", flush=True)
    for line in sys.stdin:
        if pid := os.fork():
            print(pid, flush=True)
        else:
            run(shim, json.loads(line))


if __name__ == "__main__":
    main(sys.argv[1])
