"""Processes that tests speak to."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent


def answer(child: subprocess.Popen[str]) -> str:
    """The next line the program says; if it died instead, why."""
    assert child.stdout and child.stderr
    line = child.stdout.readline().strip()
    assert line, child.stderr.read()
    return line


def exchange(child: subprocess.Popen[str], text: str) -> str:
    """Tell the program a line; its answer."""
    assert child.stdin
    child.stdin.write(text + "\n")
    child.stdin.flush()
    return answer(child)


def until(
    condition: Callable[[], object],
    seconds: float = 60,
    every: float = 0.01,
    told: Callable[[], object] = lambda: "",
) -> None:
    """Ask again and again until it holds; fail after ``seconds`` with what there is instead, if somebody can tell.  In
    between, for ``every`` seconds, leave the CPU to those who are to bring it about."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"it did not come about: {told()}"
        time.sleep(every)


def logged(log: Path, event: str = "") -> list[dict[str, Any]]:
    """What a program logged, as JSON lines, whose event begins so; a line half written does not count yet."""
    whole = log.read_text().rpartition("\n")[0]
    return [entry for entry in map(json.loads, whole.splitlines()) if entry["event"].startswith(event)]


def end_by_signals() -> None:
    """Of a program that takes long: SIGTERM ends it as Ctrl-C does, and that ends it in a background job as well, where
    SIGINT is ignored.  So contexts end, and what was made is removed."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
