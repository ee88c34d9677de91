"""What clients see of a fault: failed connections, and for how long, with checks and without, beside HAProxy.

All ways are probed at the same time, through the same fault: each has a virtual address of its own to the same servers.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

from bench.context import Context, Unavailable
from bench.figures import Row, Suite, Table
from bench.lab import ECHO, SEED, SYSCTLS, started
from crablb.errors import KernelError
from crablb.lab import Lab, Node
from crablb.lab.demo import crablb, start_serve

SERVERS = 3
RATE = 20.0  # new connections a second by each way
TIMEOUT = 1.0  # seconds that a connection is given until it is answered
NOTE = (
    f"{RATE:g} new connections a second by each way, to {SERVERS} servers, all ways at the same time; a connection has "
    f"failed if its 8 bytes are not echoed within {TIMEOUT:g} s. A server that fails has a third of the connections. "
    "'crablb' is as it comes: tcp, redirect and fallback every 2 s, 3 failures in a row; 'with reports': servers "
    "report to it besides (crablb agent server --report); 'as keepalived': a TCP connection every 6 s, 3 s to connect, "
    "as keepalived's examples have it for IPVS, which this kernel does not have; HAProxy: `check`, as it comes (2 s, 3 "
    "failures), which tries a refused connection again itself. 'redirected' is a client with an agent, 'by fallback' "
    "one without."
)
REPORTING = "crablb, with reports"  # of a load balancer of its own, as reports are for all services of one

SERVICE = """
[[service]]
address = "tcp://{vip}:{port}"
backends = [{backends}]
{more}
"""
#: What a way's service says beside its backends.
CRABLB = {
    "crablb, no checks": "check = []",
    "crablb": "",
    REPORTING: "",
    "crablb, as keepalived": '[[service.check]]\ntype = "tcp"\ninterval = 6\ntimeout = 3\nfall = 1\nrise = 1\n'
    "fast_interval = 6",
}
HAPROXY = """
global
  nbthread 1
defaults
  mode tcp
  timeout connect 5s
  timeout client 60s
  timeout server 60s
listen echo
  bind {vip}:{port}
  balance roundrobin
{servers}
"""
HAPROXY_WAY = "HAProxy"


@dataclass(frozen=True)
class Fault:
    """What befalls a server, or the load balancer, and how it is mended."""

    name: str
    strike: Callable[[Faults], None]
    mend: Callable[[Faults], None]
    seconds: float  # that it lasts


class Faults:
    """The lab: a load balancer with a VIP for each way, servers, two clients."""

    def __init__(self, context: Context, folder: Path) -> None:
        self.context, self.folder = context, folder
        self.ways = [*CRABLB, HAPROXY_WAY]
        self.vips = {way: IPv4Address(f"10.0.0.{200 + i}") for i, way in enumerate(self.ways)}
        self.echoes: dict[str, subprocess.Popen[str]] = {}
        self.agents: dict[str, subprocess.Popen[str]] = {}

    @contextmanager
    def standing(self) -> Iterator[Faults]:
        with ExitStack() as stack:
            count = SERVERS + 3
            self.lab = stack.enter_context(Lab.create(f"bench-faults-{os.getpid()}", "bridge", count))
            *self.servers, self.plain, self.haproxy, self.second = self.lab.servers
            self._build()
            yield self

    def _build(self) -> None:
        redirected = [self.vips[way] for way in CRABLB]
        master = self.folder / "master"
        master.touch(0o600)
        master.write_text(os.urandom(32).hex())
        self.balancers: dict[str, subprocess.Popen[str]] = {}
        for server in self.servers:
            server.set(SYSCTLS)
            server.ip(*(f"addr add {vip}/32 dev lo" for vip in redirected))
            self.echo(server)
            key = self.folder / f"{server.name}.key"
            key.touch(0o600)
            key.write_text(server.run(*crablb("key", "backend", server.ip4, "--master", str(master))).stdout)
            self.agent(server)
        for client in (self.lab.client, self.plain):
            for way in CRABLB:
                by = self.second if way == REPORTING else self.lab.lb
                client.ip(f"route replace {self.vips[way]}/32 via {by.ip4}")
            client.ip(f"route replace {self.vips[HAPROXY_WAY]}/32 via {self.haproxy.ip4}")
            client.run("sysctl", "-qw", "net.ipv4.ip_local_port_range=10000 65000")
        vips = [part for vip in redirected for part in ("--vip", f"tcp://{vip}:{ECHO}")]
        cgroup = ["--cgroup", str(self.lab.client.cgroup)]
        command = crablb("agent", "client", *vips, "--backends", "10.0.0.0/24", *cgroup)
        started(self.lab.client, command)
        self.serve()

    @property
    def lbs(self) -> tuple[Node, Node]:
        """The load balancers, of which the second is reported to."""
        return self.lab.lb, self.second

    def serve(self) -> None:
        """Start both."""
        backends = ", ".join(f'"{server.ip4}"' for server in self.servers)
        for node in self.lbs:
            text = f'seed = "{SEED.hex()}"\nkeep = 30\n'
            if node is self.second:
                text += f'report_listen = "{node.ip4}:7171"\nreport_key_file = "{self.folder / "master"}"\n'
            for way, more in CRABLB.items():
                if (way == REPORTING) == (node is self.second):
                    text += SERVICE.format(vip=self.vips[way], port=ECHO, backends=backends, more=more)
            folder = self.folder / node.name
            folder.mkdir(exist_ok=True)
            config = folder / "lb.toml"
            config.touch(0o600)
            config.write_text(text)
        vip = self.vips[HAPROXY_WAY]
        self.haproxy.ip(f"addr replace {vip}/32 dev lo")
        servers = "\n".join(f"  server {server.name} {server.ip4}:{ECHO} check" for server in self.servers)
        (self.folder / "haproxy.cfg").write_text(HAPROXY.format(vip=vip, port=ECHO, servers=servers))
        self.start()

    def start(self, *haproxy: str) -> None:
        """Start all load balancers, of the files that are there, at the same time; arguments are HAProxy's."""

        def start(node: Node) -> None:
            folder = self.folder / node.name
            self.balancers[node.name] = start_serve(self.lab, folder, config=folder / "lb.toml", node=node)

        with ThreadPoolExecutor() as threads:
            begun = [threads.submit(start, node) for node in self.lbs]
            begun.append(threads.submit(self._start_haproxy, *haproxy))
            for future in begun:
                future.result()

    def _start_haproxy(self, *more: str) -> None:
        program = self.context.tool("haproxy")
        done = self.haproxy.run(
            program, "-D", "-f", str(self.folder / "haproxy.cfg"), "-p", str(self.pid), *more, check=False
        )
        if done.returncode:
            raise Unavailable(f"haproxy did not start: {done.stderr.strip()}")

    @property
    def pid(self) -> Path:
        """Where HAProxy says which process it is."""
        return self.folder / "haproxy.pid"

    def kill_all(self) -> None:
        """SIGKILL for all load balancers."""
        for child in self.balancers.values():
            _end(child)
        os.kill(int(self.pid.read_text()), signal.SIGKILL)

    def echo(self, server: Node) -> None:
        self.echoes[server.name] = started(server, [str(self.context.make("crr")), "serve", str(ECHO)])

    def agent(self, server: Node) -> None:
        """The agent of those VIPs whose way has one; it reports for the one that says so."""
        vips = [part for way in CRABLB for part in ("--vip", f"tcp://{self.vips[way]}:{ECHO}")]
        report = ["--report", self.second.ip4, "--report-key", str(self.folder / f"{server.name}.key")]
        command = crablb("agent", "server", *vips, "--cgroup", str(server.cgroup), *report)
        self.agents[server.name] = started(server, command)

    def probing(self, client: Node) -> subprocess.Popen[str]:
        targets = [f"{way}={vip}:{ECHO}" for way, vip in self.vips.items()]
        command = [sys.executable, "-m", "bench.prober", str(RATE), str(TIMEOUT), *targets]
        child = client.popen(
            *command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=Path(__file__).parent.parent,
        )
        return child


# ---- faults ----


def _end(child: subprocess.Popen[str], number: int = signal.SIGKILL) -> None:
    child.send_signal(number)
    child.wait()


def kill(faults: Faults) -> None:
    _end(faults.echoes[faults.servers[0].name])


def start_again(faults: Faults) -> None:
    faults.echo(faults.servers[0])


def stop(faults: Faults) -> None:
    faults.echoes[faults.servers[0].name].send_signal(signal.SIGSTOP)


def cont(faults: Faults) -> None:
    faults.echoes[faults.servers[0].name].send_signal(signal.SIGCONT)


def link_down(faults: Faults) -> None:
    faults.lab.middle.ip(f"link set {faults.servers[0].name} down")


def link_up(faults: Faults) -> None:
    faults.lab.middle.ip(f"link set {faults.servers[0].name} up")


def kill_two(faults: Faults) -> None:
    for server in faults.servers[:2]:
        _end(faults.echoes[server.name])


def start_two(faults: Faults) -> None:
    for server in faults.servers[:2]:
        faults.echo(server)


def agent_gone(faults: Faults) -> None:
    _end(faults.agents[faults.servers[0].name], signal.SIGTERM)


def agent_back(faults: Faults) -> None:
    faults.agent(faults.servers[0])


def command(faults: Faults, *args: str) -> None:
    for node in faults.lbs:
        done = node.run(*crablb(*args), check=False)
        if done.returncode:
            raise KernelError(f"crablb {' '.join(args)}: {(done.stderr or done.stdout).strip()}")


def drain(faults: Faults) -> None:
    command(faults, "drain", faults.servers[0].ip4)


def ready(faults: Faults) -> None:
    command(faults, "ready", faults.servers[0].ip4)


def reload(faults: Faults) -> None:
    for _ in range(5):
        command(faults, "reload")


def restart(faults: Faults) -> None:
    faults.kill_all()
    faults.start()


def upgrade(faults: Faults) -> None:
    for child in faults.balancers.values():
        _end(child, signal.SIGTERM)
    faults.start("-sf", faults.pid.read_text().strip())


def nothing(_: Faults) -> None:
    pass


FAULTS = (
    Fault("server process killed", kill, start_again, 12),
    Fault("server process hung", stop, cont, 12),
    Fault("link down", link_down, link_up, 12),
    Fault("two of three killed (panic)", kill_two, start_two, 8),
    Fault("server's agent gone", agent_gone, agent_back, 10),
    Fault("drain", drain, ready, 4),
    Fault("five reloads", reload, nothing, 4),
    Fault("load balancer stopped, and started again", upgrade, nothing, 4),
    Fault("load balancer killed, and started again", restart, nothing, 4),
)


def measure(faults: Faults, fault: Fault, before: float, after: float) -> dict[str, dict[str, float]]:
    """By way, of both clients: connections that failed, and seconds from the fault to the last that did."""
    clients = {"redirected": faults.lab.client, "by fallback": faults.plain}
    children = {kind: faults.probing(client) for kind, client in clients.items()}
    for child in children.values():
        assert child.stdout and child.stderr
        if child.stdout.readline().strip() != "ready":
            raise Unavailable(f"the prober did not start: {child.stderr.read().strip()[-300:]}")
    time.sleep(before)  # what goes well is seen as well
    at = time.monotonic()
    fault.strike(faults)
    time.sleep(fault.seconds)
    found: dict[str, dict[str, float]] = {}
    ended = time.monotonic()
    fault.mend(faults)
    time.sleep(after)
    for kind, child in children.items():
        out, error = child.communicate("\n", timeout=60)
        if child.returncode:
            raise Unavailable(f"the prober failed: {error.strip()[-300:]}")
        for way, probes in json.loads(out).items():
            if way == HAPROXY_WAY and kind == "redirected":
                continue
            name = way if way == HAPROXY_WAY else f"{way}, {kind}"
            found[name] = _summed(probes, at, ended)
    return found


def _summed(probes: list[Any], at: float, ended: float) -> dict[str, float]:
    during = [(began, failed) for began, _, failed in probes if at <= began + TIMEOUT and began < ended]
    failed = [began for began, why in during if why]
    return {
        "failed": float(len(failed)),
        "seconds": max((began - at for began in failed), default=0.0) if failed else 0.0,
        "after": float(sum(1 for began, _, why in probes if why and began >= ended)),
    }


def run(context: Context) -> Suite:
    suite = Suite("faults", "What clients see of a fault", notes=[NOTE])
    short = context.size != "full"
    rounds = context.pick(3, 1, 1)
    wanted = FAULTS if not short else FAULTS[:1]
    with tempfile.TemporaryDirectory() as folder, Faults(context, Path(folder)).standing() as faults:
        for fault in wanted:
            samples: list[Mapping[str, Mapping[str, float]]] = []
            for i in range(rounds):
                context.say(f"    {fault.name}, {i + 1} of {rounds}")
                samples.append(measure(faults, fault, 0.5 if short else 1.0, 1.0 if short else 8.0))
            suite.tables += tables(fault, samples)
    return suite


def tables(fault: Fault, samples: list[Mapping[str, Mapping[str, float]]]) -> list[Table]:
    key = fault.name.split(" (")[0].replace(" ", "-").replace("'", "").replace(",", "")
    titles = {
        "failed": ("Connections that failed", "connections"),
        "seconds": ("From the fault to the last that failed", "s"),
        "after": ("Failed when it was mended", "connections"),
    }
    names = list(samples[0])
    return [
        Table(
            f"faults-{key}-{figure}",
            f"{fault.name}: {title}",
            unit,
            [Row(name, [sample[name][figure] for sample in samples]) for name in names],
        )
        for figure, (title, unit) in titles.items()
    ]
