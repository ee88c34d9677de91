"""Nobody is worse off for an agent: what stands between client and servers, and what a prepared client has of it.

        client ── router ── lb
                    │
                 servers

Each path is made on the router (or at the client), and is one that an unprepared client gets through.  A prepared one
gets through as well, every time; what its offer costs is one early retransmission, once: then the VIP backs off.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import pytest

from crablb.lab import VIP4, VIP6, Lab
from crablb.lab.demo import start_agent
from tests.helpers import wiring
from tests.helpers.world import World

pytestmark = pytest.mark.long

VIP = {4: str(VIP4), 6: str(VIP6)}
#: How many connections are made, one after the other; a back-off is longer than they take.
CONNECTIONS = 4


def rules(text: str) -> Callable[[Lab], None]:
    """A path made of nftables rules on the router."""

    def make(lab: Lab) -> None:
        lab.middle.run("nft", "-f", "-", input=f"table inet path {{\n{text}\n}}\n")

    return make


def own_rules(text: str) -> Callable[[Lab], object]:
    """A path made of rules for what the client takes in; it sends nothing invalid either."""
    chains = f"chain in {{ type filter hook input priority filter; {text}; }}\n"
    chains += "chain out { type filter hook output priority filter; ct state invalid drop; }"
    return lambda lab: lab.client.run("nft", "-f", "-", input=f"table inet own {{\n{chains}\n}}\n")


def narrow(lab: Lab) -> None:
    """The last hop carries what IPv6 must, and no more."""
    lab.middle.ip("link set br0 mtu 1280")


def strict(lab: Lab) -> None:
    lab.client.set({f"net.ipv4.conf.{name}.rp_filter": 1 for name in ("all", "eth0")})


@dataclass(frozen=True)
class Path:
    make: Callable[[Lab], object]
    redirects: bool | None = False  # whether redirects get through; None: sometimes
    agents: int | None = None  # how many servers have one, all on one segment; None: all, behind a router
    second: str = ""  # what the client's second link carries: rx, tx
    options: tuple[str, ...] = ()  # of the client's agent


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
    "backends filtered by resets": Path(
        rules(
            "chain forward { type filter hook forward priority filter;"
            ' iifname "client" oifname "br0" meta l4proto tcp reject with tcp reset; }'
        )
    ),
    "SYN to servers reset": Path(
        rules(
            "chain forward { type filter hook forward priority filter;"
            ' iifname "lb" oifname "br0" meta l4proto tcp reject with tcp reset; }'
        )
    ),
    "SYN to servers rejected": Path(
        rules(
            "chain forward { type filter hook forward priority filter;"
            ' iifname "lb" oifname "br0" meta l4proto tcp reject; }'
        )
    ),
    "option stripped in SYN-ACK": Path(
        rules(
            "chain forward { type filter hook forward priority filter;"
            ' oifname "client" tcp flags & (syn | ack) == syn | ack reset tcp option 42; }'
        )
    ),
    "client's firewall: nothing invalid": Path(
        own_rules("ct state invalid drop"),
        redirects=True,
    ),
    "client's firewall: established alone": Path(
        own_rules("ct state established accept; meta l4proto tcp drop"),
        redirects=True,
    ),
    "client behind a bridge": Path(wiring.bridge, redirects=True),
    "client behind a macvlan": Path(wiring.macvlan, redirects=True),
    "container, bridged": Path(wiring.bridged_container, redirects=True),
    "container, routed": Path(wiring.routed_container, redirects=True),
    "two links, answers by the other": Path(wiring.answers_elsewhere, second="rx"),
    "two links, the agent told of both": Path(
        wiring.answers_elsewhere,
        redirects=True,
        second="rx",
        options=("--interface", "eth0", "--interface", "eth1"),
    ),
    "two links, backends by the other": Path(wiring.backends_elsewhere, redirects=True, second="tx"),
    "policy routing by address": Path(wiring.rule_from, redirects=True, second="tx"),
    "policy routing by mark": Path(wiring.rule_mark, redirects=True, second="tx"),
    "no agent on servers": Path(lambda lab: None, agents=0),
    "an agent on one of two servers": Path(lambda lab: None, agents=1, redirects=None),
}


def times(seen: list[dict[str, Any]]) -> list[float]:
    return [one["connect_ms"] for one in seen]


@pytest.mark.parametrize("path", PATHS)
def test_never_worse(
    make_world: Callable[..., World], record_property: Callable[[str, object], None], path: str
) -> None:
    made = PATHS[path]
    world = make_world("routed" if made.agents is None else "bridge", servers=2)
    if made.agents is None:
        world.servers(dsr=True)
    else:
        world.servers(agents=False)
        for server in world.lab.servers[: made.agents]:
            start_agent(server, "server")
    world.serve()
    made.make(world.lab)
    # The control: an unprepared client.
    unprepared = {family: times(world.echoes(vip, CONNECTIONS, 1000)) for family, vip in VIP.items()}
    # A machine that is slow with all of this does not send its SYN again for that.
    patience = ["--retransmission", "0.9"] if made.redirects else []
    world.client("--verify", *patience, *made.options)
    before: Counter[str] = Counter()
    for family, vip in VIP.items():
        first, *others = times(world.echoes(vip, CONNECTIONS, 1000))
        now = Counter(world.client_counters())
        counted = now - before
        before = now
        found = unprepared[family][0], median(unprepared[family]), first, median(others)
        record_property("never worse", (path, family, *found, counted["retransmitted"], counted["redirected"]))
        if made.redirects:
            assert counted["redirected"] == CONNECTIONS
            assert not counted["retransmitted"]
        else:
            assert made.redirects is None or not counted["redirected"]
            # Where the offer alone is taken away nothing is lost by it, and nothing is sent again.
            assert counted["retransmitted"] <= 1
    if made.second:
        # Each connection has three packets at least, and what else goes there is less.
        assert world.lab.client.counters("eth1")[f"{made.second}_packets"] >= 3 * CONNECTIONS * len(VIP)
