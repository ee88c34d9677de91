"""The kernel's scripts for packetdrill, in network namespaces with agents or without.

    python -m tests.foreign.drill FOLDER WAY CGROUP [ONLY]

says a JSON line for each script and family; ONLY is a file that names some of them, a line each.  To be run in an
:class:`Island`: what it leaves there goes with that.
"""

from __future__ import annotations

import ctypes
import io
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import redirect_stdout
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from crablb import cli
from tests.foreign.packetdrill import FAMILIES, PORT, Differs, Ends, Run, Segment, Tap, Unsupported, Wire, each_option

#: ``none``: no agents.  ``beside``: agents of other VIPs.  ``mptcp``: the same, with ``--mptcp``.  ``fallback``: the
#: scripts' peers are VIPs, and so is their own address, but nothing is redirected.  ``redirected``: what can be is.
WAYS = ("none", "redirected", "fallback", "mptcp", "beside")
#: So many of a family at a time, as most of a script is waiting; again if it failed, as it may have been the machine.
SLOTS, TRIES = 2, 3
LIMIT = 120
SETTINGS = Path("/proc/sys/net/ipv4")

#: By family: a VIP that no script has to do with, a backend behind the scripts' peer, and the VIP that a SYN names.
OTHERS = {4: ("198.51.100.80", "192.0.2.77", "203.0.113.80"), 6: ("fd3d:5::80", "fd3d:fa7b:d17d::77", "fd3d:6::80")}
#: What the kernel makes of room that an agent has asked for, before it saw that this SYN is not one to offer in.
PADDING = b"\1\1\1\1"


class Balancer(Wire):
    """The wire as a load balancer and its backends make it."""

    def __init__(self, ends: Ends, backend: str, named: str, redirecting: bool) -> None:
        self.ends, self.backend, self.redirecting = ends, backend, redirecting
        packed = ip_address(named).packed
        self.named, self.peer = _redirect(packed), _redirect(ip_address(ends.remote).packed)
        self.offered: set[int] = set()  # ports of ours whose last SYN did
        self.moved: set[int] = set()  # whose connections have been redirected
        self.counts = {"offers": 0, "redirects": 0, "echoes": 0, "padded": 0}

    def out(self, segment: Segment) -> Segment:
        if segment.syn:
            options = _without(segment.options)
            found = len(options) < len(segment.options)
            segment.options = options
            if not segment.flags & 16:
                if options.endswith(PADDING):
                    segment.options = options.removesuffix(PADDING)
                    self.counts["padded"] += 1
                self.moved.discard(segment.sport)
                (self.offered.add if found else self.offered.discard)(segment.sport)
                self.counts["offers"] += found
            else:
                self.counts["echoes"] += found
        elif segment.dest == self.backend and segment.sport in self.moved:
            segment.dest = self.ends.remote
        return segment

    def back(self, segment: Segment) -> Segment:
        if not self.redirecting:
            return segment
        answers = bool(segment.flags & 16)
        if segment.syn and answers and segment.dport in self.offered - self.moved:
            if len(segment.options) + len(self.peer) <= 40:
                segment.options += self.peer
                self.moved.add(segment.dport)
                self.counts["redirects"] += 1
        elif segment.syn and not answers and not segment.payload and len(segment.options) + len(self.named) <= 40:
            # A server's kernel may have more to say in its SYN-ACK than the client in its SYN.
            if {kind for kind, _ in each_option(segment.options)} <= {0, 1, 2, 3, 4, 8}:
                segment.options += self.named
                self.counts["redirects"] += 1
        elif segment.syn and segment.dport in self.moved and len(segment.options) + len(self.peer) <= 40:
            segment.options += self.peer
        if segment.dport in self.moved:
            segment.source = self.backend
        return segment


def _redirect(vip: bytes) -> bytes:
    return bytes((42, 2 + len(vip))) + vip + b"\1\1"


def _without(options: bytes) -> bytes:
    """Without an offer or a redirect, and what pads it."""
    at = 0
    for kind, option in each_option(options):
        if kind == 42:
            return options[:at] + options[at + len(option) + 2 :]
        at += len(option)
    return options


def agents(way: str, ends: Ends) -> tuple[list[str], list[str]]:
    """Options of the server's and of the client's."""
    other, backend, named = OTHERS[6 if ":" in ends.local else 4]
    server, client = {"fallback": (ends.local, ends.remote), "redirected": (named, ends.remote)}.get(
        way, (other, other)
    )

    def vip(address: str) -> list[str]:
        return ["--vip", f"tcp://{f'[{address}]' if ':' in address else address}:{PORT}"]

    more = ["--mptcp"] if way == "mptcp" else []
    told = ["--backends", backend, "--interface", "tun0", "--retransmission", "0", "--no-verify"]
    return [*vip(server), *more], [*vip(client), *told, *more]


def command(*args: str) -> None:
    out = io.StringIO()
    with redirect_stdout(out):
        status = cli.main(args)
    if status:
        raise RuntimeError(f"{' '.join(args)}: {out.getvalue()}")


class Slot:
    """A network namespace that scripts of one family run in, one after the other, and this process for it."""

    def __init__(self, family: str, way: str, cgroup: str) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        Path(cgroup, "cgroup.procs").write_text("0")
        if libc.unshare(0x40000000 | 0x20000):  # CLONE_NEWNET, CLONE_NEWNS
            raise OSError(ctypes.get_errno(), "unshare")
        run("mount", "--make-rprivate", "/")
        os.environ["CRABLB_CGROUP"] = cgroup
        self.family, self.way, self.ends = family, way, FAMILIES[family]
        self._other, self._backend, self._named = OTHERS[6 if ":" in self.ends.local else 4]
        self._tap = Tap(self.ends, (self._other, self._backend))
        self._settings = {path: path.read_text() for path in SETTINGS.glob("tcp_*") if _settable(path)}
        self._port = 40000
        if way != "none":
            server, client = agents(way, self.ends)
            command("agent", "server", "--detach", *server)
            command("agent", "client", "--detach", *client)

    def each(self, scripts: list[Path]) -> None:
        for script in scripts:
            for _ in range(TRIES):
                found = self._forked(script)
                if found["verdict"] != "failed":
                    break
            said = {"name": named(script, self.family), **found}
            os.write(1, (json.dumps(said) + "\n").encode())

    def _forked(self, script: Path) -> dict[str, Any]:
        """What the script leaves open ends with its process, and what it set is set back."""
        self._port += 100
        source, sink = os.pipe()
        if not (child := os.fork()):
            signal.alarm(LIMIT)
            try:
                found = self._run(script)
            except BaseException as fault:
                found = {"verdict": "broken", "why": repr(fault)}
            found["why"] = found["why"][:1000]
            os.write(sink, json.dumps(found).encode())
            os._exit(0)
        os.close(sink)
        with open(source, "rb") as pipe:
            said = pipe.read()
        _, status = os.waitpid(child, 0)
        for path, text in self._settings.items():
            if path.read_text() != text:
                path.write_text(text)
        self._tap.reset()
        return dict(json.loads(said)) if said else {"verdict": "broken", "why": f"wait status {status}"}

    def _run(self, script: Path) -> dict[str, Any]:
        # Scripts have files in /tmp that go by one name.  They may lie there themselves.
        folder = os.open(script.parent, os.O_PATH)
        ctypes.CDLL(None).unshare(0x20000)
        run("mount", "-t", "tmpfs", "none", "/tmp")
        os.environ.update(PACKETDRILL_PID=str(os.getpid()), NSTAT_HISTORY="/tmp/nstat")
        wire = Balancer(self.ends, self._backend, self._named, self.way == "redirected")
        verdict, why = "passed", ""
        try:
            Run(Path(f"/proc/{os.getpid()}/fd/{folder}", script.name), self.ends, self._tap, wire, self._port).run()
        except Unsupported as fault:
            verdict, why = "unsupported", str(fault)
        except Differs as fault:
            verdict, why = "failed", str(fault)
        return {"verdict": verdict, "why": why, **wire.counts}


def named(script: Path, family: str) -> str:
    return f"{script.stem}, {family}"


def run(*args: str) -> None:
    subprocess.run(args, check=True)


def _settable(path: Path) -> bool:
    return bool(path.stat().st_mode & 0o200) and path.name not in ("tcp_fastopen_key", "tcp_congestion_control")


def main() -> None:
    folder, way, cgroup = Path(sys.argv[1]), *sys.argv[2:4]
    scripts, names = sorted(folder.glob("*.pkt")), Path(sys.argv[4]).read_text().splitlines() if sys.argv[4:] else None
    children = []
    for family in FAMILIES:
        only = re.compile(rf"(?m)^--ip_version=(?!{family}$)")
        mine = [
            script
            for script in scripts
            if not only.search(script.read_text()) and (names is None or named(script, family) in names)
        ]
        for slot in range(SLOTS):
            if not (child := os.fork()):
                Slot(family, way, cgroup).each(mine[slot::SLOTS])
                os._exit(0)
            children.append(child)
    for child in children:
        _, status = os.waitpid(child, 0)
        if status:
            sys.exit(f"a slot ended with {status}")


if __name__ == "__main__":
    main()
