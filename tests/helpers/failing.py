"""Starts load balancers each of whose calls fails in turn (shim.c, which is preloaded), and looks what is left.

``python -m tests.helpers.failing ERRNO FIRST STEP RULES``, on veth0 of the network namespace: the FIRST call, and then
each STEP-th, of those by which a start asks the kernel for something.  Each load balancer is a child, as in
:mod:`.killed`.  Prints what it found, as JSON.
"""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import os
import select
import signal
import socket
import sys
import threading
from importlib import import_module
from itertools import count
from pathlib import Path

from crablb import cli
from crablb.kernel import bpf, pins
from tests.helpers.shim import Shim

#: Seconds in which a start is over, or has failed, and so is the end.
LONG = 60.0
#: What a child ends with that came to serve, and was told to end.
SERVED = 0


def left() -> list[str]:
    """What there is in the kernel and in folders of a load balancer that is no more."""
    found = [str(path) for path in pins.folder("lb-veth0").glob("*")]
    found += [str(path) for path in pins.RUN.glob(f"{pins.namespace()}-*")]
    program, _ = bpf.xdp_program(socket.if_nametoindex("veth0"))
    return found + ([f"program {program}"] if program else [])


def child(shim: Shim, does: int, number: int, log: Path) -> int:
    """The wait status of one whose call of this number fails; one that hangs is ended, and the log has its stacks."""
    shim.end()
    pid = os.fork()
    if pid:
        fd = os.pidfd_open(pid)
        if not select.select([fd], [], [], LONG)[0]:
            os.kill(pid, signal.SIGABRT)
            if not select.select([fd], [], [], LONG)[0]:
                os.kill(pid, signal.SIGKILL)
        os.close(fd)
        return os.waitpid(pid, 0)[1]
    faulthandler.enable()
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(fd, 2)
    receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    receiver.bind(f"\0crab-failing-{os.getpid()}")
    os.environ["NOTIFY_SOCKET"] = f"@crab-failing-{os.getpid()}"
    me = os.getpid()

    def end() -> None:
        """When it serves."""
        while b"READY=1" not in receiver.recv(4096):
            pass
        shim.end()
        os.kill(me, signal.SIGTERM)

    threading.Thread(target=end, daemon=True).start()
    shim.only(me)
    shim.add("ask", does=does, first=number, count=1)
    service = "tcp://10.0.0.100:80=10.0.0.11,10.0.0.12"
    status = cli.main(["serve", "--iface", "veth0", "--service", service, "--check", "none"])
    log.with_suffix(".modules").write_text("\n".join(sys.modules))
    os._exit(status)


def main(does: int, first: int, step: int, rules: Path) -> None:
    shim = Shim(rules)
    log = rules.with_name("failing.log")
    assert child(shim, 0, 1, log) == SERVED, log.read_text()
    for name in log.with_suffix(".modules").read_text().split():  # from here on nobody imports any
        with contextlib.suppress(ImportError):
            import_module(name)
    faults: dict[str, str] = {}
    served = refused = 0
    for number in count(first, step):
        status = child(shim, does, number, log)
        rule = shim.struck
        said = log.read_text()
        where = f"{number}: {rule}"
        if os.WIFSIGNALED(status):
            faults[where] = f"killed by {os.WTERMSIG(status)}: {said[-4000:]}"
        elif os.WEXITSTATUS(status) not in (0, 2):
            faults[where] = f"status {os.WEXITSTATUS(status)}: {said[-1500:]}"
        elif "Traceback" in said:
            faults[where] = said[-1500:]
        elif os.WEXITSTATUS(status) == 2 and not said.strip():
            faults[where] = "it does not say why"
        if there := left():
            faults[where] = f"{faults.get(where, '')} left: {there}"
            with contextlib.redirect_stdout(io.StringIO()):
                cli.main(["remove", "--iface", "veth0"])
        served += status == SERVED
        refused += os.WIFEXITED(status) and os.WEXITSTATUS(status) == 2
        if not rule:
            break
    print(json.dumps({"points": number, "served": served, "refused": refused, "faults": faults}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
