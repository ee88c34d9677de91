"""Every MTU that a segment may have: short ones, and packets that do not fit into a page, let alone an AF_XDP frame."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from crablb.kernel import bpf
from crablb.lab import VIP4, VIP6
from tests.helpers.namespaces import inside
from tests.helpers.processes import exchange, until
from tests.helpers.programs import several_buffers
from tests.helpers.world import World, agent_status, status

pytestmark = pytest.mark.long

SIZE = "2000000"


def set_mtu(world: World, mtu: int) -> None:
    lab = world.lab
    cables = [node for node in lab.nodes.values() if node is not lab.middle]
    lab.middle.ip(*(f"link set {node.name} mtu {mtu}" for node in cables), f"link set br0 mtu {mtu}")
    for node in cables:
        node.ip(f"link set eth0 mtu {mtu}")


def lost(now: dict[str, Any]) -> dict[str, int]:
    return {name: n for name, n in now["total"].items() if n and name.startswith(("drop", "xsk"))}


@several_buffers
@pytest.mark.parametrize("mtu", [1280, 1500, 3000, 9000])
@pytest.mark.parametrize(("mode", "bypass"), [("native-offload", "auto"), ("native", "off"), ("generic", "auto")])
def test_from_the_start(make_world, mtu, bypass, mode):
    """Native mode at any MTU; with the bypass packets do not enter user space, without it they arrive all the same."""
    mode, _, offload = mode.partition("-")
    world = make_world(offload=bool(offload))
    set_mtu(world, mtu)
    world.servers()
    world.serve("--xdp-mode", mode, "--ack-bypass", bypass)
    for vip in (VIP4, VIP6):
        assert world.echo(vip, SIZE)["intact"]
    now = status(world.lab)
    assert lost(now) == {}
    forwarded = now["xdp"]["flow"] if bypass == "auto" else now["total"]["fallback_established"]
    assert forwarded >= 2 * int(SIZE) // mtu


@several_buffers
@pytest.mark.parametrize("mtu", [3000, 9000])
def test_raised_while_it_serves(make_world, mtu):
    """And the daemon dies: known flows go on, whatever their packets' size."""
    world = make_world()
    world.servers()
    first = world.serve()
    set_mtu(world, mtu)
    for vip in (VIP4, VIP6):
        assert world.echo(vip, SIZE)["intact"]
    assert lost(status(world.lab)) == {}
    held = world.python(world.lab.client, "hold_many", str(VIP4), "80", "5", ready=True)
    word = "x" * 20000
    assert exchange(held, word) == "5"
    first.kill()
    first.wait()
    assert exchange(held, word) == "5"
    world.serve()
    assert exchange(held, word) == "5"


@several_buffers
def test_through_a_tunnel(make_world):
    world = make_world("routed")
    set_mtu(world, 9000)
    world.servers(dsr=True)
    world.serve()
    (server,) = world.lab.servers
    with inside(server.netns):
        assert bpf.xdp_program(socket.if_nametoindex("eth0"))[1] == "native"
    for vip in (VIP4, VIP6):
        assert world.echo(vip, SIZE)["intact"]
    now = status(world.lab)
    assert lost(now) == {}
    assert now["xdp"]["flow"] >= 2 * int(SIZE) // 9000
    assert agent_status(server)["server"]["counters"]["dsr_decapsulated"] >= 2 * int(SIZE) // 9000


def test_what_the_kernel_drops_is_counted(make_world):
    """In front of a worker that does not come to it: its ring is full, and `status` says so."""
    world = make_world(offload=False)
    child = world.serve("--busy-poll", "0")
    lab = world.lab
    child.send_signal(19)
    flood = world.python(lab.client, "flood", str(VIP4), lab.lb.mac(), "10000")
    out, err = flood.communicate(timeout=300)
    child.send_signal(18)
    assert flood.returncode == 0, err
    assert int(out) >= 9000

    def dropped() -> int:
        total = status(lab)["total"]
        return int(total["xsk_rx_dropped"] + total["xsk_rx_full"])

    until(lambda: dropped() > 5000)
    assert status(lab)["total"]["received"] + dropped() == status(lab)["xdp"]["syn"]
