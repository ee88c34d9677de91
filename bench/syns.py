"""What checks by SYNs cost; a part of the suite ``health``."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Mapping
from ipaddress import ip_address
from typing import Any

import uvloop

from bench.context import Context, Unavailable
from bench.figures import Table
from crablb.control.health.syn import Answer, Sounder
from crablb.kernel import netns
from crablb.kernel.netlink import HopState, NextHop
from crablb.lab import VIP4, Lab
from crablb.lab.demo import start_agent
from crablb.model import Address, Fallback, OptionForm, Vip

#: Slices of an interval in which a part of the checks begins.
SLICES = 50
LISTENER = """
import signal, socket
listening = socket.create_server(("", 80), backlog=4096)
print("ready", flush=True)
signal.pause()
"""

Check = Callable[[Sounder, NextHop, Address], Coroutine[Any, Any, Answer]]


def redirect(sounder: Sounder, hop: NextHop, address: Address) -> Coroutine[Any, Any, Answer]:
    """Of so many backends of one service."""
    return sounder.redirect(hop, address, Vip(VIP4, 80), OptionForm.CRAB, 1.0)


def fallback(sounder: Sounder, hop: NextHop, address: Address) -> Coroutine[Any, Any, Answer]:
    """Of one backend of so many services."""
    return sounder.fallback(hop, ip_address("10.0.0.11"), Vip(address, 80), Fallback.AUTO, 1.0)


def table(context: Context, checks: int, interval: float) -> Table:
    """Raises :class:`Unavailable`, or KernelError."""
    with Lab.create(f"syns-{os.getpid()}", servers=1) as lab:
        (server,) = lab.servers
        server.ip("route add local 10.64.0.0/10 dev lo")  # which all are its addresses then
        listening = server.popen(sys.executable, "-c", LISTENER, stdout=subprocess.PIPE)
        assert listening.stdout
        listening.stdout.readline()
        start_agent(server, "server")
        subjects: dict[str, Callable[[], Mapping[str, float]]] = {
            check.__name__: lambda check=check: {"share": share(lab, check, checks, interval)}  # type: ignore[misc]
            for check in (redirect, fallback)
        }
        found = context.in_turn("checks by SYNs", subjects, context.pick(3, 2, 1))["share"]
    return Table(
        "health-syn-cpu", f"{checks:,} checks by SYNs every {interval:g} s", "of a core", list(found.values()),
        note="10,000 are to take half of a core at most. Beside the process, it is what the kernel does for both ends.",
    )  # fmt: skip


def share(lab: Lab, check: Check, checks: int, interval: float) -> float:
    """Of a core, while they go on; of two rounds the second, when all are known."""
    macs = [bytes.fromhex(node.mac().replace(":", "")) for node in (lab.servers[0], lab.lb)]
    addresses: list[Address] = [ip_address(0x0A400001 + n) for n in range(checks)]

    async def main() -> float:
        hop = NextHop(
            HopState.RESOLVED, ifindex=socket.if_nametoindex("eth0"), dst_mac=macs[0], src_mac=macs[1],
            source=ip_address(lab.lb.ip4), mtu=1500,
        )  # fmt: skip
        sounder = Sounder()
        sounder.start()
        try:
            for _ in range(2):
                began, spent = time.monotonic(), time.process_time()
                asked: list[asyncio.Task[Answer]] = []
                for n in range(SLICES):
                    part = addresses[n * checks // SLICES : (n + 1) * checks // SLICES]
                    asked += [asyncio.create_task(check(sounder, hop, address)) for address in part]
                    await asyncio.sleep(max(0, began + interval * (n + 1) / SLICES - time.monotonic()))
                failed = [one.reason for one in await asyncio.gather(*asked) if not one.ok]
                spent = time.process_time() - spent
                if failed:
                    raise Unavailable(f"{len(failed)} checks by SYNs failed, as of {failed[0]}")
        finally:
            sounder.close()
        return spent / interval

    with netns.inside(lab.lb.path):
        return uvloop.run(main())
