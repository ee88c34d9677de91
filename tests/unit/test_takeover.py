"""The conversation of a takeover, by real sockets, between fakes of what is handed over."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from structlog.testing import capture_logs

from crablb import lasting
from crablb.control import takeover
from crablb.control.takeover import Host, Offer, Predecessor, connect
from crablb.errors import KernelError
from crablb.kernel import pins
from tests.helpers.processes import ROOT

BIG = b"x" * (takeover.PIECE * 3 + 1)


class Fake:
    """All that is handed over, which is written down as it is asked."""

    def __init__(self, fds: int = 3) -> None:
        self.interfaces = ["eth0", "eth1"]
        self.asked: list[str] = []
        self.files = [os.memfd_create(f"m{n}") for n in range(fds)]
        for n, file in enumerate(self.files):
            os.write(file, b"%d" % n)

    def hold(self) -> None:
        self.asked.append("hold")

    def offer(self) -> tuple[Offer, list[int]]:
        self.asked.append("offer")
        return Offer(engine={"big": BIG, 5: [1, 2]}, fds=len(self.files) - 1, parts=["p"]), self.files

    def give(self, fds: list[int]) -> Any:
        self.asked.append("give")
        for fd in fds:
            os.write(fd, b"given")
            os.close(fd)
        return {"given": BIG}

    def rest(self) -> Any:
        self.asked.append("rest")
        return {"rest": BIG * 8}  # more than a socket takes at once

    def resume(self) -> None:
        self.asked.append("resume")

    def close(self) -> None:
        for file in self.files:
            os.close(file)


@pytest.fixture(autouse=True)
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pins, "RUN", tmp_path)
    monkeypatch.setattr(pins, "namespace", lambda: "netns-7")
    monkeypatch.setattr(pins, "owner", lambda role: None)


def hosted(
    test: Callable[[Host, Fake, list[str]], Coroutine[Any, Any, None]], *, fds: int = 3, **limits: float
) -> list[str]:
    """What a fake was asked while ``test`` ran."""
    fake, failures = Fake(fds), list[str]()

    def failed(reason: str, pid: int) -> None:
        assert pid > 0
        failures.append(reason)

    async def within() -> None:
        host = Host(fake, failed)
        host.prepare()
        host.start(lasting.task)
        try:
            async with asyncio.timeout(60):
                await test(host, fake, failures)
        finally:
            await host.close()
            host.pass_on(False)

    try:
        asyncio.run(within())
    finally:
        fake.close()
    return fake.asked


async def until(condition: Callable[[], object]) -> None:
    """``hosted`` bounds it."""
    while not condition():
        await asyncio.sleep(0.01)


def opened() -> int:
    return len(os.listdir("/proc/self/fd"))


def take_all() -> tuple[Any, Any, Any, list[bytes]]:
    """As a successor does, which serves in the end."""
    found = connect(["eth1", "eth0"])
    assert found
    contents = [os.pread(fd, 9, 0) for fd in (*found.fds, *found.sockets)]
    assert (len(found.fds), len(found.sockets)) == (2, 1)
    with os.fdopen(os.memfd_create("theirs")) as file:
        given = found.take([file.fileno()])
        assert os.pread(file.fileno(), 9, 0) == b"given"
    rest = found.rest()
    found.served()
    offered = found.values
    found.close()
    return offered, given, rest, contents


def test_all_is_handed_over():
    async def test(host: Host, fake: Fake, failures: list[str]) -> None:
        offered, given, rest, contents = await asyncio.to_thread(take_all)
        assert offered == {"big": BIG, 5: [1, 2]}
        assert (given, rest) == ({"given": BIG}, {"rest": BIG * 8})
        assert contents == [b"0", b"1", b"2"]
        assert await host.left == os.getpid()
        assert host.busy
        assert not failures

    before = opened()
    assert hosted(test) == ["hold", "offer", "give", "rest"]
    assert opened() == before


@pytest.mark.parametrize("owed", [True, False])
def test_a_reload_of_the_last_moment_is_passed_on(owed):
    """By the connection, as the other process may be one that is not seen from here."""
    reloads = []

    async def test(host: Host, fake: Fake, failures: list[str]) -> None:
        def succeed() -> Coroutine[Any, Any, None]:
            found = connect(["eth0", "eth1"])
            assert found
            found.take()
            found.rest()
            found.served()
            heard = found.afterwards(lambda: reloads.append(1))
            found.close()
            return heard

        heard = asyncio.ensure_future(await asyncio.to_thread(succeed))
        await host.left
        assert not heard.done()
        host.pass_on(owed)  # the last that a process does
        await heard

    before = opened()
    hosted(test)
    assert reloads == [1] * owed
    assert opened() == before


def test_nobody_listens_to_a_reload_of_the_last_moment():
    """Who took over has ended, or is of another version."""

    async def test(host: Host, fake: Fake, failures: list[str]) -> None:
        host.pass_on(True)  # to nobody
        await asyncio.to_thread(take_all)
        await host.left
        host.pass_on(True)

    before = opened()
    hosted(test)
    assert opened() == before


def test_many_descriptors_come_in_several_packets():
    """More than the kernel takes in one (SCM_MAX_FD)."""

    def ask() -> list[bytes]:
        found = connect(["eth0", "eth1"])
        assert found
        contents = [os.pread(fd, 9, 0) for fd in found.fds]
        found.close()
        return contents

    async def test(host: Host, fake: Fake, failures: list[str]) -> None:
        assert await asyncio.to_thread(ask) == [b"%d" % n for n in range(299)]

    hosted(test, fds=300)


def test_what_was_not_shown_yet_by_one_that_was_killed(tmp_path):
    """It is nobody's, and goes with the next one's start, or with ``crablb remove``; another one's stays."""
    path = takeover.place("eth0")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(f"{path}.1")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as alive:
        alive.bind(f"{path}.2")
        alive.listen()

        async def test(host: Host, fake: Fake, failures: list[str]) -> None:
            assert sorted(each.name for each in tmp_path.glob(f"{path.name}*")) == [path.name, f"{path.name}.2"]

        hosted(test)
    takeover.forget("eth0")
    assert list(tmp_path.iterdir()) == []


def test_nobody_serves(monkeypatch):
    assert connect(["eth0"]) is None
    # One that was killed has left its socket.
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.bind(str(takeover.place("eth0")))
    assert connect(["eth0"]) is None
    # One that lives, and has none: of a version before, or half dead.
    monkeypatch.setattr(pins, "owner", lambda role: 4711 if role == "lb-eth0" else None)
    with pytest.raises(KernelError, match=r"process 4711 serves eth0 and cannot be taken over.*kill 4711"):
        connect(["eth0"])


def start_of(stage: str) -> Callable[[], Predecessor]:
    """A successor that has come so far."""

    def begin() -> Predecessor:
        found = connect(["eth0", "eth1"])
        assert found
        if stage != "offered":
            found.take()
        return found

    return begin


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Those that were to be ended by force, which are this process."""
    ended: list[object] = []

    async def end(*_: object) -> bool:
        ended.append(_)
        return True

    monkeypatch.setattr(takeover, "_end", end)
    return ended


@pytest.mark.parametrize("how", ["fails", "nonsense"])
@pytest.mark.parametrize("stage", ["offered", "given"])
def test_a_successor_that_does_not_come_to_serve(stage, how, forced):
    """It says so, or something else."""

    async def test(host: Host, fake: Fake, failures: list[str]) -> None:
        found = await asyncio.to_thread(start_of(stage))
        if how == "fails":
            found.failed("the disk is on fire")
        else:
            found._say("hello", None)
        await until(lambda: "resume" in fake.asked)
        found.close()
        assert ("the disk is on fire" if how == "fails" else "it says 'hello' instead of ") in failures[0]
        await until(lambda: not host.busy)
        # And the next one may.
        await asyncio.to_thread(take_all)
        await host.left

    hosted(test)
    assert bool(forced) == (how == "nonsense" and stage == "given")


def test_what_does_not_go_on_is_told_all_the_same(monkeypatch):
    async def test(host: Host, fake: Fake, failures: list[str]) -> None:
        def refuse() -> None:
            fake.asked.append("resume")
            raise OSError("the disk is on fire")

        monkeypatch.setattr(fake, "resume", refuse)
        found = await asyncio.to_thread(start_of("given"))
        found.failed("it has seen enough")
        await until(lambda: failures)
        found.close()
        assert "it has seen enough" in failures[0]
        await until(lambda: not host.busy)
        await asyncio.to_thread(take_all)
        await host.left

    assert hosted(test) == ["hold", "offer", "give", "resume", "hold", "offer", "give", "rest"]


OTHER = """
import os, sys
from crablb.kernel import pins
from pathlib import Path
pins.RUN = Path(sys.argv[1])
pins.namespace = lambda: "netns-7"
from crablb.control.takeover import connect
found = connect(["eth0", "eth1"])
if sys.argv[2] == "given":
    found.take()
print("so far", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("how", ["killed", "slow", "told to stop"])
@pytest.mark.parametrize("stage", ["offered", "given"])
def test_a_successor_that_ends_or_stays_silent(stage, how, tmp_path, monkeypatch):
    """A process of its own.  One that has the sockets is ended by force before this one serves on."""
    if how == "slow":
        monkeypatch.setattr(takeover, "START", 0.5)
        monkeypatch.setattr(takeover, "SERVE", 0.5)

    async def test(host: Host, fake: Fake, failures: list[str]) -> None:
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", OTHER, str(tmp_path), stage, stdin=-1, stdout=-1, cwd=ROOT
        )
        assert child.stdout
        assert await child.stdout.readline() == b"so far\n"
        if how == "killed":
            child.kill()
        elif how == "told to stop":
            await host.close("it was told to stop")
        await until(lambda: "resume" in fake.asked)
        words = {"killed": "has ended before it served", "slow": "said nothing for 0.5 s"}
        # What ends this one ends the other one too, if it has everything.
        words["told to stop"] = "it was told to stop" if stage == "offered" else "has ended before it served"
        assert words[how] in failures[0]
        if stage == "offered" and how != "killed":
            child.terminate()
        expected = -signal.SIGKILL if how == "killed" or (how, stage) == ("slow", "given") else -signal.SIGTERM
        assert await child.wait() == expected

    assert hosted(test)[-1] == "resume"


@pytest.mark.parametrize("what", ["it ends", "told to stop"])
def test_one_that_stalls_and_cannot_be_ended_from_here(what, tmp_path, monkeypatch):
    """As one in another PID namespace: nobody works on packets until it has ended, which is said while that is so."""
    monkeypatch.setattr(takeover, "SERVE", 0.5)
    monkeypatch.setattr(takeover, "_pidfd", lambda pid: None)

    async def test(host: Host, fake: Fake, failures: list[str]) -> None:
        child = await asyncio.create_subprocess_exec(
            sys.executable, "-c", OTHER, str(tmp_path), "given", stdin=-1, stdout=-1, cwd=ROOT
        )
        with capture_logs() as logs:
            await until(lambda: host.stalled)
        assert f"until process {child.pid} has ended" in host.stalled
        assert f"kill {child.pid}" in host.stalled
        (told,) = [entry for entry in logs if entry["event"].startswith("nobody works on packets until")]
        assert "said nothing for 0.5 s" in told["reason"]
        assert fake.asked == ["hold", "offer", "give"]
        if what == "it ends":
            child.kill()
            await until(lambda: "resume" in fake.asked)
        else:
            await host.close("it was told to stop")
            child.kill()
        assert not host.stalled
        assert len(failures) == 1
        await child.wait()

    assert hosted(test) == ["hold", "offer", "give", "resume"]


def refusal(**hello: Any) -> str:
    """What a successor is told that says such a hello."""
    sock = takeover._reach(takeover.place("eth0"))
    assert sock
    given = {"protocol": takeover.PROTOCOL, "pid": os.getpid(), "interfaces": ["eth0", "eth1"], **hello}
    with sock:
        for data, _ in takeover._pieces("hello", given, ()):
            sock.send(data)
        inbox = takeover._Inbox(sock, 1 << 20)
        while not (message := inbox.read()):
            pass
    kind, value, fds = message
    takeover._close(fds)
    return str(value) if kind == "refused" else kind


REFUSED = {
    "another version": ({"protocol": 99}, "version 99 of the takeover"),
    "other interfaces": ({"interfaces": ["eth0", "eth2"]}, "eth0, eth2, and this one serves eth0, eth1"),
    "no interfaces": ({"interfaces": []}, "to serve nothing"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_who_may_not(name):
    hello, words = REFUSED[name]

    async def test(host: Host, fake: Fake, failures: list[str]) -> None:
        assert words in await asyncio.to_thread(lambda: refusal(**hello))
        assert not host.busy
        assert words in failures[0]

    assert hosted(test) == []


def test_another_user(monkeypatch):
    async def test(host: Host, fake: Fake, failures: list[str]) -> None:
        monkeypatch.setattr(takeover, "_peer", lambda sock: (os.getpid(), 1234))
        assert "of user 1234" in await asyncio.to_thread(refusal)

    assert hosted(test) == []


def test_process_1_of_a_container(monkeypatch):
    async def test(host: Host, fake: Fake, failures: list[str]) -> None:
        mine = os.getpid()
        monkeypatch.setattr(takeover, "_peer", lambda sock: (mine, 0))
        monkeypatch.setattr(takeover.os, "getpid", lambda: 1)
        assert "process 1 of a container ends" in await asyncio.to_thread(lambda: refusal(pid=7))

    assert hosted(test) == []


def test_one_at_a_time():
    async def test(host: Host, fake: Fake, failures: list[str]) -> None:
        first = await asyncio.to_thread(start_of("offered"))
        with pytest.raises(KernelError, match="another takeover is on its way; try again"):
            await asyncio.to_thread(start_of("offered"))
        assert host.busy and not failures
        first.close()

    hosted(test)


NOISE = {
    "nothing": [],
    "no message": [b"\1\xc1"],
    "another kind": [b"\1" + msgspec.msgpack.encode(["take", None])],
    "no hello": [b"\1" + msgspec.msgpack.encode(["hello", [1]])],
    "wrong types": [b"\1" + msgspec.msgpack.encode(["hello", {"protocol": "x"}])],
    "depth": [b"\1" + b"\x91" * 5000],
    "without end": [b"\0" + bytes(takeover.PIECE)] * 5,
    "a long packet": [bytes(takeover.PIECE + 10)],
}


@pytest.mark.parametrize("name", NOISE)
def test_noise(name):
    """Whoever may connect can harm nobody, and keeps no descriptors here."""

    async def test(host: Host, fake: Fake, failures: list[str]) -> None:
        sock = takeover._reach(takeover.place("eth0"))
        assert sock
        before = opened()
        for packet in NOISE[name]:
            with socket.fromfd(sock.fileno(), sock.family, sock.type) as again, socket.socket() as right:
                try:
                    socket.send_fds(again, [packet], [right.fileno()])
                except BrokenPipeError:
                    break
        sock.shutdown(socket.SHUT_WR)
        with suppress(ConnectionResetError):  # it has not read all
            while await asyncio.to_thread(lambda: sock.recv(100)):
                pass
        sock.close()
        await until(lambda: not host._conversations)
        assert opened() < before
        await asyncio.to_thread(take_all)

    assert hosted(test) == ["hold", "offer", "give", "rest"]


def test_names_follow_and_go():
    """Each interface's; those that a successor has put in their place are not removed."""

    async def test(host: Host, fake: Fake, failures: list[str]) -> None:
        host.name("eth9")
        assert all(takeover.place(name).stat().st_mode & 0o777 == 0o600 for name in ("eth0", "eth1", "eth9"))
        other = takeover.place("eth1")
        other.unlink()
        other.touch()
        await host.close()
        assert list(pins.RUN.iterdir()) == [other]

    hosted(test)


def test_nothing_is_shown_where_there_is_no_room(monkeypatch):
    """What the one before listens at stays; what has been made goes."""

    def full(path: Path, fresh: Path) -> None:
        raise OSError(28, "No space left on device", str(fresh))

    async def test(host: Host, fake: Fake, failures: list[str]) -> None:
        there = {path: path.stat().st_ino for path in pins.RUN.iterdir()}
        other = Host(fake)
        with monkeypatch.context() as meanwhile, pytest.raises(OSError, match="No space left"):
            meanwhile.setattr(takeover.os, "link", full)
            other.prepare()
        assert {path: path.stat().st_ino for path in pins.RUN.iterdir()} == there
        other.prepare()
        assert len(list(pins.RUN.iterdir())) == 2 * len(there)
        await other.close()
        assert {path: path.stat().st_ino for path in pins.RUN.iterdir()} == there
        await asyncio.to_thread(take_all)

    hosted(test)


def test_names_of_before_go_with_the_one_that_had_them():
    """An interface is renamed there and back, and another process takes over then: its name alone is its."""

    async def test(host: Host, fake: Fake, failures: list[str]) -> None:
        for name in ("up0", "eth0", "up0", "eth0"):
            fake.interfaces[0] = name
            host.name(name)
        names = ("eth0", "eth1", "up0")
        assert set(pins.RUN.iterdir()) == {takeover.place(name) for name in names}
        assert len({takeover.place(name).stat().st_ino for name in names}) == 1
        await asyncio.to_thread(take_all)
        await host.left
        await host.close()
        assert set(pins.RUN.iterdir()) == {takeover.place(name) for name in ("eth0", "eth1")}

    hosted(test)


def test_what_a_killed_one_has_left(silent):
    """It is removed, and nobody's who lives."""
    takeover.forget("eth0")
    assert takeover.place("eth0").exists()
    silent.close()
    for _ in range(2):
        takeover.forget("eth0")
        assert not takeover.place("eth0").exists()


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """Who serves listens, and does no more: stopped, perhaps."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.bind(str(takeover.place("eth0")))
        sock.listen(1)
        yield sock


def test_a_predecessor_that_hangs(silent, monkeypatch):
    monkeypatch.setattr(takeover, "ANSWER", 0.2)
    with pytest.raises(KernelError, match=rf"process {os.getpid()}.*does not answer within 0.2 s.*kill {os.getpid()}"):
        connect(["eth0"])


@pytest.mark.parametrize("said", [["offer", {"fds": "x"}], ["offer", None], ["what", 1]])
def test_a_predecessor_that_says_something_else(silent, said):
    """As one of another version might."""
    client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    client.connect(str(takeover.place("eth0")))
    client.settimeout(10)
    server, _ = silent.accept()
    server.send(b"\1" + msgspec.msgpack.encode(said))
    with client, server, pytest.raises(KernelError, match=r"offers what this version does not know|says 'what'"):
        Predecessor(client, takeover.Hello(1))


def test_a_predecessor_that_dies_amid_its_offer(silent):
    """Of the descriptors that have come until then none is kept: the dead one's locks are among them."""
    held, lock = socket.socketpair()
    with held, lock:
        client = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        client.connect(str(takeover.place("eth0")))
        client.settimeout(10)
        server, _ = silent.accept()
        socket.send_fds(server, [b"\0" + BIG[: takeover.PIECE]], [lock.fileno()])
        lock.close()
        server.shutdown(socket.SHUT_WR)
        with client, server, pytest.raises(takeover.Gone):
            Predecessor(client, takeover.Hello(1))
        held.settimeout(10)
        assert held.recv(1) == b""  # nobody has its other end any more


def test_one_that_dies_just_now_is_waited_for(monkeypatch):
    """It listens no more, and has its lock yet."""
    child = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
    asked = list[str]()

    def owner(role: str) -> int | None:
        asked.append(role)
        if len(asked) == 1:
            child.kill()
            return child.pid
        return child.pid if child.poll() is None else None

    monkeypatch.setattr(pins, "owner", owner)
    assert connect(["eth0"]) is None
    assert asked == ["lb-eth0", "lb-eth0"]
    child.communicate()


def test_a_predecessor_that_is_told_to_stop():
    """It does not look as if it had died: the successor does not serve in its place."""

    async def test(host: Host, fake: Fake, failures: list[str]) -> None:
        found = await asyncio.to_thread(start_of("offered"))
        await host.close("it was told to stop")
        with pytest.raises(KernelError, match="it was told to stop") as raised:
            await asyncio.to_thread(found.take)
        assert not isinstance(raised.value, takeover.Gone)
        found.close()

    assert hosted(test) == ["hold", "offer", "resume"]


@pytest.mark.parametrize("stage", ["offered", "given"])
def test_a_predecessor_that_ends(stage, forced):
    """Before it gave: it is as if it had been killed earlier.  After that nothing is missing but what can be missed."""

    async def test(host: Host, fake: Fake, failures: list[str]) -> None:
        found = await asyncio.to_thread(start_of(stage))
        for sock in host._conversations.values():
            sock.shutdown(socket.SHUT_RDWR)
        if stage == "offered":
            with pytest.raises(takeover.Gone):
                await asyncio.to_thread(found.take)
        assert found.rest() is None
        found.served()
        found.failed("x")
        found.close()
        await until(lambda: "resume" in fake.asked)

    hosted(test)


def test_too_few_descriptors_are_left():
    """Who gets some of them knows that, and serves with none of them."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        room = socket.CMSG_SPACE(2 * struct.calcsize("i"))
        files = [os.memfd_create("x") for _ in range(20)]
        socket.send_fds(ours, [b"\1" + msgspec.msgpack.encode(["a", 1])], files)

        class Narrow:
            """A socket as one in a process that may have two more."""

            def recvmsg(self, size: int, _: int, flags: int) -> Any:
                return theirs.recvmsg(size, room, flags)

        inbox = takeover._Inbox(Narrow(), 1000)  # type: ignore[arg-type]
        before = opened()
        with pytest.raises(KernelError, match="too few are left; raise the limit"):
            inbox.read()
        inbox.close()
        assert opened() <= before
        for file in files:
            os.close(file)
