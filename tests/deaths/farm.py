"""A lab under live connections whose load balancer and agents die and are started again."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crablb.kernel import bpf, pins
from crablb.kernel.bpf.descriptor import open_pin
from crablb.kernel.mptcp import Flag, PathManager
from crablb.lab import VIP4, VIP6, Lab, Node
from tests.deaths.nursery import next_kill
from tests.helpers.namespaces import inside, unique
from tests.helpers.processes import ROOT, answer
from tests.helpers.shim import Shim

__all__ = ["KINDS", "Child", "Farm"]

#: Redirected ones; those by the fallback, in tunnels; those by the fallback that leave it by MPTCP.
PORTS = {"redirect": 80, "tunnel": 81, "mptcp": 82}
KINDS = {
    f"{way}{family}": (str(vip), port, way == "mptcp")
    for way, port in PORTS.items()
    for family, vip in ((4, VIP4), (6, VIP6))
}
CONFIG = """
keep = {keep}
persist = "off"
ack_bypass = "on"
flows = 8192
"""
SERVICE = """
[[service]]
address = "tcp://{vip}:{port}"
check = [{checks}]
fallback = "{fallback}"
backends = [{backends}]
"""
#: Nobody is to be taken for dead who merely begins, on a busy machine: that is another matter.
CHECKS = ", ".join(
    f'{{ type = "{kind}", interval = 2, timeout = 2, fall = 30, rise = 1 }}' for kind in ("tcp", "redirect")
)
#: Seconds for a process to be ready, or to end.
LONG = 240
LIBBPF = ctypes.CDLL("libbpf.so.1")


class Child:
    """A process of ``crablb`` in a node, started by its :class:`Nursery`."""

    def __init__(self, nursery: Nursery, pid: int, notify: socket.socket) -> None:
        self.nursery, self.pid, self._notify = nursery, pid, notify
        self._fd = -1
        with contextlib.suppress(ProcessLookupError):
            self._fd = os.pidfd_open(pid)

    def alive(self) -> bool:
        return self._fd >= 0 and not select.select([self._fd], [], [], 0)[0]

    def ready(self, seconds: float = LONG) -> bool:
        """Wait until it says that it is; false if it ends before, or that takes too long."""
        while self.alive():
            found, _, _ = select.select([self._notify, self._fd], [], [], seconds)
            if not found:
                return False
            if self._notify in found and b"READY=1" in self._notify.recv(4096):
                return True
        return False

    def ended(self, seconds: float = LONG) -> bool:
        """Wait for its end; whether it came."""
        return self._fd < 0 or bool(select.select([self._fd], [], [], seconds)[0])

    def succeeded(self) -> Child | None:
        """Who serves in its place, as it has told the service manager, if somebody has."""
        while select.select([self._notify], [], [], 0)[0]:
            said = self._notify.recv(4096).decode().splitlines()
            for pid in (int(line.removeprefix("MAINPID=")) for line in said if line.startswith("MAINPID=")):
                return Child(self.nursery, pid, self._notify.dup())
        return None

    def signal(self, number: int) -> None:
        if self._fd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._fd, number)

    def kill(self) -> None:
        """On return it is dead."""
        self.signal(signal.SIGKILL)
        assert self.ended()

    def kill_at(self, number: int) -> None:
        """At this call from now on: see the shim's ``step``."""
        self.nursery.shim.kill_at(self.pid, "step", number)

    def close(self) -> None:
        self._notify.close()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Nursery:
    """Starts ``crablb`` in nodes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shim = Shim.made(folder)
        self._count = 0
        self._child = subprocess.Popen(
            [sys.executable, "-m", "tests.deaths.nursery", str(self.shim.path)],
            cwd=ROOT, env={**os.environ, **self.shim.env}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def wait(self) -> None:
        assert answer(self._child) == "ready"

    def start(self, node: Node, *args: str, kill: int = 0) -> Child:
        """``kill``: the call that is to be its last one, 0: none."""
        self._count += 1
        place = self.folder / f"notify-{os.getpid()}-{self._count}"
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        sock.bind(str(place))
        asked = {
            "netns": node.netns, "cgroup": str(node.cgroup), "args": args, "log": str(self.log(node)),
            "notify": str(place), "kill": kill,
        }  # fmt: skip
        assert self._child.stdin
        self._child.stdin.write(json.dumps(asked) + "\n")
        self._child.stdin.flush()
        return Child(self, int(answer(self._child)), sock)

    def kill_next(self, number: int) -> None:
        """A successor that a load balancer starts is to be killed at this call; 0: none."""
        place = next_kill(self.shim.path)
        place.unlink(missing_ok=True)
        if number:
            place.write_text(str(number))

    def log(self, node: Node) -> Path:
        return self.folder / f"{node.name}.log"

    def last(self) -> str:
        """The call that somebody was killed at since this was asked, if any."""
        struck = self.shim.struck
        self.shim.end()
        self.shim.forget()
        return struck

    def close(self) -> None:
        self._child.communicate()  # it ends with its input


class Farm:
    """The lab, what is in it, and what is known of it.  ``processes``: by role, those that are to run."""

    def __init__(
        self,
        folder: Path,
        *,
        offload: bool,
        servers: int = 2,
        seed: int = 1,
        connections: int = 500,
        keep: int = 600,
    ) -> None:
        """``connections``: 0: none, and nothing runs.  ``keep``: 0: what ends takes all away, and the hash alone leads
        connections afterwards, so that the configuration stays the same."""
        self.folder, self.seed, self.keep_seconds = folder, seed, keep
        #: Connections that are to be held, of each kind.
        self.wanted = {kind: connections // len(KINDS) for kind in KINDS}
        for kind in list(KINDS)[: connections % len(KINDS)]:
            self.wanted[kind] += 1
        folder.mkdir(parents=True, exist_ok=True)
        self.lab = Lab.create(unique(), "bridge", servers, offload=offload)
        self.nursery = Nursery(folder)
        self.config = folder / "lb.toml"
        self.turn = 0
        self.processes: dict[str, Child] = {}
        self.ids = set[tuple[str, int]]()

    @classmethod
    @contextlib.contextmanager
    def made(cls, folder: Path, **how: Any) -> Iterator[Farm]:
        farm = cls(folder, **how)
        try:
            farm._set_up()
            yield farm
        finally:
            farm.lab.destroy()
            farm.nursery.close()

    def _set_up(self) -> None:
        for server in self.lab.servers:  # the agents give them the VIPs, and take them
            server.ip(f"addr del {VIP4}/32 dev lo", f"addr del {VIP6}/128 dev lo")
            server.set({"net.ipv4.conf.all.arp_ignore": 0, "net.ipv4.conf.all.arp_announce": 0})
        self.before = {node.name: shown(node) for node in self.nodes}
        if not any(self.wanted.values()):
            self.write()
            return self.nursery.wait()
        self._servers = [
            self._python(server, "serve", server.name, *map(str, PORTS.values())) for server in self.lab.servers
        ]
        for child in self._servers:
            assert answer(child) == "ready"
        self.nursery.wait()
        self.write()
        for role in self.roles:
            self.start(role)
        self._clients = self._python(self.lab.client, "clients", str(self.seed), json.dumps(KINDS))
        assert answer(self._clients) == "ready"
        self.opened = self.tell("open", self.wanted)

    def _python(self, node: Node, *args: str) -> subprocess.Popen[str]:
        return node.popen(
            sys.executable, "-m", "tests.deaths.ends", *args,
            cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    @property
    def nodes(self) -> list[Node]:
        return [self.lab.lb, self.lab.client, *self.lab.servers]

    @property
    def roles(self) -> list[str]:
        """In the order that they are started in, and by their nodes' names."""
        return [*(server.name for server in self.lab.servers), "lb", "client"]

    # ---- processes ----

    def write(self) -> None:
        """Another configuration than before: new connections by the fallback have another backend each time."""
        self.turn += bool(self.keep_seconds)
        text = CONFIG.format(keep=self.keep_seconds)
        for way, port in PORTS.items():
            for vip in (VIP4, VIP6):
                addresses = [server.ip4 if vip is VIP4 else server.ip6 for server in self.lab.servers]
                weights = [1 + (i + self.turn) % len(addresses) * 2 for i in range(len(addresses))]
                backends = ", ".join(
                    f'{{ address = "{a}", weight = {w} }}' for a, w in zip(addresses, weights, strict=True)
                )
                text += SERVICE.format(
                    vip=f"[{vip}]" if vip is VIP6 else vip,
                    port=port,
                    fallback="dsr-ipip" if way == "tunnel" else "dsr-l2",
                    backends=backends,
                    checks=CHECKS,
                )
        self.config.write_text(text)

    def command(self, role: str) -> list[str]:
        """What ``crablb`` is started with."""

        def vips(*ports: int) -> list[str]:
            return [
                part for port in ports for vip in (f"{VIP4}", f"[{VIP6}]") for part in ("--vip", f"tcp://{vip}:{port}")
            ]

        if role == "lb":
            return ["serve", "--iface", "eth0", "--config", str(self.config)]
        node = self.lab.node(role)
        cgroup = ["--cgroup", str(node.cgroup)]
        if role == "client":
            prefixes = [part for prefix in self.lab.prefixes() for part in ("--backends", prefix)]
            return ["agent", "client", *vips(PORTS["redirect"]), *prefixes, *cgroup, "--mptcp", "--no-verify"]
        # The path manager is the first one's, as it takes a process; the kernel leads the others' clients.
        mode = "leave" if node is self.lab.servers[0] else "backup"
        return ["agent", "server", *vips(*PORTS.values()), *cgroup, "--dsr", f"--mptcp={mode}"]

    def serving(self) -> int | None:
        """The process that has the load balancer's role; 0: it has not begun with it; None: there is none."""
        with inside(self.lab.lb.netns):
            pid = pins.owner("lb-eth0")
            return pid and pid * pins.has_begun("lb-eth0")

    def begin(self, role: str, *more: str, kill: int = 0) -> Child:
        """Start one, and do not wait."""
        return self.nursery.start(self.lab.node(role), *self.command(role), *more, kill=kill)

    def start(self, role: str, *more: str) -> Child:
        """One that is to be ready now, and stays."""
        child = self.begin(role, *more)
        assert child.ready(), f"{role} did not start:\n{self.said(role)}"
        self.keep(role, child)
        return child

    def said(self, role: str) -> str:
        """The last lines of its log."""
        log = self.nursery.log(self.lab.node(role))
        return "\n".join(log.read_text().splitlines()[-10:]) if log.exists() else ""

    def keep(self, role: str, child: Child) -> None:
        """It is the role's from now on."""
        if before := self.processes.get(role):
            before.close()
        self.processes[role] = child

    def remember(self) -> None:
        """What is pinned now: at the end it is to be gone."""
        for node in self.nodes:
            for pin in node.pins.rglob("*"):
                if pin.is_file():
                    with contextlib.suppress(bpf.BpfError, OSError):
                        self.ids.add(identity(pin))

    # ---- connections ----

    def tell(self, name: str, *args: object) -> dict[str, Any]:
        """See :class:`tests.deaths.ends.Clients`."""
        assert self._clients.stdin
        self._clients.stdin.write(json.dumps([name, *args]) + "\n")
        self._clients.stdin.flush()
        told: dict[str, Any] = json.loads(answer(self._clients))
        return told

    def packets(self) -> int:
        """All that the client has sent and received."""
        counters = self.lab.client.counters()
        return counters["rx_packets"] + counters["tx_packets"]

    # ---- the end ----

    def stop(self) -> None:
        """As an operator ends all of it for good."""
        for role in reversed(self.roles):
            child = self.processes.pop(role)
            child.signal(signal.SIGTERM)
            assert child.ended(), f"{role} did not end:\n{self.said(role)}"
            child.close()
        for role in self.roles:
            self.remove(role)

    def remove(self, role: str) -> None:
        """What one that was killed has left."""
        words = ("remove", "--iface", "eth0") if role == "lb" else ("agent", "remove")
        child = self.nursery.start(self.lab.node(role), *words)
        assert child.ended(), f"nothing removes what {role} has left:\n{self.said(role)}"
        child.close()

    def left(self, *nodes: Node) -> list[str]:
        """What is there of crablb that was not before it; in these nodes alone, if any are named."""
        found = []
        for node in nodes or self.nodes:
            with contextlib.suppress(FileNotFoundError):
                found += [str(path) for path in node.pins.rglob("*")]
            with inside(node.netns):
                name = pins.namespace()
            found += [str(path) for path in pins.RUN.glob(f"*{name}-*")]
            now, before = shown(node).splitlines(), self.before[node.name].splitlines()
            found += [f"{node.name}: new: {line}" for line in now if line not in before]
            found += [f"{node.name}: gone: {line}" for line in before if line not in now]
        end = time.monotonic() + 60
        while (alive := sorted(one for one in self.ids if exists(*one))) and time.monotonic() < end:
            select.select([], [], [], 0.05)  # the kernel lets go of programs, and of their maps, when nobody runs them
        return found + [f"{what} {number} lives" for what, number in alive]


def identity(pin: Path) -> tuple[str, int]:
    """Of what is pinned: ``map_id``, ``prog_id`` or ``link_id``, and which."""
    fd = open_pin(pin)
    try:
        for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines():
            what, _, number = line.partition(":")
            if what in ("map_id", "link_id", "prog_id"):
                return what, int(number)
        raise OSError(f"{pin} is nothing known")
    finally:
        os.close(fd)


def exists(what: str, number: int) -> bool:
    """Whether the kernel has a map, program or link of this id; ids are not given again soon."""
    fd = getattr(LIBBPF, f"bpf_{what.removesuffix('_id')}_get_fd_by_id")(number)
    if fd >= 0:
        os.close(fd)
    return bool(fd >= 0)


def shown(node: Node) -> str:
    """All of a node that agents and load balancers change, as text."""
    lines = node.run(
        "sh",
        "-c",
        "ip rule; ip -6 rule; ip route show table all; ip -6 route show table all; tc qdisc; nft list ruleset;"
        " ip -o addr | sed 's/valid_lft.*//';"
        " for i in eth0 lo; do for d in ingress egress; do tc filter show dev $i $d; done; done;"
        " sysctl net.ipv4.conf.all.arp_ignore net.ipv4.conf.all.arp_announce net.mptcp",
        stderr=subprocess.STDOUT,
        capture_output=False,
        stdout=subprocess.PIPE,
    ).stdout.splitlines()
    with inside(node.netns):
        for name in ("eth0", "lo"):
            index = socket.if_nametoindex(name)
            lines.append(f"programs of {name}: {bpf.xdp_program(index)[0]} {bpf.tcx_programs(index)}")
        with PathManager() as manager:
            limits = manager.limits()
            # Implicit ones are the kernel's own.
            ends = sorted(str(one) for one in manager.endpoints() if one.flags != Flag.IMPLICIT)
            lines.append(f"MPTCP: {ends} {limits}")
    lines.append(f"cgroup: {attached(node.cgroup)}")
    return "\n".join(line.strip() for line in lines)


def attached(cgroup: Path) -> list[int]:
    """How many programs a cgroup has, of each kind that agents attach: ingress, egress, socket creation, sockops."""
    fd = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY)
    try:
        counts = [ctypes.c_uint32() for _ in range(4)]
        for kind, count in enumerate(counts):
            assert not LIBBPF.bpf_prog_query(fd, kind, 0, None, None, ctypes.byref(count))
        return [count.value for count in counts]
    finally:
        os.close(fd)
