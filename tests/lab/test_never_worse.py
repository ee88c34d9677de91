"""Nobody is worse off for an agent: what stands between client and servers, and what a prepared client has of it.

        client ── router ── lb
                    │
                 servers

Each path is made on the router (or at the client), and is one that an unprepared client gets through.  A prepared one
gets through as well, every time; what its offer costs is one early retransmission, once: then the VIP backs off.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from crablb.lab import VIP4, VIP6, Lab
from tests.helpers.world import World

VIP = {4: str(VIP4), 6: str(VIP6)}
#: How many connections are made, one after the other; a back-off is longer than they take.
CONNECTIONS = 4


def rules(text: str) -> Callable[[Lab], None]:
    """A path made of nftables rules on the router."""

    def make(lab: Lab) -> None:
        lab.middle.run("nft", "-f", "-", input=f"table inet path {{\n{text}\n}}\n")

    return make


def narrow(lab: Lab) -> None:
    """The last hop carries what IPv6 must, and no more."""
    lab.middle.ip("link set br0 mtu 1280")


def strict(lab: Lab) -> None:
    lab.client.set({f"net.ipv4.conf.{name}.rp_filter": 1 for name in ("all", "eth0")})


@dataclass(frozen=True)
class Path:
    make: Callable[[Lab], None]
    redirects: bool = False  # whether redirects get through


#: What stands in the way sees the client's side alone: what the load balancer sends on is no connection to it.
UNSEEN = "chain unseen { type filter hook prerouting priority raw; iifname lb notrack; }\n"
PATHS = {
    "router": Path(lambda lab: None, redirects=True),
    "MTU 1280": Path(narrow, redirects=True),
    "rp_filter strict": Path(strict, redirects=True),
    "NAT": Path(
        rules(UNSEEN + 'chain nat { type nat hook postrouting priority srcnat; iifname "client" masquerade; }')
    ),
    "stateful firewall": Path(
        rules(
            UNSEEN
            + 'chain forward { type filter hook forward priority filter; oifname "client" ct state established accept;'
            ' oifname "client" meta l4proto tcp drop; }'
        )
    ),
    "option dropped in SYN": Path(
        rules(
            "chain forward { type filter hook forward priority filter;"
            ' iifname "client" tcp flags & (syn | ack) == syn tcp option 42 exists drop; }'
        )
    ),
    "option dropped in SYN to servers": Path(
        rules(
            "chain forward { type filter hook forward priority filter;"
            ' iifname "lb" tcp flags & (syn | ack) == syn tcp option 42 exists drop; }'
        )
    ),
    "option dropped in SYN-ACK": Path(
        rules(
            "chain forward { type filter hook forward priority filter;"
            ' oifname "client" tcp flags & (syn | ack) == syn | ack tcp option 42 exists drop; }'
        )
    ),
    "option stripped in SYN": Path(
        rules(
            "chain forward { type filter hook forward priority filter;"
            ' iifname "client" tcp flags & (syn | ack) == syn reset tcp option 42; }'
        )
    ),
    # A SYN-ACK of a backend comes through, and nothing of what the client sends to it.
    "backends filtered": Path(
        rules('chain forward { type filter hook forward priority filter; iifname "client" oifname "br0" drop; }')
    ),
    "option stripped in SYN-ACK": Path(
        rules(
            "chain forward { type filter hook forward priority filter;"
            ' oifname "client" tcp flags & (syn | ack) == syn | ack reset tcp option 42; }'
        )
    ),
}


@pytest.mark.parametrize("family", [4, 6], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("path", PATHS)
def test_never_worse(make_world: Callable[..., World], path: str, family: int) -> None:
    world = make_world("routed", servers=2)
    world.servers(dsr=True)
    world.serve()
    PATHS[path].make(world.lab)
    assert world.echo(VIP[family], "1000")["intact"]  # the control: an unprepared client
    world.client()
    for _ in range(CONNECTIONS):
        assert world.echo(VIP[family], "1000")["intact"]
    counters = world.client_counters()
    if PATHS[path].redirects:
        assert counters["redirected"] == CONNECTIONS
        assert "retransmitted" not in counters
    else:
        assert "redirected" not in counters
        # Where the offer alone is taken away nothing is lost by it, and nothing is sent again.
        assert counters.get("retransmitted", 0) <= 1
