"""Starts load balancers and agents, each with another call that fails (shim.c, which is preloaded); looks what is left.

``python -m tests.helpers.failing WHAT CALL OF ERRNO FIRST STEP RULES``, on veth0 of the network namespace; WHAT: see
:data:`STARTED`; CALL, OF: of which calls (:meth:`.shim.Rule.set`); the FIRST fails, and then each STEP-th.
Each one that is started is a child, as in :mod:`.killed`.  Prints what it found, as JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import io
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from importlib import import_module
from itertools import count
from pathlib import Path

from crablb import cli
from crablb.agent.base import cgroup_root
from crablb.kernel import bpf, pins
from tests.helpers.shim import Shim

Calls = tuple[str, str, int]
#: Seconds in which a start is over, or has failed, and so is the end.
LONG = 60.0
#: What a child ends with that came to serve, and was told to end.
SERVED = 0
VIP = "tcp://10.0.0.100:80"
#: What is started, and how what it leaves is removed.
STARTED: dict[str, tuple[Sequence[str], Sequence[str]]] = {
    "serve": (
        ["serve", "--iface", "veth0", "--service", f"{VIP}=10.0.0.11,10.0.0.12", "--check", "none"],
        ["remove", "--iface", "veth0"],
    ),
    "client": (
        [
            "agent",
            "client",
            "--vip",
            VIP,
            "--backends",
            "10.0.0.0/24",
            "--interface",
            "veth0",
            "--mptcp",
            "--wait",
            "0",
        ],
        ["agent", "remove", "client", "--now"],
    ),
    "server": (
        ["agent", "server", "--vip", VIP, "--dsr", "--interface", "veth0"],
        ["agent", "remove", "server", "--now"],
    ),
    "mptcp": (
        ["agent", "server", "--vip", VIP, "--mptcp=leave", "--mptcp-address", "10.0.0.2", "--mptcp-port", "81"],
        ["agent", "remove", "server", "--now"],
    ),
}
#: All that an agent changes, but for programs.
SHOW = (
    "ip addr; ip rule; ip -6 rule; ip route show table all; ip -6 route show table all; tc qdisc"
    "; for i in lo veth0; do tc filter show dev $i ingress; done; ip mptcp endpoint; ip mptcp limits"
    "; sysctl net.mptcp net.ipv4.conf.all net.ipv4.conf.lo net.ipv4.conf.veth0 2>/dev/null"
)
BPF, BPF_PROG_QUERY, SOCK_OPS, ROOM = 321, 16, 3, 64


class Query(ctypes.Structure):
    """Of ``union bpf_attr``, what BPF_PROG_QUERY has."""

    _fields_ = (
        ("target", ctypes.c_uint32),
        ("attach", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("attach_flags", ctypes.c_uint32),
        ("ids", ctypes.c_uint64),
        ("count", ctypes.c_uint32),
        ("padding", ctypes.c_uint32 * 10),
    )


def sock_ops(cgroup: Path) -> list[int]:
    """The programs that are attached to it."""
    ids = (ctypes.c_uint32 * ROOM)()
    fd = os.open(cgroup, os.O_RDONLY)
    query = Query(fd, SOCK_OPS, 0, 0, ctypes.addressof(ids), ROOM)
    try:
        if ctypes.CDLL(None, use_errno=True).syscall(BPF, BPF_PROG_QUERY, ctypes.byref(query), ctypes.sizeof(query)):
            raise OSError(ctypes.get_errno(), "BPF_PROG_QUERY")
    finally:
        os.close(fd)
    return list(ids[: query.count])


class Ground:
    """What there is in the kernel and in folders where nobody serves, and no agent is."""

    def __init__(self, cgroup: Path) -> None:
        self.cgroup = cgroup
        self._shown = self._show()

    def _show(self) -> list[str]:
        return subprocess.run(["sh", "-c", SHOW], capture_output=True, text=True, check=True).stdout.splitlines()

    def left(self) -> list[str]:
        """What is there beside."""
        # A lock that could not be taken is the next one's to take, and its file perhaps another one's.
        there = pins.RUN.glob(f"{pins.namespace()}-*")
        found = [str(path) for path in there if path.suffix != ".lock" or path.stat().st_size]
        found += [str(path) for role in ("lb-veth0", "client", "server") for path in pins.folder(role).glob("*")]
        for name in ("veth0", "lo"):
            program, _ = bpf.xdp_program(socket.if_nametoindex(name))
            found += [
                f"program {number} on {name}"
                for number in (program, *bpf.tcx_programs(socket.if_nametoindex(name)))
                if number
            ]
        found += [f"program {number} in the cgroup" for number in sock_ops(self.cgroup)]
        now = self._show()
        return (
            found
            + [f"+ {line}" for line in now if line not in self._shown]
            + [f"- {line}" for line in self._shown if line not in now]
        )


def child(shim: Shim, arguments: Sequence[str], calls: Calls, number: int, log: Path) -> int:
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
    status = 1
    try:
        faulthandler.enable()
        fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(fd, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        status = start(shim, arguments, calls, number)
        log.with_suffix(".modules").write_text("\n".join(sys.modules))
    except BaseException as error:  # as the interpreter would
        sys.excepthook(type(error), error, error.__traceback__)
        if isinstance(error, SystemExit):
            status = error.code if isinstance(error.code, int) else 1
    finally:
        os._exit(status)


def start(shim: Shim, arguments: Sequence[str], calls: Calls, number: int) -> int:
    receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    receiver.bind(f"\0crab-failing-{os.getpid()}")
    os.environ["NOTIFY_SOCKET"] = f"@crab-failing-{os.getpid()}"
    me = os.getpid()

    def end() -> None:
        """When it serves."""
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # they are for who waits for them
        said = b""
        while b"READY=1" not in said:
            with contextlib.suppress(OSError):  # it may be this call whose turn it is to fail
                said = receiver.recv(4096)
        shim.end()
        os.kill(me, signal.SIGTERM)

    threading.Thread(target=end, daemon=True).start()
    shim.only(me)
    if number:
        call, of, does = calls
        shim.add(call, of, does, first=number, count=1)
    return cli.main(arguments)


def main(what: str, calls: Calls, first: int, step: int, rules: Path) -> None:
    shim = Shim(rules)
    log = rules.with_name("failing.log")
    cgroup = cgroup_root() / f"crab-failing-{os.getpid()}"
    cgroup.mkdir()
    try:
        arguments, remove = STARTED[what]
        if arguments[0] == "agent":
            arguments = [*arguments, "--cgroup", str(cgroup)]
        print(json.dumps(sweep(shim, arguments, remove, calls, first, step, log, Ground(cgroup))))
    finally:
        cgroup.rmdir()


def sweep(
    shim: Shim,
    arguments: Sequence[str],
    remove: Sequence[str],
    calls: Calls,
    first: int,
    step: int,
    log: Path,
    ground: Ground,
) -> dict[str, object]:
    assert child(shim, arguments, calls, 0, log) == SERVED, log.read_text()
    assert not (there := ground.left()), there
    for name in log.with_suffix(".modules").read_text().split():  # from here on nobody imports any
        with contextlib.suppress(ImportError):
            import_module(name)
    faults: dict[str, str] = {}
    served = refused = 0
    for number in count(first, step):
        status = child(shim, arguments, calls, number, log)
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
        if there := ground.left():
            faults[where] = f"{faults.get(where, '')} left: {there}; {said[-1500:]}"
            with contextlib.redirect_stdout(io.StringIO()):
                cli.main(remove)
            ground = Ground(ground.cgroup)  # what could not be removed is told once
        served += status == SERVED
        refused += os.WIFEXITED(status) and os.WEXITSTATUS(status) == 2
        if trace := os.environ.get("FAILING_TRACE"):
            with open(trace, "a") as file:
                print(status, where, faults.get(where, "")[:300].replace("\n", "|"), file=file)
        if not rule:
            break
    return {"points": number, "served": served, "refused": refused, "faults": faults}


if __name__ == "__main__":
    main(
        sys.argv[1], (sys.argv[2], sys.argv[3], int(sys.argv[4])), int(sys.argv[5]), int(sys.argv[6]), Path(sys.argv[7])
    )
