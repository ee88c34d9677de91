"""A middlebox in a lab: it delays frames, and takes MPTCP's options out of them.

``python -m crablb.lab.middlebox ONE OTHER`` carries frames between two interfaces; :class:`Middlebox` puts it in a lab.
"""

from __future__ import annotations

import json
import select
import socket
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress

from crablb.errors import KernelError
from crablb.lab.lab import VIP4, VIP6, Lab

CHUNK = 1 << 16
#: The option's kind and subtypes (RFC 8684, 3).
KIND = 30
SUBTYPES = {"capable": 0, "join": 1, "dss": 2, "add_addr": 3, "remove_addr": 4, "prio": 5, "fail": 6, "fastclose": 7}
SYN, ACK = 0x02, 0x10
PACKET_IGNORE_OUTGOING = 23


def _sum(data: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def segment_at(frame: bytes) -> int | None:
    """Where the TCP header of an untagged frame is; None if it has none."""
    kind = frame[12:14]
    if kind == b"\x08\x00" and frame[23] == 6 and not int.from_bytes(frame[20:22], "big") & 0x1FFF:
        return 14 + 4 * (frame[14] & 15)
    if kind == b"\x86\xdd" and frame[20] == 6:
        return 54
    return None


def options(frame: bytes, tcp: int) -> Iterator[tuple[int, int, int]]:
    """The kind of each TCP option, where it begins and ends."""
    at, end = tcp + 20, min(tcp + 4 * (frame[tcp + 12] >> 4), len(frame))
    while at < end and frame[at]:
        size = 1 if frame[at] == 1 else frame[at + 1] if at + 1 < end else 0
        if not size or at + size > end:
            return
        yield frame[at], at, at + size
        at += size


def stripped(frame: bytes, what: frozenset[str]) -> bytes:
    """The frame without some MPTCP options, for which NOPs stand.

    ``what``: ``syn``, ``synack``, ``later``: all in such segments; or a subtype (:data:`SUBTYPES`), wherever it is.
    """
    tcp = segment_at(frame)
    if tcp is None or len(frame) < tcp + 20:
        return frame
    flags = frame[tcp + 13] & (SYN | ACK)
    where = {SYN: "syn", SYN | ACK: "synack"}.get(flags, "later")
    gone = [
        (begin, end)
        for kind, begin, end in options(frame, tcp)
        if kind == KIND and (where in what or any(SUBTYPES.get(one) == frame[begin + 2] >> 4 for one in what))
    ]
    if not gone:
        return frame
    new, first, last = bytearray(frame), tcp + 20, tcp + 4 * (frame[tcp + 12] >> 4)
    for begin, end in gone:
        new[begin:end] = b"\1" * (end - begin)
    old_sum = int.from_bytes(frame[tcp + 16 : tcp + 18], "big")
    changed = (~old_sum & 0xFFFF, ~_sum(frame[first:last]) & 0xFFFF, _sum(bytes(new[first:last])))
    new[tcp + 16 : tcp + 18] = (~_sum(struct.pack("!3H", *changed)) & 0xFFFF).to_bytes(2, "big")
    return bytes(new)


def box(one: str, other: str) -> None:
    """Carry frames between two interfaces, and do to them what standard input says, a line each; answer ``done``.

    ``delay SECONDS`` each way; ``strip WHAT,...`` (:func:`stripped`); without a value: no more.
    """
    socks = []
    for name in (one, other):
        sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        sock.setsockopt(263, PACKET_IGNORE_OUTGOING, 1)  # SOL_PACKET
        sock.setsockopt(socket.SOL_SOCKET, 33, 16 << 20)  # SO_RCVBUFFORCE: what comes while the program does not run
        sock.bind((name, 3))
        sock.setblocking(False)
        socks.append(sock)
    across = dict(zip(socks, reversed(socks), strict=True))
    waiting: dict[socket.socket, deque[tuple[float, bytes]]] = {sock: deque() for sock in socks}
    delay, what = 0.0, frozenset[str]()
    poll = select.poll()
    for fd in (*socks, sys.stdin):
        poll.register(fd, select.POLLIN)
    print("ready", flush=True)
    while True:
        dues = [frames[0][0] for frames in waiting.values() if frames]
        timeout = max(min(dues) - time.monotonic(), 0) * 1000 if dues else None
        ready = dict(poll.poll(timeout))
        if sys.stdin.fileno() in ready:
            line = sys.stdin.readline().split()
            if not line:
                return
            value = line[1] if len(line) > 1 else ""
            if line[0] == "delay":
                delay = float(value or 0)
            else:
                what = frozenset(value.split(",")) if value else frozenset()
            print("done", flush=True)
        for sock in socks:
            if sock.fileno() in ready:
                with suppress(BlockingIOError):
                    for _ in range(64):
                        waiting[across[sock]].append((time.monotonic() + delay, stripped(sock.recv(CHUNK), what)))
            now = time.monotonic()
            frames = waiting[sock]
            while frames and frames[0][0] <= now:
                with suppress(OSError):  # the interface is down: the frame is lost
                    sock.send(frames[0][1])
                frames.popleft()


class Middlebox:
    """A middlebox on the cable between a node and the middle (:func:`box`).  The lab is without offloads."""

    def __init__(self, lab: Lab, cable: str = "client") -> None:
        middle = lab.middle
        mac, routed = middle.mac(cable), lab.topology == "routed" and cable in ("client", "lb")
        addresses: list[str] = []
        if routed:
            for one in json.loads(middle.run("ip", "-j", "address", "show", "dev", cable, "scope", "global").stdout):
                addresses += [f"{each['local']}/{each['prefixlen']}" for each in one.get("addr_info", ()) if each]
        far, near = f"{cable}-far", f"{cable}-near"
        middle.ip(
            f"link set {cable} down",
            *([] if routed else [f"link set {cable} nomaster"]),
            f"addr flush dev {cable}",
            f"link set {cable} name {far}",
            f"link set {far} address 02:00:00:00:fa:00",
            f"link add {cable} address {mac} type veth peer name {near}",
        )
        for name in (far, near, cable):
            middle.run("ethtool", "-K", name, "tx", "off", "tso", "off", "gso", "off")
        # The middle itself takes nothing of what comes in at the box.
        for name in (far, near):
            middle.set({f"net.ipv6.conf.{name}.disable_ipv6": 1})
        drop = "".join(
            f'chain {name} {{ type filter hook ingress device "{name}" priority 0; drop; }}\n' for name in (far, near)
        )
        middle.run("nft", "-f", "-", input=f"table netdev box-{cable} {{\n{drop}}}\n")
        middle.ip(
            f"link set {far} up",
            f"link set {near} up",
            *([] if routed else [f"link set {cable} master br0"]),
            f"link set {cable} up",
            *(f"addr add {address} dev {cable}{' nodad' if ':' in address else ''}" for address in addresses),
        )
        if routed and cable == "lb":
            for vip, via in ((VIP4, lab.lb.ip4), (VIP6, lab.lb.ip6)):
                middle.ip(f"route replace {vip} via {via}")
        self._child = middle.popen(
            *(sys.executable, "-m", "crablb.lab.middlebox", far, near),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self._expect("ready")

    def delay(self, seconds: float) -> None:
        """Each frame takes so long, each way."""
        self._tell(f"delay {seconds}")

    def strip(self, *what: str) -> None:
        """These MPTCP options go (:func:`stripped`); none: no more."""
        self._tell(f"strip {','.join(what)}")

    def _tell(self, line: str) -> None:
        assert self._child.stdin
        self._child.stdin.write(line + "\n")
        self._child.stdin.flush()
        self._expect("done")

    def _expect(self, word: str) -> None:
        assert self._child.stdout and self._child.stderr
        if self._child.stdout.readline().strip() != word:
            raise KernelError(f"the middlebox has ended: {self._child.stderr.read().strip()[-500:]}")


if __name__ == "__main__":
    box(*sys.argv[1:])
