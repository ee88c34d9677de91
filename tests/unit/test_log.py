"""What is logged reaches whoever reads late, and what could not be written is told."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from crablb.cli import streams
from crablb.log import LINES, _Writer
from tests.helpers.processes import until


def line(n: int) -> str:
    return json.dumps({"event": "something", "n": n, "more": "x" * 200}) + "\n"


def read(fd: int, lines: int) -> list[dict[str, object]]:
    """So many, as they come."""
    text = b""
    while text.count(b"\n") < lines or not text.endswith(b"\n"):
        text += os.read(fd, 1 << 16)
    return [json.loads(each) for each in text.splitlines() if each]


@pytest.fixture
def pipe():
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


@pytest.mark.parametrize("blocking", [True, False])
def test_a_full_pipe_loses_nothing(pipe, blocking):
    """Also one that does not block, as other programs that have it too may make it."""
    there, here = pipe
    os.set_blocking(here, blocking)
    fcntl.fcntl(here, fcntl.F_SETPIPE_SZ, 4096)
    writer = _Writer(here)
    for n in range(1000):
        writer.write(line(n))
    assert [entry["n"] for entry in read(there, 1000)] == list(range(1000))
    writer.wait(60)


def test_more_than_wait_are_counted(pipe):
    there, here = pipe
    os.set_blocking(here, False)
    writer = _Writer(here)
    many = LINES + fcntl.fcntl(here, fcntl.F_GETPIPE_SZ) // len(line(0)) + 5000
    for n in range(many):
        writer.write(line(n))
    entries = read(there, 1)  # there is room again
    until(lambda: len(writer._lines) < LINES)
    writer.write(line(-1))
    while entries[-1].get("n") != -1:
        entries += read(there, 1)
    lost = [entry for entry in entries if entry["event"] == "log lines were lost"]
    assert {entry["reason"] for entry in lost} == {"nobody read them"}
    assert sum(int(str(entry["lines"])) for entry in lost) + len(entries) - len(lost) == many + 1


def test_no_room(tmp_path: Path):
    """On a full disk; what is told of them is whole, and so are the lines behind it."""
    full, path = os.open("/dev/full", os.O_WRONLY), tmp_path / "log"
    writer = _Writer(full)
    for n in range(3):
        writer.write(line(n))
    writer.wait(60)
    writer.write(line(3))  # tells of them, and cannot either
    writer.wait(60)
    file = os.open(path, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, full)
    writer.write(line(4))
    writer.write(line(5))
    writer.wait(60)
    os.close(file)
    lost, *others = map(json.loads, path.read_text().splitlines())
    assert lost == {"event": "log lines were lost", "lines": 4, "reason": "No space left on device"}
    assert [entry["n"] for entry in others] == [4, 5]
    os.close(full)


def test_a_line_that_ends_nowhere(pipe, monkeypatch):
    """What is written behind half a line begins with a line of its own."""
    there, here = pipe
    wrote: list[int] = []
    write = os.write

    def half(fd: int, data: bytes) -> int:
        wrote.append(len(data))
        if len(wrote) == 2:
            raise OSError(28, "No space left on device")
        return write(fd, data[:10] if len(wrote) == 1 else data)

    monkeypatch.setattr(os, "write", half)
    writer = _Writer(here)
    writer.write(line(0))
    writer.wait(60)
    writer.write(line(1))
    writer.wait(60)
    begun, *whole = os.read(there, 1 << 16).splitlines()
    assert begun == line(0)[:10].encode()
    assert [json.loads(each).get("n") for each in whole] == [None, 1]


def test_nobody_reads_any_more(pipe):
    """The reader of a pipe has ended: the writer goes on, and says so when there is another."""
    there, here = pipe
    writer = _Writer(here)
    assert stat.S_ISFIFO(os.fstat(here).st_mode)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, there)
    writer.write(line(0))
    writer.wait(60)
    again, other = os.pipe()
    os.dup2(other, here)
    os.close(other)
    writer.write(line(1))
    lost, entry = read(again, 2)
    assert (lost["lines"], lost["reason"], entry["n"]) == (1, "Broken pipe", 1)
    os.close(again)
    os.close(null)


def test_no_thread_to_be_had(pipe, monkeypatch):
    """What is logged is written by a later one, or when somebody waits for it: none is lost."""
    there, here = pipe

    def none(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    writer = _Writer(here)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", none)
        writer.write(line(0))
        writer.write(line(1))
        writer.wait(10)
        assert [entry["n"] for entry in read(there, 2)] == [0, 1]
        writer.write(line(2))
    writer.write(line(3))
    assert [entry["n"] for entry in read(there, 2)] == [2, 3]


# ---- what others have a line say ----

HOSTILE = '\x1b]0;mine\x07\x1b[2Ja\nb\r{"event": "forged"}\x9b31m\u2028\x7f'
LOGS = f"""
import structlog
from crablb import log
log.set_up()
structlog.get_logger().info("told", reason={HOSTILE!r}, parts=[{HOSTILE!r}])
try:
    raise ValueError({HOSTILE!r})
except ValueError:
    structlog.get_logger().exception("failed")
"""


def logged(to: int) -> None:
    subprocess.run([sys.executable, "-c", LOGS], stderr=to, check=True, env={**os.environ, "NO_COLOR": "1"})


def test_nobody_writes_lines_of_his_own_into_the_log(pipe):
    there, here = pipe
    logged(here)
    entries = read(there, 2)
    assert [entry["event"] for entry in entries] == ["told", "failed"]
    assert entries[0]["reason"] == HOSTILE


def test_a_terminal_obeys_nobody_who_is_logged():
    terminal, here = pty.openpty()
    try:
        logged(here)
        text = os.read(terminal, 1 << 16).decode()
    finally:
        os.close(here)
        os.close(terminal)
    for control in ("\x1b]0", "\x1b[2J", "\x07", "\x9b", "\x7f"):
        assert control not in text
    [told] = [line for line in text.splitlines() if "told" in line]
    assert "forged" in told
    assert "ValueError" in text


def test_nor_who_is_named_in_an_error(capsys):
    streams.complain(f"first {HOSTILE}\nsecond")
    said = capsys.readouterr().err
    assert all(line.startswith("crablb: ") and line.isprintable() for line in said.splitlines())
    assert "crablb: second" in said
