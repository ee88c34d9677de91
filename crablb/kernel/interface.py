"""What there is to know of a network interface."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass

from crablb.errors import KernelError
from crablb.kernel import rtnetlink
from crablb.kernel.rtnetlink import LINK, Netlink

__all__ = ["Interface", "interface_info", "interface_name", "interfaces_above"]


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
    return Interface(
        name,
        index,
        found.get(rtnetlink.IFLA_ADDRESS, b""),
        rtnetlink.number(found.get(rtnetlink.IFLA_MTU)),
        bool(flags & 1),
        rtnetlink.rx_queues(index) or most,
        most,
        _kind(found),
    )


def interfaces_above(index: int) -> dict[str, int]:
    """The interfaces that lie right on one, by name their indices: its bridge or bond, VLANs, tunnels and the like."""
    with Netlink() as netlink:
        links = {link.fields(LINK)[2]: link.attributes(LINK) for link in rtnetlink.links(netlink)}
    above = [rtnetlink.number(links.get(index, {}).get(rtnetlink.IFLA_MASTER))]
    for i, found in links.items():
        # A veth names its peer; and what is in another namespace has other numbers.
        on = rtnetlink.number(found.get(rtnetlink.IFLA_LINK)) if rtnetlink.IFLA_LINK_NETNSID not in found else 0
        if on == index and _kind(found) != "veth":
            above.append(i)
    return {rtnetlink.text(links[i].get(rtnetlink.IFLA_IFNAME)): i for i in above if i in links}


def _kind(link: Mapping[int, bytes]) -> str:
    information = rtnetlink.attributes(link.get(rtnetlink.IFLA_LINKINFO, b""))
    return rtnetlink.text(information.get(rtnetlink.IFLA_INFO_KIND))


def interface_name(index: int, otherwise: str | None = None) -> str:
    """The name of an interface by its index; if there is none any more, ``otherwise``, or ``if7``."""
    try:
        return socket.if_indextoname(index)
    except OSError:
        return f"if{index}" if otherwise is None else otherwise
