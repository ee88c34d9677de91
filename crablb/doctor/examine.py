"""Read and judge everything at once, for a few seconds at the most."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar

from crablb.doctor.finding import Finding, few, note

__all__ = ["SECONDS", "Look", "examine", "reason", "unread"]

T = TypeVar("T")

#: For everything together.
SECONDS = 4.0


@dataclass(frozen=True, slots=True)
class Look(Generic[T]):
    """One thing to look at.  ``read`` may raise whatever it likes: what cannot be read is a note, and no more."""

    where: str  # "machine", "eth0"
    what: str  # is looked at, to be named if it cannot be
    read: Callable[[], T]
    judge: Callable[[T], Iterable[Finding]]

    def findings(self) -> list[Finding]:
        try:
            return list(few(self.judge(self.read())))
        except Exception as error:  # a doctor who faints at one patient is of no use to the others
            return [unread(self.what, reason(error))]


def reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error) or type(error).__name__


def unread(what: str, reason: str) -> Finding:
    remedy = "" if os.geteuid() == 0 else "run the doctor as root"
    return note("unread", f"cannot look at {what}: {reason}", "what is wrong there, if anything, is not told", remedy)


def examine(looks: Sequence[Look[Any]], seconds: float = SECONDS) -> list[Finding]:
    """What all of them find, in their order; of one that takes longer than ``seconds``, that it does.

    The looks run in threads that are not waited for: what hangs in the kernel (a file system whose server is gone)
    keeps nobody.
    """
    done: SimpleQueue[tuple[int, list[Finding]]] = SimpleQueue()

    def run(number: int, look: Look[Any]) -> None:
        done.put((number, look.findings()))

    for number, look in enumerate(looks):
        threading.Thread(target=run, args=(number, look), name=f"doctor: {look.what}", daemon=True).start()
    end = time.monotonic() + seconds
    found: dict[int, list[Finding]] = {}
    while len(found) < len(looks):
        try:
            number, findings = done.get(timeout=max(end - time.monotonic(), 0))
        except Empty:
            break
        found[number] = findings
    late = f"it takes more than {seconds:g} s"
    return [
        replace(finding, where=look.where)
        for number, look in enumerate(looks)
        for finding in found.get(number, [unread(look.what, late)])
    ]
