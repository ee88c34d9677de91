"""How load balancers end, by whatever signal, and what they leave to the next."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from crablb.kernel import bpf, pins
from crablb.lab import VIP4, Lab
from crablb.lab.demo import crablb
from tests.helpers.namespaces import inside
from tests.helpers.processes import answer, exchange, until
from tests.helpers.world import World, command, status

SERVICE = f"tcp://{VIP4}:80=10.0.0.11,10.0.0.12,10.0.0.13"


def program(lab: Lab) -> int:
    """The id of the XDP program on the load balancer's interface."""
    with inside(lab.lb.netns):
        return bpf.xdp_program(socket.if_nametoindex("eth0"))[0]


def left(lab: Lab) -> list[str]:
    """What is there of a load balancer."""
    managed = "managed" in lab.lb.run("ip", "neigh").stdout
    pinned = [path.name for path in lab.lb.pins.glob("lb-*")]
    return pinned + ["program"] * bool(program(lab)) + ["managed neighbours"] * managed


@pytest.mark.long
def test_a_clean_stop_keeps_flows_for_the_next(make_world: Callable[..., World]):
    """Connections by the fallback go on in between and behind it, whose backends are others."""
    world = make_world(servers=3, offload=False)
    world.servers(dsr=True)
    first = world.serve("--ack-bypass", "on", "--keep", "600", what=[SERVICE])
    held = world.python(world.lab.client, "hold_many", str(VIP4), "80", "60", ready=True)
    assert exchange(held, "one") == "60"
    before = program(world.lab)
    first.send_signal(signal.SIGTERM)
    assert first.wait() == 0
    assert program(world.lab) == before
    assert exchange(held, "two") == "60"
    second = world.serve("--ack-bypass", "on", what=[SERVICE.replace("10.0.0.11,", "")])
    assert exchange(held, "three") == "60"
    assert status(world.lab)["flows"] == 60
    second.terminate()
    assert second.wait() == 0
    assert left(world.lab) == []


def test_what_is_kept_is_removed_in_the_end(make_world: Callable[..., World]):
    world = make_world()
    first = world.serve("--keep", "1")
    first.terminate()
    assert first.wait() == 0
    until(lambda: left(world.lab) == [], 30)


def test_what_was_taken_over_is_not_removed(make_world: Callable[..., World]):
    world = make_world()
    world.serve().kill()
    remove = world.program(world.lab.lb, *crablb("remove", "--iface", "eth0", "--after", "600"))
    assert answer(remove) == "eth0: in 600 s, unless it is taken over"
    world.serve().kill()
    assert answer(remove) == "eth0: has been taken over"
    assert program(world.lab)


def programs(lab: Lab, *interfaces: str) -> list[tuple[int, str]]:
    with inside(lab.lb.netns):
        return [bpf.xdp_program(socket.if_nametoindex(name)) for name in interfaces]


@pytest.mark.long
@pytest.mark.parametrize(
    "how", ["another program", "another mode", "another mode, another seed", "another mode of the first, another seed"]
)
def test_a_takeover_that_fails(make_world: Callable[..., World], tmp_path: Path, other_xdp_program: Path, how: str):
    """On one of two interfaces: what a dead one had left goes on by both, and the next one takes it over."""
    world = make_world(servers=2, offload=False)
    lab = world.lab
    world.servers(dsr=True)
    lab.lb.ip("link add br1 type bridge", "link set br1 up")  # it has no native mode
    if "of the first" in how:
        lab.lb.ip("link set eth0 name swap", "link set br1 name eth0", "link set swap name br1")
    more = ["--iface", "br1"]
    first = world.serve(*more)
    held = world.python(lab.client, "hold_many", str(VIP4), "80", "20", ready=True)
    assert exchange(held, "one") == "20"
    first.kill()
    first.wait()
    if how == "another program":
        with bpf.Link.from_pin(lab.lb.pins / "lb-br1" / "link") as link:
            link.detach()
        lab.lb.ip(f"link set br1 xdpgeneric obj {other_xdp_program} sec xdp")
    before = programs(lab, "eth0", "br1")
    pinned = sorted(lab.lb.pins.glob("lb-*/*"))
    wrong = [*more, "--xdp-mode", "native", "--service", f"tcp://{VIP4}:81=10.0.0.11"]  # and other services
    if "seed" in how:
        (tmp_path / "seed").write_text("00" * 16)
        (tmp_path / "seed").chmod(0o600)
        wrong += ["--seed-file", str(tmp_path / "seed")]
    done = lab.lb.run(*crablb("serve", "--iface", "eth0", *wrong), check=False)
    assert done.returncode == 2
    assert "XDP program" in done.stderr and "Traceback" not in done.stderr
    assert programs(lab, "eth0", "br1") == before
    assert sorted(lab.lb.pins.glob("lb-*/*")) == pinned
    assert exchange(held, "two") == "20"
    if how == "another program":
        lab.lb.ip("link set br1 xdpgeneric off")
    last = world.serve(*more)
    assert '"flows": 20' in (world.folder / "serve.log").read_text()
    assert exchange(held, "three") == "20"
    last.terminate()
    assert last.wait() == 0
    assert left(lab) == []


@pytest.mark.parametrize("how", ["kill", "gone"])
def test_a_dead_one_is_removed_by_command(make_world: Callable[..., World], how: str):
    world = make_world()
    lab = world.lab
    child = world.serve()
    refused = lab.lb.run(*crablb("remove", "--iface", "eth0"), check=False)
    assert refused.returncode == 2
    assert f"the load balancer of eth0 is run already by process {child.pid}; stop it first" in refused.stderr
    child.kill()
    child.wait()
    assert len(left(lab)) == 3
    assert "crablb remove --iface eth0" in command(lab.lb, "status", "--iface", "eth0", expected=3)
    assert "crablb remove --iface eth0" in (world.folder / "serve.log").read_text()
    if how == "gone":
        lab.lb.run("ip", "link", "set", "eth0", "down")
        lab.lb.run("ip", "link", "set", "eth0", "name", "eth9")
    known = "eth0 (it is eth9 now)" if how == "gone" else "eth0"
    assert command(lab.lb, "remove", "--iface", "eth0") == f"{known}: removed\n"
    if how == "gone":
        lab.lb.run("ip", "link", "set", "eth9", "name", "eth0")
    assert left(lab) == []
    assert command(lab.lb, "remove", "--iface", "eth0") == "eth0: there was none\n"


@pytest.mark.parametrize("when", ["while it lives", "afterwards"])
def test_one_whose_interface_is_gone_is_removed_by_command(make_world: Callable[..., World], when: str):
    """Its sockets too."""
    world = make_world()
    lab = world.lab
    child = world.serve()

    def sockets() -> list[str]:
        return sorted(path.name for path in pins.RUN.glob(f"{lab.lb.pins.name}-*") if path.suffix in (".sock", ".api"))

    assert len(sockets()) == 2
    if when == "while it lives":
        lab.lb.ip("link del eth0")
        log = world.folder / "serve.log"
        until(lambda: "is served again when" in log.read_text())
    child.kill()
    child.wait()
    if when == "afterwards":
        lab.lb.ip("link del eth0")
    assert command(lab.lb, "remove", "--iface", "eth0") == "eth0: removed\n"
    assert sockets() == []
    assert command(lab.lb, "remove", "--iface", "eth0") == "eth0: there was none\n"


def test_an_embedding_program_that_dies(make_world: Callable[..., World]):
    """By a signal that it does not take: what stays is found by the same command."""
    world = make_world()
    code = f"""
import sys
from crablb import LoadBalancer
with LoadBalancer("eth0", ["{SERVICE}"]):
    print("ready", flush=True, file=sys.stderr)
    sys.stdin.read()
"""
    child = world.program(world.lab.lb, sys.executable, "-c", code)
    assert child.stderr
    assert "ready\n" in iter(child.stderr.readline, "")  # behind the log's lines
    child.terminate()
    assert child.wait() == -signal.SIGTERM
    assert program(world.lab)
    assert command(world.lab.lb, "remove", "--iface", "eth0") == "eth0: removed\n"
    assert left(world.lab) == []


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP])
def test_signals_that_do_not_end_it(make_world: Callable[..., World], number: signal.Signals):
    world = make_world()
    child = world.serve()
    log = world.folder / "serve.log"
    log.rename(world.folder / "serve.log.1")
    child.send_signal(number)
    if number == signal.SIGUSR1:  # it goes on in a new file
        until(lambda: log.exists() and "opened anew" in log.read_text())
    child.terminate()
    assert child.wait() == 0
    assert left(world.lab) == []
    written = (log if number == signal.SIGUSR1 else world.folder / "serve.log.1").read_text()
    assert re.search('"event": "stopping"', written)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP])
@pytest.mark.parametrize("where", [[], ["--netns"]], ids=["here", "children"])
def test_signals_that_do_not_end_an_agent(make_world: Callable[..., World], number: signal.Signals, where: list[str]):
    world = make_world()
    server = world.lab.servers[0]
    args = crablb("agent", "server", "--vip", f"tcp://{VIP4}:80", *([*where, server.netns] if where else []))
    child = subprocess.Popen(args, stdout=-1, stderr=-1, text=True) if where else world.program(server, *args)
    try:
        assert answer(child) == "ready"
        child.send_signal(number)
        child.terminate()
        assert child.wait(20) == 0
    finally:
        child.kill()
        child.communicate()


#: Of whoever starts it, which a program has from it (env of coreutils).
BLOCKED = ["env", "--block-signal", "--ignore-signal=CHLD"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_signals_that_were_blocked_when_it_was_started(make_world: Callable[..., World], number: signal.Signals):
    """They end a load balancer, and both agents, here and in another network namespace, all the same."""
    world = make_world(servers=1)
    balancer = world.serve(program=[*BLOCKED, *crablb()])
    server, client = world.lab.servers[0], world.lab.client
    agents = [
        world.program(server, *BLOCKED, *crablb("agent", "server", "--vip", f"tcp://{VIP4}:80")),
        world.program(
            world.lab.lb,  # which starts ip and tc as well, and waits for them
            *BLOCKED,
            *crablb(
                "agent", "client", "--vip", f"tcp://{VIP4}:80", "--backends", "10.0.0.0/24", "--netns", client.netns
            ),
        ),
    ]
    assert [answer(agent) for agent in agents] == ["ready", "ready"]
    for child in [*agents, balancer]:
        child.send_signal(number)
    assert [child.wait(60) for child in [*agents, balancer]] == [0, 0, 0]
    assert left(world.lab) == []
    assert not [*server.pins.glob("server-*"), *client.pins.glob("client-*")]
