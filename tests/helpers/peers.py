"""The ends of connections in the end-to-end tests: ``python -m tests.helpers.peers PROGRAM ...`` inside a node."""

from __future__ import annotations

import itertools
import json
import os
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

CHUNK = 1 << 16


def _listener(port: int) -> socket.socket:
    sock = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
    return sock


def serve(name: str, port: str) -> None:
    """Say the name, then echo until the client has no more; then say how many bytes it was."""

    def one(conn: socket.socket) -> None:
        with conn:
            conn.sendall(f"{name} {conn.getsockname()[0].removeprefix('::ffff:')}\n".encode())
            total = 0
            try:
                while data := conn.recv(CHUNK):
                    if data == b"reset me":
                        conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        return
                    total += len(data)
                    conn.sendall(data)
                conn.sendall(f"{total}\n".encode())
            except ConnectionError:
                pass

    with _listener(int(port)) as sock:
        print("ready", flush=True)
        while True:
            threading.Thread(target=one, args=(sock.accept()[0],), daemon=True).start()


def _line(conn: socket.socket) -> str:
    got = b""
    while not got.endswith(b"\n"):
        more = conn.recv(1)
        if not more:
            raise EOFError(f"connection closed after {got!r}")
        got += more
    return got.decode().strip()


def _connect(host: str, port: str, local_port: str = "0", interface: str = "") -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if local_port != "0":
        sock.bind(("", int(local_port)))
    if interface:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, interface.encode())
    sock.settimeout(30)
    sock.connect((host, int(port)))
    return sock


def _echoed(host: str, port: str, size: str, *how: str) -> dict[str, object]:
    sent = os.urandom(int(size))
    begun = time.monotonic()
    with _connect(host, port, *how) as conn:
        connected = (time.monotonic() - begun) * 1000
        peer = conn.getpeername()[0]
        name, address = _line(conn).split()

        def send() -> None:
            conn.sendall(sent)
            conn.shutdown(socket.SHUT_WR)

        thread = threading.Thread(target=send)
        thread.start()
        got = bytearray()
        while data := conn.recv(CHUNK):
            got += data
        thread.join()
    tail = f"{len(sent)}\n".encode()
    intact = bytes(got) == sent + tail
    return {"peer": peer, "server": name, "accepted_on": address, "intact": intact, "connect_ms": connected}


def echo(host: str, port: str, size: str = "1000000", *how: str) -> None:
    """Send ``size`` bytes, end the sending direction, read them back, and the server's count.

    ``how``: local port, interface.
    """
    print(json.dumps(_echoed(host, port, size, *how)))


def impatient(host: str, port: str, count: str, seconds: str) -> None:
    """``count`` connections, one after the other, each given so long to come about; what became of each."""
    for _ in range(int(count)):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as sock:
            sock.settimeout(float(seconds))
            try:
                sock.connect((host, int(port)))
                print("connected")
            except TimeoutError:
                print("given-up")


def echoes(host: str, port: str, count: str, size: str = "10") -> None:
    """``count`` connections, one after the other, each for ``size`` bytes."""
    print(json.dumps([_echoed(host, port, size) for _ in range(int(count))]))


def hold(host: str, port: str, local_port: str = "0") -> None:
    """Connect, say ready, then for each line of standard input exchange it with the server."""
    with _connect(host, port, local_port) as conn:
        _line(conn)
        print("ready", flush=True)
        for line in sys.stdin:
            conn.sendall(line.encode())
            print(_line(conn), flush=True)


def half(host: str, port: str) -> None:
    """Send, end the sending direction, say ready; when told to, read what came back."""
    with _connect(host, port) as conn:
        _line(conn)
        # More than the receive buffer holds, so that the server cannot end before it is read.
        conn.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        conn.sendall(bytes(200000))
        conn.shutdown(socket.SHUT_WR)
        print("ready", flush=True)
        sys.stdin.readline()
        got = 0
        while got < 200000:
            got += len(conn.recv(200000 - got))
        print(f"{got} bytes and {'the count' if _line(conn) == '200000' else 'no count'}", flush=True)


def keep_connecting(host: str, port: str) -> None:
    """Connect again and again, until told to end; which addresses accepted."""
    accepted, told = set(), threading.Event()
    print("ready", flush=True)
    threading.Thread(target=lambda: (sys.stdin.readline(), told.set()), daemon=True).start()
    while not told.is_set():
        accepted.add(_echoed(host, port, "10")["accepted_on"])
    print(sorted(map(str, accepted)), flush=True)


def hold_many(host: str, port: str, count: str) -> None:
    """``count`` connections; for each line of standard input exchange it on all, and tell on how many it came back."""
    conns = [_connect(host, port) for _ in range(int(count))]
    for conn in conns:
        _line(conn)
    print("ready", flush=True)
    for line in sys.stdin:
        intact = 0
        for conn in conns:
            try:
                conn.sendall(line.encode())
                intact += _line(conn) == line.strip()
            except (OSError, EOFError):
                pass
        print(intact, flush=True)


def connects(host: str, port: str, count: str) -> None:
    """``count`` connections, each until its server has spoken; how often each sent something again (None: failed)."""
    total_retrans = struct.Struct("@100xI")  # of struct tcp_info, linux/tcp.h

    def one(_: int) -> int | None:
        try:
            with _connect(host, port) as conn:
                _line(conn)
                info = conn.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, total_retrans.size)
                return int(total_retrans.unpack(info)[0])
        except (OSError, EOFError):
            return None

    with ThreadPoolExecutor(int(count)) as pool:
        print(json.dumps(list(pool.map(one, range(int(count))))), flush=True)


def hold_names(host: str, port: str, count: str) -> None:
    """``count`` connections, held; the names of the servers that they came to."""
    conns = [_connect(host, port) for _ in range(int(count))]
    print(" ".join(_line(conn).split()[0] for conn in conns), flush=True)
    sys.stdin.read()


def take_udp(host: str, port: str) -> None:
    """Bind a port, and keep it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((host, int(port)))
        print("ready", flush=True)
        sys.stdin.read()


def storm(host: str, port: str, count: str) -> None:
    """Connections that end in every way: by FIN, by RST, half closed first, and all at once with the process."""
    sockets = []
    for i in range(int(count)):
        sock = _connect(host, port)
        _line(sock)
        if i % 4 == 0:
            sock.close()
        elif i % 4 == 1:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()
        elif i % 4 == 2:
            sock.shutdown(socket.SHUT_WR)
            sockets.append(sock)
        else:
            sockets.append(sock)


def refused(host: str, port: str) -> None:
    """Connect; tell the error's name."""
    try:
        _connect(host, port).close()
        print("connected")
    except OSError as error:
        print(type(error).__name__)


def reset(host: str, port: str) -> None:
    """Ask the server for a reset; tell the error's name."""
    with _connect(host, port) as conn:
        _line(conn)
        conn.sendall(b"reset me")
        try:
            print(repr(conn.recv(1)))
        except OSError as error:
            print(type(error).__name__)


def forge(vip: str, other_vip: str, good: str, outside: str) -> None:
    """On the switch, in place of a load balancer: answer a SYN to the VIP by forged SYN-ACKs, and then a sound one.

    Then tell what the client sent back, up to its first ACK.
    """
    from ipaddress import ip_address

    from scapy.config import conf
    from scapy.layers.inet import IP, TCP
    from scapy.layers.inet6 import IPv6
    from scapy.layers.l2 import Ether

    conf.verb = 0
    layer = IPv6 if ":" in vip else IP
    sock = conf.L2socket(iface="client")
    print("ready", flush=True)
    while True:
        syn = sock.recv()
        if syn is not None and layer in syn and syn[layer].dst == vip and TCP in syn and syn[TCP].flags == "S":
            break

    def send(source: str, named: str | None, ack: int) -> None:
        options = [("MSS", 1460)]
        if named:
            options += [(42, ip_address(named).packed), ("NOP", None), ("NOP", None)]
        tcp = TCP(sport=syn[TCP].dport, dport=syn[TCP].sport, flags="SA", seq=5000, ack=ack, options=options)
        sock.send(Ether(src=syn.dst, dst=syn.src) / layer(src=source, dst=syn[layer].src) / tcp)

    isn = syn[TCP].seq
    send(good, vip, isn + 2)  # another acknowledgement number
    send(outside, vip, isn + 1)  # from outside the prefixes
    send(good, other_vip, isn + 1)  # another VIP
    send(good, None, isn + 1)  # no redirect at all
    send(good, vip, isn + 1)
    replies: list[tuple[str, str]] = []
    while not replies or replies[-1][1] != "A":
        packet = sock.recv()
        if packet is not None and packet.src == syn.src and TCP in packet and packet[TCP].flags != "S":
            replies.append((packet[layer].dst, str(packet[TCP].flags)))
    print(json.dumps(replies), flush=True)


def tell(port: str) -> None:
    """Take one request a connection, answer, and close first; for a line of standard input tell all requests so far."""
    requests = []

    def one(conn: socket.socket) -> None:
        with conn:
            if request := conn.recv(100):
                requests.append(request.decode())
                conn.sendall(request)

    def accept() -> None:
        while True:
            threading.Thread(target=one, args=(sock.accept()[0],), daemon=True).start()

    with _listener(int(port)) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 16)
        print("ready", flush=True)
        threading.Thread(target=accept, daemon=True).start()
        for _ in sys.stdin:
            print(json.dumps(requests), flush=True)


def ask(host: str, port: str, count: str, how: str = "plain") -> None:
    """``count`` requests, each with its number, each by a connection that the server closes.  ``fastopen``: in SYNs;
    ``multipath``: by MPTCP."""
    protocol = 262 if how == "multipath" else 0  # IPPROTO_MPTCP
    for i in range(int(count)):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM, protocol) as sock:
            request = f"{host} {i}".encode()
            if how == "fastopen":
                sock.sendto(request, socket.MSG_FASTOPEN, (host, int(port)))
            else:
                sock.connect((host, int(port)))
                sock.sendall(request)
            assert sock.recv(100) == request
            assert sock.recv(100) == b""
    print("done")


def signed(port: str, other: str, *connect: str) -> None:
    """Under an MD5 signature shared with ``other`` (RFC 2385): an echo server, or a client of the host given."""
    packed = socket.inet_pton(socket.AF_INET, other)
    if connect:
        sock = socket.socket()
        address = struct.pack("=HH4s120x", socket.AF_INET, 0, packed)
    else:
        sock = _listener(int(port))
        address = struct.pack("=HHI12s4s104x", socket.AF_INET6, 0, 0, bytes(10) + b"\xff\xff", packed)
    key = struct.pack("=128sBBHi80s", address, 0, 0, 3, 0, b"key")
    sock.setsockopt(socket.IPPROTO_TCP, 14, key)  # TCP_MD5SIG
    if connect:
        sock.connect((connect[0], int(port)))
        sock.sendall(b"signed\n")
        print(_line(sock), flush=True)
    else:
        print("ready", flush=True)
        conn = sock.accept()[0]
        conn.sendall(f"{_line(conn)} {conn.getsockname()[0].removeprefix('::ffff:')}\n".encode())
        conn.recv(1)


def timeouts(host: str, port: str) -> None:
    """Begin to connect; tell the SYN's timeout (us) and how often it is sent again.  For each line of standard input
    the latter again: for ``connected`` when the connection stands."""
    with socket.socket() as sock:
        sock.setblocking(False)
        sock.connect_ex((host, int(port)))
        rto = struct.unpack_from("=8xI", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 64))[0]
        print(json.dumps([rto, sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_SYNCNT)]), flush=True)
        for line in sys.stdin:
            if line.strip() == "connected":
                select.select([], [sock], [])
            print(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_SYNCNT), flush=True)


def syn(source: str, destination: str, mac: str, options: str) -> None:
    """Send one SYN with these options (hexadecimal) from a port that is not open."""
    from scapy.config import conf
    from scapy.layers.inet import IP, TCP
    from scapy.layers.inet6 import IPv6
    from scapy.layers.l2 import Ether
    from scapy.packet import Raw

    raw = bytes.fromhex(options)
    layer = IPv6 if ":" in destination else IP
    tcp = TCP(sport=4242, dport=80, flags="S", seq=77, dataofs=5 + len(raw) // 4)
    conf.L2socket(iface="eth0").send(Ether(dst=mac) / layer(src=source, dst=destination) / tcp / Raw(raw))


def syn_acks(source: str, destination: str, mac: str) -> None:
    """For each line on standard input, options and data of a SYN (hexadecimal), send it from a new port, and then one
    without; tell the options of both answers (None: none came before the second's)."""
    from scapy.config import conf
    from scapy.layers.inet import IP, TCP
    from scapy.layers.inet6 import IPv6
    from scapy.layers.l2 import Ether
    from scapy.packet import Raw

    conf.verb = 0
    layer = IPv6 if ":" in destination else IP
    sock = conf.L2socket(iface="eth0")
    port = 20000
    print("ready", flush=True)
    for line in sys.stdin:
        options, data = (bytes.fromhex(text) for text in line.rstrip("\n").split(","))
        options += bytes(-len(options) % 4)
        port += 2
        for number, (raw, payload) in enumerate(((options, data), (b"", b""))):
            tcp = TCP(sport=port + number, dport=80, flags="S", seq=77, dataofs=5 + len(raw) // 4)
            sock.send(Ether(dst=mac) / layer(src=source, dst=destination) / tcp / Raw(raw + payload))
        seen: list[str | None] = [None, None]
        while seen[1] is None:
            packet = sock.recv()
            if packet is None or TCP not in packet or packet[TCP].flags != "SA":
                continue
            if packet[TCP].dport in (port, port + 1):
                seen[packet[TCP].dport - port] = bytes(packet[TCP])[20 : packet[TCP].dataofs * 4].hex()
        print(json.dumps(seen), flush=True)


def fast_open_server(port: str) -> None:
    """Tell each request, and echo it."""
    with _listener(int(port)) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 16)
        print("ready", flush=True)

        def one(conn: socket.socket) -> None:
            with conn:
                try:
                    if data := conn.recv(100):
                        print(data.decode(), flush=True)
                        conn.sendall(data)
                except OSError:
                    pass

        while True:
            threading.Thread(target=one, args=(sock.accept()[0],), daemon=True).start()


def fast_open(host: str, port: str, text: str) -> None:
    """Send a request in the SYN; tell the answer."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.sendto(text.encode(), socket.MSG_FASTOPEN, (host, int(port)))
        print(sock.recv(100).decode(), flush=True)


def strangers(destination: str, mac: str) -> tuple[int, Callable[[Iterable[Any]], None]]:
    """SYNs to port 80 from random addresses and ports: how long each is, and what writes the next ones into frames."""
    import numpy as np
    from scapy.layers.inet import IP, TCP
    from scapy.layers.l2 import Ether

    random = np.random.default_rng(7)
    syns = []
    for _ in range(512):
        source = ".".join(str(n) for n in (11, *random.integers(1, 255, 3)))
        tcp = TCP(sport=int(random.integers(1024, 65536)), dport=80, flags="S")
        frame = bytes(Ether(src="02:00:00:00:00:01", dst=mac) / IP(src=source, dst=destination) / tcp)
        syns.append(np.frombuffer(frame, np.uint8).copy())
    words = [s[26:28].view(">u2") for s in syns]  # the first half of the source address
    sums = [s[24:26].view(">u2") for s in syns], [s[50:52].view(">u2") for s in syns]
    turns = itertools.cycle(range(len(syns)))

    def write(frames: Iterable[Any]) -> None:
        for view, i in zip(frames, turns, strict=False):
            view[:] = syns[i]
            # The next time from another address: one more in a word, one less in both checksums (RFC 1624).
            words[i][0] += 1
            for csum in sums:
                csum[i][0] = csum[i][0] - 1 if csum[i][0] else 0xFFFE

    return len(syns[0]), write


def flood(destination: str, mac: str, count: str, different: str = "") -> None:
    """Send SYNs to port 80 from random addresses and ports; tell how many.  ``different``: so many at least are, and
    what follows is the same again, which takes less time."""
    from crablb.kernel.xsk import XskSocket

    length, write = strangers(destination, mac)
    sent = 0
    with XskSocket("eth0", load_program=False) as xsk:
        while sent < int(count):
            batch = xsk.allocate(64, length)
            if sent < int(different or count):
                write(batch)  # a frame keeps what was written when it is sent
            sent += len(batch)
            xsk.send(batch)
    print(sent)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
