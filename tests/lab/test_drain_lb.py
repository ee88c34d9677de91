"""The load balancer is drained of open connections: those of MPTCP clients go on without it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from crablb.lab import VIP4, VIP6
from crablb.lab.demo import crablb
from tests.helpers.mptcp import Ends, Held, cut, prepare_client
from tests.helpers.processes import until
from tests.helpers.secret import secret
from tests.helpers.world import World, agent_status, command, status


def key(world: World) -> Path:
    path = world.folder / "master"
    if not path.exists():
        secret(path, bytes(range(32)).hex())
    return path


def serve(world: World, *more: str) -> None:
    world.serve("--report-listen", world.lab.lb.ip4, "--report-key", str(key(world)), *more)


def servers(world: World, *modes: str) -> None:
    """Servers that report, each with ``--mptcp`` as said; empty: without."""
    Ends(world).servers()
    for server, mode in zip(world.lab.servers, modes, strict=True):
        own = world.folder / server.name
        secret(own, server.run(*crablb("key", "backend", server.ip4, "--master", str(key(world)))).stdout)
        more = ["--report", world.lab.lb.ip4, "--report-key", str(own)]
        world.agent(server, "server", *more, *([f"--mptcp={mode}"] if mode else []))
    # Each has been heard by all that it has to say.
    backends = {server.ip4 for server in world.lab.servers}

    def heard() -> bool:
        known = json.loads(command(world.lab.lb, "backends", "--json"))
        return {b["address"] for b in known if b["connections"] is not None} >= backends

    until(heard)


def drain(world: World, *more: str, expected: int | None = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(command(world.lab.lb, "drain-lb", "--json", *more, expected=expected))
    return found


def ways(world: World, server: int) -> tuple[int, ...]:
    """Of the open MPTCP connections: by the load balancer alone, both ways, directly."""
    return tuple(agent_status(world.lab.servers[server], None)["server"]["mptcp"]["connections"].values())


def one_at(world: World, name: str, vip: object = VIP4) -> Held:
    """A connection with this server."""
    while True:
        held = Ends(world).hold(str(vip))
        if held.tell("about")["server"] == name:
            return held
        held.tell("close")


@pytest.mark.parametrize("mode", ["backup", "leave"])
def test_what_has_moved_away_is_counted(make_world, mode):
    """Once, by status and in reports, until it ends."""
    world = make_world(offload=False)
    serve(world)
    servers(world, *([mode] * len(world.lab.servers)))
    prepare_client(world.lab.client)
    first = world.lab.servers[0]

    def counts() -> tuple[int, int]:
        """What the server says, and what the load balancer has heard of its IPv4 address."""
        status = agent_status(first, None)["server"]["connections"]
        known = json.loads(command(world.lab.lb, "backends", "--json"))
        return sum(status.values()), sum(b["connections"] or 0 for b in known if b["address"] == first.ip4)

    held = [one_at(world, first.name, vip) for vip in (VIP4, VIP4, VIP6)]
    if mode == "backup":
        until(lambda: ways(world, 0) == (0, 3, 0))
        assert counts()[0] == 3
        drain(world, "--timeout", "30")
    until(lambda: ways(world, 0) == (0, 0, 3))
    until(lambda: counts() == (3, 2))
    for left in ((2, 2), (1, 1)):
        held.pop().tell("close")
        until(lambda left=left: counts() == left)


@pytest.mark.long
def test_open_connections_leave(make_world):
    """All that can, of servers in either mode, IPv4 and IPv6; what cannot is counted, and why; what left does not
    notice when the load balancer dies."""
    world = make_world(servers=3, offload=False)
    ends, third = Ends(world), world.lab.servers[2]
    prepare_client(world.lab.client)
    serve(world)
    servers(world, "backup", "leave", "")
    held = [ends.hold_many(str(vip), 24) for vip in (VIP4, VIP6)]
    where = Counter(one["server"] for each in held for one in each.tell("about"))
    assert set(where) == {"server1", "server2", "server3"}
    watched = [one_at(world, "server1"), one_at(world, "server2")]
    until(lambda: ways(world, 0) == (0, where["server1"] + 1, 0))
    until(lambda: ways(world, 1) == (0, 0, where["server2"] + 1))
    # One that has no other way holds up nobody.
    world.lab.client.run("ip", "mptcp", "limits", "set", "add_addr_accepted", "0")
    alone = one_at(world, "server1")
    prepare_client(world.lab.client)
    stays = where["server3"] + 1
    for each in watched:
        each.begin()

    def left() -> dict[str, Any]:
        return drain(world, "--timeout", "0", expected=1)

    found = left()
    assert (found["draining"], found["told"], found["withdrawn"]) == (True, True, False)
    until(lambda: left()["flows"] == stays, told=lambda: (stays, left(), [ways(world, at) for at in (0, 1)]))
    until(lambda: ways(world, 0) == (1, 0, where["server1"] + 1))
    for each in watched:
        each.more()
    gaps = [each.end() for each in watched]
    print(f"longest gap of a connection that left: {gaps[0]:.1f} ms (backup), {gaps[1]:.1f} ms (leave)")
    assert max(gaps) < 10_000
    assert [each.tell("ping") for each in held] == [24, 24]
    found = left()
    reasons = {each["backend"]: each["reason"] for each in found["left"]}
    assert set(reasons) <= {world.lab.servers[0].ip4, third.ip4, third.ip6}
    assert reasons[world.lab.servers[0].ip4].startswith("TCP, or MPTCP clients")
    assert "does not lead MPTCP clients away" in reasons[third.ip4]
    assert alone.tell("up", 100000)
    shown = command(world.lab.lb, "drain-lb", "--timeout", "0", expected=1)
    assert f"{stays} could not move" in shown
    assert "draining: connections are to leave it" in command(world.lab.lb, "status", expected=None)
    # Those that come meanwhile leave as soon as they can.
    later = ends.hold_many(str(VIP4), 12)
    stays += sum(one["server"] == "server3" for one in later.tell("about"))
    until(lambda: left()["flows"] == stays, told=lambda: (stays, left()))
    with cut(world.lab, "lb"):
        assert [each.tell("ping", 20) < 10_000 for each in watched] == [True, True]
    found = drain(world, "--cancel")
    assert not found["draining"]
    assert found["first"]  # who waits is told how many there were
    assert not status(world.lab)["status"]["draining"]


@pytest.mark.parametrize("bypass", ["auto", "off"])
def test_draining_waits_until_nothing_is_left(make_world, bypass):
    """As a command does that is waited for, whoever forwards the flows; and the VIPs are withdrawn, and announced
    again."""
    world = make_world(servers=1, offload=False)
    prepare_client(world.lab.client)
    serve(world, "--announce", "arp", "--ack-bypass", bypass)
    servers(world, "backup")
    until(lambda: all(s["announced"] for s in json.loads(command(world.lab.lb, "services", "--json"))))
    held = Ends(world).hold_many(str(VIP4), 20)
    until(lambda: ways(world, 0) == (0, 20, 0))
    found = drain(world, "--withdraw", "--timeout", "60")
    assert 0 < found["first"] <= 20
    assert (found["flows"], found["left"], found["withdrawn"]) == (0, [], True)
    assert not any(s["announced"] for s in json.loads(command(world.lab.lb, "services", "--json")))
    assert held.tell("ping") == 20
    drain(world, "--cancel")
    assert all(s["announced"] for s in json.loads(command(world.lab.lb, "services", "--json")))
    assert held.tell("ping") == 20


def test_nobody_is_told(make_world):
    """Without reports: it says so, and that connections stay."""
    world = make_world(servers=1, offload=False)
    world.serve()
    Ends(world).servers()
    held = Ends(world).hold(str(VIP4), protocol="tcp")
    assert held.tell("ping", 1) < 10_000
    shown = command(world.lab.lb, "drain-lb", "--timeout", "0", expected=1)
    assert "1 could not move" in shown
    assert "does not report by this address" in shown
    held.tell("close")
    assert drain(world, "--timeout", "60")["flows"] == 0
