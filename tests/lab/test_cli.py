"""The commands: bad input is one clear line, exit status 2, and nothing left in the kernel."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from crablb.errors import KernelError
from crablb.kernel import pins
from crablb.lab import VIP4, Lab, existing
from crablb.lab.demo import VIPS, crablb, start_agent
from tests.helpers.namespaces import unique
from tests.helpers.processes import ROOT, until
from tests.helpers.world import agent_status, status

SERVICE = "tcp://10.0.0.100:80=10.0.0.11"


def run(*args: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(crablb(*args), capture_output=True, text=True, cwd=ROOT, timeout=300, check=False, **more)


def leftovers(lab: Lab) -> list[str]:
    """What crablb keeps for a lab's load balancer outside of its process."""
    found = [str(p) for p in pins.RUN.glob(f"{lab.lb.pins.name}-*")]
    found += [str(p) for p in lab.lb.pins.glob("**/*")]
    if "xdp" in lab.lb.run("ip", "link").stdout:
        found.append("XDP program")
    if "managed" in lab.lb.run("ip", "neigh").stdout:
        found.append("managed neighbours")
    return found


@pytest.fixture
def lab(make_lab) -> Lab:
    return make_lab("bridge")


WRONG = {
    "no-interface": (["--iface", "eth7", "--service", SERVICE], r"interface eth7 does not exist; there are: lo, eth0"),
    "nothing-said": ([], "say which interface to serve: --iface eth0\nsay what to serve: --service tcp://.*"),
    "no-service": (
        ["--iface", "eth0"],
        r"say what to serve: --service tcp://.*, or --config FILE.toml \(made by crablb quickstart\)",
    ),
    "bad-service": (
        ["--iface", "eth0", "--service", "tcp://10.0.0.100:0=10.0.0.11,x"],
        r"--service tcp://10.0.0.100:0=10.0.0.11,x: VIP: '0' is not a port \(1 to 65535\)\n"
        r"--service tcp://10.0.0.100:0=10.0.0.11,x: backend 2: 'x' is not an IP address .*",
    ),
    "duplicate": (["--iface", "eth0", "--service", SERVICE, "--service", SERVICE], ".* is served already by .*"),
    "vip-is-backend": (
        ["--iface", "eth0", "--service", "tcp://10.0.0.11:80=10.0.0.11"],
        r".*: backend 10.0.0.11 is also a VIP .*; give it an own address",
    ),
    "queues": (
        ["--iface", "eth0", "--service", SERVICE, "--queues", "65"],
        "--queues: 65 is not a whole number from 1 to 64",
    ),
    "busy-poll": (
        ["--iface", "eth0", "--service", SERVICE, "--busy-poll", "-1"],
        "--busy-poll: -1 is not a whole number from 0 to 1000000",
    ),
    "no-file": (
        ["--config", "/nowhere.toml"],
        "/nowhere.toml: cannot be read: No such file or directory; make one: crablb quickstart --output /nowhere.toml",
    ),
    "both": (
        ["--config", "/nowhere.toml", "--service", SERVICE, "--queues", "1", "--busy-poll", "0"],
        "--service, --queues, --busy-poll cannot be given with --config; say it in /nowhere.toml",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_serve_wrong(lab, name):
    args, words = WRONG[name]
    done = lab.lb.run(*crablb("serve", *args), check=False)
    said = "\n".join(line.removeprefix("crablb: ") for line in done.stderr.strip().split("\n"))
    assert done.returncode == 2
    assert re.fullmatch(words, said), said
    assert leftovers(lab) == []


def test_serve_on_an_interface_that_is_down(lab):
    lab.lb.ip("link set eth0 down")
    done = lab.lb.run(*crablb("serve", "--iface", "eth0", "--service", SERVICE), check=False)
    assert (done.returncode, done.stderr) == (2, "crablb: interface eth0 is down; bring it up: ip link set eth0 up\n")
    assert leftovers(lab) == []


def test_serve_beside_another_xdp_program(lab, other_xdp_program):
    lab.lb.ip(f"link set eth0 xdp obj {other_xdp_program} sec xdp")
    done = lab.lb.run(*crablb("serve", "--iface", "eth0", "--service", SERVICE), check=False)
    assert done.returncode == 2
    assert re.fullmatch(
        r"crablb: interface eth0 has an XDP program already \(id \d+, see bpftool net\);"
        r" remove it: ip link set eth0 xdp off, or if that is refused, as of a link: bpftool link detach\n",
        done.stderr,
    )
    # The other program is left alone.
    assert "xdp" in lab.lb.run("ip", "link", "show", "eth0").stdout
    lab.lb.ip("link set eth0 xdp off")
    assert leftovers(lab) == []


def test_serve_twice(standing):
    """What is told is who serves, and not what of his is in the way."""
    world = standing()
    listens = ["--metrics-listen", "127.0.0.1:9471"]
    child = world.serve(*listens)
    world.lab.lb.run(*crablb("weight", "10.0.0.11", "3"))  # which a second one would find
    again = [*crablb("serve", "--iface", "eth0", "--service", SERVICE), *listens]
    done = world.lab.lb.run(*again, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        f"crablb: the load balancer of eth0 is run already by process {child.pid}; have it read its file anew (crablb"
        " reload) or serve anew (crablb takeover), or this one serve in its place (--takeover), or stop it first:"
        f" systemctl stop, or kill {child.pid}\n"
    )
    # and the first serves on
    assert world.echo(VIP4)["intact"]


def test_serve_without_privilege(lab):
    """As root by name only, without a capability."""
    powerless = ["setpriv", "--bounding-set", "-all", "--inh-caps", "-all", "--ambient-caps", "-all"]
    done = lab.lb.run(*powerless, *crablb("serve", "--iface", "eth0", "--service", SERVICE), check=False)
    assert done.returncode == 2
    assert "crablb serve lacks CAP_NET_ADMIN" in done.stderr
    assert "Traceback" not in done.stderr
    assert leftovers(lab) == []


@pytest.mark.parametrize(
    "args",
    [
        ["serve", "--iface", "eth0", "--service", SERVICE],
        ["agent", "server", "--vip", VIPS[0]],
        ["agent", "status"],
        ["lab", "up"],
        ["demo"],
    ],
    ids=lambda args: "-".join(args[:2]),
)
def test_not_root(args):
    # What it needs is imported before: Python itself may lie where only root can read.
    imports = f"import locale, os, sys, crablb.cli.{args[0]}; from crablb.cli import main"
    code = f"{imports}; os.seteuid(65534); sys.exit(main({args}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert re.fullmatch(r"crablb: crablb (serve|agent|lab|demo) .*; run it as root\b.*\n", done.stderr), done.stderr


def test_serve_from_a_file_and_its_logs(lab, tmp_path):
    """JSON lines when not on a terminal; a stop by SIGINT is clean as well."""
    path = tmp_path / "lb.toml"
    path.write_text(
        f'interface = "eth0"\nxdp_mode = "generic"\n[[service]]\naddress = "tcp://{VIP4}:80"\n'
        'backends = ["10.0.0.11", "10.0.0.99"]\n'
    )
    child = lab.lb.popen(*crablb("serve", "--config", str(path)), stderr=subprocess.PIPE)
    lines = []
    assert child.stderr
    for line in child.stderr:
        lines.append(json.loads(line))
        if lines[-1]["event"] == "serving":
            break
    assert lines[-1]["interfaces"] == {"eth0": "generic"}
    assert lines[-1]["services"] == [f"tcp://{VIP4}:80"]
    assert [e["reason"] for e in lines if e["event"] == "backend not usable yet"] == [
        "10.0.0.99 does not answer on eth0"
    ]
    assert status(lab)["mode"] == "generic"
    told = lab.lb.run(*crablb("status", "--iface", "eth0"), check=False)
    assert told.returncode == 1  # a backend does not answer
    assert told.stdout.startswith(f"eth0: generic XDP, process {child.pid}\n")
    child.send_signal(2)
    assert child.wait() == 0
    assert leftovers(lab) == []


# ---- agents ----

AGENTS_WRONG = {
    "vip": (
        ["server", "--vip", "10.0.0.100:80"],
        "--vip 10.0.0.100:80: '10.0.0.100:80' has no protocol; write tcp://.*",
    ),
    "prefix": (
        ["client", "--vip", VIPS[0], "--backends", "10.0.0.1/24"],
        "--backends 10.0.0.1/24: 10.0.0.1/24 has bits set behind the prefix; write 10.0.0.0/24",
    ),
    "cgroup": (
        ["server", "--vip", VIPS[0], "--cgroup", "/tmp"],
        "/tmp is not a cgroup v2 directory; the root is /sys/fs/cgroup.*",
    ),
    "interface": (
        ["client", "--vip", VIPS[0], "--backends", "10.0.0.0/24", "--interface", "eth7"],
        "interface eth7 does not exist; there are: lo, eth0",
    ),
    "no-route": (
        ["client", "--vip", "tcp://192.0.2.1:80", "--backends", "10.0.0.0/24"],
        "no route to 192.0.2.1; add one, as towards the load balancer",
    ),
    "everything": (
        [
            "client",
            "--vip",
            "udp://10.0.0.100:80",
            "--vip",
            "tcp://[fd00::9]:80",
            "--backends",
            "10.0.0.1/24",
            "--backends",
            "192.0.2.0/24",
            "--interface",
            "eth7",
            "--interface",
            "lo",
            "--wait",
            "x",
            "--cgroup",
            "/tmp",
        ],
        "--vip udp://10.0.0.100:80: protocol 'udp' is not supported; .*\n"
        "crablb: --backends 10.0.0.1/24: .* write 10.0.0.0/24\n"
        "crablb: --wait x: is not a number of seconds .*\n"
        "crablb: /tmp is not a cgroup v2 directory; .*\n"
        r"crablb: tcp://\[fd00::9\]:80: no --backends has IPv6 addresses; name those of its backends, as fd00::/64\n"
        "crablb: --backends 192.0.2.0/24: no route leads there; add one, or leave the prefix out\n"
        "crablb: interface eth7 does not exist; there are: lo, eth0\n"
        "crablb: --interface lo: packets of backends do not come in there",
    ),
    "other-family": (
        ["client", "--vip", "tcp://10.0.0.100:80", "--backends", "fd00::/64"],
        "tcp://10.0.0.100:80: no --backends has IPv4 addresses; name those of its backends, as 10.0.0.0/24",
    ),
    "backends-without-route": (
        ["client", "--vip", "tcp://10.0.0.100:80", "--backends", "192.0.2.0/24"],
        "--backends 192.0.2.0/24: no route leads there; add one, or leave the prefix out",
    ),
    "own-address-on-lo": (
        ["client", "--vip", "tcp://10.0.0.7:80", "--backends", "10.0.0.0/24"],
        "10.0.0.7 is an address of this host; a client cannot redirect connections to itself",
    ),
    "server-everything": (
        ["server", "--vip", "tcp://10.0.0.100", "--cgroup", "/tmp", "--interface", "eth0", "--report-key", "x"],
        "--vip tcp://10.0.0.100: .*\ncrablb: /tmp is not a cgroup v2 directory; .*\n"
        "crablb: --interface says where tunnels come in, .*\ncrablb: --report-key: of use with --report only",
    ),
    "own-address": (
        ["client", "--vip", "tcp://10.0.0.1:80", "--backends", "10.0.0.0/24"],
        "10.0.0.1 is an address of this host; a client cannot redirect connections to itself",
    ),
}


@pytest.mark.parametrize("name", AGENTS_WRONG)
def test_agent_wrong(lab, name):
    args, words = AGENTS_WRONG[name]
    lab.client.ip("addr add 10.0.0.7/32 dev lo")
    shown = "ip route; ip -6 route; tc qdisc; tc filter show dev eth0 ingress; tc filter show dev lo ingress"
    before = lab.client.run("sh", "-c", shown).stdout
    if "--cgroup" not in args:
        args = [*args, "--cgroup", str(lab.client.cgroup)]
    done = lab.client.run(*crablb("agent", *args), check=False)
    assert done.returncode == 2
    assert re.fullmatch(f"crablb: {words}\n", done.stderr), done.stderr
    assert agent_status(lab.client) == {}
    assert lab.client.run("sh", "-c", shown).stdout == before
    assert not lab.client.pins.exists()


def test_a_server_that_has_the_vip_itself(lab):
    """Told, where it would answer ARP for it; on the loopback it is as it must be."""
    server = lab.servers[0]
    server.ip(f"addr del {VIP4}/32 dev lo", f"addr add {VIP4}/32 dev eth0")
    args = [part for vip in VIPS for part in ("--vip", vip)]
    done = server.run(*crablb("agent", "server", *args, "--detach"))
    told = [json.loads(line) for line in done.stderr.splitlines()]
    assert [(line["vip"], line["interface"]) for line in told] == [(VIPS[0], "eth0")]


def test_agent_remove_while_one_runs(lab):
    child = start_agent(lab.servers[0], "server")
    done = lab.servers[0].run(*crablb("agent", "remove"), check=False)
    assert done.returncode == 2
    assert (
        f"the server agent is run by process {child.pid}; end that (systemctl stop, or kill {child.pid})" in done.stderr
    )
    assert agent_status(lab.servers[0], 1)["server"]["pid"] == child.pid  # nothing listens there
    assert lab.client.run(*crablb("agent", "status")).stdout == "no agent in this network namespace\n"
    assert lab.client.run(*crablb("agent", "remove")).stdout == "client: there was none\nserver: there was none\n"


# ---- lab and demo ----


def test_labs_of_others_are_let_be():
    """By --mine; --all names them, and does nothing unless somebody agrees."""
    names = [f"t{os.getpid()}-{whose}" for whose in ("mine", "theirs")]
    users = [{**os.environ, "SUDO_USER": name} for name in names]
    try:
        for name, user in zip(names, users, strict=True):
            assert run("lab", "up", "--name", name, "--servers", "1", env=user).returncode == 0
        every = run("lab", "down", "--all", env=users[0], stdin=subprocess.DEVNULL)
        while "there is no lab" in every.stderr:  # other tests' labs end meanwhile
            every = run("lab", "down", "--all", env=users[0], stdin=subprocess.DEVNULL)
        assert every.returncode == 2
        assert f"lab {names[0]}\n" in every.stdout
        assert f"lab {names[1]}, which somebody else has made\n" in every.stdout
        assert every.stderr.startswith("crablb: --all ends all of these; say that it is meant: --yes, or take")
        assert set(names) <= set(existing())
        done = run("lab", "down", "--mine", env=users[0])
        assert (done.returncode, done.stdout) == (0, f"lab {names[0]} is gone\n")
        assert names[0] not in existing() and names[1] in existing()
    finally:
        for name in set(names) & set(existing()):
            run("lab", "down", "--name", name)


def test_a_lab_whose_programs_have_died(tmp_path):
    """What was said to one, and it never read, is in nobody's way."""
    with Lab.create(f"t{os.getpid()}-died", servers=1) as lab:
        child = lab.client.popen("true", stdin=subprocess.PIPE)
        assert child.stdin
        child.stdin.write("said\n")  # and not sent yet
        child.wait()
    assert lab.name not in existing()


def test_lab(tmp_path):
    name = f"t{os.getpid()}-cli"
    try:
        done = run("lab", "up", "--name", name, "--servers", "2", "--topology", "routed")
        assert (done.returncode, done.stderr) == (0, "")
        again = run("lab", "up", "--name", name)
        assert again.returncode == 2
        assert again.stderr == f"crablb: lab {name} exists; remove it: crablb lab down --name {name}\n"
        shown = run("lab", "status").stdout
        assert f"{name}: routed, VIPs 10.0.0.100 and fd00::100\n" in shown
        # The second server answers the client, through the router: nobody listens there.
        told = run("lab", "exec", "--name", name, "client", "--", "bash", "-c", "exec 3<>/dev/tcp/10.3.0.12/80")
        assert "Connection refused" in told.stderr
        assert run("lab", "exec", "--name", name, "client", "--", "sh", "-c", "exit 7").returncode == 7
        wrong = run("lab", "exec", "--name", name, "server9", "--", "true")
        assert wrong.returncode == 2
        assert wrong.stderr == f"crablb: lab {name} has no node server9; it has router, client, lb, server1, server2\n"
    finally:
        done = run("lab", "down", "--name", name)
    assert (done.returncode, done.stdout) == (0, f"lab {name} is gone\n")
    assert name not in subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    gone = run("lab", "down", "--name", name)
    assert gone.returncode == 2
    assert gone.stderr.startswith(f"crablb: there is no lab {name} (there are: ")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--name", "no/slash"], "'no/slash' cannot name a lab: up to 31 of a-z, 0-9 and -, a letter or digit first"),
        (["--name", "x", "--servers", "0"], "0 servers cannot be made; choose 1 to .*"),
    ],
)
def test_lab_wrong(args, words):
    done = run("lab", "up", *args)
    assert done.returncode == 2
    assert re.fullmatch(f"crablb: {words}\n", done.stderr)


def test_a_half_made_lab_is_removed(monkeypatch):
    name = f"t{os.getpid()}-half"

    def fail(*_: object) -> None:
        raise RuntimeError("the third step fails")

    monkeypatch.setattr(Lab, "_build", lambda self, offload: (self.nodes["client"].cgroup.mkdir(parents=True), fail()))
    with pytest.raises(RuntimeError):
        Lab.create(name)
    monkeypatch.undo()
    with Lab.create(name, servers=1) as lab:
        assert lab.client.run("true").returncode == 0


def test_terminated_it_removes_its_lab():
    child = subprocess.Popen(crablb("demo"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT)
    try:
        until(lambda: list(Path("/run/netns").glob(f"crab-demo-{child.pid}-server*")))
        child.terminate()
        _, said = child.communicate(timeout=120)
        assert child.returncode == 128 + signal.SIGTERM
        assert b"Traceback" not in said
        until(lambda: not list(Path("/run/netns").glob(f"crab-demo-{child.pid}-*")))
        assert f"demo-{child.pid}" not in existing()
    finally:
        child.kill()
        child.communicate()


@pytest.mark.parametrize("topology", ["bridge", pytest.param("routed", marks=pytest.mark.long)])
def test_demo(topology):
    done = run("demo", "--json", "--topology", topology)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["held"]
    assert all(claim["held"] for claim in report["claims"])
    assert sum(report["connections_per_backend"].values()) == 300
    assert report["load_balancer_packets"]["other"] == 0
    assert report["wire_packets"] == {"SYN": 2 * report["connection_attempts"]}
    costs, survival = report["costs"], report["survival"]
    assert costs["prepared"] == 1 < costs["MPTCP, no agent"] < costs["unprepared"]
    went_on = {what: {kind for kind, ms in pauses.items() if ms is not None} for what, pauses in survival.items()}
    assert went_on["load balancer"] == {"prepared", "MPTCP, no agent"}
    assert went_on["direct way"] == {"unprepared", "MPTCP, no agent"}
    assert report["peers_seen"] == ["10.0.0.100", "fd00::100"]


def test_two_who_make_a_lab_of_one_name(monkeypatch):
    """At the same time, so that neither sees the other's: the second takes nothing of the first's away."""
    name, exists = unique(), Path.exists
    with Lab.create(name, servers=1) as lab:
        with monkeypatch.context() as patched, pytest.raises(KernelError, match=f"lab {name} exists; remove it"):
            patched.setattr(Path, "exists", lambda path: path.name != f"{name}.json" and exists(path))
            Lab.create(name, servers=1)
        assert all(node.run("true").returncode == 0 for node in lab.nodes.values())
        assert name in existing()
    assert name not in existing()
