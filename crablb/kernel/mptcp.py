"""Multipath TCP: endpoints, limits, events and commands of a network namespace's path manager, by generic netlink.

Sources: Documentation/netlink/specs/mptcp_pm.yaml, include/uapi/linux/mptcp_pm.h and mptcp.h,
Documentation/networking/mptcp-sysctl.rst; RFC 8684.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import IntEnum, IntFlag
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Self

from crablb.errors import KernelError
from crablb.kernel import rtnetlink
from crablb.kernel.checksum import checksum
from crablb.kernel.rtnetlink import (
    GENERIC,
    INET_DIAG_ULP_INFO,
    NETLINK_ADD_MEMBERSHIP,
    NETLINK_GENERIC,
    NLA_F_NESTED,
    SOL_NETLINK,
    Message,
    Netlink,
    attributes,
    encode,
    number,
)
from crablb.model import Address, mapped, unmapped

__all__ = [
    "Endpoint",
    "Event",
    "Events",
    "Flag",
    "Happened",
    "Limits",
    "PathManager",
    "Subflow",
    "Unsupported",
    "answering",
    "manager_sysctl",
    "require",
    "sockets",
    "subflows",
    "sysctl",
]

FAMILY, VERSION, EVENTS = "mptcp_pm", 1, "mptcp_pm_events"
SYSCTLS = Path("/proc/sys/net/mptcp")

# Commands (MPTCP_PM_CMD_*).
ADD_ADDR, DEL_ADDR, GET_ADDR, FLUSH_ADDRS, SET_LIMITS, GET_LIMITS, SET_FLAGS = range(1, 8)
ANNOUNCE, REMOVE, SUBFLOW_CREATE, SUBFLOW_DESTROY = range(8, 12)
# Their attributes (MPTCP_PM_ATTR_*), and an address' (MPTCP_PM_ADDR_ATTR_*).
ADDR, RCV_ADD_ADDRS, SUBFLOWS, TOKEN, LOC_ID, ADDR_REMOTE = range(1, 7)
ADDR_FAMILY, ADDR_ID, ADDR_4, ADDR_6, ADDR_PORT, ADDR_FLAGS, ADDR_IF = range(1, 8)
# Of events (MPTCP_ATTR_*); ports and addresses in network order there.
AT_TOKEN, AT_FAMILY, AT_LOC_ID, AT_REM_ID, AT_SADDR4, AT_SADDR6, AT_DADDR4, AT_DADDR6, AT_SPORT, AT_DPORT = range(1, 11)
# Of a TCP socket that is a subflow (inet_diag.h, mptcp.h).
INET_ULP_INFO_MPTCP = 3
SUBFLOW_TOKEN_LOC, SUBFLOW_FLAGS, SUBFLOW_ID_LOC = 2, 8, 10
SUBFLOW_FULLY_ESTABLISHED = 1 << 6
INFO_TOKEN = 12  # where struct mptcp_info has it
SO_RCVBUFFORCE = 33  # asm-generic/socket.h
#: Bytes of events, about a kibibyte each in the kernel's own count, that wait to be read.
BUFFER = 4 << 20
#: Where a socket can still send (include/net/tcp_states.h): ESTABLISHED and CLOSE_WAIT.
SUBFLOW_STATES = 1 << 1 | 1 << 8
#: Where tcpi_last_data_recv and tcpi_last_ack_recv are in struct tcp_info (linux/tcp.h): milliseconds since.
HEARD = struct.Struct("=52xII")
#: Seconds that an answer may take; between looks for it; and how exact the kernel's milliseconds are (HZ of 100).
ANSWER, PAUSE, TICK = 0.5, 0.02, 0.01
SYN_ACK = 0x12


class Unsupported(KernelError):
    """The kernel has no MPTCP, it is switched off, or it lacks a command."""


class Flag(IntFlag):
    """Of an endpoint (MPTCP_PM_ADDR_FLAG_*)."""

    NONE = 0
    SIGNAL = 1
    SUBFLOW = 2
    BACKUP = 4
    FULLMESH = 8
    IMPLICIT = 16
    LAMINAR = 32

    def words(self) -> str:
        return " ".join(str(flag.name).lower() for flag in Flag if flag in self) or "no flags"


class Happened(IntEnum):
    """What an event is of (MPTCP_EVENT_*)."""

    CREATED = 1
    ESTABLISHED = 2
    CLOSED = 3
    ANNOUNCED = 6
    REMOVED = 7
    SUB_ESTABLISHED = 10
    SUB_CLOSED = 11
    SUB_PRIORITY = 13


@dataclass(frozen=True, slots=True)
class Endpoint:
    """``id``: 1 to 255, 0 to let the kernel choose; ``port``: 0 for the connection's own."""

    address: Address
    id: int = 0
    flags: Flag = Flag.NONE
    ifindex: int = 0
    port: int = 0

    def __str__(self) -> str:
        port = f" port {self.port}" if self.port else ""
        return f"{self.address}{port} (id {self.id}, {self.flags.words()})"


@dataclass(frozen=True, slots=True)
class Limits:
    """Per connection: addresses told by a peer that are taken up, and further subflows."""

    add_addr_accepted: int
    subflows: int


@dataclass(frozen=True, slots=True)
class Subflow:
    """A TCP connection that is part of a MPTCP one; ``id``: the local address', 0 for that of the first subflow.

    ``token``: names the connection (RFC 8684, 3.2: of its own side's key); ``established``: MPTCP data may go by it
    (not if it fell back to TCP), and none waits to be sent again; ``mapped``: the kernel names its IPv4 addresses as an
    IPv6 socket has them; ``heard``: seconds since something came by it.
    """

    token: int
    local: Address
    local_port: int
    remote: Address
    remote_port: int
    id: int = 0
    established: bool = True
    mapped: bool = False
    heard: float = 0.0

    @property
    def ends(self) -> tuple[Address, int, Address, int]:
        return self.local, self.local_port, self.remote, self.remote_port


@dataclass(frozen=True, slots=True)
class Event:
    """``subflow``: of what it tells, None where it is only of the connection."""

    what: Happened
    token: int
    subflow: Subflow | None = None


# ---- sysctls ----


def sysctl(name: str) -> Path:
    """The file of net.mptcp.<name>, in this thread's network namespace."""
    return SYSCTLS / name


def require() -> None:
    """Raises :class:`Unsupported` if this kernel, here, makes no MPTCP connections."""
    if not SYSCTLS.is_dir():
        raise Unsupported("the kernel has no MPTCP (CONFIG_MPTCP, Linux 5.6)")
    if not int(sysctl("enabled").read_text()):
        raise Unsupported("MPTCP is switched off (net.mptcp.enabled is 0); switch it on: sysctl -w net.mptcp.enabled=1")


def manager_sysctl() -> tuple[str, str, str]:
    """The sysctl that says who leads new connections, and what it says for the kernel and for a program.

    Raises :class:`Unsupported` before Linux 5.19, where it is always the kernel.
    """
    for name, kernel, program in (("path_manager", "kernel", "userspace"), ("pm_type", "0", "1")):
        if sysctl(name).exists():
            return name, kernel, program
    raise Unsupported("the kernel lets no program lead MPTCP connections (net.mptcp.pm_type, Linux 5.19)")


# ---- what there is ----


class PathManager:
    """This network namespace's, as long as it is open.

    Methods raise :class:`KernelError` for what the kernel refuses, :class:`Unsupported` where it has no such thing.
    """

    def __init__(self) -> None:
        self._netlink = Netlink(NETLINK_GENERIC)
        try:
            self._family = self._netlink.family(FAMILY)
        except FileNotFoundError:
            self._netlink.close()
            raise Unsupported("the kernel has no MPTCP (CONFIG_MPTCP, Linux 5.6)") from None

    def close(self) -> None:
        self._netlink.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, what: str, command: int, more: Mapping[int, bytes] | None = None) -> list[Message]:
        try:
            return self._netlink.ask(self._family, GENERIC.pack(command, VERSION), more)
        except OSError as error:
            kind = Unsupported if error.errno in (errno.EOPNOTSUPP, errno.ENOSYS) else KernelError
            raise kind(f"MPTCP: {what}: {error.strerror}") from None

    # ---- endpoints and limits, of connections that the kernel leads ----

    def endpoints(self) -> list[Endpoint]:
        answers = self._netlink.dump(self._family, GENERIC.pack(GET_ADDR, VERSION))
        return [_endpoint(attributes(answer.attributes(GENERIC)[ADDR])) for answer in answers]

    def add(self, endpoint: Endpoint) -> None:
        """With a port the kernel makes a listener, which takes nothing but further subflows."""
        self._ask(f"endpoint {endpoint} cannot be", ADD_ADDR, {ADDR | NLA_F_NESTED: _encoded(endpoint)})

    def remove(self, endpoint: Endpoint) -> None:
        """By its id.  Subflows of its address end; connections that have no other lose what they live by."""
        self._ask(f"endpoint {endpoint} stays", DEL_ADDR, {ADDR | NLA_F_NESTED: _encoded(endpoint)})

    def flush_initial(self, address: Address) -> None:
        """End the first subflow of every connection that was made to this local address, and tell peers that the
        address is gone.  Connections that have no other subflow lose what they live by."""
        endpoint = Endpoint(address)
        self._ask(f"first subflows of {address} stay", DEL_ADDR, {ADDR | NLA_F_NESTED: _encoded(endpoint)})

    def set_flags(self, endpoint: Endpoint) -> None:
        """Of an endpoint that is there, by its id: whether it is for emergencies alone.  Peers are told."""
        self._ask(f"endpoint {endpoint}", SET_FLAGS, {ADDR | NLA_F_NESTED: _encoded(endpoint)})

    def limits(self) -> Limits:
        (answer,) = self._ask("limits", GET_LIMITS)
        found = answer.attributes(GENERIC)
        return Limits(number(found.get(RCV_ADD_ADDRS)), number(found.get(SUBFLOWS)))

    def set_limits(self, *, add_addr_accepted: int | None = None, subflows: int | None = None) -> None:
        """Each 0 to 8; None: as it is."""
        now = self.limits()
        accepted = now.add_addr_accepted if add_addr_accepted is None else add_addr_accepted
        more = {
            RCV_ADD_ADDRS: struct.pack("=I", accepted),
            SUBFLOWS: struct.pack("=I", now.subflows if subflows is None else subflows),
        }
        self._ask("limits", SET_LIMITS, more)

    # ---- commands for connections that a program leads ----

    def announce(self, token: int, endpoint: Endpoint) -> None:
        """Tell the peer of an address (ADD_ADDR; RFC 8684, 3.4.1)."""
        local = _encoded(replace(endpoint, flags=Flag.SIGNAL))
        self._ask(f"{endpoint.address} cannot be announced", ANNOUNCE, {TOKEN: _u32(token), ADDR | NLA_F_NESTED: local})

    def remove_announced(self, token: int, id: int) -> None:
        """Take back what was told (REMOVE_ADDR; RFC 8684, 3.4.2)."""
        self._ask(f"id {id} cannot be taken back", REMOVE, {TOKEN: _u32(token), LOC_ID: struct.pack("=B", id)})

    def set_backup(self, subflow: Subflow, backup: bool = True) -> None:
        """Whether a subflow is for emergencies alone (MP_PRIO; RFC 8684, 3.3.8)."""
        more = _of(subflow, Flag.BACKUP if backup else Flag.NONE)
        self._ask("a subflow's priority cannot be set", SET_FLAGS, more)

    def destroy(self, subflow: Subflow) -> None:
        """End a subflow; what is on its way goes by the others."""
        self._ask("a subflow cannot be closed", SUBFLOW_DESTROY, _of(subflow))


def _u32(value: int) -> bytes:
    return struct.pack("=I", value)


def _encoded(endpoint: Endpoint) -> bytes:
    four = endpoint.address.version == 4
    more = {
        ADDR_FAMILY: struct.pack("=H", socket.AF_INET if four else socket.AF_INET6),
        ADDR_ID: struct.pack("=B", endpoint.id),
        ADDR_4 if four else ADDR_6: endpoint.address.packed,
        ADDR_FLAGS: _u32(endpoint.flags),
    }
    if endpoint.port:
        more[ADDR_PORT] = struct.pack("=H", endpoint.port)
    if endpoint.ifindex:
        more[ADDR_IF] = _u32(endpoint.ifindex)
    return encode(more)


def _endpoint(found: Mapping[int, bytes]) -> Endpoint:
    return Endpoint(
        ip_address(found.get(ADDR_4) or found[ADDR_6]),
        number(found.get(ADDR_ID)),
        Flag(number(found.get(ADDR_FLAGS))),
        number(found.get(ADDR_IF)),
        number(found.get(ADDR_PORT)),
    )


def _of(subflow: Subflow, flags: Flag = Flag.NONE) -> dict[int, bytes]:
    ends = [subflow.local, subflow.remote]
    if subflow.mapped:
        ends = [IPv6Address(mapped(end)) for end in ends]
    local = Endpoint(ends[0], subflow.id, flags, port=subflow.local_port)
    remote = Endpoint(ends[1], port=subflow.remote_port)
    return {
        TOKEN: _u32(subflow.token),
        ADDR | NLA_F_NESTED: _encoded(local),
        ADDR_REMOTE | NLA_F_NESTED: _encoded(remote),
    }


# ---- events ----


class Events:
    """What happens to this network namespace's MPTCP connections.  Needs CAP_NET_ADMIN.

    Whoever has one open is the path manager of connections that a program leads: without, they take no further
    subflows.
    """

    def __init__(self) -> None:
        self._sock = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK, NETLINK_GENERIC
        )
        self._sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
        self._sock.bind((0, 0))
        try:
            with Netlink(NETLINK_GENERIC) as netlink:
                group = netlink.group(FAMILY, EVENTS)
            self._sock.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)
        except OSError as error:
            self._sock.close()
            raise Unsupported(f"the kernel tells of no MPTCP events: {error.strerror}") from None

    def fileno(self) -> int:
        return self._sock.fileno()

    def read(self) -> list[Event]:
        """The next thing that has happened and that is known, if it is here already; empty if nothing.

        Raises :class:`OSError` with ENOBUFS if some were lost.  It says so once, and loses more until all that is here
        is read: ask :func:`subflows` then.
        """
        while True:
            try:
                said = self._sock.recv(rtnetlink.ROOM)
            except BlockingIOError:
                return []
            if found := [event for message in rtnetlink.parse(said) if (event := _event(message))]:
                return found

    def close(self) -> None:
        self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def sockets() -> Iterator[tuple[int, Address, int]]:
    """Token, local address and port of each MPTCP connection of this network namespace that can still send: as its
    application sees them, whatever its subflows'.

    Raises :class:`KernelError` where the kernel does not list them.  Source: sock_diag(7), net/mptcp/mptcp_diag.c.
    """
    for family in (socket.AF_INET, socket.AF_INET6):
        for message in rtnetlink.mptcp(family, SUBFLOW_STATES):
            info = attributes(message.body[rtnetlink.DIAG_WHOLE.size :]).get(rtnetlink.INET_DIAG_INFO, b"")
            of, _, port, _, local, _, _ = rtnetlink.DIAG_WHOLE.unpack_from(message.body)
            address = _address(local[:4] if of == socket.AF_INET else local)
            yield number(info[INFO_TOKEN : INFO_TOKEN + 4]), address, int.from_bytes(port, "big")


def _event(message: Message) -> Event | None:
    """An event that is known, None of another one."""
    if len(message.body) < GENERIC.size or message.body[0] not in Happened.__members__.values():
        return None
    found = message.attributes(GENERIC)
    token, subflow = number(found.get(AT_TOKEN)), None
    local, remote = (found.get(a) or found.get(b) for a, b in ((AT_SADDR4, AT_SADDR6), (AT_DADDR4, AT_DADDR6)))
    if local and remote:
        subflow = Subflow(
            token,
            _address(local),
            int.from_bytes(found.get(AT_SPORT, b""), "big"),
            _address(remote),
            int.from_bytes(found.get(AT_DPORT, b""), "big"),
            number(found.get(AT_LOC_ID)),
            mapped=_is_mapped(local),
        )
    return Event(Happened(message.body[0]), token, subflow)


def _address(packed: bytes) -> Address:
    return IPv4Address(packed) if len(packed) == 4 else unmapped(packed)


def _waits(more: Mapping[int, bytes]) -> bool:
    """Whether a TCP socket has sent again what nobody has answered (struct tcp_info, tcpi_retransmits)."""
    return more.get(rtnetlink.INET_DIAG_INFO, b"")[2:3] > b"\0"


def _heard(more: Mapping[int, bytes]) -> float:
    """Seconds since a TCP socket has heard of its peer."""
    info = more.get(rtnetlink.INET_DIAG_INFO, b"")
    return min(HEARD.unpack_from(info)) / 1000 if len(info) >= HEARD.size else 0.0


def _is_mapped(packed: bytes) -> bool:
    return len(packed) == 16 and unmapped(packed).version == 4


def subflows() -> Iterator[Subflow]:
    """Those of this network namespace that could carry data.  Needs CAP_NET_ADMIN.

    Source: sock_diag(7), net/mptcp/diag.c.
    """
    for family in (socket.AF_INET, socket.AF_INET6):
        for message in rtnetlink.tcp(family, SUBFLOW_STATES, rtnetlink.INET_DIAG_UPPER):
            more = attributes(message.body[rtnetlink.DIAG_WHOLE.size :])
            found = attributes(attributes(more.get(INET_DIAG_ULP_INFO, b"")).get(INET_ULP_INFO_MPTCP, b""))
            if not found:
                continue
            of, _, local_port, remote_port, local, remote, _ = rtnetlink.DIAG_WHOLE.unpack_from(message.body)
            if of == socket.AF_INET:
                local, remote = local[:4], remote[:4]
            yield Subflow(
                number(found.get(SUBFLOW_TOKEN_LOC)),
                _address(local),
                int.from_bytes(local_port, "big"),
                _address(remote),
                int.from_bytes(remote_port, "big"),
                number(found.get(SUBFLOW_ID_LOC)),
                bool(number(found.get(SUBFLOW_FLAGS)) & SUBFLOW_FULLY_ESTABLISHED) and not _waits(more),
                _is_mapped(local),
                _heard(more),
            )


def answering(wanted: Collection[Subflow]) -> set[tuple[Address, int, Address, int]]:
    """The ends of those whose peers answer now; it waits for :data:`ANSWER` seconds at most.  Needs CAP_NET_ADMIN, and
    CAP_NET_RAW: without, none answers but those that are heard of anyway.

    An idle way, or one that is received by only, looks the same whether it works or not.  So the peer gets a SYN-ACK of
    any sequence number, which it must answer by an ACK and nothing else (RFC 5961, 4.2), and which a NAT or a firewall
    that tracks the connection lets pass, as it does not other segments outside the window.
    """
    begun, open_ = time.monotonic(), {one.ends for one in wanted}
    proven = set[tuple[Address, int, Address, int]]()
    for one in wanted:
        _challenge(one)
    while open_:
        looked, silent = time.monotonic(), set[tuple[Address, int, Address, int]]()
        for one in subflows():
            if one.ends in open_:
                # Of the time that it was read at: of many, the last are read long after the first.
                heard = one.established and one.heard <= time.monotonic() - begun + TICK
                (proven if heard else silent).add(one.ends)
        open_ = silent
        if looked - begun >= ANSWER:  # asked here: who gets no CPU for so long looks once more
            break
        if open_:  # many sockets are looked at for a while; half of the time at most
            time.sleep(max(PAUSE, time.monotonic() - looked))
    return proven


def _challenge(one: Subflow) -> None:
    four = one.local.version == 4
    tcp = struct.pack("!HHIIBBHHH", one.local_port, one.remote_port, 0, 0, 5 << 4, SYN_ACK, 0, 0, 0)
    tcp = tcp[:4] + os.urandom(8) + tcp[12:]
    ends = one.local.packed + one.remote.packed
    pseudo = ends + (struct.pack("!HH", 6, len(tcp)) if four else struct.pack("!II", len(tcp), 6))
    tcp = tcp[:16] + checksum(pseudo + tcp) + tcp[18:]
    if four:  # the kernel fills in its length, number and checksum
        head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(tcp), 0, 0, 64, 6, 0)
    else:
        head = struct.pack("!IHBB", 6 << 28, len(tcp), 6, 64)
    family = socket.AF_INET if four else socket.AF_INET6
    # It fails where no route leads there, or the address is gone, which is an answer.
    with suppress(OSError), socket.socket(family, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.IPPROTO_RAW) as sock:
        sock.bind((str(one.local), 0))
        sock.sendto(head + ends + tcp, socket.MSG_DONTWAIT, (str(one.remote), 0))
