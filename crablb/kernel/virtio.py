"""What the driver virtio_net does beside XDP programs, unlike others.

With a native program it takes one queue more for each CPU that the machine may have, for what programs send, if it has
so many.  Those receive too, and nothing but programs' frames is sent by them.  If it has not, programs send by the
queues in use, each CPU by the one of its number.

Source: drivers/net/virtio_net.c of Linux 7.3 (virtnet_xdp_set, virtnet_xdp_get_sq, virtnet_poll_tx,
__virtnet_xdp_xmit_one).
"""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

from crablb.errors import KernelError
from crablb.kernel import ethtool, rtnetlink
from crablb.kernel.interface import Interface

__all__ = ["DRIVER", "cpus", "drops_in_zero_copy", "only_receives", "overruns", "refuse_to_overrun", "takes_no_room"]

DRIVER = "virtio_net"

POSSIBLE = Path("/sys/devices/system/cpu/possible")


def cpus() -> int:
    """How many CPUs the kernel counts, those that may come included: its nr_cpu_ids."""
    try:
        return int(re.split("[-,]", POSSIBLE.read_text())[-1]) + 1
    except (OSError, ValueError):
        return os.cpu_count() or 1


def takes_no_room() -> bool:
    """Whether this kernel takes what leaves zero-copy memory to have no room in front, whatever the program leaves."""
    major, minor, *_ = re.findall(r"\d+", os.uname().release)
    return (int(major), int(minor)) < (7, 3)


def drops_in_zero_copy(interface: str) -> bool:
    """Whether in zero-copy mode everything that XDP programs send by it is dropped: the driver's header wants room."""
    return takes_no_room() and ethtool.driver(interface) == DRIVER


def overruns(queues: int, most: int, cpus: int) -> bool:
    """Whether what an XDP program sends is put on a queue behind the last one, which ends with a panic of the kernel.

    ``queues``: in use without a program; ``most``: that there are.
    """
    return queues > cpus and queues + cpus > most


def refuse_to_overrun(interface: Interface) -> None:
    """Raises :class:`KernelError` if the interface is one that no program may be attached to, so that it sends."""
    queues, most, count = interface.rx_queues, interface.max_queues, cpus()
    if overruns(queues, most, count) and ethtool.driver(interface.name) == DRIVER:
        raise KernelError(
            f"{interface.name} has {queues} queues in use, and the machine {count} CPUs: the kernel panics when an XDP"
            f" program sends by so many of virtio_net; give it fewer: ethtool -L {interface.name} combined {count}"
        )


def only_receives(interface: str, queue: int) -> bool:
    """Whether an AF_XDP socket on this queue only receives: it was taken for what XDP programs send.

    More queues than CPUs are in use only if some are (:func:`overruns`).
    """
    if ethtool.driver(interface) != DRIVER:
        return False
    try:
        queues, count = rtnetlink.rx_queues(socket.if_nametoindex(interface)), cpus()
    except OSError:
        return False
    return queues is not None and count < queues <= queue + count
