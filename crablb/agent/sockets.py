"""MPTCP sockets for a server's programs that know nothing of MPTCP: what they make as TCP ones.  See bpf/sockets.bpf.c.

Source: net/socket.c, update_socket_protocol() (Linux 6.6).
"""

from __future__ import annotations

import os
from pathlib import Path

from crablb.kernel import bpf, pins
from crablb.kernel.bpf import BpfError

OBJECT, PROGRAM, LINK = "sockets", "crab_sockets", "sockets"
INSTEAD = "start programs by: mptcpize run PROGRAM ..., or have them listen by MPTCP themselves"


def problems() -> list[str]:
    """Why it cannot be on this machine; empty if it can."""
    try:
        with bpf.Object(bpf.object_path(OBJECT)):
            return []
    except bpf.BpfPermissionError:
        why = "this machine lets nobody load tracing programs"
    except BpfError as error:
        why = f"the kernel has no update_socket_protocol (Linux 6.6, with BTF and MPTCP): {error}"
    return [f"--mptcp-listeners: {why}; {INSTEAD}"]


def set_up(cgroup: Path | str, folder: Path) -> None:
    """From now on programs of the cgroup, in this network namespace, get MPTCP sockets for TCP ones.

    Raises :class:`KernelError`.
    """
    with bpf.Object(bpf.object_path(OBJECT)) as loaded:
        loaded.map("sockets_netns").update(0, pins.cookie())
        fd = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY)
        try:
            loaded.map("sockets_cgroup").update(0, fd)
        finally:
            os.close(fd)
        with loaded.program(PROGRAM).attach_modify_return() as link:
            pins.put(link, folder / LINK)


def attached(folder: Path) -> bool:
    try:
        with bpf.Link.from_pin(folder / LINK):
            return True
    except bpf.BpfNotFoundError:
        return False


def tear_down(folder: Path) -> None:
    """Sockets that there are stay as they are."""
    (folder / LINK).unlink(missing_ok=True)
