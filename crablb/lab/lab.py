"""Make, use and remove a lab."""

from __future__ import annotations

import json
import os
import re
import select
import shlex
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any, Literal, Self

from crablb.agent.base import cgroup_root
from crablb.errors import ConfigError, KernelError
from crablb.kernel import ethtool, netns, pins
from crablb.lab.programs import remedy, require

VIP4 = IPv4Address("10.0.0.100")
VIP6 = IPv6Address("fd00::100")
Topology = Literal["bridge", "routed"]
STATE = pins.RUN / "lab"
MAX_SERVERS = 100

#: What makes one.
PROGRAMS = ("ip", "sysctl", "bash", "nsenter")

#: In every node, before it has links.  Redirected packets come and go by different ways, so no reverse-path filter; and
#: no duplicate address detection, so that addresses work at once.
SYSCTLS = {
    "net.ipv4.conf.all.rp_filter": 0,
    "net.ipv4.conf.default.rp_filter": 0,
    "net.ipv4.conf.all.send_redirects": 0,
    "net.ipv4.conf.default.send_redirects": 0,
    "net.ipv6.conf.all.accept_dad": 0,
    "net.ipv6.conf.default.accept_dad": 0,
    "net.ipv6.conf.default.accept_ra": 0,
    "net.ipv6.conf.default.router_solicitations": 0,
}
#: A new namespace has the machine's word about IPv4, where containers have it forward.
HOST = {"net.ipv4.ip_forward": 0}
FORWARDING = {"net.ipv4.ip_forward": 1, "net.ipv6.conf.all.forwarding": 1}
#: A server has the VIP, and lets nobody know.
SILENT_VIP = {"net.ipv4.conf.all.arp_ignore": 1, "net.ipv4.conf.all.arp_announce": 2}


def _run(*args: str, stdin: str | None = None) -> str:
    try:
        done = subprocess.run(args, input=stdin, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise KernelError(f"{args[0]} is not installed: {remedy([args[0]])}") from None
    if done.returncode:
        raise KernelError(f"{shlex.join(args)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


#: What a load balancer remembers: crablb.control.state.
REMEMBERED = Path("/var/lib/crablb")
#: What stands behind the name of a node of lab "a" in the files of nodes of labs "a-lb", "a-lb-x": it is theirs.
OTHERS = re.compile(r"(.*-)?(client|lb|switch|router|server\d+)-")


class Node:
    """A network namespace with a cgroup: what is started in it ends with it."""

    def __init__(self, lab: str, name: str, ip4: str = "", ip6: str = "") -> None:
        self.lab, self.name = lab, name
        self.ip4, self.ip6 = ip4, ip6
        self.netns = f"crab-{lab}-{name}"
        self.path = Path("/run/netns") / self.netns
        self.cgroup = cgroup_root() / "crablb-lab" / lab / name
        self._children: list[subprocess.Popen[Any]] = []

    def command(self, args: Sequence[str]) -> list[str]:
        """``args`` as a command that runs in the node, whoever starts it."""
        # `ip netns exec` would mount another /sys, and with it hide the BPF file system and the cgroups.
        # The agents' default cgroup is the node's: the nodes share one kernel, and so its root cgroup.
        enter = 'echo $$ > "$0/cgroup.procs" && CRABLB_CGROUP=$0 exec nsenter --net="$1" -- "${@:2}"'
        return ["bash", "-c", enter, str(self.cgroup), str(self.path), *args]

    def run(self, *args: str, check: bool = True, **more: Any) -> subprocess.CompletedProcess[str]:
        """Run to its end; text in and out, captured.

        ``check``: raise CalledProcessError, with what it said on standard error as a note, if it fails.
        """
        more.setdefault("capture_output", True)
        try:
            return subprocess.run(self.command(args), text=True, check=check, **more)
        except subprocess.CalledProcessError as error:
            error.add_note(error.stderr or "")
            raise

    def popen(self, *args: str, **more: Any) -> subprocess.Popen[str]:
        """Start; it ends with the lab at the latest."""
        child: subprocess.Popen[str] = subprocess.Popen(self.command(args), text=True, **more)
        self._children.append(child)
        return child

    def ip(self, *lines: str) -> None:
        """``ip`` commands, in one batch."""
        _run("ip", "-n", self.netns, "-batch", "-", stdin="\n".join(lines))

    def set(self, settings: dict[str, int]) -> None:
        """sysctl settings.  Raises :class:`KernelError`."""
        done = self.run("sysctl", "-qw", *(f"{name}={value}" for name, value in settings.items()), check=False)
        if done.returncode:
            raise KernelError(f"sysctl in {self.netns}: {done.stderr.strip()}")

    def processes(self) -> list[int]:
        try:
            return [int(pid) for pid in (self.cgroup / "cgroup.procs").read_text().split()]
        except FileNotFoundError:
            return []

    def make_cgroup(self) -> None:
        for _ in range(100):  # who removes another lab removes the folder of all when it is empty
            try:
                return self.cgroup.mkdir(parents=True)
            except FileNotFoundError:
                continue
        raise KernelError(f"cannot make {self.cgroup}")

    @property
    def pins(self) -> Path:
        """The folder of what crablb has pinned in the node."""
        return pins.root() / pins.namespace_at(self.path)

    def mac(self, interface: str = "eth0") -> str:
        links = json.loads(_run("ip", "-n", self.netns, "-j", "link", "show", "dev", interface))
        return str(links[0]["address"])

    def counters(self, interface: str = "eth0") -> dict[str, int]:
        """The interface's packets and bytes: ``rx_packets``, ``tx_packets``, ``rx_bytes``, ``tx_bytes``."""
        link = json.loads(_run("ip", "-n", self.netns, "-j", "-s", "link", "show", "dev", interface))[0]
        return {
            f"{way}_{what}": int(link["stats64"][way][what]) for way in ("rx", "tx") for what in ("packets", "bytes")
        }

    @contextmanager
    def capture(self, path: Path, expression: str, interface: str = "eth0") -> Iterator[None]:
        """tcpdump into ``path`` while in the context; whole from its first packet to its last."""
        child = self.popen(
            # The ring's slots have the snapshot's size: with tcpdump's own it has eight.
            "tcpdump", "-i", interface, "-s", "256", "-B", "16384", "-U", "-n", "--immediate-mode",
            "-w", str(path), expression,
            stderr=subprocess.PIPE,
        )  # fmt: skip
        assert child.stderr
        for line in child.stderr:
            if "listening on" in line:
                break
        else:
            raise KernelError(f"tcpdump did not start in {self.netns}; if it is not installed: {remedy(['tcpdump'])}")
        try:
            yield
        finally:
            # A signal makes tcpdump leave its ring as it is; when it waits in poll(2), the ring is empty.
            end = time.monotonic() + 10
            while "poll" not in Path(f"/proc/{child.pid}/wchan").read_text() and time.monotonic() < end:
                time.sleep(0.01)
            child.terminate()
            said = child.communicate()[1]
        lost = re.search(r"^([1-9]\d*) packets? dropped by kernel", said, re.MULTILINE)
        if lost:
            raise KernelError(f"the capture in {self.netns} is incomplete: {lost[0]}; is the machine overloaded?")

    def end(self) -> None:
        """End every process in the node."""
        if self.cgroup.exists():
            with open(self.cgroup / "cgroup.events") as events:
                (self.cgroup / "cgroup.kill").write_text("1")
                poll = select.poll()
                poll.register(events, select.POLLPRI)
                while "populated 1" in events.read():
                    poll.poll(1000)  # POLLPRI comes with every change; the timeout is only for safety
                    events.seek(0)
            self.cgroup.rmdir()
        for child in self._children:
            child.wait()
            for stream in (child.stdin, child.stdout, child.stderr):
                if stream:
                    with suppress(BrokenPipeError):  # what was said to it, and it never read
                        stream.close()
        self._children.clear()

    def destroy(self) -> None:
        self.end()
        if self.path.exists():
            try:
                pinned = self.pins
            except KernelError:  # its making was cut short, when there was a file and no namespace yet
                pinned = None
            _run("ip", "netns", "del", self.netns)
            if pinned:
                for role in pinned.glob("*"):
                    pins.remove(role)
                for left in pins.RUN.glob(f"{pinned.name}-*"):
                    left.unlink(missing_ok=True)
                pins.tidy(pinned.name)
        self.forget()

    def forget(self) -> None:
        """Remove what load balancers remember of the node by its name: the next one of the name is another."""
        begins = f"netns-{self.netns}-"
        for left in REMEMBERED.glob(f"*{begins}*"):
            rest = left.name.removeprefix(".").removeprefix(begins)
            if not OTHERS.match(rest):
                left.unlink(missing_ok=True)


class Lab:
    """A network of namespaces.  As a context manager it is removed at the end.

    Make one with :meth:`create`, find one with :meth:`open`.
    """

    def __init__(self, name: str, topology: Topology, servers: int) -> None:
        self.name, self.topology = name, topology
        self.nodes: dict[str, Node] = {}
        routed = topology == "routed"
        self._node("router" if routed else "switch")
        self._node("client", *(("10.1.0.1", "fd00:1::1") if routed else ("10.0.0.1", "fd00::1")))
        self._node("lb", *(("10.2.0.2", "fd00:2::2") if routed else ("10.0.0.2", "fd00::2")))
        for i in range(1, servers + 1):
            host = 10 + i
            self._node(
                f"server{i}",
                f"10.{3 if routed else 0}.0.{host}",
                f"fd00:3::{host}" if routed else f"fd00::{host}",
            )

    def _node(self, name: str, ip4: str = "", ip6: str = "") -> None:
        self.nodes[name] = Node(self.name, name, ip4, ip6)

    @property
    def client(self) -> Node:
        return self.nodes["client"]

    @property
    def lb(self) -> Node:
        return self.nodes["lb"]

    @property
    def servers(self) -> list[Node]:
        return [node for name, node in self.nodes.items() if name.startswith("server")]

    @property
    def middle(self) -> Node:
        """The switch or the router: it has an interface named after each node."""
        return self.nodes["router" if self.topology == "routed" else "switch"]

    def prefixes(self) -> list[str]:
        """Where the backends are."""
        return ["10.3.0.0/24", "fd00:3::/64"] if self.topology == "routed" else ["10.0.0.0/24", "fd00::/64"]

    @classmethod
    def create(cls, name: str, topology: Topology = "bridge", servers: int = 3, *, offload: bool = True) -> Lab:
        """Make a lab.  ``offload=False`` switches off checksum and segmentation offload in every node.

        Raises :class:`ConfigError` for a name or number that cannot be, :class:`KernelError` if it exists already,
        programs are missing, or the kernel refuses; a half-made lab is removed again.
        """
        _check_name(name)
        if topology not in ("bridge", "routed"):
            raise ConfigError(f"{topology!r} is no topology; there are bridge and routed")
        if not 1 <= servers <= MAX_SERVERS:
            raise ConfigError(f"{servers} servers cannot be made; choose 1 to {MAX_SERVERS}")
        require("a lab", PROGRAMS if offload else (*PROGRAMS, "ethtool"))
        _claim(name, json.dumps({"topology": topology, "servers": servers, "offload": offload, "user": maker()}))
        lab = cls(name, topology, servers)
        try:
            lab._build(offload)
        except BaseException:
            lab.destroy()
            raise
        return lab

    @classmethod
    def open(cls, name: str, instead: str = "") -> Lab:
        """A lab that exists; ``instead``: what to do if not (default: make it).

        Raises :class:`KernelError` if it does not, :class:`ConfigError` if none can.
        """
        _check_name(name)
        try:
            state = json.loads((STATE / f"{name}.json").read_text())
        except FileNotFoundError:
            names = ", ".join(existing()) or "none"
            remedy = instead or f"make it: crablb lab up --name {name}"
            raise KernelError(f"there is no lab {name} (there are: {names}); {remedy}") from None
        return cls(name, state["topology"], state["servers"])

    def node(self, name: str) -> Node:
        try:
            return self.nodes[name]
        except KeyError:
            raise ConfigError(f"lab {self.name} has no node {name}; it has {', '.join(self.nodes)}") from None

    def _build(self, offload: bool) -> None:
        for node in self.nodes.values():
            node.forget()  # of a lab of before a restart of the machine
            node.make_cgroup()
            _run("ip", "netns", "add", node.netns)
            node.set(SYSCTLS | (FORWARDING if node is self.middle else HOST))
            node.ip("link set lo up")
        self.middle.ip("link add br0 type bridge", "link set br0 up")
        routed = self.topology == "routed"
        bridged = self.servers if routed else [n for n in self.nodes.values() if n is not self.middle]
        for name, node in self.nodes.items():
            if node is self.middle:
                continue
            _run(
                "ip", "link", "add", "eth0", "netns", node.netns, "type", "veth",
                "peer", "name", name, "netns", self.middle.netns,
            )  # fmt: skip
            if node in bridged:
                self.middle.ip(f"link set {name} master br0")
            if not offload:
                for place, interface in ((node, "eth0"), (self.middle, name)):
                    place.run("ethtool", "-K", interface, "tx", "off", "tso", "off", "gso", "off")
            # What an XDP program sends goes through a veth only if its other end polls (NAPI), as it does for GRO.
            # Where it does not, the kernel says so, and workers send in its place.
            if node is self.lb:
                with suppress(OSError, ValueError), netns.inside(self.middle.path):
                    ethtool.switch(name, "rx-gro", on=True)
            self.middle.ip(f"link set {name} up")
            node.ip(
                "link set eth0 up",
                f"addr add {node.ip4}/24 dev eth0",
                f"addr add {node.ip6}/64 dev eth0 nodad",
            )
        for server in self.servers:
            server.set(SILENT_VIP)
            server.ip(f"addr add {VIP4}/32 dev lo", f"addr add {VIP6}/128 dev lo nodad")
        if routed:
            gateways = {"client": ("10.1.0.254", "fd00:1::fe"), "lb": ("10.2.0.254", "fd00:2::fe")}
            for name, node in self.nodes.items():
                if node is self.middle:
                    continue
                four, six = gateways.get(name, ("10.3.0.254", "fd00:3::fe"))
                if name in gateways:
                    self.middle.ip(f"addr add {four}/24 dev {name}", f"addr add {six}/64 dev {name} nodad")
                elif node is self.servers[0]:
                    self.middle.ip(f"addr add {four}/24 dev br0", f"addr add {six}/64 dev br0 nodad")
                node.ip(f"route add default via {four}", f"route add default via {six}")
            towards = [self.middle]
        else:
            towards = [self.client]
        for node in towards:
            node.ip(f"route add {VIP4}/32 via {self.lb.ip4}", f"route add {VIP6}/128 via {self.lb.ip6}")

    def destroy(self) -> None:
        """End what runs in it, and remove it."""
        for node in self.nodes.values():
            node.destroy()
        folder = cgroup_root() / "crablb-lab" / self.name
        for path in (folder, folder.parent):
            try:
                path.rmdir()
            except OSError:
                break
        (STATE / f"{self.name}.json").unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.destroy()


def _check_name(name: str) -> None:
    """Raises :class:`ConfigError`."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,30}", name):
        raise ConfigError(f"{name!r} cannot name a lab: up to 31 of a-z, 0-9 and -, a letter or digit first")


def _claim(name: str, state: str) -> None:
    """Whole and at once, and of those who make a lab of one name at the same time only one's: the others would fail
    later, and remove what the first has made.  Raises :class:`KernelError` if there is a lab of the name."""
    STATE.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=STATE) as new:
        new.write(state)
        new.flush()
        os.chmod(new.name, 0o644)
        try:
            os.link(new.name, STATE / f"{name}.json")
        except FileExistsError:
            raise KernelError(f"lab {name} exists; remove it: crablb lab down --name {name}") from None


def maker() -> str:
    """Whose labs those are that this process makes: the user's, of sudo the one who asked."""
    return os.environ.get("SUDO_USER") or str(os.getuid())


def mine(name: str) -> bool:
    """Whether a lab was made by the same user.  Of versions before it is not known."""
    try:
        return bool(json.loads((STATE / f"{name}.json").read_text()).get("user") == maker())
    except (FileNotFoundError, json.JSONDecodeError):
        return False


def existing() -> list[str]:
    """Names of the labs there are."""
    return sorted(path.stem for path in STATE.glob("*.json"))
