"""Work that is begun anew, and log lines that are not written."""

from __future__ import annotations

import asyncio
import os
import select
import threading

import pytest
from structlog.testing import capture_logs

from crablb import lasting, seldom
from crablb.lasting import Pauses
from crablb.seldom import Seldom
from tests.helpers.processes import until


def test_pauses():
    pauses = Pauses()
    assert [pauses.after(0) for _ in range(6)] == [1, 2, 4, 8, 10, 10]
    assert pauses.after(lasting.CALM) == 1  # it worked for a while
    assert [Pauses().after(0) for _ in range(2)] == [1, 1]
    many = Pauses()
    assert all(many.after(0) <= lasting.LONGEST for _ in range(10_000))


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(lasting, "FIRST", 0.0)


class Work:
    """Fails a number of times, then is done."""

    def __init__(self, failures: int) -> None:
        self.left, self.tries = failures, 0

    def run(self) -> None:
        self.tries += 1
        if self.left:
            self.left -= 1
            raise MemoryError("none left")

    async def wait(self) -> None:
        self.run()


def test_begun_anew_and_counted(at_once):
    work, failed = Work(3), []
    with capture_logs() as said:
        asyncio.run(lasting.keep("work", work.wait, lambda: failed.append(1)))
    assert (work.tries, len(failed)) == (4, 3)
    assert [(e["event"], e["task"]) for e in said] == [("a background task failed; it is begun anew", "work")] * 3


def test_what_cannot_be_told_is_no_failure_of_the_work(at_once):
    def failed():
        raise MemoryError

    work = Work(2)
    asyncio.run(lasting.keep("work", work.wait, failed))
    assert work.tries == 3


def test_given_up(at_once):
    work, told = Work(10**6), []

    async def main() -> None:
        task = lasting.task("work", work.wait, given_up=told.append)
        with pytest.raises(MemoryError):
            await task

    asyncio.run(main())
    assert work.tries == lasting.TRIES
    assert told == ["task work failed: MemoryError('none left')"]


def test_cancelled_is_not_failed():
    told = []

    async def main() -> None:
        task = lasting.task("work", asyncio.Event().wait, lambda: told.append(1), told.append)
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()

    asyncio.run(main())
    assert not told


def test_in_a_thread(at_once):
    stop, stopped = os.pipe()
    work = Work(3)
    lasting.keep_in_thread("work", work.run, stop)
    assert work.tries == 4
    os.close(stopped)  # nobody waits for it any more
    work = Work(3)
    lasting.keep_in_thread("work", work.run, stop)
    assert work.tries == 1
    os.close(stop)


def test_a_thread_survives_that_it_cannot_wait(at_once, monkeypatch):
    def none(*_: object) -> None:
        raise OSError("no memory for poll(2)")

    monkeypatch.setattr(lasting, "wait", none)
    work, (stop, stopped) = Work(3), os.pipe()
    lasting.keep_in_thread("work", work.run, stop)
    assert work.tries == 4
    for end in (stop, stopped):
        os.close(end)


def test_seldom():
    lines = Seldom(10)
    assert [lines.due("a", at) for at in (0, 0, 1, 9.9)] == [1, 0, 0, 0]
    assert lines.due("b", 5) == 1
    assert lines.due("a", 10) == 4  # three that were not written, and this one
    assert lines.due("a", 20) == 1


def test_a_burst():
    lines = Seldom(10, burst=2)
    assert [lines.due("a", at) for at in (0, 1, 2, 3, 10, 10, 10, 20)] == [1, 1, 0, 0, 3, 1, 0, 2]


def test_kinds_are_bounded():
    lines = Seldom(10)
    written = sum(lines.due(i, 0.0) > 0 for i in range(100_000))
    assert written == seldom.KINDS + 1  # and one for all others
    assert len(lines._kinds) == seldom.KINDS + 1
    assert lines.due("late", 11.0) == 1
    # Those of which a count is to be told stay.
    lines = Seldom(10)
    for _ in range(3):
        lines.due("kept", 0.0)
    for i in range(seldom.KINDS):
        lines.due(i, 0.0)
    lines.due("new", 11.0)
    assert lines.due("kept", 11.0) == 3


# ---- whether threads live ----


class Waiting:
    """A thread that waits, and works when it is told to, until it is told that it is done."""

    def __init__(self, name: str, last: BaseException | None = None) -> None:
        self.stop, self.stopped = os.pipe()
        self.order, self.ordered = os.pipe()
        self.done, self.working = threading.Event(), threading.Event()
        self._last = last
        self.thread = threading.Thread(target=lasting.keep_in_thread, args=(name, self._work, self.stop))
        self.thread.start()

    def _work(self) -> None:
        poll = select.poll()
        poll.register(self.stop, select.POLLHUP)
        poll.register(self.order, select.POLLIN)
        while self.stop not in dict(lasting.wait(poll)):
            os.read(self.order, 1)
            self.working.set()
            if self._last:
                raise self._last
            self.done.wait()

    def hang(self) -> None:
        os.write(self.ordered, b"x")
        self.working.wait()

    def end(self) -> None:
        self.done.set()
        os.close(self.stopped)
        self.thread.join()
        for fd in (self.stop, self.order, self.ordered):
            os.close(fd)


@pytest.fixture
def often(monkeypatch):
    monkeypatch.setattr(lasting, "BEAT", 0.001)
    monkeypatch.setattr(lasting, "_pulses", {})


def settled(names: list[str]) -> None:
    """Only these are late, however often one looks."""
    until(lambda: lasting.late() == names)
    for _ in range(1000):
        assert set(lasting.late()) >= set(names)


def test_who_waits_lives_and_who_works_for_ever_does_not(often):
    threads = [Waiting("one"), Waiting("two")]
    try:
        for _ in range(3):
            until(lambda: lasting.late() == [])
        threads[1].hang()
        settled(["two"])
        threads[1].done.set()
        for _ in range(3):
            until(lambda: lasting.late() == [])
    finally:
        for one in threads:
            one.end()
    assert lasting.late() == []
    assert lasting._pulses == {}


def test_who_fails_lives_while_it_waits_to_begin_anew(often, monkeypatch):
    monkeypatch.setattr(lasting, "FIRST", 600.0)
    one = Waiting("one", MemoryError("none left"))
    try:
        one.hang()
        for _ in range(3):
            until(lambda: lasting.late() == [])
    finally:
        one.end()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_who_ended_otherwise_does_not(often):
    one = Waiting("one", SystemExit(1))
    one.hang()
    one.thread.join()
    lasting.late()
    assert lasting.late() == ["one"]
    one.end()


def test_waiting_ends_at_its_time(often):
    poll = select.poll()
    assert lasting.wait(poll, 0) == []
    assert lasting.wait(poll, 0.01) == []
