"""Daemons of before: what one leaves behind when it is killed, the one of today takes over."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest

from crablb.errors import KernelError
from crablb.kernel import bpf
from crablb.lab import VIP4, VIP6
from crablb.lab.demo import VIPS, crablb
from tests.helpers.earlier import compiled
from tests.helpers.namespaces import inside
from tests.helpers.processes import answer, exchange
from tests.helpers.world import World, status

pytestmark = [pytest.mark.long, pytest.mark.xdist_group("upgrade")]

#: The first revision whose pins, maps and numbers mean what they mean today.
OLD = "98157ce405a8f6c225595363775366e3dcd4096d"
SERVICE = f"tcp://{VIP4}:80=10.0.0.11,10.0.0.12,10.0.0.13"


@pytest.fixture(scope="session")
def old(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """``crablb`` of then, compiled here."""
    return compiled(OLD, tmp_path_factory.mktemp("old"))


def attached(world: World) -> int:
    """The id of the XDP program on the load balancer's interface."""
    with inside(world.lab.lb.netns):
        return bpf.xdp_program(socket.if_nametoindex("eth0"))[0]


def test_a_daemon_of_before_is_taken_over(make_world: Callable[..., World], old: list[str]):
    """Its flows go on while it is dead and when it has been replaced, also those to a backend that is no more."""
    world = make_world(servers=3, offload=False)
    world.servers(dsr=True)
    first = world.serve("--ack-bypass", "on", what=[SERVICE], program=old)
    assert f"process {first.pid}" in world.lab.lb.run(*old, "status", "--iface", "eth0").stdout
    held = world.python(world.lab.client, "hold_many", str(VIP4), "80", "60", ready=True)
    assert exchange(held, "one") == "60"
    first.kill()
    first.wait()
    assert exchange(held, "two") == "60"
    before = attached(world)
    world.serve("--ack-bypass", "on", what=[SERVICE.replace("10.0.0.11,", "")])
    log = (world.folder / "serve.log").read_text()
    assert "took over from a load balancer that had died" in log
    assert '"flows": 60' in log
    assert attached(world) not in (0, before)
    assert exchange(held, "three") == "60"
    now = status(world.lab)
    assert now["flows"] == 60
    assert {world.echo(VIP4, "10")["server"] for _ in range(6)} <= {"server2", "server3"}


def test_a_daemon_that_knows_no_takeover_goes_on(make_world: Callable[..., World], old: list[str]):
    """Who asks for one is told so."""
    world = make_world(servers=3, offload=False)
    world.servers(dsr=True)
    first = world.serve(what=[SERVICE], program=old)
    held = world.python(world.lab.client, "hold_many", str(VIP4), "80", "30", ready=True)
    before = attached(world)
    serve = crablb("serve", "--iface", "eth0", "--service", SERVICE, "--check", "none", "--takeover")
    done = world.lab.lb.run(*serve, check=False)
    assert done.returncode == 2
    assert f"process {first.pid} serves eth0 and cannot be taken over" in done.stderr
    assert "of a version before" in done.stderr
    assert first.poll() is None
    assert attached(world) == before
    assert exchange(held, "one") == "30"
    world.echo(VIP4, "10")


def test_and_takes_over_in_its_turn(make_world: Callable[..., World], old: list[str]):
    """Who goes back to the version before loses nothing either."""
    world = make_world(servers=3, offload=False)
    world.servers(dsr=True)
    first = world.serve("--ack-bypass", "on", what=[SERVICE])
    held = world.python(world.lab.client, "hold_many", str(VIP4), "80", "30", ready=True)
    assert exchange(held, "one") == "30"
    first.kill()
    first.wait()
    world.serve("--ack-bypass", "on", what=[SERVICE], program=old)
    assert '"flows": 30' in (world.folder / "serve.log").read_text()
    assert exchange(held, "two") == "30"


def test_a_client_agent_of_before_is_taken_over(make_world: Callable[..., World], old: list[str]):
    """Its connections go on to their end, and the operator's routes are what they were before it."""
    world = make_world()
    world.servers()
    world.serve()
    client = world.lab.client
    shown = "ip rule; ip route show table all; ip -6 route show table all; tc qdisc"
    before = client.run("sh", "-c", shown).stdout
    args = ["--backends", "10.0.0.0/24", "--backends", "fd00::/64", "--cgroup", str(client.cgroup), "--detach"]
    vips = [word for vip in VIPS for word in ("--vip", vip)]
    client.run(*old, "agent", "client", *vips, *args)
    held = [world.python(client, "hold", str(vip), "80", ready=True) for vip in (VIP4, VIP6)]
    with pytest.raises(KernelError, match="is of another version, and has 2 connections"):
        world.client()
    remove = world.program(client, *crablb("agent", "remove", "client"))
    assert answer(remove) == "client: offers no more; 2 connections left, to go on"
    for one in held:
        assert exchange(one, "one") == "one"
        one.communicate()
    assert answer(remove) == "client: removed"
    agent = world.client()
    assert world.echo(VIP4, "10")["accepted_on"] == "10.0.0.11"
    told = client.run("ip", "route", "show", str(VIP4)).stdout
    assert told.split() == ["10.0.0.100", "via", "10.0.0.2", "dev", "eth0"]
    agent.terminate()
    assert agent.wait() == 0
    assert client.run("sh", "-c", shown).stdout == before
