"""A lab in use, to which all that people do to a load balancer is done again and again; after each round all is as it
was before, and is counted."""

from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import random
import select
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from crablb.api import types
from crablb.api.client import ApiError, Client, discover, of_vip
from crablb.kernel import pins
from crablb.lab import VIP4, VIP6, Lab, Node
from crablb.lab.demo import crablb
from tests.helpers import processes
from tests.helpers.namespaces import inside
from tests.helpers.processes import answer, exchange
from tests.helpers.secret import secret
from tests.helpers.world import World, command, status
from tests.soak.counted import of_node, of_process
from tests.soak.judge import least

__all__ = ["Farm"]

#: Ports of services, by how their clients' connections go: redirected, by the fallback in a tunnel, by MPTCP; and one
#: whose servers go and come, so that its connections may fail.
REDIRECTED, FALLBACK, MULTIPATH, FAILING, PASSING = 80, 81, 82, 83, 84
METRICS = 9117
#: What is said on a machine that has no time: nothing is wrong then, but with the machine.
LATE = ("too slow", "no answer within")
#: It is asked for a state now and then: other things are done on the machine beside an hour's soak.
until = partial(processes.until, every=0.1)
#: Looks of one counting: what is under way is gone in one of them.
LOOKS, BETWEEN = 6, 0.15
#: Of a busy machine nobody is to be taken for dead that is only slow.
PATIENT, QUICK = "interval = 2, timeout = 2, fall = 10, rise = 1", "interval = 0.5, timeout = 0.5, fall = 2, rise = 1"
CHECKS = ", ".join(f'{{ type = "{kind}", {PATIENT} }}' for kind in ("tcp", "redirect", "fallback"))
HEAD = """
interface = "eth0"
announce = "arp"
flows = 8192
busy_poll = 0
metrics_listen = "{lb}:9117"
report_listen = "{lb}"
report_key_file = "{key}"
"""
SERVICE = """
[[service]]
address = "{vip}"
policy = "{policy}"
fallback = "{fallback}"
check = [{checks}]
backends = [{backends}]
"""
POLICIES = (
    "maglev",
    "least-connections",
    "round-robin",
    "power-of-two",
    "random",
    "weighted-round-robin",
    "least-loaded",
)


def vips(port: int) -> tuple[str, str]:
    return f"tcp://{VIP4}:{port}", f"tcp://[{VIP6}]:{port}"


class Farm:
    """Client, load balancer, servers and their agents, which serve."""

    def __init__(self, lab: Lab, folder: Path, seed: int, *, leak: str = "none", longest: float = 30, workers: int = 4):
        self.lab, self.folder, self.leak = lab, folder, leak
        self.world = World(lab, folder)
        self.random = random.Random(seed)
        self.done: Counter[str] = Counter()
        self.file, self.key, self.log = folder / "lb.toml", folder / "master", folder / "serve.log"
        self._agents: dict[str, subprocess.Popen[str]] = {}
        secret(self.key, bytes(range(32)).hex())
        self._failing: dict[str, subprocess.Popen[str]] = {}
        with ThreadPoolExecutor() as pool:
            list(pool.map(self._begin, lab.servers))
        self._client_agent()
        self.write()
        self._serve()
        until(lambda: status(lab)["daemon"]["reports"])
        self.well()
        ways = [
            f"{host},{port},{protocol}"
            for port, protocol in ((REDIRECTED, "tcp"), (FALLBACK, "tcp"), (MULTIPATH, "mptcp"), (FAILING, "tcp"))
            for host in (VIP4, VIP6)
        ]
        self.traffic = self._python(lab.client, "tests.soak.traffic", "ask", str(longest), str(workers), *ways)
        assert answer(self.traffic) == "ready"

    # ---- what is in it ----

    def _serve(self) -> None:
        program = [sys.executable, "-m", "tests.soak.watched", str(self.folder / "objects"), self.leak]
        self.daemon = self.world.serve(config=self.file, program=program)

    def _begin(self, server: Node) -> None:
        self._serves(server, REDIRECTED, FALLBACK, MULTIPATH, PASSING)
        self._failing[server.name] = self._serves(server, FAILING)
        server.ip(f"addr del {VIP4}/32 dev lo", f"addr del {VIP6}/128 dev lo")
        server.set({"net.ipv4.conf.all.arp_ignore": 0, "net.ipv4.conf.all.arp_announce": 0})
        own = self.folder / server.name
        secret(own, server.run(*crablb("key", "backend", server.ip4, "--master", str(self.key))).stdout)
        self._server_agent(server)

    def _python(self, node: Node, *args: str) -> subprocess.Popen[str]:
        return self.world.program(node, sys.executable, "-m", *args)

    def _serves(self, server: Node, *ports: int) -> subprocess.Popen[str]:
        child = self._python(server, "tests.soak.traffic", "serve", server.name, *map(str, ports))
        assert answer(child) == "ready"
        return child

    def _agent(self, node: Node, role: str, *ports: int, more: tuple[str, ...] = ()) -> None:
        named = [word for port in ports for vip in vips(port) for word in ("--vip", vip)]
        words = ("agent", role, *named, "--cgroup", str(node.cgroup), *more)
        child = self._python(node, "tests.soak.watched", str(self.folder / "objects"), "none", *words)
        assert answer(child) == "ready"
        self._agents[node.name] = child

    def _server_agent(self, server: Node) -> None:
        mode = "leave" if server is self.lab.servers[0] else "backup"
        report = ("--report", self.lab.lb.ip4, "--report-key", str(self.folder / server.name))
        more = ("--dsr", f"--mptcp={mode}", *report)
        self._agent(server, "server", REDIRECTED, FALLBACK, MULTIPATH, FAILING, PASSING, more=more)

    def _client_agent(self) -> None:
        prefixes = [word for prefix in self.lab.prefixes() for word in ("--backends", prefix)]
        self._agent(self.lab.client, "client", REDIRECTED, FAILING, more=(*prefixes, "--mptcp", "--wait", "1"))

    def write(self, *, fewer: bool = False, weights: bool = False, policy: str = "maglev", more: bool = False) -> None:
        """What is served: by one server less; with other weights, with another policy, with one service more."""
        text = HEAD.format(lb=self.lab.lb.ip4, key=self.key)
        for port in (REDIRECTED, FALLBACK, MULTIPATH, FAILING, *((PASSING,) if more else ())):
            for vip in vips(port):
                addresses = [s.ip6 if "[" in vip else s.ip4 for s in self.lab.servers[: -1 if fewer else None]]
                weight = self.random.randint(1, 5) if weights else 1
                text += SERVICE.format(
                    vip=vip,
                    policy=policy if port == REDIRECTED else "maglev",
                    fallback="dsr-ipip" if port == FALLBACK else "auto",
                    checks=f'{{ type = "tcp", {QUICK} }}' if port == FAILING else CHECKS,
                    backends=", ".join(
                        f'{{ address = "{a}", weight = {weight + n % 2} }}' for n, a in enumerate(addresses)
                    ),
                )
        self.file.write_text(text)

    def lb(self, *words: str, expected: int | None = 0) -> str:
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                return command(self.lab.lb, *words, expected=expected)
        except AssertionError:
            raise AssertionError(f"crablb {' '.join(words)}: {said.getvalue()}{self._last()}") from None

    def _last(self) -> str:
        """What the load balancer logged last."""
        return self.log.read_text()[-3000:]

    @contextlib.contextmanager
    def api(self) -> Iterator[Client]:
        with inside(self.lab.lb.netns), Client(discover("eth0")) as client:
            yield client

    @property
    def serving(self) -> int:
        """The process that serves."""
        pid = self._owner()
        assert pid, self._last()
        return pid

    def _owner(self) -> int | None:
        with inside(self.lab.lb.netns):
            return pins.owner("lb-eth0")

    # ---- what is done to it ----

    def reloads(self) -> None:
        """By the file: fewer servers, other weights, another policy, a service more; and back."""
        for change in (
            {"fewer": True},
            {"weights": True},
            {"policy": self.random.choice(POLICIES[1:])},
            {"more": True},
            {},
        ):
            self.write(**change)  # type: ignore[arg-type]
            self.lb("reload", "--discard")

    def changes(self) -> None:
        """By the API: weights, states, a backend less and more, a service more and less."""
        server = self.random.choice(self.lab.servers)
        self.lb("weight", server.ip4, "7")
        self.lb("weight", server.ip4, "1")
        for state in ("drain", "maint"):
            self.lb(state, server.ip6)
            self.lb("ready", server.ip6)
        vip, another = vips(MULTIPATH)[0], vips(PASSING)[0]
        with self.api() as client:
            client.delete(f"/v1/services/{of_vip(vip)}/backends/{server.ip4}", types.Applied)
            client.post(f"/v1/services/{of_vip(vip)}/backends", types.Applied, {"address": server.ip4})
            client.post("/v1/services", types.Applied, {"address": another, "backends": [server.ip4]})
            client.delete(f"/v1/services/{of_vip(another)}", types.Applied)
        self.lb("reload", "--discard")

    def looks(self) -> None:
        """Everything that asks."""
        for words in (("services",), ("backends",), ("flows",), ("events",), ("status",), ("diff",), ("plan",)):
            self.lb(
                *words, "--iface", "eth0", "--json", *([str(self.file)] if words == ("plan",) else []), expected=None
            )
        for port in (REDIRECTED, FALLBACK):
            for client, vip in ((self.lab.client.ip4, f"{VIP4}"), (f"[{self.lab.client.ip6}]", f"[{VIP6}]")):
                self.lb("explain", f"{client}:4000 -> {vip}:{port}", "--offer")
        for path in ("/metrics", "/"):
            self._get(path)

    def _get(self, path: str) -> None:
        with inside(self.lab.lb.netns):
            connection = http.client.HTTPConnection(self.lab.lb.ip4, METRICS, timeout=60)
            with contextlib.closing(connection):
                connection.request("GET", path)
                answered = connection.getresponse()
                assert answered.status == 200 and answered.read()

    def watches(self) -> None:
        """Traces and captures that come to their end; the same, and whoever follows events, gone in the midst."""
        self.lb("trace", self.lab.client.ip4, "--timeout", "60")
        self.lb("capture", "-w", str(self.folder / "packets"), "--packets", "20")
        with self.api() as client:
            next(client.stream("POST", "/v1/trace", types.Trace(client=self.lab.client.ip6, connections=999)))
            client.close()
            next(client.stream("POST", "/v1/capture", types.Capture()))
            client.close()
            next(client.events(0))

    def _ended(self, child: subprocess.Popen[str]) -> None:
        child.terminate()
        self._killed(child, wait=True)

    def _killed(self, child: subprocess.Popen[str], *, wait: bool = False) -> None:
        if not wait:
            child.kill()
        child.communicate()
        self.world._started.remove(child)
        self._forgotten(child)

    def _forgotten(self, child: subprocess.Popen[str]) -> None:
        """It has ended: neither of those who would end it needs to know it any more."""
        for node in self.lab.nodes.values():
            if child in node._children:
                node._children.remove(child)

    def fails(self) -> None:
        """Servers of one service end, are found dead, and come back."""
        server = self.random.choice(self.lab.servers)
        self._killed(self._failing[server.name])
        until(lambda: not self._healthy(server, FAILING))
        self._failing[server.name] = self._serves(server, FAILING)
        until(lambda: self._healthy(server, FAILING))

    def _healthy(self, server: Node, port: int) -> bool:
        backends = json.loads(self.lb("backends", "--json", "--iface", "eth0"))
        return all(
            b["healthy"] for b in backends if b["service"] in vips(port) and b["address"] in (server.ip4, server.ip6)
        )

    def flaps(self) -> None:
        """The load balancer's cable, its neighbours, its routes and addresses; a server's cable."""
        for cable in ("lb", self.random.choice(self.lab.servers).name):
            self.lab.middle.ip(f"link set {cable} down")
            time.sleep(0.05)  # so long nothing goes there
            self.lab.middle.ip(f"link set {cable} up")
        self.lab.lb.ip("neigh flush dev eth0")
        self.lab.lb.ip(
            "addr add 10.0.7.2/24 dev eth0", "addr add fd00:7::7/64 dev eth0 nodad",
            "route add 10.0.8.0/24 via 10.0.7.1", "route add fd00:8::/64 via fd00:7::1",
            "route del fd00:8::/64", "route del 10.0.8.0/24",
            "addr del fd00:7::7/64 dev eth0", "addr del 10.0.7.2/24 dev eth0",
        )  # fmt: skip

    def takeovers(self) -> None:
        """One that succeeds, and one that does not: it is refused, or its new process is killed in the midst."""
        self._taken_over()
        if self.random.random() < 0.5:
            self._killed_successor()
        else:
            text = self.file.read_text()
            self.file.write_text(text + 'xdp_mode = "purple"\n')
            self.lb("takeover", expected=1)
            self.file.write_text(text)

    def _taken_over(self) -> None:
        """On a machine that has no time for the new process, the old one serves on: so be it."""
        before = self.serving
        self.lb("takeover")
        assert self.serving != before
        self.done["taken over"] += 1

    def _killed_successor(self) -> None:
        """At any instant: the old process serves on; or it has left already, and who manages services begins anew."""
        before = self.serving
        end = os.pidfd_open(before)
        words = ("serve", "--iface", "eth0", "--config", str(self.file), "--takeover")
        child = self._python(self.lab.lb, "tests.soak.watched", str(self.folder / "objects"), self.leak, *words)
        threading.Event().wait(self.random.uniform(0.2, 2))
        self._killed(child)

        def ended() -> bool:
            return bool(select.select([end], [], [], 0)[0])

        def goes_on() -> bool:
            try:
                return self._owner() == before and status(self.lab)["state"] == "serving"
            except ValueError:  # it has ended meanwhile: there is no answer
                return False

        until(lambda: ended() or goes_on())
        if ended():
            self._serve()
            self.done["killed when it served"] += 1
        os.close(end)

    def agents(self) -> None:
        """A server's or the client's agent is killed, or the client's told to end; another takes its place."""
        server, client = self.random.choice(self.lab.servers), self.lab.client
        if self.random.random() < 0.5:
            self._killed(self._agents[server.name])
            self._server_agent(server)
            return
        end = self.random.choice((self._killed, self._ended))
        end(self._agents[client.name])
        self._client_agent()

    def round(self, names: tuple[str, ...]) -> None:
        """All of it, in any order; then all is as it was."""
        for name in self.random.sample(names, len(names)):
            begun = time.monotonic()
            try:
                getattr(self, name)()
                self.done[name] += 1
            except (AssertionError, ApiError) as error:
                if not any(words in str(error) for words in LATE):
                    raise
                self.done[f"{name}: too late"] += 1
            self.took(name, time.monotonic() - begun)
        self.write()
        self.lb("reload", "--discard")
        self.well()

    def well(self) -> None:
        """Wait until nothing is amiss."""
        try:
            until(lambda: not status(self.lab)["problems"], 120)
        except AssertionError:
            raise AssertionError(status(self.lab)["problems"]) from None

    def took(self, name: str, seconds: float) -> None:
        """For those who follow it."""
        print(f"        {seconds:6.2f} s {name}", flush=True)

    # ---- what is found ----

    def counted(self) -> dict[str, float]:
        """What the load balancer's process, the agents' and the kernel have, now that all is as it was."""
        looks = []
        for n in range(LOOKS):
            if n:
                time.sleep(BETWEEN)
            look: dict[str, float] = {}
            for who, pid in self._processes().items():
                look |= {f"{who}, {name}": value for name, value in of_process(pid).items()}
            looks.append(look)
        nodes: dict[str, float] = {}
        for node in self.lab.nodes.values():
            if node is not self.lab.middle:
                nodes |= {f"{node.name}, {name}": value for name, value in of_node(node).items()}
        held = {
            f"{who}, {what}": value for who, pid in self._processes().items() for what, value in self._held(pid).items()
        }
        return least(looks) | nodes | held

    def _processes(self) -> dict[str, int]:
        agents = {f"{name}'s agent": child.pid for name, child in self._agents.items()}
        return {"load balancer": self.serving} | agents

    def _held(self, pid: int) -> dict[str, float]:
        told = self.folder / f"objects.{pid}"
        told.unlink(missing_ok=True)
        os.kill(pid, signal.SIGRTMIN)
        until(told.exists)
        held: dict[str, float] = json.loads(told.read_text())
        return held

    def connections(self) -> dict[str, Any]:
        """What became of connections so far, by way."""
        told: dict[str, Any] = json.loads(exchange(self.traffic, "tell"))
        return told

    def broken(self) -> list[str]:
        """Those that failed, though nothing was killed that they need."""
        return [
            f"{way}: {one}"
            for way, told in self.connections().items()
            if f",{FAILING}," not in way
            for one in told["failed"]
        ]

    def close(self) -> None:
        """The process that serves at the end, if one does, is perhaps no child of ours."""
        if pid := self._owner():
            os.kill(pid, signal.SIGTERM)
        until(lambda: self._owner() is None)
        self.daemon.wait()
