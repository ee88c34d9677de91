"""What there is to know of a network interface."""

from __future__ import annotations

import socket
from dataclasses import dataclass

from crablb.errors import KernelError
from crablb.kernel import rtnetlink
from crablb.kernel.rtnetlink import LINK, Netlink

__all__ = ["Interface", "interface_info"]


@dataclass(frozen=True, slots=True)
class Interface:
    name: str
    index: int
    mac: bytes
    mtu: int
    up: bool
    rx_queues: int  # in use
    max_queues: int  # RX queues that it may have in use
    kind: str  # "veth", "vlan", ...; empty for hardware


def interface_info(name: str) -> Interface:
    """What the current network namespace says of an interface.  Raises :class:`KernelError` if there is none."""
    try:
        index = socket.if_nametoindex(name)
    except OSError:
        names = ", ".join(n for _, n in socket.if_nameindex())
        raise KernelError(f"interface {name} does not exist; there are: {names}") from None

    with Netlink() as netlink:
        link = rtnetlink.link(netlink, index)
    *_, flags, _ = link.fields(LINK)
    found = link.attributes(LINK)
    most = rtnetlink.number(found.get(rtnetlink.IFLA_NUM_RX_QUEUES)) or 1
    kind = rtnetlink.attributes(found.get(rtnetlink.IFLA_LINKINFO, b"")).get(rtnetlink.IFLA_INFO_KIND)
    return Interface(
        name,
        index,
        found.get(rtnetlink.IFLA_ADDRESS, b""),
        rtnetlink.number(found.get(rtnetlink.IFLA_MTU)),
        bool(flags & 1),
        rtnetlink.rx_queues(index) or most,
        most,
        rtnetlink.text(kind),
    )
