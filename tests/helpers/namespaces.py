"""Network namespaces: in and out, and a bare one with a cable."""

from __future__ import annotations

import ctypes
import itertools
import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from crablb.kernel import pins

CLONE_NEWNET = 0x40000000
_numbers = itertools.count()


def unique() -> str:
    """A name that no other test, nor another run of the tests, has for its lab or namespace."""
    return f"t{os.getpid()}-{next(_numbers)}"


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
        sock.settimeout(60)
        return sock

    @classmethod
    @contextmanager
    def made(cls) -> Iterator[Pair]:
        """A new one, which this thread is in while in the context."""
        pair = cls(f"crab-{unique()}")
        subprocess.run(["ip", "netns", "add", pair.netns], check=True)
        try:
            with inside(pair.netns):
                Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").write_text("1")
                Path("/proc/sys/net/ipv4/ip_forward").write_text("0")  # a new one has the machine's word
                pair.ip("link", "set", "lo", "up")
                pair.ip("link", "add", "veth0", "type", "veth", "peer", "name", "veth1")
                pair.ip("link", "set", "veth0", "up")
                pair.ip("link", "set", "veth1", "up")
                yield pair
        finally:
            subprocess.run(["ip", "netns", "del", pair.netns], check=True)


class Island:
    """Processes, network namespaces and pins of its own: a command that works in all there are sees no others."""

    def __init__(self, folder: Path) -> None:
        (folder / "run").mkdir()
        (folder / "bpf").mkdir()
        private = (
            f"mount --bind {folder}/run /run/crablb; mount -t bpf bpf /sys/fs/bpf; mount -t tmpfs none /run/netns"
            "; ip link set lo up; echo ready; exec cat"
        )
        pins.RUN.mkdir(parents=True, exist_ok=True)
        Path("/run/netns").mkdir(parents=True, exist_ok=True)
        unshared = [
            "unshare",
            "--mount",
            "--net",
            "--pid",
            "--fork",
            "--kill-child",
            "--mount-proc",
            "sh",
            "-ec",
            private,
        ]
        self._first = subprocess.Popen(unshared, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self._first.stdout
        assert self._first.stdout.readline() == "ready\n"
        (child,) = Path(f"/proc/{self._first.pid}/task/{self._first.pid}/children").read_text().split()
        self._enter = ["nsenter", "--target", child, "--mount", "--pid", "--net", "--"]
        self._started: list[subprocess.Popen[str]] = []

    def run(self, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*self._enter, *args], text=True, capture_output=True, check=check)

    def popen(self, *args: str) -> subprocess.Popen[str]:
        """Its pid is nsenter's, whose child it is: end it by :meth:`kill`."""
        child = subprocess.Popen(
            [*self._enter, *args], text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self._started.append(child)
        return child

    def ip(self, *lines: str, netns: str = "") -> None:
        for line in lines:
            self.run("ip", *(["-n", netns] if netns else []), *line.split())

    def __enter__(self) -> Island:
        return self

    def __exit__(self, *_: object) -> None:
        """The first process takes all the others with it, and with them what is theirs."""
        self._first.kill()
        self._first.communicate()
        for child in self._started:
            child.communicate()
