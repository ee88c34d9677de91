"""The programs of examples/, run as they say."""

from __future__ import annotations

import re
import signal
import subprocess
import sys

import pytest

from crablb.lab import VIP4
from tests.helpers.processes import ROOT, answer
from tests.helpers.world import status

EXAMPLES = ROOT / "examples"


@pytest.fixture
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES))


def test_by_network_in_the_lab(importable, standing):
    world = standing(servers=3)
    world.client()
    backends = ",".join(s.ip4 for s in world.lab.servers)
    world.serve("--policy", "by_network:choose", what=[f"tcp://{VIP4}:80={backends}"])
    assert len({seen["server"] for seen in world.echoes(VIP4, 6)}) <= 2
    now = status(world.lab)
    assert (now["total"]["redirected"], now["daemon"]["policy_failed"]) == (6, 0)


def test_embedded(standing):
    world = standing(servers=2)
    world.client()
    service = f"tcp://{VIP4}:80={world.lab.servers[0].ip4},{world.lab.servers[1].ip4}"
    child = world.program(world.lab.lb, sys.executable, str(EXAMPLES / "embedded.py"), "eth0", service)

    def told(pattern: str) -> None:
        while not re.fullmatch(pattern, line := answer(child)):
            assert re.match("backend-up|\\d{4}-|changed", line), line

    def say(line: str) -> None:
        child.stdin.write(line + "\n")
        child.stdin.flush()

    told(f"serving tcp://{VIP4}:80")
    say(f"drain {world.lab.servers[0].ip4}")
    told("changed")
    assert {seen["server"] for seen in world.echoes(VIP4, 4)} == {"server2"}
    say("drain 10.0.0.99")
    told("not done: 10.0.0.99 is no backend of .*")
    say("weight 10.0.0.11 many")
    told("not done: invalid literal.*")
    say("what?")
    told("drain ADDRESS, up ADDRESS, .*")
    say("show")
    told("4 connections were redirected")
    child.stdin.close()
    told("4 connections were redirected")
    assert child.wait(20) == 0


def test_syn_limiter(make_world):
    """Between client and server: transfers are whole, and a client in a hurry is slowed down to its rate."""
    world = make_world(offload=False)
    lab, server = world.lab, world.lab.servers[0]
    world.python(server, "serve", server.name, "80", ready=True)
    lab.middle.ip("link set client nomaster", f"link set {server.name} nomaster")
    limiter = world.program(
        lab.middle, sys.executable, str(EXAMPLES / "syn_limiter.py"), "client", server.name, "--rate", "5"
    )
    assert answer(limiter) == f"joining client and {server.name}"
    assert world.echo(server.ip4, "300000")["intact"]
    assert world.echo(server.ip6, "10000")["intact"]
    world.python(lab.client, "hold_many", server.ip4, "80", "20", ready=True)
    assert re.fullmatch(r"10\.0\.0\.1: \d+ SYNs refused", answer(limiter))


def test_xsk_reflector(make_lab):
    lab = make_lab("bridge")
    child = lab.lb.popen(
        sys.executable, str(EXAMPLES / "xsk_reflector.py"), "eth0", stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert answer(child) == "reflecting eth0, native XDP"
    code = (
        "import socket, sys; s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x1234));"
        "s.bind(('eth0', 0x1234)); s.settimeout(60); mac = bytes.fromhex(sys.argv[1].replace(':', ''));"
        "own = s.getsockname()[4]; s.send(mac + own + b'\\x12\\x34' + b'hello, mirror' + bytes(40));"
        "print(s.recv(100) == own + mac + b'\\x12\\x34' + b'hello, mirror' + bytes(40))"
    )
    assert lab.client.run(sys.executable, "-c", code, lab.lb.mac()).stdout.strip() == "True"


LONG_RUNNING = {
    "embedded.py": (["eth0", f"tcp://{VIP4}:80=10.0.0.11"], r"serving .*"),
    "xsk_reflector.py": (["eth0"], r"reflecting .*"),
    "syn_limiter.py": (["eth0", "lo"], r"joining .*"),
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name", LONG_RUNNING)
def test_an_example_ends_well(make_lab, name, number):
    """On Ctrl-C without a word and with nothing left in the kernel; so it is on SIGTERM, but for the status."""
    lab = make_lab("bridge")
    arguments, first = LONG_RUNNING[name]
    child = lab.lb.popen(
        sys.executable, str(EXAMPLES / name), *arguments,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    while not re.fullmatch(first, answer(child)):
        pass
    child.send_signal(number)
    _, said = child.communicate(timeout=120)
    assert "Traceback" not in said
    if number == signal.SIGINT:
        assert child.returncode == 0
    assert "xdp" not in lab.lb.run("ip", "link").stdout


@pytest.mark.parametrize("name", LONG_RUNNING)
def test_an_example_says_what_is_wrong(make_lab, name):
    lab = make_lab("bridge")
    for arguments in ([], ["nothing", *LONG_RUNNING[name][0][1:]]):
        done = lab.lb.run(sys.executable, str(EXAMPLES / name), *arguments, check=False)
        assert done.returncode in (1, 2)
        assert done.stderr
        assert "Traceback" not in done.stderr
