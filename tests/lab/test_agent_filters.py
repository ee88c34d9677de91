"""The client agent's programs beside other people's, on the ingress of an interface and on a cgroup."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from crablb.agent import ClientAgent
from crablb.config import parse_prefix, parse_vip
from crablb.kernel import bpf, pins
from crablb.kernel.bpf.programs import BPF_TCX_INGRESS
from crablb.lab import VIP4, Node
from crablb.lab.demo import crablb
from tests.helpers.namespaces import inside
from tests.helpers.processes import exchange, until
from tests.helpers.world import World, agent_status

# linux/bpf.h; asm/unistd_64.h
SYS_BPF, BPF_PROG_ATTACH, BPF_PROG_DETACH, BPF_CGROUP_SOCK_OPS = 321, 8, 9, 3


@pytest.fixture
def world(make_world: Callable[..., World]) -> World:
    world = make_world()
    world.servers()
    world.serve()
    return world


@pytest.fixture(scope="session")
def accepting(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Somebody's tc program: it ends the chain, and the packet goes on its way."""
    source = tmp_path_factory.mktemp("tc") / "ok.bpf.c"
    source.write_text('__attribute__((section("tc"), used)) int ok(void *c) { return 0; }\n')
    target = source.with_suffix(".o")
    subprocess.run(["clang", "-target", "bpf", "-O2", "-c", source, "-o", target], check=True)
    return target


def redirected(world: World) -> bool:
    return world.echo(VIP4, "10")["accepted_on"] == world.lab.servers[0].ip4


def repair(node: Node) -> subprocess.CompletedProcess[str]:
    return node.run(*crablb("agent", "repair"), check=False)


@pytest.mark.long
def test_a_filter_that_ends_the_chain(world: World, accepting: Path):
    client = world.lab.client
    world.client()
    client.run("tc", "qdisc", "add", "dev", "eth0", "clsact")
    client.run("tc", "filter", "add", "dev", "eth0", "ingress", "pref", "1", "bpf", "da", "obj", accepting, "sec", "tc")
    assert redirected(world)
    client.run("tc", "qdisc", "del", "dev", "eth0", "clsact")
    assert redirected(world)


@pytest.mark.long
def test_a_tcx_program_behind(world: World, accepting: Path):
    client = world.lab.client
    world.client()
    with inside(client.netns), bpf.Object(accepting) as loaded:
        index = socket.if_nametoindex("eth0")
        with loaded.program("ok")._link(index, BPF_TCX_INGRESS, "tcx"):
            assert redirected(world)


@pytest.mark.long
def test_a_tcx_program_in_front(world: World, accepting: Path):
    """It is told, and mended when asked: what is open gets its packets again."""
    client = world.lab.client
    agent = world.client()
    held = world.python(client, "hold", str(VIP4), "80", ready=True)
    agent.kill()
    agent.wait()
    with inside(client.netns), bpf.Object(accepting) as loaded:
        index = socket.if_nametoindex("eth0")
        with loaded.program("ok").attach_tcx(index):
            number = loaded.program("ok").id
            said = f"on eth0 the tc program with id {number} comes before the agent's"
            assert agent_status(client, 1)["client"]["faults"] == [said]
            done = repair(client)
            assert (done.returncode, done.stdout) == (0, f"mended; it was: {said}\n")
            assert len(bpf.tcx_programs(index)) == 2
            assert exchange(held, "one") == "one"
            assert redirected(world)
        assert exchange(held, "two") == "two"
    held.communicate()
    assert client.run(*crablb("agent", "remove")).returncode == 0
    with inside(client.netns):
        assert bpf.tcx_programs(index) == []


@pytest.mark.long
def test_the_agents_process_goes_in_front(world: World, accepting: Path):
    """Once: of two that both insist on it none would ever rest."""
    client = world.lab.client
    world.client()
    with inside(client.netns), bpf.Object(accepting) as loaded:
        index = socket.if_nametoindex("eth0")
        with loaded.program("ok").attach_tcx(index):
            client.run("tc", "qdisc", "add", "dev", "eth0", "clsact")  # an event: it looks at once
            until(lambda: bpf.tcx_programs(index)[0] != loaded.program("ok").id)
            assert redirected(world)


@pytest.mark.long
def test_what_is_detached_is_attached_again(world: World):
    client = world.lab.client
    world.client()
    held = world.python(client, "hold", str(VIP4), "80", ready=True)
    with inside(client.netns):
        folder = pins.folder("client")
        for pin in (*folder.glob("ingress-*"), folder / "link"):
            with bpf.Link.from_pin(pin) as link:
                link.detach()
    done = repair(client)
    assert done.returncode == 0
    assert {
        "mended; it was: the agent's program is not attached to lo",
        f"mended; it was: the program that offers is not attached to cgroup {client.cgroup}",
    } <= set(done.stdout.splitlines())
    assert exchange(held, "still here") == "still here"
    assert redirected(world)


@pytest.mark.long
def test_an_interface_that_is_made_anew(world: World):
    """As when a driver is loaded again: the name is the old one, the interface is not."""
    client = world.lab.client
    world.client()
    client.ip("link del eth0")
    client.ip(f"link add eth0 type veth peer name client netns {world.lab.middle.netns}")
    world.lab.middle.ip("link set client master br0 up")
    client.ip("link set eth0 up", f"addr add {client.ip4}/24 dev eth0", f"addr add {client.ip6}/64 dev eth0 nodad")
    client.ip(f"route add {VIP4} via {world.lab.lb.ip4}")
    with inside(client.netns):
        index = socket.if_nametoindex("eth0")
        until(lambda: bpf.tcx_programs(index))
    until(lambda: "encap" in client.run("ip", "route", "get", str(VIP4)).stdout)
    assert redirected(world)


@pytest.fixture
def without_tcx(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Linux before 6.6."""

    def refuse(self: bpf.Program, ifindex: int) -> bpf.Link:
        raise bpf.BpfError("cannot attach", errno.EINVAL)

    monkeypatch.setattr(bpf.Program, "attach_tcx", refuse)


@pytest.fixture
def in_client(world: World, without_tcx: None) -> Iterator[Callable[[], ClientAgent]]:
    """Agents in this process, in the client's network namespace."""
    client = world.lab.client
    with inside(client.netns):
        yield lambda: ClientAgent([parse_vip(f"tcp://{VIP4}:80")], [parse_prefix("10.0.0.0/24")], cgroup=client.cgroup)
        ClientAgent.remove()


@pytest.mark.long
def test_filters_of_clsact(world: World, in_client: Callable[[], ClientAgent], accepting: Path):
    """On kernels without tcx: in front of all filters there are, mended, replaced in place, taken away."""
    client = world.lab.client
    before = client.run("tc", "qdisc").stdout
    in_client().install()
    shown = client.run("tc", "filter", "show", "dev", "eth0", "ingress").stdout
    assert "pref 1 bpf" in shown and "crab_ingress" in shown
    client.run("tc", "filter", "add", "dev", "eth0", "ingress", "pref", "2", "bpf", "da", "obj", accepting, "sec", "tc")
    assert redirected(world)
    held = world.python(client, "hold", str(VIP4), "80", ready=True)
    in_client().install()
    assert client.run("tc", "filter", "show", "dev", "eth0", "ingress").stdout.count("handle 0x4352") == 1
    assert exchange(held, "one") == "one"
    assert ClientAgent.faults() == []
    client.run("tc", "qdisc", "del", "dev", "eth0", "clsact")
    assert ClientAgent.faults() == ["the agent's program is not attached to eth0"]
    assert ClientAgent.repair() == ["the agent's program is not attached to eth0"]
    assert exchange(held, "two") == "two"
    held.communicate()
    ClientAgent.remove()
    assert client.run("tc", "qdisc").stdout == before


@pytest.mark.long
def test_clsact_beside_a_filter_of_another_kind(world: World, in_client: Callable[[], ClientAgent]):
    """A priority holds filters of one kind only: the next one is taken, and what others have stays."""
    client = world.lab.client
    client.run("tc", "qdisc", "add", "dev", "eth0", "clsact")
    filters = ["tc", "filter", "show", "dev", "eth0", "ingress"]
    client.run(
        "tc", "filter", "add", "dev", "eth0", "ingress", "pref", "1", "u32", "match", "u32", "0", "0", "classid", "1:1"
    )
    before = client.run(*filters).stdout
    in_client().install()
    assert "pref 2 bpf" in client.run(*filters).stdout
    ClientAgent.remove()
    assert client.run(*filters).stdout == before


def bpf_call(command: int, cgroup: Path, program: int) -> None:
    """bpf(2) about a cgroup's sock_ops program, without flags: no other one beside it."""
    libc = ctypes.CDLL(None, use_errno=True)
    directory = os.open(cgroup, os.O_RDONLY)
    attr = struct.pack("=4I", directory, program, BPF_CGROUP_SOCK_OPS, 0)
    try:
        assert libc.syscall(SYS_BPF, command, attr, len(attr)) == 0, os.strerror(ctypes.get_errno())
    finally:
        os.close(directory)


@pytest.mark.long
def test_a_cgroup_with_a_program_that_suffers_no_other(world: World):
    """The kernel says EPERM, and root is told what it means."""
    client = world.lab.client
    before = client.run("sh", "-c", "ip rule; ip route show table all; tc qdisc").stdout
    child = client.cgroup / "child"
    child.mkdir()
    with bpf.Object(bpf.object_path("server")) as loaded:
        alone = loaded.program("crab_server")
        number = alone.id
        bpf_call(BPF_PROG_ATTACH, client.cgroup, alone.fd)
        try:
            args = ["client", "--vip", f"tcp://{VIP4}:80", "--backends", "10.0.0.0/24", "--cgroup", str(child)]
            done = client.run(*crablb("agent", *args, "--detach"), check=False)
        finally:
            bpf_call(BPF_PROG_DETACH, client.cgroup, alone.fd)
            child.rmdir()
    assert done.returncode == 2
    assert f"program crab_server (id {number}) is attached to {client.cgroup} without BPF_F_ALLOW_MULTI" in done.stderr
    assert "run as root" not in done.stderr
    assert agent_status(client) == {}
    assert client.run("sh", "-c", "ip rule; ip route show table all; tc qdisc").stdout == before


@pytest.mark.long
def test_offers_that_nobody_takes_up_are_told(make_world: Callable[..., World]):
    """As where backends' packets come in by another interface than the agent looks at."""
    world = make_world()
    world.servers(agents=False, dsr=False)
    world.serve("--mode", "never")
    world.client()
    world.echoes(VIP4, 5)
    (fault,) = agent_status(world.lab.client, 1)["client"]["faults"]
    assert fault.startswith(f"tcp://{VIP4}:80: 5 offers in the last minute, and no redirect:")
