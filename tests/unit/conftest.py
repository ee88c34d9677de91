"""No test in this room needs root, and none gets anything of it when root runs them.

A namespace, a BPF program or an AF_XDP socket is refused, to the tests and to what they start.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator

import pytest

# linux/prctl.h, linux/securebits.h, linux/capability.h
PR_SET_SECUREBITS, PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE = 28, 47, 2
SECBIT_NOROOT = 1
VERSION_3 = 0x20080522
#: CAP_CHOWN, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER: the tree may be somebody else's.
FILES = range(4)
Sets = ctypes.c_uint32 * 6  # effective, permitted, inheritable; twice, for two words of capabilities
libc = ctypes.CDLL(None, use_errno=True)


def capabilities(call: str, sets: ctypes.Array[ctypes.c_uint32]) -> None:
    if getattr(libc, call)((ctypes.c_uint32 * 2)(VERSION_3, 0), sets):
        raise OSError(ctypes.get_errno(), call)


def prctl(*args: int) -> None:
    if libc.prctl(*args, *(0,) * (5 - len(args))):
        raise OSError(ctypes.get_errno(), f"prctl{args}")


@pytest.fixture(autouse=True, scope="package")
def powerless() -> Iterator[None]:
    if os.geteuid() != 0:
        yield
        return
    before = Sets()
    capabilities("capget", before)
    files = before[1] & sum(1 << bit for bit in FILES)
    prctl(PR_SET_SECUREBITS, SECBIT_NOROOT)  # else a program that root starts has all of them again
    capabilities("capset", Sets(files, before[1], before[2] | files, 0, before[4], before[5]))
    for bit in FILES:
        if files >> bit & 1:
            prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, bit)
    yield
    capabilities("capset", before)
    prctl(PR_SET_SECUREBITS, 0)
