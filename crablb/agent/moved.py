"""Connections that have moved away from the load balancer, and that the kernel's program does not count any more: it
counts by the TCP connection to the VIP, an MPTCP one's first subflow, which is closed then."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Collection

import structlog

from crablb.errors import KernelError
from crablb.kernel import mptcp
from crablb.model import Vip

log = structlog.get_logger()

#: Seconds between looks at all connections, at least, and how much of a core's time may go into them.
LOOK, LOOKING = 1.0, 0.05


def moved(vips: Collection[Vip]) -> dict[Vip, int]:
    """How many open MPTCP connections to each VIP have no subflow by it any more; those that have none are left out.

    Raises :class:`KernelError` where the kernel does not tell.
    """
    places = {(vip.address, vip.port): vip for vip in vips}
    # In this order: of a connection that is new both are there, or neither.
    found = {token: places[at, port] for token, at, port in mptcp.sockets() if (at, port) in places}
    if found:
        for one in mptcp.subflows():
            if (one.local, one.local_port) in places:
                found.pop(one.token, None)
    return dict(Counter(found.values()))


class Moved:
    """What :func:`moved` says, looked at once in a while, however often it is asked."""

    def __init__(self) -> None:
        self._next = 0.0
        self._found: dict[Vip, int] = {}
        self._blind = False

    def added(self, counted: dict[Vip, int]) -> dict[Vip, int]:
        """What the kernel's program counted by VIP, and those that have moved."""
        if (now := time.monotonic()) >= self._next:
            began = time.thread_time()
            try:
                self._found = moved(counted)
                self._blind = False
            except KernelError as error:
                if not self._blind:
                    log.warning("connections that have moved away are not counted", reason=str(error))
                self._found, self._blind = {}, True
            self._next = now + max(LOOK, (time.thread_time() - began) / LOOKING)
        return {vip: n + self._found.get(vip, 0) for vip, n in counted.items()}
