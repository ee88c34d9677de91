"""What checks cost: 10,000 every 2 seconds, on one core."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from ipaddress import ip_address

import uvloop

from bench import syns
from bench.context import Context, Unavailable
from bench.figures import Suite, Table
from crablb.control.health.health import Health
from crablb.dataplane.events import Event, Notice
from crablb.errors import KernelError
from crablb.kernel.netlink import HopState, NextHop
from crablb.model import Address, Backend, Check, CheckKind, Config, Service, Vip
from crablb.selection.standing import Pair, Standing, Verdict

INTERVAL = 2.0
ANSWER = b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n"


class Engine:
    """All that checks need of one: they go to addresses of the loopback, and nobody is served."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.hops: Mapping[Address, NextHop] = dict.fromkeys(config.backends, NextHop(HopState.RESOLVED))
        self.verdicts: Mapping[Vip, Verdict] = {}
        self.listeners: list[Callable[[Notice], None]] = []

    def judge(self, standings: Mapping[Pair, Standing], warm: Collection[Pair] = ()) -> None:
        """Nothing comes of it."""


def run(context: Context) -> Suite:
    suite = Suite("health", "Checks")
    checks = context.pick(10_000, 2_000, 200)
    seconds = context.pick(10.0, 4.0, 1.0)
    suite.notes.append(
        f"{checks:,} backends, each an address of the loopback, are checked every {INTERVAL:g} s, for {seconds:g} s;"
        " servers that accept and answer have the other core. The time is that of the process that checks, and what the"
        " kernel does for it, which on the loopback is both ends of the handshake. Beside it: as many connections in a"
        " bare loop of Python, opened, waited for and reset one after the other."
    )
    with servers() as port:
        kinds = {"tcp": Check(CheckKind.TCP), "http": Check(CheckKind.HTTP)}
        subjects: dict[str, Callable[[], Mapping[str, float]]] = {
            "connections, bare": lambda: {"share": bare(port, checks) / INTERVAL}
        }
        for name, check in kinds.items():
            subjects[name] = lambda check=check: {"share": checking(check, port, checks, seconds)}  # type: ignore[misc]
        found = context.in_turn("checks", subjects, context.pick(3, 2, 1))["share"]
    suite.tables.append(
        Table(
            "health-cpu", f"{checks:,} checks every {INTERVAL:g} s", "of a core", list(found.values()),
            baseline="connections, bare", note="10,000 are to take half of a core at most.",
        )
    )  # fmt: skip
    try:
        suite.tables.append(syns.table(context, checks, INTERVAL))
    except (Unavailable, KernelError) as reason:  # without root
        suite.left_out.append(f"checks by SYNs: {reason}")
    return suite


@contextmanager
def servers() -> Iterator[int]:
    """A port at which every address of the loopback answers, by a process of its own."""
    needed = 11_000
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < needed:
        raise Unavailable(f"only {hard} files may be open: ulimit -n {needed}")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed), hard))
    with socket.create_server(("0.0.0.0", 0), backlog=4096) as listening:
        child = os.fork()
        if child == 0:
            answer(listening)
        try:
            yield int(listening.getsockname()[1])
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def answer(listening: socket.socket) -> None:
    """Whoever asks; never returns."""
    while True:
        connection, _ = listening.accept()
        try:
            if connection.recv(1024):
                connection.sendall(ANSWER)
        except OSError:  # reset: it was a tcp check
            pass
        connection.close()


def checking(check: Check, port: int, checks: int, seconds: float) -> float:
    """The share of a core that it takes."""
    addresses = [ip_address(0x7F010000 + n) for n in range(checks)]
    service = Service(Vip(ip_address("10.0.0.100"), port), tuple(map(Backend, addresses)), checks=(check,))
    config = Config(("lo",), (service,))
    events: list[Event] = []

    async def main() -> float:
        health = Health(Engine(config), events.append)
        health.follow(health.prepare(config))
        health.start()
        await asyncio.sleep(INTERVAL)
        made, cpu = asked(health), time.process_time()
        await asyncio.sleep(seconds)
        spent, made = time.process_time() - cpu, asked(health) - made
        health.close()
        if events or not made:
            raise Unavailable(f"{made} checks were made, and {len(events)} backends found not to answer")
        return spent / made * checks / INTERVAL  # this machine may not have had the time for all

    def asked(health: Health) -> int:
        return sum(result.streak for a in addresses for result in health.results((service.vip, a)))

    return uvloop.run(main())


def bare(port: int, count: int) -> float:
    """Seconds of a core for so many connections."""
    began = time.process_time()
    for n in range(count):
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            sock.connect((f"127.1.{n >> 8 & 255}.{n & 255}", port))
    return time.process_time() - began
