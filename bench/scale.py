"""What 10,000 backends in 1,000 services take: from the file to the first packet, memory, a reload, a scrape."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path

from bench.context import Context, Unavailable
from bench.daemon import cpu_time, resident
from bench.figures import Suite, Table
from crablb.api import types
from crablb.api.client import Client, NotRunning, discover
from crablb.kernel.netns import inside
from crablb.lab import Lab
from crablb.lab.demo import crablb

BACKENDS = 10  # of a service
IPIP = 4
#: Seconds after which what has not come will not.
LONGEST = 60.0


def text(services: int, weight: int = 1) -> str:
    """A configuration.  ``weight``: of the first backend."""
    lines = ['interface = "eth0"', 'persist = "off"', 'metrics_listen = "127.0.0.1:9190"']
    for number in range(services):
        first = number * BACKENDS
        backends = [f"10.{64 + n // 62500}.{n // 250 % 250}.{n % 250 + 1}" for n in range(first, first + BACKENDS)]
        if not number:
            backends[0] += f"*{weight}"
        named = ", ".join(f'"{backend}"' for backend in backends)
        vip = f"tcp://10.100.{number // 250}.{number % 250 + 1}:80"
        lines += ["[[service]]", f'address = "{vip}"', f"backends = [{named}]", "check = []"]
    return "\n".join(lines) + "\n"


class Probe:
    """SYNs from the client to the first VIP, and whether one has come to the server, by a tunnel as its backends are
    behind it."""

    def __init__(self, lab: Lab, stack: ExitStack) -> None:
        with inside(Path("/run/netns") / lab.servers[0].netns):
            self._taker = stack.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0800)))
        self._client = Path("/run/netns") / lab.client.netns

    def send(self) -> None:
        with inside(self._client), socket.socket() as sock:
            sock.setblocking(False)
            sock.connect_ex(("10.100.0.1", 80))
            self._taker.settimeout(0.002)
            self.arrived = self._arrived()  # before the socket is closed, which would take its SYN back

    def _arrived(self) -> bool:
        with suppress(TimeoutError):
            while True:
                packet = self._taker.recv(2048)
                if packet[9] == IPIP:
                    return True
        return False


def ask_for(lab: Lab, path: str) -> float:
    """Seconds of a scrape, by a program in the load balancer's network namespace."""
    began = time.monotonic()
    done = lab.lb.run(
        "curl", "-sSf", "-o", "/dev/null", "-m", str(LONGEST), f"http://127.0.0.1:9190{path}", check=False
    )
    if done.returncode:
        raise Unavailable(f"the scrape failed: {done.stderr.strip()}")
    return time.monotonic() - began


def client_of(lab: Lab, child: subprocess.Popen[str]) -> Client:
    began = time.monotonic()
    while time.monotonic() - began < LONGEST and child.poll() is None:
        with inside(Path("/run/netns") / lab.lb.netns), suppress(NotRunning):
            return Client(discover("eth0"), timeout=LONGEST)
        time.sleep(0.05)
    raise Unavailable("the API did not come")


def asked(client: Client, until: threading.Event) -> float:
    """The longest that an answer to /v1/status took, asked one after the other until something is done."""
    longest, last = 0.0, False
    while not last:
        last = until.is_set()
        began = time.monotonic()
        client.get("/v1/status", types.Status)
        longest = max(longest, time.monotonic() - began)
    return longest


def one(lab: Lab, folder: Path, services: int) -> dict[str, float]:
    """All figures of one daemon."""
    path = folder / "lb.toml"
    path.write_text(text(services))
    with ExitStack() as stack:
        probe = Probe(lab, stack)
        log = stack.enter_context(open(folder / "serve.log", "a"))
        began = time.monotonic()
        child = lab.lb.popen(*crablb(), "serve", "--config", str(path), stderr=log)
        try:
            probe.send()
            while not probe.arrived:
                if child.poll() is not None or time.monotonic() - began > LONGEST:
                    raise Unavailable(f"crablb serve did not start: {(folder / 'serve.log').read_text()[-500:]}")
                probe.send()
            found = {"first wall": time.monotonic() - began, "first cpu": cpu_time(child.pid)}
            with client_of(lab, child) as client, client_of(lab, child) as other:
                client.get("/v1/status", types.Status)
                found["resident"] = resident(child.pid)
                path.write_text(text(services, 5))
                reloaded, longest = threading.Event(), [0.0]
                asking = threading.Thread(target=lambda: longest.append(asked(other, reloaded)))
                asking.start()
                try:
                    before, start = cpu_time(child.pid), time.monotonic()
                    client.post("/v1/reload", types.Plan)
                    found["reload wall"], found["reload cpu"] = (
                        time.monotonic() - start, cpu_time(child.pid) - before,
                    )  # fmt: skip
                finally:
                    reloaded.set()
                    asking.join()
                found["status"] = max(longest)
                before = cpu_time(child.pid)
                found["scrape wall"] = ask_for(lab, "/metrics")
                found["scrape cpu"] = cpu_time(child.pid) - before
                found["resident after"] = resident(child.pid)
            return found
        finally:
            child.send_signal(signal.SIGTERM)
            child.wait()


def run(context: Context) -> Suite:
    suite = Suite("scale", "10,000 backends in 1,000 services")
    if os.geteuid():
        raise Unavailable("network namespaces and AF_XDP need root")
    context.tool("curl")
    many = context.pick(1000, 300, 20)
    with Lab.create(f"bench-scale-{os.getpid()}", "bridge", 1) as lab, tempfile.TemporaryDirectory() as name:
        lab.lb.ip("link set lo up", f"route add 10.64.0.0/10 via {lab.servers[0].ip4}")
        lab.client.ip(f"route add 10.100.0.0/16 via {lab.lb.ip4}")
        sizes = {f"{n * BACKENDS:,} backends": lambda n=n: one(lab, Path(name), n) for n in (1, many)}
        found = context.in_turn("scale", sizes, context.pick(5, 2, 1))
    base = f"{BACKENDS} backends"
    suite.notes.append(
        f"Beside it {base} in one service. One gateway leads to all backends; nobody checks them. CPU time is that of"
        " all threads of the daemon."
    )
    for key, title, unit in (
        ("first wall", "From exec to the first SYN forwarded", "s"),
        ("first cpu", "The same, CPU time", "s"),
        ("resident", "Resident memory when it serves", "MiB"),
        ("resident after", "The same after a reload and a scrape", "MiB"),
        ("reload wall", "A reload that changes one weight", "s"),
        ("reload cpu", "The same, CPU time, with /v1/status asked meanwhile", "s"),
        ("status", "The longest answer to /v1/status meanwhile", "s"),
        ("scrape wall", "A scrape of the metrics", "s"),
        ("scrape cpu", "The same, CPU time", "s"),
    ):
        rows = list(found[key].values())
        suite.tables.append(Table(f"scale-{key.replace(' ', '-')}", title, unit, rows, baseline=base))
    return suite
