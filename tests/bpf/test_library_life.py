"""crablb.LoadBalancer in the hands of strangers: starts and ends in every order, and never a rest in the kernel."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine
from contextlib import suppress
from ipaddress import ip_address
from typing import Any

import pytest

from crablb import ConfigError, Event, KernelError, LoadBalancer, Match, Vip, lasting
from crablb.control.supervisor import Supervisor
from crablb.dataplane import queues
from crablb.dataplane.engine import Engine
from crablb.kernel import bpf, pins
from tests.helpers.torn import Torn, torn

WEB, OTHER = "tcp://10.0.0.100:80", "tcp://10.0.0.100:81"
BACKEND = "10.0.0.11"


@pytest.fixture
def wired(namespace):
    """A namespace whose veth0 leads to the backend."""
    namespace.ip("address", "add", "10.0.0.2/24", "dev", "veth0")
    namespace.ip("neighbor", "add", BACKEND, "lladdr", "02:00:00:00:00:0b", "dev", "veth0")
    return namespace


def balancer(**settings: Any) -> LoadBalancer:
    return LoadBalancer("veth0", [f"{WEB}={BACKEND}"], seed=bytes(16), flows=64, **settings)


def descriptors() -> list[str]:
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{fd}").split("[")[0])  # but for the sockets' own numbers
    return sorted(found)


def nothing_left() -> None:
    assert bpf.xdp_program(socket.if_nametoindex("veth0"))[0] == 0
    assert pins.owner("lb-veth0") is None
    assert not (pins.folder("lb-veth0")).exists()
    threads = {thread.name for thread in threading.enumerate() if thread.name.startswith("crablb")}
    assert threads <= {"crablb-log"}  # which is the process's


def served(lb: LoadBalancer) -> set[str]:
    return {str(service.vip) for service in lb.services}


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(main(), 60))
    nothing_left()


def slow(monkeypatch: pytest.MonkeyPatch) -> tuple[asyncio.Event, asyncio.Event]:
    """A start that waits in its middle: set when it is there, and to be set for it to go on."""
    there, go = asyncio.Event(), asyncio.Event()
    resolve = Engine._resolve

    async def waiting(engine: Engine) -> None:
        there.set()
        await go.wait()
        await resolve(engine)

    monkeypatch.setattr(Engine, "_resolve", waiting)
    return there, go


# ---- in an event loop ----


def test_what_is_said_during_the_start_holds(wired, monkeypatch):
    async def main() -> None:
        there, go = slow(monkeypatch)
        lb = balancer()
        starting = asyncio.create_task(lb.start())
        await there.wait()
        with pytest.raises(KernelError, match="is running already"):
            await lb.start()
        with pytest.raises(KernelError, match="is not running"):
            lb.statistics()
        lb.add_service(f"{OTHER}={BACKEND}")
        lb.handle(Match(ethertype=0x88B5), lambda frames: None)
        go.set()
        await starting
        assert set(map(str, lb.statistics().loads)) == {WEB, OTHER}
        lb.unhandle(Match(ethertype=0x88B5))
        await lb.close()

    run(main)


def test_a_close_during_the_start(wired, monkeypatch):
    async def main() -> None:
        there, go = slow(monkeypatch)
        lb = balancer()
        starting = asyncio.create_task(lb.start())
        await there.wait()
        closing = asyncio.create_task(lb.close())
        await asyncio.sleep(0)
        go.set()
        await asyncio.gather(starting, closing)
        nothing_left()
        await lb.start()  # and again
        await lb.close()

    run(main)


def test_a_start_that_is_cancelled(wired, monkeypatch):
    async def main() -> None:
        there, go = slow(monkeypatch)
        lb = balancer()
        starting = asyncio.create_task(lb.start())
        await there.wait()
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        nothing_left()
        go.set()
        async with lb:
            assert lb.statistics()

    run(main)


def test_closed_twice_at_once(wired):
    async def main() -> None:
        lb = balancer()
        await lb.start()
        await asyncio.gather(lb.close(), lb.close(), lb.close())
        await lb.close()
        with pytest.raises(KernelError, match="is not running"):
            lb.statistics()

    run(main)


def test_a_close_that_is_cancelled_can_be_repeated(wired, monkeypatch):
    async def main() -> None:
        lb = balancer()
        await lb.start()
        closing, go = asyncio.Event(), asyncio.Event()
        close = Supervisor.close

        async def waiting(supervisor: Supervisor) -> None:
            closing.set()
            await go.wait()
            await close(supervisor)

        monkeypatch.setattr(Supervisor, "close", waiting)
        first = asyncio.create_task(lb.close())
        await closing.wait()
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        go.set()
        await lb.close()

    run(main)


def test_another_event_loop(wired):
    """Cannot end it by mistake; where it runs it can still be ended."""
    lb = balancer()
    runner = asyncio.Runner()
    runner.run(lb.start())
    with pytest.raises(KernelError, match="was started in another event loop"):
        asyncio.run(lb.close())
    runner.run(lb.close())
    runner.close()
    nothing_left()


def test_events_tell_the_end(wired):
    async def main() -> None:
        lb = balancer()
        await lb.start()
        events = lb.events()
        waiting = asyncio.create_task(lb.wait())
        await asyncio.sleep(0)  # it waits
        lb.set_weight(WEB, BACKEND, 2)  # before anybody asks for the first
        await lb.close()
        assert [event.kind async for event in events] == ["changed"]
        await waiting
        with pytest.raises(KernelError, match="is not running"):
            lb.events()

    run(main)


def test_events_waited_for_in_vain(wired):
    """The next ones come all the same, to all who wait, and then the end."""

    async def main() -> None:
        lb = balancer()
        await lb.start()
        events, dropped = lb.events(), lb.events()
        for weight in (2, 3):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(events), 0.01)
            lb.set_weight(WEB, BACKEND, weight)
            assert (await anext(events)).kind == "changed"
        await dropped.aclose()
        await dropped.aclose()
        assert [event async for event in dropped] == []
        waiting = [asyncio.create_task(anext(events, None)) for _ in range(3)]
        await asyncio.sleep(0)
        lb.set_weight(WEB, BACKEND, 4)
        await lb.close()
        assert [event and event.kind for event in await asyncio.gather(*waiting)] == ["changed", None, None]
        await lb.start()
        lb.set_weight(WEB, BACKEND, 5)
        assert [event async for event in events] == []  # of the life before
        await lb.close()

    run(main)


def test_events_tell_a_failure(wired, monkeypatch):
    """A task of the engine that cannot do its work, however often it is begun anew."""

    async def broken(engine: Engine) -> None:
        raise OSError("it is broken")

    monkeypatch.setattr(Engine, "_keep_balance", broken)
    monkeypatch.setattr(lasting, "TRIES", 1)

    async def main() -> None:
        async with balancer() as lb:
            events = lb.events()
            waiting = asyncio.create_task(lb.wait())
            async for event in events:
                if event.kind == "failed":
                    break
            assert "it is broken" in event.reason
            late = lb.events()
            assert await anext(late) == Event("failed", reason=event.reason)
            with pytest.raises(KernelError, match="it is broken"):
                await waiting

    asyncio.run(asyncio.wait_for(main(), 60))
    assert pins.owner("lb-veth0") is None


def test_from_other_threads(wired):
    """Of changes at once by many threads none is lost, in whichever way it runs."""

    def change(lb: LoadBalancer) -> None:
        threads = [
            threading.Thread(target=lb.add_service, args=(f"tcp://10.0.0.100:{port}={BACKEND}",))
            for port in range(1000, 1016)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    async def main() -> None:
        async with balancer() as lb:
            await asyncio.to_thread(change, lb)
            assert len(lb.statistics().loads) == 17

    run(main)
    with balancer() as lb:
        change(lb)
        assert len(lb.statistics().loads) == 17
        with pytest.raises(KernelError, match="for the event loop that the load balancer runs in"):
            lb.events()
    nothing_left()


# ---- in a thread of its own ----


def test_one_in_the_other(wired):
    with balancer() as lb:
        with pytest.raises(KernelError, match="is running already"), lb:
            pass
        assert lb.statistics()
        with pytest.raises(KernelError, match="is run already by process"), balancer():
            pass
        lb.__exit__(None, None, None)
        lb.__exit__(None, None, None)
    nothing_left()
    with lb:
        assert lb.statistics()
    nothing_left()


def test_ctrl_c_during_the_start(wired, monkeypatch):
    async def interrupted(engine: Engine) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.Event().wait()

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Engine, "_resolve", interrupted)
        balancer().__enter__()
    nothing_left()


@pytest.mark.parametrize("where", ["before it begins", "when it begins", "in its loop", "in its start"])
def test_ctrl_c_in_the_first_instants(wired, monkeypatch, where):
    """Of ``with``: its thread ends, and it can be started again."""
    lb = balancer()
    begin, runner = threading.Thread.start, asyncio.Runner.get_loop
    threads: list[threading.Thread] = []

    def start(thread: threading.Thread) -> None:
        if thread.name == "crablb-control":
            threads.append(thread)
            if where == "before it begins":
                raise KeyboardInterrupt
            begin(thread)
            if where == "when it begins":
                raise KeyboardInterrupt
        else:
            begin(thread)

    def in_its_loop(self: asyncio.Runner) -> asyncio.AbstractEventLoop:
        if where == "in its loop":
            os.kill(os.getpid(), signal.SIGINT)
        return runner(self)

    def starting(coroutine: Coroutine[Any, Any, Any], loop: asyncio.AbstractEventLoop) -> Any:
        future = submit(coroutine, loop)
        if where == "in its start" and coroutine.__qualname__.endswith("start"):
            raise KeyboardInterrupt
        return future

    submit = asyncio.run_coroutine_threadsafe
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        patched.setattr(asyncio.Runner, "get_loop", in_its_loop)
        patched.setattr(asyncio, "run_coroutine_threadsafe", starting)
        with pytest.raises(KeyboardInterrupt), lb:
            pass
    for thread in threads:
        if thread.ident:
            thread.join(30)
    nothing_left()
    with lb:
        assert lb.statistics()
    nothing_left()


def test_no_event_loop_in_its_thread(wired, monkeypatch):
    def refused(self: asyncio.Runner) -> asyncio.AbstractEventLoop:
        raise OSError(24, "Too many open files")

    lb = balancer()
    with monkeypatch.context() as patched, pytest.raises(OSError, match="Too many"):
        patched.setattr(asyncio.Runner, "get_loop", refused)
        lb.__enter__()

    def none(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched, pytest.raises(KernelError, match="no thread can be started"):
        patched.setattr(threading.Thread, "start", none)
        lb.__enter__()
    with lb:
        pass
    nothing_left()


def test_ctrl_c_during_the_end(wired, monkeypatch):
    close = Supervisor.close

    async def interrupted(supervisor: Supervisor) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        await close(supervisor)

    monkeypatch.setattr(Supervisor, "close", interrupted)
    with pytest.raises(KeyboardInterrupt), balancer():
        pass
    nothing_left()


def test_threads_work_or_the_program_does(wired):
    with balancer() as lb, pytest.raises(KernelError, match="threads work on the frames"):
        lb.process_once()
    with balancer(threads=False) as lb:
        assert lb.process_once(0) == 0
        for timeout in (-1, "1", None, float("nan"), float("inf")):
            with pytest.raises(ConfigError, match="timeout"):
                lb.process_once(timeout)


def test_whoever_keeps_what_a_signal_raised_can_go_on(wired):
    """Nothing is locked by an exception, whose traceback has all that was interrupted: others go on, and so does he."""
    with balancer(threads=False) as lb:
        for after in itertools.count():
            try:
                with torn(queues, after):
                    lb.process_once(0)
                break
            except Torn:
                other = threading.Thread(target=lb.statistics, daemon=True)
                other.start()
                other.join(60)
                assert not other.is_alive()
                lb.process_once(0)
        assert after > 10


# ---- what cannot start ----


def down(namespace: Any) -> dict[str, Any]:
    namespace.ip("link", "set", "veth1", "down")
    return {"interfaces": ["veth0", "veth1"]}


def taken(namespace: Any) -> dict[str, Any]:
    namespace.port = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    namespace.port.bind(("10.0.0.2", 7171))
    return {"report_listen": (ip_address("10.0.0.2"), 7171), "report_key": bytes(32)}


def none_there(namespace: Any) -> dict[str, Any]:
    return {"interfaces": ["veth0", "nothing"]}


@pytest.mark.parametrize("why", [down, taken, none_there])
def test_a_start_that_fails_leaves_nothing(wired, why):
    settings = why(wired)
    names = settings.pop("interfaces", "veth0")
    lb = LoadBalancer(names, [f"{WEB}={BACKEND}"], seed=bytes(16), flows=64, **settings)
    bpf.outer()  # a descriptor that is opened once in a process, and stays
    gc.collect()  # what the tests before have left
    before = descriptors()
    for _ in range(2):
        with pytest.raises(KernelError):
            lb.__enter__()
        nothing_left()
        with pytest.raises(KernelError):
            asyncio.run(lb.start())
        nothing_left()
        assert served(lb) == {WEB}
    gc.collect()
    assert descriptors() == before
    if hasattr(wired, "port"):
        wired.port.close()
    with balancer() as other:
        assert other.statistics()


@pytest.mark.parametrize("name", ["crablb-veth0/0", "crablb-sweep", "crablb-netlink", "crablb-control"])
def test_no_thread_to_be_had(wired, monkeypatch, name):
    """As where memory is limited (ulimit -v): whichever it is."""
    begin = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if thread.name.startswith(name):
            raise RuntimeError("can't start new thread")
        begin(thread)

    lb = balancer()
    with (
        monkeypatch.context() as patched,
        pytest.raises(KernelError, match="no thread can be started; raise the limits"),
    ):
        patched.setattr(threading.Thread, "start", start)
        lb.__enter__()
    nothing_left()
    with lb:
        assert lb.statistics()
    nothing_left()


def test_two_start_it(wired):
    """In two threads: one of them does."""
    lb = balancer()
    both, done = threading.Barrier(2), []

    def start() -> None:
        both.wait()
        try:
            with lb:
                done.append("started")
                stop.wait()
        except KernelError as error:
            done.append(str(error))
            stop.set()

    for _ in range(10):
        stop = threading.Event()
        threads = [threading.Thread(target=start) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(done) == ["started", "the load balancer is running already"]
        done.clear()
        nothing_left()


# ---- arguments ----


def test_a_change_that_cannot_be_changes_nothing(wired):
    with balancer() as lb:
        before = lb.services
        for change in (
            lambda: lb.set_weight(WEB, BACKEND, -5),
            lambda: lb.set_weight(WEB, BACKEND, 70000),
            lambda: lb.set_state(WEB, BACKEND, "sleepy"),
            lambda: lb.add_service(f"{WEB}={BACKEND}"),
            lambda: lb.add_backend(WEB, BACKEND),
            lambda: lb.remove_backend(WEB, BACKEND),
            lambda: lb.replace_services([f"{OTHER}={BACKEND}", "nonsense"]),
        ):
            with pytest.raises(ConfigError):
                change()
            assert lb.services == before
            assert set(map(str, lb.statistics().loads)) == {WEB}
        lb.set_state(WEB, BACKEND, "drain")
        lb.add_backend(WEB, "10.0.0.12*3")
        assert [(str(b.address), b.weight, b.state.value) for b in lb.service(WEB).backends] == [
            (BACKEND, 1, "drain"),
            ("10.0.0.12", 3, "up"),
        ]
        assert lb.service(Vip("10.0.0.100", 80)) is lb.service(WEB)  # type: ignore[arg-type]


def test_standard_output_is_the_programs(wired):
    code = f"""
from crablb import LoadBalancer
with LoadBalancer("veth0", ["{WEB}=10.0.0.99"], flows=64):
    pass
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert "backend not usable yet" in done.stderr


FORGOTTEN = {
    "in an event loop": """
async def main():
    await lb.start()
asyncio.run(main())
""",
    "by an exception": """
async def main():
    await lb.start()
    raise SystemExit(3)
asyncio.run(main())
""",
    "in a thread": "lb.__enter__()",
    "in a function": """
def serve():
    LoadBalancer("veth0", ["tcp://10.0.0.100:80=10.0.0.11"], flows=64).__enter__()
serve()
""",
    "by a loop that is run now and then": """
loop = asyncio.new_event_loop()
loop.run_until_complete(lb.start())
""",
    "by a loop that is closed": """
loop = asyncio.new_event_loop()
loop.run_until_complete(lb.start())
loop.close()
""",
    "by another thread": """
import threading
started = threading.Event()
async def main():
    await lb.start()
    started.set()
    await asyncio.Event().wait()
threading.Thread(target=lambda: asyncio.run(main()), daemon=True).start()
started.wait()
""",
    "by a child": """
lb.__enter__()
if not os.fork():
    sys.exit()
os.wait()
assert lb.statistics()
""",
}


@pytest.mark.parametrize("how", FORGOTTEN)
def test_forgotten(wired, how):
    """What nobody closes is closed when its event loop ends, or the program; that is said to who asks for warnings."""
    start = f"""
import asyncio, os, sys
from crablb import LoadBalancer
lb = LoadBalancer("veth0", ["{WEB}={BACKEND}"], flows=64)
"""
    done = subprocess.run(
        [sys.executable, "-W", "default::ResourceWarning", "-c", start + FORGOTTEN[how]],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == (3 if how == "by an exception" else 0), done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("unclosed LoadBalancer on veth0") == 1
    nothing_left()
