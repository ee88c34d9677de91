"""One load balancer takes over from another one that serves, each in a process of its own."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from crablb.api import types
from crablb.api.client import Client, discover
from crablb.control import takeover
from crablb.doctor.machine import TAKEOVERS
from crablb.kernel import pins
from crablb.lab import VIP4, Lab
from crablb.lab.demo import crablb, start_agent
from tests.deaths.farm import exists
from tests.helpers.namespaces import inside
from tests.helpers.processes import ROOT, until
from tests.helpers.secret import secret
from tests.helpers.world import RELEASE, World, command, status

VIP = f"tcp://{VIP4}:80"
CONFIG = """
announce = "arp"
persist = "off"
metrics_listen = "{lb}:9100"
report_listen = "{lb}"
report_key_file = "{key}"
{more}
[[service]]
address = "{vip}"
policy = "least-connections"
check = [{{ type = "tcp", interval = 0.2 }}]
backends = [{backends}]
"""


def end(lab: Lab) -> None:
    """Whichever process serves."""
    with inside(lab.lb.netns):
        if pid := pins.owner("lb-eth0"):
            os.kill(pid, signal.SIGCONT)
            os.kill(pid, signal.SIGTERM)
            until(lambda: not pins.owner("lb-eth0"))


class Served:
    """A lab whose load balancer has a file, and may be another process by and by."""

    def __init__(self, world: World) -> None:
        self.world, self.lab = world, world.lab
        self.file, self.log = world.folder / "lb.toml", world.folder / "serve.log"
        self.key = world.folder / "master"
        secret(self.key, bytes(range(32)).hex())
        world.servers(agents=False)
        for server in self.lab.servers:
            own = world.folder / server.name
            secret(own, server.run(*crablb("key", "backend", server.ip4, "--master", str(self.key))).stdout)
            start_agent(server, "server", "--report", self.lab.lb.ip4, "--report-key", str(own))
        self.write()
        self.first = world.serve(config=self.file)
        until(lambda: self.logged("announced") and len(self.logged("server reports its load")) == len(self.lab.servers))

    def write(self, more: str = "") -> None:
        backends = ", ".join(f'"{server.ip4}"' for server in self.lab.servers)
        text = CONFIG.format(lb=self.lab.lb.ip4, key=self.key, vip=VIP, backends=backends, more=more)
        self.file.write_text(text)

    def daemon(self, name: str) -> int:
        found: int = status(self.lab)["daemon"][name]
        return found

    @property
    def pid(self) -> int:
        found: int = status(self.lab)["pid"]
        return found

    def logged(self, event: str) -> list[dict[str, Any]]:
        """Those that begin so; there are lines of processes that failed between."""
        whole = self.log.read_text().rpartition("\n")[0].splitlines()
        entries = [json.loads(line) for line in whole if line.startswith("{")]
        return [entry for entry in entries if entry["event"].startswith(event)]

    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in command(self.lab.lb, "events", "--json").splitlines()]

    def said(self, *args: str, expected: int | None = 0) -> Any:
        return json.loads(command(self.lab.lb, *args, "--json", expected=expected))

    def taken(self, expected: int = 0) -> subprocess.CompletedProcess[str]:
        """``crablb takeover``."""
        done = self.lab.lb.run(*crablb("takeover"), check=False)
        assert done.returncode == expected, (done.stderr, self.log.read_text())
        return done

    def by_hand(self, *more: str) -> subprocess.Popen[str]:
        """Somebody else starts the successor."""
        words = ("serve", "--iface", "eth0", "--config", str(self.file), *more)
        return self.world.program(self.lab.lb, *crablb(*words))

    def serves(self, child: subprocess.Popen[str]) -> None:
        """Wait until it serves; if it has ended instead, say why.  On a busy machine a start takes half a minute, and
        who follows one that died amid a takeover starts twice."""

        def whole() -> bool:
            if (self.pid, status(self.lab)["state"]) == (child.pid, "serving"):
                return True
            assert child.poll() is None, child.communicate()
            return False

        until(whole, 240)

    def end(self) -> None:
        """What serves at the end is no child of ours."""
        end(self.lab)
        self.first.wait()


@pytest.fixture
def served(make_world: Callable[..., World]) -> Iterator[Served]:
    if RELEASE < TAKEOVERS:
        pytest.skip("the kernel lets no other process have AF_XDP sockets in use (Linux 6.4 does)")
    made = Served(make_world(servers=2))
    yield made
    made.end()


class Asking:
    """Asks again and again, on new connections each time, in a thread; notes who answers, and what goes wrong."""

    def __init__(self, lab: Lab, ask: Callable[[], object]) -> None:
        self.answers: list[object] = []
        self.wrong: list[str] = []
        self._lab, self._ask, self._end = lab, ask, threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        with inside(self._lab.lb.netns):
            while not self._end.is_set():
                try:
                    self.answers.append(self._ask())
                except Exception as error:
                    self.wrong.append(repr(error))

    def __enter__(self) -> Asking:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()


def test_all_goes_over(served):
    """Nobody who asks, reports or is connected notices."""
    lab, world, address = served.lab, served.world, served.lab.lb.ip4
    servers = [server.ip4 for server in lab.servers]
    held = world.python(lab.client, "hold", str(VIP4), "80", ready=True)
    command(lab.lb, "weight", servers[0], "7")  # in the old process' memory alone
    command(lab.lb, "log-level", "debug")
    before = served.events()
    with inside(lab.lb.netns):
        where = discover("eth0").resolve()
    announced = served.logged("announced")
    reporters = served.logged("server reports its load")

    def version() -> int:
        with Client(where) as client:
            return client.get("/v1/version", types.Version).pid

    def metrics() -> int:
        connection = http.client.HTTPConnection(address, 9100, timeout=30)
        with contextlib.closing(connection):
            connection.request("GET", "/metrics")
            answered = connection.getresponse()
            answered.read()
            return answered.status

    old = served.pid
    assert old == served.first.pid
    with Asking(lab, version) as asked, Asking(lab, metrics) as scraped:
        until(lambda: asked.answers and scraped.answers)
        told = served.taken().stdout
        new = served.pid
        assert told == f"process {new} serves in place of process {old}\n"
        assert served.first.wait() == 0
        until(lambda: new in asked.answers)
        count = len(scraped.answers)
        until(lambda: len(scraped.answers) > count)
    assert (asked.wrong, scraped.wrong) == ([], [])
    assert set(asked.answers) == {old, new}
    assert set(scraped.answers) == {200}
    # What was known.
    assert {b["address"]: b["weight"] for b in served.said("backends")} == {servers[0]: 7, servers[1]: 1}
    assert all(b["healthy"] for b in served.said("backends"))
    assert served.said("diff", expected=1)["changes"]
    assert served.events()[: len(before)] == before
    assert served.said("log-level", "debug")["changes"] == []
    # No VIP was probed anew, and no server is new.
    assert served.logged("announced") == announced
    world.lab.client.run("ip", "neigh", "flush", "all")
    assert world.echo(VIP4)["server"].startswith("server")
    reports = served.daemon("reports")
    until(lambda: served.daemon("reports") >= reports + 4)
    assert served.logged("server reports its load") == reporters
    assert {name: served.daemon(name) for name in ("reports_replayed", "reports_forged")} == dict.fromkeys(
        ("reports_replayed", "reports_forged"), 0
    )
    out, _ = held.communicate("on\n", timeout=30)
    assert "on" in out
    # And again, by a signal; the log goes on in the same file.
    os.kill(new, signal.SIGUSR2)
    until(lambda: served.pid not in (old, new))
    until(lambda: len(served.logged("took over from another process")) == 2)
    told = served.logged("took over from another process")
    assert [entry["process"] for entry in told] == [old, new]
    with inside(served.lab.lb.netns), Client(discover("eth0")) as client:
        version = client.get("/v1/version", types.Version)
    assert version.took_over and version.gap and version.gap > 0
    assert version.gap == pytest.approx(told[1]["packets_waited_ms"] / 1000, abs=1e-5)
    assert world.echo(VIP4)["server"].startswith("server")
    served.end()
    with inside(lab.lb.netns):
        assert [path.name for path in pins.RUN.iterdir() if path.name.startswith(f"{pins.namespace()}-")] == []


def test_the_service_manager_is_told_who_serves(make_world):
    """By the new process, before the old one ends, which does not say that the service stops."""
    world = make_world()
    where = world.folder / "notify.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(where))
        manager.settimeout(60)

        def told() -> str:
            while (state := manager.recv(1000).decode()).startswith("STATUS="):
                pass
            return state

        words = ("serve", "--iface", "eth0", "--service", f"{VIP}={world.lab.servers[0].ip4}", "--check", "none")
        first = world.program(world.lab.lb, *crablb(*words), env={**os.environ, "NOTIFY_SOCKET": str(where)})
        assert told() == "READY=1"
        world.lab.lb.run(*crablb("takeover"))
        assert first.wait(60) == 0
        pid = status(world.lab)["pid"]
        assert (told(), pid != first.pid) == (f"MAINPID={pid}\nREADY=1", True)
        os.kill(pid, signal.SIGTERM)
        assert told() == "STOPPING=1"
        with inside(world.lab.lb.netns):
            until(lambda: not pins.owner("lb-eth0"))


def test_one_that_fails_leaves_the_old_one_serving(served, capfd):
    """However far it has come; and whoever asked is told why."""
    lab, old = served.lab, served.pid
    failed = 0
    for more, words in (
        ('xdp_mode = "purple"', "xdp_mode"),  # before it asks
        ('seed = "00112233445566778899aabbccddeeff"', "another seed"),  # before it takes
        (f'admin_group = "no-such-{os.getpid()}"', "there is no group"),
        ('admin_group = "daemon"', "may not join daemon"),
        ('metrics_listen = "192.0.2.77:9100"', "cannot serve metrics"),
    ):
        text = served.file.read_text()
        served.write(more)
        if "metrics" in more:
            served.file.write_text(text.replace(f'metrics_listen = "{lab.lb.ip4}:9100"', more))
        done = served.taken(expected=1)
        assert words in done.stderr, served.log.read_text()
        assert f"process {old} serves on" in done.stderr
        assert (served.pid, status(lab)["state"]) == (old, "serving")
        failed += 1
        assert served.daemon("takeovers_failed") == failed
        assert words in served.events()[-1]["reason"]
        assert served.world.echo(VIP4)["server"].startswith("server")
        served.write()
    # Told to the log, where nobody waits.
    served.file.write_text("what")
    os.kill(old, signal.SIGUSR2)
    until(lambda: served.logged("no takeover"))
    assert "lb.toml" in served.logged("no takeover")[0]["reason"]
    assert served.daemon("takeovers_failed") == failed + 1
    assert [one["kind"] for one in served.events()].count("takeover-failed") == failed + 1
    served.write()
    # It may be changed, reloaded and taken over after that.
    command(lab.lb, "reload")
    command(lab.lb, "weight", lab.servers[0].ip4, "3")
    reports = served.daemon("reports")
    until(lambda: served.daemon("reports") > reports)
    served.taken()
    assert served.pid != old
    assert served.world.echo(VIP4)["server"].startswith("server")


def test_who_may_not_and_who_finds_nobody(served):
    """Another user, other interfaces, an old one that is stopped; and none at all."""
    lab, old = served.lab, served.pid

    def refused(*more: str, user: tuple[str, ...] = ()) -> str:
        child = served.world.program(lab.lb, *user, *crablb("serve", "--config", str(served.file), *more, "--takeover"))
        _, said = child.communicate(timeout=60)
        assert child.returncode == 2, said
        assert "Traceback" not in said
        return str(said)

    with inside(lab.lb.netns):
        made = takeover.place("eth0").stat()
        assert (made.st_mode & 0o777, made.st_uid) == (0o600, os.geteuid())
        with pins.own("lb-eth7", "another"):  # whoever has no socket, as a version of before
            assert "cannot be taken over" in refused("--iface", "eth7")
    assert "does not serve" in refused("--iface", "lo") or "lo" in refused("--iface", "lo")
    os.kill(old, signal.SIGSTOP)
    said = refused("--iface", "eth0")
    assert f"process {old}, which serves, does not answer within {takeover.ANSWER:g} s" in said
    assert f"kill {old}" in said
    asked = lab.lb.run(*crablb("takeover", "--json"), check=False)  # it would do it when it goes on
    (problem,) = json.loads(asked.stdout)["problems"]
    assert asked.returncode == 1 and problem in asked.stderr
    assert problem.endswith("crablb doctor)")
    os.kill(old, signal.SIGCONT)
    until(lambda: status(lab)["state"] == "serving")
    assert served.pid == old
    # It ends; the next one starts with the flag as without.
    os.kill(old, signal.SIGKILL)
    served.first.wait()
    child = served.by_hand("--takeover")
    served.serves(child)
    assert served.world.echo(VIP4)["server"].startswith("server")
    # And one that somebody starts by hand takes over from that.
    another = served.by_hand("--takeover")
    assert child.wait(60) == 0
    assert served.pid == another.pid
    assert [event["kind"] for event in served.events()].count("taken-over") == 1


def test_whoever_follows_the_old_one(served, tmp_path):
    """Events are asked of the new one; of what ends, it is said why."""
    lab, old = served.lab, served.pid
    events = served.world.program(lab.lb, *crablb("events", "--json", "--follow"))
    ended = [
        served.world.program(lab.lb, *crablb(*words))
        for words in (("capture", "-w", str(tmp_path / "packets")), ("trace", str(lab.client.ip4)))
    ]
    for child in ended:
        assert child.stderr and child.stderr.readline().startswith("crablb: ")
    served.taken()
    assert served.pid != old
    command(lab.lb, "weight", lab.servers[0].ip4, "7")
    assert events.stdout
    numbers = []
    for line in events.stdout:
        numbers.append(json.loads(line)["number"])
        if json.loads(line)["kind"] == "weight":
            break
    assert numbers == list(range(1, len(numbers) + 1))
    events.kill()
    for child in ended:
        _, said = child.communicate(timeout=60)
        assert (child.returncode, "another process has taken over" in said) == (2, True), said


def test_the_old_one_is_killed_in_the_midst(served):
    """Whenever: the new one serves."""
    child = served.by_hand("--takeover")
    until(lambda: served.logged("a takeover begins"))
    served.first.kill()
    served.first.wait()
    served.serves(child)
    assert served.world.echo(VIP4)["server"].startswith("server")
    reports = served.daemon("reports")
    until(lambda: served.daemon("reports") > reports)


#: ``crablb serve`` that kills itself as it hands over, before or after it has said or heard a word.
DIES = """
import os, signal, sys
from crablb.cli import main
from crablb.control import takeover

when, does, word = sys.argv.pop(1).split()
whole = getattr(takeover._Speaker, does)

async def dies(speaker, *words):
    def die(now):
        if now == when and words[0] == word:
            os.kill(os.getpid(), signal.SIGKILL)
    die("before")
    done = await whole(speaker, *words)
    die("after")
    return done

setattr(takeover._Speaker, does, dies)
sys.exit(main())
"""


@pytest.mark.long
def test_the_old_one_is_killed_at_each_word(served):
    """One that had begun to give as well, whose successor may have nothing of it but what is in the kernel."""
    last = served.first
    for place in (
        "before say offer", "after say offer", "after hear take", "before say given", "after say given",
        "after hear more", "before say rest", "after say rest", "after hear served",
    ):  # fmt: skip
        last.kill()
        last.communicate()
        words = ("serve", "--iface", "eth0", "--config", str(served.file))
        old = served.world.program(served.lab.lb, sys.executable, "-c", DIES, place, *words)
        served.serves(old)
        maps = maps_of(old.pid)
        last = served.by_hand("--takeover")
        assert old.wait(240) == -signal.SIGKILL, place
        served.serves(last)
        assert served.world.echo(VIP4)["server"].startswith("server"), place
        reports = served.daemon("reports")
        until(lambda reports=reports: served.daemon("reports") > reports)
        # The sockets, which go on in another process, keep no map of one that is dead.
        until(lambda maps=maps: not any(exists("map_id", one) for one in maps - maps_of(served.pid)), 120)


def maps_of(pid: int) -> set[int]:
    """The ids of the BPF maps that a process has open."""
    found = set[int]()
    for info in Path(f"/proc/{pid}/fdinfo").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found |= {int(line.split()[1]) for line in info.read_text().splitlines() if line.startswith("map_id:")}
    return found


#: A successor that has taken all, and is killed before it works on the first packet; it tells which maps it has.
UNBEGUN = """
import os, signal, sys
from crablb.cli import main
from crablb.dataplane.queues import Queues
from tests.lab.test_takeover import maps_of

def start(*_):
    print(*maps_of(os.getpid()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

Queues.start = start
sys.exit(main())
"""


def test_a_successor_is_killed_before_its_first_packet(served):
    """The old one goes on with the same sockets, which keep none of the other one's maps."""
    old = served.pid
    words = ("serve", "--iface", "eth0", "--config", str(served.file), "--takeover")
    for _ in range(3):
        child = served.world.program(served.lab.lb, sys.executable, "-c", UNBEGUN, *words)
        told, said = child.communicate(timeout=240)
        if child.returncode == -signal.SIGKILL:
            break
        assert "too slow" in said, said  # a machine that has no time for it: the old one serves on
    assert child.returncode == -signal.SIGKILL, said
    until(lambda: served.logged("the takeover failed"))
    until(lambda: served.pid == old and status(served.lab)["state"] == "serving", 240)
    assert served.world.echo(VIP4)["server"].startswith("server")
    theirs = set(map(int, told.split())) - maps_of(old)
    assert theirs
    until(lambda: not any(exists("map_id", one) for one in theirs), 120)
    served.taken()
    assert served.world.echo(VIP4)["server"].startswith("server")


#: ``crablb serve --takeover`` to which something happens at a place.
BEFALLEN = """
import os, signal, sys
from crablb import cli
from crablb.control import daemon, takeover
from crablb.control.admin import sockets

place, words = sys.argv[1], sys.argv[2:]
owner, name = {
    "before it takes": (takeover.Predecessor, "take"),
    "as it asks for the rest": (takeover.Predecessor, "rest"),
    "at the last": (daemon, "_seen"),
    "nobody could take over: /run/full: No space left on device": (takeover.Host, "prepare"),
    "the API could not be served: /run/full: No space left on device": (sockets.Place, "permit"),
}[place]
whole = getattr(owner, name)
def befalls(*args):
    if "/run/full" in place:
        raise OSError(28, "No space left on device", "/run/full")
    os.kill(os.getpid(), signal.SIGTERM)
    return whole(*args)
setattr(owner, name, befalls)
sys.exit(cli.main(words))
"""


@pytest.mark.long
def test_a_new_one_that_fails_at_the_last(served, tmp_path):
    """It is told to stop, wherever it is then, or nobody could ask it: the old one serves on, is asked as before, and
    the service manager hears nothing."""
    lab, old = served.lab, served.pid
    words = ["serve", "--iface", "eth0", "--config", str(served.file), "--takeover"]
    where = tmp_path / "notify.sock"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(where))
        environment = {**os.environ, "NOTIFY_SOCKET": str(where)}
        for place in (
            "before it takes",
            "as it asks for the rest",
            "at the last",
            "nobody could take over: /run/full: No space left on device",
            "the API could not be served: /run/full: No space left on device",
        ):
            child = served.world.program(lab.lb, sys.executable, "-c", BEFALLEN, place, *words, env=environment)
            _, said = child.communicate(timeout=60)
            reason = place if "/run/full" in place else "told to stop before it served"
            assert (child.returncode, reason in said) == (2, True), said
            assert "Traceback" not in said
            until(lambda: served.pid == old and status(lab)["state"] == "serving")
            assert reason in served.logged("the takeover failed")[-1]["reason"]
            assert served.world.echo(VIP4)["server"].startswith("server")
            command(lab.lb, "reload")
        with pytest.raises(BlockingIOError):
            manager.recv(1000, socket.MSG_DONTWAIT)
    served.taken()
    assert served.pid != old


#: A load balancer whose successor kills it, when it has come to what the first argument says.
KILLS = """
import os, signal, sys
from crablb.control import daemon, takeover

def before(owner, name):
    done = getattr(owner, name)
    def kills(*given):
        parent = os.getppid()
        os.kill(parent, signal.SIGKILL)
        while os.getppid() == parent:
            pass
        return done(*given)
    setattr(owner, name, kills)

stage = sys.argv.pop(1)
if "--takeover" in sys.argv:
    before(*{"hello": (takeover, "connect"), "offered": (takeover.Predecessor, "take"),
             "given": (takeover.Predecessor, "rest"), "served": (daemon, "_succeed")}[stage])
from crablb.cli import main
sys.exit(main())
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("stage", "managed"),
    [("hello", True), ("offered", True), ("given", True), ("served", True), ("hello", False), ("served", False)],
)
def test_killed_by_the_time_its_successor_has_come_to(make_world, stage, managed):
    """A service manager that does not know the new one starts another, for which it makes room; else it serves.  Either
    is told in the log."""
    world = make_world()
    lab, log = world.lab, world.folder / "serve.log"
    world.servers(agents=False)
    words = ("serve", "--iface", "eth0", "--service", f"{VIP}={lab.servers[0].ip4}", "--check", "none")
    env = {**os.environ, "NOTIFY_SOCKET": str(world.folder / "notify.sock")}
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(env["NOTIFY_SOCKET"])
        if not managed:
            del env["NOTIFY_SOCKET"]

        def start(*command: str) -> subprocess.Popen[str]:
            with open(log, "a") as stderr:
                return lab.lb.popen(*command, *words, cwd=ROOT, env=env, stderr=stderr)

        def owner() -> int | None:
            with inside(lab.lb.netns):
                return pins.owner("lb-eth0")

        with start(sys.executable, "-c", KILLS, stage) as first:
            until(lambda: '"the API is served"' in log.read_text())
            os.kill(first.pid, signal.SIGUSR2)
            assert first.wait(60) == -signal.SIGKILL
        died = "who served has ended" if stage in ("hello", "offered") else "who served has died"
        if managed:
            until(lambda: died in log.read_text())
            until(lambda: owner() is None)
            begun = len(log.read_text())
            with start(*crablb()) as second:
                until(lambda: '"serving"' in log.read_text()[begun:])
                assert owner() == second.pid
                assert world.echo(VIP4)["server"].startswith("server")
                second.terminate()
                assert second.wait(60) == 0
        else:
            until(lambda: owner() and status(lab)["state"] == "serving")
            assert world.echo(VIP4)["server"].startswith("server")
            assert (died in log.read_text()) == (stage in ("hello", "offered"))
            new = owner()
            assert new and new != first.pid
            begun = len(log.read_text())
            os.kill(new, signal.SIGTERM)
            until(lambda: owner() is None)
            assert '"stopping"' in log.read_text()[begun:]
    with inside(lab.lb.netns):
        assert not pins.folder("lb-eth0").exists()


#: A load balancer whose successor has another file in place, and the one or the other told, when it has come so far.
REWRITES = """
import os, signal, subprocess, sys
from pathlib import Path
from crablb.control import daemon, takeover

file, then = Path(sys.argv.pop(1)), Path(sys.argv.pop(1))

def before(owner, name, how):
    done = getattr(owner, name)
    def writes(*given):
        then.replace(file)
        if how == "reload":
            subprocess.run([sys.executable, "-m", "crablb", "reload"], check=True)
        elif how != "watch":
            os.kill(os.getppid() if how == "old" else os.getpid(), signal.SIGHUP)
        return done(*given)
    setattr(owner, name, writes)

if "--takeover" in sys.argv:
    where, how = (file.parent / "when").read_text().split()
    owners = {"connect": takeover, "_succeed": daemon}
    owner = owners.get(where, takeover.Predecessor)
    before(owner, where, how)
from crablb.cli import main
sys.exit(main())
"""


@pytest.mark.long
def test_no_reload_is_lost(make_world):
    """Whenever the file is written, and whoever is told, or finds it out."""
    world = make_world()
    lab, log, file, then = world.lab, world.folder / "serve.log", world.folder / "lb.toml", world.folder / "then.toml"

    def write(path: Path, weight: int, watch: str) -> None:
        backends = f'check = []\nbackends = ["{lab.servers[0].ip4}*{weight}"]'
        path.write_text(f'persist = "off"\nwatch = {watch}\n[[service]]\naddress = "{VIP}"\n{backends}')

    def weight() -> int:
        (found,) = json.loads(command(lab.lb, "backends", "--json"))
        return int(found["weight"])

    write(file, 1, "false")
    words = [sys.executable, "-c", REWRITES, str(file), str(then), "serve", "--iface", "eth0", "--config", str(file)]
    with open(log, "w") as stderr:
        first = lab.lb.popen(*words, cwd=ROOT, stderr=stderr)
    try:
        until(lambda: '"the API is served"' in log.read_text())
        stages = (
            "connect reload",
            "take old",
            "_succeed old",
            "served old",
            "take new",
            "connect watch",
            "take watch",
            "_succeed watch",
        )
        for number, stage in enumerate(stages, 2):
            (world.folder / "when").write_text(stage)
            watch = "true" if "watch" in stage or stage == "take new" else "false"  # for the next one
            write(then, number, watch)
            before = status(lab)["pid"]
            lab.lb.run(*crablb("takeover"))
            until(lambda: weight() == number)  # noqa: B023
            assert status(lab)["pid"] != before, stage
            assert command(lab.lb, "diff") == "nothing was changed at run time\n"
    finally:
        end(lab)
        first.wait()


@pytest.mark.long
@pytest.mark.parametrize("own", [False, True], ids=["none", "own"])
def test_in_a_mount_namespace_with_another_sys(make_world, own):
    """As of ip netns exec: the pins are in the world outside, which the successor has no right to look for."""
    world = make_world()
    lab, log = world.lab, world.folder / "serve.log"
    world.servers(agents=False)
    words = ("serve", "--iface", "eth0", "--service", f"{VIP}={lab.servers[0].ip4}", "--check", "none")
    mounts = "mount -t bpf bpf /sys/fs/bpf; " if own else ""
    with open(log, "w") as stderr:
        command = ["ip", "netns", "exec", lab.lb.netns, "sh", "-ec", f'{mounts}exec "$@"', "-", *crablb(*words)]
        first = subprocess.Popen(command, cwd=ROOT, stderr=stderr)
    try:
        until(lambda: '"the API is served"' in log.read_text())
        with inside(lab.lb.netns):
            folder = pins.folder("lb-eth0")
        for _ in range(2):
            before = status(lab)["pid"]
            lab.lb.run(*crablb("takeover"))
            assert status(lab)["pid"] != before
            assert (folder / "link").exists()
            assert world.echo(VIP4)["server"].startswith("server")
        # Who sees another one alone, as in a container of its own, is told so.
        other = ["unshare", "--mount", "--pid", "--fork", "--mount-proc"]
        other += ["sh", "-ec", 'mount -t bpf bpf /sys/fs/bpf; exec "$@"', "-"]
        refused = lab.lb.run(*other, *crablb(*words), "--takeover", check=False)
        assert (refused.returncode, "another BPF file system" in refused.stderr) == (2, True), refused.stderr
        assert world.echo(VIP4)["server"].startswith("server")
    finally:
        end(lab)
        first.wait()
    assert not folder.exists()


@pytest.mark.parametrize("stage", ["offered", "given"])
def test_told_to_stop_in_the_midst(served, stage):
    """Both end in order, and leave nothing."""
    lab, old = served.lab, served.pid
    with inside(lab.lb.netns):
        found = takeover.connect(["eth0"])
        assert found
        with pytest.raises(Exception, match="another takeover is on its way"):
            takeover.connect(["eth0"])
    # What changes something is refused meanwhile.
    for words in (["reload"], ["weight", lab.servers[0].ip4, "9"]):
        done = lab.lb.run(*crablb(*words), check=False)
        assert (done.returncode, "taking over just now; try again" in done.stderr) == (2, True), done.stderr
    other = lab.lb.run(*crablb("takeover"), check=False)
    assert (other.returncode, "taking over already" in other.stderr) == (1, True), other.stderr
    if stage == "given":
        found.take()
        found.failed("the test has seen enough")
        found.close()
        until(lambda: served.logged("the takeover failed"))
        assert served.world.echo(VIP4)["server"].startswith("server")
    os.kill(old, signal.SIGTERM)
    assert served.first.wait(60) == 0
    if stage == "offered":
        with pytest.raises(Exception, match="it was told to stop"):
            found.take()
        found.close()
    with inside(lab.lb.netns):
        assert [path.name for path in pins.RUN.iterdir() if path.name.startswith(f"{pins.namespace()}-")] == []
        assert not pins.folder("lb-eth0").exists()
