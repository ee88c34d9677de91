"""The programs of examples/, run as they say."""

from __future__ import annotations

import importlib
import re
import sys

import numpy as np
import pytest

from crablb.lab import VIP4
from crablb.lab.demo import status
from crablb.model import mapped
from crablb.policy import CHOICE, Balance
from tests.conftest import ROOT, answer
from tests.unit.test_policy import VIP, A, B, C, ip_address

EXAMPLES = ROOT / "examples"


@pytest.fixture
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES))


def test_by_network(importable):
    choose = importlib.import_module("by_network").choose
    backends = Balance().backends(VIP, {A: 1, B: 1, C: 2})

    def chosen(*clients: str) -> list[int]:
        batch = np.zeros(len(clients), CHOICE)
        for i, client in enumerate(clients):
            batch["client"][i] = np.frombuffer(mapped(ip_address(client)), np.uint8)
        return choose(batch, backends).tolist()

    for network in (["10.1.2.3", "10.1.2.99"], ["fd00:1:2:300::1", "fd00:1:2:3ff::2"]):
        assert len(set(chosen(*network))) == 1
    # Many networks go everywhere, one to two backends at most, whatever their loads.
    assert set(chosen(*(f"10.1.{i}.1" for i in range(100)))) == {0, 1, 2}
    seen = set()
    for busy in range(3):
        backends.assigned(np.array([busy] * 50))
        seen |= set(chosen("10.1.2.3"))
    assert len(seen) <= 2


def test_by_network_in_the_lab(importable, make_world):
    world = make_world(servers=3)
    world.servers()
    world.client()
    backends = ",".join(s.ip4 for s in world.lab.servers)
    world.serve("--policy", "by_network:choose", what=[f"tcp://{VIP4}:80={backends}"])
    assert len({world.echo(VIP4, "10")["server"] for _ in range(6)}) <= 2
    now = status(world.lab)
    assert (now["total"]["redirected"], now["daemon"]["policy_failed"]) == (6, 0)


def test_embedded(make_world):
    world = make_world(servers=2)
    world.servers()
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
    assert {world.echo(VIP4, "10")["server"] for _ in range(4)} == {"server2"}
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
