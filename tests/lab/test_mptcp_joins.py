"""Subflows that clients open to the VIP: each gets to the server that has its connection."""

from __future__ import annotations

import json

import pytest

from crablb.lab import VIP4, VIP6
from tests.helpers.mptcp import Ends
from tests.helpers.processes import until
from tests.helpers.world import World, command, status

CONNECTIONS = 24
#: An address more of the client's, from which its kernel opens a second subflow of each connection.
MORE = {4: "10.0.0.201", 6: "fd00::201"}


def counted(world: World) -> tuple[int, int, int]:
    total = status(world.lab)["total"]
    return total["mptcp"], total["mptcp_join"], total["mptcp_join_known"]


@pytest.mark.parametrize("family", [4, 6])
def test_joins_get_to_their_servers(make_world, family):
    """Every one of them, though most are another server's by their hash; and as ``explain`` foretells."""
    world = make_world(servers=4, offload=False)
    client, host = world.lab.client, str(VIP4 if family == 4 else VIP6)
    # Not for connections' first subflows.
    more = f"{MORE[family]}/32" if family == 4 else f"{MORE[family]}/128"
    client.ip(f"addr add {more} dev eth0 preferred_lft 0{' nodad' if family == 6 else ''}")
    client.run("ip", "mptcp", "endpoint", "add", MORE[family], "dev", "eth0", "subflow")
    world.serve()
    ends = Ends(world)
    ends.servers()
    held = ends.hold_many(host, CONNECTIONS)
    where = held.tell("about")
    assert all(one and one["mptcp"] and one["mptcp_there"] for one in where)
    assert len({one["server"] for one in where}) > 1

    def joined() -> int:
        filters = ["state", "established", "src", MORE[4] if family == 4 else f"[{MORE[6]}]"]
        return len(client.run("ss", "-Htn", *filters).stdout.splitlines())

    until(lambda: joined() == CONNECTIONS)
    mptcp, joins, known = counted(world)  # of SYNs, also of those that a slow machine sends again
    assert mptcp >= CONNECTIONS
    assert known == joins >= CONNECTIONS
    assert held.tell("ping") == CONNECTIONS
    assert joined() == CONNECTIONS
    # Where a client's tokens say that they would go, the servers are that have them.
    addresses = {server.name: server.ip4 if family == 4 else server.ip6 for server in world.lab.servers}
    tokens = {
        line.split("token:")[1].split()[0]: server.name
        for server in world.lab.servers
        for line in server.run("ss", "-Mnai").stdout.splitlines()
        if "token:" in line
    }
    assert tokens
    connection = f"[{MORE[6]}]:7 -> [{host}]:80" if family == 6 else f"{MORE[4]}:7 -> {host}:80"
    seen = json.loads(command(world.lab.lb, "explain", connection, "--json", "--join", "1"))
    assert next(s for s in seen["steps"] if s["what"] == "MPTCP token")["outcome"].startswith("00000001: not known")
    # A redirect has room beside MP_CAPABLE over IPv4 alone.
    seen = json.loads(command(world.lab.lb, "explain", connection, "--json", "--mptcp", "--offer"))
    assert seen["redirected"] == (family == 4)
    before = counted(world)
    for token, server in tokens.items():
        told = json.loads(command(world.lab.lb, "explain", connection, "--json", "--join", token))
        (step,) = [s["outcome"] for s in told["steps"] if s["what"] == "MPTCP token"]
        assert told["backend"] == addresses[server], (step, server)
    assert counted(world) == before
