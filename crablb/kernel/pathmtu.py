"""What routers say of packets of IP in IP that were too big for them, where no tunnel device has sent them.

The kernel remembers such an error as it does any other (``ip route get`` shows the MTU, for ten minutes, IPv4's never
under ``net.ipv4.route.min_pmtu``), if it is about packets of somebody: a tunnel device, or a socket of their protocol.
So there is one of each protocol, which neither sends nor receives.  Two more receive the errors, as a sign to ask the
kernel anew.  Sources: raw(7), icmp(7); RFC 2003, 5; RFC 2473, 8; net/ipv4/raw.c, net/ipv6/raw.c.
"""

from __future__ import annotations

import ipaddress
import socket
import struct

from crablb.kernel import sockfilter
from crablb.model import Address

__all__ = ["PathMtu", "too_big"]

# include/uapi/linux/in.h, in6.h, icmp.h, icmpv6.h, filter.h
IPPROTO_IPIP, IPPROTO_IPV6 = 4, 41
SOL_RAW, ICMP_FILTER, ICMP6_FILTER, IPV6_RECVERR = 255, 1, 1, 25
ICMP_DEST_UNREACH, ICMP_FRAG_NEEDED, ICMPV6_PKT_TOOBIG = 3, 4, 2
#: Bytes that are read of a message.
ROOM = 2048


def too_big(message: bytes, family: int) -> tuple[Address, int] | None:
    """Where a packet of IP in IP went that an ICMP error calls too big, and the bytes that do fit.

    ``message``: as a raw socket of the family gets it, which for IPv4 is with the IP header.  None if it is something
    else.
    """
    if family == socket.AF_INET:
        size, icmp = 4, message[(message[0] & 15) * 4 :] if message else b""
        kind, room, protocol, to = bytes([ICMP_DEST_UNREACH, ICMP_FRAG_NEEDED]), icmp[6:8], icmp[17:18], icmp[24:28]
    else:
        size, icmp = 16, message
        kind, room, protocol, to = bytes([ICMPV6_PKT_TOOBIG, 0]), icmp[4:8], icmp[14:15], icmp[32:48]
    if icmp[:2] != kind or protocol not in (bytes([IPPROTO_IPIP]), bytes([IPPROTO_IPV6])) or len(to) != size:
        return None
    return ipaddress.ip_address(to), int.from_bytes(room, "big")


class PathMtu:
    """Until :meth:`close` the kernel learns from these errors, in the network namespace of the thread that makes it.

    Raises OSError.
    """

    def __init__(self) -> None:
        self._learning: list[socket.socket] = []
        #: Those that get the errors, for :func:`too_big`.
        self.sockets: list[socket.socket] = []
        try:
            for family in (socket.AF_INET, socket.AF_INET6):
                for protocol in (IPPROTO_IPIP, IPPROTO_IPV6):
                    self._learn(family, protocol)
            self._listen(socket.AF_INET, socket.IPPROTO_ICMP, (SOL_RAW, ICMP_FILTER), ICMP_DEST_UNREACH, 1)
            self._listen(
                socket.AF_INET6, socket.IPPROTO_ICMPV6, (socket.IPPROTO_ICMPV6, ICMP6_FILTER), ICMPV6_PKT_TOOBIG, 8
            )
        except BaseException:
            self.close()
            raise

    def _learn(self, family: int, protocol: int) -> None:
        sock = socket.socket(family, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        self._learning.append(sock)
        sockfilter.attach(sock, [sockfilter.LEAVE])
        if family == socket.AF_INET6:
            # Without, errors are let be (rawv6_err).  They stay in its queue, which holds next to none.
            sock.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVERR, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 0)

    def _listen(self, family: int, protocol: int, option: tuple[int, int], kind: int, words: int) -> None:
        """``words``: of the mask of messages that do not come, 32 bits each."""
        sock = socket.socket(family, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, protocol)
        self.sockets.append(sock)
        sock.setsockopt(*option, struct.pack(f"={words}I", ~(1 << kind) & 0xFFFFFFFF, *[0xFFFFFFFF] * (words - 1)))

    def close(self) -> None:
        for sock in (*self._learning, *self.sockets):
            sock.close()
