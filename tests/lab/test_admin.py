"""A running load balancer, asked and told: by each command, by others than root, under a flood, after its end."""

from __future__ import annotations

import contextlib
import grp
import io
import json
import os
import re
import shlex
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from crablb import cli
from crablb.api import client as api
from crablb.api import types
from crablb.api.client import ApiError, Client, NotRunning, discover
from crablb.cli import status as cli_status
from crablb.kernel import pins
from crablb.lab import VIP4
from tests.helpers.namespaces import inside
from tests.helpers.pages import commands_in, snippets
from tests.helpers.processes import ROOT, until
from tests.helpers.world import World, command, status

VIP = f"tcp://{VIP4}:80"


@pytest.fixture
def world(make_world):
    world = make_world(servers=2)
    world.servers(agents=False)
    return world


def said(world: World, *args: str, expected: int | None = 0) -> Any:
    return json.loads(command(world.lab.lb, *args, "--json", expected=expected))


@contextlib.contextmanager
def asking(world: World) -> Iterator[Client]:
    with inside(world.lab.lb.netns):
        where = discover("eth0")
    with Client(where) as client:
        yield client


def complaint(world: World, capsys: pytest.CaptureFixture[str], *args: str, expected: int) -> str:
    capsys.readouterr()
    command(world.lab.lb, *args, expected=expected)
    return capsys.readouterr().err


def as_other(user: int, group: int, do: Callable[[], object]) -> str:
    """What it raises when another user does it; empty: nothing."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.setgroups([])
            os.setgid(group)
            os.setuid(user)
            do()
        except BaseException as error:
            os.write(writing, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(writing)
    with open(reading, "rb") as pipe:
        told = pipe.read().decode()
    os.waitpid(child, 0)
    return told


def test_each_command(world, capsys):
    daemon = world.serve("--check", "none", what=[f"{VIP}=10.0.0.11,10.0.0.12"])
    held = world.python(world.lab.client, "hold", str(VIP4), "80", ready=True)
    for _ in range(4):
        world.echo(VIP4)
    assert said(world, "status")["status"]["version"]["pid"] == daemon.pid
    assert "serving: 2 of 2 backends serve, in 1 service" in command(world.lab.lb, "status")

    [service] = said(world, "services")
    assert (service["vip"], service["serving"], service["flows"] > 0) == (VIP, 2, True)
    assert service["packets"] > 0
    assert VIP in command(world.lab.lb, "services")
    assert command(world.lab.lb, "completion", "--list", "vips") == f"{VIP}\n"
    assert command(world.lab.lb, "completion", "--list", "backends").split() == ["10.0.0.11", "10.0.0.12"]
    backends = said(world, "backends", VIP)
    assert sum(backend["flows"] for backend in backends) == service["flows"]
    assert sum(backend["share"] for backend in backends) == pytest.approx(1)
    shown = command(world.lab.lb, "backends")
    assert shown.splitlines()[0] == VIP
    assert max(map(len, shown.splitlines())) <= 80

    flows = said(world, "flows")
    assert flows["total"] == service["flows"]
    [mine] = [flow for flow in said(world, "flows", "--vip", VIP)["flows"] if flow["state"] == "open"]
    assert mine["backend"] in ("10.0.0.11", "10.0.0.12")
    host = str(world.lab.client.ip4)
    assert said(world, "flows", "--client", host)["total"] == flows["total"]
    assert said(world, "flows", "--client", "10.9.9.9")["total"] == 0
    assert said(world, "flows", "--limit", "1")["truncated"]
    assert said(world, "flows", "--count")["services"][VIP][mine["backend"]] >= 1
    assert f"{flows['total']} flows" in command(world.lab.lb, "flows")

    assert said(world, "weight", "10.0.0.11", "3") == {
        "changes": [f"10.0.0.11 of {VIP}: weight 1 -> 3"],
        "warnings": [],
    }
    assert command(world.lab.lb, "weight", "10.0.0.11", "3") == "nothing to do: it is so already\n"
    assert [b["share"] for b in said(world, "backends")] == [
        pytest.approx(0.75, abs=0.01),
        pytest.approx(0.25, abs=0.01),
    ]

    # A connection that is open keeps a drain from its end.
    kept = said(world, "drain", mine["backend"], "--wait", "--timeout", "0", expected=1)
    assert kept["left"] >= 1
    other = {"10.0.0.11": "server2", "10.0.0.12": "server1"}[mine["backend"]]
    assert {world.echo(VIP4)["server"] for _ in range(4)} == {other}
    [drained] = [b for b in said(world, "backends") if b["address"] == mine["backend"]]
    assert (drained["serving"], drained["reason"], drained["changed"]) == (False, "drain", True)
    told = command(world.lab.lb, "drain", mine["backend"], "--wait", "--timeout", "0", expected=1)
    assert re.search(r"[1-9]\d* connections? left", told)
    assert said(world, "maint", mine["backend"], "--vip", VIP)["changes"] == [
        f"{mine['backend']} of {VIP}: state drain -> maint"
    ]
    assert said(world, "ready", mine["backend"])["changes"] == [f"{mine['backend']} of {VIP}: state maint -> up"]

    events = [json.loads(line) for line in command(world.lab.lb, "events", "--json").splitlines()]
    kinds = [event["kind"] for event in events]
    assert kinds.count("weight") == 1
    assert kinds.count("state") == 3
    [weight] = [event for event in events if event["kind"] == "weight"]
    assert weight["reason"] == f"1 -> 3, by uid 0 (process {os.getpid()})"
    assert "drain -> maint" in command(world.lab.lb, "events", "--since", str(weight["number"]))
    follower = world.program(world.lab.lb, *crablb("events", "-f", "--json", "--since", str(weight["number"])))
    assert json.loads(follower.stdout.readline())["number"] == weight["number"] + 1
    command(world.lab.lb, "weight", "10.0.0.12", "2")
    while '"weight"' not in (line := follower.stdout.readline()):
        assert line

    assert said(world, "log-level", "debug")["changes"] == ["log level info -> debug"]
    assert '"by": "uid 0 ' in (world.folder / "serve.log").read_text()

    assert "there are: 10.0.0.11, 10.0.0.12" in complaint(world, capsys, "weight", "10.0.0.111", "1", expected=2)
    assert "there are: tcp://10.0.0.100:80" in complaint(world, capsys, "backends", f"tcp://{VIP4}:88", expected=2)
    assert "there is one on eth0" in complaint(world, capsys, "services", "--iface", "eth9", expected=3)

    daemon.terminate()
    assert daemon.wait() == 0
    assert follower.wait() == 0  # its stream has come to its end
    assert "can be asked" in complaint(world, capsys, "services", expected=3)
    assert "no load balancer serves eth0" in complaint(world, capsys, "status", "--iface", "eth0", expected=3)
    assert "no load balancer in this network namespace" in complaint(world, capsys, "status", expected=3)
    with inside(world.lab.lb.netns):
        assert list(pins.RUN.glob(f"{pins.namespace()}*")) == []
    held.kill()


@pytest.mark.long
def test_every_documented_command(world):
    """As docs/commands.md and docs/api.md show them, in their order."""
    world.serve("--check", "none", what=[f"{VIP}=10.0.0.11,10.0.0.12"])
    until(lambda: world.echo(VIP4)["server"] == "server1")  # so that 10.0.0.11 has a flow, which a drain waits for
    shown = [
        command_
        for page in ("docs/commands.md", "docs/api.md")
        for snippet in snippets(ROOT / page)
        if snippet.language == "sh"
        for command_ in commands_in(snippet.text)
    ]
    assert len(shown) >= 17
    for words in map(shlex.split, shown):
        timed_out = 1 if "--timeout" in words else 0
        assert command(world.lab.lb, *words[1:], expected=timed_out)


@pytest.mark.long
def test_what_curl_is_shown_to_say(world):
    world.serve("--check", "none", what=[f"{VIP}=10.0.0.11,10.0.0.12"])
    with inside(world.lab.lb.netns):
        where = discover("eth0")
    [snippet] = [each for each in snippets(ROOT / "docs/api.md") if "curl" in each.text]
    for line in snippet.text.splitlines():
        words = [str(where) if word == "/run/crablb/eth0.sock" else word for word in shlex.split(line)]
        answered = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
        assert "problems" not in answered or answered["state"] == "serving"
    assert answered["changes"] == [f"10.0.0.11 of {VIP}: weight 1 -> 3"]


def crablb(*args: str) -> list[str]:
    import sys

    return [sys.executable, "-m", "crablb", *args]


def test_who_may_ask(world):
    """Root, and the group; whoever else is told who may."""
    group = grp.getgrnam("daemon")
    world.serve("--admin-group", group.gr_name, "--check", "none")
    with inside(world.lab.lb.netns):
        where = discover("eth0")
    found = where.stat()
    assert (found.st_mode & 0o777, found.st_uid, found.st_gid) == (0o660, 0, group.gr_gid)

    def ask() -> None:
        with Client(where) as client:
            client.patch("/v1/backends/10.0.0.11", types.Applied, types.Patch(weight=2))

    assert as_other(65534, group.gr_gid, ask) == ""
    events = map(json.loads, command(world.lab.lb, "events", "--json").splitlines())
    [event] = [event for event in events if event["kind"] == "weight"]
    assert ", by uid 65534 (process " in event["reason"]
    assert "only root and members of group daemon may ask" in as_other(65534, 65534, ask)

    # Commands do the same; of what only root may look at, the daemon is asked.
    def told(group: int, *words: str) -> str:
        made = import_module(f"crablb.cli.{words[0]}")  # while its file may be read
        assert made

        def run() -> None:
            with io.StringIO() as out, contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                exited = cli.main(words)
                raise AssertionError(f"{exited}: {out.getvalue()}")

        with inside(world.lab.lb.netns):
            return as_other(65534, group, run).removeprefix("AssertionError: ")

    mine, root = json.loads(told(group.gr_gid, "status", "--json")[2:]), said(world, "status")
    assert mine.keys() == root.keys()
    for key in ("interface", "mode", "pid", "state", "queues", "services", "flows", "problems"):
        assert mine[key] == root[key], key
    assert "serving: 4 of 4 backends serve" in told(group.gr_gid, "status", "--iface", "eth0")
    assert told(group.gr_gid, "drain", "10.0.0.11").startswith(f"0: 10.0.0.11 of {VIP}: state up -> drain")
    assert told(group.gr_gid, "ready", "10.0.0.11").startswith("0: ")
    for words in (["status"], ["status", "--iface", "eth0"], ["drain", "10.0.0.11"], ["backends"], ["events"]):
        refused = told(65534, *words)
        assert refused.startswith("2: ")
        assert "only root and members of group daemon may ask: usermod -aG daemon USER" in refused
    assert {b["state"] for b in said(world, "backends")} == {"up"}


@pytest.mark.long
def test_it_is_killed_hangs_and_comes_back(world, capsys, monkeypatch):
    daemon = world.serve("--check", "none")
    with inside(world.lab.lb.netns):
        where = discover("eth0")
    assert where.stat().st_mode & 0o777 == 0o600
    told = as_other(65534, 65534, lambda: Client(where).get("/v1/version", types.Version))
    assert told.startswith(f"KernelError: {where}: only root may ask; to have others ask: admin_group = ")
    daemon.send_signal(signal.SIGSTOP)
    with inside(world.lab.lb.netns), pytest.raises(ApiError, match=r"no answer within 0\.5 s"):
        Client(discover("eth0"), timeout=0.5).get("/v1/version", types.Version)
    monkeypatch.setattr(cli_status, "PATIENCE", 0.5)
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(BlockingIOError):
            while True:  # more wait than it takes connections
                waiting = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
                waiting.connect(str(where))
        hung = said(world, "status", expected=1)
        assert (hung["state"], hung["pid"]) == ("degraded", daemon.pid)
        assert "no answer within 0.5 s" in hung["problems"][0]
    daemon.send_signal(signal.SIGCONT)
    monkeypatch.setattr(cli_status, "PATIENCE", 30.0)
    assert status(world.lab)["state"] == "serving"
    daemon.kill()
    daemon.wait()
    dead = said(world, "status", "--iface", "eth0", expected=3)
    assert (dead["state"], dead["pid"], dead["status"]) == ("dead", None, None)
    assert "no process: new connections are dropped" in command(world.lab.lb, "status", expected=3)
    assert "the load balancer has ended; start it again" in complaint(world, capsys, "backends", expected=3)
    # One that has just begun cannot be asked yet: what there is of a socket is the dead one's.
    with inside(world.lab.lb.netns), pins.own("lb-eth0", "a test"):
        begun = said(world, "status", "--iface", "eth0", expected=3)
        assert (begun["state"], begun["problems"]) == ("starting", ["it has not begun to serve yet"])
        pins.begun("lb-eth0")
        assert pins.has_begun("lb-eth0")
        assert pins.owner("lb-eth0") == os.getpid()
    again = world.serve("--check", "none")
    with inside(world.lab.lb.netns):
        api.forget("eth0")  # of one that lives nothing is removed
    with asking(world) as client:
        assert client.get("/v1/version", types.Version).pid == again.pid
    with inside(world.lab.lb.netns):
        [_] = pins.RUN.glob(f"{pins.namespace()}-*.api")
    assert command(world.lab.lb, "remove", "--all") == "nothing is left\n"  # of one that lives
    again.kill()
    again.wait()
    assert command(world.lab.lb, "remove", "--all") == "eth0: removed\n"
    with inside(world.lab.lb.netns):
        assert [path for path in pins.RUN.iterdir() if path.name.startswith(f"{pins.namespace()}-")] == []
        links = [path for path in pins.RUN.iterdir() if path.is_symlink()]
        assert not any(os.readlink(path).startswith(f"{pins.namespace()}-") for path in links)


@pytest.mark.long
def test_a_restart_with_keep(world):
    """The next load balancer has the flows, and no connection breaks."""
    first = world.serve("--check", "none", "--keep", "120")
    held = world.python(world.lab.client, "hold", str(VIP4), "80", ready=True)
    mine = next(b["address"] for b in said(world, "backends", VIP) if b["flows"])
    waiting = world.program(world.lab.lb, *crablb("drain", mine, "--vip", VIP, "--wait"))
    assert "state up -> drain" in waiting.stdout.readline()
    follower = world.program(world.lab.lb, *crablb("events", "-f", "--json"))
    assert json.loads(follower.stdout.readline())["number"] == 1
    first.terminate()
    assert first.wait() == 0
    assert follower.wait() == 0
    assert status(world.lab)["state"] == "dead"
    assert waiting.poll() is None
    world.serve("--check", "none")
    assert "took over fallback flows" in (world.folder / "serve.log").read_text()
    assert status(world.lab)["state"] == "serving"
    out, _ = held.communicate("on\n", timeout=30)
    assert "on" in out
    # Who waits for a drain waits on.
    assert {b["state"] for b in said(world, "backends", VIP) if b["address"] == mine} == {"drain"}
    assert waiting.poll() is None
    command(world.lab.lb, "ready", mine)
    _, told = waiting.communicate(timeout=90)
    assert waiting.returncode == 2
    assert f"{mine} is not drained any more in {VIP}" in told


@pytest.mark.long
def test_without_it(world, capsys):
    """Nothing is imported for it, and there is no socket."""
    daemon = world.serve("--admin", "off", "--check", "none")
    with inside(world.lab.lb.netns):
        assert list(pins.RUN.glob(f"{pins.namespace()}-*.sock")) == []
    assert status(world.lab)["state"] == "serving"
    assert "can be asked" in complaint(world, capsys, "services", expected=3)
    mapped = Path(f"/proc/{daemon.pid}/maps").read_text()
    assert "_ssl" not in mapped or "starlette" not in mapped


@pytest.mark.long
def test_by_tcp(world, tmp_path):
    """With TLS and a token, by whoever has both."""
    certificate, key, token = tmp_path / "crt", tmp_path / "key", tmp_path / "token"
    subprocess.run(
        [
            "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
            "-subj", "/CN=crablb", "-addext", "subjectAltName=IP:10.0.0.2", "-keyout", key, "-out", certificate,
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    token.write_text("0123456789abcdef0123456789abcdef\n")
    token.chmod(0o600)
    key.chmod(0o600)
    where = next(str(a) for a in (world.lab.lb.ip4,))
    subprocess.run(
        [
            "openssl", "req", "-x509", "-key", key, "-days", "2", "-subj", "/CN=crablb",
            "-addext", f"subjectAltName=IP:{where}", "-out", certificate,
        ],
        check=True, capture_output=True,
    )  # fmt: skip
    files = ["--admin-cert", str(certificate), "--admin-key", str(key), "--admin-token-file", str(token)]
    world.serve("--admin-listen", f"{where}:7172", "--check", "none", *files)
    with asking(world):
        pass
    url = f"https://{where}:7172"
    with inside(world.lab.client.netns):
        with Client(url, token.read_text().strip(), ca_file=str(certificate)) as client:
            assert client.get("/v1/version", types.Version).api == 1
            stream = client.events(0)
            assert next(stream).number == 1
        with Client(url, "x" * 32, ca_file=str(certificate)) as client, pytest.raises(ApiError, match="token"):
            client.get("/v1/version", types.Version)
        with Client(url, "x" * 32) as client, pytest.raises(ApiError, match=r"self.signed certificate"):
            client.get("/v1/version", types.Version)
        with socket.create_connection((where, 7172)) as plain:
            plain.sendall(b"GET /v1/version HTTP/1.1\r\nhost: x\r\n\r\n")
            assert not plain.recv(100).startswith(b"HTTP/1.1 2")
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        with socket.create_connection((where, 7172)) as sock, old.wrap_socket(sock) as tls:
            assert tls.version() == "TLSv1.2"


def test_it_answers_under_a_flood(world):
    """The figure is the report's; here it is that it does, and loses nobody who asks."""
    world.serve("--check", "none")
    with asking(world) as client:
        flood = world.python(world.lab.client, "flood", str(VIP4), world.lab.lb.mac(), "200000")
        slowest, asked = 0.0, 0
        while flood.poll() is None:
            before = time.monotonic()
            assert client.get("/v1/status", types.Status).services == 2
            slowest, asked = max(slowest, time.monotonic() - before), asked + 1
        assert asked > 1
        assert client.get("/v1/status", types.Status).counters["xdp"]["syn"] > 0
    print(f"status under a flood: {asked} times, {slowest * 1000:.0f} ms at most")
    assert slowest < 5


@pytest.mark.long
def test_two_load_balancers_on_one_machine(make_lab, tmp_path):
    """Each has the plain name in its turn; commands ask that of their namespace."""
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    one, two = World(make_lab(), tmp_path / "one"), World(make_lab(), tmp_path / "two")
    first, second = (world.serve("--check", "none") for world in (one, two))
    for world, daemon in ((one, first), (two, second)):
        with asking(world) as client:
            assert client.get("/v1/version", types.Version).pid == daemon.pid
    for daemon in (first, second):
        daemon.terminate()
        assert daemon.wait() == 0
    for world in (one, two):
        with inside(world.lab.lb.netns), pytest.raises(NotRunning):
            discover("eth0")


def test_an_interface_that_is_renamed_is_asked_by_its_name(make_world):
    world = make_world()
    world.serve("--check", "none")
    with asking(world):
        pass
    world.lab.lb.ip("link set eth0 down", "link set eth0 name lan0", "link set lan0 up")

    def asked() -> bool:
        with inside(world.lab.lb.netns), contextlib.suppress(NotRunning):
            return bool(Client(discover("lan0")).get("/v1/version", types.Version).api)
        return False

    until(asked)
