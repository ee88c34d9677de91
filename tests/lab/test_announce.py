"""VIPs that are answered for, on a client's segment."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from crablb.lab import VIP4, VIP6, Node
from crablb.lab.demo import crablb, start_agent, start_serve
from tests.helpers.processes import logged, until
from tests.helpers.world import World, status


@pytest.mark.long
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


@pytest.mark.long
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
    until(lambda: logged(log, "announced"))
    entries = logged(log)
    (conflict,) = [e for e in entries if e["event"].startswith("somebody else")]
    lb = world.lab.lb
    told = json.loads(lb.run(*crablb("services", "--json")).stdout)
    vip = f"tcp://{taken}:80" if family == 4 else f"tcp://[{taken}]:80"
    assert {one["vip"]: one["in_use"] for one in told if one["in_use"]} == {vip: {"eth0": other.mac()}}
    (line,) = [line for line in lb.run(*crablb("services")).stdout.splitlines() if line.startswith(vip)]
    assert line.endswith(f"in use at {other.mac()} on eth0")
    shown = lb.run(*crablb("status")).stdout.splitlines()  # exit status 0: that is how a standby is
    assert "standby for 1 VIP: another machine has it (crablb services)" in shown
    assert status(world.lab)["daemon"]["vips_in_use"] == 1
    assert (conflict["vip"], conflict["mac"], conflict["level"]) == (str(taken), other.mac(), "error")
    assert [e["vip"] for e in entries if e["event"] == "announced"] == [str(free)]
    assert world.echo(free)["server"] == "server1"


def entries(folder: Path, event: str) -> list[dict[str, object]]:
    return logged(folder / "serve.log", event)


def segment(make_world) -> tuple[World, Node, Path]:
    """A client that asks for the VIPs, and a second load balancer's node, with a folder."""
    world = make_world("bridge", servers=2, offload=False)
    second = world.lab.servers[1]
    first = world.lab.servers[0]
    world.python(first, "serve", first.name, "80", ready=True)
    start_agent(first, "server", "--dsr")
    second.ip(f"addr del {VIP4}/32 dev lo", f"addr del {VIP6}/128 dev lo")
    world.lab.client.ip(f"route del {VIP4}/32", f"route del {VIP6}/128")
    folder = world.folder / "second"
    folder.mkdir()
    return world, second, folder


WHAT = [f"tcp://{VIP4}:80=10.0.0.11", f"tcp://[{VIP6}]:80=fd00::11"]


def serve(world: World, node: Node, folder: Path) -> subprocess.Popen[str]:
    return start_serve(world.lab, folder, "--announce", "arp", what=WHAT, node=node)


def answers(world: World, node: Node) -> bool:
    """Whether the client's questions are answered by the node, for both VIPs."""
    client = world.lab.client
    client.run("ip", "neigh", "flush", "all")
    for vip in (VIP4, VIP6):
        client.run("ping", "-c", "1", "-W", "1", str(vip), check=False)
    told = [client.run("ip", "neigh", "show", str(vip)).stdout for vip in (VIP4, VIP6)]
    return all(node.mac() in line for line in told)


@pytest.mark.long
def test_a_standby_takes_over(make_world):
    """It saw the first one's answers; when that is killed, it answers, and the first one waits when it comes back."""
    world, second, folder = segment(make_world)
    first = world.lab.lb
    one = serve(world, first, world.folder)
    until(lambda: len(entries(world.folder, "announced")) == 2, 30)
    other = serve(world, second, folder)
    until(lambda: len(entries(folder, "somebody else")) == 2, 30)
    assert answers(world, first)
    one.kill()
    one.wait()
    until(lambda: len(entries(folder, "announced")) == 2, 20)
    assert answers(world, second)
    for vip in (VIP4, VIP6):
        assert world.echo(vip)["server"] == "server1"
    told = status(world.lab, second)["daemon"]
    assert (told["vips_in_use"], told["vips_taken"], told["vips_yielded"]) == (2, 2, 0)
    one = serve(world, first, world.folder)
    until(lambda: len(entries(world.folder, "somebody else")) == 2, 30)
    assert answers(world, second)
    for child in (one, other):
        child.terminate()
        child.wait()


@pytest.mark.long
def test_two_that_were_parted(make_world):
    """Both took the VIPs; joined again, the one with the higher MAC address leaves them to the other."""
    world, second, folder = segment(make_world)
    first = world.lab.lb
    world.lab.middle.ip(f"link set {second.name} nomaster")
    children = [serve(world, first, world.folder), serve(world, second, folder)]
    for where in (world.folder, folder):
        until(lambda w=where: len(entries(w, "announced")) == 2, 30)
    world.lab.middle.ip(f"link set {second.name} master br0")
    low, high = sorted(((first, world.folder), (second, folder)), key=lambda one: one[0].mac())
    until(lambda: len(entries(high[1], "somebody else on the segment has this VIP; it is left")) == 2, 30)
    until(lambda: answers(world, low[0]), 20)
    assert status(world.lab, high[0])["daemon"]["vips_yielded"] == 2
    assert status(world.lab, low[0])["daemon"]["vips_yielded"] == 0
    assert status(world.lab, low[0])["daemon"]["vips_in_use"] >= 2
    for child in children:
        child.terminate()
        child.wait()


def test_after_its_link_was_down(make_world):
    world, _, _ = segment(make_world)
    lb = world.lab.lb
    lb.set({"net.ipv6.conf.all.keep_addr_on_down": 1, "net.ipv6.conf.eth0.keep_addr_on_down": 1})
    child = serve(world, lb, world.folder)
    until(lambda: len(entries(world.folder, "announced")) == 2, 30)
    for turn in (2, 3):
        lb.ip("link set eth0 down")
        until(lambda t=turn: len(entries(world.folder, "a link is down")) == t - 1)
        lb.ip("link set eth0 up")
        until(lambda t=turn: len(entries(world.folder, "announced")) >= 2 * t)
        assert answers(world, lb)
    lb.ip("link set eth0 address 02:00:00:00:66:66")
    client = world.lab.client
    until(lambda: all("02:00:00:00:66:66" in client.run("ip", "neigh", "show", str(v)).stdout for v in (VIP4, VIP6)))
    assert child.poll() is None
    child.terminate()
    child.wait()
