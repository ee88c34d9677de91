"""The threads of an agent's process fail, and are begun anew."""

from __future__ import annotations

import errno
import os
import signal
import time

import pytest

from crablb import lasting
from crablb.agent.client import ClientAgent
from crablb.agent.verify import Verifier
from crablb.cli.agent import supervisor
from crablb.cli.agent.process import Work
from crablb.config import parse_prefix, parse_vip
from crablb.kernel import bpf, netns
from crablb.lab import VIP4
from tests.helpers.namespaces import inside
from tests.helpers.processes import until

pytestmark = pytest.mark.long

VIP = f"tcp://{VIP4}:80"


@pytest.fixture
def agent(make_lab, monkeypatch):
    """A client agent; this thread is where it is."""
    monkeypatch.setattr(lasting, "FIRST", 0.01)
    lab = make_lab("bridge")
    with inside(lab.client.netns):
        made = ClientAgent([parse_vip(VIP)], [parse_prefix("10.0.0.0/24")], cgroup=lab.client.cgroup)
        with made:
            yield lab, made


def failing(monkeypatch, of, name: str, failures: list[Exception]) -> None:
    work = getattr(of, name)

    def fail(*args, **more):
        if failures:
            raise failures.pop()
        return work(*args, **more)

    monkeypatch.setattr(of, name, fail)


def test_the_watch_goes_on(agent, monkeypatch):
    """No memory, and pins that are gone, for a moment; then what changes is mended as before."""
    lab, made = agent
    failures = [MemoryError("none left"), RuntimeError("strange"), OSError(errno.ENOBUFS, "no buffers")]
    failing(monkeypatch, type(made), "_tell", failures)

    def copies() -> str:
        return lab.client.run("ip", "route", "show", "table", "all", "proto", "67").stdout

    def changed(source: str) -> bool:
        lab.client.ip(f"route replace {VIP4}/32 via {lab.lb.ip4} src {source}")
        return source in copies()

    lab.client.ip("addr add 10.0.0.51/24 dev eth0")
    with type(made).watched(verify=False):
        until(lambda: changed("10.0.0.1") and not failures, 30)
        until(lambda: changed("10.0.0.51"), 30)


def test_the_verifier_goes_on(agent, monkeypatch):
    """Its lease ends while it cannot renew it, and is renewed again."""
    failures: list[Exception] = [MemoryError("none left"), OSError(errno.ENOMEM, "no memory")]
    failing(monkeypatch, bpf.Ring, "consume", failures)
    folder = agent[1].folder()
    with Verifier(folder), bpf.Map.from_pin(folder / "client_verifier") as lease:

        def renewed() -> bool:
            value = lease.lookup(0) or bytes(16)
            return int.from_bytes(value[:8], "little") > time.monotonic_ns() + 10**9

        until(lambda: not failures, 30)
        before = lease.lookup(0)
        until(lambda: lease.lookup(0) != before and renewed(), 30)


def test_a_child_that_cannot_be_made_is_made_later(make_lab, monkeypatch):
    """No room for a process in one look; the agents that are there go on."""
    lab = make_lab("bridge", servers=2)
    first, second = (netns.find(node.netns) for node in lab.servers)
    fork, refused = os.fork, [OSError(errno.EAGAIN, "Resource temporarily unavailable")]

    def no_fork() -> int:
        if refused:
            raise refused.pop()
        return fork()

    work = Work(lambda: pytest.fail("not here"), detach=False)
    agents = supervisor.Supervisor(work, [], every=False)
    monkeypatch.setattr(supervisor.os, "fork", no_fork)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    try:
        failed = agents._take_up([first])
        assert failed == {first: "cannot start its process: Resource temporarily unavailable"}
        assert not agents._children
        # The next one gets as far as its work, which says no by itself.
        assert "cannot start" not in agents._take_up([second])[second]
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
