"""What this process may do: capabilities(7), asked for by name and given up.

A thread's are its own, and those of threads and processes that it starts later are the same: give up before.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from crablb.errors import KernelError

__all__ = ["OF_USE", "SERVE", "keep", "lacking", "lent", "require"]

#: linux/capability.h
NUMBERS = {
    "CAP_DAC_READ_SEARCH": 2,
    "CAP_SETPCAP": 8,
    "CAP_NET_BIND_SERVICE": 10,
    "CAP_NET_ADMIN": 12,
    "CAP_NET_RAW": 13,
    "CAP_IPC_LOCK": 14,
    "CAP_SYS_PTRACE": 19,
    "CAP_SYS_ADMIN": 21,
    "CAP_PERFMON": 38,
    "CAP_BPF": 39,
}
#: What CAP_SYS_ADMIN stands for as well.
UNDER_ADMIN = {"CAP_PERFMON", "CAP_BPF"}
#: Of the load balancer: next hops and attachments; sockets; programs, and what some of them do; the sockets' memory.
SERVE = ("CAP_NET_ADMIN", "CAP_NET_RAW", "CAP_BPF", "CAP_PERFMON", "CAP_IPC_LOCK")
#: What it has use for besides: files are read again, whosever they are, if this process could read them; ports below
#: 1024 (metrics_listen, admin_listen), also of a process that takes over.
OF_USE = ("CAP_DAC_READ_SEARCH", "CAP_NET_BIND_SERVICE")
PR_CAPBSET_READ, PR_CAPBSET_DROP = 23, 24
PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE = 47, 2
VERSION = 0x20080522  # of capset(2)'s header, with two words for each set


def _held() -> int:
    status = Path("/proc/thread-self/status").read_text()
    return int(status.partition("\nCapEff:")[2].split(maxsplit=1)[0], 16)


def lacking(names: tuple[str, ...]) -> list[str]:
    """Those of these that this thread does not have."""
    held = _held()
    admin = held >> NUMBERS["CAP_SYS_ADMIN"] & 1
    return [n for n in names if not held >> NUMBERS[n] & 1 and not (admin and n in UNDER_ADMIN)]


def require(what: str, names: tuple[str, ...]) -> None:
    """Raises :class:`KernelError` if some of them are not there; ``what``: the command that needs them."""
    if lack := lacking(names):
        raise KernelError(
            f"{what} lacks {', '.join(lack)}; run it as root, or as another user with {', '.join(names)}"
            " (AmbientCapabilities= in a unit of systemd, setpriv --ambient-caps)"
        )


def keep(names: tuple[str, ...]) -> None:
    """Give up all others, for good: programs that are started have them no more either.

    Raises :class:`KernelError` if the kernel refuses.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    kept = sum(1 << NUMBERS[name] for name in names) & _held()
    if not lacking(("CAP_SETPCAP",)):
        number = 0
        while (has := libc.prctl(PR_CAPBSET_READ, number, 0, 0, 0)) >= 0:
            if has and not kept >> number & 1:
                libc.prctl(PR_CAPBSET_DROP, number, 0, 0, 0)
            number += 1
    if number := _set(kept, 0):
        raise KernelError(f"cannot give up capabilities: {os.strerror(number)}")


def _set(held: int, inheritable: int) -> int:
    """errno; 0: it is done."""
    libc = ctypes.CDLL(None, use_errno=True)
    words = [(held >> shift & 0xFFFFFFFF, inheritable >> shift & 0xFFFFFFFF) for shift in (0, 32)]
    header = (ctypes.c_uint32 * 2)(VERSION, 0)
    # Effective, permitted, inheritable; twice.
    data = (ctypes.c_uint32 * 6)(*(word for low, more in words for word in (low, low, more)))
    return ctypes.get_errno() if libc.capset(header, data) else 0


@contextmanager
def lent() -> Iterator[None]:
    """Programs that this thread starts meanwhile have what it has, also as another user than root.

    Root's have it anyway.  What the kernel does not let be lent they tell that they lack.
    """
    if os.geteuid() == 0:
        yield
        return
    held, libc = _held(), ctypes.CDLL(None, use_errno=True)
    _set(held, held)
    try:
        for number in range(held.bit_length()):
            if held >> number & 1:
                libc.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE, number, 0, 0)
        yield
    finally:
        _set(held, 0)  # the ambient ones go with it
