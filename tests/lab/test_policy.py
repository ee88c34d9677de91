"""Policies, end to end."""

from __future__ import annotations

from ipaddress import ip_address

from crablb.model import Vip
from tests.helpers.processes import until
from tests.helpers.world import status
from tests.reference.round_robin import smooth

VIP = Vip(ip_address("10.0.0.100"), 80)


def test_redirected_by_turns(make_world):
    """Thirty connections, three servers, two of them twice as heavy: by the smooth round robin to the connection."""
    world = make_world(servers=3)
    world.servers()
    world.client()
    backends = ",".join(f"{s.ip4}*{w}" for s, w in zip(world.lab.servers, (1, 2, 2), strict=True))
    world.serve("--policy", "weighted-round-robin", what=[f"tcp://{VIP.address}:80={backends}"])
    got = [world.echo(VIP.address, "10")["server"] for _ in range(10)]
    expected = [f"server{1 + i}" for i in smooth([1, 2, 2])] * 2
    assert got == expected
    assert status(world.lab)["total"]["redirected"] == 10


def test_a_policy_beside_the_configuration(make_world):
    """The first octets choose; it fails for a while, and nobody notices but the log and the counter."""
    world = make_world(servers=3)
    world.servers()
    world.client()
    (world.folder / "crab_test_policy.py").write_text(
        "from pathlib import Path\n"
        "def choose(batch, backends):\n"
        f"    if Path({str(world.folder)!r}, 'fail').exists():\n"
        "        raise OSError('told to')\n"
        "    return [1] * len(batch)\n"
    )
    path = world.folder / "lb.toml"
    backends = ", ".join(f'"{s.ip4}"' for s in world.lab.servers)
    path.write_text(
        'interface = "eth0"\n[[service]]\naddress = "tcp://10.0.0.100:80"\npolicy = "crab_test_policy:choose"\n'
        f"backends = [{backends}]\n"
    )
    world.serve(config=path)
    assert {world.echo(VIP.address, "10")["server"] for _ in range(5)} == {"server2"}
    (world.folder / "fail").touch()
    assert len({world.echo(VIP.address, "10")["server"] for _ in range(12)}) > 1
    until(lambda: status(world.lab)["daemon"]["policy_failed"] == 12)
    (world.folder / "fail").unlink()
    assert {world.echo(VIP.address, "10")["server"] for _ in range(5)} == {"server2"}
    assert "policy failed" in (world.folder / "serve.log").read_text()
    assert status(world.lab)["total"]["redirected"] == 22
