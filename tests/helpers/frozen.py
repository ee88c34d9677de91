"""A thread that does not run any more, while its process's others do."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PTRACE_DETACH, PTRACE_SEIZE, PTRACE_INTERRUPT = 17, 0x4206, 0x4207
WALL = 0x40000000


def thread(process: int, name: str) -> int:
    """The thread of this name."""
    tasks = Path(f"/proc/{process}/task")
    (found,) = [int(one.name) for one in tasks.iterdir() if (one / "comm").read_text().strip() == name]
    return found


@contextmanager
def frozen(task: int) -> Iterator[Callable[[], object]]:
    """In the context the thread is stopped.

    It may be killed meanwhile; its process ends then when the function that is given has been called.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def ptrace(request: int) -> None:
        if libc.ptrace(request, task, None, None):
            raise OSError(ctypes.get_errno(), "ptrace")

    ptrace(PTRACE_SEIZE)
    ptrace(PTRACE_INTERRUPT)
    os.waitpid(task, WALL)
    ended = False

    def reap() -> None:
        nonlocal ended
        if not ended and os.waitpid(task, WALL | os.WNOHANG)[0]:
            ended = True

    try:
        yield reap
    finally:
        with suppress(ProcessLookupError):  # it was killed
            ptrace(PTRACE_DETACH)
