"""Where pins are: by namespace, for as long as it lives, however crablb was started in it."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from crablb import cli
from crablb.agent.base import cgroup_root
from crablb.kernel import bpf, pins
from crablb.lab import VIP4, Lab
from crablb.lab.demo import VIPS, crablb
from tests.helpers.namespaces import inside, unique
from tests.helpers.processes import until
from tests.helpers.world import World, agent_status, command


@pytest.fixture
def lab(make_lab: Callable[..., Lab]) -> Lab:
    return make_lab("bridge")


@pytest.fixture
def netns() -> Iterator[Callable[[], str]]:
    made = []

    def make() -> str:
        made.append(f"crab-{unique()}")
        subprocess.run(["ip", "netns", "add", made[-1]], check=True)
        return made[-1]

    yield make
    for name in made:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def test_a_name_is_of_one_namespace(netns: Callable[[], str]):
    """Also when the kernel gives its inode number out again, as it does soon."""
    names: set[str] = set()
    for _ in range(20):
        name = netns()
        with inside(name):
            assert pins.namespace() not in names
            names.add(pins.namespace())
        subprocess.run(["ip", "netns", "del", name], check=True)
    assert len(names) == 20


def test_looks_that_change_nothing(netns: Callable[[], str], monkeypatch: pytest.MonkeyPatch):
    """Who has which role, and what is pinned: nothing is made, renamed, or locked where the kernel says who has it."""
    with inside(netns()):
        assert (pins.held(), pins.folders()) == ({}, {})
        assert not (pins.root() / pins.namespace()).exists()
        with pins.own("lb-eth0.100", "it"):
            folder = pins.folder("lb-eth0.100")
            folder.mkdir(parents=True)
            assert pins.folders() == {"lb-eth0.100": folder}
            assert pins.held() == {"lb-eth0.100": os.getpid()}
            tried = []
            monkeypatch.setattr(pins, "_locked_by", tried.append)
            assert pins.held() == {"lb-eth0.100": os.getpid()}
            assert not tried
            monkeypatch.undo()
            # As where the list of locks is masked, or leaves others' processes out.
            monkeypatch.setattr(pins, "_holding", lambda files: set())
            assert pins.held() == {"lb-eth0.100": os.getpid()}
            monkeypatch.undo()
            # A version of before named the folder by the namespace's inode number.
            before = pins.root() / str(os.stat("/proc/thread-self/ns/net").st_ino)
            before.unlink(missing_ok=True)
            folder.parent.rename(before)
            assert pins.folders() == {"lb-eth0.100": before / folder.name}
            pins.remove(before / folder.name)
        stale = pins.RUN / f"{pins.namespace()}-lb-eth1.lock"
        stale.touch()
        assert pins.held() == {"lb-eth1": None}
        stale.unlink()


def test_what_a_dead_namespace_left_is_collected(netns: Callable[[], str]):
    """By the next agent or load balancer, in whatever namespace; what lives is let be."""
    dead, alive, here = netns(), netns(), netns()
    for name in (dead, alive):
        args = crablb("agent", "server", "--vip", VIPS[0], "--detach")
        subprocess.run(["nsenter", f"--net=/run/netns/{name}", *args], check=True, capture_output=True)
    paths = {}
    for name in (dead, alive):
        with inside(name):
            paths[name] = pins.folder("server"), pins.RUN / f"{pins.namespace()}-server.json"
    subprocess.run(["ip", "netns", "del", dead], check=True)
    with inside(here), pins.own("server", "a test"):
        pass
    assert [path.exists() for path in paths[dead]] == [False, False]
    assert [path.exists() for path in paths[alive]] == [True, True]
    with inside(alive):
        assert cli.main(["agent", "remove"]) == 0


def test_nothing_is_collected_where_processes_are_hidden(netns: Callable[[], str]):
    """As in a container: those whose pins are there may be among them."""
    other = netns()
    process = subprocess.Popen(["unshare", "--net", "sh", "-c", "echo; exec cat"], stdin=-1, stdout=-1)
    try:
        assert process.stdout and process.stdout.readline()
        args = crablb("agent", "server", "--vip", VIPS[0], "--detach")
        entered = ["nsenter", f"--net=/proc/{process.pid}/ns/net"]  # no name keeps it
        subprocess.run([*entered, *args], check=True, capture_output=True)
        code = "from crablb.kernel import pins\nwith pins.own('server', 'a test'): pass"
        hidden = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", code]
        subprocess.run(["nsenter", f"--net=/run/netns/{other}", *hidden], check=True)
        told = subprocess.run([*entered, *crablb("agent", "status", "--json")], capture_output=True, check=False)
        assert "server" in json.loads(told.stdout)
        subprocess.run([*entered, *crablb("agent", "remove")], check=True, capture_output=True)
    finally:
        process.communicate()


def test_by_ip_netns_exec(lab: Lab):
    """ip gives the command another /sys, which goes with it; the pins are outside."""
    client = lab.client
    inside_it = f"/sys/fs/cgroup/{client.cgroup.relative_to(cgroup_root())}"
    mounted = "mount -t cgroup2 none /sys/fs/cgroup; exec"
    args = crablb("agent", "client", "--vip", VIPS[0], "--backends", "10.0.0.0/24", "--cgroup", inside_it, "--detach")
    subprocess.run(["ip", "netns", "exec", client.netns, "sh", "-c", f"{mounted} {shlex.join(args)}"], check=True)
    with inside(client.netns):
        assert {pin.name for pin in pins.folder("client").glob("*")} >= {"link", "client_flows", "crab_egress"}
    assert "encap bpf" in client.run("ip", "route", "get", str(VIP4)).stdout


def test_where_pins_cannot_last(lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """No --detach, and nothing is left."""
    client = lab.client
    monkeypatch.setattr(bpf, "pins_last", lambda: False)
    before = client.run("ip", "rule").stdout
    with inside(client.netns):
        args = ["client", "--vip", VIPS[0], "--backends", "10.0.0.0/24", "--cgroup", str(client.cgroup)]
        assert cli.main(["agent", *args, "--detach"]) == 2
    assert "what is to stay would go with this mount namespace" in capsys.readouterr().err
    assert agent_status(client) == {}
    assert client.run("ip", "rule").stdout == before


def test_interfaces_with_a_dot(make_world: Callable[..., World]):
    """As VLANs have: at the load balancer, at a server with DSR, at the client."""
    world = make_world()
    lab = world.lab
    for node in (lab.lb, lab.client, lab.servers[0]):
        node.run("ip", "link", "set", "eth0", "down")
        node.run("ip", "link", "set", "eth0", "name", "eth0.100")
        node.run("ip", "link", "set", "eth0.100", "up")
        node.ip(f"addr replace {node.ip6}/64 dev eth0.100 nodad")
    lab.client.ip(f"route replace {VIP4} via {lab.lb.ip4}", f"route replace fd00::100 via {lab.lb.ip6}")
    world.servers(dsr=True)
    world.client()
    serve = crablb("serve", "--iface", "eth0.100", "--service", f"tcp://{VIP4}:80=10.0.0.11")
    for _ in range(2):  # the second takes over from the first
        balancer = world.program(lab.lb, *serve)
        assert balancer.stderr
        for line in balancer.stderr:
            if "serving" in line:
                break
        until(lambda: world.echo(VIP4, "10")["accepted_on"] == "10.0.0.11")
        balancer.send_signal(signal.SIGKILL)
        balancer.wait()


def test_an_interface_with_a_dot_in_its_name(make_world):
    """As VLAN devices have it, and the BPF file system does not: served, taken over, beside an agent, and gone."""
    world = make_world()
    lab, name = world.lab, "eth1.100"
    for node in (lab.lb, lab.servers[0]):
        node.ip(f"link add {name} type veth peer name cable", f"link set {name} up", "link set cable up")
    world.servers(dsr=True)
    first = world.serve("--iface", name)
    first.kill()
    first.wait()
    second = world.serve("--iface", name)
    assert "took over from a load balancer that had died" in (world.folder / "serve.log").read_text()
    assert world.echo(VIP4)["intact"]
    said = json.loads(command(lab.lb, "status", "--iface", name, "--json"))
    assert (said["interface"], said["pid"]) == (name, second.pid)
    second.terminate()
    assert second.wait() == 0
    assert not lab.lb.pins.exists()
