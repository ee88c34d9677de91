"""What the kernel and libbpf refuse, as exceptions."""

from __future__ import annotations

import errno
import os

from crablb.errors import KernelError
from crablb.kernel._libbpf import ffi, lib

__all__ = [
    "BpfBusyError",
    "BpfError",
    "BpfLayoutError",
    "BpfLoadError",
    "BpfNotFoundError",
    "BpfPermissionError",
    "check",
    "error",
    "take_log",
]

lib.crab_log_install()


class BpfError(KernelError):
    """The kernel or libbpf refused.  ``errno`` is its number, ``log`` what libbpf and the verifier said."""

    def __init__(self, what: str, number: int = 0, log: str = "") -> None:
        self.errno = number
        self.log = log
        super().__init__(f"{what}: {os.strerror(number)}" if number else what)


class BpfLoadError(BpfError):
    """A program or map did not load; the verifier's words are in ``log``."""


class BpfLayoutError(BpfError):
    """A map that exists has keys or values of another size than the program's."""


class BpfPermissionError(BpfError):
    """Not privileged: CAP_BPF and CAP_NET_ADMIN are needed, as root has them."""


class BpfNotFoundError(BpfError):
    """No such object, map, program, pin or interface."""


class BpfBusyError(BpfError):
    """The place is taken by another program."""


def take_log() -> str:
    """What libbpf and the verifier said since the last call."""
    return bytes(ffi.string(lib.crab_log_take())).decode(errors="replace")


def error(what: str, number: int, kind: type[BpfError] = BpfError) -> BpfError:
    """The exception for an error number."""
    log = take_log()
    number = abs(number)
    # EACCES from loading is the verifier's no, not a missing privilege.
    if number == errno.EPERM or (number == errno.EACCES and kind is not BpfLoadError):
        return BpfPermissionError(f"{what} (run as root, or with CAP_BPF and CAP_NET_ADMIN)", number, log)
    if number in (errno.ENOENT, errno.ENODEV):
        return BpfNotFoundError(what, number, log)
    if number in (errno.EBUSY, errno.EEXIST):
        return BpfBusyError(what, number, log)
    return kind(what, number, log)


def check(rc: int, what: str, kind: type[BpfError] = BpfError) -> int:
    """A libbpf return code: negative is an error number."""
    if rc < 0:
        raise error(what, rc, kind)
    lib.crab_log_take()
    return rc
