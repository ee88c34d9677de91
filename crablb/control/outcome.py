"""What became of a packet, in words."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address

from crablb.dataplane.statistics import WORKER_COUNTERS, XDP_COUNTERS
from crablb.dataplane.tap import Seen
from crablb.model import Address, Service, Vip

__all__ = ["Packet", "asides", "choice", "decision", "headers", "told"]

FIN, RST = 1, 4  # TCP flags
#: Of a worker's counters, what each says of the packet; of those, the first that counted it is the decision.
WORKER = {
    "redirected": "redirected",
    "fallback_no_offer": "fallback, as the client did not offer",
    "fallback_mode": "fallback, as the service's mode is never",
    "fallback_prefix": "fallback, as the client is outside redirect_clients",
    "fallback_no_cr_backend": "fallback, as the backend is not redirected to (cr)",
    "fallback_unsafe": "fallback, as the SYN carries data, a Fast Open option, a signature or MP_JOIN",
    "fallback_no_room": "fallback, as the redirect has no room among the TCP options",
    "fallback_retransmit": "fallback, as the SYN's copies that were redirected got no answer",
    "fallback_established": "fallback: a later packet of a connection",
    "fallback_icmp": "an ICMP error, sent to the backend whose packet it quotes",
    "too_big": "answered: too big for the way to the backend (ICMP)",
    "reset": "answered by a RST: its backend is dead",
    "refused": "answered by a RST: no backend takes connections of the service",
    "closed": "answered: a port of the VIP without a service",
    "echo": "answered: an echo request to the VIP",
    "handler_sent": "a handler sent it",
    "handler_kept": "a handler kept it",
    "drop_not_service": "dropped: no service's",
    "drop_malformed": "dropped: malformed",
    "drop_flags": "dropped: a SYN with ACK, RST or FIN",
    "drop_checksum": "dropped: a checksum is wrong",
    "drop_mapped": "dropped: an IPv4-mapped address in an IPv6 header",
    "drop_closed": "dropped: to the VIP, but no service's, and of a kind that is not answered",
    "drop_rate": "dropped: enough were answered in this second",
    "drop_no_backend": "dropped: no backend can take it",
    "drop_no_path": "dropped: the backend is behind a gateway, where DSR by MAC address does not reach it",
    "drop_too_big": "dropped: too big for the way to the backend",
    "drop_hops": "dropped: no hop is left (TTL, hop limit)",
    "drop_sent_back": "dropped: the backend sent back what was sent to it",
    "drop_handler": "dropped: its handler failed",
    "drop_tx": "dropped: the kernel refused to send it",
}
#: What more they say, beside the decision.
ASIDE = {
    "reassigned": "its backend was dead, and it got another",
    "learned": "written down for the XDP program",
    "encapsulated": "IP in IP",
    "retransmitted_syn": "a copy of a SYN that came before",
    "forged_option": "a redirect that the client sent was taken out",
    "mptcp": "its client speaks MPTCP",
    "mptcp_join": "it joins an MPTCP connection",
    "mptcp_join_known": "which is known by its token",
    "flows_full": "there was no room to remember the connection",
}
#: The same of the XDP program, which decided alone.
XDP = {
    "pass_not_vip": "left to the kernel: no VIP's",
    "pass_fragment": "left to the kernel: an IP fragment",
    "pass_ip_options": "left to the kernel: IPv4 options or IPv6 extension headers",
    "pass_malformed": "left to the kernel: cut, or malformed",
    "pass_other_mac": "left to the kernel: sent to another machine's MAC address",
    "flow": "fallback, forwarded by the XDP program alone: a connection that it knows",
    "drop_no_socket": "dropped: no worker takes packets of this queue",
    "drop_hops": "dropped: no hop is left (TTL, hop limit)",
    "drop_sent_back": "dropped: the backend sent back what was sent to it",
    "drop_mapped": "dropped: an IPv4-mapped address in an IPv6 header",
    "drop_syn_rate": "dropped: its service takes no more SYNs now (syn_rate)",
}


def decision(seen: Seen) -> tuple[str, str]:
    """The counter that says what became of a packet, and what it says."""
    known, names = (WORKER, WORKER_COUNTERS) if seen.verdict is None else (XDP, XDP_COUNTERS)
    for name in names:
        if name in seen.counters and name in known:
            return name, known[name]
    return "", "dropped" if not seen.out_length else "sent"


def asides(seen: Seen) -> list[str]:
    """What there is to say beside the decision."""
    return [text for name, text in ASIDE.items() if name in seen.counters]


def told(seen: Seen, packet: Packet | None, service: Service | None) -> str:
    """A packet's comment: the decision, the backend, why, and who decided.  ``packet``: its headers."""
    name, said = decision(seen)
    if name == "fallback_established" and packet and packet.flags & (FIN | RST):
        said = f"fallback: the end of a connection ({packet.words})"
    if seen.backend:
        said += f"; to {seen.backend}"
    facts = asides(seen)
    if seen.service and packet and packet.syn and seen.backend:
        facts.insert(0, choice(seen, service))
    who = f"worker of queue {seen.queue}" if seen.verdict is None else f"XDP program, queue {seen.queue}"
    return "; ".join([said, *facts, f"{who} [{name}]" if name else who])


def choice(seen: Seen, service: Service | None) -> str:
    """Why a SYN's backend is the one that it is."""
    if "retransmitted_syn" in seen.counters:
        return "where its first copy went"
    if "mptcp_join_known" in seen.counters:
        return "where the connection is that it joins, by its token"
    policy = service.policy if service and isinstance(service.policy, str) else "its own policy"
    return f"chosen by {policy}" if seen.chosen else "chosen by the hash table"


# ---- headers ----


@dataclass(frozen=True, slots=True)
class Packet:
    """What of a packet's headers is told."""

    source_mac: str
    destination_mac: str
    source: Address
    destination: Address
    ports: tuple[int, int] | None  # of TCP
    flags: int = 0
    options: bytes = b""
    data: int = 0  # bytes, as far as the headers say

    @property
    def syn(self) -> bool:
        return bool(self.flags & 2)

    @property
    def words(self) -> str:
        """The TCP flags, by name."""
        names = ("FIN", "SYN", "RST", "PSH", "ACK", "URG")
        return ", ".join(name for bit, name in enumerate(names) if self.flags >> bit & 1)

    @property
    def vip(self) -> Vip | None:
        return Vip(self.destination, self.ports[1]) if self.ports and self.ports[1] else None


def headers(frame: bytes) -> Packet | None:
    """Of a frame with at most two VLAN tags; None: it has no IP header, or none that is whole.  Never raises."""
    source: Address
    destination: Address
    at, kind = 14, frame[12:14]
    while kind in (b"\x81\x00", b"\x88\xa8") and at < 22:
        kind, at = frame[at + 2 : at + 4], at + 4
    macs = frame[6:12].hex(":"), frame[:6].hex(":")
    if kind == b"\x08\x00" and len(frame) >= at + 20 and frame[at] >> 4 == 4:
        source, destination = (IPv4Address(frame[at + i : at + i + 4]) for i in (12, 16))
        whole = struct.unpack_from("!H", frame, at + 2)[0]
        proto, l4 = frame[at + 9], at + (frame[at] & 15) * 4
        if struct.unpack_from("!H", frame, at + 6)[0] & 0x1FFF:
            proto = -1
    elif kind == b"\x86\xdd" and len(frame) >= at + 40 and frame[at] >> 4 == 6:
        source, destination = (IPv6Address(frame[at + i : at + i + 16]) for i in (8, 24))
        whole = 40 + struct.unpack_from("!H", frame, at + 4)[0]
        proto, l4 = frame[at + 6], at + 40
    else:
        return None
    if proto != socket.IPPROTO_TCP or len(frame) < l4 + 20:
        return Packet(*macs, source, destination, None)
    header = (frame[l4 + 12] >> 4) * 4
    return Packet(
        *macs,
        source,
        destination,
        struct.unpack_from("!HH", frame, l4),
        frame[l4 + 13],
        frame[l4 + 20 : l4 + header],
        max(0, whole - (l4 - at) - header),
    )
