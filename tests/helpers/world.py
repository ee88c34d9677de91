"""A lab with what end-to-end tests have in it."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from crablb import cli
from crablb.doctor import machine
from crablb.lab import VIP4, VIP6, Lab, Node
from crablb.lab.demo import start_agent, start_serve
from tests.helpers.namespaces import inside
from tests.helpers.processes import ROOT, answer

RELEASE = machine.version(os.uname().release)
#: A server's agent prepares listeners that were there before it (docs/endpoints.md).
PREPARES_LISTENERS = RELEASE >= (6, 12)


def command(node: Node, *args: str, expected: int | None = 0) -> str:
    """What a command of crablb prints in a node.  In this process: one of its own takes longer to start than to ask."""
    out = io.StringIO()
    # An agent blocks those that end it, and does not let go of them, as its process ends then.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        with inside(node.netns), redirect_stdout(out):
            exited = cli.main(args)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert expected in (None, exited), out.getvalue()
    return out.getvalue()


def status(lab: Lab, node: Node | None = None) -> dict[str, Any]:
    """``crablb status --json`` of the load balancer."""
    parsed: dict[str, Any] = json.loads(command(node or lab.lb, "status", "--iface", "eth0", "--json", expected=None))
    return parsed


def agent_status(node: Node, expected: int | None = 0) -> dict[str, Any]:
    """``crablb agent status --json`` in the node; ``expected``: 1 where something is wrong, None: either."""
    parsed: dict[str, Any] = json.loads(command(node, "agent", "status", "--json", expected=expected))
    return parsed


class World:
    """A lab with echo servers, and agents and load balancer as asked for."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab, self.folder = lab, folder
        self._started: list[subprocess.Popen[str]] = []

    def servers(
        self, agents: bool = True, *more: str, port: int = 80, dsr: bool = False, only: Sequence[Node] = ()
    ) -> None:
        """Echo servers.  With ``dsr`` they have the VIPs from their agents, not from the lab; ``more``: what these are
        told besides; ``only``: on these nodes (all of the lab's servers)."""

        def listen(server: Node) -> None:
            self.python(server, "serve", server.name, str(port), ready=True)

        def start(server: Node) -> None:
            if PREPARES_LISTENERS:
                listen(server)
            if dsr:
                server.ip(f"addr del {VIP4}/32 dev lo", f"addr del {VIP6}/128 dev lo")
                server.set({"net.ipv4.conf.all.arp_ignore": 0, "net.ipv4.conf.all.arp_announce": 0})
            if agents or dsr:
                start_agent(server, "server", *(["--dsr"] if dsr else []), *more)
            if not PREPARES_LISTENERS:
                listen(server)

        with ThreadPoolExecutor() as pool:
            list(pool.map(start, only or self.lab.servers))

    def agent(self, node: Node, role: str, *more: str) -> subprocess.Popen[str]:
        """An agent; on return it works."""
        return self._kept(start_agent(node, role, *more))

    def client(self, *more: str) -> subprocess.Popen[str]:
        """A client agent.  It verifies no backends unless told, lest a process that gets no CPU change what happens."""
        prefixes = [part for p in self.lab.prefixes() for part in ("--backends", p)]
        return self._kept(start_agent(self.lab.client, "client", *prefixes, "--no-verify", *more))

    def serve(self, *more: str, health: bool = False, **where: object) -> subprocess.Popen[str]:
        """The load balancer; without ``health`` it checks no backend, so that the packets are those of the test
        (a file, and another program, say so themselves)."""
        if not (health or {"config", "program"} & where.keys() or "--check" in more):
            more = (*more, "--check", "none")
        return self._kept(start_serve(self.lab, self.folder, *more, **where))  # type: ignore[arg-type]

    def python(
        self, node: Node, *args: str, ready: bool = False, module: str = "peers", **more: object
    ) -> subprocess.Popen[str]:
        """A program of a module in tests/helpers; with ``ready``, on return it has said so."""
        child = self.program(node, sys.executable, "-m", f"tests.helpers.{module}", *args, **more)
        if ready:
            assert answer(child) == "ready"
        return child

    def program(self, node: Node, *args: str, **more: object) -> subprocess.Popen[str]:
        """Any program, spoken to by pipes."""
        child = node.popen(
            *args, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more
        )
        return self._kept(child)

    def _kept(self, child: subprocess.Popen[str]) -> subprocess.Popen[str]:
        self._started.append(child)
        return child

    def end(self) -> None:
        """End what was started, the last first."""
        for child in reversed(self._started):
            child.terminate()
            child.wait()
        self._started.clear()

    def always_redirect(self, where: str = "behind", form: str = "crab") -> subprocess.Popen[str]:
        """In place of ours, a load balancer that always redirects, to all servers in turn (standins.redirecting)."""
        return self._standin("redirecting", where, form)

    def forget(self) -> subprocess.Popen[str]:
        """In place of ours, a load balancer that remembers no connection (standins.forgetful)."""
        return self._standin("forgetful")

    def _standin(self, *program: str) -> subprocess.Popen[str]:
        servers = self.lab.servers
        four = ",".join(f"{server.ip4}/{server.mac()}" for server in servers)
        six = ",".join(f"{server.ip6}/{server.mac()}" for server in servers)
        return self.python(self.lab.lb, *program, f"{VIP4}={four}", f"{VIP6}={six}", module="standins", ready=True)

    def echo(self, host: object, *more: str, port: int = 80, node: Node | None = None) -> dict[str, object]:
        """Connect from the client (or another node), send, compare the echo; what it saw."""
        seen: dict[str, object] = self._told(node or self.lab.client, "echo", str(host), str(port), *more)
        return seen

    def echoes(self, host: object, count: int, size: int = 10) -> list[dict[str, Any]]:
        """``count`` small echoes from the client, one after the other; what each saw."""
        seen: list[dict[str, Any]] = self._told(self.lab.client, "echoes", str(host), "80", str(count), str(size))
        assert all(one["intact"] for one in seen)
        return seen

    def _told(self, node: Node, *args: str) -> Any:
        child = self.python(node, *args)
        out, err = child.communicate(timeout=300)
        assert child.returncode == 0, err
        return json.loads(out)

    def client_counters(self) -> dict[str, int]:
        counters: dict[str, int] = agent_status(self.lab.client, None)["client"]["counters"]
        return {name: n for name, n in counters.items() if n}
