"""The main job on machines and networks of many kinds: connections by the fallback, and redirected ones."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from crablb.lab import VIP4, VIP6, Lab


@dataclass(frozen=True)
class Place:
    topology: str = "bridge"
    offload: bool = True
    mtu: int = 1500
    serve: tuple[str, ...] = ()


PLACES = {
    "default": Place(),
    "no-offload": Place(offload=False),
    "routed": Place("routed"),
    "generic": Place(offload=False, serve=("--xdp-mode", "generic")),
    "mtu-1280": Place(mtu=1280),
}


def narrow(lab: Lab, mtu: int) -> None:
    for name, node in lab.nodes.items():
        if node is not lab.middle:
            lab.middle.ip(f"link set {name} mtu {mtu}")
            node.ip(f"link set eth0 mtu {mtu}")


@pytest.mark.parametrize("name", PLACES)
def test_connections(make_world, name):
    place = PLACES[name]
    world = make_world(place.topology, 2, offload=place.offload)
    narrow(world.lab, place.mtu)
    world.servers(dsr=True)
    world.serve(*place.serve)
    for vip in (VIP4, VIP6):
        seen = world.echo(vip, "300000")
        assert (seen["intact"], seen["accepted_on"]) == (True, str(vip))
    world.client()
    own = {str(address) for server in world.lab.servers for address in (server.ip4, server.ip6)}
    for vip in (VIP4, VIP6):
        seen = world.echo(vip, "300000")
        assert seen["intact"]
        assert seen["accepted_on"] in own
