"""What the kernel and libbpf refuse, as exceptions."""

from __future__ import annotations

import errno
import os
from pathlib import Path

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
    """The kernel or libbpf refused.  ``errno`` is its number, ``log`` what libbpf and the verifier said.

    Its text has what libbpf said first, which is why, and the rest follows from it.
    """

    def __init__(self, what: str, number: int = 0, log: str = "") -> None:
        self.errno = number
        self.log = log
        # Numbers from 4000 on are libbpf's own, and have no text.
        text = f"{what}: {os.strerror(number)}" if 0 < number < 4000 else what
        said = next((line.removeprefix("libbpf: ") for line in log.splitlines() if line.startswith("libbpf: ")), "")
        super().__init__(f"{text} (libbpf: {said})" if said else text)


class BpfLoadError(BpfError):
    """A program or map did not load; the verifier's words are in ``log``."""


class BpfLayoutError(BpfError):
    """A map that exists has keys or values of another size than the program's."""


class BpfPermissionError(BpfError):
    """Not privileged: CAP_BPF and CAP_NET_ADMIN are needed, as root has them outside of user namespaces."""


class BpfNotFoundError(BpfError):
    """No such object, map, program, pin or interface."""


class BpfBusyError(BpfError):
    """The place is taken by another program."""


def take_log() -> str:
    """What libbpf and the verifier said since the last call."""
    return bytes(ffi.string(lib.crab_log_take())).decode(errors="replace")


CAP_NET_ADMIN, CAP_SYS_ADMIN, CAP_BPF = 12, 21, 39  # linux/capability.h
ALL_USERS = ["0", "0", "4294967295"]


def unprivileged() -> str:
    """What this process lacks, as advice; empty if it has all that root has."""
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    has = int(status["CapEff"], 16)
    if os.geteuid() != 0 and not has >> CAP_BPF & 1:
        return "run as root, or with CAP_BPF and CAP_NET_ADMIN"
    if Path("/proc/self/uid_map").read_text().split() != ALL_USERS:
        return "this is a user namespace, whose root may not load BPF programs; run outside of it"
    if not has >> CAP_NET_ADMIN & 1 or not (has >> CAP_BPF & 1 or has >> CAP_SYS_ADMIN & 1):
        return "root lacks capabilities here, as in a container; give it CAP_BPF and CAP_NET_ADMIN"
    if status.get("Seccomp", "0").strip() != "0":
        return "a seccomp filter is in force, as in a container; it must allow bpf(2)"
    return ""


def error(what: str, number: int, kind: type[BpfError] = BpfError) -> BpfError:
    """The exception for an error number."""
    log = take_log()
    number = abs(number)
    # EACCES from loading is the verifier's no, not a missing privilege.
    if number == errno.EPERM or (number == errno.EACCES and kind is not BpfLoadError):
        lacks = unprivileged()
        # libbpf's guesses at privileges are of no use beside what is known to lack.
        return BpfPermissionError(f"{what} ({lacks})", number) if lacks else BpfPermissionError(what, number, log)
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
