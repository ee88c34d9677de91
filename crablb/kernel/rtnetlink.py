"""Netlink, as much of it as a load balancer needs: ask, dump, and take messages apart.

Synchronous and small.  Sources: rtnetlink(7), sock_diag(7); include/uapi/linux/netlink.h, rtnetlink.h, neighbour.h,
genetlink.h;
https://docs.kernel.org/userspace-api/netlink/intro.html.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Self

from crablb.errors import KernelError

__all__ = ["Message", "Netlink", "attributes", "parse"]

NETLINK_SOCK_DIAG, NETLINK_GENERIC = 4, 16
NLM_F_REQUEST, NLM_F_ACK, NLM_F_DUMP_INTR = 0x1, 0x4, 0x10
NLM_F_REPLACE, NLM_F_CREATE, NLM_F_DUMP = 0x100, 0x400, 0x300
NLM_F_CAPPED, NLM_F_ACK_TLVS = 0x100, 0x200
NLA_F_NESTED = 0x8000
NLMSG_ERROR, NLMSG_DONE, NLMSG_OVERRUN = 2, 3, 4
SOL_NETLINK, NETLINK_CAP_ACK, NETLINK_EXT_ACK, NLMSGERR_ATTR_MSG = 270, 10, 11, 1
RTM_GETLINK, RTM_GETROUTE, RTM_NEWNEIGH, RTM_DELNEIGH, RTM_GETNEIGH = 18, 26, 28, 29, 30
IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_LINK, IFLA_MASTER = 1, 3, 4, 5, 10
IFLA_LINKINFO, IFLA_NUM_RX_QUEUES, IFLA_LINK_NETNSID = 18, 32, 37
IFLA_CARRIER_UP_COUNT = 47
IFLA_INFO_KIND = 1
RTA_DST, RTA_OIF, RTA_GATEWAY, RTA_PREFSRC, RTA_METRICS = 1, 4, 5, 7, 8
RTAX_MTU = 2
RTM_GETADDR, IFA_ADDRESS, IFA_LOCAL, IFA_FLAGS = 22, 1, 2, 8
IFA_F_SECONDARY, IFA_F_DEPRECATED = 0x01, 0x20
IFF_LOOPBACK = 0x8
#: Addresses that only a default route leads to (RFC 5737, RFC 3849).
FAR = (ipaddress.IPv4Address("192.0.2.1"), ipaddress.IPv6Address("2001:db8::1"))
NDA_DST, NDA_LLADDR, NDA_FLAGS_EXT = 1, 2, 15
RTM_GETTFILTER, TCA_KIND, TC_INGRESS = 46, 1, 0xFFFFFFF2
NUD_PROBE = 0x10
GENL_ID_CTRL, CTRL_CMD_GETFAMILY, CTRL_ATTR_FAMILY_ID, CTRL_ATTR_FAMILY_NAME = 16, 3, 1, 2
CTRL_ATTR_MCAST_GROUPS, CTRL_ATTR_MCAST_GRP_NAME, CTRL_ATTR_MCAST_GRP_ID = 7, 1, 2
NETLINK_ADD_MEMBERSHIP, NETLINK_NO_ENOBUFS = 1, 5
SOCK_DIAG_BY_FAMILY, SOCK_DESTROY, IPPROTO_TCP, INET_DIAG_SKV6ONLY = 20, 21, 6, 11
INET_DIAG_INFO, INET_DIAG_ULP_INFO, INET_ULP_INFO_NAME = 2, 19, 1
#: What a protocol is named by that does not fit into a request's byte (inet_diag.h, in.h).
INET_DIAG_REQ_PROTOCOL, IPPROTO_MPTCP = 3, 262
#: A socket tells of its upper layer only who asks for its INET_DIAG_INFO (inet_sk_diag_fill).
INET_DIAG_UPPER = 1 << (INET_DIAG_INFO - 1)
NETDEV_CMD_DEV_GET, NETDEV_A_DEV_IFINDEX, NETDEV_A_DEV_XDP_FEATURES = 1, 1, 3
ETHTOOL_MSG_CHANNELS_GET, ETHTOOL_A_CHANNELS_HEADER, ETHTOOL_A_HEADER_DEV_INDEX = 17, 1, 1
ETHTOOL_A_CHANNELS_RX_COUNT, ETHTOOL_A_CHANNELS_COMBINED_COUNT = 6, 9
#: Who tells, in generic netlink, of what rtnetlink does not: queues and offloads, and what XDP programs can do.
DEVICE_EVENTS = (("ethtool", "monitor"), ("netdev", "mgmt"))

HEADER = struct.Struct("=IHHII")  # struct nlmsghdr: length, type, flags, sequence number, port id
LINK = struct.Struct("=BxHiII")  # struct ifinfomsg: family, type, index, flags, change
ROUTE = struct.Struct("=8BI")  # struct rtmsg: family, destination's length, ..., flags
ADDRESS = struct.Struct("=4BI")  # struct ifaddrmsg: family, prefix length, flags, scope, ifindex
NEIGHBOUR = struct.Struct("=B3xiHBB")  # struct ndmsg: family, ifindex, state, flags, type
TC = struct.Struct("=B3xi3I")  # struct tcmsg: family, ifindex, handle, parent, info
GENERIC = struct.Struct("=BBxx")  # struct genlmsghdr: command, version
#: struct inet_diag_req_v2: family, protocol, extensions (a bit for each), states; no particular socket.
DIAG_REQUEST = struct.Struct("=BBBxI48x")
#: The same that names one: ports and addresses, an interface, a cookie.
DIAG_ONE = struct.Struct("=BBxxI2s2s16s16sIQ")
NO_COOKIE = (1 << 64) - 1
#: struct inet_diag_msg: family, state, source port (network order), receive queue.
DIAG = struct.Struct("=BBxx2s46x4xI12x")
#: The same with the whole struct inet_diag_sockid, and the socket's inode number.
DIAG_WHOLE = struct.Struct("=BBxx2s2s16s16s28xI")
TCP_SYN_SENT, TCP_FIN_WAIT2, TCP_LISTEN = 2, 5, 10
TCP_ALL = 0xFFF << 1
#: All but closed, listening, and those of which only the last segments are waited for.
TCP_OPEN = sum(1 << state for state in (1, 2, 4, 5, 8, 9, 11))
#: Times that a table which changes is asked for.
DUMPS = 10
#: Bytes that a datagram of answers may have.
ROOM = 1 << 18


@dataclass(frozen=True, slots=True)
class Message:
    """One message without its header."""

    kind: int
    flags: int
    body: bytes
    sequence: int = 0  # of the request that it answers

    def fields(self, header: struct.Struct) -> tuple[int, ...]:
        """What the family's fixed header holds."""
        return header.unpack_from(self.body)

    def attributes(self, header: struct.Struct) -> dict[int, bytes]:
        """What comes after it."""
        return attributes(self.body[header.size :])


def attributes(data: bytes) -> dict[int, bytes]:
    """Attributes by type; nested ones as bytes, to be taken apart in turn."""
    found, at = {}, 0
    while at + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, at)
        if length < 4:
            break
        found[kind & 0x3FFF] = data[at + 4 : at + length]
        at += (length + 3) & ~3
    return found


def number(data: bytes | None) -> int:
    """An attribute that is an unsigned number; 0 if it is not there."""
    return int.from_bytes(data or b"", "little")


def text(data: bytes | None) -> str:
    """An attribute that is a string; empty if it is not there."""
    return (data or b"").rstrip(b"\0").decode(errors="replace")


def address(data: bytes | None) -> str:
    """An attribute that is an IP address, as it is written; empty if it is not there."""
    return str(ipaddress.ip_address(data)) if data else ""


def parse(data: bytes) -> Iterator[Message]:
    """The messages of a datagram."""
    at = 0
    while at + HEADER.size <= len(data):
        length, kind, flags, sequence, _ = HEADER.unpack_from(data, at)
        if length < HEADER.size:
            return
        yield Message(kind, flags, data[at + HEADER.size : at + length], sequence)
        at += (length + 3) & ~3


def _reason(refusal: Message) -> str:
    """What the kernel says about a request that it refused; empty if it says nothing."""
    if not refusal.flags & NLM_F_ACK_TLVS or not refusal.flags & NLM_F_CAPPED:
        return ""
    return text(attributes(refusal.body[4 + HEADER.size :]).get(NLMSGERR_ATTR_MSG))


def encode(more: Mapping[int, bytes]) -> bytes:
    """Attributes, as :func:`attributes` takes them apart."""
    return b"".join(
        struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4) for kind, value in more.items()
    )


class Netlink:
    """A socket to ask by, in the network namespace of the thread that makes it.  Raises OSError for what is refused."""

    def __init__(self, protocol: int = 0) -> None:
        self._sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
        # The kernel's own words about what it refuses, behind the request's header alone.
        self._sock.setsockopt(SOL_NETLINK, NETLINK_CAP_ACK, 1)
        self._sock.setsockopt(SOL_NETLINK, NETLINK_EXT_ACK, 1)
        self._sock.bind((0, 0))
        self._sequence = 0
        self._room = bytearray(ROOM)  # of 10,000 answers each would have one, from the system and back

    def ask(self, kind: int, body: bytes, more: Mapping[int, bytes] | None = None, flags: int = 0) -> list[Message]:
        """Send a request; what is answered."""
        return self._exchange(kind, NLM_F_REQUEST | NLM_F_ACK | flags, body + encode(more or {}))

    def get(self, kind: int, body: bytes, more: Mapping[int, bytes] | None = None) -> Message:
        """Send a request whose answer is one message: without NLM_F_ACK nothing comes behind it."""
        return self._exchange(kind, NLM_F_REQUEST, body + encode(more or {}), single=True)[0]

    def dump(self, kind: int, body: bytes) -> list[Message]:
        """All there are; asked for again if they changed meanwhile, but not for ever: what changes tells so itself."""
        for _ in range(DUMPS):
            found = self._exchange(kind, NLM_F_REQUEST | NLM_F_DUMP, body)
            if not any(message.flags & NLM_F_DUMP_INTR for message in found):
                break
        return found

    def _exchange(self, kind: int, flags: int, payload: bytes, *, single: bool = False) -> list[Message]:
        self._sequence += 1
        self._sock.send(HEADER.pack(HEADER.size + len(payload), kind, flags, self._sequence, 0) + payload)
        found: list[Message] = []
        while True:
            length = self._sock.recv_into(self._room)
            for message in parse(bytes(memoryview(self._room)[:length])):
                if message.sequence != self._sequence:
                    continue  # of a request before, whose answer could not be read
                if message.kind not in (NLMSG_ERROR, NLMSG_DONE):
                    found.append(message)
                    if single:
                        return found
                    continue
                (error,) = struct.unpack_from("=i", message.body) if len(message.body) >= 4 else (0,)
                if error:
                    raise OSError(-error, _reason(message) or os.strerror(-error))
                return found

    def family(self, name: str) -> int:
        """The number of a generic netlink family (of a NETLINK_GENERIC socket)."""
        return number(self._family(name)[CTRL_ATTR_FAMILY_ID])

    def group(self, family: str, name: str) -> int:
        """The number of a generic netlink family's multicast group; 0 if it has no such group."""
        for entry in attributes(self._family(family).get(CTRL_ATTR_MCAST_GROUPS, b"")).values():
            found = attributes(entry)
            if text(found.get(CTRL_ATTR_MCAST_GRP_NAME)) == name:
                return number(found.get(CTRL_ATTR_MCAST_GRP_ID))
        return 0

    def _family(self, name: str) -> dict[int, bytes]:
        more = {CTRL_ATTR_FAMILY_NAME: name.encode() + b"\0"}
        (answer,) = self.ask(GENL_ID_CTRL, GENERIC.pack(CTRL_CMD_GETFAMILY, 1), more)
        return answer.attributes(GENERIC)

    def close(self) -> None:
        self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# ---- requests ----


def links(netlink: Netlink) -> Iterable[Message]:
    """Every link, with :data:`LINK` and IFLA_* attributes."""
    return netlink.dump(RTM_GETLINK, LINK.pack(0, 0, 0, 0, 0))


def link(netlink: Netlink, index: int) -> Message:
    return netlink.ask(RTM_GETLINK, LINK.pack(0, 0, index, 0, 0))[0]


def route(netlink: Netlink, to: ipaddress.IPv4Address | ipaddress.IPv6Address, out: int = 0, flags: int = 0) -> Message:
    """The route to an address, with :data:`ROUTE` and RTA_* attributes.

    ``out``: index of the interface to leave by; ``flags``: RTM_F_*.
    """
    family = socket.AF_INET if to.version == 4 else socket.AF_INET6
    body = ROUTE.pack(family, to.max_prefixlen, 0, 0, 0, 0, 0, 0, flags)
    more = {RTA_DST: to.packed, **({RTA_OIF: struct.pack("=I", out)} if out else {})}
    return netlink.get(RTM_GETROUTE, body, more)


def addresses(netlink: Netlink) -> dict[str, int]:
    """This network namespace's own addresses, and the index of the interface that each is on."""
    found = {}
    for message in netlink.dump(RTM_GETADDR, ADDRESS.pack(0, 0, 0, 0, 0)):
        more = message.attributes(ADDRESS)
        found[address(more.get(IFA_LOCAL) or more.get(IFA_ADDRESS))] = message.fields(ADDRESS)[4]
    return found


def own(netlink: Netlink, index: int) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """The addresses that an interface has, in the kernel's order."""
    found = []
    for message in netlink.dump(RTM_GETADDR, ADDRESS.pack(0, 0, 0, 0, 0)):
        more = message.attributes(ADDRESS)
        packed = more.get(IFA_LOCAL) or more.get(IFA_ADDRESS)
        if message.fields(ADDRESS)[4] == index and packed:
            found.append(ipaddress.ip_address(packed))
    return found


def reached_by(netlink: Netlink) -> set[str]:
    """Of this network namespace's own addresses those that it is reached by.

    Not those that were added beside: on the loopback, secondary (IPv4), deprecated (IPv6), or for one host (/32, /128)
    unless the kernel sends from it by default.
    """
    loopbacks = {one.fields(LINK)[2] for one in links(netlink) if one.fields(LINK)[3] & IFF_LOOPBACK}
    senders = set()
    for far in FAR:
        with suppress(OSError):  # no default route
            senders.add(address(route(netlink, far).attributes(ROUTE).get(RTA_PREFSRC)))
    found = set()
    for message in netlink.dump(RTM_GETADDR, ADDRESS.pack(0, 0, 0, 0, 0)):
        family, bits, flags, _, index = message.fields(ADDRESS)
        more = message.attributes(ADDRESS)
        own = address(more.get(IFA_LOCAL) or more.get(IFA_ADDRESS))
        beside = (number(more.get(IFA_FLAGS)) or flags) & (IFA_F_SECONDARY | IFA_F_DEPRECATED)
        alone = bits == (32 if family == socket.AF_INET else 128) and own not in senders
        if index not in loopbacks and not beside and not alone:
            found.add(own)
    return found


def neighbours(netlink: Netlink, family: int) -> Iterable[Message]:
    """Every neighbour of a family, with :data:`NEIGHBOUR` and NDA_* attributes."""
    return netlink.dump(RTM_GETNEIGH, NEIGHBOUR.pack(family, 0, 0, 0, 0))


def filters(netlink: Netlink, index: int) -> list[str]:
    """The kinds ("bpf", "flower", ...) of the tc filters on what comes in by an interface (clsact, ingress), each
    once."""
    found = netlink.dump(RTM_GETTFILTER, TC.pack(0, index, 0, TC_INGRESS, 0))
    return sorted({text(message.attributes(TC).get(TCA_KIND)) for message in found})


def set_neighbour(netlink: Netlink, index: int, at: str, state: int, flags_ext: int) -> None:
    """Make a neighbour entry, or replace it."""
    to = ipaddress.ip_address(at)
    family = socket.AF_INET if to.version == 4 else socket.AF_INET6
    more = {NDA_DST: to.packed, NDA_FLAGS_EXT: struct.pack("=I", flags_ext)}
    netlink.ask(RTM_NEWNEIGH, NEIGHBOUR.pack(family, index, state, 0, 0), more, NLM_F_CREATE | NLM_F_REPLACE)


def probe_neighbour(netlink: Netlink, index: int, at: str) -> None:
    """Have the kernel ask a neighbour whose link-layer address it knows whether it is still there.

    It asks that address (RFC 1122, 2.3.2.1; RFC 4861, 7.3.3), by default three times, a second apart.  The entry's
    other flags are lost; it keeps the state that it is told only without NTF_EXT_MANAGED (__neigh_update).
    """
    to = ipaddress.ip_address(at)
    family = socket.AF_INET if to.version == 4 else socket.AF_INET6
    netlink.ask(RTM_NEWNEIGH, NEIGHBOUR.pack(family, index, NUD_PROBE, 0, 0), {NDA_DST: to.packed}, NLM_F_REPLACE)


def delete_neighbour(netlink: Netlink, index: int, at: str) -> None:
    to = ipaddress.ip_address(at)
    family = socket.AF_INET if to.version == 4 else socket.AF_INET6
    netlink.ask(RTM_DELNEIGH, NEIGHBOUR.pack(family, index, 0, 0, 0), {NDA_DST: to.packed})


def tcp(family: int, states: int, extensions: int = 0) -> list[Message]:
    """The TCP sockets of this network namespace that are in some states, with :data:`DIAG_WHOLE` and INET_DIAG_*
    attributes.

    Raises :class:`KernelError` where the kernel's module for it is not there, or may not be loaded (ENOENT).  Source:
    sock_diag(7).
    """
    return _diag(DIAG_REQUEST.pack(family, IPPROTO_TCP, extensions, states), "TCP", "tcp_diag")


def mptcp(family: int, states: int) -> list[Message]:
    """The MPTCP sockets of this network namespace, as :func:`tcp` gives TCP ones; with INET_DIAG_INFO (struct
    mptcp_info)."""
    more = encode({INET_DIAG_REQ_PROTOCOL: struct.pack("=I", IPPROTO_MPTCP)})
    request = DIAG_REQUEST.pack(family, socket.IPPROTO_RAW, 1 << (INET_DIAG_INFO - 1), states) + more
    return _diag(request, "MPTCP", "mptcp_diag")


def _diag(request: bytes, of: str, module: str) -> list[Message]:
    try:
        with Netlink(NETLINK_SOCK_DIAG) as netlink:
            return netlink.dump(SOCK_DIAG_BY_FAMILY, request)
    except FileNotFoundError:
        raise KernelError(f"the kernel lists no {of} sockets (sock_diag); load its module: modprobe {module}") from None


def tcp_sockets(family: int, states: int) -> list[tuple[int, int, int]]:
    """TCP sockets in some states (a bit for each): state, local port, bytes (a listener's: connections) in the queue.

    Source: sock_diag(7).
    """
    messages = (DIAG.unpack_from(message.body) for message in tcp(family, states))
    return [(state, int.from_bytes(port, "big"), queue) for _, state, port, queue in messages]


def tcp_addresses(family: int, states: int) -> list[bytes]:
    """The local addresses of TCP sockets in some states, one a socket."""
    size = 4 if family == socket.AF_INET else 16
    return [message.body[8 : 8 + size] for message in tcp(family, states)]


def destroy_tcp(
    local: ipaddress.IPv4Address | ipaddress.IPv6Address,
    local_port: int,
    remote: ipaddress.IPv4Address | ipaddress.IPv6Address,
    remote_port: int,
) -> bool:
    """End a TCP connection of this network namespace, by RST to its peer; whether there was one.

    Raises :class:`KernelError` where the kernel cannot (CONFIG_INET_DIAG_DESTROY).  Source: sock_diag(7).
    """
    family = socket.AF_INET if local.version == 4 else socket.AF_INET6
    ends = [end.packed.ljust(16, b"\0") for end in (local, remote)]
    ports = [port.to_bytes(2, "big") for port in (local_port, remote_port)]
    try:
        with Netlink(NETLINK_SOCK_DIAG) as netlink:
            netlink.ask(SOCK_DESTROY, DIAG_ONE.pack(family, IPPROTO_TCP, 0, *ports, *ends, 0, NO_COOKIE))
    except FileNotFoundError:
        return False
    except OSError as error:
        raise KernelError(f"the kernel cannot end a TCP connection (SOCK_DESTROY): {error.strerror}") from None
    return True


@dataclass(frozen=True, slots=True)
class Listener:
    """``address``: unspecified for all of its family; ``both``: for all of IPv4 as well; ``upper``: the protocol above
    TCP ("mptcp"), told to those who have CAP_NET_ADMIN."""

    address: ipaddress.IPv4Address | ipaddress.IPv6Address
    port: int
    both: bool = False
    upper: str = ""


def tcp_listeners() -> Iterator[Listener]:
    """Who listens in this network namespace."""
    for family in (socket.AF_INET, socket.AF_INET6):
        for message in tcp(family, 1 << TCP_LISTEN, INET_DIAG_UPPER):
            _, _, port, _, local, *_ = DIAG_WHOLE.unpack_from(message.body)
            number = int.from_bytes(port, "big")
            more = message.attributes(DIAG_WHOLE)
            upper = text(attributes(more.get(INET_DIAG_ULP_INFO, b"")).get(INET_ULP_INFO_NAME))
            if family == socket.AF_INET:
                yield Listener(ipaddress.IPv4Address(local[:4]), number, upper=upper)
                continue
            address = ipaddress.IPv6Address(local)
            only = any(more.get(INET_DIAG_SKV6ONLY, b""))
            yield Listener(address.ipv4_mapped or address, number, address.is_unspecified and not only, upper)


@dataclass(frozen=True, slots=True)
class Connection:
    """Addresses as 16 bytes, IPv4 ones mapped; ports in network order."""

    local: bytes
    remote: bytes
    local_port: bytes
    remote_port: bytes
    connecting: bool


def tcp_connections() -> Iterator[Connection]:
    """The TCP connections of this network namespace that are not over."""
    for family in (socket.AF_INET, socket.AF_INET6):
        for message in tcp(family, TCP_OPEN):
            of, state, local_port, remote_port, local, remote, inode = DIAG_WHOLE.unpack_from(message.body)
            if state == TCP_FIN_WAIT2 and not inode:
                continue  # nobody has it, and all that it sent has arrived
            if of == socket.AF_INET:
                local, remote = (bytes(10) + b"\xff\xff" + address[:4] for address in (local, remote))
            yield Connection(local, remote, local_port, remote_port, state == TCP_SYN_SENT)


def tcp_ports() -> set[bytes]:
    """Local address (16 bytes, IPv4 ones mapped), local and remote port of each TCP connection of this network
    namespace, of those that are over as well, as long as there is a socket."""
    found = set()
    for family in (socket.AF_INET, socket.AF_INET6):
        for message in tcp(family, TCP_ALL & ~(1 << TCP_LISTEN)):
            _, _, local_port, remote_port, local, *_ = DIAG_WHOLE.unpack_from(message.body)
            whole = local if family == socket.AF_INET6 else bytes(10) + b"\xff\xff" + local[:4]
            found.add(whole + local_port + remote_port)
    return found


def xdp_features() -> dict[int, int]:
    """What XDP programs can do with each interface, NETDEV_XDP_ACT_* by ifindex; empty before Linux 6.3.

    Source: Documentation/netlink/specs/netdev.yaml.
    """
    try:
        with Netlink(NETLINK_GENERIC) as netlink:
            devices = netlink.dump(netlink.family("netdev"), GENERIC.pack(NETDEV_CMD_DEV_GET, 1))
    except OSError:
        return {}
    found = [device.attributes(GENERIC) for device in devices]
    return {number(a.get(NETDEV_A_DEV_IFINDEX)): number(a.get(NETDEV_A_DEV_XDP_FEATURES)) for a in found}


def rx_queues(index: int) -> int | None:
    """How many RX queues an interface has in use; None if its driver does not say: then it always has all it has.

    Source: Documentation/networking/ethtool-netlink.rst, CHANNELS_GET.
    """
    try:
        with Netlink(NETLINK_GENERIC) as netlink:
            which = encode({ETHTOOL_A_HEADER_DEV_INDEX: struct.pack("=I", index)})
            more = {ETHTOOL_A_CHANNELS_HEADER | NLA_F_NESTED: which}
            answer, *_ = netlink.ask(netlink.family("ethtool"), GENERIC.pack(ETHTOOL_MSG_CHANNELS_GET, 1), more)
    except OSError:
        return None
    found = answer.attributes(GENERIC)
    counts = (ETHTOOL_A_CHANNELS_RX_COUNT, ETHTOOL_A_CHANNELS_COMBINED_COUNT)
    return sum(number(found.get(kind)) for kind in counts) or None


def device_events() -> socket.socket:
    """A socket that becomes readable when something of :data:`DEVICE_EVENTS` happens in this network namespace.

    What it says is of no matter, nor whether all of it arrived: who reads asks anew.
    """
    sock = socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, NETLINK_GENERIC
    )
    sock.setsockopt(SOL_NETLINK, NETLINK_NO_ENOBUFS, 1)
    sock.bind((0, 0))
    with Netlink(NETLINK_GENERIC) as netlink:
        for family, name in DEVICE_EVENTS:
            try:
                group = netlink.group(family, name)
            except OSError:  # a kernel without it
                continue
            if group:
                sock.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)
    return sock
