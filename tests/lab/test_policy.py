"""Policies, end to end."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from crablb.model import Vip
from tests.helpers.processes import until
from tests.helpers.world import status
from tests.reference.round_robin import smooth

VIP = Vip(ip_address("10.0.0.100"), 80)


@pytest.mark.long
def test_redirected_by_turns(standing):
    """Thirty connections, three servers, two of them twice as heavy: by the smooth round robin to the connection."""
    world = standing(servers=3)
    world.client()
    backends = ",".join(f"{s.ip4}*{w}" for s, w in zip(world.lab.servers, (1, 2, 2), strict=True))
    world.serve("--policy", "weighted-round-robin", what=[f"tcp://{VIP.address}:80={backends}"])
    got = [seen["server"] for seen in world.echoes(VIP.address, 10)]
    expected = [f"server{1 + i}" for i in smooth([1, 2, 2])] * 2
    assert got == expected
    assert status(world.lab)["total"]["redirected"] == 10


@pytest.mark.long
def test_a_policy_beside_the_configuration(standing):
    """The first octets choose; it fails for a while, and nobody notices but the log and the counter."""
    world = standing(servers=3)
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
    assert {seen["server"] for seen in world.echoes(VIP.address, 5)} == {"server2"}
    (world.folder / "fail").touch()
    assert len({seen["server"] for seen in world.echoes(VIP.address, 12)}) > 1
    until(lambda: status(world.lab)["daemon"]["policy_failed"] == 12)
    (world.folder / "fail").unlink()
    assert {seen["server"] for seen in world.echoes(VIP.address, 5)} == {"server2"}
    assert "policy failed" in (world.folder / "serve.log").read_text()
    assert status(world.lab)["total"]["redirected"] == 22
