"""Where pins are: by namespace, for as long as it lives, however crablb was started in it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from crablb import cli
from crablb.agent.base import cgroup_root
from crablb.errors import KernelError
from crablb.kernel import bpf, pins
from crablb.lab import VIP4, Lab
from crablb.lab.demo import VIPS, crablb
from tests.helpers.namespaces import inside, unique
from tests.helpers.processes import until
from tests.helpers.world import World, agent_status, command


@pytest.fixture
def lab(make_lab: Callable[..., Lab]) -> Lab:
    return make_lab("bridge")


@pytest.fixture
def netns() -> Iterator[Callable[[], str]]:
    made = []

    def make() -> str:
        made.append(f"crab-{unique()}")
        subprocess.run(["ip", "netns", "add", made[-1]], check=True)
        return made[-1]

    yield make
    for name in made:
        subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def test_a_name_is_of_one_namespace(netns: Callable[[], str]):
    """Also when the kernel gives its inode number out again, as it does soon."""
    names: set[str] = set()
    for _ in range(20):
        name = netns()
        with inside(name):
            assert pins.namespace() not in names
            names.add(pins.namespace())
        subprocess.run(["ip", "netns", "del", name], check=True)
    assert len(names) == 20


WANDER = """
import ctypes, os, sys
libc = ctypes.CDLL(None)
there = [os.open(f"/run/netns/{name}", os.O_RDONLY) for name in sys.argv[1:]]
print("ready", flush=True)
while True:
    for one in there:
        libc.setns(one, 0)
"""


def test_others_look_around_at_the_same_time(netns: Callable[[], str], monkeypatch: pytest.MonkeyPatch):
    """A process that goes from one namespace to the next, as one that looks for dead ones does, is in another one the
    moment after it was looked at: none is missed for it, so nobody's pins are taken for those of the dead."""
    names = [netns(), netns()]
    with subprocess.Popen([sys.executable, "-c", WANDER, *names], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout and child.stdout.readline() == "ready\n"
        places = [Path(f"/proc/{child.pid}/ns/net"), *(Path(f"/run/netns/{name}") for name in names)]
        monkeypatch.setattr(pins.netns, "places", lambda *_: iter(places))
        monkeypatch.setattr(pins.netns, "NAMED", Path("/nowhere"))
        wanted = {pins.namespace_at(place) for place in places[1:]}
        inodes = {os.stat(place).st_ino for place in places[1:]}
        try:
            for _ in range(300):
                assert wanted <= pins._alive()[1]
                assert inodes <= {one.inode for one in pins.netns.every()}
        finally:
            child.kill()


def test_looks_that_change_nothing(netns: Callable[[], str], monkeypatch: pytest.MonkeyPatch):
    """Who has which role, and what is pinned: nothing is made, renamed, or locked where the kernel says who has it."""
    with inside(netns()):
        assert (pins.held(), pins.folders()) == ({}, {})
        assert not (pins.root() / pins.namespace()).exists()
        with pins.own("lb-eth0.100", "it"):
            folder = pins.folder("lb-eth0.100")
            folder.mkdir(parents=True)
            assert pins.folders() == {"lb-eth0.100": folder}
            assert pins.held() == {"lb-eth0.100": os.getpid()}
            tried = []
            monkeypatch.setattr(pins.fcntl, "flock", lambda *args: tried.append(args))
            assert pins.held() == {"lb-eth0.100": os.getpid()}
            assert not tried
            monkeypatch.undo()
            # As where the list of locks is masked, or leaves others' processes out.
            monkeypatch.setattr(pins, "_holding", lambda files: set())
            assert pins.held() == {"lb-eth0.100": os.getpid()}
            monkeypatch.undo()
            # A version of before named the folder by the namespace's inode number.
            before = pins.root() / str(os.stat("/proc/thread-self/ns/net").st_ino)
            before.unlink(missing_ok=True)
            folder.parent.rename(before)
            assert pins.folders() == {"lb-eth0.100": before / folder.name}
            pins.remove(before / folder.name)
        stale = pins.RUN / f"{pins.namespace()}-lb-eth1.lock"
        stale.touch()
        assert pins.held() == {"lb-eth1": None}
        stale.unlink()


@pytest.mark.parametrize("ends", [True, False])
def test_who_looks_is_no_owner(netns: Callable[[], str], monkeypatch: pytest.MonkeyPatch, ends: bool):
    """He has the lock for an instant; so has an owner that is about to end, whose lock's file goes with him."""
    with inside(netns()):
        path = pins.RUN / f"{pins.namespace()}-lb-veth0.lock"

        def held() -> None:
            path.touch()
            fd = os.open(path, os.O_RDONLY)
            fcntl.flock(fd, fcntl.LOCK_EX)

            def gone(_: float) -> None:
                if ends:
                    path.unlink()
                os.close(fd)
                monkeypatch.undo()

            monkeypatch.setattr(pins, "time", SimpleNamespace(sleep=gone))

        held()
        assert pins.owner("lb-veth0") is None
        held()
        with pins.own("lb-veth0", "it"):
            assert path.read_text() == str(pins.owner("lb-veth0")) == str(os.getpid())
            with pytest.raises(KernelError, match=rf"by process {os.getpid()};"):
                pins.own("lb-veth0", "it").__enter__()


def test_an_owner_in_another_pid_namespace(netns: Callable[[], str]):
    """Its id is what it is here, not what it is there; there, ours has none."""
    name = netns()
    code = (
        "import os, sys; from crablb.kernel import pins\n"
        "with pins.own('lb-veth0', 'it'): print(os.getpid(), pins.owner('lb-veth1'), flush=True); sys.stdin.read()"
    )
    entered = ["nsenter", f"--net=/run/netns/{name}"]
    with inside(name), pins.own("lb-veth1", "it"):
        hidden = [*entered, "unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
        process = subprocess.Popen([*hidden, sys.executable, "-c", code], stdin=-1, stdout=-1, text=True)
        try:
            assert process.stdout
            assert process.stdout.readline().split() == ["1", str(pins.ELSEWHERE)]
            (there,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            assert pins.owner("lb-veth0") == pins.held()["lb-veth0"] == int(there)
            for refused in (lambda: pins.check_free("lb-veth0", "it"), lambda: pins.own("lb-veth0", "it").__enter__()):
                with pytest.raises(KernelError, match=rf"by process {there}; .* or kill {there}$"):
                    refused()
            told = [*hidden, *crablb("agent", "remove", "server")]
            with pins.own("server", "it"):
                refusal = subprocess.run(told, capture_output=True, text=True, check=False)
            assert refusal.returncode and "by a process of another PID namespace; " in refusal.stderr
            assert "kill" not in refusal.stderr
        finally:
            process.communicate()
        assert pins.owner("lb-veth0") is None


def test_what_a_dead_namespace_left_is_collected(netns: Callable[[], str]):
    """By the next agent or load balancer, in whatever namespace; what lives is let be."""
    dead, alive, here = netns(), netns(), netns()
    for name in (dead, alive):
        args = crablb("agent", "server", "--vip", VIPS[0], "--detach")
        subprocess.run(["nsenter", f"--net=/run/netns/{name}", *args], check=True, capture_output=True)
    paths = {}
    for name in (dead, alive):
        with inside(name):
            paths[name] = pins.folder("server"), pins.RUN / f"{pins.namespace()}-server.json"
    subprocess.run(["ip", "netns", "del", dead], check=True)
    with inside(here), pins.own("server", "a test"):
        pass
    assert [path.exists() for path in paths[dead]] == [False, False]
    assert [path.exists() for path in paths[alive]] == [True, True]
    with inside(alive):
        assert cli.main(["agent", "remove"]) == 0


def pin(folder: Path) -> None:
    with bpf.Object(bpf.object_path("xsk")) as program:
        program.map("sockets").pin(folder / "sockets")


def test_what_begins_meanwhile_is_let_be(netns: Callable[[], str], monkeypatch: pytest.MonkeyPatch):
    """In another namespace: by who ends, and by who collects what dead ones left."""
    here, other = netns(), netns()

    def old_name() -> Path:
        return pins.root() / str(os.stat("/proc/thread-self/ns/net").st_ino)

    with inside(other), pins.own("client", "another test"):  # it has no pins yet
        begun = old_name()
        with inside(here), pins.own("server", "a test"):
            pass
        assert begun.is_symlink()
        with inside(other), pins.own("server", "a test of the same namespace"):
            pass
        assert begun.is_symlink()
    assert not begun.is_symlink()

    alive, late = pins._alive, []

    def begin() -> tuple[set[int], set[str]]:
        found = alive()
        if not late:
            late.append(netns())
            with inside(late[0]):
                pin(pins.folder("server"))
                pins._link_old_name()
        return found

    monkeypatch.setattr(pins, "_alive", begin)
    dead, empty = (pins.root() / f"{pins.PREFIX}{999999999999 - n}" for n in (0, 5))
    (dead / "server").mkdir(parents=True)
    empty.mkdir()
    with inside(here):
        pins.collect()
    assert not dead.exists() and not empty.exists()
    with inside(late[0]):
        assert old_name().is_symlink() and (pins.folder("server") / "sockets").exists()
        pins.remove(pins.folder("server"))
        pins.tidy(pins.namespace())
        assert not old_name().is_symlink()


def test_a_folder_that_somebody_tidies_up_meanwhile(netns: Callable[[], str], monkeypatch: pytest.MonkeyPatch):
    """Between its making and the first pin in it."""
    make, removed = Path.mkdir, []

    def made(path: Path, *args: Any, **more: Any) -> None:
        make(path, *args, **more)
        if len(removed) < 3:
            removed.append(path)
            path.rmdir()

    with inside(netns()):
        folder = pins.folder("server")
        monkeypatch.setattr(Path, "mkdir", made)
        pin(folder)
        monkeypatch.undo()
        assert (folder / "sockets").exists() and len(removed) == 3
        pins.remove(folder)


def test_nothing_is_collected_where_processes_are_hidden(netns: Callable[[], str]):
    """As in a container: those whose pins are there may be among them."""
    other = netns()
    process = subprocess.Popen(["unshare", "--net", "sh", "-c", "echo; exec cat"], stdin=-1, stdout=-1)
    try:
        assert process.stdout and process.stdout.readline()
        args = crablb("agent", "server", "--vip", VIPS[0], "--detach")
        entered = ["nsenter", f"--net=/proc/{process.pid}/ns/net"]  # no name keeps it
        subprocess.run([*entered, *args], check=True, capture_output=True)
        code = "from crablb.kernel import pins\nwith pins.own('server', 'a test'): pass"
        hidden = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", code]
        subprocess.run(["nsenter", f"--net=/run/netns/{other}", *hidden], check=True)
        told = subprocess.run([*entered, *crablb("agent", "status", "--json")], capture_output=True, check=False)
        assert "server" in json.loads(told.stdout)
        subprocess.run([*entered, *crablb("agent", "remove")], check=True, capture_output=True)
    finally:
        process.communicate()


def test_by_ip_netns_exec(lab: Lab):
    """ip gives the command another /sys, which goes with it; the pins are outside."""
    client = lab.client
    inside_it = f"/sys/fs/cgroup/{client.cgroup.relative_to(cgroup_root())}"
    mounted = "mount -t cgroup2 none /sys/fs/cgroup; exec"
    args = crablb("agent", "client", "--vip", VIPS[0], "--backends", "10.0.0.0/24", "--cgroup", inside_it, "--detach")
    subprocess.run(["ip", "netns", "exec", client.netns, "sh", "-c", f"{mounted} {shlex.join(args)}"], check=True)
    with inside(client.netns):
        assert {pin.name for pin in pins.folder("client").glob("*")} >= {"link", "client_flows", "crab_egress"}
    assert "encap bpf" in client.run("ip", "route", "get", str(VIP4)).stdout


def test_where_pins_cannot_last(lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """No --detach, and nothing is left."""
    client = lab.client
    monkeypatch.setattr(bpf, "pins_last", lambda: False)
    before = client.run("ip", "rule").stdout
    with inside(client.netns):
        args = ["client", "--vip", VIPS[0], "--backends", "10.0.0.0/24", "--cgroup", str(client.cgroup)]
        assert cli.main(["agent", *args, "--detach"]) == 2
    assert "what is to stay would go with this mount namespace" in capsys.readouterr().err
    assert agent_status(client) == {}
    assert client.run("ip", "rule").stdout == before


@pytest.mark.long
def test_interfaces_with_a_dot(make_world: Callable[..., World]):
    """As VLANs have: at the load balancer, at a server with DSR, at the client."""
    world = make_world()
    lab = world.lab
    for node in (lab.lb, lab.client, lab.servers[0]):
        node.run("ip", "link", "set", "eth0", "down")
        node.run("ip", "link", "set", "eth0", "name", "eth0.100")
        node.run("ip", "link", "set", "eth0.100", "up")
        node.ip(f"addr replace {node.ip6}/64 dev eth0.100 nodad")
    lab.client.ip(f"route replace {VIP4} via {lab.lb.ip4}", f"route replace fd00::100 via {lab.lb.ip6}")
    world.servers(dsr=True)
    world.client()
    serve = crablb("serve", "--iface", "eth0.100", "--service", f"tcp://{VIP4}:80=10.0.0.11")
    for _ in range(2):  # the second takes over from the first
        balancer = world.program(lab.lb, *serve)
        assert balancer.stderr
        for line in balancer.stderr:
            if "serving" in line:
                break
        until(lambda: world.echo(VIP4, "10")["accepted_on"] == "10.0.0.11")
        balancer.send_signal(signal.SIGKILL)
        balancer.wait()


@pytest.mark.long
def test_an_interface_with_a_dot_in_its_name(make_world):
    """As VLAN devices have it, and the BPF file system does not: served, taken over, beside an agent, and gone."""
    world = make_world()
    lab, name = world.lab, "eth1.100"
    for node in (lab.lb, lab.servers[0]):
        node.ip(f"link add {name} type veth peer name cable", f"link set {name} up", "link set cable up")
    world.servers(dsr=True)
    first = world.serve("--iface", name)
    first.kill()
    first.wait()
    second = world.serve("--iface", name)
    assert "took over from a load balancer that had died" in (world.folder / "serve.log").read_text()
    assert world.echo(VIP4)["intact"]
    said = json.loads(command(lab.lb, "status", "--iface", name, "--json"))
    assert (said["interface"], said["pid"]) == (name, second.pid)
    second.terminate()
    assert second.wait() == 0
    assert not lab.lb.pins.exists()


def test_a_lock_is_taken_and_claimed_back_where_there_is_no_room(tmp_path, monkeypatch):
    """What somebody else writes takes any page that would be let go of."""
    place = tmp_path / "run"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], check=True)
    try:
        monkeypatch.setattr(pins, "RUN", place)
        truncate = os.ftruncate

        def other(path: Path) -> None:
            with open(path, "ab", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(bytes(4096))

        def truncates(fd: int, size: int) -> None:
            truncate(fd, size)
            other(place / "more")

        with pins.own("lb-x", "a test", process=4194303) as lock:
            pins.begun("lb-x")
            other(place / "big")
            monkeypatch.setattr(os, "ftruncate", truncates)
            for _ in range(2):
                pins.claim(lock)
                assert next(place.glob("*-lb-x.lock")).read_text() == str(os.getpid())
                pins.begun("lb-x")
                assert pins.has_begun("lb-x")
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


@pytest.mark.parametrize("place", ["mountinfo", "/ns/net", "/proc"])
@pytest.mark.parametrize("number", [errno.ENOMEM, errno.EMFILE])
def test_who_cannot_look_removes_nothing(
    netns: Callable[[], str], monkeypatch: pytest.MonkeyPatch, place: str, number: int
):
    """Without memory or descriptors it is not known who is there: nobody is taken for gone."""
    here, other = netns(), netns()
    with inside(other):
        left = pins.folder("server")
        pin(left)

    def failing(of: Any) -> Any:
        def call(path: Any, *args: Any, **more: Any) -> Any:
            if str(path).endswith(place):
                raise OSError(number, os.strerror(number), str(path))
            return of(path, *args, **more)

        return call

    with inside(here):
        monkeypatch.setattr(os, "listdir", failing(os.listdir))
        monkeypatch.setattr(os, "open", failing(os.open))
        monkeypatch.setattr(Path, "read_text", failing(Path.read_text))
        pins.collect()
        monkeypatch.undo()
    assert (left / "sockets").exists()
    with inside(other):
        pins.remove(left)


@pytest.mark.parametrize("number, left", [(errno.ENOENT, False), (errno.ENOMEM, True), (errno.EACCES, True)])
def test_a_link_that_cannot_be_looked_at(
    netns: Callable[[], str], monkeypatch: pytest.MonkeyPatch, number: int, left: bool
):
    """It may lead to an interface that is there: only what is not there any more is nobody's."""

    def open_pin(path: Path) -> None:
        raise bpf.BpfError("cannot open", number)

    gone = pins.root() / f"{pins.PREFIX}999999999998"
    with inside(netns()), bpf.Object(bpf.object_path("xsk")) as loaded:
        # A real one, that others who collect meanwhile let be.
        with loaded.program("crab_xsk").attach_xdp(1, "generic") as link:
            link.pin(gone / "server" / "ingress-lo")
        monkeypatch.setattr(pins.Link, "from_pin", open_pin)
        pins.collect()
        assert gone.exists() == left
        monkeypatch.undo()
        pins.remove(gone / "server")


def test_a_process_that_may_not_be_looked_at(netns: Callable[[], str], monkeypatch: pytest.MonkeyPatch):
    """A namespace that lives by it alone, as a service's with PrivateNetwork=, is not taken for gone."""
    words = ["unshare", "--net", "sh", "-c", "echo; exec cat"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout and child.stdout.readline() == b"\n"
        theirs = Path(f"/proc/{child.pid}/ns/net")
        opened = os.open

        def forbidden(path: Any, *args: Any, **more: Any) -> int:
            if path == theirs:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return opened(path, *args, **more)

        left = pins.root() / pins.namespace_at(theirs) / "server"
        pin(left)
        with inside(netns()):
            monkeypatch.setattr(os, "open", forbidden)
            pins.collect()
            monkeypatch.undo()
            assert (left / "sockets").exists()
            child.communicate()
            pins.collect()
            assert not left.exists()
