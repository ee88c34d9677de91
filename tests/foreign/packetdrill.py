"""Scripts of packetdrill, as the kernel's selftests have them: system calls, packets in, packets expected out.

An interpreter of its own, for Debian has the scripts but not the program.  What differs, on purpose:

* The interface is a TAP device, as agents want Ethernet, and between it and the script is a :class:`Wire`, which may do
  what a load balancer and a backend do.
* Times are those at the least: what comes late on a machine that has much to do delays what follows it.  A packet that
  comes out early is wrong, by more than the script was late.  When system calls return, and times in control messages,
  are not looked at.
* What goes out of the socket under test and is not expected is seen at the next packet that is.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import queue
import re
import select
import socket
import struct
import subprocess
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any

#: What a script's times may be fallen short of: a tick of the clock, and what a look at it takes.
EARLY = 0.05
#: Seconds that a packet is waited for.
PATIENCE = 10.0
PORT = 8080
MACS = bytes.fromhex("020000000001"), bytes.fromhex("020000000002")  # ours, and everybody else's

LIBC = ctypes.CDLL(None, use_errno=True)
ANY = ...

#: Of Linux, where Python has no name for it.
SYMBOLS = {
    "NULL": 0, "SIOCINQ": 0x541B, "SO_TIMESTAMPING": 37, "SCM_TIMESTAMPING": 37, "SO_ZEROCOPY": 60,
    "MSG_ZEROCOPY": 0x4000000, "MSG_FASTOPEN": 0x20000000, "TCP_INQ": 36, "TCP_CM_INQ": 36, "TCP_FASTOPEN": 23,
    "TCP_FASTOPEN_CONNECT": 30, "TCP_FASTOPEN_KEY": 33, "TCP_USER_TIMEOUT": 18, "IP_FREEBIND": 15, "SOL_IPV6": 41,
    "IP_MTU_DISCOVER": 10, "IP_PMTUDISC_DONT": 0, "IP_RECVERR": 11, "IPV6_RECVERR": 25,
    "SO_EE_ORIGIN_TIMESTAMPING": 4, "SO_EE_ORIGIN_ZEROCOPY": 5, "SO_EE_CODE_ZEROCOPY_COPIED": 1,
    "SCM_TSTAMP_SND": 0, "SCM_TSTAMP_SCHED": 1, "SCM_TSTAMP_ACK": 2,
    "SOF_TIMESTAMPING_TX_SOFTWARE": 2, "SOF_TIMESTAMPING_SOFTWARE": 16, "SOF_TIMESTAMPING_OPT_ID": 128,
    "SOF_TIMESTAMPING_TX_SCHED": 256, "SOF_TIMESTAMPING_TX_ACK": 512, "EPOLL_CTL_ADD": 1, "EPOLL_CTL_MOD": 3,
}  # fmt: skip

#: struct tcp_info of linux/tcp.h; the seventh and eighth byte hold several fields each.
INFO = (
    "B:state ca_state retransmits probes backoff options wscales flags I:rto ato snd_mss rcv_mss unacked sacked lost"
    " retrans fackets last_data_sent last_ack_sent last_data_recv last_ack_recv pmtu rcv_ssthresh rtt rttvar"
    " snd_ssthresh snd_cwnd advmss reordering rcv_rtt rcv_space total_retrans Q:pacing_rate max_pacing_rate bytes_acked"
    " bytes_received I:segs_out segs_in notsent_bytes min_rtt data_segs_in data_segs_out Q:delivery_rate busy_time"
    " rwnd_limited sndbuf_limited I:delivered delivered_ce Q:bytes_sent bytes_retrans I:dsack_dups reord_seen"
    " rcv_ooopack snd_wnd rcv_wnd rehash H:total_rto total_rto_recoveries I:total_rto_time received_ce"
    " delivered_e1_bytes delivered_e0_bytes delivered_ce_bytes received_e1_bytes received_e0_bytes received_ce_bytes"
    " H:accecn_fail_mode accecn_opt_seen"
)
#: What SO_MEMINFO tells.
MEMORY = [
    f"SK_MEMINFO_{name}"
    for name in (
        "RMEM_ALLOC",
        "RCVBUF",
        "WMEM_ALLOC",
        "SNDBUF",
        "FWD_ALLOC",
        "WMEM_QUEUED",
        "OPTMEM",
        "BACKLOG",
        "DROPS",
    )
]
STATES = (
    "ESTABLISHED SYN_SENT SYN_RECV FIN_WAIT1 FIN_WAIT2 TIME_WAIT CLOSE CLOSE_WAIT LAST_ACK LISTEN CLOSING NEW_SYN_RECV"
)
CONSTANTS = {
    **{f"TCP_{name}": value for value, name in enumerate(STATES.split(), 1)},
    **{f"TCP_CA_{name}": value for value, name in enumerate(("Open", "Disorder", "CWR", "Recovery", "Loss"))},
    "TCPI_OPT_TIMESTAMPS": 1, "TCPI_OPT_SACK": 2, "TCPI_OPT_WSCALE": 4, "TCPI_OPT_ECN": 8, "TCPI_OPT_ECN_SEEN": 16,
    "TCPI_OPT_SYN_DATA": 32, "TCPI_OPT_USEC_TS": 64, "TCPI_OPT_TFO_CHILD": 128,
}  # fmt: skip


class Unsupported(Exception):
    """What a script says and this interpreter does not know."""


class Differs(Exception):
    """What the kernel did otherwise than the script says."""


def check(what: str, expected: object, found: object) -> None:
    if expected != found:
        raise Differs(f"{what}: {expected} expected, {found} found")


# ---- the language ----

TOKEN = re.compile(
    r"\s*(?:(?P<any>\.\.\.)|(?P<number>-?0x[0-9a-fA-F]+|-?\d+)|(?P<name>[A-Za-z_]\w*)|(?P<text>\"(?:\\.|[^\"])*\")"
    r"|(?P<mark>[\[\]{}()|,=]))"
)
NUMBER = r"(?:\d+(?:\.\d+)?|\.\d+)"
TIME = re.compile(rf"(?P<plus>\+?)(?P<at>{NUMBER}|\*)\s*(?:(?P<kind>~|\.\.\.)\s*\+?(?P<to>{NUMBER}))?\s*")
PACKET = re.compile(
    r"(?P<way>[<>])\s*(?:\[(?P<tos>\w+)\]\s*)?(?P<flags>[SFPRUEWAN.\d-]+)\s+(?P<seq>\d+):(?P<end>\d+)\((?P<size>\d+)\)"
    r"(?:\s+ack\s+(?P<ack>\d+))?(?:\s+win\s+(?P<win>\d+))?(?:\s+urg\s+(?P<urg>\d+))?\s*(?:<(?P<options>.*)>)?\s*$"
)
ICMP = re.compile(r"<\s*icmp\s+unreachable\s+(?:(?P<code>\w+)\s+)?\[(?P<seq>\d+):(?P<end>\d+)\((?P<size>\d+)\)\]\s*$")
CALL = re.compile(r"(?P<name>[a-z_0-9]+)\(")
RESULT = re.compile(r"\s*=\s*(?P<value>-?0x[0-9a-f]+|-?\d+|\.\.\.)(?:\s+(?P<errno>E[A-Z0-9]+))?(?:\s*\([^)]*\))?")
TOS = {"noecn": {0}, "ect1": {1}, "ect0": {2}, "ect01": {1, 2}, "ce": {3}}


@dataclass
class Event:
    at: float | None  # None: any time
    relative: bool
    blocking: bool
    what: str  # packet, icmp, call, command, code
    text: str
    line: int
    parts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Script:
    options: dict[str, str]
    events: list[Event]


def parse(text: str) -> Script:
    text = re.sub(r"/\*.*?\*/", lambda found: re.sub(r"[^\n]", " ", found[0]), text, flags=re.S)
    text = re.sub(r"(?m)(^|\s)//.*$", r"\1", text)
    options = dict(re.findall(r"(?m)^--(\w+)(?:=(\S+))?", text))
    text = re.sub(r"(?m)^--.*$", "", text)
    events: list[Event] = []
    at = 0
    while (start := re.compile(r"\s*").match(text, at).end()) < len(text):  # type: ignore[union-attr]
        line = text.count("\n", 0, start) + 1
        if text[start] == "`":  # what is to be run first
            at = text.index("`", start + 1) + 1
            events.append(Event(0.0, True, False, "command", text[start + 1 : at - 1], line))
            continue
        when = TIME.match(text, start)
        if not when:
            raise Unsupported(f"line {line}: {text[start:].splitlines()[0]}")
        event = Event(
            None if when["at"] == "*" else float(when["at"]), bool(when["plus"]), when["kind"] == "...", "", "", line
        )
        at = _body(text, when.end(), event)
        events.append(event)
    return Script(options, events)


def _body(text: str, at: int, event: Event) -> int:
    """Read what is to happen; where it ends."""
    end = text.find("\n", at) % (len(text) + 1)
    if text[at] == "`":
        end = text.index("`", at + 1)
        event.what, event.text = "command", text[at + 1 : end]
        return end + 1
    if text.startswith("%{", at):
        end = text.index("}%", at)
        event.what, event.text = "code", textwrap.dedent(text[at + 2 : end]).strip().rstrip("\\")
        return end + 2
    line = text[at:end]
    for what, form in (("packet", PACKET), ("icmp", ICMP)):
        if found := form.match(line):
            event.what, event.text, event.parts = what, line, found.groupdict()
            return end
    if not (called := CALL.match(text, at)):
        raise Unsupported(f"line {event.line}: {line}")
    arguments, at = _values(text, called.end(), ")")
    result = RESULT.match(text, at)
    if not result:
        raise Unsupported(f"line {event.line}: {line}")
    event.what, event.text = "call", line
    event.parts = {"name": called["name"], "arguments": arguments, "errno": result["errno"]}
    event.parts["result"] = ANY if result["value"] == "..." else int(result["value"], 0)
    return result.end()


def _values(text: str, at: int, until: str) -> tuple[Any, int]:
    """What is up to a closing mark: a list, or a dictionary if there are names with values."""
    values: list[Any] = []
    named: dict[str, Any] = {}
    name, alternative = "", False
    while True:
        token = TOKEN.match(text, at)
        if not token:
            raise Unsupported(text[at : at + 40])
        at = token.end()
        value: Any
        match token.lastgroup, token[token.lastgroup or 0]:
            case "mark", mark if mark == until:
                return named or values, at
            case "mark", "[":
                value, at = _values(text, at, "]")
            case "mark", "{":
                value, at = _values(text, at, "}")
            case "mark", "(":  # how many there are, of what comes next
                _, at = _values(text, at, ")")
                continue
            case "mark", ",":
                name = ""
                continue
            case "mark", "=":
                name = values.pop()
                continue
            case "mark", "|":
                alternative = True
                continue
            case "any", _:
                value = ANY
            case "number", number:
                value = int(number, 0)
            case "text", quoted:
                value = quoted[1:-1].encode().decode("unicode_escape").encode("latin1")
            case _, symbol:
                value = symbol if re.match(r"\s*(\(|=)", text[at:]) else constant(symbol)
        if name:
            named[name] = named[name] | value if alternative else value
        elif alternative:
            values[-1] |= value
        else:
            values.append(value)
        alternative = False


def constant(name: str) -> int:
    if name in SYMBOLS:
        return SYMBOLS[name]
    for module in (socket, os, fcntl, select, errno):
        if isinstance(value := getattr(module, name, None), int):
            return int(value)
    raise Unsupported(name)


# ---- packets ----


@dataclass
class Segment:
    """TCP, in an IP packet."""

    source: str
    dest: str
    sport: int
    dport: int
    seq: int
    ack: int
    flags: int  # the twelve bits before the window
    window: int
    options: bytes = b""
    payload: bytes = b""
    urgent: int = 0
    tos: int = 0

    @property
    def syn(self) -> bool:
        return bool(self.flags & 2)

    def packed(self) -> bytes:
        header = struct.pack(
            "!HHIIHHHH", self.sport, self.dport, self.seq % 2**32, self.ack % 2**32,
            (5 + len(self.options) // 4) << 12 | self.flags, self.window, 0, self.urgent,
        )  # fmt: skip
        return ip_packet(self.source, self.dest, 6, header + self.options + self.payload, 16, self.tos)


def total(data: bytes) -> int:
    """The checksum of the Internet, not yet turned round."""
    value = sum(struct.unpack(f"!{(len(data) + 1) // 2}H", data + b"\0" * (len(data) % 2)))
    while value >> 16:
        value = (value & 0xFFFF) + (value >> 16)
    return value


def ip_packet(source: str, dest: str, protocol: int, body: bytes, checksum_at: int, tos: int = 0) -> bytes:
    """In which the checksum at that place of the body is made."""
    ends = ip_address(source).packed + ip_address(dest).packed
    pseudo = ends + struct.pack("!IHH", len(body), 0, protocol) if protocol != 1 else b""
    sum_of = ~total(pseudo + body) & 0xFFFF
    body = body[:checksum_at] + struct.pack("!H", sum_of) + body[checksum_at + 2 :]
    if len(ends) == 32:
        return struct.pack("!IHBB", 6 << 28 | tos << 20, len(body), protocol, 64) + ends + body
    header = struct.pack("!BBHHHBBH", 0x45, tos, 20 + len(body), 0, 0, 64, protocol, 0) + ends
    return header[:10] + struct.pack("!H", ~total(header) & 0xFFFF) + header[12:] + body


def dissect(frame: bytes) -> Segment | None:
    """The TCP segment in an Ethernet frame, if there is one."""
    kind, at = struct.unpack_from("!H", frame, 12)[0], 14
    if kind == 0x0800 and frame[at + 9] == 6:
        tos, end = frame[at + 1], at + struct.unpack_from("!H", frame, at + 2)[0]
        ends, tcp = frame[at + 12 : at + 20], at + (frame[at] & 15) * 4
    elif kind == 0x86DD and frame[at + 6] == 6:
        tos, end = struct.unpack_from("!H", frame, at)[0] >> 4 & 255, len(frame)
        ends, tcp = frame[at + 8 : at + 40], at + 40
    else:
        return None
    sport, dport, seq, ack, flags, window, _, urgent = struct.unpack_from("!HHIIHHHH", frame, tcp)
    data = tcp + (flags >> 12) * 4
    half = len(ends) // 2
    source, dest = str(ip_address(ends[:half])), str(ip_address(ends[half:]))
    return Segment(
        source,
        dest,
        sport,
        dport,
        seq,
        ack,
        flags & 0xFFF,
        window,
        frame[tcp + 20 : data],
        frame[data:end],
        urgent,
        tos,
    )


def each_option(options: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(options):
        kind = options[at]
        size = 1 if kind < 2 else options[at + 1]
        yield kind, options[at : at + size]
        at += size


def written(text: str) -> bytes:
    """A script's option list."""
    found = b""
    for one in filter(None, (part.strip() for part in text.split(","))):
        match one.split():
            case ["nop"]:
                found += b"\1"
            case ["eol"]:
                found += b"\0"
            case ["mss", size]:
                found += struct.pack("!BBH", 2, 4, int(size))
            case ["wscale", shift]:
                found += bytes((3, 3, int(shift)))
            case ["sackOK"]:
                found += b"\4\2"
            case ["sack", *blocks]:
                edges = [int(edge) for block in blocks for edge in block.split(":")]
                found += struct.pack(f"!BB{len(edges)}I", 5, 2 + 4 * len(edges), *edges)
            case ["TS", "val", value, "ecr", echo]:
                found += struct.pack("!BBII", 8, 10, int(value), int(echo))
            case ["FO", *cookie]:
                found += _long(34, bytes.fromhex("".join(cookie)))
            case ["FOEXP", *cookie]:
                found += _long(254, b"\xf9\x89" + bytes.fromhex("".join(cookie)))
            case ["md5", digest]:
                found += _long(19, bytes.fromhex(digest))
            case ["ECN", *fields]:
                counts = b"".join(int(number).to_bytes(3, "big") for number in fields[1::2])
                found += _long(174 if fields[0] == "e1b" else 172, counts)
            case _:
                raise Unsupported(f"option {one}")
    return found


def _moved(sack: bytes, by: int) -> bytes:
    """A SACK option whose numbers are others'."""
    edges = struct.unpack(f"!{len(sack) // 4}I", sack[2:])
    return sack[:2] + b"".join(struct.pack("!I", (edge + by) % 2**32) for edge in edges)


def _long(kind: int, data: bytes) -> bytes:
    return bytes((kind, 2 + len(data))) + data


class Wire:
    """What is between the kernel and the script: nothing."""

    def out(self, segment: Segment) -> Segment:
        return segment

    def back(self, segment: Segment) -> Segment:
        return segment


# ---- the run ----


@dataclass
class Ends:
    """Addresses; and by what names the scripts call what differs by family."""

    family: str
    local: str
    remote: str
    prefix: int
    names: dict[str, str]

    @property
    def domain(self) -> int:
        return socket.AF_INET if self.family == "ipv4" else socket.AF_INET6

    def address(self, ip: str, port: int) -> bytes:
        """A struct sockaddr."""
        if self.family == "ipv4":
            return struct.pack("=H", socket.AF_INET) + struct.pack("!H", port) + ip_address(ip).packed + bytes(8)
        packed = ip_address(ip if ":" in ip else f"::ffff:{ip}").packed
        return struct.pack("=H", socket.AF_INET6) + struct.pack("!HI", port, 0) + packed + bytes(4)


def _ends(family: str, local: str, remote: str, prefix: int, cookie: str, zero: str) -> Ends:
    level, kind = ("SOL_IP", "IP_RECVERR") if family == "ipv4" else ("SOL_IPV6", "IPV6_RECVERR")
    names = {"TFO_COOKIE_ZERO": zero, "TFO_COOKIE": cookie, "CMSG_LEVEL_IP": level, "CMSG_TYPE_RECVERR": kind}
    return Ends(family, local, remote, prefix, names)


#: With the cookies that the kernel makes of the key in defaults.sh, and of one of nothing but zeros.
FAMILIES = {
    "ipv4": _ends("ipv4", "192.168.0.1", "192.0.2.1", 16, "3021b9d889017eeb", "b7c12350a90dc8f5"),
    "ipv6": _ends("ipv6", "fd3d:a0b:17d6::1", "fd3d:fa7b:d17d::1", 48, "c1d1e9742a47a9bc", "82af1a8f9a205c34"),
    "ipv4-mapped-ipv6": _ends(
        "ipv4-mapped-ipv6", "192.168.0.1", "192.0.2.1", 16, "3021b9d889017eeb", "b7c12350a90dc8f5"
    ),
}


class Tap:
    """tun0 of this network namespace, with a typical card's offloads; what goes out is read as it goes."""

    def __init__(self, ends: Ends, beside: tuple[str, ...] = ()) -> None:
        """``beside``: others whom packets can be sent to."""
        self._fd = os.open("/dev/net/tun", os.O_RDWR)
        fcntl.ioctl(self._fd, 0x400454CA, struct.pack("16sH22x", b"tun0", 0x0002 | 0x1000 | 0x4000))
        fcntl.ioctl(self._fd, 0x400454D0, 1 | 2 | 4 | 8)  # TSO in both families, and with ECN
        six = ":" in ends.local
        self._mtu = 1520 if six else 1500
        lines = [f"link set tun0 address {MACS[0].hex(':')} mtu {self._mtu} up"]
        lines += [f"addr add {ends.local}/{ends.prefix} dev tun0{' nodad' * six}"]
        for other in (ends.remote, *beside):
            lines += [f"neigh replace {other} lladdr {MACS[1].hex(':')} dev tun0"]
            lines += [f"route add {other} dev tun0"]
        for line in ("link set lo up", *lines):
            subprocess.run(["ip", *line.split()], check=True)
        self.seen: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()

    def reset(self) -> None:
        """As it was before a script."""
        subprocess.run(["ip", "link", "set", "tun0", "mtu", str(self._mtu), "up"], check=True)
        # It has the default again, if it has not now.
        subprocess.run(["tc", "qdisc", "del", "dev", "tun0", "root"], stderr=subprocess.DEVNULL, check=False)

    def start(self) -> None:
        """Read, in this process."""
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        while True:
            frame = os.read(self._fd, 1 << 17)
            self.seen.put((time.monotonic(), frame[10:]))

    def send(self, packet: bytes, mss: int = 0) -> None:
        kind = 0x86DD if packet[0] >> 4 == 6 else 0x0800
        header = struct.pack("=BBHHHH", 0, (4 if kind == 0x86DD else 1) if mss else 0, 0, mss, 0, 0)
        os.write(self._fd, header + MACS[0] + MACS[1] + struct.pack("!H", kind) + packet)


class Run:
    """One script, in this network namespace."""

    def __init__(self, path: Path, ends: Ends, tap: Tap, wire: Wire, port: int) -> None:
        """``port``: after which the peer's come."""
        text = path.read_text()
        for name, value in ends.names.items():
            text = text.replace(name, value)
        self.script = parse(text)
        self.folder, self.ends, self.tap, self.wire = path.parent, ends, tap, wire
        self.fds: dict[int, int] = {}
        self.now = self.scripted = 0.0
        self._pending: threading.Thread | None = None
        self._fault: BaseException | None = None
        # The socket under test: of the last connection that began.
        self.fd = -1  # in the script
        self._port, self._next = (0, 0), port
        self._local = self._remote = 0  # initial numbers on the wire
        self._scripted = (0, 0)  # and in the script
        self._stamps: dict[int, int] = {}
        self._first_stamp: tuple[int, int] | None = None
        self._late = 0.0
        self._kept: list[object] = []  # memory of calls that go on

    def run(self) -> None:
        self.tap.start()
        self.now = time.monotonic()
        for event in self.script.events:
            try:
                self._take(event)
            except (Differs, AssertionError) as fault:
                raise Differs(f"line {event.line}: {event.text.strip()[:200]}: {fault}") from None
        self._returned()

    def _take(self, event: Event) -> None:
        due = self.now
        if event.at is not None:
            due += event.at if event.relative else max(event.at - self.scripted, 0)
            self.scripted = self.scripted + event.at if event.relative else event.at
        if event.what == "packet" and event.parts["way"] == ">":
            self.now = self._expect(event, due)
            return
        while (left := due - time.monotonic()) > 0:
            time.sleep(left)  # the script's own clock: this much later
        self.now = time.monotonic()
        self._late += self.now - due
        match event.what:
            case "packet":
                self._inject(event)
            case "icmp":
                self._unreachable(event)
            case "call":
                self._call(event)
            case "command":
                done = subprocess.run(["bash", "-c", event.text], cwd=self.folder, capture_output=True, check=False)
                if done.returncode and event is self.script.events[0]:
                    raise Unsupported("the kernel does not have all that is to be set")
                check("status", 0, done.returncode)
                self.now = time.monotonic()
            case "code":
                self._code(event)

    # ---- packets ----

    def _options(self, event: Event) -> bytes:
        options = written(event.parts["options"] or "")
        if len(options) % 4:
            raise Unsupported(f"options of {len(options)} bytes")
        return options

    def _inject(self, event: Event) -> None:
        parts = event.parts
        flags, seq = _flags(parts["flags"]), int(parts["seq"])
        syn, ack = bool(flags & 2), int(parts["ack"] or 0)
        if syn and not flags & 16:
            self._next += 1
            self._begin((PORT, self._next))
            self._remote, self._scripted = seq, (0, seq)
        elif syn:
            self._remote, self._scripted = seq, (self._scripted[0], seq)
        remote = self._remote - (self._scripted[1] if syn else 0)
        local = self._local - (self._scripted[0] if syn else 0)
        options = b""
        for kind, option in each_option(self._options(event)):
            live = option
            if kind == 5:
                live = _moved(option, local)
            elif kind == 8 and flags & 16:
                value, echo = struct.unpack("!II", option[2:])
                live = option[:2] + struct.pack("!II", value, self._echo(echo))
            options += live
        tos = min(TOS[parts["tos"]]) if parts["tos"] else 0
        segment = Segment(
            self.ends.remote, self.ends.local, self._port[1], self._port[0], seq + remote,
            ack + local if flags & 16 else 0, flags, int(parts["win"] or 0), options, bytes(int(parts["size"])),
            int(parts["urg"] or 0), tos,
        )  # fmt: skip
        mss = int(self.script.options.get("mss") or 0)
        self.tap.send(self.wire.back(segment).packed(), mss)

    def _echo(self, echo: int) -> int:
        if echo in self._stamps:
            return self._stamps[echo]
        if not self._first_stamp:
            return echo
        return (echo - self._first_stamp[0] + self._first_stamp[1]) % 2**32

    def _begin(self, port: tuple[int, int]) -> None:
        self._port, self._local, self._scripted = port, 0, (0, 0)
        self._stamps, self._first_stamp = {}, None

    def _next_out(self, until: float, begins: bool) -> tuple[float, Segment]:
        """Of the socket under test; ``begins``: by this the kernel opens a connection."""
        while True:
            try:
                when, frame = self.tap.seen.get(timeout=max(until - time.monotonic(), 0.001))
            except queue.Empty:
                raise Differs("nothing came") from None
            segment = dissect(frame)
            segment = segment and self.wire.out(segment)
            if not segment or (segment.source, segment.dest) != (self.ends.local, self.ends.remote):
                continue
            if begins and segment.flags & 18 == 2 and segment.dport == PORT:
                if (segment.sport, PORT) != self._port:
                    self._begin((segment.sport, PORT))
                return when, segment
            if (segment.sport, segment.dport) == self._port:
                return when, segment

    def _expect(self, event: Event, due: float) -> float:
        parts = event.parts
        flags, seq, size = _flags(parts["flags"]), int(parts["seq"]), int(parts["size"])
        syn = bool(flags & 2)
        until = due + PATIENCE
        when, found = self._next_out(until, syn and not flags & 16)
        while found.payload and len(found.payload) < size:  # in several pieces
            _, more = self._next_out(until, False)
            check("sequence number of the next piece", (found.seq + len(found.payload)) % 2**32, more.seq)
            found.payload += more.payload
            # Where pieces end is up to who sends them, and so is which of them are pushed.
            found.flags = (found.flags | more.flags & 1) & ~8 | flags & 8
        if syn:
            self._local, self._scripted = found.seq, (seq, self._scripted[1])
        local = self._local - (self._scripted[0] if syn else 0)
        remote = self._remote - (self._scripted[1] if syn else 0)
        check("flags", f"{flags:03x}", f"{found.flags:03x}")
        check("sequence number", seq, (found.seq - local) % 2**32)
        check("size", size, len(found.payload))
        if flags & 16:
            check("acknowledgement", int(parts["ack"] or 0), (found.ack - remote) % 2**32)
        if parts["win"] is not None:
            check("window", int(parts["win"]), found.window)
        if parts["tos"] and found.tos & 3 not in TOS[parts["tos"]]:
            raise Differs(f"{parts['tos']} expected, {found.tos & 3} found")
        self._compare_options(event, found, remote)
        if event.at is not None and when < due - EARLY - self._late:
            raise Differs(f"{due - when:.3f} s early")
        return when

    def _compare_options(self, event: Event, found: Segment, remote: int) -> None:
        if event.parts["options"] == "...":
            return
        wanted, scripted = self._options(event), b""
        stamps = [struct.unpack("!II", option[2:]) for kind, option in each_option(wanted) if kind == 8]
        for kind, option in each_option(found.options):
            seen = option
            if kind == 5:
                seen = _moved(option, -remote)
            elif kind == 8 and stamps:
                value, echo = struct.unpack("!II", option[2:])
                self._stamps[stamps[0][0]] = value
                self._first_stamp = self._first_stamp or (stamps[0][0], value)
                seen = option[:2] + struct.pack("!II", stamps[0][0], echo)
            scripted += seen
        check("options", wanted.hex(" "), scripted.hex(" "))

    def _unreachable(self, event: Event) -> None:
        if self.ends.family == "ipv6":
            raise Unsupported("icmp in IPv6")
        parts = event.parts
        quoted = Segment(
            self.ends.local, self.ends.remote, *self._port, int(parts["seq"]) + self._local, 0, 16, 0,
            payload=bytes(int(parts["size"])),
        ).packed()[:28]  # fmt: skip
        codes = {None: 0, "net_unreachable": 0, "host_unreachable": 1, "protocol_unreachable": 2, "port_unreachable": 3}
        body = struct.pack("!BBHI", 3, codes[parts["code"]], 0, 0) + quoted
        self.tap.send(ip_packet(self.ends.remote, self.ends.local, 1, body, 2))

    # ---- what is true of the socket ----

    def _code(self, event: Event) -> None:
        self._returned()
        raw = (ctypes.c_char * 512)()
        size = ctypes.c_uint32(512)
        if LIBC.getsockopt(self.fds[self.fd], socket.SOL_TCP, 11, raw, ctypes.byref(size)):
            raise Differs(os.strerror(ctypes.get_errno()))
        known: dict[str, int] = {}
        at, form = 0, ""
        for word in INFO.split():
            other, _, name = word.rpartition(":")
            form = other or form
            at += -at % struct.calcsize(form)
            if at < size.value:
                known[f"tcpi_{name}"] = struct.unpack_from(f"={form}", raw, at)[0]
            at += struct.calcsize(form)
        memory = (ctypes.c_uint32 * len(MEMORY))()
        LIBC.getsockopt(
            self.fds[self.fd], socket.SOL_SOCKET, 55, memory, ctypes.byref(ctypes.c_uint32(4 * len(MEMORY)))
        )
        known.update(zip(MEMORY, memory, strict=True))
        known["tcpi_snd_wscale"], known["tcpi_rcv_wscale"] = known["tcpi_wscales"] & 15, known["tcpi_wscales"] >> 4
        try:
            exec(event.text, {**CONSTANTS, **known})
        except NameError as missing:
            raise Differs(str(missing)) from None

    # ---- system calls ----

    def _returned(self) -> None:
        """The call that was under way has returned as it should."""
        if self._pending:
            self._pending.join(PATIENCE)
            if self._pending.is_alive():
                raise Differs("the call before does not return")
            self._pending = None
            if self._fault:
                raise self._fault

    def _call(self, event: Event) -> None:
        self._returned()
        parts = event.parts
        how: Callable[..., int] | None = getattr(self, f"_{parts['name']}", None)
        if not how:
            raise Unsupported(parts["name"])

        def go() -> None:
            try:
                ctypes.set_errno(0)
                found = how(*parts["arguments"], result=parts["result"])
                failed = errno.errorcode.get(ctypes.get_errno(), "") if found < 0 else None
                if parts["result"] is not ANY:
                    check("result", (parts["result"], parts["errno"] or failed), (found, failed))
            except BaseException as fault:
                self._fault = fault

        self._fault = None
        self._pending = threading.Thread(target=go, daemon=True)
        self._pending.start()
        if not event.blocking:
            self._returned()

    def _buffer(self, what: object, size: int) -> Any:
        """``...``: memory of that size, all zeros."""
        if what is not ANY:
            return what or None
        self._kept.append(ctypes.create_string_buffer(max(size, 1)))
        return self._kept[-1]

    def _new(self, live: int, result: int) -> int:
        if live < 0:
            return live
        self.fds[result] = live
        return result

    def _there(self, *address: Any) -> tuple[bytes | None, int]:
        if address and address[0] is not ANY:
            return struct.pack("=H14x", address[0]), 16  # AF_UNSPEC
        packed = self.ends.address(self.ends.remote, PORT)
        return packed, len(packed)

    def _socket(self, domain: Any, kind: int, protocol: int, *, result: int) -> int:
        live = LIBC.socket(self.ends.domain if domain is ANY else domain, kind, protocol)
        if self.ends.family == "ipv4-mapped-ipv6" and live >= 0:
            LIBC.setsockopt(live, 41, 26, (ctypes.c_int * 1)(0), 4)  # IPV6_V6ONLY
        # A namespace has for its default what the machine allows to everybody, whatever defaults.sh says.
        LIBC.setsockopt(live, socket.SOL_TCP, socket.TCP_CONGESTION, b"cubic", 5)
        self.fd = result
        return self._new(live, result)

    def _bind(self, fd: int, *_: Any, result: int) -> int:
        local = self.ends.address(self.ends.local, PORT)
        return int(LIBC.bind(self.fds[fd], local, len(local)))

    def _listen(self, fd: int, backlog: int, *, result: int) -> int:
        return int(LIBC.listen(self.fds[fd], backlog))

    def _accept(self, fd: int, *_: Any, result: int) -> int:
        live = LIBC.accept(self.fds[fd], None, None)
        if live >= 0:
            self.fd = result
        return self._new(live, result)

    def _connect(self, fd: int, *address: Any, result: int) -> int:
        if address[0] is ANY:
            self.fd = fd
        return int(LIBC.connect(self.fds[fd], *self._there(*address)))

    def _close(self, fd: int, *, result: int) -> int:
        return int(LIBC.close(self.fds[fd]))

    def _shutdown(self, fd: int, how: int, *, result: int) -> int:
        return int(LIBC.shutdown(self.fds[fd], how))

    def _read(self, fd: int, into: Any, size: int, *, result: int) -> int:
        return int(LIBC.read(self.fds[fd], self._buffer(into, size), ctypes.c_size_t(size)))

    def _recv(self, fd: int, into: Any, size: int, flags: int, *_: Any, result: int) -> int:
        return int(LIBC.recv(self.fds[fd], self._buffer(into, size), ctypes.c_size_t(size), flags))

    _recvfrom = _recv

    def _write(self, fd: int, what: Any, size: int, *, result: int) -> int:
        return int(LIBC.write(self.fds[fd], self._buffer(what, size), ctypes.c_size_t(size)))

    def _send(self, fd: int, what: Any, size: int, flags: int, *to: Any, result: int) -> int:
        address, length = self._there(*to) if to else (None, 0)
        if flags & SYMBOLS["MSG_FASTOPEN"]:
            self.fd = fd
        return int(LIBC.sendto(self.fds[fd], self._buffer(what, size), ctypes.c_size_t(size), flags, address, length))

    _sendto = _send

    def _fcntl(self, fd: int, command: int, value: int = 0, *, result: int) -> int:
        return int(LIBC.fcntl(self.fds[fd], command, value))

    def _ioctl(self, fd: int, command: int, value: list[int], *, result: int) -> int:
        found = ctypes.c_int(0)
        done = LIBC.ioctl(self.fds[fd], command, ctypes.byref(found))
        check("value", value, [found.value])
        return int(done)

    def _setsockopt(self, fd: int, level: int, name: int, value: Any, size: int, *, result: int) -> int:
        packed = value if isinstance(value, bytes) else struct.pack("=i", value[0])
        return int(LIBC.setsockopt(self.fds[fd], level, name, packed, size))

    def _getsockopt(self, fd: int, level: int, name: int, value: list[int], size: list[int], *, result: int) -> int:
        found, length = ctypes.c_int(0), ctypes.c_uint32(size[0])
        done = LIBC.getsockopt(self.fds[fd], level, name, ctypes.byref(found), ctypes.byref(length))
        check("value", value, [found.value])
        return int(done)

    def _epoll_create(self, size: int, *, result: int) -> int:
        return self._new(LIBC.epoll_create(size), result)

    def _epoll_ctl(self, at: int, how: int, fd: int, event: dict[str, int], *, result: int) -> int:
        packed = struct.pack("=IQ", event["events"], event["fd"])
        return int(LIBC.epoll_ctl(self.fds[at], how, self.fds[fd], packed))

    def _epoll_wait(self, at: int, event: dict[str, int], most: int, wait: int, *, result: int) -> int:
        raw = ctypes.create_string_buffer(12 * most)
        found = int(LIBC.epoll_wait(self.fds[at], raw, most, wait))
        if found > 0:
            check("events", (event["events"], event.get("fd", 0)), struct.unpack_from("=IQ", raw))
        return found

    def _open(self, path: bytes, flags: int, *, result: int) -> int:
        return self._new(LIBC.open(path, flags), result)

    def _pipe(self, ends: list[int], *, result: int) -> int:
        live = (ctypes.c_int * 2)()
        done = int(LIBC.pipe(live))
        self.fds.update(zip(ends, live, strict=True))
        return done

    def _splice(self, source: int, _: int, dest: int, __: int, size: int, flags: int, *, result: int) -> int:
        return int(
            LIBC.splice(self.fds[source], None, self.fds[dest], None, ctypes.c_size_t(size), ctypes.c_uint(flags))
        )

    def _sendfile(self, out: int, source: int, offset: list[int], size: int, *, result: int) -> int:
        at = ctypes.c_long(offset[0])
        return int(LIBC.sendfile(self.fds[out], self.fds[source], ctypes.byref(at), ctypes.c_size_t(size)))

    def _sendmsg(self, fd: int, message: dict[str, Any], flags: int, *, result: int) -> int:
        header, _ = self._message(message)
        return int(LIBC.sendmsg(self.fds[fd], ctypes.byref(header), flags))

    def _recvmsg(self, fd: int, message: dict[str, Any], flags: int, *, result: int) -> int:
        header, control = self._message(message)
        found = int(LIBC.recvmsg(self.fds[fd], ctypes.byref(header), flags))
        if found < 0:
            return found
        check("flags", message.get("msg_flags", 0), header.flags)
        check("control messages", _told(message.get("msg_control", [])), _heard(control.raw[: header.controllen]))
        return found

    def _message(self, message: dict[str, Any]) -> tuple[_Header, Any]:
        """struct msghdr, and its room for control messages."""
        pieces = message["msg_iov"]
        iov = (_Piece * len(pieces))()
        for one, (_, size) in zip(iov, pieces, strict=True):
            one.base, one.size = ctypes.cast(self._buffer(ANY, size), ctypes.c_void_p), size
        control = ctypes.create_string_buffer(1024)
        header = _Header(None, 0, iov, len(pieces), None, 0, 0)
        if "msg_control" in message:
            header.control, header.controllen = ctypes.cast(control, ctypes.c_void_p), 1024
        self._kept += [iov, control, header]
        return header, control


class _Piece(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))


class _Header(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_void_p), ("namelen", ctypes.c_uint32), ("iov", ctypes.POINTER(_Piece)),
        ("iovlen", ctypes.c_size_t), ("control", ctypes.c_void_p), ("controllen", ctypes.c_size_t),
        ("flags", ctypes.c_int),
    )  # fmt: skip


ERROR = ("ee_errno", "ee_origin", "ee_type", "ee_code", "ee_info", "ee_data")


def _told(messages: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """A script's control messages, without times."""
    found = []
    for one in messages:
        data = one["cmsg_data"]
        if isinstance(data, dict):
            data = tuple(data[name] for name in ERROR) if "ee_errno" in data else None
        found.append((one["cmsg_level"], one["cmsg_type"], data))
    return found


def _heard(raw: bytes) -> list[tuple[Any, ...]]:
    found, at = [], 0
    while at + 16 <= len(raw):
        size, level, kind = struct.unpack_from("=QII", raw, at)
        data: Any = raw[at + 16 : at + size]
        if (level, kind) == (socket.SOL_SOCKET, SYMBOLS["SCM_TIMESTAMPING"]):
            data = None
        elif len(data) >= 16:
            number, origin, type_, code, _, info, more = struct.unpack_from("=IBBBBII", data)
            data = (number, origin, type_, code, info, more)
        else:
            (data,) = struct.unpack("=i", data[:4])
        found.append((level, kind, data))
        at += (size + 7) & ~7
    return found


def _flags(text: str) -> int:
    """The twelve bits: AE CWR ECE URG ACK PSH RST SYN FIN, and a count in the first three of them."""
    bits = {"F": 1, "S": 2, "R": 4, "P": 8, ".": 16, "U": 32, "E": 64, "W": 128, "A": 256, "-": 0}
    found = 0
    for letter in text:
        if letter.isdigit():
            count = int(letter)
            found |= (count & 1) << 6 | (count >> 1 & 1) << 7 | (count >> 2 & 1) << 8
        elif letter in bits:
            found |= bits[letter]
        else:
            raise Unsupported(f"flag {letter}")
    return found
