"""Health, with real servers that fail in every way that servers do: what is found out, and what clients see of it."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from ipaddress import ip_address

import pytest
import uvloop

from crablb import Backend, Event, LoadBalancer, Service, State, Vip
from crablb.control.health.health import Health
from crablb.lab import VIP4, Lab, Node
from crablb.lab.demo import start_agent, start_nginx
from crablb.model import Check, CheckKind, Mode
from tests.helpers.namespaces import inside
from tests.helpers.processes import logged, until
from tests.helpers.world import World, status
from tests.unit.test_health_probes import alive, checked

VIP = Vip(VIP4, 80)
A, B, C = (ip_address(f"10.0.0.1{i}") for i in (1, 2, 3))
#: As the defaults, in a tenth of the time; not the timeout, as the machine may be busy.
QUICK = {"interval": 0.2, "fast_interval": 0.1, "timeout": 1.0}
TCP, REDIRECT, FALLBACK, HTTP = (
    Check(kind, **QUICK) for kind in (CheckKind.TCP, CheckKind.REDIRECT, CheckKind.FALLBACK, CheckKind.HTTP)
)


class Watched:
    """A load balancer in this process, and what it says."""

    def __init__(self, lb: LoadBalancer) -> None:
        self.lb = lb
        self.events: list[Event] = []

    @property
    def health(self) -> Health:
        assert self.lb._supervisor
        return self.lb._supervisor.health

    def healthy(self) -> str:
        """Who is, by letter; behind a slash, who is redirected to."""
        found = {name: self.health.of((VIP, address)) for name, address in (("A", A), ("B", B), ("C", C))}
        known = {name: one for name, one in found.items() if one}
        return f"{''.join(n for n, f in known.items() if f.healthy)}/{''.join(n for n, f in known.items() if f.cr)}"

    def why(self, address=A) -> str:
        found = self.health.of((VIP, address))
        assert found
        return found.reason

    async def until(self, condition: Callable[[], object], seconds: float = 30) -> None:
        async with asyncio.timeout(seconds):
            while not condition():
                await asyncio.sleep(0.02)

    async def becomes(self, wanted: str, reason: str = "") -> None:
        try:
            await self.until(lambda: self.healthy() == wanted and reason in self.why())
        except TimeoutError:
            raise AssertionError(f"{self.healthy()} and not {wanted}: {self.why()!r}, not {reason!r}") from None


def watched(lab: Lab, service: Service, test: Callable[[Watched], Awaitable[None]], **settings: object) -> None:
    async def main() -> None:
        async with LoadBalancer("eth0", [service], seed=bytes(16), **settings) as lb:
            w = Watched(lb)

            async def listen() -> None:
                async for event in lb.events():
                    w.events.append(event)

            listening = asyncio.create_task(listen())
            await asyncio.sleep(0)
            try:
                await test(w)
            finally:
                listening.cancel()

    with inside(lab.lb.netns):
        uvloop.run(main())


def started_nginx(world: World) -> None:
    for server in world.lab.servers:
        start_nginx(server, world.folder / server.name, world.folder / "big")


def pids(node: Node, name: str) -> list[int]:
    return [pid for pid in node.processes() if name in node.run("cat", f"/proc/{pid}/comm", check=False).stdout]


@contextmanager
def hung(processes: list[int]) -> Iterator[None]:
    for pid in processes:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in processes:
            os.kill(pid, signal.SIGCONT)


def fetch(world: World, count: int = 6) -> list[str]:
    """Which servers answer so many requests to the VIP, one after the other; whatever else, its exit status."""
    one = f"curl -s -m 3 http://{VIP4}/whoami || echo failed $?"
    return world.lab.client.run("bash", "-c", f"for i in {{1..{count}}}; do {one}; done").stdout.split("\n")[:-1]


def test_servers_that_fail(make_world):
    """Killed, hung, without the VIP, without an agent, without a link; each is found out, named, and left; and comes
    back by itself."""
    world = make_world(servers=3)
    started_nginx(world)
    first = world.lab.servers[0]
    agents = [start_agent(server, "server") for server in world.lab.servers]
    http = replace(HTTP, path="/whoami", body="server")
    service = Service(VIP, (Backend(A), Backend(B), Backend(C)), checks=(TCP, http, REDIRECT, FALLBACK))

    async def test(w: Watched) -> None:
        async def others() -> None:
            served = await asyncio.to_thread(fetch, world)
            assert set(served) <= {"server2", "server3"}, served

        await w.until(lambda: all(r.healthy for a in (A, B, C) for r in w.health.results((VIP, a))))
        assert w.healthy() == "ABC/ABC"
        assert [r.type for r in w.health.results((VIP, A))] == ["tcp", "http", "redirect", "fallback"]
        assert w.events == []

        for pid in pids(first, "nginx"):
            os.kill(pid, signal.SIGKILL)
        await w.becomes("BC/BC", "refused")
        await others()
        (first_event,) = [e for e in w.events if e.kind == "backend-unhealthy"]
        assert (first_event.backend, first_event.vip) == (A, VIP)
        (world.folder / first.name / "pid").unlink(missing_ok=True)
        first.run("nginx", "-c", str(world.folder / first.name / "nginx.conf"))
        await w.becomes("ABC/ABC")

        with hung(pids(first, "nginx")):  # its kernel answers, and so do checks that ask nothing else
            await w.becomes("BC/ABC", "http: no answer in 1 s")
            assert [r.healthy for r in w.health.results((VIP, A))] == [True, False, True, True]
            await others()
        await w.becomes("ABC/ABC")

        first.ip(f"addr del {VIP4}/32 dev lo")
        await w.becomes("BC/ABC", "fallback: ")
        await others()
        first.ip(f"addr add {VIP4}/32 dev lo")
        await w.becomes("ABC/ABC")

        agents[0].terminate()
        agents[0].wait()
        await w.becomes("ABC/BC")
        assert "redirect" in w.health.of((VIP, A)).cr_reason
        await w.until(lambda: [e.kind for e in w.events if "redirects" in e.kind][-1:] == ["redirects-stopped"])
        start_agent(first, "server")
        await w.becomes("ABC/ABC")

        first.ip("link set eth0 down")
        await w.becomes("BC/BC", "no answer")
        await others()
        first.ip("link set eth0 up")
        await w.becomes("ABC/ABC")

        # The operator's words: nothing new, and in maintenance nobody asks.
        w.lb.drain(VIP, A)
        await others()
        w.lb.set_state(VIP, A, State.MAINT)
        asked = [r.at for r in w.health.results((VIP, A))]
        for pid in pids(first, "nginx"):
            os.kill(pid, signal.SIGKILL)
        before = w.health.results((VIP, B))[0].at
        await w.until(lambda: w.health.results((VIP, B))[0].at > before + 1)
        assert [r.at for r in w.health.results((VIP, A))] == pytest.approx(asked, abs=0.01)
        assert w.healthy() == "ABC/ABC"

    watched(world.lab, service, test)


AGENT = """
import os, socket, sys
listening = socket.create_server(("", 9999))
print("ready", flush=True)
while True:
    connection, _ = listening.accept()
    with connection, open(sys.argv[1], "rb") as said:
        connection.sendall(said.read())
"""


def test_what_follows_for_a_service(make_world):
    """An agent as HAProxy's, backups, panic, a quorum, and the state over changes."""
    world = make_world("bridge", servers=3)
    started_nginx(world)
    first, second, third = world.lab.servers
    said = world.folder / "said"
    said.write_text("up 100%\n")
    agent = world.program(first, sys.executable, "-c", AGENT, str(said))
    assert agent.stdout.readline() == "ready\n"
    checks = (TCP, Check(CheckKind.AGENT, port=9999, **QUICK))
    service = Service(VIP, (Backend(A), Backend(B), Backend(C, backup=True)), checks=checks, mode=Mode.NEVER, quorum=1)

    def stop(node: Node) -> None:
        for pid in pids(node, "nginx"):
            os.kill(pid, signal.SIGKILL)
        (world.folder / node.name / "pid").unlink(missing_ok=True)

    def start(node: Node) -> None:
        node.run("nginx", "-c", str(world.folder / node.name / "nginx.conf"))

    async def test(w: Watched) -> None:
        engine = w.lb._supervisor.engine
        await w.until(lambda: all(w.health.results((VIP, A))[i].healthy for i in (0, 1)))
        assert set(await asyncio.to_thread(fetch, world, 12)) == {"server1", "server2"}
        said.write_text("50% # busy\n")
        await w.until(lambda: engine.part(service, A) == 0.5)
        said.write_text("drain\n")
        await w.until(lambda: w.health.of((VIP, A)).percent == 0)
        assert set(await asyncio.to_thread(fetch, world)) == {"server2"}
        said.write_text("ready 100%\n")
        await w.until(lambda: w.health.of((VIP, A)).percent == 100)
        said.write_text("down # out of order\n")
        await w.becomes("BC/ABC", "agent: down # out of order")
        assert set(await asyncio.to_thread(fetch, world)) == {"server2"}

        stop(second)
        await w.becomes("C/ABC")
        assert set(await asyncio.to_thread(fetch, world)) == {"server3"}, "the backup"
        assert engine.verdicts[VIP].backups
        assert w.health.withdrawn == {VIP}
        stop(third)
        await w.until(lambda: engine.verdicts[VIP].panic)
        served = await asyncio.to_thread(fetch, world, 12)
        assert "server1" in served, "in panic whoever is there serves"
        assert "server3" not in served

        # Another configuration brings no dead backend back, and a new backend begins as what it is.
        w.lb.replace_services([replace(service, backends=(*service.backends[:2], Backend(C)))])
        assert w.healthy() == "/ABC"
        w.lb.replace_services([service])
        start(third)
        await w.becomes("C/ABC")
        start(second)
        await w.becomes("BC/ABC")
        await w.until(lambda: not w.health.withdrawn)
        assert set(await asyncio.to_thread(fetch, world)) == {"server2"}
        kinds = [e.kind for e in w.events]
        assert [k for k in kinds if k.startswith(("panic", "quorum"))] == [
            "quorum-lost", "panic", "panic-over", "quorum-reached"
        ]  # fmt: skip
        counts = w.lb.statistics().daemon
        assert (counts["panics"], counts["quorums_lost"]) == (1, 1)
        assert counts["backends_unhealthy"] == kinds.count("backend-unhealthy")

    watched(world.lab, service, test)


@pytest.mark.long
def test_a_vip_without_a_quorum_is_not_announced(make_world):
    """And its log says why; by the command, with the checks that there are by default."""
    world = make_world("bridge", servers=2)
    world.servers(agents=False)
    world.lab.client.ip(f"route del {VIP4}/32")
    second = world.lab.servers[1]
    file = world.folder / "lb.toml"
    file.write_text(
        f"""announce = "arp"
        [[service]]
        address = "tcp://{VIP4}:80"
        backends = ["10.0.0.11", "10.0.0.12"]
        quorum = 2
        """
    )
    child = world.serve(config=file)
    log = world.folder / "serve.log"

    def said(event: str) -> list[dict[str, str]]:
        return logged(log, event)

    until(lambda: said("announced"))
    # Nobody has an agent there: they keep their places, and get the fallback.
    until(lambda: len(said("not redirected to a backend")) == 2, 30)
    assert world.echo(VIP4, "10")["intact"]
    assert not said("backend unhealthy")
    second.ip(f"addr del {VIP4}/32 dev lo")
    until(lambda: said("a VIP is withdrawn"), 30)
    assert said("backend unhealthy")[0]["backend"] == "10.0.0.12"
    assert status(world.lab)["daemon"]["quorums_lost"] == 1

    def found() -> bool:
        world.lab.client.ip("neigh flush dev eth0")
        return world.lab.client.run("ping", "-c1", "-W2", str(VIP4), check=False).returncode == 0

    assert not found()
    child.send_signal(signal.SIGHUP)
    until(lambda: said("reloaded"))
    assert not found(), "a reload brought it back"
    second.ip(f"addr add {VIP4}/32 dev lo")
    until(lambda: said("a VIP is announced again"), 30)
    until(lambda: len(said("announced")) == 2)
    assert found()


@pytest.mark.parametrize("late", [True, False], ids=["late", "in time"])
def test_a_program_with_process_numbers_of_its_own(tmp_path, late):
    """As docs/health.md has it: what makes a session of its own ends with it too."""
    told = tmp_path / "pid"
    # /proc is that of outside, and so are the numbers in it.
    mine = f"read -r pid rest < /proc/self/stat; echo $pid > {told}; exec sleep 100"
    starts = f"setsid sh -c '{mine}' & until [ -s {told} ]; do :; done"
    command = ("/usr/bin/unshare", "--pid", "--fork", "--kill-child", "/bin/sh", "-c")
    text = f"{starts}; {'sleep 100' if late else 'exit 0'}"
    check = Check(CheckKind.EXEC, command=(*command, text), timeout=2 if late else 10)
    assert checked(check, 80).ok is not late
    until(lambda: not alive(told.read_text().strip()), 10)
