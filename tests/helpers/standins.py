"""Load balancers and endpoints that are not ours, by what is known of the CRAB reference's: ``python -m
tests.helpers.standins PROGRAM ...`` inside a node.  Raw sockets, and nothing of crablb's."""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Callable, Iterator
from ipaddress import ip_address

from scapy.config import conf
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

conf.verb = 0
NOPS = b"\1\1"
SYN, ACK = 0x02, 0x10


class Segment:
    """A TCP segment that came in."""

    def __init__(self, frame: Packet) -> None:
        self.mac = frame.src
        self.ip = frame[IPv6 if IPv6 in frame else IP]
        self.layer = type(self.ip)
        self.tcp = frame[TCP]
        length = self.ip.plen if self.layer is IPv6 else self.ip.len - 4 * self.ip.ihl
        whole = bytes(self.tcp)[:length]  # a short frame is filled up
        self.options, self.data = whole[20 : self.tcp.dataofs * 4], whole[self.tcp.dataofs * 4 :]
        self.flags = int(self.tcp.flags)


def segments(sock: object, wanted: Callable[[Segment], object]) -> Iterator[Segment]:
    """Those that come in and are wanted."""
    while True:
        frame = sock.recv()  # type: ignore[attr-defined]
        if frame is not None and TCP in frame and (IP in frame or IPv6 in frame):
            segment = Segment(frame)
            if wanted(segment):
                yield segment


def walk(options: bytes) -> Iterator[tuple[int, bytes]]:
    """Options with their kinds, NOPs among them."""
    while options and options[0]:
        size = 1 if options[0] == 1 else options[1]
        yield options[0], options[:size]
        options = options[size:]


def offers(kind: int, option: bytes) -> bool:
    return (kind == 42 and len(option) == 2) or (kind == 253 and option[2:] == b"CR")


def redirect(vip: str, form: str) -> bytes:
    data = (b"CR" if form == "experimental" else b"") + ip_address(vip).packed
    return bytes([253 if form == "experimental" else 42, 2 + len(data)]) + data


def redirected(options: bytes, vip: str, form: str, where: str) -> bytes:
    """A SYN's options with the redirect, which stands for the offer where both are too much."""
    ours = redirect(vip, form)
    nops = b"\1" * (-len(ours) % 4)
    if len(options) + len(ours) + len(nops) > 40:
        options = b"".join(option for kind, option in walk(options) if kind != 1 and not offers(kind, option))
        nops = b"\1" * (-len(options + ours) % 4)
    parts = {"first": ours + nops + options, "behind": options + ours + nops, "nops": options + nops + ours}
    return parts[where]


def addressed(segment: Segment, destination: str, mac: str, options: bytes) -> Packet:
    """The segment to somebody else: with these options, and checksums that are right."""
    tcp = segment.tcp
    new = TCP(sport=tcp.sport, dport=tcp.dport, seq=tcp.seq, ack=tcp.ack, flags=tcp.flags, window=tcp.window)
    new.dataofs = 5 + len(options) // 4
    head = segment.layer(src=segment.ip.src, dst=destination)
    return Ether(dst=mac) / head / new / Raw(options + segment.data)


def redirecting(where: str, form: str, *services: str) -> None:
    """A load balancer that always redirects.  Every SYN to a VIP goes on with the redirect, to whatever port, offer or
    not, and each copy to the next backend.  Nothing else goes on.

    A service: ``VIP=DIP/MAC,DIP/MAC...``.  ``where`` the redirect goes: ``first``; ``behind`` the other options, the
    offer among them; ``nops``: there, with its NOPs before it.
    """
    backends = {}
    for service in services:
        vip, dips = service.split("=")
        backends[vip] = itertools.cycle([dip.split("/") for dip in dips.split(",")])
    sock = conf.L2socket(iface="eth0")
    print("ready", flush=True)
    for syn in segments(sock, lambda s: s.ip.dst in backends and s.flags & 0x17 == SYN):
        dip, mac = next(backends[syn.ip.dst])
        options = redirected(syn.options, syn.ip.dst, form, where)
        if len(options) <= 40:
            sock.send(addressed(syn, dip, mac, options))


def forgetful(*services: str) -> None:
    """A load balancer that knows no redirects and remembers nothing of a connection but where its last SYN went."""
    backends = {}
    for service in services:
        vip, dips = service.split("=")
        backends[vip] = itertools.cycle([dip.split("/")[1] for dip in dips.split(",")])
    last: dict[tuple[str, int], str] = {}
    sock = conf.L2socket(iface="eth0")
    print("ready", flush=True)
    for segment in segments(sock, lambda s: s.ip.dst in backends):
        key = segment.ip.src, segment.tcp.sport
        if segment.flags & SYN:
            last[key] = next(backends[segment.ip.dst])
        if key in last:
            sock.send(addressed(segment, segment.ip.dst, last[key], segment.options))


class Peer:
    """One end of a TCP connection, as far as a network without losses asks for."""

    def __init__(self, sock: object, first: Packet, port: int, remote: int, sent: int = 0) -> None:
        """``first``: what is in front of each segment's TCP header."""
        self.sock, self.first, self.ports = sock, first, {"sport": port, "dport": remote}
        self.sent = sent or random.randrange(1 << 31)
        self.got = 0

    def send(self, flags: str, data: bytes = b"", options: bytes = b"") -> None:
        tcp = TCP(**self.ports, seq=self.sent, ack=self.got, flags=flags, window=60000)
        tcp.dataofs = 5 + len(options) // 4
        self.sock.send(self.first / tcp / Raw(options + data))  # type: ignore[attr-defined]
        self.sent += len(data) + ("S" in flags) + ("F" in flags)

    def take(self, segment: Segment) -> bytes:
        """What is new in a segment; FIN counts, and is not told."""
        if segment.tcp.seq != self.got:
            return b""
        self.got += len(segment.data) + bool(segment.flags & 0x01)
        return segment.data


def client(vip: str, source: str, mac: str, count: str) -> None:
    """The reference's client: it offers nothing, takes a redirect from whoever answers, and goes on with him.

    ``count`` echoes of ten bytes; tell the backends that served.  The kernel of this host must send no RSTs.
    """
    layer = IPv6 if ":" in vip else IP
    sock = conf.L2socket(iface="eth0")
    served = []
    for port in range(30000, 30000 + int(count)):
        peer = Peer(sock, Ether(dst=mac) / layer(src=source, dst=vip), port, 80)
        begun = peer.sent
        peer.send("S", options=b"\2\4\5\xb4")
        mine = segments(sock, lambda s, port=port: s.ip.dst == source and s.tcp.dport == port)  # type: ignore[misc]
        answer = next(mine)
        assert answer.flags & (SYN | ACK) == SYN | ACK and answer.tcp.ack == begun + 1, answer.flags
        assert redirect(vip, "crab") in [option for _, option in walk(answer.options)], answer.options
        peer.first = Ether(dst=answer.mac) / layer(src=source, dst=answer.ip.src)
        peer.got = answer.tcp.seq + 1
        peer.send("A")
        peer.send("PA", b"0123456789")
        peer.send("FA")
        said = b""
        while not said.endswith(b"\n012345678910\n"):
            segment = next(mine)
            assert segment.ip.src == answer.ip.src, segment.ip.src
            said += peer.take(segment)
            peer.send("A")
        assert said.split()[1].decode() == answer.ip.src, said
        served.append(answer.ip.src)
    print(" ".join(served), flush=True)


def server(name: str, dip: str, mac: str) -> None:
    """The reference's server, which echoes to clients behind a link-layer address: its SYN-ACK repeats the SYN's
    redirect, NOPs before it."""
    sock = conf.L2socket(iface="eth0")
    peers: dict[tuple[str, int], Peer] = {}
    counts: dict[tuple[str, int], int] = {}
    print("ready", flush=True)
    for segment in segments(sock, lambda s: s.ip.dst == dip and s.tcp.dport == 80):
        key = segment.ip.src, segment.tcp.sport
        if segment.flags & SYN:
            wanted = 6 if segment.layer is IP else 18
            echoed = [option for kind, option in walk(segment.options) if kind == 42 and len(option) == wanted]
            peer = Peer(sock, Ether(dst=mac) / segment.layer(src=dip, dst=segment.ip.src), 80, key[1])
            peers[key], counts[key] = peer, 0
            peer.got = segment.tcp.seq + 1
            peer.send("SA", options=b"\2\4\5\xb4" + b"".join(NOPS + option for option in echoed))
            peer.send("PA", f"{name} {dip}\n".encode())
        elif peer := peers.get(key):
            if data := peer.take(segment):
                counts[key] += len(data)
                peer.send("PA", data)
            if segment.flags & 0x01 and segment.tcp.seq + len(segment.data) + 1 == peer.got:
                peer.send("FPA", f"{counts[key]}\n".encode())
                del peers[key]


if __name__ == "__main__":
    {f.__name__: f for f in (redirecting, forgetful, client, server)}[sys.argv[1]](*sys.argv[2:])
