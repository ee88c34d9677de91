"""What a load balancer is told: services, backends, settings.

Plain immutable values, checked by :mod:`crablb.config`.  Their defaults stand here and nowhere else; what each means to
who writes a configuration, in :mod:`crablb.options`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from typing import Any, Self

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

#: Policies decided by a hash alone, so alike by every load balancer of one configuration: they serve the fallback too.
CONSISTENT = ("maglev", "source-hash")
#: Every policy there is, by name; the others are native/policy_*.c.
POLICIES = (
    *CONSISTENT,
    "random",
    "round-robin",
    "weighted-round-robin",
    "power-of-two",
    "least-connections",
    "least-loaded",
)


class Mode(Enum):
    """Which clients of a service are redirected."""

    NEGOTIATED = "negotiated"  # those that offer it
    ALWAYS = "always"  # all: for endpoints that never offer
    NEVER = "never"  # none: every client takes the fallback


class Fallback(Enum):
    """How packets of clients that are not redirected reach their backend, which answers directly (DSR)."""

    AUTO = "auto"  # by MAC address where the backend is on the segment, else encapsulated
    DSR_L2 = "dsr-l2"  # by MAC address
    DSR_IPIP = "dsr-ipip"  # IP in IP


class State(Enum):
    """What an operator says of a backend."""

    UP = "up"
    DRAIN = "drain"  # no new connections; those it has go on
    MAINT = "maint"  # the same, and it is not checked
    DEAD = "dead"  # its connections are lost


class OnDead(Enum):
    """What becomes of a dead backend's connections that go by fallback."""

    REASSIGN = "reassign"  # their packets go to another backend
    RESET = "reset"  # the client gets a RST


class Bypass(Enum):
    """Whether the XDP program forwards known fallback flows by itself."""

    AUTO = "auto"  # where the interface that leads to the backend takes what XDP programs send
    ON = "on"  # also where the kernel does not say that it does
    OFF = "off"


class Announce(Enum):
    """Who answers for the VIPs on the segment."""

    NONE = "none"  # somebody else: a router's route, keepalived
    ARP = "arp"  # the load balancer, by ARP and neighbour discovery


class Hashing(Enum):
    """By what a hash means a backend."""

    MAGLEV = "maglev"  # equal to the slot; who comes or goes moves a few of others' connections
    RENDEZVOUS = "rendezvous"  # hardly any of others'; nobody more than a 32nd beyond its share


class Closed(Enum):
    """What is done about packets to VIPs that are no service's, and SYNs that no backend can take."""

    AUTO = "auto"  # TCP is reset; the rest is the kernel's, unless it sends it back to the network
    RESET = "reset"  # what a host would answer
    DROP = "drop"  # nothing
    PASS = "pass"  # the kernel's


class OptionForm(Enum):
    """How the CR option is written on the wire."""

    CRAB = "crab"  # TCP option kind 42
    EXPERIMENTAL = "experimental"  # RFC 6994: kind 253 with an ExID


class Initially(Enum):
    """What is thought of a backend before its checks have said anything."""

    UP = "up"
    DOWN = "down"


class Switch(Enum):
    """Whether a part runs."""

    ON = "on"
    OFF = "off"


class CheckKind(Enum):
    """How it is found out whether a backend serves."""

    TCP = "tcp"  # a connection to its own address
    HTTP = "http"  # a request there
    HTTPS = "https"
    TLS = "tls"  # a handshake there
    EXEC = "exec"  # a program's exit status
    AGENT = "agent"  # a line that it says: HAProxy's agent-check
    REDIRECT = "redirect"  # a SYN with a redirect to its own address: the SYN-ACK must echo it
    FALLBACK = "fallback"  # a SYN to the VIP by the service's own DSR way: the VIP must answer


class XdpMode(Enum):
    """Where the XDP program runs."""

    AUTO = "auto"  # native where the driver can, else generic
    NATIVE = "native"
    GENERIC = "generic"


def mapped(address: Address) -> bytes:
    """16 bytes in network order; IPv4 as ::ffff:a.b.c.d (RFC 4291, 2.5.5.2)."""
    if isinstance(address, IPv4Address):
        return bytes(10) + b"\xff\xff" + address.packed
    return address.packed


def lpm_key(prefix: Network) -> bytes:
    """``struct crab_lpm``."""
    bits = prefix.prefixlen + (96 if prefix.version == 4 else 0)
    return bits.to_bytes(4, sys.byteorder) + mapped(prefix.network_address)


def unmapped(packed: bytes) -> Address:
    """The address of 16 bytes made by :func:`mapped`."""
    address = IPv6Address(packed)
    return address.ipv4_mapped or address


def host_port(address: Address, port: int) -> str:
    return f"[{address}]:{port}" if ":" in str(address) else f"{address}:{port}"


@dataclass(frozen=True, slots=True)
class Check:
    """How a service's backends are checked.  Times are seconds."""

    kind: CheckKind
    interval: float = 2.0
    timeout: float = 1.0
    fall: int = 3  # failures in a row after which it is down
    rise: int = 2  # successes in a row after which it is up
    fast_interval: float = 0.5  # while what was found last differs from what is thought of it
    port: int | None = None  # None: the VIP's
    method: str = "GET"  # http, https
    path: str = "/"
    host: str = ""  # empty: the VIP
    status: tuple[tuple[int, int], ...] = ((200, 399),)  # from, to
    body: str = ""  # that the answer's must hold
    verify: bool = False  # https, tls: the certificate
    sni: str = ""  # empty: `host`
    ca_file: str = ""  # empty: the machine's
    command: tuple[str, ...] = ()  # exec: a program and its arguments


@dataclass(frozen=True, slots=True)
class Backend:
    """A server: its own address (DIP), its share of new connections, and whether it speaks connection redirection."""

    address: Address
    weight: int = 1  # 0: gets no new connections
    cr: bool = True
    state: State = State.UP
    backup: bool = False  # gets connections only when no other backend of the service can
    check_address: Address | None = None  # where checks connect to; None: its own address
    check_port: int | None = None  # None: the check's

    @property
    def share(self) -> int:
        """Its weight among those that get new connections."""
        return self.weight if self.state is State.UP else 0


@dataclass(frozen=True, slots=True)
class Vip:
    """Where clients connect to."""

    address: Address
    port: int
    protocol: str = "tcp"
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.address, self.port)))

    def __str__(self) -> str:
        return f"{self.protocol}://{host_port(self.address, self.port)}"

    def __hash__(self) -> int:
        """Made once: addresses hash their number in hexadecimal, each time."""
        return self._hash

    def key(self) -> bytes:
        """``struct crab_vip`` of bpf/maps.h: 20 bytes."""
        return mapped(self.address) + self.port.to_bytes(2, "big") + b"\x06\x00"

    @classmethod
    def from_key(cls, key: bytes) -> Self:
        """The VIP of 20 bytes made by :meth:`key`."""
        return cls(unmapped(key[:16]), int.from_bytes(key[16:18], "big"))


@dataclass(frozen=True, slots=True)
class Service:
    """A VIP and the backends behind it."""

    vip: Vip
    backends: tuple[Backend, ...]
    mode: Mode = Mode.NEGOTIATED
    redirect_clients: tuple[Network, ...] = ()  # empty: all
    fallback: Fallback = Fallback.AUTO
    on_dead: OnDead = OnDead.REASSIGN
    #: Who is redirected where: a name of POLICIES, "module:function", or a crablb.selection.custom.Choose itself.
    policy: str | Callable[..., Any] = "maglev"
    source_prefix: tuple[int, int] = (32, 128)  # for source-hash: bits of an IPv4, an IPv6 client that count
    slow_start: float = 0.0  # seconds in which the weight of a new backend rises to its own
    syn_rate: int = 0  # SYNs a second that it takes, others are dropped.  0: all
    checks: tuple[Check, ...] | None = None  # None: as the mode needs; empty: none
    initially: Initially = Initially.UP
    panic: int = 50  # percent of the weight: with less of it healthy, health is disregarded.  0: never
    quorum: int = 0  # healthy weight under which the VIP is withdrawn.  0: never
    quorum_hysteresis: int = 0  # above the quorum, at which it is announced again


@dataclass(frozen=True, slots=True)
class Config:
    """All that ``crablb serve`` needs to know."""

    interfaces: tuple[str, ...]
    services: tuple[Service, ...]
    option: OptionForm = OptionForm.CRAB
    seed: bytes | None = None  # 16 bytes; None: made once and kept in the state directory
    xdp_mode: XdpMode = XdpMode.AUTO
    queues: int | None = None  # of each interface have a CPU of their own; None: all
    busy_poll: int = 20  # microseconds that a worker turns at most before it sleeps, under load; 0: never
    table: Hashing = Hashing.MAGLEV
    table_size: int = 65537  # prime
    flows: int = 262144  # capacity of each worker's flow cache, and of the XDP program's, in connections
    ack_bypass: Bypass = Bypass.AUTO
    announce: Announce = Announce.NONE
    allow_own_address: bool = False  # a VIP may be an address that the machine itself is reached by
    ping: bool = True  # echo requests to the VIPs are answered
    closed: Closed = Closed.AUTO
    macs: tuple[str, ...] = ()  # that the interfaces take frames to beside their own: 00:00:5e:00:01:07
    keep: float = 0.0  # seconds that flows are kept for the next load balancer after a clean stop
    report_listen: tuple[Address, int] | None = None  # where servers report to; None: nowhere
    report_key: bytes | None = None  # 32 bytes: the master key of their reports
    admin: Switch = Switch.ON  # the API, on a UNIX socket
    admin_group: str = ""  # whose members may use it beside root
    admin_listen: tuple[Address, int] | None = None  # where it listens as well, by TLS
    admin_cert: str = ""  # a file: the certificate, and those that it is signed by
    admin_key: str = ""  # a file: its key
    admin_token_file: str = ""  # what requests by admin_listen have to bear
    metrics_listen: tuple[Address, int] | None = None  # metrics and the status page
    persist: Switch = Switch.ON  # what is changed at run time outlives a restart
    watch: bool = False  # the file is read again when it changes

    @property
    def backends(self) -> set[Address]:
        """The addresses of all services' backends."""
        return {backend.address for service in self.services for backend in service.backends}

    @property
    def vips(self) -> set[Address]:
        """The addresses of all services."""
        return {service.vip.address for service in self.services}
