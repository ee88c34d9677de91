"""What servers tell load balancers about their connections."""

from __future__ import annotations

import pytest

from crablb.lab import VIP4, VIP6
from crablb.lab.demo import agent_status, crablb
from tests.conftest import World, until
from tests.test_fallback import exchange


def counted(world: World, vip: str = f"tcp://{VIP4}:80") -> int:
    return int(agent_status(world.lab.servers[0])["server"]["connections"][vip])


def seen_by_ss(world: World) -> int:
    states = ["state", "established", "state", "close-wait"]
    out = world.lab.servers[0].run("ss", "-Htn", *states, "sport", "=", ":80").stdout
    return len(out.splitlines())


@pytest.mark.parametrize("prepared", [True, False], ids=["redirected", "fallback"])
def test_connections_are_counted_exactly(make_world, prepared):
    """After a storm of opens, closes, resets and killed processes: what ss says."""
    world = make_world(offload=False)
    world.servers(dsr=True)
    world.serve()
    if prepared:
        world.client()
    assert counted(world) == 0
    held = [world.python(world.lab.client, "hold_many", str(VIP4), "80", "40", ready=True) for _ in range(2)]
    until(lambda: counted(world) == 80)
    assert seen_by_ss(world) == 80
    storm = world.python(world.lab.client, "storm", str(VIP4), "80", "300")
    assert storm.wait(60) == 0, storm.stderr.read()
    until(lambda: counted(world) == 80)
    assert seen_by_ss(world) == 80
    held[0].kill()
    until(lambda: counted(world) == 40)
    assert seen_by_ss(world) == 40
    assert exchange(held[1], "still") == "40"
    # An agent that is replaced goes on counting the connections that there are.
    server = world.lab.servers[0]
    server.run("kill", "-9", str(agent_status(server)["server"]["pid"]))
    vips = [part for vip in (f"tcp://{VIP4}:80", f"tcp://[{VIP6}]:80") for part in ("--vip", vip)]
    until(lambda: not agent_status(server)["server"]["pid"])
    server.run(*crablb("agent", "server", *vips, "--dsr", "--detach"))
    assert counted(world) == 40
    assert counted(world, f"tcp://[{VIP6}]:80") == 0
    assert world.echo(VIP6, "10")["intact"]
    until(lambda: counted(world, f"tcp://[{VIP6}]:80") == 0)
    for pid in world.lab.servers[0].processes():
        command = world.lab.servers[0].run("cat", f"/proc/{pid}/cmdline", check=False).stdout
        if "tests.peers" in command:
            world.lab.servers[0].run("kill", "-9", str(pid))
    until(lambda: counted(world) == 0)
