"""Interfaces that are renamed, or that take another one's name: what stands under a name is of the one that has it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from crablb import LoadBalancer
from crablb.dataplane import attachment
from crablb.kernel import bpf, ethtool, pins
from tests.helpers.namespaces import Pair
from tests.helpers.processes import ROOT, until

SERVICE = "tcp://10.0.0.100:80=10.0.0.11"
DEAD = """
import os, signal, sys
from crablb import LoadBalancer
LoadBalancer(sys.argv[2:], [sys.argv[1]], seed=bytes(16), flows=64).__enter__()
os.kill(os.getpid(), signal.SIGKILL)
"""


def died(*interfaces: str) -> None:
    """A load balancer of these is killed."""
    args = [sys.executable, "-c", DEAD, SERVICE, *interfaces]
    done = subprocess.run(args, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == -9, done.stderr


def rename(namespace: Pair, old: str, new: str) -> None:
    namespace.ip("link", "set", old, "down")
    namespace.ip("link", "set", old, "name", new)
    namespace.ip("link", "set", new, "up")


def folders() -> set[str]:
    return {path.name for path in (pins.root() / pins.namespace()).glob("lb*")}


def of(role: str) -> int:
    """The interface whose program is pinned there."""
    with bpf.Link.from_pin(pins.folder(role) / "link") as link:
        return link.target


@pytest.fixture
def wired(namespace: Pair) -> Pair:
    namespace.ip("address", "add", "10.0.0.2/24", "dev", "veth0")
    namespace.ip("neighbor", "add", "10.0.0.11", "lladdr", "02:00:00:00:00:0b", "dev", "veth0", "nud", "permanent")
    namespace.ip("link", "add", "veth2", "type", "veth", "peer", "name", "veth3")
    for name in ("veth2", "veth3"):
        namespace.ip("link", "set", name, "up")
    return namespace


def balancer(*interfaces: str) -> LoadBalancer:
    return LoadBalancer(interfaces, [SERVICE], seed=bytes(16), flows=64)


def test_renamed_while_the_load_balancer_is_dead(wired: Pair):
    died("veth0")
    index = socket.if_nametoindex("veth0")
    program = bpf.xdp_program(index)[0]
    rename(wired, "veth0", "wan.1")
    assert program and bpf.xdp_program(index)[0] == program
    with balancer("wan.1"):
        assert folders() == {"lb-wan%2e1"} and of("lb-wan.1") == index
    assert bpf.xdp_program(index)[0] == 0
    assert folders() == set()


def test_two_that_exchanged_their_names_meanwhile(wired: Pair):
    died("veth0", "veth2")
    before = {name: socket.if_nametoindex(name) for name in ("veth0", "veth2")}
    for old, new in (("veth0", "other"), ("veth2", "veth0"), ("other", "veth2")):
        rename(wired, old, new)
    assert subprocess.run(
        [sys.executable, "-m", "crablb", "remove", "--iface", "veth0"], cwd=ROOT, capture_output=True, check=True
    )
    assert bpf.xdp_program(before["veth2"])[0] == 0 != bpf.xdp_program(before["veth0"])[0]
    with balancer("veth2"):
        assert of("lb-veth2") == before["veth0"]
    assert folders() == set()


def test_one_takes_the_name_of_one_that_is_gone(wired: Pair):
    """Both are served; when the first comes back, by another name at first, it is served as well."""
    with balancer("veth0", "veth2") as lb:
        second = socket.if_nametoindex("veth2")
        wired.ip("link", "del", "veth0")
        rename(wired, "veth2", "veth0")
        until(lambda: folders() == {"lb-veth0"} and of("lb-veth0") == second)
        assert pins.owner("lb-veth0") == os.getpid() and pins.owner("lb-veth2") is None
        rename(wired, "veth0", "veth2")
        until(lambda: folders() == {"lb-veth2"} and of("lb-veth2") == second)
        wired.ip("link", "add", "veth0", "type", "veth", "peer", "name", "veth1")
        for name in ("veth1", "veth0"):
            wired.ip("link", "set", name, "up")
        until(lambda: folders() == {"lb-veth0", "lb-veth2"} and (pins.folder("lb-veth0") / "link").exists())
        assert of("lb-veth0") == socket.if_nametoindex("veth0")
        assert pins.owner("lb-veth0") == pins.owner("lb-veth2") == os.getpid()
        assert lb.statistics()
    assert folders() == set()
    assert pins.owner("lb-veth0") is None


def test_an_offload_that_cannot_be_put_back_is_not_forgotten(wired: Pair, monkeypatch: pytest.MonkeyPatch):
    noted = attachment._offloads("veth0")
    noted.write_text("rx-vlan-hw-parse rx-vlan-stag-hw-parse")
    switched: list[str] = []

    def switch(name: str, feature: str, *, on: bool) -> None:
        if feature == "rx-vlan-hw-parse" and not switched:
            raise OSError(16, "Device or resource busy")
        switched.append(feature)

    monkeypatch.setattr(ethtool, "switch", switch)
    attachment._put_back("veth0")
    assert noted.read_text() == "rx-vlan-hw-parse"
    attachment._put_back("veth0")
    assert not noted.exists() and isinstance(noted, Path)
    assert switched == ["rx-vlan-stag-hw-parse", "rx-vlan-hw-parse"]
