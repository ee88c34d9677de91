"""Ask a segment who has an address: a few questions by ARP and neighbour discovery, and who answers within a second.

They are ordinary questions, from this host's own address: no cache learns anything wrong of them, and whoever wants one
of the addresses too does not take them for a rival's.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor

from crablb.control.announce import parse, probe
from crablb.kernel import rtnetlink
from crablb.kernel.interface import interface_info
from crablb.kernel.rtnetlink import Netlink
from crablb.model import Address

__all__ = ["ask", "ask_all"]

ETH_P_ALL, PACKET_OUTGOING = 3, 4
#: Seconds for all answers, and from the first question to the second.
SECONDS, AGAIN = 1.0, 0.3
#: Addresses that are asked for at most.
MOST = 256


def ask(interface: str, addresses: Collection[Address]) -> dict[Address, set[str]]:
    """MAC addresses of those that answer for each of these, other than the interface's own; no more than :data:`MOST`
    are asked for.  Raises OSError (CAP_NET_RAW), :class:`crablb.errors.KernelError`."""
    asked = list(addresses)[:MOST]
    found: dict[Address, set[str]] = {address: set() for address in asked}
    if not asked:
        return found
    info = interface_info(interface)
    with Netlink() as netlink:
        sources = rtnetlink.own(netlink, info.index)
    questions = [probe(a, info.mac, next((s for s in sources if s.version == a.version), None)) for a in asked]
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, socket.htons(ETH_P_ALL)) as sock:
        sock.bind((interface, ETH_P_ALL))
        begun = time.monotonic()
        _send(sock, questions)
        again = False
        while (left := begun + SECONDS - time.monotonic()) > 0:
            if not again and left < SECONDS - AGAIN:
                again = True
                _send(sock, [q for q, address in zip(questions, asked, strict=True) if not found[address]])
            if select.select([sock], [], [], min(left, AGAIN))[0]:
                _take(sock, info.mac, found)
    return found


def ask_all(questions: Mapping[str, Collection[Address]]) -> dict[tuple[str, Address], set[str]]:
    """The same on several interfaces at once: the addresses to ask for by interface."""
    with ThreadPoolExecutor(max(len(questions), 1)) as pool:
        answers = zip(questions, pool.map(ask, questions, questions.values()), strict=True)
        return {(interface, address): macs for interface, found in answers for address, macs in found.items()}


def _send(sock: socket.socket, questions: Iterable[bytes]) -> None:
    for question in questions:
        try:
            sock.send(question)
        except BlockingIOError:  # no room now: the second time
            return


def _take(sock: socket.socket, own: bytes, found: dict[Address, set[str]]) -> None:
    """Of a flood so much that time is looked at."""
    for _ in range(64):
        try:
            frame, sender = sock.recvfrom(2048)
        except BlockingIOError:
            return
        claim = parse(frame) if sender[2] != PACKET_OUTGOING else None
        if claim and not claim.asks and claim.address in found and claim.mac != own:
            found[claim.address].add(claim.mac.hex(":"))
