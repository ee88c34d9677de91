"""Clients without an agent, led past the load balancer by MPTCP: what of a connection the load balancer still sees."""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Self

from bench.context import Context, Unavailable
from bench.figures import Row, Suite, Table, Target
from bench.lab import CLIENT_SYSCTLS, ECHO, HTTP, PORTS, SYSCTLS, mptcpized, start_agent, start_servers
from crablb.errors import KernelError
from crablb.lab import Lab, Node
from crablb.lab.demo import start_serve
from crablb.lab.middlebox import Middlebox

#: How servers lead: `crablb agent server --mptcp=MODE`.
MODES = ("backup", "leave")
MOST = 9  # packets of a connection
DELAY = 0.01  # seconds each way
FAR = 10_000_000  # bytes, where there is a delay
SHARE = 1.5  # per cent of these packets
TRIPS = 4  # round trips, after which nothing comes by the load balancer with `leave`
#: What a mode waits for.
SLOW = {"backup": "the kernel's work queue has a turn", "leave": "a process has been told of it by the kernel"}
CLOSE_WAIT = 20  # seconds
#: Connections that have not ended: what is left in TIME-WAIT sends nothing of itself.
OPEN = [
    part
    for state in (
        "established",
        "syn-sent",
        "syn-recv",
        "fin-wait-1",
        "fin-wait-2",
        "close-wait",
        "last-ack",
        "closing",
    )
    for part in ("state", state)
]
PACKET = re.compile(r"(?P<seconds>\d+\.\d+) IP ")


def run(context: Context) -> Suite:
    suite = Suite("mptcp", "MPTCP: clients without an agent")
    rounds = context.pick(5, 2, 1)
    size = context.pick(64 << 20, 16 << 20, 1 << 20)
    try:
        with tempfile.TemporaryDirectory() as folder, Led(context, Path(folder)) as led:
            near = context.in_turn("MPTCP", led.near(size), rounds, steady=False)["packets"]
            led.far_away()
            far = context.in_turn("MPTCP, 20 ms", led.far(), rounds, steady=False)
    except KernelError as reason:  # a kernel without MPTCP, for example
        raise Unavailable(str(reason)) from reason
    trip = f"{2000 * DELAY:g} ms"
    suite.tables = [
        Table("mptcp-packets", "Packets of a connection by the load balancer, without delay", "packets",
              list(near.values()), "lower"),
        Table("mptcp-far-packets", f"The same, where a round trip takes {trip}", "packets",
              list(far["packets"].values()), "lower"),
        Table("mptcp-far-share", "Their share of all that the client sends", "%", list(far["share"].values()), "lower"),
        Table("mptcp-far-last", "When the last of them came, after the first", "round trips",
              list(far["last"].values()), "lower"),
    ]  # fmt: skip
    suite.notes.append(
        "Counted on the load balancer's cable, in a lab without offloads: each is a packet that the client sends, from "
        "the SYN to the end of the close. The client is stock, curl by mptcpize and `crablb agent client --mptcp`; the "
        "server nginx by mptcpize and `crablb agent server --mptcp`; requests are of 8 bytes, by an MPTCP socket. What "
        "is sent before the direct way stands goes by the load balancer: a connection that is over before is all its "
        "own, and a transfer that begins at once sends as much as three and a half round trips hold, or as the path "
        "manager takes to be heard: the kernel's (`backup`) a turn of a work queue, ours (`leave`) a turn of a "
        "process, which on a machine that is busy may come late. Round trips are as long as the connection's own "
        "handshake."
    )
    if context.size != "tiny":  # what is that short is over before it has moved
        suite.targets = [p15(near, far)]
    return suite


@dataclass(frozen=True)
class Seen:
    """Of a connection: packets by the load balancer, all others, and when the last of the former came (round trips)."""

    by: int
    direct: int
    last: float


class Led:
    """A stock client, a load balancer and a server for each mode.  A context manager.

    Virtual addresses by mode; ``TCP``, one that no server leads away, for comparison.
    """

    def __init__(self, context: Context, folder: Path) -> None:
        self.context, self.folder = context, folder
        self.vips = {way: IPv4Address(f"10.0.0.{200 + i}") for i, way in enumerate((*MODES, "TCP"))}
        self._box: Middlebox | None = None

    def __enter__(self) -> Self:
        self.lab = Lab.create(f"bench-mptcp-{os.getpid()}", "bridge", len(self.vips), offload=False)
        try:
            self._build()
        except BaseException:
            self.lab.destroy()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.lab.destroy()

    def _build(self) -> None:
        client, lb = self.lab.client, self.lab.lb
        self.servers = dict(zip(self.vips, self.lab.servers, strict=True))
        for (way, vip), server in zip(self.vips.items(), self.lab.servers, strict=True):
            server.set(SYSCTLS)
            start_servers(self.context, server, self.folder / server.name, mptcp=True)
            server.ip(f"addr add {vip}/32 dev lo")
            client.ip(f"route replace {vip}/32 via {lb.ip4}")
            if way != "TCP":
                start_agent(server, "server", [vip], f"--mptcp={way}", "--mptcp-address", server.ip4)
        client.set(CLIENT_SYSCTLS)
        start_agent(client, "client", [], "--mptcp", "--detach")
        services = [f"tcp://{vip}:{port}={self.servers[way].ip4}" for way, vip in self.vips.items() for port in PORTS]
        start_serve(self.lab, self.folder, "--check", "none", what=services)
        for way in self.vips:  # neighbours are found, and what may be lost meanwhile is not counted
            self._requests(way, 4)

    def near(self, size: int) -> dict[str, Callable[[], Mapping[str, float]]]:
        """What is measured without delay: connections of every length."""
        self._file(size)
        many = self.context.pick(5000, 1000, 100)
        subjects: dict[str, Callable[[], Mapping[str, float]]] = {}
        for way in MODES:
            loads: dict[str, Callable[[str], None]] = {
                "1 request": lambda way: self._requests(way, 1),
                f"{many:,} requests": lambda way: self._requests(way, many),
                f"{size >> 20} MiB down": self._down,
                f"{size >> 20} MiB up": self._up,
            }
            for what, load in loads.items():
                subjects[f"{way}, {what}"] = lambda way=way, load=load: {  # type: ignore[misc]
                    "packets": self._seen(way, load, direct=False).by
                }
        return subjects

    def far_away(self) -> None:
        """From now on the client has a long way."""
        self._box = Middlebox(self.lab)
        self._box.delay(DELAY)
        for way in self.vips:
            self._requests(way, 1)

    def far(self) -> dict[str, Callable[[], Mapping[str, float]]]:
        """What is measured where it is far: figures by name, of connections that move :data:`FAR` bytes, or few."""
        self._file(FAR)
        few = self.context.pick(50, 20, 10)

        def subject(way: str, load: Callable[[str], None]) -> Callable[[], Mapping[str, float]]:
            def measure() -> Mapping[str, float]:
                seen = self._seen(way, load, direct=True)
                return {"packets": seen.by, "share": 100 * seen.by / (seen.by + seen.direct), "last": seen.last}

            return measure

        return {
            f"{way}, {what}": subject(way, load)
            for way in self.vips
            for what, load in (
                (f"{FAR // 10**6} MB down", self._down),
                (f"{FAR // 10**6} MB up", self._up),
                (f"{few} requests", lambda way: self._requests(way, few)),
            )
        }

    # ---- a connection ----

    def _file(self, size: int) -> None:
        """What is moved, both ways."""
        self._sent = self.folder / "sent"
        for path in (self._sent, *(self.folder / node.name / "files" / "big" for node in self.lab.servers)):
            with open(path, "wb") as file:
                file.truncate(size)

    def _by(self, way: str, *command: str) -> None:
        mptcp = way != "TCP"
        done = self.lab.client.run(*(mptcpized(self.context, *command) if mptcp else command), check=False)
        if done.returncode:
            raise Unavailable(f"{way}: {command[0]} failed: {(done.stderr or done.stdout).strip()[-300:]}")

    def _down(self, way: str) -> None:
        self._by(way, "curl", "-sSf", "-m", "120", "-o", "/dev/null", f"http://{self.vips[way]}:{HTTP}/big")

    def _up(self, way: str) -> None:
        """All that may be sent at once is: curl does not ask first whether it may."""
        url = f"http://{self.vips[way]}:{HTTP}/put/came"
        self._by(way, "curl", "-sSf", "-m", "120", "-o", "/dev/null", "-H", "Expect:", "-T", str(self._sent), url)

    def _requests(self, way: str, count: int) -> None:
        options = ["--mode", "rr", "--samples", str(count), "--seconds", "60", "--warmup", "0"]
        crr = [str(self.context.make("crr")), "load", str(self.vips[way]), str(ECHO), *options]
        done = self.lab.client.run(*crr, *(["--mptcp"] if way != "TCP" else []), check=False)
        if self.context.parsed(done, "crr")["errors"]:
            raise Unavailable(f"{way}: requests failed")

    def _seen(self, way: str, load: Callable[[str], None], *, direct: bool) -> Seen:
        """What is on the cables while a connection lives, its end included."""
        lab, server = self.lab, self.servers[way]
        at_lb, at_client = self.folder / "lb.pcap", self.folder / "client.pcap"
        to_server = f"ether src {lab.client.mac()} and tcp and dst host {server.ip4}"
        with (
            lab.middle.capture(at_lb, f"ether dst {lab.lb.mac()} and tcp", "lb"),
            lab.middle.capture(at_client, to_server, "client") if direct else nullcontext(),
        ):
            load(way)
            for node in (lab.client, server):
                self._wait_for_the_end(node)
        times = self._times(at_lb)
        if len(times) < 2:
            raise Unavailable(f"{way}: no connection came to the load balancer")
        first, second, last = times[0], times[1], times[-1]
        return Seen(len(times), len(self._times(at_client)) if direct else 0, (last - first) / (second - first))

    def _times(self, path: Path) -> list[float]:
        """When packets of a capture came."""
        lines = self.context.output("tcpdump", "-tt", "-nr", path).splitlines()
        return [float(found["seconds"]) for line in lines if (found := PACKET.match(line))]

    def _wait_for_the_end(self, node: Node) -> None:
        """Until the node has no connection that is not over."""
        end = time.monotonic() + CLOSE_WAIT
        while left := node.run("ss", "-tnH", *OPEN).stdout.strip():
            if time.monotonic() > end:
                raise Unavailable(f"{node.name}: connections do not end within {CLOSE_WAIT} s: {left[-300:]}")
            time.sleep(0.01)


def p15(near: Mapping[str, Row], far: Mapping[str, Mapping[str, Row]]) -> Target:
    """``near``: packets by way and length; ``far``: the figures where it is far, likewise."""

    def largest(rows: Mapping[str, Row], way: str) -> tuple[float, str]:
        """The largest median of a way, and of what."""
        return max((row.median, name.partition(", ")[2]) for name, row in rows.items() if name.startswith(way))

    def moved(way: str) -> dict[str, Row]:
        return {name: row for name, row in far["share"].items() if name.startswith(way) and " MB " in name}

    packets = {way: largest(near, way) for way in MODES}
    shares = {way: largest(moved(way), way) for way in MODES}
    last, of = largest(far["last"], "leave")
    value = (
        f"{', '.join(f'{way} {most:.0f} ({what})' for way, (most, what) in packets.items())}; at {2000 * DELAY:g} ms "
        f"{', '.join(f'{way} {share:.2f} % ({what})' for way, (share, what) in shares.items())}; leave: the last after "
        f"{last:.1f} round trips ({of})"
    )
    why = [
        f"{way} moves a connection when {SLOW[way]}, and {what} sends at once"
        for way, (most, what) in packets.items()
        if most > MOST
    ]
    why += [
        f"{way}, {what}: {far['packets'][f'{way}, {what}'].median:.0f} packets were sent before the direct way stood"
        for way, (share, what) in shares.items()
        if share > SHARE
    ]
    if last > TRIPS:
        why.append(
            "the direct way stands after three and a half round trips, and what either end had then handed to the "
            "first way is sent and acknowledged there"
        )
    return Target("P15", value, not why, "; ".join(why))
