"""VIPs that are answered for, on a client's segment."""

from __future__ import annotations

import json

import pytest

from crablb.lab import VIP4, VIP6
from tests.helpers.processes import until
from tests.helpers.world import status


def test_clients_find_the_vip(make_world):
    """The VIPs are on the client's segment, and nobody has a route to them."""
    world = make_world("bridge", servers=2)
    world.servers(dsr=True)
    world.lab.client.ip(f"route del {VIP4}/32", f"route del {VIP6}/128")
    world.serve("--announce", "arp")
    log = world.folder / "serve.log"
    until(lambda: log.read_text().count('"announced"') == 2)
    for vip in (VIP4, VIP6):
        assert world.echo(vip)["accepted_on"] == str(vip)
        neighbour = json.loads(world.lab.client.run("ip", "-j", "neigh", "show", str(vip)).stdout)
        assert neighbour[0]["lladdr"] == world.lab.lb.mac()
    world.client()
    for vip in (VIP4, VIP6):
        assert world.echo(vip)["accepted_on"] != str(vip)
    assert status(world.lab)["total"]["redirected"] == 2


def test_takeover_is_told(make_world):
    """A client that has an old entry learns the new one at once."""
    world = make_world("bridge")
    world.servers(dsr=True)
    client = world.lab.client
    client.ip(f"route del {VIP4}/32", f"route del {VIP6}/128")
    for vip in (VIP4, VIP6):
        client.ip(f"neigh replace {vip} lladdr 02:00:00:00:99:99 nud stale dev eth0")
    world.serve("--announce", "arp")
    mac = world.lab.lb.mac()
    for vip in (VIP4, VIP6):
        until(lambda v=vip: mac in client.run("ip", "neigh", "show", str(v)).stdout)


@pytest.mark.parametrize("family", [4, 6])
def test_an_address_in_use_is_not_taken(make_world, family):
    """It is named in the log; the other VIP is served."""
    world = make_world("bridge", servers=2)
    world.servers(dsr=True)
    world.lab.client.ip(f"route del {VIP4}/32", f"route del {VIP6}/128")
    taken, free = (VIP4, VIP6) if family == 4 else (VIP6, VIP4)
    other = world.lab.servers[1]
    other.ip(f"addr add {taken}/{24 if family == 4 else 64} dev eth0" + (" nodad" if family == 6 else ""))
    if family == 4:
        other.set({"net.ipv4.conf.all.arp_ignore": 0})
    world.serve("--announce", "arp", what=[f"tcp://{VIP4}:80=10.0.0.11", f"tcp://[{VIP6}]:80=fd00::11"])
    log = world.folder / "serve.log"
    until(lambda: '"announced"' in log.read_text())
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    (conflict,) = [e for e in entries if e["event"].startswith("somebody else")]
    assert status(world.lab)["daemon"]["vips_in_use"] == 1
    assert (conflict["vip"], conflict["mac"], conflict["level"]) == (str(taken), other.mac(), "error")
    assert [e["vip"] for e in entries if e["event"] == "announced"] == [str(free)]
    assert world.echo(free)["server"] == "server1"
