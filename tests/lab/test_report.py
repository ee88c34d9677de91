"""What servers tell load balancers about their connections."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections import Counter
from ipaddress import ip_address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crablb import report
from crablb.lab import VIP4, VIP6
from crablb.lab.demo import agent_status, crablb, start_agent, status
from crablb.model import Vip
from tests.conftest import World, answer, until
from tests.lab.test_fallback import exchange


def counted(world: World, vip: str = f"tcp://{VIP4}:80") -> int:
    return int(agent_status(world.lab.servers[0])["server"]["connections"][vip])


def seen_by_ss(world: World) -> int:
    states = ["state", "established", "state", "close-wait"]
    out = world.lab.servers[0].run("ss", "-Htn", *states, "sport", "=", ":80").stdout
    return len(out.splitlines())


@pytest.mark.parametrize("prepared", [True, False], ids=["redirected", "fallback"])
def test_connections_are_counted_exactly(make_world, prepared):
    """After a storm of opens, closes, resets and killed processes: what ss says."""
    world = make_world(offload=False)
    world.servers(dsr=True)
    world.serve()
    if prepared:
        world.client()
    assert counted(world) == 0
    held = [world.python(world.lab.client, "hold_many", str(VIP4), "80", "40", ready=True) for _ in range(2)]
    until(lambda: counted(world) == 80)
    assert seen_by_ss(world) == 80
    storm = world.python(world.lab.client, "storm", str(VIP4), "80", "300")
    assert storm.wait(60) == 0, storm.stderr.read()
    until(lambda: counted(world) == 80)
    assert seen_by_ss(world) == 80
    held[0].kill()
    until(lambda: counted(world) == 40)
    assert seen_by_ss(world) == 40
    assert exchange(held[1], "still") == "40"
    # An agent that is replaced goes on counting the connections that there are.
    server = world.lab.servers[0]
    server.run("kill", "-9", str(agent_status(server)["server"]["pid"]))
    vips = [part for vip in (f"tcp://{VIP4}:80", f"tcp://[{VIP6}]:80") for part in ("--vip", vip)]
    until(lambda: not agent_status(server)["server"]["pid"])
    server.run(*crablb("agent", "server", *vips, "--dsr", "--detach"))
    assert counted(world) == 40
    assert counted(world, f"tcp://[{VIP6}]:80") == 0
    assert world.echo(VIP6, "10")["intact"]
    until(lambda: counted(world, f"tcp://[{VIP6}]:80") == 0)
    for pid in world.lab.servers[0].processes():
        command = world.lab.servers[0].run("cat", f"/proc/{pid}/cmdline", check=False).stdout
        if "tests.helpers.peers" in command:
            world.lab.servers[0].run("kill", "-9", str(pid))
    until(lambda: counted(world) == 0)


# ---- messages ----

A, B = ip_address("10.0.0.11"), ip_address("fd00::12")
MASTER = bytes(range(32))
VIPS = [Vip(VIP4, 80), Vip(VIP6, 443)]
numbers = st.integers(0, 2**32 - 1)
messages = st.builds(
    report.Message,
    st.sampled_from([report.REPORT, report.CHALLENGE]),
    st.sampled_from([A, B]),
    st.binary(min_size=8, max_size=8),
    st.binary(min_size=24, max_size=24),
    st.integers(0, 2**64 - 1),
    numbers,
    st.lists(
        st.builds(report.VipReport, st.sampled_from(VIPS), numbers, numbers, numbers), max_size=report.MAX_ENTRIES
    ).map(tuple),
)


@given(messages, st.data())
def test_a_message_survives_and_a_changed_one_does_not(message, data):
    key = report.derive(MASTER, message.backend)
    wire = message.encode(key)
    assert len(wire) <= 1232
    assert report.Message.decode(wire, key) == message
    bit = data.draw(st.integers(0, 8 * len(wire) - 1))
    changed = bytearray(wire)
    changed[bit // 8] ^= 1 << bit % 8
    cut = wire[: data.draw(st.integers(0, len(wire) - 1))]
    for bad in (bytes(changed), cut, wire + b"x"):
        with pytest.raises(report.Refused):
            report.Message.decode(bad, key)


@given(st.binary(max_size=200))
def test_rubbish_is_refused(data):
    judge = report.Judge(MASTER)
    judge.follow([A])
    for wire in (data, b"CRLR\x01" + data):
        with pytest.raises(report.Refused):
            judge.judge(wire)


class Sender:
    """An agent's side, without a network."""

    def __init__(self, backend=A, master: bytes = MASTER) -> None:
        self.backend, self.key = backend, report.derive(master, backend)
        self.session, self.challenge, self.number = os.urandom(8), report.NO_CHALLENGE, 0

    def report(self, open_: int = 0) -> bytes:
        self.number += 1
        vips = (report.VipReport(VIPS[0], open_),)
        return report.Message(report.REPORT, self.backend, self.session, self.challenge, self.number, 0, vips).encode(
            self.key
        )

    def hear(self, wire: bytes | None) -> None:
        if wire:
            message = report.Message.decode(wire, self.key)
            if message.kind == report.CHALLENGE and message.session == self.session:
                self.challenge = message.challenge


def believed(judge: report.Judge, wire: bytes) -> int | str:
    """Connections that the report is believed to tell; else why not."""
    try:
        message, answer = judge.judge(wire)
    except report.Refused as refused:
        return refused.counter
    return message.vips[0].open if message else "challenged" if answer else "nothing"


def acquainted() -> tuple[report.Judge, Sender]:
    judge, sender = report.Judge(MASTER), Sender()
    judge.follow([A, B])
    sender.hear(judge.judge(sender.report())[1])
    return judge, sender


def test_who_is_believed():
    judge, sender = acquainted()
    assert believed(judge, sender.report(5)) == 5
    assert believed(judge, Sender(master=bytes(32)).report()) == "reports_forged"
    assert believed(judge, Sender(ip_address("10.0.0.99")).report()) == "reports_unknown"
    # One backend's key is of no use for another.
    liar = Sender(B)
    liar.backend = A
    assert believed(judge, liar.report()) == "reports_forged"
    judge.follow([B])
    assert believed(judge, sender.report(6)) == "reports_unknown"
    # Its own challenge is no report.
    judge.follow([A])
    _, challenge = judge.judge(Sender().report())
    assert believed(judge, challenge) == "reports_malformed"


def test_nothing_is_believed_twice():
    judge, sender = acquainted()
    old, new = sender.report(1), sender.report(2)
    assert believed(judge, new) == 2
    for replayed in (new, old, new):  # duplicated, reordered
        assert believed(judge, replayed) == "reports_replayed"
    # The agent is started anew; what the one before had said stays said.
    again = Sender()
    again.hear(judge.judge(again.report())[1])
    later = sender.report(3)
    assert believed(judge, again.report(7)) == 7
    for replayed in (new, later):
        assert believed(judge, replayed) == "reports_replayed"
    # And so when the load balancer is: a recorded report is challenged, which its sender is not there to answer.
    judge = report.Judge(MASTER)
    judge.follow([A])
    assert believed(judge, new) == "challenged"
    recorded = again.report(8)
    assert believed(judge, recorded) == "challenged"
    again.hear(judge.judge(again.report(9))[1])
    assert believed(judge, again.report(10)) == 10
    assert believed(judge, recorded) == "challenged"
    # A replayed challenge of the load balancer before costs one report.
    stale = report.Judge(MASTER)
    stale.follow([A])
    again.hear(stale.judge(again.report())[1])
    again.hear(judge.judge(again.report())[1])
    assert believed(judge, again.report(11)) == 11


@given(st.randoms(use_true_random=False), st.floats(0, 0.6))
@settings(max_examples=50)
def test_a_lossy_network(random, loss):
    """Lost, late, doubled: what is believed only goes forward, and the end is known once it comes through."""
    judge, sender = report.Judge(MASTER), Sender()
    judge.follow([A])
    air: list[bytes] = []
    last, value = -1, 0
    for value in range(60):
        air += [sender.report(value)] * random.choice([1, 1, 2])
        random.shuffle(air)
        for wire in [air.pop() for _ in range(random.randrange(len(air) + 1))]:
            if random.random() < loss:
                continue
            try:
                message, answer = judge.judge(wire)
            except report.Refused as refused:
                assert refused.counter == "reports_replayed"
                continue
            if answer and random.random() >= loss:
                sender.hear(answer)
            if message:
                assert message.vips[0].open > last
                last = message.vips[0].open
    sender.hear(judge.judge(sender.report())[1])
    assert believed(judge, sender.report(value)) == value


# ---- end to end ----


class Reporting:
    """Servers that report to a load balancer."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.master = world.folder / "master"
        self.master.write_text(MASTER.hex())

    def serve(self, policy: str = "least-connections"):
        listen = ["--report-listen", self.world.lab.lb.ip4, "--report-key", str(self.master)]
        return self.world.serve("--policy", policy, *listen)

    def servers(self, figures=()) -> tuple[list, list]:
        """Echo servers, and their agents."""
        echoes, agents = [], []
        for i, server in enumerate(self.world.lab.servers):
            echoes.append(self.world.python(server, "serve", server.name, "80", ready=True, start_new_session=True))
            agents.append(self.agent(server, *(["--report-figure", str(figures[i])] if figures else [])))
        return echoes, agents

    def agent(self, server, *more: str):
        key = self.world.folder / server.name
        shown = server.run(*crablb("key", "backend", server.ip4, "--master", str(self.master))).stdout
        key.write_text(shown)
        return start_agent(server, "server", "--report", self.world.lab.lb.ip4, "--report-key", str(key), *more)

    def daemon(self) -> dict[str, int]:
        return {name: n for name, n in status(self.world.lab)["daemon"].items() if n}

    def log(self) -> str:
        return (self.world.folder / "serve.log").read_text()

    def names(self, count: int) -> list[str]:
        """The servers that so many connections, held at once, came to."""
        child = self.world.python(self.world.lab.client, "hold_names", str(VIP4), "80", str(count), ready=False)
        return answer(child).split()

    def settle(self, reports: int = 7) -> None:
        """Wait until each server has been heard since now; with losses that takes more reports."""
        now = self.daemon().get("reports", 0)
        until(lambda: self.daemon().get("reports", 0) >= now + reports, 60)


LOSSY = """table inet lossy {
    chain in { type filter hook input priority 0; udp dport 7171 numgen random mod 10 < 3 drop; }
    chain out { type filter hook output priority 0; udp sport 7171 numgen random mod 10 < 3 drop; }
}
"""


@pytest.mark.parametrize("lossy", [False, True], ids=["sound", "lossy"])
def test_least_connections_sees_the_servers(make_world, lossy):
    """Right to the connection after restarts of everything, and with three tenths of the datagrams lost."""
    world = make_world(servers=3)
    world.client()
    reporting = Reporting(world)
    if lossy:
        world.lab.lb.run("nft", "-f", "-", input=LOSSY)
    first = reporting.serve()
    echoes, agents = reporting.servers()
    until(lambda: reporting.log().count("server reports its load") == 3)
    assert set(Counter(reporting.names(12)).values()) == {4}
    # The daemon dies, and forgets; the reports tell the next one.  One server loses its connections.
    first.kill()
    first.wait()
    os.killpg(echoes[2].pid, signal.SIGKILL)
    world.python(world.lab.servers[2], "serve", "server3", "80", ready=True)
    reporting.serve()
    reporting.settle(18 if lossy else 7)
    assert Counter(reporting.names(4)) == {"server3": 4}
    reporting.settle(18 if lossy else 7)
    assert set(Counter(reporting.names(3)).values()) == {1}
    # An agent dies: its server is taken for average, not for empty.
    agents[0].kill()
    until(lambda: "has fallen silent" in reporting.log(), 20)
    assert reporting.daemon()["reports_silent"] >= 1
    reporting.settle(18 if lossy else 7)
    assert Counter(reporting.names(3))["server1"] <= 1


def test_least_loaded_sees_a_figure(make_world):
    world = make_world(servers=2)
    world.client()
    reporting = Reporting(world)
    figures = []
    for server in world.lab.servers:
        figures.append(world.folder / f"{server.name}.figure")
    figures[0].write_text("0.9")
    figures[1].write_text("0.1\n")
    reporting.serve("least-loaded")
    reporting.servers(figures)
    until(lambda: reporting.log().count("server reports its load") == 2)
    reporting.settle()
    assert Counter(reporting.names(5)) == {"server2": 5}
    figures[1].write_text("nonsense")  # named, and the load is taken for none
    figures[0].write_text("0.0")
    reporting.settle()
    assert reporting.daemon()["reports"] > 10


BAD = {
    "alone": (["--report-key", "x"], "--report-key: of use with --report only"),
    "detached": (
        ["--report", "10.0.0.2", "--report-key", "x", "--detach"],
        "--report needs a process; leave out --detach",
    ),
    "no-key": (["--report", "10.0.0.2"], r"--report needs --report-key FILE"),
    "bad-key": (["--report", "10.0.0.2", "--report-key", "/dev/null"], "does not hold 64 hexadecimal digits"),
    "bad-address": (["--report", "lb.example", "--report-key", "/dev/null"], "'lb.example' is not an IP address"),
    "bad-port": (["--report", "10.0.0.2:0", "--report-key", "/dev/null"], "is not ADDRESS or ADDRESS:PORT"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    arguments, message = BAD[name]
    done = subprocess.run(
        crablb("agent", "server", "--vip", "tcp://10.0.0.100:80", *arguments),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert re.search(message, done.stderr)
    assert "Traceback" not in done.stderr


def test_an_address_that_is_taken(make_world):
    world = make_world()
    reporting = Reporting(world)
    first = reporting.serve()
    listen = ["--report-listen", world.lab.lb.ip4, "--report-key", str(reporting.master)]
    first.terminate()
    first.wait()
    taken = world.python(world.lab.lb, "take_udp", world.lab.lb.ip4, "7171", ready=True)
    service = f"tcp://{VIP4}:80={world.lab.servers[0].ip4}"
    done = world.lab.lb.run(*crablb("serve", "--iface", "eth0", "--service", service, *listen), check=False)
    assert (done.returncode, "cannot take reports at 10.0.0.2:7171: Address already in use" in done.stderr) == (2, True)
    assert "xdp" not in world.lab.lb.run("ip", "link").stdout
    taken.kill()
