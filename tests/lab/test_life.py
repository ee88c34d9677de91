"""How load balancers end, by whatever signal, and what they leave to the next."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable

import pytest

from crablb.kernel import bpf
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
    pins = [path.name for path in lab.lb.pins.glob("lb-*")]
    return pins + ["program"] * bool(program(lab)) + ["managed neighbours"] * managed


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
    remove = world.program(world.lab.lb, *crablb("remove", "--iface", "eth0", "--after", "8"))
    assert answer(remove) == "eth0: in 8 s, unless it is taken over"
    world.serve().kill()
    assert answer(remove) == "eth0: has been taken over"
    assert program(world.lab)


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
    assert "crablb remove --iface eth0" in command(lab.lb, "status", "--iface", "eth0")
    assert "crablb remove --iface eth0" in (world.folder / "serve.log").read_text()
    if how == "gone":
        lab.lb.run("ip", "link", "set", "eth0", "down")
        lab.lb.run("ip", "link", "set", "eth0", "name", "eth9")
    assert command(lab.lb, "remove", "--iface", "eth0") == "eth0: removed\n"
    if how == "gone":
        lab.lb.run("ip", "link", "set", "eth9", "name", "eth0")
    assert left(lab) == []
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
