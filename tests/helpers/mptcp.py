"""Multipath TCP in a lab: its ends, and what passes the load balancer.

``python -m tests.helpers.mptcp PROGRAM ...`` inside a node; :class:`Ends` and the functions for tests.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crablb.lab.middlebox import KIND, SUBTYPES, Middlebox, options, segment_at
from tests.helpers.processes import exchange

if TYPE_CHECKING:
    import subprocess

    from crablb.lab import Lab, Node
    from tests.helpers.world import World

IPPROTO_MPTCP = 262
TCP_IS_MPTCP = 43
#: Packets of a connection by the load balancer: 9, and more on a machine that is late to move it; without, thousands.
FEW = 60
CHUNK = 1 << 16
#: What a client asks of a server: a letter, and a number of bytes.
HEAD = struct.Struct("!cI")
TOLD = 120  # of bytes up, what came, as text
UP, DOWN, PING, ABOUT = b"u", b"d", b"p", b"a"


# ---- the ends: programs ----


def _multipath(sock: socket.socket) -> bool:
    """Whether it is an MPTCP connection, and has not fallen back to TCP."""
    try:
        return bool(sock.getsockopt(socket.IPPROTO_TCP, TCP_IS_MPTCP))
    except OSError:  # a TCP socket of an older kernel
        return False


def _read(sock: socket.socket, count: int) -> bytes:
    got = bytearray()
    while len(got) < count:
        more = sock.recv(min(CHUNK, count - len(got)))
        if not more:
            raise EOFError(f"connection closed after {len(got)} of {count} bytes")
        got += more
    return bytes(got)


def _read_line(sock: socket.socket) -> str:
    got = b""
    while not got.endswith(b"\n"):
        got += _read(sock, 1)
    return got.decode().strip()


def _data(count: int, start: bytes = b"") -> bytes:
    """So many bytes, of which each eight say whose they are (at random, or as ``start`` says) and which."""
    whose = start[:4].ljust(4) if start else os.urandom(4)
    words = (count + 7) // 8
    numbers = struct.pack(f">{words}I", *range(words))
    data = bytearray(8 * words)
    for i in range(4):
        data[i::8], data[4 + i :: 8] = whose[i : i + 1] * words, numbers[i::4]
    return bytes(data[:count])


def _difference(got: bytes) -> str:
    """Where it is not as :func:`_data` made it."""
    wanted = _data(len(got), got)
    if got == wanted:
        return f"{len(got)} bytes of one kind"
    at = next(i for i in range(len(got)) if got[i] != wanted[i])
    wrong = sum(a != b for a, b in zip(got, wanted, strict=True))
    found, sent = got[at & ~7 :][:24].hex(" ", 8), wanted[at & ~7 :][:8].hex()
    return f"{wrong} of {len(got)} bytes, from {at} on: {found}, not {sent}"


def _serve_one(sock: socket.socket, name: str) -> None:
    with sock, suppress(OSError, EOFError):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.sendall(f"{name} {sock.getsockname()[0].removeprefix('::ffff:')}\n".encode())
        while True:
            try:
                asked, count = HEAD.unpack(_read(sock, HEAD.size))
            except EOFError:
                return
            if asked == UP:
                came = _read(sock, count)
                sock.sendall(hashlib.sha256(came).digest() + _difference(came).encode().ljust(TOLD)[:TOLD])
            elif asked == DOWN:
                data = _data(count)
                sock.sendall(data)
                sock.sendall(hashlib.sha256(data).digest())
            elif asked == ABOUT:
                sock.sendall(bytes([_multipath(sock)]))
            else:
                sock.sendall(_read(sock, count))


def listener(port: int, address: str = "::", protocol: str = "mptcp") -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM, IPPROTO_MPTCP if protocol == "mptcp" else 0)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, address != "::")
    sock.bind((address, port))
    sock.listen(1024)
    return sock


def accept(sock: socket.socket, name: str) -> None:
    """Do what clients ask for."""
    while True:
        threading.Thread(target=_serve_one, args=(sock.accept()[0], name), daemon=True).start()


def serve(name: str, port: str, address: str = "::", protocol: str = "mptcp") -> None:
    """Do what clients ask for.  On an address, or on all; by MPTCP, or ``tcp``."""
    with listener(int(port), address, protocol) as sock:
        print("ready", flush=True)
        accept(sock, name)


class Connection:
    """A client's end."""

    def __init__(self, host: str, port: int, protocol: str = "mptcp") -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self.socket = socket.socket(family, socket.SOCK_STREAM, IPPROTO_MPTCP if protocol == "mptcp" else 0)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.settimeout(60)
        self.socket.connect((host, port))
        self.server, self.accepted_on = _read_line(self.socket).split()
        self.wrong = ""  # what the last bytes were, if they did not arrive

    def about(self) -> dict[str, Any]:
        """Whom it is with, and whether each side has MPTCP."""
        self.socket.sendall(HEAD.pack(ABOUT, 0))
        there = bool(_read(self.socket, 1)[0])
        return {
            "peer": self.socket.getpeername()[0],
            "port": self.socket.getsockname()[1],
            "server": self.server,
            "accepted_on": self.accepted_on,
            "mptcp": _multipath(self.socket),
            "mptcp_there": there,
        }

    def up(self, count: int) -> bool:
        """Send so many bytes; whether they arrived."""
        data = _data(count)
        self.socket.sendall(HEAD.pack(UP, count))
        self.socket.sendall(data)
        digest, told = _read(self.socket, 32), _read(self.socket, TOLD)
        self.wrong = f"{count} bytes up: {told.decode(errors='replace').strip()}"
        return digest == hashlib.sha256(data).digest()

    def down(self, count: int) -> bool:
        """Have so many bytes sent; whether they arrived."""
        self.socket.sendall(HEAD.pack(DOWN, count))
        data = _read(self.socket, count)
        if _read(self.socket, 32) == hashlib.sha256(data).digest():
            return True
        self.wrong = f"{count} bytes down: {_difference(data)}"
        return False

    def ping(self) -> float:
        """A few bytes there and back; the seconds that it took."""
        data = os.urandom(8)
        begun = time.monotonic()
        self.socket.sendall(HEAD.pack(PING, len(data)) + data)
        assert _read(self.socket, len(data)) == data
        return time.monotonic() - begun

    def close(self) -> None:
        """End it, and wait until the server has."""
        self.socket.shutdown(socket.SHUT_WR)
        assert not self.socket.recv(1)
        self.socket.close()


class Pinging:
    """Ping, one after the other, a millisecond between, until the end."""

    def __init__(self, connection: Connection) -> None:
        self._connection, self._stop = connection, threading.Event()
        self.count, self.longest = 0, 0.0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with suppress(OSError, EOFError):
            while not self._stop.wait(0.001):
                self.longest = max(self.longest, self._connection.ping())
                self.count += 1

    def end(self) -> dict[str, Any]:
        alive = self._thread.is_alive()
        self._stop.set()
        self._thread.join()
        return {"pings": self.count, "longest_ms": self.longest * 1000, "alive": alive}


def hold(host: str, port: str, protocol: str = "mptcp") -> None:
    """Connect, say ready, and do what standard input says, a line each; tell what came of it, as JSON.

    ``up BYTES``, ``down BYTES``, ``ping COUNT``; ``begin`` to ping, ``pinged`` how often so far, ``end``; ``about``;
    ``close``.
    """
    connection = Connection(host, int(port), protocol)
    pinging: Pinging | None = None
    print("ready", flush=True)
    for line in sys.stdin:
        what, *rest = line.split()
        told: Any
        try:
            if what in ("up", "down"):
                told = getattr(connection, what)(int(rest[0]))
            elif what == "ping":
                told = max(connection.ping() for _ in range(int(rest[0]))) * 1000
            elif what == "begin":
                pinging, told = Pinging(connection), None
            elif what == "pinged":
                assert pinging
                told = pinging.count
            elif what == "end":
                assert pinging
                told = pinging.end()
            elif what == "close":
                told = connection.close()
            else:
                told = connection.about()
        except (OSError, EOFError) as error:
            told = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(told), flush=True)


def hold_many(host: str, port: str, count: str, protocol: str = "mptcp") -> None:
    """``count`` connections; for a line ``ping`` tell on how many it came back, for ``about`` what each says (None: it
    is dead), as JSON."""
    connections = [Connection(host, int(port), protocol) for _ in range(int(count))]
    print("ready", flush=True)
    for line in sys.stdin:
        said: list[Any] = []
        for one in connections:
            try:
                said.append(one.about() if line.strip() == "about" else one.ping())
            except (OSError, EOFError):
                said.append(None)
        told = said if line.strip() == "about" else sum(one is not None for one in said)
        print(json.dumps(told), flush=True)


def visit(port: str) -> None:
    """For each line, a host and a protocol, connect and send some bytes; tell what it was, as JSON.  A host's last
    connection stays."""
    held: dict[str, Connection] = {}
    print("ready", flush=True)
    for line in sys.stdin:
        host, protocol = line.split()
        if host in held:
            held.pop(host).close()
        held[host] = one = Connection(host, int(port), protocol)
        print(json.dumps({**one.about(), "intact": one.up(1000)}), flush=True)


def echoes(host: str, port: str, count: str, size: str, protocol: str = "mptcp") -> None:
    """``count`` connections, one after the other, each with so many bytes up and down; tell what each was."""
    told = []
    for _ in range(int(count)):
        one = Connection(host, int(port), protocol)
        told.append({**one.about(), "intact": one.up(int(size)) and one.down(int(size))})
        one.close()
    print(json.dumps(told), flush=True)


def forge_joins(destination: str, mac: str, count: str) -> None:
    """SYNs with MP_JOIN (RFC 8684, 3.2), each with another token, from ports and addresses that nobody has."""
    from scapy.layers.inet import IP, TCP
    from scapy.layers.l2 import Ether
    from scapy.packet import Raw

    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sock:
        sock.bind(("eth0", 0))
        for number in range(int(count)):
            join = bytes([KIND, 12, 0x10, 1]) + os.urandom(8)
            tcp = TCP(sport=1024 + number, dport=80, flags="S", seq=7, dataofs=8)
            frame = Ether(src=_own_mac(), dst=mac) / IP(src="10.0.0.250", dst=destination) / tcp / Raw(join)
            sock.send(bytes(frame))


def _own_mac() -> str:
    return Path("/sys/class/net/eth0/address").read_text().strip()


# ---- for tests ----


class Box(Middlebox):
    """A middlebox on a cable of a world's lab."""

    def __init__(self, world: World, cable: str = "client") -> None:
        super().__init__(world.lab, cable)


VIPS = {4: "10.0.0.100", 6: "fd00::100"}


class Ends:
    """MPTCP servers on a world's servers, and clients in its client."""

    def __init__(self, world: World) -> None:
        self.world = world

    def servers(self, *, port: int = 80, protocol: str = "mptcp", vip_alone: int = 0) -> None:
        """On all addresses, or on the VIP of this family alone."""
        for server in self.world.lab.servers:
            address = VIPS[vip_alone] if vip_alone else "::"
            self.world.python(server, "serve", server.name, str(port), address, protocol, module="mptcp", ready=True)

    def hold(self, host: str, *, port: int = 80, protocol: str = "mptcp", node: Node | None = None) -> Held:
        client = node or self.world.lab.client
        return Held(self.world.python(client, "hold", host, str(port), protocol, module="mptcp", ready=True))

    def hold_many(self, host: str, count: int, *, port: int = 80, protocol: str = "mptcp") -> Held:
        many = (host, str(port), str(count), protocol)
        return Held(self.world.python(self.world.lab.client, "hold_many", *many, module="mptcp", ready=True))

    def visitor(self, *, port: int = 80) -> Held:
        """Who connects when he is told: ``tell(host, protocol)``."""
        return Held(self.world.python(self.world.lab.client, "visit", str(port), module="mptcp", ready=True))

    def echoes(
        self, host: str, count: int = 1, size: int = 100000, *, port: int = 80, protocol: str = "mptcp"
    ) -> list[dict[str, Any]]:
        """Connections one after the other; what each was.  All are intact."""
        child = self.world.python(
            self.world.lab.client, "echoes", host, str(port), str(count), str(size), protocol, module="mptcp"
        )
        out, err = child.communicate(timeout=300)
        assert child.returncode == 0, err
        seen: list[dict[str, Any]] = json.loads(out)
        assert all(one["intact"] for one in seen), seen
        return seen


class Held:
    """A client's open connection, or many (:func:`hold`, :func:`hold_many`)."""

    def __init__(self, child: subprocess.Popen[str]) -> None:
        self.child = child

    def tell(self, *line: object) -> Any:
        """What comes of a line."""
        return json.loads(exchange(self.child, " ".join(map(str, line))))

    def begin(self) -> None:
        """Ping from now on; on return some have come back."""
        self.tell("begin")
        self.more()

    def more(self, count: int = 20, seconds: float = 30) -> None:
        """Wait until so many more have come back."""
        wanted, end = self.tell("pinged") + count, time.monotonic() + seconds
        while self.tell("pinged") < wanted:
            assert time.monotonic() < end, "no pings come back any more"

    def end(self) -> float:
        """Ping no more; the longest that one took, in milliseconds."""
        told = self.tell("end")
        assert told["alive"], told
        longest: float = told["longest_ms"]
        return longest


def prepare_client(node: Node) -> None:
    """All that a stock client needs: it takes up one address that it is told."""
    node.run("ip", "mptcp", "limits", "set", "add_addr_accepted", "1", "subflows", "2")


def prepare_server(node: Node, *, port: int = 0, backup: bool = True) -> None:
    """What ``agent server --mptcp`` does, by iproute2: the C flag, its addresses told, the VIPs for need alone."""
    node.set({"net.mptcp.allow_join_initial_addr_port": 0})
    ends = [f"endpoint add {node.ip4} signal", f"endpoint add {node.ip6} signal"]
    ends = [f"{end} port {port}" for end in ends] if port else ends
    if backup:
        ends += [f"endpoint add {vip} backup" for vip in VIPS.values()]
    for end in ends:
        node.run("ip", "mptcp", *end.split())


@contextmanager
def cut(lab: Lab, node: str) -> Iterator[None]:
    """Nothing comes through on the cable of a node while in the context; both its ends stay up."""
    rules = "".join(
        f'chain {hook} {{ type filter hook {hook} device "{node}" priority 0; drop; }}\n'
        for hook in ("ingress", "egress")
    )
    with _table(lab, "cut", rules):
        yield


@contextmanager
def direct_cut(lab: Lab, *servers: Node) -> Iterator[None]:
    """While in the context nothing comes through between the client and the servers' own addresses (all servers')."""
    rules = ""
    for hook, whose in (("ingress", "daddr"), ("egress", "saddr")):
        lines = [f"{ip} {whose} {a} drop;" for s in servers or lab.servers for ip, a in (("ip", s.ip4), ("ip6", s.ip6))]
        # What asks for neighbours is no connection's.
        lines.insert(0, "meta l4proto ipv6-icmp accept;")
        rules += f'chain {hook} {{ type filter hook {hook} device "client" priority 0; {" ".join(lines)} }}\n'
    with _table(lab, "direct", rules):
        yield


@contextmanager
def _table(lab: Lab, name: str, rules: str) -> Iterator[None]:
    lab.middle.run("nft", "-f", "-", input=f"table netdev {name} {{\n{rules}}}\n")
    try:
        yield
    finally:
        lab.middle.run("nft", "delete", "table", "netdev", name)


class Passed:
    """TCP segments that a client sent, by where they went: counted while in the context of :func:`passing`."""

    def __init__(self) -> None:
        self.lb = 0  # packets that came to the load balancer; a SYN that a busy machine sends again counts once
        self.payload = 0  # bytes of TCP payload in them
        self.direct = 0  # packets to addresses of servers
        self.subtypes: Counter[str] = Counter()  # MPTCP options at the load balancer


@contextmanager
def passing(world: World) -> Iterator[Passed]:
    """Count on the cables of the load balancer and of the client; the lab is without offloads, so packets are the
    wire's."""
    lab, passed = world.lab, Passed()
    at_lb, at_client = world.folder / "at-lb.pcap", world.folder / "at-client.pcap"
    direct = " or ".join(f"dst host {address}" for server in lab.servers for address in (server.ip4, server.ip6))
    came = f"ether dst {lab.lb.mac()} and (tcp or (ip6 and ip6[6] == 6))"
    with (
        lab.middle.capture(at_lb, came, "lb"),
        lab.middle.capture(at_client, f"ether src {lab.client.mac()} and tcp and ({direct})", "client"),
    ):
        yield passed
    names = {number: name for name, number in SUBTYPES.items()}
    syns = set[bytes]()
    for frame, length in _frames(at_lb):
        tcp = segment_at(frame)
        assert tcp is not None
        ports_and_number, syn = frame[tcp : tcp + 8], frame[tcp + 13] & 2
        passed.lb += not (syn and ports_and_number in syns)
        if syn:
            syns.add(ports_and_number)
        total = int.from_bytes(frame[16:18], "big") + 14 if frame[12:14] == b"\x08\x00" else length
        passed.payload += total - tcp - 4 * (frame[tcp + 12] >> 4)
        for kind, begin, _ in options(frame, tcp):
            if kind == KIND:
                passed.subtypes[names[frame[begin + 2] >> 4]] += 1
    passed.direct = sum(1 for _ in _frames(at_client))


def _frames(path: Path) -> Iterator[tuple[bytes, int]]:
    """The frames of a capture, as far as they were kept, and their lengths on the wire."""
    with open(path, "rb") as file:
        file.read(24)
        while head := file.read(16):
            _, _, kept, length = struct.unpack("=4I", head)
            yield file.read(kept), length


def subflows(node: Node) -> list[tuple[str, str]]:
    """The TCP connections of the node that are up, each by its own and the other address."""
    shown = node.run("ss", "-tnH", "state", "established").stdout.splitlines()
    return [tuple(end.rpartition(":")[0].strip("[]") for end in line.split()[2:4]) for line in shown]  # type: ignore[misc]


if __name__ == "__main__":
    {f.__name__: f for f in (serve, hold, hold_many, visit, echoes, forge_joins)}[sys.argv[1]](*sys.argv[2:])
