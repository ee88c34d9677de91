"""What a person can mend is told with the command, or the option, that mends it: errors, provoked one by one."""

from __future__ import annotations

import io
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout

import pytest

from crablb import cli
from crablb.lab import VIP4, Lab, Node
from crablb.lab.demo import crablb
from tests.helpers.namespaces import inside, unique
from tests.helpers.world import World

VIP = f"tcp://{VIP4}:80"
SERVICE = f"{VIP}=10.0.0.11"

LISTEN = """
import socket, time
held = socket.create_server(("127.0.0.1", 22222))
print("ready", flush=True)
time.sleep(900_000)
"""

#: What is typed on the load balancer while none runs, or the client or a server; and how what is told ends.
NOBODY: list[tuple[str, str, str]] = [
    ("lb", "serve", r"--service tcp://.*, or --config FILE.toml \(made by crablb quickstart\)"),
    ("lb", "serve --config /nowhere/lb.toml", "make one: crablb quickstart --output /nowhere/lb.toml"),
    ("lb", "check /nowhere/lb.toml", "make one: crablb quickstart --output /nowhere/lb.toml"),
    ("lb", f"serve --iface eth7 --service {SERVICE}", "there are: lo, eth0"),
    ("lb", f"serve --iface lo --service {SERVICE}", r"the interface that leads to them \(ip route\)"),
    ("lb", f"serve --iface eth0 --service {SERVICE} --metrics-listen 127.0.0.1:22222", "ss -lntup sport = :22222"),
    ("lb", f"serve --iface eth0 --service {SERVICE} --metrics-listen 192.0.2.1", "this machine has: ip addr"),
    ("lb", f"serve --iface eth0 --service {SERVICE} --report-listen 10.0.0.2", r"\(make a key: crablb key new\)"),
    ("lb", f"serve --iface eth0 --service {SERVICE} --admin-group nobodys", "make it: groupadd --system nobodys"),
    ("lb", f"serve --iface eth0 --service {SERVICE} --report-listen 10.0.0.2 --report-key /no", "crablb key new"),
    ("lb", f"serve --iface eth0 --service {SERVICE} --seed-file /no", "make a seed: openssl rand -hex 16"),
    ("lb", "serve --iface eth0 --service tcp://10.0.0.2:80=10.0.0.11", r"--allow-own-address \(allow_own.*\)"),
    ("lb", "serve --iface eth0 --service tcp://10.0.0.100=10.0.0.11", "write tcp://10.0.0.100:80, or .*"),
    ("lb", "status", "start one: crablb serve --iface IF ..."),
    ("lb", "status --iface eth0", "start one: crablb serve --iface eth0 ..."),
    *(
        ("lb", command, r"Start one: crablb serve --iface IF ... \(.*\)")
        for command in (
            *("backends", "services", "flows", "events", "reload", "diff", "save", "plan", "log-level debug"),
            *("weight 10.0.0.11 3", "drain 10.0.0.11", "maint 10.0.0.11", "ready 10.0.0.11", "drain-lb"),
            *("trace 10.0.0.1", "capture -w /dev/null"),
        )
    ),
    ("lb", "explain '10.0.0.1:1 -> 10.0.0.100:80'", r"Start one: crablb serve --iface IF ... \(.*\)"),
    ("server1", "agent repair", "install one: crablb agent server --vip ..."),
    ("client", "agent repair client", "install one: crablb agent client --vip ..."),
    ("server1", "agent server add tcp://10.0.0.101:80", "install one: crablb agent server --vip ..."),
    ("server1", "agent server", r"--vip \(see crablb agent server --help\)"),
    ("server1", f"agent server --vip {VIP} --dsr --interface eth7", "there are: lo, eth0"),
    ("server1", f"agent server --vip {VIP} --report 10.0.0.2", r"crablb key backend ADDRESS\)"),
    ("server1", f"agent server --vip {VIP} --netns nowhere", r"\(without a name: /proc/PID/ns/net\)"),
    (
        "server1",
        f"agent server --vip {VIP} --mptcp --mptcp-address 10.0.0.77",
        r"no address of this host \(see ip addr\)",
    ),
    ("server1", f"agent server --vip {VIP} --cgroup /tmp", "the root is /sys/fs/cgroup.*"),
    ("server1", f"agent server --vip {VIP} --metrics 127.0.0.1:22222", "ss -lntup sport = :22222"),
    ("client", f"agent client --vip {VIP}", r"--backends \(see crablb agent client --help\)"),
    ("client", "lab down --name t-nowhere", "see which there are: crablb lab status"),
    ("client", "bench --suite x", "name one of micro, .*"),
    ("client", "key backend 10.0.0.11 --master /nowhere/key", "make a key: crablb key new"),
]

#: On the load balancer while it runs, started without a file.
SERVING: list[tuple[str, str]] = [
    ("reload", r"--config; start it with one \(crablb quickstart makes it\), or .*"),
    ("save", r"--config; start it with one \(crablb quickstart makes it\), or .*"),
    (f"serve --iface eth0 --service {SERVICE}", r"stop it first: systemctl stop, or kill \d+"),
    ("weight 10.0.0.77 3", "there is no backend 10.0.0.77; there are: 10.0.0.11.*"),
    ("drain 10.0.0.77", "there is no backend 10.0.0.77; there are: 10.0.0.11.*"),
    ("backends tcp://10.0.0.77:80", f"there is no service tcp://10.0.0.77:80; there are: {VIP}.*"),
    ("status --iface eth7", "there are: lo, eth0"),
    ("backends --iface eth7", r"there is one on eth0. Start one: crablb serve --iface eth7 .*"),
    ("drain-lb --withdraw", r".*\(announce = \"arp\"\).*"),
    ("capture -w /nowhere/file", "-w /nowhere/file: No such file or directory"),
]


def told(node: Node, line: str) -> list[str]:
    """What a command says that is refused."""
    words = shlex.split(line)
    if words[0] in ("serve", "agent"):  # which change the process that they are run in
        done = node.run(*crablb(*words), check=False, timeout=60)
        status, said = done.returncode, done.stderr.splitlines()
    else:
        err = io.StringIO()
        with inside(node.netns), redirect_stdout(io.StringIO()), redirect_stderr(err):
            status = cli.main(words)
        said = err.getvalue().splitlines()
    assert status in (2, 3), said
    # A daemon that had begun to serve has logged as well.
    return [each for each in said if each.startswith("crablb: ")]


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab.create(unique(), servers=1) as made:
        for node in made.nodes.values():  # somebody else has a port
            child = node.popen(sys.executable, "-c", LISTEN, stdout=subprocess.PIPE)
            assert child.stdout and child.stdout.readline() == "ready\n"
        yield made


@pytest.mark.parametrize(("node", "line", "ending"), NOBODY, ids=lambda value: value)
def test_nobody_serves(lab, node, line, ending):
    said = told(lab.node(node), line)
    assert any(re.search(f"{ending}$", each) for each in said), said


def test_somebody_serves(lab, tmp_path):
    world = World(lab, tmp_path)
    try:
        world.serve()
        for line, ending in SERVING:
            said = told(lab.lb, line)
            assert any(re.search(f"{ending}$", each) for each in said), (line, said)
    finally:
        world.end()
