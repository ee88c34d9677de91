"""Who starts a successor: what becomes of it, and what whoever asked is told.  The engine is a fake."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from crablb import lasting
from crablb import log as logging
from crablb.control import succession, successor, takeover
from crablb.control.doors import Doors
from crablb.control.estate import Announced
from crablb.control.operator import ConflictError, Operator
from crablb.control.succession import Succession
from crablb.control.supervisor import Supervisor
from crablb.errors import KernelError
from crablb.kernel import pins
from crablb.overlay import Changes

#: A successor that comes to the takeover, and serves, as the arguments say.
COMES = """
import os, sys, time
from pathlib import Path
from crablb.kernel import pins
pins.RUN, pins.namespace = Path(sys.argv[1]), lambda: "netns-7"
from crablb import log
from crablb.control.estate import Heir
from crablb.control.takeover import connect
heir = Heir(connect(["eth0"]))
print("crablb: it has come", file=sys.stderr, flush=True)
heir.predecessor.take()
if sys.argv[2] == "serves":
    assert heir.read_rest().log_level == "debug", heir.rest
    assert heir.log >= 0
    log.adopt(heir.log)
    print("it has the log", file=sys.stderr, flush=True)
    heir.predecessor.served()
else:
    os.kill(os.getpid(), 9)
"""


@pytest.fixture(autouse=True)
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pins, "RUN", tmp_path)
    monkeypatch.setattr(pins, "namespace", lambda: "netns-7")


def started(
    command: list[str] | None,
    test: Callable[[Succession, list[str]], Coroutine[Any, Any, None]],
    *,
    listen: bool = True,
) -> list[str]:
    """What was done to the engine while ``test`` ran."""
    asked: list[str] = []

    counted: list[str] = []

    async def within() -> None:
        engine = SimpleNamespace(
            interfaces=[SimpleNamespace(name="eth0")],
            config=SimpleNamespace(seed=None, admin_group=""),
            seed=bytes(16),
            task=lasting.task,
            hold=lambda: asked.append("hold"),
            offer=lambda: ({}, []),
            give=lambda fds: asked.append("give"),
            resume=lambda: asked.append("resume"),
            export=lambda: {},
            count=counted.append,
        )
        told: list[str] = []
        supervisor = SimpleNamespace(
            engine=engine,
            listeners=[],
            health=SimpleNamespace(export=lambda: []),
            offer=lambda: {},
            pause=lambda: None,
            resume=lambda: None,
            export=lambda: (Announced(), None),
            tell=lambda event: told.append(f"{event.kind}: {event.reason}"),
        )
        wanted = SimpleNamespace(hold=lambda: None, resume=lambda: None, owed=False)
        operator = SimpleNamespace(wanted=wanted, changes=Changes(), export=lambda: {"log_level": "debug"})
        doors = SimpleNamespace(offer=lambda: {})
        made = Succession(cast(Supervisor, supervisor), cast(Operator, operator), cast(Doors, doors), command)
        if listen:
            made.start()
        try:
            async with asyncio.timeout(60):
                await test(made, told)
        finally:
            await made.close()
        assert counted == ["takeovers_failed"] * len(told)

    asyncio.run(within())
    return asked


def python(code: str, *more: str) -> list[str]:
    return [sys.executable, "-c", code, *more]


def test_one_that_serves(tmp_path, capfd):
    """What it says before goes by this process, then it has the log itself."""

    async def test(made: Succession, told: list[str]) -> None:
        process = await made.ask("somebody")
        assert process == await made.left
        assert not told

    assert started(python(COMES, str(tmp_path), "serves"), test) == ["hold", "give"]
    logging.flush()
    said = capfd.readouterr().err
    assert "it has come" in said
    assert "it has the log" in said


FAILS = {
    "says why": (python("import sys; sys.exit('crablb: there is no backend')"), "there is no backend"),
    "says more": (python("print('{}\\na\\n\\nb', file=__import__('sys').stderr); exit(2)"), "a; b"),
    "a fault of its own": (python("1 / 0"), "ZeroDivisionError: division by zero"),
    "silent": (python("exit(7)"), "has ended with exit status 7"),
    "killed": (python("import os; os.kill(os.getpid(), 9)"), "has ended by SIGKILL"),
    "no program": (["/nowhere/crablb"], "cannot start /nowhere/crablb: No such file"),
}


@pytest.mark.parametrize("name", FAILS)
def test_one_that_fails_at_once(name):
    command, words = FAILS[name]

    async def test(made: Succession, told: list[str]) -> None:
        gc.collect()  # what tests before have left open
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(2):  # it may be tried again
            with pytest.raises(KernelError) as raised:
                await made.ask()
            assert words in str(raised.value)
            assert "{" not in str(raised.value)
            assert f"takeover-failed: {raised.value}".removesuffix(f"\nprocess {os.getpid()} serves on") == told[-1]
        assert len(told) == 2
        assert len(os.listdir("/proc/self/fd")) == before

    assert started(command, test) == []


def test_one_that_fails_with_all_in_hand(tmp_path):
    """The reason is both what was seen here and what it said."""

    async def test(made: Succession, told: list[str]) -> None:
        with pytest.raises(
            KernelError, match=rf"ended before it served \(.*SIGKILL.*\nprocess {os.getpid()} serves on"
        ):
            await made.ask()
        (event,) = told
        assert event.startswith("takeover-failed: the new process has ended before it served (")

    assert started(python(COMES, str(tmp_path), "dies"), test) == ["hold", "give", "resume"]


def test_each_part_goes_on_whatever_becomes_of_the_others():
    asked: list[str] = []

    def part(name: str) -> Any:
        def resume() -> None:
            asked.append(name)
            raise OSError("the disk is on fire")

        return SimpleNamespace(resume=resume)

    supervisor, operator = part("supervisor"), SimpleNamespace(wanted=part("wanted"))
    supervisor.engine = part("engine")
    succession._Giver(cast(Supervisor, supervisor), cast(Operator, operator), cast(Doors, None)).resume()
    assert asked == ["engine", "supervisor", "wanted"]


def test_one_that_never_comes(monkeypatch):
    monkeypatch.setattr(succession, "MOST", 0.3)

    async def test(made: Succession, told: list[str]) -> None:
        with pytest.raises(KernelError, match=r"did not come to serve within 0.3 s"):
            await made.ask()
        assert [event.partition(":")[0] for event in told] == ["takeover-failed"]

    started(python("import time; time.sleep(100)"), test)


LATE = """
import os, signal, sys
from pathlib import Path
from crablb.kernel import pins
pins.RUN, pins.namespace = Path(sys.argv[1]), lambda: "netns-7"
from crablb.control.takeover import connect
found = connect(["eth0"])
def serve(*_):
    found.take()
    found.rest()
    found.served()
    os._exit(0)
signal.signal(signal.SIGTERM, serve)
while True:
    signal.pause()
"""


def test_one_that_would_come_to_serve_as_it_is_ended(tmp_path, monkeypatch):
    """It is heard no more before it is told to end: else nobody would serve."""
    wait = asyncio.wait

    async def test(made: Succession, told: list[str]) -> None:
        async def over(those: Any, timeout: float | None = None, **more: Any) -> Any:
            if timeout != succession.MOST:
                return await wait(those, timeout=timeout, **more)
            while not made._host.busy:
                await asyncio.sleep(0.01)
            return set(), those  # the time is over just when it has begun

        monkeypatch.setattr(asyncio, "wait", over)
        with pytest.raises(KernelError, match=r"did not come to serve within 60 s"):
            await made.ask()
        assert not made.left.done()

    assert started(python(LATE, str(tmp_path)), test) == ["hold", "resume"]


HANGS = (
    LATE[: LATE.index("def serve")]
    + """
if sys.argv[2] == "given":
    found.take()
os.kill(os.getpid(), signal.SIGSTOP)
"""
)


@pytest.mark.parametrize("stage", ["offered", "given"])
def test_one_that_is_stopped(stage, tmp_path, monkeypatch):
    """It is ended as soon as it is given up, and the reason is why."""
    for name in ("START", "SERVE"):
        monkeypatch.setattr(takeover, name, 0.5)
    for module, name in ((succession, "LAST"), (successor, "END")):
        monkeypatch.setattr(module, name, 0.1)

    async def test(made: Succession, told: list[str]) -> None:
        with pytest.raises(KernelError, match=r"too slow: it said nothing for 0.5 s \(.*SIGKILL"):
            await made.ask()
        assert len(told) == 1

    assert started(python(HANGS, str(tmp_path), stage), test)[-1] == "resume"


def test_whoever_asked_gives_up(tmp_path):
    async def test(made: Succession, told: list[str]) -> None:
        asking = asyncio.ensure_future(made.ask())
        while not made._host.busy:
            await asyncio.sleep(0.01)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert not made._host.busy

    assert started(python(LATE, str(tmp_path)), test) == ["hold", "resume"]


def test_what_cannot_be(monkeypatch):
    async def nothing(made: Succession, told: list[str]) -> None:
        with pytest.raises(ConflictError, match="no Python interpreter"):
            await made.ask()
        monkeypatch.setattr(succession.os, "getpid", lambda: 1)
        with pytest.raises(ConflictError, match="process 1 of a container"):
            await made.ask()
        monkeypatch.undo()

    started(None, nothing, listen=False)

    async def twice(made: Succession, told: list[str]) -> None:
        first = asyncio.ensure_future(made.ask())
        await asyncio.sleep(0)
        with pytest.raises(ConflictError, match="taking over already"):
            await made.ask()
        made.ask_soon()  # that is said in the log
        assert made._child
        os.kill(made._child.pid, signal.SIGKILL)
        with pytest.raises(KernelError, match="SIGKILL"):
            await first

    started(python("import time; time.sleep(100)"), twice, listen=False)


def test_told_to_stop_with_a_successor_on_its_way():
    """It ends, too."""
    pids: list[int] = []

    async def test(made: Succession, told: list[str]) -> None:
        made.ask_soon()
        while not made._child:
            await asyncio.sleep(0.01)
        pids.append(made._child.pid)

    started(python("import time; time.sleep(100)"), test)
    with pytest.raises(ProcessLookupError):
        os.kill(pids[0], 0)


def test_no_place_for_the_socket(monkeypatch, tmp_path):
    """It serves; nobody can take over from outside."""
    monkeypatch.setattr(pins, "RUN", tmp_path / "nowhere")

    async def test(made: Succession, told: list[str]) -> None:
        assert not made.left.done()

    started(None, test)
