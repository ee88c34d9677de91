"""Fixtures: labs with unique names, removed whatever happens."""

from __future__ import annotations

import ctypes
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from crablb.lab import VIP4, VIP6, Lab, Node
from crablb.lab.demo import agent_status, start_agent, start_serve

ROOT = Path(__file__).parent.parent
numbers = itertools.count()


def pytest_configure() -> None:
    # How long an example takes decides nothing; a fixture may serve all of a test's examples.
    unneeded = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    settings.register_profile("crablb", deadline=None, suppress_health_check=unneeded)
    settings.load_profile("crablb")
    # A terminated run removes its namespaces like an interrupted one.
    signal.signal(signal.SIGTERM, lambda *_: pytest.exit("terminated"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.geteuid() != 0:
        for item in items:
            if {"make_lab", "namespace"} & set(getattr(item, "fixturenames", ())):
                item.add_marker(pytest.mark.skip(reason="network namespaces and BPF need root"))


@pytest.fixture
def make_lab() -> Iterator[Callable[..., Lab]]:
    """``make_lab(topology="bridge", servers=1, offload=True)``: a lab of its own."""
    labs = []

    def make(topology: str = "bridge", servers: int = 1, *, offload: bool = True) -> Lab:
        lab = Lab.create(f"t{os.getpid()}-{next(numbers)}", topology, servers, offload=offload)  # type: ignore[arg-type]
        labs.append(lab)
        return lab

    yield make
    for lab in labs:
        lab.destroy()


def answer(child: subprocess.Popen[str]) -> str:
    """The next line the program says; if it died instead, why."""
    assert child.stdout and child.stderr
    line = child.stdout.readline().strip()
    assert line, child.stderr.read()
    return line


def until(condition, seconds: float = 10) -> None:
    """Ask again and again until it holds; fail after ``seconds``."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"


@pytest.fixture
def other_xdp_program(tmp_path: Path) -> Path:
    """Somebody else's XDP program, compiled: ``ip link set eth0 xdp obj PATH sec xdp``."""
    source, target = tmp_path / "pass.bpf.c", tmp_path / "pass.bpf.o"
    source.write_text('__attribute__((section("xdp"), used)) int pass(void *c) { return 2; }\n')
    subprocess.run(["clang", "-target", "bpf", "-O2", "-c", source, "-o", target], check=True)
    return target


CLONE_NEWNET = 0x40000000


@contextmanager
def inside(netns: str | Path) -> Iterator[None]:
    """This thread is in a network namespace (a name, or a path) while in the context."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/thread-self/ns/net") as home, open(Path("/run/netns") / netns) as there:
        if libc.setns(there.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
        try:
            yield
        finally:
            if libc.setns(home.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")


@dataclass
class Pair:
    """A namespace that the test is in, with the veth pair veth0 and veth1; nothing but the test sends on it."""

    netns: str

    def ip(self, *line: str) -> str:
        return subprocess.run(["ip", "-n", self.netns, *line], check=True, capture_output=True, text=True).stdout

    def wire(self, name: str = "veth1") -> socket.socket:
        """A packet socket on veth1: what it sends comes in at veth0, what veth0 sends comes in here."""
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        sock.setsockopt(socket.SOL_SOCKET, 33, 4 << 20)  # SO_RCVBUFFORCE: room for all that a test sends
        sock.bind((name, 0))
        sock.settimeout(10)
        return sock


@pytest.fixture
def namespace() -> Iterator[Pair]:
    name = f"crab-t{os.getpid()}-{next(numbers)}"
    pair = Pair(name)
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        with inside(name):
            Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1")
            pair.ip("link", "set", "lo", "up")
            pair.ip("link", "add", "veth0", "type", "veth", "peer", "name", "veth1")
            pair.ip("link", "set", "veth0", "up")
            pair.ip("link", "set", "veth1", "up")
            yield pair
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


class World:
    """A lab with echo servers, and agents and load balancer as asked for."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab, self.folder = lab, folder

    def servers(self, agents: bool = True, *, port: int = 80, dsr: bool = False) -> None:
        """Echo servers.  With ``dsr`` they have the VIPs from their agents, not from the lab."""
        for server in self.lab.servers:
            self.python(server, "serve", server.name, str(port), ready=True)
            if dsr:
                server.ip(f"addr del {VIP4}/32 dev lo", f"addr del {VIP6}/128 dev lo")
                server.set({"net.ipv4.conf.all.arp_ignore": 0, "net.ipv4.conf.all.arp_announce": 0})
            if agents or dsr:
                start_agent(server, "server", *(["--dsr"] if dsr else []))

    def client(self, *more: str) -> subprocess.Popen[str]:
        prefixes = [part for p in self.lab.prefixes() for part in ("--backends", p)]
        return start_agent(self.lab.client, "client", *prefixes, *more)

    def serve(self, *more: str, **where: object) -> subprocess.Popen[str]:
        return start_serve(self.lab, self.folder, *more, **where)  # type: ignore[arg-type]

    def python(self, node: Node, *args: str, ready: bool = False, **more: object) -> subprocess.Popen[str]:
        """A program of tests/helpers/peers.py; with ``ready``, on return it has said so."""
        child = self.program(node, sys.executable, "-m", "tests.helpers.peers", *args, **more)
        if ready:
            assert answer(child) == "ready"
        return child

    def program(self, node: Node, *args: str, **more: object) -> subprocess.Popen[str]:
        """Any program, spoken to by pipes."""
        return node.popen(
            *args, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more
        )

    def echo(self, host: object, *more: str, port: int = 80, node: Node | None = None) -> dict[str, object]:
        """Connect from the client (or another node), send, compare the echo; what it saw."""
        import json

        child = self.python(node or self.lab.client, "echo", str(host), str(port), *more)
        out, err = child.communicate(timeout=60)
        assert child.returncode == 0, err
        parsed: dict[str, object] = json.loads(out)
        return parsed

    def client_counters(self) -> dict[str, int]:
        counters: dict[str, int] = agent_status(self.lab.client)["client"]["counters"]
        return {name: n for name, n in counters.items() if n}


@pytest.fixture
def make_world(make_lab: Callable[..., Lab], tmp_path: Path) -> Callable[..., World]:
    def make(topology: str = "bridge", servers: int = 1, *, offload: bool = True) -> World:
        return World(make_lab(topology, servers, offload=offload), tmp_path)

    return make
