"""The options: everything that may be said to ``crablb serve``, in a file or by an argument, in one table.

From :data:`OPTIONS` come the parser of TOML files and of arguments (:mod:`crablb.config`), the flags of ``crablb
serve`` with their help, what cannot be changed by a reload, the reference (docs/reference.md) and the example of a file
(:mod:`crablb.reference`).  The defaults are those of :mod:`crablb.model`.

A new option is a field there and a row here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from enum import Enum
from typing import Any

from crablb import values
from crablb.model import (
    POLICIES,
    Announce,
    Backend,
    Bypass,
    Check,
    CheckKind,
    Closed,
    Config,
    Fallback,
    Hashing,
    Initially,
    Mode,
    OnDead,
    OptionForm,
    Service,
    State,
    Switch,
    XdpMode,
    host_port,
)

__all__ = ["OPTIONS", "Kind", "Option", "Scope", "fixed_fields", "held", "of", "table", "toml"]

#: What an option is a field of: the load balancer, a service, a backend or a check of one.
Scope = type[Config] | type[Service] | type[Backend] | type[Check]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What the values of an option look like."""

    says: str  # for the reference
    metavar: str
    parse: Callable[[object], Any]  # what a file holds -> the field; raises ConfigError
    read: Callable[[str], object] = str  # an argument -> what a file would hold; raises ConfigError
    words: tuple[str, ...] = ()  # those there are, or the usual ones
    each: bool = False  # a list; ``parse`` is for one of its elements
    implied: str | None = None  # what the flag says without an argument
    nested: Scope | None = None  # a list of tables, whose keys are the options of this scope
    hold: Callable[[Any], object] | None = None  # the field -> what a file holds, where :func:`held` does not tell
    #: What a file holds, as JSON Schema: not all that ``parse`` looks at, nothing that it would take.
    json: Mapping[str, object] = field(default_factory=lambda: {"type": "string"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """One row of the table."""

    scope: Scope
    name: str  # key in a file
    kind: Kind
    help: str
    field: str = ""  # of ``scope``; ``name`` if empty
    flags: tuple[str, ...] = ()  # of ``crablb serve``; by the name if empty.  A service's is for all given there
    no_flag: str = ""  # why there is none
    flag_help: str = ""  # what is to say of the flag beside
    repeatable: bool = False  # the flag; a file has a list
    unset: str = ""  # what is done by default, where the default value does not tell
    missing: str = ""  # what to say where it must be there and is not
    example: object = None  # as in a file
    reload: bool = False  # may be changed while serving

    def __post_init__(self) -> None:
        """Raises :class:`TypeError` if there is no such field."""
        if not self.field:
            object.__setattr__(self, "field", self.name)
        if self.field not in self.scope.__dataclass_fields__:
            raise TypeError(
                f"option {self.name}: crablb.model.{self.scope.__name__} has no field {self.field}; add it there"
            )
        if not self.flags and not self.no_flag:
            object.__setattr__(self, "flags", (f"--{self.name.replace('_', '-')}",))

    @property
    def default(self) -> object:
        """:data:`dataclasses.MISSING` if there is none."""
        return next(f.default for f in fields(self.scope) if f.name == self.field)

    @property
    def default_words(self) -> str:
        """For people, as an argument; empty if there is no default."""
        if self.unset or self.default is MISSING:
            return self.unset
        return ",".join(map(_plain, self.default)) if isinstance(self.default, tuple) else _plain(self.default)

    @property
    def limits(self) -> str:
        """Which values there are, if the metavar does not tell; for people."""
        told = not self.kind.words and self.kind.read is not _number
        return "" if told or self.kind.metavar.startswith("{") else self.kind.says.replace("`", "")

    @property
    def explained(self) -> str:
        """Its help, with the values there are and the default."""
        default = f"default: {self.default_words}" if self.default_words else ""
        notes = [note for note in ("repeatable" if self.repeatable else "", self.limits, default) if note]
        return f"{self.whole_help} ({'; '.join(notes)})" if notes else self.whole_help

    @property
    def whole_help(self) -> str:
        return f"{self.help}. {self.flag_help}" if self.flag_help else self.help


def _plain(value: object) -> str:
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def toml(value: object) -> str:
    """A value as a TOML file has it."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)  # a basic string of TOML has the same escapes
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{key} = {toml(each)}' for key, each in value.items())} }}"
    return _plain(value)


def held(option: Option, value: Any) -> object:
    """What a file holds for the value of an option: strings, numbers, lists and tables of them, as JSON has them too.

    Of a backend without anything but an address and a weight it is the notation for that.
    """
    if option.kind.hold:
        return option.kind.hold(value)
    if option.kind.nested and isinstance(value, tuple):
        return [_member(each) for each in value]
    if isinstance(value, tuple):
        return list(map(_plainly, value))
    return _plainly(value)


def _member(value: Any) -> object:
    """An element of a list of tables, by its shorter notation if that says all."""
    said = table(value)
    if isinstance(value, Check) and said.keys() == {"type"}:
        return said["type"]
    if isinstance(value, Backend) and said.keys() <= {"address", "weight"}:
        return f"{said['address']}*{said['weight']}" if "weight" in said else said["address"]
    return said


def _plainly(value: Any) -> object:
    if isinstance(value, Enum):
        return value.value
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def table(value: Config | Service | Backend | Check) -> dict[str, object]:
    """The table of a file that means this: what differs from the defaults, by the options' names.

    Not of secrets, which are in files of their own, nor of functions that have no name there.
    """
    return {
        option.name: held(option, given)
        for option in of(type(value))
        if (given := getattr(value, option.field)) != option.default
    }


# ---- kinds ----


def _number(text: str) -> object:
    """A number, or the text as it is, which is refused as none later."""
    if re.fullmatch(r"-?[0-9]{1,18}", text):
        return int(text)
    return float(text) if re.fullmatch(r"-?[0-9]{1,18}\.[0-9]{1,18}", text) else text


def _commas(read: Callable[[str], object]) -> Callable[[str], object]:
    return lambda text: [read(part.strip()) for part in text.split(",")]


def _checks(text: str) -> object:
    return [] if text == "none" else [part.strip() for part in text.split(",")]


def _choice(kind: type[Enum]) -> Kind:
    words = tuple(member.value for member in kind)
    return Kind(
        says=", ".join(f"`{word}`" for word in words),
        metavar=f"{{{','.join(words)}}}",
        parse=lambda value: values.member(kind, value),
        words=words,
        json={"enum": list(words)},
    )


def _whole(low: int, high: int, metavar: str = "N") -> Kind:
    return Kind(
        says=f"{low:,} to {high:,}",
        metavar=metavar,
        parse=lambda value: values.whole(low, high, value),
        read=_number,
        json={"type": "integer", "minimum": low, "maximum": high},
    )


def _truth(text: str) -> object:
    """True or false, or the text as it is, which is refused as neither later."""
    return {"true": True, "false": False}.get(text, text)


def _seconds(low: float, high: float) -> Kind:
    return Kind(
        says=f"{low:g} to {high:,g}",
        metavar="SECONDS",
        parse=lambda value: values.seconds_from(low, high, value),
        read=_number,
        json={"type": "number", "minimum": low, "maximum": high},
    )


def _text(says: str, metavar: str) -> Kind:
    return Kind(says=says, metavar=metavar, parse=values.string)


def _endpoint(port: int) -> Kind:
    return Kind(
        says=f"`address:port` or an address (port {port})",
        metavar="ADDRESS[:PORT]",
        parse=lambda value: values.parse_endpoint(value, port),
        hold=lambda value: value and host_port(*value),
    )


_BOOLEAN = Kind(
    says="`true`, `false`",
    metavar="BOOL",
    parse=values.boolean,
    read=_truth,
    implied="true",
    json={"type": "boolean"},
)

_NAME = {"type": "string", "minLength": 1}

# ---- the table ----

_OF_SERVICE = "a part of `--service VIP=BACKEND,...`"
_OF_BACKEND = "one backend's, for which `--service` has no notation"
_OF_CHECK = "one check's, for which `--check` has no notation"

OPTIONS: tuple[Option, ...] = (
    Option(
        scope=Config,
        name="interface",
        field="interfaces",
        flags=("--iface", "--interface"),
        repeatable=True,
        kind=Kind(
            says="a name, or a list of them",
            metavar="IF",
            parse=values.parse_interfaces,
            json={"anyOf": [_NAME, {"type": "array", "items": _NAME, "minItems": 1, "uniqueItems": True}]},
        ),
        help="where clients' packets come in; backends may be behind any interface. With --config the argument"
        " overrides the file",
        missing="interface is missing; add interface = 'eth0', or pass --iface",
        example="eth0",
    ),
    Option(
        scope=Config,
        name="service",
        field="services",
        repeatable=True,
        kind=Kind(says="tables: see below", metavar="VIP=BACKEND,...", parse=values.listed, each=True, nested=Service),
        help="a VIP and the backends behind it: tcp://10.0.0.100:80=10.0.0.11,10.0.0.12*3 (weights by *; IPv6 in"
        " brackets)",
        missing="no [[service]]; add one with address and backends",
        reload=True,
    ),
    Option(
        scope=Config,
        name="option",
        kind=_choice(OptionForm),
        help="the form of the CR option: crab (kind 42) or experimental (RFC 6994, kind 253)",
        example="crab",
        reload=True,
    ),
    Option(
        scope=Config,
        name="seed",
        flags=("--seed-file",),
        kind=Kind(
            says="32 hexadecimal digits",
            metavar="FILE",
            parse=values.parse_seed,
            read=values.read_seed,
            hold=lambda value: value and "...",
            json={"type": "string", "pattern": "^\\s*[0-9a-fA-F]{32}\\s*$"},
        ),
        help="key of the hash; load balancers that share a VIP share it",
        flag_help="The argument names a file that holds it, as ps shows arguments to everybody",
        unset="made once, and kept in /var/lib/crablb/seed",
        example="00112233445566778899aabbccddeeff",
    ),
    Option(
        scope=Config,
        name="xdp_mode",
        kind=_choice(XdpMode),
        help="where the XDP program runs: native, generic, or auto: native where the driver can",
        example="native",
    ),
    Option(
        scope=Config,
        name="queues",
        kind=_whole(1, 64),
        help="CPUs that work on each interface's RX queues; those beyond their number share them",
        unset="one a queue",
        example=4,
    ),
    Option(
        scope=Config,
        name="busy_poll",
        kind=_whole(0, 1_000_000, "MICROSECONDS"),
        help="microseconds that a worker turns at most before it sleeps, and only when the last packets came that soon"
        " one after the other: it then needs no wake-up. 0: it sleeps at once, which leaves the CPU to others",
        example=20,
    ),
    Option(
        scope=Config,
        name="table",
        kind=_choice(Hashing),
        help="by what a hash means a backend: maglev: equal to the slot, and where a backend is added or removed a few"
        " connections of others move as well; rendezvous: hardly any of others', and no backend gets more than a 32nd"
        " beyond its share. Load balancers with one VIP need the same",
        example="maglev",
    ),
    Option(
        scope=Config,
        name="table_size",
        kind=Kind(
            says="a prime, 7 to 5,000,011",
            metavar="PRIME",
            parse=values.parse_table_size,
            read=_number,
            json={"type": "integer", "minimum": 7, "maximum": 5_000_011},
        ),
        help="slots of a service's table: 100 times the backends of a service, or more",
        example=65537,
    ),
    Option(
        scope=Config,
        name="flows",
        kind=_whole(64, 1 << 26),
        help="connections by fallback that are remembered: by each queue's cache (16 bytes each) and by the XDP"
        " program (64 bytes each)",
        example=262144,
    ),
    Option(
        scope=Config,
        name="ack_bypass",
        kind=_choice(Bypass),
        help="the XDP program forwards known fallback flows by itself: off; auto: where the interface that leads to"
        " the backend takes what XDP programs send, as the kernel says; on: also where it does not say so (before"
        " Linux 6.3)",
        example="auto",
    ),
    Option(
        scope=Config,
        name="announce",
        kind=_choice(Announce),
        help="who answers ARP and neighbour discovery for the VIPs: arp: the load balancer; none: nobody has to (a"
        " router leads to it), or somebody else does (keepalived)",
        example="none",
    ),
    Option(
        scope=Config,
        name="allow_own_address",
        kind=_BOOLEAN,
        help="a VIP may be an address that the machine itself is reached by: its port is the service's then, and no"
        " program's here any more. What is added beside it needs no leave: for one host (/32, /128), as by keepalived,"
        " secondary (IPv4, a second one of a prefix), deprecated (IPv6), or on the loopback",
        example=False,
        reload=True,
    ),
    Option(
        scope=Config,
        name="ping",
        kind=_BOOLEAN,
        help="echo requests to the VIPs are answered; false: dropped. Those to a VIP that is an address of this machine"
        " are the kernel's",
        example=False,
        reload=True,
    ),
    Option(
        scope=Config,
        name="closed",
        kind=_choice(Closed),
        help="what comes to a VIP but is no service's: auto: TCP gets a RST, the rest is the kernel's, whose netfilter"
        " may have use for it, unless it sends it back to the network; reset: TCP gets a RST, UDP an ICMP error, the"
        " rest nothing; drop: all is dropped; pass: all is the kernel's, as it always is if the VIP is an address of"
        " this machine. SYNs to a service without a usable backend get a RST with auto and reset",
        example="drop",
        reload=True,
    ),
    Option(
        scope=Config,
        name="macs",
        kind=Kind(
            says=f"a list of MAC addresses, at most {values.MAX_MACS}",
            metavar="MAC,...",
            parse=values.parse_macs,
            read=_commas(str),
            json={
                "type": "array",
                "items": {"type": "string", "pattern": "^[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}$"},
            },
        ),
        help="MAC addresses that packets to the VIPs come to beside the interface's own (and that of the bridge or bond"
        " which it is a port of): a virtual router's (VRRP), a macvlan's. Frames to others are not the load balancer's",
        unset="none",
        example=["00:00:5e:00:01:07"],
        reload=True,
    ),
    Option(
        scope=Config,
        name="keep",
        kind=_seconds(0, 86400),
        help="seconds that the XDP program stays after a clean stop, and goes on with the fallback flows that it knows,"
        " as it does when the process is killed: a start in this time takes them over, whatever its backends are."
        " Then it is removed",
        example=60,
        reload=True,
    ),
    Option(
        scope=Config,
        name="report_listen",
        kind=_endpoint(values.PORT),
        help="where servers report their load to (crablb agent server --report)",
        unset="nowhere",
        example="10.0.0.2:7171",
    ),
    Option(
        scope=Config,
        name="report_key_file",
        field="report_key",
        flags=("--report-key",),
        kind=Kind(says="path of a file", metavar="FILE", parse=values.parse_key, hold=lambda value: value and "..."),
        help="the master key of the servers' reports (crablb key new); goes with the address that they are sent to",
        unset="none",
        example="/etc/crablb/master.key",
    ),
    Option(
        scope=Config,
        name="admin",
        kind=_choice(Switch),
        help="the API that the commands ask and change a running load balancer by, on the UNIX socket"
        " /run/crablb/IFACE.sock",
        example="on",
    ),
    Option(
        scope=Config,
        name="admin_group",
        kind=_text("the name of a group", "GROUP"),
        help="whose members may use the API's socket, beside its owner",
        unset="nobody else",
        example="adm",
    ),
    Option(
        scope=Config,
        name="admin_listen",
        kind=_endpoint(values.ADMIN_PORT),
        help="where the API listens as well, by TLS; needs admin_cert, admin_key and admin_token_file",
        unset="nowhere",
        example="10.0.0.2:7172",
    ),
    Option(
        scope=Config,
        name="admin_cert",
        kind=_text("path of a file", "FILE"),
        help="the certificate of admin_listen, and those that it is signed by, as PEM",
        unset="none",
        example="/etc/crablb/admin.crt",
    ),
    Option(
        scope=Config,
        name="admin_key",
        kind=_text("path of a file", "FILE"),
        help="the key of that certificate, as PEM",
        unset="none",
        example="/etc/crablb/admin.key",
    ),
    Option(
        scope=Config,
        name="admin_token_file",
        kind=_text("path of a file", "FILE"),
        help="a secret that requests by admin_listen have to bear (Authorization: Bearer ...)",
        unset="none",
        example="/etc/crablb/admin.token",
    ),
    Option(
        scope=Config,
        name="metrics_listen",
        kind=_endpoint(values.METRICS_PORT),
        help="where metrics for Prometheus (/metrics) and the status page (/) are served, to whoever asks",
        unset="nowhere",
        example="127.0.0.1:9117",
    ),
    Option(
        scope=Config,
        name="persist",
        kind=_choice(Switch),
        help="what is changed while it runs (weights, states, backends, services) outlives a restart, in"
        " /var/lib/crablb",
        example="on",
    ),
    Option(
        scope=Config,
        name="watch",
        kind=_BOOLEAN,
        help="the configuration file is read again when it changes, as by crablb reload",
        example=True,
        reload=True,
    ),
    # ---- a service ----
    Option(
        scope=Service,
        name="address",
        field="vip",
        no_flag=_OF_SERVICE,
        kind=Kind(
            says="`tcp://address:port`",
            metavar="VIP",
            parse=values.parse_vip,
            json={"type": "string", "pattern": "^tcp://.+:[0-9]{1,5}$"},
        ),
        help="the VIP: where clients connect to; IPv6 in brackets",
        missing="address is missing; add address = 'tcp://10.0.0.100:80', the VIP",
        example="tcp://10.0.0.100:80",
        reload=True,
    ),
    Option(
        scope=Service,
        name="backends",
        no_flag=_OF_SERVICE,
        kind=Kind(
            says="a list of addresses and tables: see below",
            metavar="BACKEND",
            parse=values.parse_backend,
            each=True,
            nested=Backend,
        ),
        help="the servers behind it, each as an address, as an address with its weight (10.0.0.12*3), or as a table",
        reload=True,
    ),
    Option(
        scope=Service,
        name="mode",
        kind=_choice(Mode),
        help="who is redirected: negotiated: clients that offer it; always: all clients, for endpoints that never"
        " offer; never: none",
        example="negotiated",
        reload=True,
    ),
    Option(
        scope=Service,
        name="redirect_clients",
        kind=Kind(
            says="a list of prefixes",
            metavar="PREFIX,...",
            parse=values.parse_prefix,
            read=_commas(str),
            each=True,
            json={"type": "string", "pattern": "^[0-9a-fA-F:.]+(/[0-9]{1,3})?$"},
        ),
        help="only these clients are redirected, and learn a backend's address",
        flag_help="Of the argument's prefixes a service takes those of its address family",
        unset="all",
        example=["10.0.0.0/8"],
        reload=True,
    ),
    Option(
        scope=Service,
        name="fallback",
        kind=_choice(Fallback),
        help="how clients that are not redirected are served: dsr-l2: by MAC address, on the same segment; dsr-ipip:"
        " IP in IP; auto: the first where it is possible, else the second",
        example="auto",
        reload=True,
    ),
    Option(
        scope=Service,
        name="on_dead",
        kind=_choice(OnDead),
        help="what becomes of a dead backend's connections by fallback: reassign: their packets go to another; reset:"
        " the client gets a RST",
        example="reassign",
        reload=True,
    ),
    Option(
        scope=Service,
        name="policy",
        kind=Kind(
            says=f"{', '.join(f'`{name}`' for name in POLICIES)}, or `module:function`",
            metavar="NAME",
            parse=values.parse_policy,
            words=POLICIES,
            json={"anyOf": [{"enum": list(POLICIES)}, {"type": "string", "pattern": "^[\\w.]+:[\\w.]+$"}]},
        ),
        help="which backend a connection is redirected to",
        example="source-hash",
        reload=True,
    ),
    Option(
        scope=Service,
        name="source_prefix",
        kind=Kind(
            says="a pair of lengths",
            metavar="BITS,BITS",
            parse=values.parse_source_prefix,
            read=_commas(_number),
            json={
                "type": "array",
                "items": {"type": "integer", "minimum": 1, "maximum": 128},
                "minItems": 2,
                "maxItems": 2,
            },
        ),
        help="with policy source-hash: bits of an IPv4, an IPv6 client's address that count",
        example=[24, 56],
        reload=True,
    ),
    Option(
        scope=Service,
        name="slow_start",
        kind=_seconds(0, 86400),
        help="seconds in which the weight of a new backend rises to its own",
        example=30,
        reload=True,
    ),
    Option(
        scope=Service,
        name="syn_rate",
        kind=_whole(0, 100_000_000),
        help="SYNs a second that the service takes, of all queues together, so that a flood to it leaves room and time"
        " for others; those above are dropped by the XDP program, and clients send them again. 0: all",
        example=50_000,
        reload=True,
    ),
    Option(
        scope=Service,
        name="check",
        field="checks",
        kind=Kind(
            says=f"{', '.join(f'`{kind.value}`' for kind in CheckKind)}, and tables: see below",
            metavar="TYPE,...",
            parse=values.parse_check,
            read=_checks,
            words=("none", *(kind.value for kind in CheckKind)),
            each=True,
            nested=Check,
        ),
        help="how it is found out whether its backends serve; [], or none as an argument: by nothing but whether the"
        " neighbour answers",
        unset="as the mode needs: tcp, redirect and fallback",
        example=["tcp", "redirect"],
        reload=True,
    ),
    Option(
        scope=Service,
        name="initially",
        kind=_choice(Initially),
        help="what is thought of a backend until its checks have said something",
        example="down",
        reload=True,
    ),
    Option(
        scope=Service,
        name="panic",
        kind=_whole(0, 100, "PERCENT"),
        help="with less than this percentage of the weight healthy, all backends get connections as if they were, lest"
        " the few left are overrun. 0: never",
        example=30,
        reload=True,
    ),
    Option(
        scope=Service,
        name="quorum",
        kind=_whole(0, 1 << 31, "WEIGHT"),
        help="with less healthy weight than this the VIP is not announced any more. 0: it always is",
        example=2,
        reload=True,
    ),
    Option(
        scope=Service,
        name="quorum_hysteresis",
        kind=_whole(0, 1 << 31, "WEIGHT"),
        help="how much more than the quorum there has to be until it is announced again",
        example=1,
        reload=True,
    ),
    # ---- a backend ----
    Option(
        scope=Backend,
        name="address",
        no_flag=_OF_SERVICE,
        kind=Kind(says="an address", metavar="ADDRESS", parse=values.parse_address),
        help="the server's own address (DIP)",
        missing="address is missing; add address = '10.0.0.11'",
        example="10.0.0.11",
        reload=True,
    ),
    Option(
        scope=Backend,
        name="weight",
        no_flag=f"{_OF_SERVICE}, behind `*`",
        kind=Kind(
            says=f"0 to {values.MAX_WEIGHT:,}",
            metavar="N",
            parse=values.parse_weight,
            read=_number,
            json={"type": "integer", "minimum": 0, "maximum": values.MAX_WEIGHT},
        ),
        help="its share of new connections; 0: it gets none",
        example=2,
        reload=True,
    ),
    Option(
        scope=Backend,
        name="cr",
        no_flag=_OF_BACKEND,
        kind=_BOOLEAN,
        help="whether it speaks connection redirection",
        example=False,
        reload=True,
    ),
    Option(
        scope=Backend,
        name="state",
        no_flag=_OF_BACKEND,
        kind=_choice(State),
        help="up; drain: no new connections, those that it has go on; maint: the same, and it is not checked; dead: its"
        " connections are lost",
        example="drain",
        reload=True,
    ),
    Option(
        scope=Backend,
        name="backup",
        no_flag=_OF_BACKEND,
        kind=_BOOLEAN,
        help="gets connections only when no other backend of the service can",
        example=True,
        reload=True,
    ),
    Option(
        scope=Backend,
        name="check_address",
        no_flag=_OF_BACKEND,
        kind=Kind(says="an address", metavar="ADDRESS", parse=values.parse_address),
        help="where tcp, http, https, tls and agent checks connect to",
        unset="its own address",
        example="10.1.0.13",
        reload=True,
    ),
    Option(
        scope=Backend,
        name="check_port",
        no_flag=_OF_BACKEND,
        kind=_whole(1, 65535, "PORT"),
        help="the port that they connect to",
        unset="the check's",
        example=8080,
        reload=True,
    ),
    # ---- a check ----
    Option(
        scope=Check,
        name="type",
        field="kind",
        no_flag=_OF_CHECK,
        kind=_choice(CheckKind),
        help="tcp: a connection; http, https: a request; tls: a handshake; exec: a program's exit status; agent:"
        " HAProxy's agent-check; redirect: a SYN with a redirect to the backend, which must be echoed: else it is"
        " redirected to no more; fallback: a SYN to the VIP by the service's own DSR way, which the VIP must answer",
        missing="type is missing; add type = 'tcp'",
        example="http",
        reload=True,
    ),
    Option(
        scope=Check,
        name="interval",
        no_flag=_OF_CHECK,
        kind=_seconds(0.1, 3600),
        help="seconds from one to the next",
        example=2,
        reload=True,
    ),
    Option(
        scope=Check,
        name="timeout",
        no_flag=_OF_CHECK,
        kind=_seconds(0.01, 60),
        help="seconds after which it has failed",
        example=1,
        reload=True,
    ),
    Option(
        scope=Check,
        name="fall",
        no_flag=_OF_CHECK,
        kind=_whole(1, 100),
        help="failures in a row after which the backend gets no new connections; what an agent says holds at once",
        example=3,
        reload=True,
    ),
    Option(
        scope=Check,
        name="rise",
        no_flag=_OF_CHECK,
        kind=_whole(1, 100),
        help="successes in a row after which it gets them again",
        example=2,
        reload=True,
    ),
    Option(
        scope=Check,
        name="fast_interval",
        no_flag=_OF_CHECK,
        kind=_seconds(0.1, 3600),
        help="seconds from one to the next while the last result differs from what is thought of the backend",
        example=0.5,
        reload=True,
    ),
    Option(
        scope=Check,
        name="port",
        no_flag=_OF_CHECK,
        kind=_whole(1, 65535, "PORT"),
        help="where tcp, http, https, tls and agent connect to; agent needs one",
        unset="the VIP's",
        example=8080,
        reload=True,
    ),
    Option(
        scope=Check,
        name="method",
        no_flag=_OF_CHECK,
        kind=Kind(
            says="`GET`, `HEAD`, `OPTIONS` or another",
            metavar="METHOD",
            parse=values.parse_method,
            words=("GET", "HEAD", "OPTIONS"),
            json={"type": "string", "pattern": "^[A-Z]{1,20}$"},
        ),
        help="of http and https",
        example="HEAD",
        reload=True,
    ),
    Option(
        scope=Check,
        name="path",
        no_flag=_OF_CHECK,
        kind=Kind(
            says="begins with /",
            metavar="PATH",
            parse=values.parse_path,
            json={"type": "string", "pattern": "^/[!-~]*$"},
        ),
        help="of http and https",
        example="/healthz",
        reload=True,
    ),
    Option(
        scope=Check,
        name="host",
        no_flag=_OF_CHECK,
        kind=Kind(
            says="a name",
            metavar="NAME",
            parse=values.parse_header,
            json={"type": "string", "pattern": "^[!-~]{0,255}$"},
        ),
        help="of http and https: the Host header",
        unset="the VIP",
        example="www.example.org",
        reload=True,
    ),
    Option(
        scope=Check,
        name="status",
        no_flag=_OF_CHECK,
        kind=Kind(
            says="a list of statuses and ranges",
            metavar="STATUS,...",
            parse=values.parse_status,
            json={
                "type": "array",
                "items": {
                    "anyOf": [
                        {"type": "integer", "minimum": 100, "maximum": 599},
                        {"type": "string", "pattern": "^[0-9]{3}(-[0-9]{3})?$"},
                    ]
                },
            },
            hold=lambda value: [low if low == high else f"{low}-{high}" for low, high in value],
        ),
        help="of http and https: those that are well",
        unset="200-399",
        example=["200-299", 404],
        reload=True,
    ),
    Option(
        scope=Check,
        name="body",
        no_flag=_OF_CHECK,
        kind=_text("text", "TEXT"),
        help="of http and https: what the first 64 KiB of the answer must hold",
        unset="anything",
        example="ok",
        reload=True,
    ),
    Option(
        scope=Check,
        name="verify",
        no_flag=_OF_CHECK,
        kind=_BOOLEAN,
        help="of https and tls: the certificate must be valid, and for sni, or host (https)",
        example=True,
        reload=True,
    ),
    Option(
        scope=Check,
        name="sni",
        no_flag=_OF_CHECK,
        kind=Kind(
            says="a name",
            metavar="NAME",
            parse=values.parse_sni,
            json={"type": "string", "pattern": "^[!-~]{0,255}$"},
        ),
        help="of https and tls: the name that is asked for",
        unset="host, if that is a name",
        example="www.example.org",
        reload=True,
    ),
    Option(
        scope=Check,
        name="ca_file",
        no_flag=_OF_CHECK,
        kind=_text("path of a file", "FILE"),
        help="of https and tls: whom to trust, as PEM",
        unset="whom the machine trusts",
        example="/etc/crablb/ca.crt",
        reload=True,
    ),
    Option(
        scope=Check,
        name="command",
        no_flag=_OF_CHECK,
        kind=Kind(
            says="a list: a program and its arguments",
            metavar="COMMAND",
            parse=values.parse_command,
            json={"type": "array", "items": {"type": "string"}, "minItems": 1},
        ),
        help="of exec: exit status 0: well; 2 to 255: well, with two less percent of its weight (keepalived's"
        " MISC_CHECK, dynamic); 1: not well. It gets CRABLB_VIP, CRABLB_BACKEND, CRABLB_PORT",
        unset="none",
        example=["/usr/local/bin/check", "--fast"],
        reload=True,
    ),
)


def complete(options: tuple[Option, ...], scope: Scope) -> tuple[Option, ...]:
    """The options of a scope, one for each of its fields.  Raises :class:`TypeError` if there are more or fewer."""
    found = tuple(option for option in options if option.scope is scope)
    names = [option.field for option in found]
    for name in scope.__dataclass_fields__:
        if names.count(name) != 1:
            raise TypeError(
                f"crablb.model.{scope.__name__}.{name} has {names.count(name)} rows in crablb.options.OPTIONS, not one:"
                " no file and no argument could set it"
            )
    return found


_OF: dict[type, tuple[Option, ...]] = {scope: complete(OPTIONS, scope) for scope in (Config, Service, Backend, Check)}


def of(scope: type) -> tuple[Option, ...]:
    """The options of a scope, in the order of the table."""
    return _OF[scope]


def fixed_fields() -> tuple[str, ...]:
    """The fields of :class:`crablb.model.Config` that cannot be changed while serving."""
    return tuple(option.field for option in of(Config) if not option.reload)


def remedy(field: str) -> str:
    """What has one of them another way."""
    # What a process has to have like the one that it takes over from: docs/takeover.md.
    return "restart crablb serve" if field in ("interfaces", "seed", "xdp_mode") else "crablb takeover does it"
