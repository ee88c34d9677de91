"""Calls that are interrupted wherever a signal's handler can: a trace function raises in its place."""

from __future__ import annotations

import contextlib
import dis
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

__all__ = ["Torn", "torn"]


class Torn(Exception):
    """What a signal's handler raises."""


def tear() -> None:
    raise Torn


@contextlib.contextmanager
def torn(module: ModuleType, after: int, act: Callable[[], object] = tear) -> Iterator[None]:
    """Act where a signal's handler or another thread could, once: behind the n-th call that returns into this module,
    or into contextlib, or function that begins there."""
    left, ours = after, {module.__file__, contextlib.__file__}

    def traced(frame, *_):
        """Of one frame, which is not held on to: with frames that outlived their calls CPython 3.11 itself crashed now
        and then, where a generator began."""
        if frame.f_code.co_filename not in ours:
            return None
        before = ""

        def step(frame, event, _):
            nonlocal left, before
            if event == "opcode":
                instruction = dis.opname[frame.f_code.co_code[frame.f_lasti]]
                if before.startswith(("CALL", "RESUME", "JUMP_BACKWARD")):
                    left -= 1
                    if left == -1:
                        act()
                if instruction not in ("CACHE", "EXTENDED_ARG"):
                    before = instruction
            return step

        frame.f_trace_opcodes = True
        return step

    sys.settrace(traced)
    try:
        yield
    finally:
        sys.settrace(None)
