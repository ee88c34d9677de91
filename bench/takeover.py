"""New connections while the load balancer is reloaded and taken over: what fails, what is lost, what has to wait."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal

from bench.context import Context, Unavailable
from bench.figures import Row, Suite, Table, Target
from bench.lab import CLIENT_SYSCTLS, SEED, SYSCTLS, counts, started
from crablb.api import types
from crablb.api.client import Client, discover
from crablb.kernel import netns
from crablb.lab import VIP4, VIP6, Lab, Node
from crablb.lab.demo import crablb, start_agent, start_serve
from crablb.model import Address

SERVERS = 3
PORT = 80
VIPS = (VIP4, VIP6)
RATE = 10_000  # new connections a second that are aimed at
LEAST = 500  # which any machine takes
LONGEST = 5.0  # ms that a packet may be kept by a takeover
PATIENCE = 60.0  # seconds that anything is waited for
NOTHING, RELOADS, TAKEOVERS, RESTART = "nothing", "reloads", "takeovers", "stopped and started again"
NOTE = (
    "New connections are made in an open loop, half by IPv4 and half by IPv6: connect, 8 bytes to a server and back, "
    "close. Each reload and each takeover has another configuration: other weights, a backend and a service come or "
    "go. SYNs are counted at the load balancer's cable, and stamped there by the kernel as they go in and come out: "
    "what is lost did not come out, and the longest is how long one was on its way between, whatever the reason (where "
    "all share two CPUs, it mostly waits for one). What the cable and CPUs' queues dropped for want of room is counted "
    "apart, and is among the lost if it was a SYN. Those that a takeover kept were there while neither process worked. "
    "Clients' own counts say how often a SYN was sent again. 'Redirected': a client with an agent; 'bypass': the XDP "
    "program forwards what it knows of a connection (ack_bypass). The rate is what is aimed at, or half of it, and so "
    "on, until this machine loses nothing while nothing happens. 'Stopped and started again' is no takeover, and for "
    "comparison."
)
#: Addresses that a client has of each family, so that no port comes again in a run.
ADDRESSES = 16
#: What a client does not keep of connections that it has closed: hundreds of thousands would be their own load.
CLOSED = {"net.ipv4.tcp_max_tw_buckets": 1000}
CONFIG = """
seed = "{seed}"
keep = 60
flows = 1048576
ack_bypass = "{bypass}"
"""
SERVICE = """
[[service]]
address = "tcp://{vip}:{port}"
backends = [{backends}]
check = []
"""


@dataclass(frozen=True)
class Way:
    """How connections go."""

    agent: bool  # the client has one: it is redirected
    bypass: str  # ack_bypass
    counted: str  # the XDP program's counter that tells that they do: at least one a connection


WAYS = {
    "redirected": Way(True, "auto", "syn"),
    "fallback, bypass": Way(False, "on", "flow"),
    "fallback, no bypass": Way(False, "off", "other"),
}


@dataclass(frozen=True)
class Found:
    """What became of a load."""

    connections: int  # connected, and answered
    rate: float  # a second
    failed: Counter[str]  # by why
    lost: int  # SYNs that the load balancer had and did not send on
    again: int  # SYNs that clients sent again, for whatever reason
    repeated: int  # all segments that both ends sent again, SYNs included
    longest: float  # ms that a SYN was with the load balancer
    waited: float = 0.0  # ms that one was which came or was there while nobody worked
    gap: float = 0.0  # ms that nobody worked, at most
    elsewhere: int = 0  # packets that the cable or the kernel's queues dropped, in front of the load balancer or behind

    @property
    def whole(self) -> bool:
        """Nothing failed, and nothing was lost."""
        return not (self.failed or self.lost or self.again)


class Watch:
    """tools/synwatch.c at a load balancer's cable: at its end in a switch."""

    def __init__(self, context: Context, switch: Node, interface: str) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        self._child = switch.popen(str(context.make("synwatch")), interface, **pipes)
        if self._line() != "ready":
            raise Unavailable(f"synwatch did not start: {self._said()}")

    def _line(self) -> str:
        assert self._child.stdout
        return str(self._child.stdout.readline()).strip()

    def _said(self) -> str:
        assert self._child.stderr
        return str(self._child.stderr.read()).strip()

    def ask(self, times: tuple[float, float] | None = None) -> dict[str, float]:
        """What it says by now; ``times``: of the SYNs that were there at some time between (seconds since 1970).

        Raises :class:`Unavailable` if it has missed some.
        """
        assert self._child.stdin
        self._child.stdin.write(" ".join(str(round(at * 1e9)) for at in times or ()) + "\n")
        self._child.stdin.flush()
        line = self._line()
        if not line:
            raise Unavailable(f"synwatch ended: {self._said()}")
        said: dict[str, float] = json.loads(line)
        if said["missed"]:
            raise Unavailable(f"{said['missed']} SYNs passed unseen: the machine is overloaded")
        return said

    def close(self) -> None:
        self._child.kill()
        self._child.communicate()


@dataclass
class Load:
    """Connections under way."""

    watch: Watch
    children: list[subprocess.Popen[str]]
    longest: float = 0.0
    waited: float = 0.0
    gap: float = 0.0
    seen: float = field(default=0.0)

    def more(self, count: int) -> None:
        """Wait until so many more SYNs have come to the load balancer."""
        self._look()
        wanted, end = self.seen + count, time.monotonic() + PATIENCE
        while self.seen < wanted:
            if time.monotonic() > end or any(child.poll() is not None for child in self.children):
                raise Unavailable(f"{wanted - self.seen:.0f} of {count} SYNs did not come in {PATIENCE:g} s")
            time.sleep(0.01)
            self._look()

    def _look(self) -> dict[str, float]:
        said = self.watch.ask()
        self.seen, self.longest = said["in"], max(self.longest, said["longest"] / 1e3)
        return said

    def look_between(self, at: float, seconds: float) -> None:
        """While nobody worked; all SYNs that came then have come out."""
        self.gap = max(self.gap, 1e3 * seconds)
        self.waited = max(self.waited, self.watch.ask((at, at + seconds))["longest"] / 1e3)

    def end(self) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """No more connections; what the clients say when those that there are have ended, and what was watched."""
        for child in self.children:
            child.send_signal(signal.SIGTERM)
        said = []
        for child in self.children:
            out, error = child.communicate(timeout=PATIENCE)
            if child.returncode:
                raise Unavailable(f"crr failed: {error.strip()[-300:]}")
            said.append(json.loads(out))
        return said, self._look()


class Relay:
    """The lab: two clients, one of which has an agent, a load balancer, servers.  By IPv4 and IPv6."""

    def __init__(self, context: Context, lab: Lab, folder: Path) -> None:
        self.context, self.lab, self.folder = context, lab, folder
        *self.servers, self.plain = lab.servers
        self.config = folder / "lb.toml"
        self.config.touch(0o600)
        self._variant = 0
        for server in self.servers:
            server.set(SYSCTLS)
            started(server, [str(context.make("crr")), "serve", str(PORT)])
            start_agent(server, "server")
        self.plain.ip(f"addr del {VIP4}/32 dev lo", f"addr del {VIP6}/128 dev lo")
        self.plain.ip(f"route add {VIP4}/32 via {lab.lb.ip4}", f"route add {VIP6}/128 via {lab.lb.ip6}")
        for client in (lab.client, self.plain):
            client.set(CLIENT_SYSCTLS | CLOSED)
            for first in map(ip_address, self.sources(client).values()):
                suffix = "/24 dev eth0" if first.version == 4 else "/64 dev eth0 nodad"
                client.ip(*(f"addr add {first + i}{suffix}" for i in range(ADDRESSES)))
            client.run("sysctl", "-qw", "net.ipv4.ip_local_port_range=1024 65535")
        prefixes = [part for prefix in lab.prefixes() for part in ("--backends", prefix)]
        start_agent(lab.client, "client", *prefixes, "--no-verify")

    @classmethod
    @contextmanager
    def standing(cls, context: Context) -> Iterator[Relay]:
        with (
            tempfile.TemporaryDirectory() as folder,
            Lab.create(f"bench-relay-{os.getpid()}", "bridge", SERVERS + 1, offload=False) as lab,
        ):
            yield cls(context, lab, Path(folder))

    def sources(self, client: Node) -> dict[Address, str]:
        """The first of a client's addresses, by the VIP that they are for."""
        other = client is self.plain
        return {VIP4: f"10.0.0.{128 + other * ADDRESSES}", VIP6: f"fd00::{1 + other}:0"}

    # ---- the load balancer ----

    def write(self, way: Way) -> None:
        """A configuration that is none of the last ones: weights, a backend, a service differ."""
        self._variant += 1
        number = self._variant
        servers = self.servers if number % 2 else self.servers[:-1]
        text = CONFIG.format(seed=SEED.hex(), bypass=way.bypass)
        for vip in VIPS:
            hosts = [f"[{one.ip6}]" if vip is VIP6 else one.ip4 for one in servers]
            weights = [f'"{host}*{1 + (number + i) % 7}"' for i, host in enumerate(hosts)]
            host = f"[{vip}]" if vip is VIP6 else str(vip)
            text += SERVICE.format(vip=host, port=PORT, backends=", ".join(weights))
        more = f'"{self.servers[0].ip4}"'
        text += SERVICE.format(vip=VIP4, port=1000 + number % 5, backends=more)
        self.config.write_text(text)

    @contextmanager
    def serving(self, way: Way, program: list[str] | None = None) -> Iterator[None]:
        """A load balancer that serves it, and has done so.  ``program``: what stands for ``crablb``."""
        self.write(way)
        self.start(program=program)
        try:
            for client in (self.lab.client, self.plain):  # neighbours are found, the agents' first SYNs are through
                for vip in VIPS:
                    self._crr(client, vip, "--samples", "20", "--seconds", "20", "--warmup", "0")
            yield
        finally:
            self.stop()

    def start(self, *more: str, program: list[str] | None = None) -> None:
        start_serve(self.lab, self.folder, *more, config=self.config, program=program)

    def ask(self) -> Client:
        with netns.inside(self.lab.lb.path):
            return Client(discover("eth0"), timeout=PATIENCE)

    def status(self) -> types.Status:
        with self.ask() as client:
            return client.get("/v1/status", types.Status)

    def last_gap(self) -> tuple[float, float]:
        """When the process that serves took over, and for how many seconds nobody worked then."""
        with self.ask() as client:
            version = client.get("/v1/version", types.Version)
        if version.took_over is None or version.gap is None:
            raise Unavailable("the load balancer says of no takeover")
        return version.took_over, version.gap

    @contextmanager
    def _replaced(self) -> Iterator[int]:
        """The process that serves, which ends in the context, or soon after."""
        pid = self.status().version.pid
        process = os.pidfd_open(pid)
        try:
            yield pid
            if not select.select([process], [], [], PATIENCE)[0]:
                raise Unavailable(f"the load balancer that was there did not end in {PATIENCE:g} s")
        finally:
            os.close(process)

    def stop(self) -> None:
        with self._replaced() as pid:
            os.kill(pid, signal.SIGTERM)

    # ---- what befalls it ----

    def reload(self, way: Way) -> None:
        """With another configuration."""
        self.write(way)
        with self.ask() as client:
            plan = client.post("/v1/reload", types.Plan)
        if not plan.services:
            raise Unavailable("a reload has changed nothing")

    def takeover(self, way: Way) -> None:
        """By another process, with another configuration."""
        self.write(way)
        with self._replaced():
            done = self.lab.lb.run(*crablb("takeover", "--iface", "eth0"), check=False)
            if done.returncode:
                raise Unavailable(f"crablb takeover: {(done.stderr or done.stdout).strip()[-500:]}")

    def upgrade(self, way: Way) -> None:
        """By this version, whatever serves."""
        self.write(way)
        with self._replaced():
            self.start("--takeover")

    def restart(self, way: Way) -> None:
        """Stopped, and started again: who does not know what is lost without a takeover."""
        self.write(way)
        self.stop()
        self.start()

    # ---- load ----

    def _crr(self, client: Node, vip: object, *options: str) -> None:
        done = client.run(str(self.context.make("crr")), "load", str(vip), str(PORT), *options, check=False)
        if self.context.parsed(done, "crr")["errors"]:
            raise Unavailable(f"{client.name}: connections to {vip} fail")

    def measure(self, way: Way, rate: float, what: Callable[[Load], None], *, anew: bool = False) -> Found:
        """``what`` happens while so many connections a second are made, half of them by IPv6.

        ``anew``: the load balancer's counters begin anew by it.
        """
        client = self.lab.client if way.agent else self.plain
        crr = [str(self.context.make("crr")), "load"]
        options = ["--rate", str(rate / len(VIPS)), "--seconds", "600", "--warmup", "0"]
        options += ["--addresses", str(ADDRESSES)]
        before, xdp, dropped = self._repeated(client), self.status().counters["xdp"], self._dropped()
        watch, load = Watch(self.context, self.lab.middle, "lb"), None
        try:
            children = [
                client.popen(
                    *crr, str(vip), str(PORT), "--from", first, *options, stdout=subprocess.PIPE, stderr=subprocess.PIPE
                )
                for vip, first in self.sources(client).items()
            ]
            load = Load(watch, children)
            load.more(int(rate / 2))
            what(load)
            load.more(int(rate / 2))
            said, seen = load.end()
        finally:
            watch.close()
            for child in load.children if load else []:
                child.kill()
                child.communicate()
        after = self._repeated(client)
        connections = sum(one["count"] for one in said)
        came = self.status().counters["xdp"][way.counted] - xdp[way.counted]
        if not anew and came < connections / 2:
            raise Unavailable(f"connections did not go the way that is measured ({way})")
        return Found(
            connections=connections,
            rate=sum(one["rate"] for one in said),
            failed=sum((Counter(one["why"]) for one in said), Counter()),
            lost=int(seen["in"] - seen["out"]),
            again=after["syns"] - before["syns"],
            repeated=after["all"] - before["all"],
            longest=load.longest,
            waited=load.waited,
            gap=load.gap,
            elsewhere=self._dropped() - dropped,
        )

    def often(self, way: Way, rate: float, event: Callable[[Way], None], times: int) -> Found:
        """An event so many times, one after the other."""

        def happen(load: Load) -> None:
            for _ in range(times):
                event(way)
                load.more(int(rate / 10))
                if event == self.takeover:
                    load.look_between(*self.last_gap())

        return self.measure(way, rate, happen, anew=event == self.restart)

    def _repeated(self, client: Node) -> dict[str, int]:
        """What both ends have sent again: ``syns``, of the client, and ``all``."""
        found = {"syns": 0, "all": 0}
        for node in (client, *self.servers):
            text = node.run("cat", "/proc/net/snmp", "/proc/net/netstat").stdout
            found["all"] += counts(text, "Tcp")["RetransSegs"]
            if node is client:
                found["syns"] = counts(text, "TcpExt")["TCPSynRetrans"]
        return found

    def _dropped(self) -> int:
        """Packets for which the cable had no room (veth's ring has 256 places), or a CPU's queue (the whole machine's:
        netdev_max_backlog)."""
        (link,) = json.loads(self.lab.middle.run("ip", "-s", "-j", "link", "show", "dev", "lb").stdout)
        queues = Path("/proc/net/softnet_stat").read_text().splitlines()
        return int(link["stats64"]["tx"]["dropped"]) + sum(int(line.split()[1], 16) for line in queues)

    def bearable(self, way: Way, rate: float) -> tuple[float, Found]:
        """A rate at which nothing is lost while nothing happens, this one or half of it, and so on; what was found."""
        while True:
            count = int(rate * self.context.pick(10, 1, 0.2))
            calm = self.measure(way, rate, lambda load, count=count: load.more(count))  # type: ignore[misc]
            if calm.whole or rate / 2 < LEAST:
                return rate, calm
            self.context.say(f"    {rate:,.0f} a second is more than this machine takes: {calm}")
            rate /= 2


def run(context: Context) -> Suite:
    reloads, takeovers = context.pick((100, 10), (10, 2), (2, 1))
    suite = Suite("takeover", "New connections while the load balancer is reloaded and taken over", notes=[NOTE])
    found: dict[str, dict[str, Found]] = {}
    with Relay.standing(context) as relay:
        for name, way in WAYS.items():
            with relay.serving(way):
                context.say(f"  {name}: {NOTHING}")
                rate, calm = relay.bearable(way, context.pick(RATE, RATE / 5, RATE / 20))
                found[name] = {NOTHING: calm}
                for what, event, times in (
                    (RELOADS, relay.reload, reloads),
                    (TAKEOVERS, relay.takeover, takeovers),
                    (RESTART, relay.restart, 1),
                ):
                    context.say(f"  {name}: {times} {what}")
                    try:
                        found[name][what] = relay.often(way, rate, event, times)
                    except Unavailable as reason:
                        suite.left_out.append(f"{name}, {what}: {reason}")
    suite.tables = tables(found)
    if context.size != "tiny":
        suite.targets = [p13(found, reloads, takeovers)]
    return suite


def tables(found: Mapping[str, Mapping[str, Found]]) -> list[Table]:
    """``found``: by way, and what happened."""
    figures: tuple[tuple[str, str, str, Literal["lower", "higher"], Callable[[Found], float]], ...] = (
        ("rate", "New connections", "1/s", "higher", lambda one: one.rate),
        ("connections", "Connections made", "connections", "higher", lambda one: one.connections),
        ("failed", "Of these, failed", "connections", "lower", lambda one: one.failed.total()),
        ("lost", "SYNs that the load balancer lost", "SYNs", "lower", lambda one: one.lost),
        (
            "elsewhere",
            "Packets of any kind that the cable or a CPU's queue dropped",
            "packets",
            "lower",
            lambda one: one.elsewhere,
        ),
        ("again", "SYNs that clients sent again", "SYNs", "lower", lambda one: one.again),
        ("repeated", "All segments that clients and servers sent again", "segments", "lower", lambda one: one.repeated),
        ("longest", "The longest that a SYN was with the load balancer", "ms", "lower", lambda one: one.longest),
        ("waited", "The longest of those that a takeover kept", "ms", "lower", lambda one: one.waited),
        ("gap", "The longest that nobody worked on packets", "ms", "lower", lambda one: one.gap),
    )
    return [
        Table(f"takeover-{key}", title, unit, [
            Row(f"{way}: {what}", [float(value(one))], note=_why(one) if key == "failed" else "")
            for way, all_of_it in found.items() for what, one in all_of_it.items()
        ], better)
        for key, title, unit, better, value in figures
    ]  # fmt: skip


def _why(one: Found) -> str:
    return "; ".join(f"{count} {why}" for why, count in sorted(one.failed.items()))


def p13(found: Mapping[str, Mapping[str, Found]], reloads: int, takeovers: int) -> Target:
    """Of what was found by way, and what happened."""
    wanted = {(way, what): one for way, all_of_it in found.items() for what, one in all_of_it.items()}
    judged = {key: one for key, one in wanted.items() if key[1] in (RELOADS, TAKEOVERS)}
    if len(judged) < 2 * len(WAYS):
        return Target("P13", "not measured in this run", None)
    failed = sum(one.failed.total() for one in judged.values())
    lost = sum(one.lost for one in judged.values())
    connections = sum(one.connections for one in judged.values())
    (way, _), longest = max(
        ((key, one.waited) for key, one in judged.items() if key[1] == TAKEOVERS), key=lambda pair: pair[1]
    )
    slowest = min(one.rate for one in judged.values())
    value = (
        f"{len(found)} ways, {reloads} reloads and {takeovers} takeovers each, {connections:,} connections, "
        f"{slowest:,.0f} a second or more: {failed} failed, {lost} SYNs lost; at most {longest:.1f} ms ({way})"
    )
    why = [
        f"{way}, {what}: {one.failed.total()} failed{f' ({_why(one)})' if one.failed else ''}, {one.lost} SYNs lost"
        for (way, what), one in judged.items()
        if one.failed or one.lost
    ]
    if longest > LONGEST:
        why.append(f"{way}: a takeover keeps a SYN for {longest:.1f} ms")
    return Target("P13", value, not why, "; ".join(why))
