"""Exceptions through C: what Python raises that C has called comes out where Python called C, in the same thread."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType


class _Thread(threading.local):
    carries = False
    raised: BaseException | None = None


_thread = _Thread()


def carries() -> bool:
    """Whether this thread's exceptions come out somewhere: it is in :func:`carrying`."""
    return _thread.carries


@contextmanager
def carrying() -> Iterator[None]:
    """Calls of C in the context: the first exception of what C calls is raised when they have returned."""
    _thread.carries, _thread.raised = True, None
    try:
        yield
    finally:
        _thread.carries, raised = False, _thread.raised
        _thread.raised = None
        if raised:
            raise raised


def keep(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    """For cffi, as ``onerror`` of a callback."""
    if not _thread.carries:
        traceback.print_exception(error)
    elif not _thread.raised:
        _thread.raised = error
