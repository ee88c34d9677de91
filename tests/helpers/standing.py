"""Worlds that stand from test to test, for those that put back what they change."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from crablb.lab import Lab, Node
from tests.helpers.namespaces import unique
from tests.helpers.world import World

#: So many are kept; a new one takes the place of that which was used longest ago.
KEPT = 4
#: What a node is like: interfaces, an XDP program told with them, addresses, routes, filters, offloads, connections.
SHOWN = """
ip -o link; ip -o addr; ip route; ip -6 route; ip neigh | grep managed; tc qdisc; tc filter show dev eth0 ingress
nft list ruleset; ethtool -k eth0; ss -Htan state connected exclude time-wait
cd /proc/sys/net; cat ipv4/ip_forward ipv4/tcp_syncookies ipv6/conf/all/forwarding ipv4/conf/all/arp_ignore
"""


def state(lab: Lab) -> dict[str, Any]:
    """What a test may leave that another would see."""

    def pinned(node: Node) -> list[Path]:
        return sorted(node.pins.glob("**/*"))

    return {
        name: (node.run("sh", "-c", SHOWN, check=False).stdout, sorted(node.processes()), pinned(node))
        for name, node in lab.nodes.items()
    }


class Standing:
    """Labs with echo servers and their agents, which stand when the test is over, and are as they were: one that is
    not is removed, and the next test has a new one."""

    def __init__(self) -> None:
        self._kept: dict[tuple[object, ...], tuple[Lab, dict[str, Any]]] = {}
        self._used: list[tuple[tuple[object, ...], World]] = []

    def world(self, folder: Path, topology: str, servers: int, *, offload: bool, dsr: bool) -> World:
        key = topology, servers, offload, dsr
        if key in self._kept:
            lab, before = self._kept.pop(key)
        else:
            while len(self._kept) >= KEPT:
                self._remove(next(iter(self._kept)))
            lab, before = Lab.create(unique(), topology, servers, offload=offload), {}  # type: ignore[arg-type]
        world = World(lab, folder)
        # From here on it is removed whatever happens: as long as it is not known what it is like, it is not kept.
        self._kept[key] = lab, before
        self._used.append((key, world))
        if not before:
            World(lab, folder).servers(dsr=dsr)
            self._kept[key] = lab, state(lab)
        return world

    def put_back(self, *, failed: bool) -> None:
        """The test is over."""
        for key, world in self._used:
            world.end()
            lab, before = self._kept[key]
            if failed or state(lab) != before:
                self._remove(key)
        self._used.clear()

    def close(self) -> None:
        with ExitStack() as labs:
            for key in list(self._kept):
                labs.callback(self._remove, key)

    def _remove(self, key: tuple[object, ...]) -> None:
        lab, _ = self._kept.pop(key)
        lab.destroy()
