"""Whether daemons tell their service manager that they live, and no more when a thread of theirs does not."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from crablb.lab import VIP4
from crablb.lab.demo import crablb
from tests.helpers.frozen import frozen, thread
from tests.helpers.processes import logged, until
from tests.helpers.world import World

pytestmark = pytest.mark.long

ALIVE = "WATCHDOG=1"


class Manager:
    """Stands for systemd: what it hears."""

    def __init__(self, folder: Path, seconds: float = 1) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(path := str(folder / "manager"))
        self.environment = {**os.environ, "NOTIFY_SOCKET": path, "WATCHDOG_USEC": f"{seconds * 1e6:.0f}"}
        self.heard: list[str] = []
        self._seconds = seconds

    def until(self, what: str) -> None:
        """Hear it, at last."""
        self._socket.settimeout(60)
        while (said := self._socket.recv(4096).decode()) != what:
            self.heard.append(said)

    def silent(self) -> bool:
        """Whether it does not say that it lives for twice the time in which it should."""
        self._socket.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                self._socket.recv(4096)
        end = time.monotonic() + 2 * self._seconds
        with suppress(TimeoutError):
            while (left := end - time.monotonic()) > 0:
                self._socket.settimeout(left)
                if self._socket.recv(4096).decode() == ALIVE:
                    return False
        return True

    def close(self) -> None:
        self._socket.close()


@contextmanager
def manager(folder: Path, seconds: float = 1) -> Iterator[Manager]:
    made = Manager(folder, seconds)
    try:
        yield made
    finally:
        made.close()


def test_a_load_balancers_workers(make_world: Callable[..., World]):
    """One that is in a policy that does not return; one that does not run; and who is idle, or turns."""
    world = make_world()
    world.servers()
    world.client()  # whose connections are the policy's
    folder = world.folder
    os.mkfifo(folder / "wait")
    (folder / "crab_test_slow.py").write_text(
        f"def choose(batch, backends):\n    open({str(folder / 'wait')!r}).read()\n    return [0] * len(batch)\n"
    )
    (folder / "lb.toml").write_text(
        f'interface = "eth0"\n[[service]]\naddress = "tcp://{VIP4}:80"\npolicy = "crab_test_slow:choose"\n'
        'backends = ["10.0.0.11"]\ncheck = []\n[[service]]\n'
        f'address = "tcp://{VIP4}:81"\nbackends = ["10.0.0.11", "10.0.0.12"]\ncheck = []\n'
    )
    with manager(folder) as systemd, open(folder / "serve.log", "w") as log:
        command = crablb("serve", "--config", str(folder / "lb.toml"))
        serve = world.lab.lb.popen(*command, env=systemd.environment, stderr=log)
        systemd.until("READY=1")
        assert systemd.heard == []
        systemd.until("STATUS=serving 2 services, 2 of 3 backends")  # the other one is not there
        for _ in range(8):
            systemd.until(ALIVE)

        client = world.python(world.lab.client, "echo", str(VIP4), "80", "10")  # and so to the policy
        until(lambda: logged(folder / "serve.log", "threads have hung"))
        (entry,) = logged(folder / "serve.log", "threads have hung")
        assert entry["threads"] == ["eth0/0"]
        assert systemd.silent()
        with open(folder / "wait", "w"):
            (folder / "empty").touch()
            (folder / "empty").rename(folder / "wait")  # for those that come later
        systemd.until(ALIVE)
        client.communicate(timeout=60)

        with frozen(thread(serve.pid, "crablb-eth0/0")):
            until(lambda: len(logged(folder / "serve.log", "threads have hung")) >= 2)
            assert systemd.silent()
        systemd.until(ALIVE)
        serve.terminate()
        systemd.until("STOPPING=1")
        assert serve.wait() == 0


def test_who_is_ended_says_where_it_was(make_world: Callable[..., World]):
    """By SIGABRT, as systemd's watchdog does it."""
    world = make_world()
    serve = world.serve()
    serve.send_signal(signal.SIGABRT)
    assert serve.wait() == -signal.SIGABRT
    said = (world.folder / "serve.log").read_text()
    assert "Fatal Python error: Aborted" in said
    assert '/queues.py", line' in said


def test_agents_threads(make_world: Callable[..., World]):
    """Each that hangs silences the agent, here and in another network namespace."""
    world = make_world()
    lab, folder = world.lab, world.folder
    (folder / "key").write_text("ab" * 32)
    (folder / "key").chmod(0o600)
    report = ["--report", "10.0.0.2:7946", "--report-key", str(folder / "key")]
    vip = ["--vip", f"tcp://{VIP4}:80"]
    server = crablb("agent", "server", *vip, "--metrics", "127.0.0.1", *report)
    client = crablb("agent", "client", *vip, "--backends", "10.0.0.0/24")
    both = [*client, "--netns", lab.client.netns]
    for node, command, status, threads in (
        (lab.servers[0], server, "server endpoint of 1 VIP", ["crablb-report", "crablb-metrics"]),
        (lab.client, client, "client endpoint of 1 VIP", ["crablb-watch", "crablb-verify"]),
        (lab.lb, both, "agents in 1 network namespace", ["crablb-watch", "crablb-verify"]),
    ):
        with manager(folder, 2) as systemd:
            agent = world.program(node, *command, env=systemd.environment)
            systemd.until("READY=1")
            assert systemd.heard == []  # whoever waits for READY=1 hears it first
            systemd.until(f"STATUS={status}")
            working = agent.pid
            if command is both:
                children = subprocess.run(["pgrep", "-P", str(agent.pid)], capture_output=True, text=True, check=True)
                (working,) = map(int, children.stdout.split())
            for name in threads:
                for _ in range(4):
                    systemd.until(ALIVE)
                with frozen(thread(working, name)):
                    until(systemd.silent)  # what it did before counts once more
            systemd.until(ALIVE)
            if command is both:  # all of the child
                os.kill(working, signal.SIGSTOP)
                until(systemd.silent)
                os.kill(working, signal.SIGCONT)
                systemd.until(ALIVE)
            agent.terminate()
            systemd.until("STOPPING=1")
            assert agent.wait() == 0
        (folder / "manager").unlink()
