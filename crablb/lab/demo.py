"""The main job, shown: real connections through the load balancer, which sees one packet of each.

Each claim is checked, and the evidence kept: see :class:`Claim`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from crablb.errors import KernelError
from crablb.lab.lab import VIP4, VIP6, Lab, Node, Topology

CONNECTIONS = 150  # for each family
BIG = 256 << 20  # bytes
COMPARED = 16 << 20  # bytes that a prepared and an unprepared client download each
KILL_AFTER = 16 << 20  # bytes of the second download
READY_TIMEOUT = 20  # seconds

NGINX = """
daemon on; user root; worker_processes 1; pid {dir}/pid; error_log {dir}/error.log;
events {{ worker_connections 1024; }}
http {{
  access_log off; client_max_body_size 0; client_body_temp_path {dir}/body;
  proxy_temp_path {dir}/p; fastcgi_temp_path {dir}/f; uwsgi_temp_path {dir}/u; scgi_temp_path {dir}/s;
  server {{
    listen 80; listen [::]:80 ipv6only=on;
    location = /whoami {{ return 200 "{name}\\n"; }}
    location = /big {{ alias {big}; }}
    location /upload/ {{ alias {dir}/; dav_methods PUT; }}
  }}
}}
"""


@dataclass
class Claim:
    """What should hold, whether it did, and what shows it."""

    what: str
    held: bool
    evidence: str


@dataclass
class Report:
    """All that the demo found."""

    topology: str
    claims: list[Claim] = field(default_factory=list)
    connections_per_backend: dict[str, int] = field(default_factory=dict)
    connection_attempts: int = 0
    load_balancer_packets: dict[str, int] = field(default_factory=dict)
    wire_packets: dict[str, int] = field(default_factory=dict)
    client_packets: dict[str, int] = field(default_factory=dict)
    peers_seen: list[str] = field(default_factory=list)
    #: Packets that the load balancer saw of one download, by kind of client.
    costs: dict[str, int] = field(default_factory=dict)

    @property
    def held(self) -> bool:
        return bool(self.claims) and all(claim.held for claim in self.claims)

    def claim(self, what: str, held: bool, evidence: str) -> None:
        self.claims.append(Claim(what, held, evidence))

    def json(self) -> str:
        return json.dumps({**asdict(self), "held": self.held}, indent=2)


def crablb(*args: str) -> list[str]:
    return [sys.executable, "-m", "crablb", *args]


def services(lab: Lab) -> list[str]:
    """``--service`` strings for everything that the lab has."""
    four = ",".join(s.ip4 for s in lab.servers)
    six = ",".join(f"[{s.ip6}]" for s in lab.servers)
    return [f"tcp://{VIP4}:80={four}", f"tcp://[{VIP6}]:80={six}"]


VIPS = (f"tcp://{VIP4}:80", f"tcp://[{VIP6}]:80")


def start_nginx(node: Node, folder: Path, big: Path) -> None:
    """nginx on every address of the node; on return it listens."""
    folder.mkdir()
    config = folder / "nginx.conf"
    config.write_text(NGINX.format(dir=folder, name=node.name, big=big))
    # As a daemon it returns when its sockets listen.
    done = node.run("nginx", "-c", str(config), check=False)
    if done.returncode:
        raise KernelError(f"nginx did not start in {node.netns}: {done.stderr.strip()}")


def start_agent(node: Node, role: str, *more: str) -> subprocess.Popen[str]:
    """An agent of all VIPs for the node's cgroup; on return it works."""
    vips = [part for vip in VIPS for part in ("--vip", vip)]
    child = node.popen(
        *crablb("agent", role, *vips, "--cgroup", str(node.cgroup), *more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert child.stdout and child.stderr
    if child.stdout.readline().strip() != "ready":
        raise KernelError(f"the {role} agent did not start: {child.stderr.read().strip()}")
    return child


@contextmanager
def notify_socket(folder: Path) -> Iterator[tuple[str, Callable[[], str]]]:
    """A socket for NOTIFY_SOCKET; its path, and a function that waits for the next message."""
    path = folder / "notify"
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(path))
        sock.settimeout(READY_TIMEOUT)
        yield str(path), lambda: sock.recv(4096).decode()


def start_serve(
    lab: Lab,
    folder: Path,
    *more: str,
    what: list[str] | None = None,
    config: Path | None = None,
    node: Node | None = None,
    program: list[str] | None = None,
) -> subprocess.Popen[str]:
    """``crablb serve`` in the load balancer's node, or another; on return it serves ``what``, or what the file says.

    ``program``: what stands for ``crablb``.
    """
    arguments = [part for s in (what or services(lab)) for part in ("--service", s)]
    if config:
        arguments = ["--config", str(config)]
    log = folder / "serve.log"
    with notify_socket(folder) as (path, wait), open(log, "a") as stderr:
        child = (node or lab.lb).popen(
            *(program or crablb()),
            "serve",
            "--iface",
            "eth0",
            *arguments,
            *more,
            stderr=stderr,
            env={**os.environ, "NOTIFY_SOCKET": path},
        )
        try:
            state = wait()
        except TimeoutError:
            state = ""
        if state != "READY=1":
            raise KernelError(f"crablb serve did not start: {log.read_text().strip()}")
    return child


def status(lab: Lab, node: Node | None = None) -> dict[str, Any]:
    """``crablb status --json`` of the load balancer."""
    parsed: dict[str, Any] = json.loads(
        (node or lab.lb).run(*crablb("status", "--iface", "eth0", "--json"), check=False).stdout
    )
    return parsed


def agent_status(node: Node) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(node.run(*crablb("agent", "status", "--json")).stdout)
    return parsed


def make_big(path: Path, size: int = BIG) -> str:
    """A file of ``size`` pseudo-random bytes; its SHA-256."""
    digest = hashlib.sha256()
    random = np.random.default_rng(2020)
    with open(path, "wb") as file:
        for _ in range(size >> 20):
            block = random.bytes(1 << 20)
            file.write(block)
            digest.update(block)
    return digest.hexdigest()


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def syns(capture: Path) -> Counter[str]:
    """TCP packets of a capture by kind, "SYN" or "other"."""
    kinds: Counter[str] = Counter()
    data = capture.read_bytes()
    at = 24  # pcap: file header, then 16 bytes in front of each packet
    while at + 16 <= len(data):
        captured = struct.unpack_from("<I", data, at + 8)[0]
        frame = data[at + 16 : at + 16 + captured]
        tcp = 14 + (40 if frame[12:14] == b"\x86\xdd" else (frame[14] & 15) * 4)
        kinds["SYN" if frame[tcp + 13] & 0x3F == 2 else "other"] += 1
        at += 16 + captured
    return kinds


class Demo:
    """One run.  ``say`` is told of the progress."""

    def __init__(self, topology: Topology, say: Callable[[str], None]) -> None:
        self.report = Report(topology)
        self.say = say

    def run(self, *, keep: bool = False) -> Report:
        """Make the lab, do everything, remove the lab (unless ``keep``)."""
        with ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="crablb-demo-")))
            name = "demo" if keep else f"demo-{os.getpid()}"
            self.say(f"making the lab: client, load balancer, three servers ({self.report.topology})")
            self.lab = Lab.create(name, self.report.topology)  # type: ignore[arg-type]
            if not keep:
                stack.callback(self.lab.destroy)
            self.folder = folder
            self._set_up()
            capture = folder / "lb.pcap"
            with self.lab.middle.capture(capture, "tcp", "lb"):
                before = self.lab.client.counters()
                self._short()
                self._download()
                self._upload()
                after = self.lab.client.counters()
                self._second_download()
            self.report.client_packets = {
                "sent": after["tx_packets"] - before["tx_packets"],
                "received": after["rx_packets"] - before["rx_packets"],
            }
            self.report.wire_packets = dict(syns(capture))
            self._judge()
            self._die()
            self._compare()
        return self.report

    def _set_up(self) -> None:
        big = self.folder / "big"
        self.digest = make_big(big)
        self.say("starting a server agent and nginx on each server, a client agent on the client")
        for server in self.lab.servers:
            # Before nginx: kernels older than 6.12 cannot prepare who listens already.
            start_agent(server, "server", "--dsr")
            start_nginx(server, self.folder / server.name, big)
        prefixes = [part for p in self.lab.prefixes() for part in ("--backends", p)]
        start_agent(self.lab.client, "client", *prefixes)
        self.serve = start_serve(self.lab, self.folder, "--check", "none")  # packets are counted
        self.say(f"crablb serves {' and '.join(VIPS)} (process {self.serve.pid})")

    def _short(self) -> None:
        self.say(f"{2 * CONNECTIONS} short connections, over IPv4 and IPv6")
        backends: Counter[str] = Counter()
        peers: Counter[str] = Counter()
        connects = 0
        for host in (str(VIP4), f"[{VIP6}]"):
            # One process, one connection a request: the server closes.
            done = self.lab.client.run(
                "curl", "-s", "-m", "30", "-H", "Connection: close",
                "-w", " %{http_code} %{num_connects} %{remote_ip}\n", f"http://{host}/whoami?[1-{CONNECTIONS}]",
                check=False,
            )  # fmt: skip
            # The server's line, and curl's; without an answer only the latter.
            for name, code, count, peer in re.findall(r"^(\w+)\n (\d+) (\d+) (\S+)$", done.stdout, re.M):
                if code == "200":
                    backends[name] += 1
                    connects += int(count)
                    peers[peer] += 1
        self.report.connections_per_backend = dict(sorted(backends.items()))
        self.report.peers_seen = sorted(peers)
        total = sum(backends.values())
        self.report.claim(
            f"{2 * CONNECTIONS} short connections all answered",
            total == connects == 2 * CONNECTIONS,
            f"{total} answers on {connects} connections",
        )
        self.report.claim(
            "every backend served some",
            len(backends) == len(self.lab.servers),
            ", ".join(f"{name} {n}" for name, n in sorted(backends.items())),
        )
        self.report.claim(
            "the client saw the VIP as its peer, never a backend's address",
            set(peers) == {str(VIP4), str(VIP6)},
            ", ".join(sorted(peers)),
        )

    def _get(self, on_progress: Callable[[int], None] = lambda _: None) -> tuple[int, str]:
        """Download; bytes and SHA-256."""
        child = self.lab.client.popen(
            "curl",
            "-s",
            "-S",
            "-m",
            "60",
            f"http://{VIP4}/big",
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert child.stdout
        digest, size = hashlib.sha256(), 0
        while chunk := child.stdout.buffer.read(1 << 20):  # type: ignore[attr-defined]
            digest.update(chunk)
            size += len(chunk)
            on_progress(size)
        child.wait()
        return size, digest.hexdigest()

    def _download(self) -> None:
        self.say(f"downloading {BIG >> 20} MiB")
        size, digest = self._get()
        self.report.claim(
            f"a download of {BIG >> 20} MiB is intact",
            digest == self.digest,
            f"{size >> 20} MiB, SHA-256 {digest[:16]}...",
        )

    def _upload(self) -> None:
        self.say(f"uploading {BIG >> 20} MiB")
        self.lab.client.run(
            "curl",
            "-s",
            "-S",
            "-m",
            "60",
            "-T",
            str(self.folder / "big"),
            f"http://[{VIP6}]/upload/up",
        )
        arrived = [path for s in self.lab.servers if (path := self.folder / s.name / "up").exists()]
        digest = sha256(arrived[0]) if len(arrived) == 1 else "nothing"
        self.report.claim(
            f"an upload of {BIG >> 20} MiB is intact",
            digest == self.digest,
            f"SHA-256 {digest[:16]}...",
        )

    def _second_download(self) -> None:
        self.say(f"downloading {BIG >> 20} MiB again; killing the load balancer on the way")
        killed_at = 0

        def kill(size: int) -> None:
            nonlocal killed_at
            if not killed_at and size >= KILL_AFTER:
                self.final = status(self.lab)
                self.serve.send_signal(signal.SIGKILL)
                self.serve.wait()
                killed_at = size
                self.say(f"  {size >> 20} MiB have come; the load balancer is dead (SIGKILL)")

        size, digest = self._get(kill)
        self.report.claim(
            "a download goes on when the load balancer is killed",
            0 < killed_at < BIG and digest == self.digest,
            f"killed at {killed_at >> 20} MiB, {size >> 20} MiB came, SHA-256 {digest[:16]}...",
        )

    def _judge(self) -> None:
        report = self.report
        counters = agent_status(self.lab.client)["client"]["counters"]
        attempts = counters["offered"] + counters["retransmitted"]
        report.connection_attempts = attempts
        xdp, redirected = self.final["xdp"], self.final["total"]["redirected"]
        report.load_balancer_packets = {"SYN": xdp["syn"], "other": xdp["other"]}
        report.claim(
            "the load balancer saw one packet of each connection, its SYN",
            xdp["syn"] == attempts and xdp["other"] == 0 and redirected == attempts,
            f"{attempts} connections: {xdp['syn']} SYNs, {xdp['other']} others, {redirected} redirected",
        )
        wire = report.wire_packets
        report.claim(
            "on its wire: one SYN in and one out for each, and no other TCP packet",
            wire == {"SYN": 2 * attempts},
            ", ".join(f"{n} {kind}" for kind, n in wire.items()),
        )

    def _die(self) -> None:
        """What a new connection meets when nobody serves."""
        done = self.lab.client.run("curl", "-s", "--connect-timeout", "1", f"http://{VIP4}/whoami", check=False)
        dropped = status(self.lab)["xdp"]["drop_no_socket"]
        self.report.claim(
            "without a load balancer a new connection is dropped, not refused: the client tries again",
            done.returncode == 28 and dropped > 0,
            f"curl timed out ({done.returncode}), {dropped} SYN dropped",
        )

    def _compare(self) -> None:
        """The same download by a client that takes part and by one that does not."""
        self.say(f"a load balancer again; {COMPARED >> 20} MiB to a prepared and to an unprepared client")
        self.serve = start_serve(self.lab, self.folder, "--check", "none")  # packets are counted
        with open(self.folder / "big", "rb") as file:
            wanted = hashlib.sha256(file.read(COMPARED)).hexdigest()
        curl = ["curl", "-s", "-m", "60", "-r", f"0-{COMPARED - 1}", f"http://{VIP4}/big"]
        # Outside of the node's cgroup the client's agent does not concern it.
        commands = {
            "prepared": self.lab.client.command(curl),
            "unprepared": ["nsenter", f"--net={self.lab.client.path}", "--", *curl],
        }
        intact = []
        for kind, command in commands.items():
            before = self._seen()
            done = subprocess.run(command, capture_output=True, check=False)
            intact.append(hashlib.sha256(done.stdout).hexdigest() == wanted)
            self.report.costs[kind] = self._seen() - before
        costs = self.report.costs
        self.report.claim(
            "every client is served; only one that does not take part costs more than a packet",
            all(intact) and costs["prepared"] == 1 < costs["unprepared"],
            f"{COMPARED >> 20} MiB each: prepared {costs['prepared']} packet, unprepared {costs['unprepared']:,}",
        )

    def _seen(self) -> int:
        """Packets of the VIPs that the load balancer has seen."""
        xdp = status(self.lab)["xdp"]
        return sum(n for name, n in xdp.items() if not name.startswith("pass"))
