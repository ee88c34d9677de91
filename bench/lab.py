"""One lab with everything that crablb is measured beside, all of it ready at once.

Each way to a server has a virtual address of its own, behind a node of its own, so that measuring them in turn needs no
change.  Clients and servers with crablb's agents are others than those without: nobody pays for what it does not use.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass
from ipaddress import IPv4Address, ip_address
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bench.context import Context, Unavailable
from bench.placement import Cpus, Placement, started_on
from crablb.errors import KernelError
from crablb.kernel import bpf, pins
from crablb.kernel.bpf.descriptor import open_pin
from crablb.kernel.netns import inside
from crablb.lab import Lab, Node
from crablb.lab.demo import crablb, start_serve

HTTP, ECHO = 80, 7
PORTS = (HTTP, ECHO)
SEED = bytes(16)
#: The ways, in the order in which they are reported.
WAYS = (
    "direct", "crablb, redirect", "crablb, DSR", "XDP redirect", "nftables DNAT", "HAProxy", "nginx stream",
    "MPTCP, direct", "crablb, MPTCP",
)  # fmt: skip

NGINX_STREAM = """
load_module {module};
daemon on; user root; worker_processes 1; pid {dir}/pid; error_log {dir}/error.log;
events {{ worker_connections 4096; }}
stream {{
  upstream http {{ server {server}:80; }}
  upstream echo {{ server {server}:7; }}
  server {{ listen {vip}:80 backlog=4096; proxy_pass http; tcp_nodelay on; }}
  server {{ listen {vip}:7 backlog=4096; proxy_pass echo; tcp_nodelay on; }}
}}
"""
HAPROXY = """
global
  nbthread 1
  maxconn 8192
defaults
  mode tcp
  timeout connect 5s
  timeout client 60s
  timeout server 60s
listen http
  bind {vip}:80
  server one {server}:80
listen echo
  bind {vip}:7
  server one {server}:7
"""
NFT = """
table ip peers {{
  chain in {{ type nat hook prerouting priority dstnat; ip daddr {vip} dnat to {server}; }}
  chain out {{ type nat hook postrouting priority srcnat; ip daddr {server} masquerade; }}
}}
"""
NGINX_SERVER = """
daemon on; user root; worker_processes 1; pid {dir}/pid; error_log {dir}/error.log;
events {{ worker_connections 8192; }}
http {{
  access_log off; keepalive_requests 100000000; client_max_body_size 0; client_body_temp_path {dir}/b;
  proxy_temp_path {dir}/p; fastcgi_temp_path {dir}/f; uwsgi_temp_path {dir}/u; scgi_temp_path {dir}/s;
  server {{
    listen 80 backlog=4096; root {dir}/files;
    location /put/ {{ alias {dir}/; dav_methods PUT; }}
  }}
}}
"""
#: So that ports do not run out: those of closed connections are used again after a second (tcp(7)).
CLIENT_SYSCTLS = {"net.ipv4.tcp_tw_reuse": 1}
SYSCTLS = {"net.core.somaxconn": 65535, "net.ipv4.tcp_max_syn_backlog": 65535}
PORT_RANGE = "net.ipv4.ip_local_port_range=1024 65535"


@dataclass(frozen=True)
class Way:
    """From a client to a server."""

    client: Node
    host: IPv4Address
    by: Node | None  # the load balancer on it
    mptcp: bool = False  # by MPTCP sockets


def started(node: Node, command: list[str], ready: str = "ready") -> subprocess.Popen[str]:
    """A program that says when it is ready, on its standard output."""
    child = node.popen(*command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout and child.stderr
    if child.stdout.readline().strip() != ready:
        raise KernelError(f"{command[0]} did not start in {node.netns}: {child.stderr.read().strip()}")
    return child


def mptcpized(context: Context, *command: str) -> list[str]:
    """An unmodified program, whose sockets are MPTCP's."""
    return [context.tool("mptcpize"), "run", *command]


def counts(text: str, group: str) -> dict[str, int]:
    """A group of counters in the text of ``/proc/net/netstat`` or ``snmp``; empty for a kernel without it."""
    names, values = [line.split()[1:] for line in text.splitlines() if line.startswith(f"{group}:")] or ([], [])
    return dict(zip(names, map(int, values), strict=True))


def mptcp_counts(netstat: str) -> dict[str, int]:
    """MPTCP's, of ``/proc/net/netstat``."""
    return counts(netstat, "MPTcpExt")


def start_nginx(node: Node, folder: Path, config: str, start: Sequence[str] = ("nginx",)) -> None:
    """nginx as a daemon of the node: on return it listens."""
    folder.mkdir(exist_ok=True)
    path = folder / "nginx.conf"
    path.write_text(config)
    done = node.run(*start, "-c", str(path), check=False)
    if done.returncode:
        raise Unavailable(f"nginx did not start: {done.stderr.strip()}")


def start_servers(context: Context, node: Node, folder: Path, service_us: int = 0, *, mptcp: bool = False) -> None:
    """nginx on port 80 (``/8`` and ``/8k`` are files of 8 and 8,192 bytes, ``/put/`` takes others), an echo server on
    port 7.

    ``service_us``: the echo server answers one request at a time, each in so many microseconds.  ``mptcp``: by MPTCP
    sockets, which serve TCP's clients too.
    """
    files = folder / "files"
    files.mkdir(parents=True)
    (files / "8").write_bytes(b"8 bytes\n")
    (files / "8k").write_bytes(b"8 bytes\n" * 1024)
    start = mptcpized(context, "nginx") if mptcp else ["nginx"]
    start_nginx(node, folder, NGINX_SERVER.format(dir=folder), start)
    options = [*(["--service", str(service_us)] if service_us else []), *(["--mptcp"] if mptcp else [])]
    started(node, [str(context.make("crr")), "serve", str(ECHO), *options])


def start_agent(node: Node, role: str, vips: Sequence[IPv4Address], *more: str) -> None:
    """An agent of these VIPs, for the node's processes; with ``--detach`` no process of it stays."""
    urls = [part for vip in vips for port in PORTS for part in ("--vip", f"tcp://{vip}:{port}")]
    command = crablb("agent", role, *urls, "--cgroup", str(node.cgroup), *more)
    if "--detach" not in more:
        started(node, command)
        return
    done = node.run(*command, check=False)
    if done.returncode:
        raise KernelError(f"the {role} agent did not start in {node.netns}: {done.stderr.strip()}")


def answered(context: Context, name: str, done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """What ``crr load`` said of a way.  Raises :class:`Unavailable` if more than one request in a hundred failed."""
    found: dict[str, Any] = context.parsed(done, "crr")
    if found["errors"] * 100 >= found["count"]:
        raise Unavailable(f"{name}: {found['errors']} requests of {found['errors'] + found['count']} failed")
    return found


class Peers:
    """The lab.  A context manager; ``ways`` by name, and ``left_out``: why some are not there.

    All of it is where this process is; with ``cpus`` the load balancers are on a CPU of their own, by ``placement``.
    """

    def __init__(self, context: Context, folder: Path, ways: tuple[str, ...] = WAYS, cpus: Cpus | None = None) -> None:
        self.context, self.folder, self.cpus = context, folder, cpus
        self.placement: Placement | None = None
        self.ways: dict[str, Way] = {}
        self.left_out: dict[str, str] = {}
        self._wanted = ways
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.lab = stack.enter_context(Lab.create(f"bench-peers-{os.getpid()}", "bridge", 12))
            self._build(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, where: TracebackType | None
    ) -> None:
        self._stack.close()

    def _build(self, stack: ExitStack) -> None:
        lab = self.lab
        prepared, other, plain, xdp, dnat, haproxy, stream, client, whole, multi, led, stock = lab.servers
        for node in lab.nodes.values():
            node.set(SYSCTLS)
        for node in (lab.client, client, whole, stock, haproxy, stream, dnat):
            node.set(CLIENT_SYSCTLS)
            node.run("sysctl", "-qw", PORT_RANGE)
        # Its packets have their checksums, as from a network: else the XDP program would leave them to user space.
        whole.run("ethtool", "-K", "eth0", "tx", "off")
        for node in (prepared, other, plain):
            start_servers(self.context, node, self.folder / node.name)
        vips = {name: IPv4Address(f"10.0.0.{100 + i}") for i, name in enumerate(WAYS)}
        behind = {
            "crablb, redirect": lab.lb,
            "crablb, DSR": lab.lb,
            "crablb, MPTCP": lab.lb,
            "XDP redirect": xdp,
            "nftables DNAT": dnat,
            "HAProxy": haproxy,
            "nginx stream": stream,
        }
        redirected = [vips["crablb, redirect"], vips["XDP redirect"]]
        users = {
            "crablb, redirect": lab.client,
            "XDP redirect": lab.client,
            "crablb, DSR": whole,
            "MPTCP, direct": stock,
            "crablb, MPTCP": stock,
        }
        starts: dict[str, Callable[[IPv4Address], None]] = {
            "XDP redirect": lambda vip: self._start_xdp(xdp, other, vip),
            "nftables DNAT": lambda vip: self._start_nft(dnat, plain, vip),
            "HAProxy": lambda vip: self._start_haproxy(haproxy, plain, vip),
            "nginx stream": lambda vip: self._start_stream(stream, plain, vip),
            "MPTCP, direct": lambda _: start_servers(self.context, multi, self.folder / multi.name, mptcp=True),
            "crablb, MPTCP": lambda vip: self._start_mptcp(stock, led, vip),
        }
        for name in self._wanted:
            if name == "direct":
                self.ways[name] = Way(client, ip_address(plain.ip4), None)  # type: ignore[arg-type]
                continue
            user = users.get(name, client)
            try:
                if name in starts:
                    # MPTCP's are at the ends: its load balancer is crablb, which starts below.
                    with started_on(None) if "MPTCP" in name else self._balancers():
                        starts[name](vips[name])
            except (Unavailable, KernelError, bpf.BpfError) as reason:
                self.left_out[name] = str(reason)
                continue
            mptcp = "MPTCP" in name
            if name not in behind:
                self.ways[name] = Way(user, IPv4Address(multi.ip4), None, mptcp)
                continue
            user.ip(f"route replace {vips[name]}/32 via {behind[name].ip4}")
            self.ways[name] = Way(user, vips[name], behind[name], mptcp)
        if "crablb, DSR" in self.ways:
            plain.ip(f"addr add {vips['crablb, DSR']}/32 dev lo")
        if any(name.startswith("crablb") for name in self.ways):
            what = [
                f"tcp://{vips[name]}:{port}={server.ip4}"
                for name, server in (("crablb, redirect", prepared), ("crablb, DSR", plain), ("crablb, MPTCP", led))
                if name in self.ways
                for port in PORTS
            ]
            with self._balancers():
                self.balancer = start_serve(lab, self.folder, "--check", "none", what=what)
        if any(vip in redirected for vip in (way.host for way in self.ways.values())):
            # A server each: two VIPs with one backend cannot have the same client port at the same time.
            start_agent(prepared, "server", redirected)
            start_agent(other, "server", redirected)
            start_agent(lab.client, "client", redirected, "--backends", "10.0.0.0/24")

        if self.cpus:
            self.placement = Placement(self.context, lab, self.cpus, behind.values())
            self._try(self._place)  # all, before the first is looked at
        self._try(self._confirm)

    def _try(self, step: Callable[[str], None]) -> None:
        """A step with each way, which is left out if that fails."""
        for name in list(self.ways):
            try:
                step(name)
            except (Unavailable, KernelError, OSError) as reason:
                self.left_out[name] = str(reason)
                del self.ways[name]

    def _balancers(self) -> AbstractContextManager[None]:
        """What is started meanwhile is a load balancer."""
        return started_on(self.cpus.balancer if self.cpus else None)

    def _place(self, name: str) -> None:
        by = self.ways[name].by
        if by and self.placement:
            self.placement.place(by)

    def _start_xdp(self, node: Node, server: Node, vip: IPv4Address) -> None:
        """The program sends by a redirect to the interface that the packet came in by: see ``Hop``."""
        inside = [sys.executable, "-m", "bench.redirect", str(self.context.bpf("redirect")), str(vip), server.ip4]
        self.lab.middle.run("ethtool", "-K", node.name, "gro", "on")
        macs = [server.mac().replace(":", ""), node.mac().replace(":", "")]
        child = node.popen(
            *inside, *macs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=Path(__file__).parent.parent
        )
        assert child.stdout and child.stderr
        if child.stdout.readline().strip() != "ready":
            raise Unavailable(f"the XDP program did not start: {child.stderr.read().strip()[-300:]}")

    def _start_mptcp(self, client: Node, server: Node, vip: IPv4Address) -> None:
        """What leads a stock client past the load balancer."""
        start_servers(self.context, server, self.folder / server.name, mptcp=True)
        server.ip(f"addr add {vip}/32 dev lo")
        start_agent(server, "server", [vip], "--mptcp", "--mptcp-address", server.ip4)
        start_agent(client, "client", [], "--mptcp", "--detach")

    def _confirm(self, name: str) -> None:
        """Neighbours are found, so that the first packet, which may be lost meanwhile, is not among those measured; it
        is MPTCP that is measured, and not TCP in its place; and everything is on its CPU."""
        way = self.ways[name]
        for port, options in ((ECHO, ()), (HTTP, ("--get", "/8"))):
            self.crr(name, "--samples", "1", "--seconds", "10", "--warmup", "0", *options, port=port)
        if way.mptcp:
            counts = mptcp_counts(way.client.run("cat", "/proc/net/netstat").stdout)
            if not counts.get("MPCapableSYNACKRX") or counts["MPCapableFallbackSYNACK"]:
                raise Unavailable("connections fell back to TCP")
        if self.placement:
            self.placement.check(
                way.by, lambda: self.crr(name, "--samples", "100", "--seconds", "10", "--warmup", "0", port=ECHO)
            )

    def _start_nft(self, node: Node, server: Node, vip: IPv4Address) -> None:
        self.context.tool("nft")
        node.set({"net.ipv4.ip_forward": 1})
        done = node.run("nft", "-f", "-", input=NFT.format(vip=vip, server=server.ip4), check=False)
        if done.returncode:
            raise Unavailable(f"nft: {done.stderr.strip()}")

    def _start_haproxy(self, node: Node, server: Node, vip: IPv4Address) -> None:
        program = self.context.tool("haproxy")
        node.ip(f"addr replace {vip}/32 dev lo")
        path = self.folder / "haproxy.cfg"
        path.write_text(HAPROXY.format(vip=vip, server=server.ip4))
        # As a daemon it returns when its sockets listen.
        done = node.run(program, "-D", "-f", str(path), check=False)
        if done.returncode:
            raise Unavailable(f"haproxy did not start: {done.stderr.strip()}")

    def _start_stream(self, node: Node, server: Node, vip: IPv4Address) -> None:
        self.context.tool("nginx")
        module = Path("/usr/lib/nginx/modules/ngx_stream_module.so")
        if not module.exists():
            raise Unavailable("nginx's stream module is not installed (make bench installs it)")
        node.ip(f"addr replace {vip}/32 dev lo")
        folder = self.folder / "stream"
        start_nginx(node, folder, NGINX_STREAM.format(dir=folder, module=module, vip=vip, server=server.ip4))

    # ---- what runs ----

    def programs(self) -> set[int]:
        """The ids of this lab's own BPF programs, among all of the machine: what its processes hold, and what is pinned
        for its network namespaces."""
        said: list[str] = []
        for node in self.lab.nodes.values():
            for pid in node.processes():
                for info in Path(f"/proc/{pid}/fdinfo").glob("*"):
                    with suppress(OSError):  # it has ended, or closed it
                        said.append(info.read_text())
            with inside(node.path):
                folder = pins.root() / pins.namespace()
            for pin in folder.rglob("*"):
                if pin.is_file():
                    with os.fdopen(open_pin(pin), "rb") as held:
                        said.append(Path(f"/proc/self/fdinfo/{held.fileno()}").read_text())
        return {int(number) for text in said for number in re.findall(r"^prog_id:\s*(\d+)$", text, re.MULTILINE)}

    # ---- load ----

    def crr(self, name: str, *options: str, port: int = ECHO) -> dict[str, float]:
        """What ``crr load`` says of a way.  Raises :class:`Unavailable` if more than one request in a hundred fails."""
        way = self.ways[name]
        command = [str(self.context.make("crr")), "load", str(way.host), str(port), *options]
        command += ["--mptcp"] if way.mptcp else []
        return answered(self.context, name, way.client.run(*command, check=False))

    def big(self, size: int) -> int:
        """Have the servers offer a file of ``size`` bytes as ``/big``; returns its size."""
        for folder in self.folder.glob("*/files"):
            with open(folder / "big", "wb") as file:
                for _ in range(size >> 16):
                    file.write(bytes(1 << 16))
        return size

    def download(self, name: str) -> float:
        """Bytes a second of a download of ``/big`` by curl."""
        way = self.ways[name]
        url = f"http://{way.host}/big"
        command = ["curl", "-sSf", "-m", "120", "-o", "/dev/null", "-w", "%{speed_download}", url]
        done = way.client.run(*self._by(way, *command), check=False)
        return float(self.context.parsed(done, "curl"))

    def _by(self, way: Way, *command: str) -> list[str]:
        return mptcpized(self.context, *command) if way.mptcp else list(command)

    def wrk(self, name: str, path: str, seconds: float, connections: int, *, close: bool) -> float:
        """Requests a second by wrk."""
        way = self.ways[name]
        # Without the space wrk takes no notice of it.
        header = ["-H", "Connection: close"] if close else []
        command = [
            self.context.tool("wrk"), "-t", "1", "-c", str(connections), "-d", f"{max(1, round(seconds))}s", *header,
            f"http://{way.host}{path}",
        ]  # fmt: skip
        done = way.client.run(*self._by(way, *command), check=False)
        match = re.search(r"Requests/sec:\s+([\d.]+)", done.stdout)
        if not match:
            raise Unavailable(f"{name}: wrk failed: {(done.stderr or done.stdout).strip()[-300:]}")
        return float(match[1])
