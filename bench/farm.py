"""Several servers behind one crablb, which serves them by several policies at once: a virtual address for each."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bench.context import Context, Unavailable
from bench.lab import CLIENT_SYSCTLS, ECHO, HTTP, PORTS, SYSCTLS, answered, start_agent, start_servers
from crablb.lab import Lab, Node
from crablb.lab.demo import crablb, start_serve

SERVICE = """
[[service]]
address = "tcp://{vip}:{port}"
mode = "{mode}"
policy = "{policy}"
backends = [{backends}]
check = []
"""
REPORT_WAIT = 20  # seconds
REPORTED = "reports its load"  # of the log


@dataclass(frozen=True)
class Way:
    """How a virtual address is served.  Not redirected: by DSR, and then always by the hash; what is begun by MPTCP is
    led away by the server."""

    policy: str = "maglev"
    redirect: bool = True
    mptcp: bool = False


class Farm:
    """The lab.  A context manager.

    Each server has nginx on port 80 and an echo server on port 7, which answers at once, or one request at a time in
    its ``service_us``.  ``clients`` are nodes that offer redirection where a way has it.  ``report``: servers tell the
    load balancer of their connections.
    """

    def __init__(
        self,
        context: Context,
        folder: Path,
        name: str,
        ways: Mapping[str, Way],
        service_us: Sequence[int],
        clients: int = 1,
        *,
        report: bool = False,
    ) -> None:
        self.context, self.folder, self.ways, self.report = context, folder, dict(ways), report
        self.service_us = list(service_us)
        self.vips = {way: IPv4Address(f"10.0.0.{200 + i}") for i, way in enumerate(ways)}
        self._name, self._clients = f"bench-{name}-{os.getpid()}", clients
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            count = len(self.service_us)
            self.lab = stack.enter_context(Lab.create(self._name, "bridge", count + self._clients - 1))
            self.servers = self.lab.servers[:count]
            self.clients = [self.lab.client, *self.lab.servers[count:]]
            self._build()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, where: TracebackType | None
    ) -> None:
        self._stack.close()

    def _build(self) -> None:
        redirected = [vip for name, vip in self.vips.items() if self.ways[name].redirect]
        led = [vip for name, vip in self.vips.items() if self.ways[name].mptcp]
        master = self.folder / "master"
        master.write_text(os.urandom(32).hex())
        for node in (*self.servers, *self.clients):
            node.set(SYSCTLS)
        for server, service_us in zip(self.servers, self.service_us, strict=True):
            start_servers(self.context, server, self.folder / server.name, service_us, mptcp=bool(led))
            # Also for those that are redirected: a SYN that has to be sent again is served by the fallback.
            server.ip(*(f"addr add {vip}/32 dev lo" for vip in self.vips.values()))
            lead = ["--mptcp", "--mptcp-address", server.ip4] if led else []
            start_agent(server, "server", redirected + led, *lead, *self._reports(server, master))
        for client in self.clients:
            client.set(CLIENT_SYSCTLS)
            client.ip(*(f"route replace {vip}/32 via {self.lab.lb.ip4}" for vip in self.vips.values()))
            let = ["--mptcp"] if led else []
            start_agent(client, "client", redirected, "--backends", "10.0.0.0/24", *let, "--detach")
        self._serve(master)
        for name in self.ways:
            # Neighbours are found, and what may be lost meanwhile is not measured.
            for client in self.clients:
                for port, more in ((ECHO, ()), (HTTP, ("--get", "/8"))):
                    count = str(4 * len(self.servers))
                    options = ["--connections", count, "--samples", count, "--seconds", "10", "--warmup", "0", *more]
                    self.crr(name, *options, port=port, by=client)

    def _reports(self, server: Node, master: Path) -> list[str]:
        if not self.report:
            return ["--detach"]
        key = self.folder / f"{server.name}.key"
        key.write_text(server.run(*crablb("key", "backend", server.ip4, "--master", str(master))).stdout)
        return ["--report", self.lab.lb.ip4, "--report-key", str(key)]

    def _serve(self, master: Path) -> None:
        backends = ", ".join(f'"{server.ip4}"' for server in self.servers)
        text = ""
        if self.report:
            text = f'report_listen = "{self.lab.lb.ip4}:7171"\nreport_key_file = "{master}"\n'
        for name, way in self.ways.items():
            mode = "negotiated" if way.redirect else "never"
            for port in PORTS:
                text += SERVICE.format(vip=self.vips[name], port=port, mode=mode, policy=way.policy, backends=backends)
        config = self.folder / "lb.toml"
        config.write_text(text)
        start_serve(self.lab, self.folder, config=config)
        end = time.monotonic() + REPORT_WAIT
        while self.report and (self.folder / "serve.log").read_text().count(REPORTED) < len(self.servers):
            if time.monotonic() > end:
                raise Unavailable(f"not all servers have reported their load within {REPORT_WAIT} s")
            time.sleep(0.02)

    def shape(self, mbit: int) -> None:
        """Give every node a link of so many Mbit/s, both ways.

        What an AF_XDP socket or an XDP program sends passes no queueing discipline, so the load balancer's link is one
        only on the way in.
        """
        shape = f"root tbf rate {mbit}mbit burst 64kb limit 4mb"
        for name, node in self.lab.nodes.items():
            if node is self.lab.middle:
                continue
            for place, interface in ((node, "eth0"), (self.lab.middle, name)):
                place.run("tc", "qdisc", "add", "dev", interface, *shape.split())

    # ---- load ----

    def _command(self, name: str, port: int, options: Sequence[str]) -> list[str]:
        """``crr load``, from ports of the way's own.

        A server remembers a connection that it closed by addresses and ports for a minute.  Redirected from another
        virtual address, the same client port would be the same connection to it, but with other time stamps, and its
        SYN refused.
        """
        share = (65536 - 1024) // len(self.ways)
        first = 1024 + share * list(self.ways).index(name)
        ports = f"net.ipv4.ip_local_port_range={first} {first + share - 1}"
        mptcp = ["--mptcp"] if self.ways[name].mptcp else []
        crr = [str(self.context.make("crr")), "load", str(self.vips[name]), str(port), *mptcp, *options]
        return ["sh", "-c", 'sysctl -qw "$0" && exec "$@"', ports, *crr]

    def crr(self, name: str, *options: str, port: int = ECHO, by: Node | None = None) -> dict[str, Any]:
        """What ``crr load`` says of a way.  Raises :class:`Unavailable` if more than one request in a hundred fails."""
        done = (by or self.clients[0]).run(*self._command(name, port, options), check=False)
        return answered(self.context, name, done)

    def together(self, name: str, *options: str) -> list[dict[str, Any]]:
        """The same, by all clients at once."""
        command = self._command(name, ECHO, options)
        children = [client.popen(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for client in self.clients]
        found = []
        for child in children:
            out, err = child.communicate()
            done = subprocess.CompletedProcess(command, child.returncode, out, err)
            found.append(answered(self.context, name, done))
        return found
