"""``crablb serve`` and agents as another user than root, with the capabilities that they need and no others."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from crablb.kernel.capabilities import NUMBERS, OF_USE, SERVE
from crablb.lab import VIP4
from crablb.lab.demo import crablb
from tests.helpers.processes import ROOT
from tests.helpers.world import World

USER = "65534"
#: In a mount namespace of its own, where the folders are the user's, as docs/configuration.md has them made.
PREPARED = (
    "mount -t bpf none /sys/fs/bpf; mount -t tmpfs none /run/crablb; chmod 701 /sys/fs/bpf;"
    " install -d -o {0} /run/crablb /sys/fs/bpf/crablb;"
)
BARE = "mount -t bpf none /sys/fs/bpf; mount -t tmpfs none /run/crablb; chmod 700 /sys/fs/bpf;"


def as_user(names: tuple[str, ...], prepare: str, *command: str) -> list[str]:
    given = ",".join(["-all", *("+" + name.removeprefix("CAP_").lower() for name in names)])
    drop = ["setpriv", "--reuid", USER, "--regid", USER, "--clear-groups"]
    drop += [part for which in ("inh-caps", "ambient-caps", "bounding-set") for part in (f"--{which}", given)]
    return ["unshare", "-m", "sh", "-ec", prepare.format(USER) + ' exec "$@"', "-", *drop, *command]


def serving(*more: str) -> list[str]:
    return crablb("serve", "--iface", "eth0", "--service", f"tcp://{VIP4}:80=10.0.0.11", *more)


def held(pid: int) -> dict[str, int]:
    lines = [line.split(":") for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
    return {name: int(value, 16) for name, value, *_ in lines if name.startswith("Cap")}


@pytest.mark.parametrize("lost", SERVE)
def test_what_is_missing_is_named(make_lab, lost):
    lab = make_lab()
    names = tuple(name for name in SERVE if name != lost)
    done = lab.lb.run(*as_user(names, PREPARED, *serving()), check=False)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert re.fullmatch(rf"crablb: crablb serve lacks {lost}; run it as root, or as another user .*\n", done.stderr)


def test_folders_that_are_not_the_users(make_lab):
    done = make_lab().lb.run(*as_user(SERVE, BARE, *serving()), check=False)
    assert done.returncode == 2
    assert re.search(rf"user {USER} cannot write \S+; as root: chmod o\+x .* && install -d -o {USER} ", done.stderr)


@pytest.mark.parametrize("user", ["another", "root"])
def test_it_serves_and_has_given_up_the_rest(make_world, user):
    world: World = make_world()
    world.servers(agents=False)
    # Root may also have a port that others may not.
    more = ("--metrics-listen", f"{world.lab.lb.ip4}:80") if user == "root" else ()
    command = as_user(SERVE, PREPARED, *serving()) if user == "another" else serving(*more)
    daemon = world.program(world.lab.lb, *command)
    assert daemon.stderr
    for line in daemon.stderr:
        if '"serving"' in line:
            break
    else:
        raise AssertionError("it does not serve")
    gives_up_the_rest(daemon.pid, user)
    assert world.echo(VIP4)["intact"]
    if user == "another":  # who need not be allowed to start this interpreter
        daemon.terminate()
        assert daemon.wait() == 0
        return
    # So does the process that takes over.
    daemon.send_signal(signal.SIGUSR2)
    told = []
    for line in daemon.stderr:
        told.append(line)
        if "another process serves" in line:
            break
    assert daemon.wait() == 0, told
    successor = json.loads(told[-1])["successor"]
    gives_up_the_rest(successor, user)
    assert world.echo(VIP4)["intact"]
    os.kill(successor, signal.SIGTERM)
    for _ in daemon.stderr:  # to its end
        pass


def test_a_successor_has_what_this_one_has():
    """Also of another user, whose programs have nothing otherwise."""
    code = (
        "import subprocess; from crablb.kernel import capabilities as c; c.keep(c.SERVE)\n"
        "def told(): return subprocess.check_output(['grep', 'CapEff', '/proc/self/status'], text=True)\n"
        "before = told()\n"
        "with c.lent(): between = told()\n"
        "print(before, between, told())"
    )
    command = as_user(SERVE, ":;", sys.executable, "-c", code)
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    found = [int(word, 16) for word in done.stdout.split() if word != "CapEff:"]
    assert found == [0, sum(1 << NUMBERS[name] for name in SERVE), 0], done.stderr


def gives_up_the_rest(pid: int, user: str) -> None:
    wanted = sum(1 << NUMBERS[name] for name in SERVE)
    rest = sum(1 << NUMBERS[name] for name in OF_USE) if user == "root" else 0
    now = held(pid)
    assert now["CapEff"] == now["CapPrm"] == now["CapBnd"] == wanted | rest
    assert now["CapAmb"] == 0
    for thread in Path(f"/proc/{pid}/task").iterdir():
        assert held(int(thread.name))["CapEff"] == wanted | rest


def test_agents(make_world):
    """Both endpoints, and a redirected connection between them."""
    world: World = make_world()
    world.python(world.lab.servers[0], "serve", "server1", "80", ready=True)
    names = tuple(name for name in SERVE if name != "CAP_IPC_LOCK")
    for node, what in (
        (world.lab.servers[0], ("server",)),
        (world.lab.client, ("client", "--backends", "10.0.0.0/24")),
    ):
        command = crablb("agent", *what, "--vip", f"tcp://{VIP4}:80")
        refused = node.run(*as_user(names[1:], PREPARED, *command), check=False)
        assert refused.returncode == 2
        assert "crablb agent lacks CAP_NET_ADMIN" in refused.stderr
        agent = world.program(node, *as_user(names, PREPARED, *command))
        assert agent.stdout and agent.stderr
        assert agent.stdout.readline().strip() == "ready", agent.stderr.read()
    world.serve()
    assert world.echo(VIP4)["accepted_on"] == "10.0.0.11"
