"""Ask a segment who has an address: a few questions by ARP and neighbour discovery, and who answers within a second.

They are ordinary questions, from this host's own address: no cache learns anything wrong of them, and whoever wants one
of the addresses too does not take them for a rival's.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress

from crablb.control.announce import ETH_P_ARP, ETH_P_IPV6, about, parse, probe
from crablb.kernel import rtnetlink, sockfilter
from crablb.kernel.interface import interface_info
from crablb.kernel.rtnetlink import LINK, Netlink
from crablb.model import Address

__all__ = ["ask", "ask_all"]

PACKET_OUTGOING = 4
#: Seconds for all answers, and from the first question to the second.
SECONDS, AGAIN = 1.0, 0.3
#: Addresses that are asked for at most.
MOST = 256


def ask(interface: str, addresses: Collection[Address]) -> dict[Address, set[str]]:
    """MAC addresses of those that answer for each of these, other than this machine's own; no more than :data:`MOST`
    are asked for.  Raises OSError (CAP_NET_RAW), :class:`crablb.errors.KernelError`."""
    asked = list(addresses)[:MOST]
    found: dict[Address, set[str]] = {address: set() for address in asked}
    info = interface_info(interface)
    if not asked or not info.up:
        return found
    with Netlink() as netlink:
        sources = rtnetlink.own(netlink, info.index)
        ours = {link.attributes(LINK).get(rtnetlink.IFLA_ADDRESS, b"") for link in rtnetlink.links(netlink)}
    questions = {a: probe(a, info.mac, next((s for s in sources if s.version == a.version), None)) for a in asked}
    with ExitStack() as stack:
        kinds = {4: ETH_P_ARP, 6: ETH_P_IPV6}
        opened = {version: stack.enter_context(_listen(interface, kind, asked)) for version, kind in kinds.items()}
        begun = time.monotonic()
        _send(opened, questions)
        again = False
        while (left := begun + SECONDS - time.monotonic()) > 0:
            if not again and left < SECONDS - AGAIN:
                again = True
                _send(opened, {address: question for address, question in questions.items() if not found[address]})
            for sock in select.select([*opened.values()], [], [], min(left, AGAIN))[0]:
                _take(sock, ours, found)
    return found


def _listen(interface: str, kind: int, addresses: Collection[Address]) -> socket.socket:
    """Hear of these addresses, and of nothing else: an interface that is served may be flooded."""
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)  # of no protocol, and so deaf
    try:
        sockfilter.attach(sock, about(kind, addresses))
        sock.bind((interface, kind))
    except BaseException:
        sock.close()
        raise
    return sock


def ask_all(questions: Mapping[str, Collection[Address]]) -> dict[tuple[str, Address], set[str]]:
    """The same on several interfaces at once: the addresses to ask for by interface."""
    with ThreadPoolExecutor(max(len(questions), 1)) as pool:
        answers = zip(questions, pool.map(ask, questions, questions.values()), strict=True)
        return {(interface, address): macs for interface, found in answers for address, macs in found.items()}


def _send(sockets: Mapping[int, socket.socket], questions: Mapping[Address, bytes]) -> None:
    for address, question in questions.items():
        with suppress(BlockingIOError):  # no room now: the second time
            sockets[address.version].send(question)


def _take(sock: socket.socket, ours: Collection[bytes], found: dict[Address, set[str]]) -> None:
    """Of a flood so much that time is looked at."""
    with suppress(BlockingIOError):  # that was all
        for _ in range(64):
            frame, sender = sock.recvfrom(2048)
            claim = parse(frame) if sender[2] != PACKET_OUTGOING else None
            if claim and not claim.asks and claim.address in found and claim.mac not in ours:
                found[claim.address].add(claim.mac.hex(":"))
