"""The main job, shown: real connections through the load balancer, which sees one packet of each.

Each claim is checked, and the evidence kept: see :class:`Claim`.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from crablb.errors import KernelError
from crablb.kernel import mptcp
from crablb.lab.lab import PROGRAMS, VIP4, VIP6, Lab, Node, Topology
from crablb.lab.programs import missing, remedy, require

CONNECTIONS = 150  # for each family
BIG = 256 << 20  # bytes
COMPARED = 16 << 20  # bytes that each kind of client downloads
SURVIVED = 64 << 20  # the same, while something on its way dies
KILL_AFTER = 16 << 20  # bytes of the second download
#: Programs without which there is nothing to show, and what is left out without others.
NEEDED = (*PROGRAMS, "nginx", "curl")
OPTIONAL = {
    "tcpdump": "what is on the load balancer's wire is not looked at",
    "nft": "nothing dies on a client's way but the load balancer",
}
READY_TIMEOUT = 120  # seconds, of a machine that has much else to do

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
    #: The longest pause (ms) of a download while something dies on its way, by what dies and kind of client; None: it
    #: did not go on.
    survival: dict[str, dict[str, float | None]] = field(default_factory=dict)

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


#: Kinds of client: with the agent, with neither, and with a stock MPTCP socket and no agent.
PREPARED, UNPREPARED, MPTCP = "prepared", "unprepared", "MPTCP, no agent"


def start_nginx(node: Node, folder: Path, big: Path, *, multipath: bool = False) -> None:
    """nginx on every address of the node; on return it listens.  ``multipath``: by MPTCP, and so for TCP as well."""
    folder.mkdir()
    config = folder / "nginx.conf"
    config.write_text(NGINX.format(dir=folder, name=node.name, big=big))
    if multipath:
        program = [sys.executable, "-m", "crablb.lab.listening", "nginx", "-c", str(config)]
        child = node.popen(*program, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        assert child.stdout and child.stderr
        if child.stdout.readline() != "listening\n":
            raise KernelError(f"nginx did not start in {node.netns}: {child.stderr.read().strip()}")
        return
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
def notify_socket(folder: Path) -> Iterator[tuple[str, Callable[..., str]]]:
    """A socket for NOTIFY_SOCKET; its path, and a function that waits for the next message but a STATUS, which comes at
    any time, and raises TimeoutError; at once if the process that it may be given has ended."""
    path = folder / "notify"
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(path))

        def wait(child: subprocess.Popen[str] | None = None) -> str:
            ends = [os.pidfd_open(child.pid)] if child else []
            try:
                while True:
                    ready, _, _ = select.select([sock.fileno(), *ends], [], [], READY_TIMEOUT)
                    if sock.fileno() not in ready:
                        raise TimeoutError
                    said = sock.recv(4096).decode()
                    if not said.startswith("STATUS="):
                        return said
            finally:
                for end in ends:
                    os.close(end)

        yield str(path), wait


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
            while (state := wait(child)).startswith("STATUS="):  # how it is, before all is there
                pass
        except TimeoutError:
            state = ""
        if "READY=1" not in state.splitlines():  # who has taken over says besides that it is the process now
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


def lived(pauses: Mapping[str, float | None]) -> str:
    """How downloads fared, by kind of client, in words."""
    return "; ".join(
        f"{kind}: {'broke' if ms is None else f'went on, longest pause {ms:.0f} ms'}" for kind, ms in pauses.items()
    )


class Demo:
    """One run.  ``say`` is told of the progress."""

    def __init__(self, topology: Topology, say: Callable[[str], None]) -> None:
        self.report = Report(topology)
        self.say = say

    def run(self, *, keep: bool = False) -> Report:
        """Make the lab, do everything, remove the lab (unless ``keep``).  Raises :class:`KernelError`."""
        require("the demo", NEEDED)
        self.lacking = missing(OPTIONAL)
        for name in self.lacking:
            self.say(f"{name} is not installed, so {OPTIONAL[name]}: {remedy([name])}")
        try:
            return self._run(keep)
        except subprocess.CalledProcessError as error:
            # As by a node's shell, whose last arguments are the command.
            said = (error.stderr or error.stdout or "").strip()
            raise KernelError(f"{' '.join(error.cmd[5:])}: exit status {error.returncode}: {said}") from None

    def _run(self, keep: bool) -> Report:
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
            seen = "tcpdump" not in self.lacking
            with self.lab.middle.capture(capture, "tcp", "lb") if seen else nullcontext():
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
            self.report.wire_packets = dict(syns(capture)) if seen else {}
            self._judge()
            self._die()
            self._compare()
            if "nft" not in self.lacking:
                self._survive()
        return self.report

    def _set_up(self) -> None:
        big = self.folder / "big"
        self.digest = make_big(big)
        self.say("starting a server agent and nginx on each server, a client agent on the client")
        self.kinds = [PREPARED, UNPREPARED]
        multipath = not (without := self._no_mptcp())
        if multipath:
            self.kinds.append(MPTCP)
        else:
            self.say(f"no MPTCP client: {without}")
        for server in self.lab.servers:
            # Before nginx: kernels older than 6.12 cannot prepare who listens already.
            start_agent(server, "server", "--dsr", *(["--mptcp"] if multipath else []))
            start_nginx(server, self.folder / server.name, big, multipath=multipath)
        prefixes = [part for p in self.lab.prefixes() for part in ("--backends", p)]
        start_agent(self.lab.client, "client", *prefixes)
        self.serve = start_serve(self.lab, self.folder, "--check", "none")  # packets are counted
        self.say(f"crablb serves {' and '.join(VIPS)} (process {self.serve.pid})")

    def _no_mptcp(self) -> str:
        """Prepare an MPTCP client; why there can be none, or nothing if there is one."""
        try:
            mptcp.require()
        except mptcp.Unsupported as error:
            return str(error)
        # All that it needs.
        limits = ["ip", "mptcp", "limits", "set", "add_addr_accepted", "1", "subflows", "2"]
        done = self.lab.client.run(*limits, check=False)  # an old one knows no MPTCP
        return f"{' '.join(limits)}: {done.stderr.strip()}" if done.returncode else ""

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
            xdp["syn"] == attempts and xdp["other"] == 0 and counters["offered"] <= redirected,
            f"{counters['offered']} connections: {xdp['syn']} SYNs, {xdp['other']} others, {redirected} redirected"
            # By a client that was answered late; it makes no offer, and goes where the first one went.
            + (f"; sent again: {counters['retransmitted']}" if counters["retransmitted"] else ""),
        )
        if "tcpdump" not in self.lacking:
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
        """The same download by each kind of client."""
        self.say(f"a load balancer again; {COMPARED >> 20} MiB to each kind of client: {'; '.join(self.kinds)}")
        self.serve = start_serve(self.lab, self.folder, "--check", "none")  # packets are counted
        wanted, intact = self._digest(COMPARED), []
        for kind in self.kinds:
            before = self._seen()
            (done,) = self._downloads([kind], COMPARED)
            intact.append(done["digest"] == wanted)
            self.report.costs[kind] = self._seen() - before
        costs = self.report.costs
        self.report.claim(
            "every client is served; only one that does not take part costs more than a packet",
            all(intact) and costs[PREPARED] == 1 < costs[UNPREPARED],
            f"{COMPARED >> 20} MiB each: prepared {costs[PREPARED]} packet, unprepared {costs[UNPREPARED]:,}",
        )
        if MPTCP in costs:
            self.report.claim(
                "a stock MPTCP client without an agent leaves the load balancer's way, too",
                1 < costs[MPTCP] < costs[UNPREPARED] / 4,
                f"{COMPARED >> 20} MiB: {costs[MPTCP]} packets of the connection passed the load balancer",
            )

    def _survive(self) -> None:
        """Something dies when each kind of client has had half of its download."""
        servers = self.lab.servers
        direct = f"ip daddr {{ {', '.join(s.ip4 for s in servers)} }} drop"
        for what, interface, rule in (("direct way", "client", direct), ("load balancer", "lb", "drop")):
            self.say(f"{SURVIVED >> 20} MiB to each kind of client; the {what} dies on the way")
            chain = f'type filter hook ingress device "{interface}" priority 0; {rule};'
            kill = partial(self._nft, f"table netdev dead {{ chain dead {{ {chain} }}\n}}")
            done = self._downloads(self.kinds, SURVIVED, kill)
            self._nft("delete table netdev dead")
            wanted = self._digest(SURVIVED)
            self.report.survival[what] = {
                kind: one["pause_ms"] if one["digest"] == wanted else None
                for kind, one in zip(self.kinds, done, strict=True)
            }
        by = self.report.survival
        self.report.claim(
            "who has left the load balancer lives on when it dies, and who has not does not",
            by["load balancer"][UNPREPARED] is None
            and all(by["load balancer"][kind] is not None for kind in self.kinds if kind != UNPREPARED),
            lived(by["load balancer"]),
        )
        if MPTCP in self.kinds:
            self.report.claim(
                "when the direct way dies an MPTCP client lives on by the load balancer",
                by["direct way"][MPTCP] is not None,
                lived(by["direct way"]),
            )

    def _downloads(
        self, kinds: Sequence[str], size: int, meanwhile: Callable[[], object] = lambda: None
    ) -> list[dict[str, Any]]:
        """So many bytes to each of these clients at once; ``meanwhile``: when all of them have half."""
        children = []
        for kind in kinds:
            protocol = ["mptcp"] if kind == MPTCP else []
            client = [sys.executable, "-m", "crablb.lab.downloading", str(VIP4), "/big", str(size), *protocol]
            # Outside of the node's cgroup the client's agent does not concern it.
            outside = ["nsenter", f"--net={self.lab.client.path}", "--", *client]
            children.append(
                subprocess.Popen(
                    self.lab.client.command(client) if kind == PREPARED else outside,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
        try:
            for kind, child in zip(kinds, children, strict=True):
                assert child.stdout
                if child.stdout.readline() != "half\n":
                    raise KernelError(f"the download of the client ({kind}) did not begin")
            meanwhile()
            return [json.loads(child.communicate("\n")[0]) for child in children]
        finally:
            for child in children:
                child.kill()
                child.communicate()

    def _nft(self, rules: str) -> None:
        self.lab.middle.run("nft", "-f", "-", input=f"{rules}\n")

    def _digest(self, size: int) -> str:
        """Of the file's first bytes."""
        with open(self.folder / "big", "rb") as file:
            return hashlib.sha256(file.read(size)).hexdigest()

    def _seen(self) -> int:
        """Packets of the VIPs that the load balancer has seen."""
        xdp = status(self.lab)["xdp"]
        return sum(n for name, n in xdp.items() if not name.startswith("pass"))
