"""Next hops by what the kernel is made to say, in an order that is hard to bring about in a lab."""

from __future__ import annotations

import asyncio
import socket
from ipaddress import ip_address

import pytest

from crablb.kernel import netlink, rtnetlink
from crablb.kernel.netlink import HopState, Link, NextHops
from crablb.kernel.rtnetlink import HEADER, NEIGHBOUR

BACKEND, INDEX = ip_address("10.0.0.11"), 3
OLD, NEW = b"\2\0\0\0\0\1", b"\2\0\0\0\0\2"
REACHABLE = 0x02
NEW_NEIGHBOUR, NEIGHBOUR_GONE = netlink.RTM_NEIGH


def event(kind: int, state: int, mac: bytes) -> bytes:
    """What the kernel tells of the backend's neighbour entry."""
    attributes = {rtnetlink.NDA_DST: BACKEND.packed, rtnetlink.NDA_LLADDR: mac}
    body = NEIGHBOUR.pack(socket.AF_INET, INDEX, state, 0, 0) + rtnetlink.encode(attributes)
    return HEADER.pack(HEADER.size + len(body), kind, 0, 0, 0) + body


def tables(mac: bytes | None) -> netlink._Tables:
    route = netlink._Route(HopState.RESOLVED, "", (netlink._Way(INDEX, None, None, 1500),))
    neighbours = {(INDEX, str(BACKEND)): (REACHABLE, mac)} if mac else {}
    link = Link("eth0", b"\2\0\0\0\0\xfe", 1500, True, True, True, 0, True, 1, True)
    return netlink._Tables({BACKEND: route}, neighbours, {INDEX: link}, frozenset())


class Kernel(NextHops):
    """One that is asked for ``answer``, and tells of ``events`` while it is asked."""

    def __init__(self) -> None:
        super().__init__(lambda *_: None)
        self._wanted = frozenset({BACKEND})
        self.answer, self.events = tables(OLD), [event(NEW_NEIGHBOUR, REACHABLE, OLD)]

    async def _hear(self) -> None:
        for data in self.events:
            self._take(data, None)

    def _ask(self) -> netlink._Tables:
        asyncio.run_coroutine_threadsafe(self._hear(), self.loop).result(10)
        return self.answer

    def _manage(self, wanted: set[tuple[int, str]]) -> None:
        self._managed = set(wanted)

    async def look_again(self) -> None:
        self.loop = asyncio.get_running_loop()
        await self._refresh(full=True)


@pytest.mark.parametrize(
    ("answer", "events", "mac"),
    [
        (OLD, [(NEW_NEIGHBOUR, REACHABLE, NEW)], NEW),
        (None, [(NEW_NEIGHBOUR, REACHABLE, NEW)], NEW),
        (OLD, [(NEIGHBOUR_GONE, REACHABLE, OLD)], b""),
        (OLD, [(NEW_NEIGHBOUR, netlink.NUD_FAILED, b"")], b""),
        (OLD, [(NEIGHBOUR_GONE, REACHABLE, OLD), (NEW_NEIGHBOUR, REACHABLE, NEW)], NEW),
        (OLD, [], OLD),
    ],
)
def test_what_is_told_while_the_kernel_is_asked_is_not_lost(answer, events, mac):
    async def work() -> None:
        hops = Kernel()
        hops.answer, hops.events = tables(OLD), []
        await hops.look_again()
        hops.answer, hops.events = tables(answer), [event(*each) for each in events]
        await hops.look_again()
        assert hops.current[BACKEND].dst_mac == mac
        # It is what was told, not what is told for ever: another look is believed.
        hops.answer, hops.events = tables(OLD), []
        await hops.look_again()
        assert hops.current[BACKEND].dst_mac == OLD
        hops._thread.shutdown()

    asyncio.run(work())


@pytest.mark.parametrize("removed", [False, True])
def test_an_entry_that_is_removed_says_nothing_of_the_backend(removed):
    """``ip neigh flush`` has each entry fail, and removes it: a service whose backends are asked for anew is not one
    that has none, and refuses nobody."""

    async def work() -> None:
        hops = Kernel()
        hops.events = []
        await hops.look_again()
        hops._take(event(NEW_NEIGHBOUR, netlink.NUD_FAILED, b""), None)
        if removed:
            hops._take(event(NEIGHBOUR_GONE, netlink.NUD_FAILED, b""), None)
        await hops._refresh(full=False)
        hop = hops.current[BACKEND]
        assert (hop.state, hop.asking) == (HopState.UNRESOLVED, removed)
        hops._thread.shutdown()

    asyncio.run(work())
