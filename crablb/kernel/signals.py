"""Wait for signals."""

from __future__ import annotations

import ctypes
import errno
import math
import os
import signal
import time
from collections.abc import Collection

__all__ = ["caught"]

SET = ctypes.c_uint64 * 16  # sigset_t


class _Time(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def caught(signals: Collection[signal.Signals], seconds: float) -> int:
    """The one of these signals, which are blocked, that comes in so many seconds; 0: none does.

    :func:`signal.sigtimedwait` tells of one that there is not, by a number of chance, when its process was stopped
    (SIGSTOP, a debugger) until its time was over (CPython 3.11 and 3.13).
    """
    libc = ctypes.CDLL(None, use_errno=True)
    mask = SET()
    for number in signals:
        mask[(number - 1) // 64] |= 1 << (number - 1) % 64
    end = time.monotonic() + seconds
    while True:
        fraction, whole = math.modf(max(end - time.monotonic(), 0))
        number = libc.sigtimedwait(mask, None, ctypes.byref(_Time(int(whole), int(fraction * 1e9))))
        if number > 0:
            return int(number)
        if (error := ctypes.get_errno()) == errno.EAGAIN:
            return 0
        if error != errno.EINTR:  # by the handler of another signal, or as it was stopped
            raise OSError(error, os.strerror(error))
