"""Beside what is not ours: load balancers and endpoints as the CRAB reference's are, by what its protocol says.

Its load balancers redirect every SYN, and differ in where they put the redirect; its endpoints never offer.
"""

from __future__ import annotations

import pytest

from crablb.lab import VIP4, VIP6
from crablb.lab.demo import VIPS
from tests.helpers.processes import answer, until
from tests.helpers.world import World, agent_status, status

pytestmark = pytest.mark.long

VIP = {4: str(VIP4), 6: str(VIP6)}
CONNECTIONS = 20
SYN, SYN_ACK = "tcp flags & (syn | ack) == syn", "tcp flags & (syn | ack) == syn | ack"
#: What is lost, by the switch's interface that it comes in by, and how often.
LOST = {
    "nothing": None,
    "SYN": ("client", SYN, 1),
    "SYN to server": ("lb", SYN, 1),
    "SYN-ACK": ("server*", SYN_ACK, 1),
    "two SYN-ACKs": ("server*", SYN_ACK, 2),
}


def lose(world: World, interface: str, packet: str, count: int) -> None:
    """The next ones of each family."""
    rules = (
        f'add rule bridge t c iifname "{interface}" ether type {family} {packet}'
        f" limit rate 1/day burst {count} packets drop;"
        for family in ("ip", "ip6")
    )
    world.lab.middle.run(
        "nft",
        "add table bridge t; delete table bridge t; add table bridge t;"
        " add chain bridge t c { type filter hook prerouting priority -300; };" + "".join(rules),
    )


@pytest.mark.parametrize(
    ("where", "form"), [("first", "crab"), ("behind", "crab"), ("nops", "crab"), ("behind", "experimental")]
)
def test_load_balancer_that_always_redirects(make_world, where, form):
    """Nothing but redirects gets a client to a server: every connection takes one, at whatever copy of its SYN."""
    world = make_world(servers=2)
    world.servers()
    world.client("--option", form)
    world.always_redirect(where, form)
    for connections, (lost, how) in enumerate(LOST.items(), 1):
        if how:
            lose(world, *how)
        before = world.client_counters().get("retransmitted", 0)
        for family in (4, 6):
            seen = world.echoes(VIP[family], CONNECTIONS)
            assert {one["peer"] for one in seen} == {VIP[family]}
            assert {one["accepted_on"] for one in seen} == {s.ip4 if family == 4 else s.ip6 for s in world.lab.servers}
        counters = world.client_counters()
        assert counters["redirected"] == counters["completed"] == connections * 2 * CONNECTIONS, (lost, counters)
        assert not how or counters["retransmitted"] > before, (lost, counters)
        assert "failed" not in counters, (lost, counters)


@pytest.mark.parametrize("family", [4, 6])
def test_no_offer_where_everything_is_redirected(make_world, family):
    """While failures are remembered no offers are made; what is redirected all the same is taken up."""
    world = make_world()
    world.servers()
    world.client()
    world.always_redirect()
    server = world.lab.servers[0]
    rule = "add rule inet t c tcp dport 80 tcp flags & syn == 0 drop"
    server.run("nft", f"add table inet t; add chain inet t c {{ type filter hook prerouting priority -300; }}; {rule}")
    world.python(world.lab.client, "ask", VIP[family], "80", "1")
    vip = VIPS[(4, 6).index(family)]
    until(lambda: not agent_status(world.lab.client, None)["client"]["offering"][vip])
    server.run("nft", "delete table inet t")
    seen = world.echoes(VIP[family], 3)
    assert {one["peer"] for one in seen} == {VIP[family]}
    assert {one["accepted_on"] for one in seen} == {server.ip4 if family == 4 else server.ip6}


@pytest.mark.parametrize("family", [4, 6])
def test_client_that_never_offers(make_world, family):
    """As the reference's patched kernel is; the load balancer redirects it all the same, and our agent echoes."""
    world = make_world(servers=2)
    world.servers()
    world.serve("--mode", "always")
    client = world.lab.client
    client.run(
        "nft", "add table inet t; add chain inet t c { type filter hook output priority 0; };"
        " add rule inet t c tcp flags & rst == rst drop",
    )  # fmt: skip
    source = client.ip4 if family == 4 else client.ip6
    child = world.python(
        client, "client", VIP[family], source, world.lab.lb.mac(), str(CONNECTIONS), module="standins"
    )  # fmt: skip
    served = answer(child).split()
    assert len(served) == CONNECTIONS
    assert set(served) == {s.ip4 if family == 4 else s.ip6 for s in world.lab.servers}
    assert status(world.lab)["total"]["redirected"] == CONNECTIONS
    echoed = sum(agent_status(server)["server"]["counters"]["echoed"] for server in world.lab.servers)
    assert echoed >= CONNECTIONS


@pytest.mark.parametrize("mode", ["negotiated", "always"])
@pytest.mark.parametrize("family", [4, 6])
def test_server_of_the_reference(make_world, family, mode):
    """No agent there, and NOPs before the redirect in its SYN-ACK."""
    world = make_world()
    server = world.lab.servers[0]
    address = server.ip4 if family == 4 else server.ip6
    # Its kernel knows nothing of the connections.
    server.run(
        "nft", "add table inet t; add chain inet t c { type filter hook input priority 0; };"
        " add rule inet t c tcp dport 80 drop",
    )  # fmt: skip
    world.python(server, "server", server.name, address, world.lab.client.mac(), module="standins", ready=True)
    world.client()
    world.serve("--mode", mode)
    seen = world.echoes(VIP[family], CONNECTIONS)
    assert {one["accepted_on"] for one in seen} == {address}
    counters = world.client_counters()
    assert counters["redirected"] == counters["completed"] == CONNECTIONS
