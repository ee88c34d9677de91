"""Option lists, checksums and the load balancer's decision for one frame."""

from __future__ import annotations

import hashlib
import ipaddress
import math
import struct
from dataclasses import dataclass, field
from itertools import groupby

from tests.reference.maglev import slot
from tests.reference.options import NOP, answer, offer, parse, redirect
from tests.reference.siphash import siphash

FIN, SYN, RST, ACK = 1, 2, 4, 16


def split(options: bytes) -> tuple[list[bytes], bytes]:
    """An option list as single options, and the rest that cannot be read (or begins with EOL)."""
    found, rest = parse(options)
    return [o.raw for o in found], rest


def rewrite(options: bytes, experimental: bool, vip: bytes | None) -> bytes | None:
    """The list that goes on, None if it does not fit.

    Each run of NOPs and CR options becomes a redirect to ``vip`` (the first), or nothing, and NOPs, under four, which
    keep what is behind at its alignment.  Without such a run the redirect is in front."""
    found, rest = parse(options)
    option = redirect(vip, experimental).raw if vip else b""
    out = b""
    for ours, run in groupby(found, lambda o: o.kind == NOP or o.is_cr):
        listed = list(run)
        before = b"".join(o.raw for o in listed)
        if ours and any(o.is_cr for o in listed):
            out += option + b"\x01" * ((len(before) - len(option)) % 4)
            option = b""
        else:
            out += before
    out = option + b"\x01" * (-len(option) % 4) + out + rest
    return out if len(out) <= 40 else None


def blank(options: bytes) -> bytes:
    """The list with NOPs in place of what clients do not send."""
    found, rest = parse(options)
    return b"".join(b"\x01" * len(o.raw) if o.is_forged else o.raw for o in found) + rest


def fits(options: bytes, experimental: bool, vip: bytes) -> bool:
    """Has the redirect room, in the SYN and in its answer?"""
    found = parse(options)[0]
    if any(o.subtype == 0 for o in found) and answer(found) + (8 if len(vip) == 4 else 20) > 40:
        return False
    return rewrite(options, experimental, vip) is not None


def checksum(data: bytes) -> int:
    """RFC 1071, network order."""
    if len(data) % 2:
        data += b"\0"
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def is_mapped(address: bytes) -> bool:
    return len(address) == 16 and ipaddress.IPv6Address(address).ipv4_mapped is not None


def pseudo(source: bytes, destination: bytes, length: int) -> bytes:
    if len(source) == 4:
        return source + destination + struct.pack("!BBH", 0, 6, length)
    return source + destination + struct.pack("!II", length, 6)


@dataclass
class Backend:
    address: bytes  # 4 or 16 bytes
    mac: bytes
    source_mac: bytes
    cr: bool = True
    dead: bool = False
    on_link: bool = True
    usable: bool = True
    source: bytes = b"\x0a\0\0\2"  # of tunnels, 4 or 16 bytes as the address
    mtu: int = 1500
    elsewhere: bool = False  # behind another interface than the clients


@dataclass
class Service:
    vip: bytes  # 4 or 16 bytes
    port: int
    mode: str = "negotiated"
    prefixes: list[ipaddress.IPv4Network | ipaddress.IPv6Network] = field(default_factory=list)
    table: list[int] = field(default_factory=list)
    fallback: str = "auto"
    on_dead: str = "reassign"
    said: dict[int, tuple[bool, bool]] = field(default_factory=dict)  # of backends, otherwise than they are: cr, dead


@dataclass
class Flow:
    """What is remembered of a connection."""

    backend: int
    isn: bytes
    offered: bool  # by the first copy
    copies: float = 1


class LoadBalancer:
    """Decides frame by frame; remembers the connections whose SYN it saw."""

    def __init__(self, services: list[Service], backends: list[Backend], seed: bytes, experimental: bool) -> None:
        self.services, self.backends = services, backends
        self.seed, self.experimental = seed, experimental
        self.settled: dict[bytes, Flow] = {}  # by four-tuple
        self.pending: dict[bytes, Flow] = {}  # those whose SYN's answer was not acknowledged yet
        self.earlier: dict[bytes, Flow] = {}  # whose SYN was not either when that came: one of the two is the client's
        self.tokens: dict[tuple[bytes, int, bytes], int] = {}  # MPTCP connections' backends, by VIP, port and token
        self.elsewhere = False  # whether the last frame left by another interface than it came by

    def speaks_cr(self, service: Service, backend: int) -> bool:
        return service.said[backend][0] if backend in service.said else self.backends[backend].cr

    def is_dead(self, service: Service, backend: int) -> bool:
        return service.said[backend][1] if backend in service.said else self.backends[backend].dead

    def is_usable(self, service: Service, backend: int) -> bool:
        return self.backends[backend].usable and not self.is_dead(service, backend)

    def service_at(self, address: bytes, tcp: bytes) -> Service | None:
        port = int.from_bytes(tcp[2:4], "big")
        return next((s for s in self.services if s.vip == address and s.port == port), None)

    def handle(self, frame: bytes) -> tuple[str, bytes | None]:
        """What becomes of a frame: the counter's name, and the frame that is sent (None: none is)."""
        self.elsewhere = False
        l3 = 14
        if len(frame) < 34:
            return "drop_malformed", None
        ethertype = frame[12:14]
        for _ in range(2):
            if ethertype in (b"\x81\x00", b"\x88\xa8"):
                ethertype, l3 = frame[l3 + 2 : l3 + 4], l3 + 4
                if len(frame) < l3 + 20:
                    return "drop_malformed", None
        ip = frame[l3:]
        if ethertype == b"\x08\x00":
            if ip[0] >> 4 != 4 or ip[0] & 15 < 5:
                return "drop_malformed", None
            if ip[9] != 6 or ip[0] & 15 > 5 or struct.unpack("!H", ip[6:8])[0] & 0x3FFF:
                return "drop_not_service", None
            total, header = struct.unpack("!H", ip[2:4])[0], 20
            source, destination = ip[12:16], ip[16:20]
        elif ethertype == b"\x86\xdd":
            if len(ip) < 40 or ip[0] >> 4 != 6:
                return "drop_malformed", None
            if ip[6] != 6:
                return "drop_not_service", None
            total, header = 40 + struct.unpack("!H", ip[4:6])[0], 40
            source, destination = ip[8:24], ip[24:40]
        else:
            return "drop_not_service", None
        if total > len(ip) or total < header + 20:
            return "drop_malformed", None
        ip = ip[:total]  # without Ethernet padding
        tcp = ip[header:]
        data_offset = (tcp[12] >> 4) * 4
        if not 20 <= data_offset <= len(tcp):
            return "drop_malformed", None
        if header == 20 and checksum(ip[:20]) != 0:
            return "drop_checksum", None
        if is_mapped(source) or is_mapped(destination):
            pretended = destination[12:] if is_mapped(destination) else destination
            return ("drop_mapped" if self.service_at(pretended, tcp) else "drop_not_service"), None
        service = self.service_at(destination, tcp)
        if service is None:
            return "drop_not_service", None
        flags = tcp[13]
        if flags & SYN and flags & (ACK | RST | FIN):
            return "drop_flags", None
        bare = tcp[:16] + b"\0\0" + tcp[18:]
        right = checksum(pseudo(source, destination, len(tcp)) + bare)
        left_to_card = ~checksum(pseudo(source, destination, len(tcp))) & 0xFFFF
        field_ = int.from_bytes(tcp[16:18], "big")
        valid = checksum(pseudo(source, destination, len(tcp)) + tcp) == 0
        if not valid and field_ != left_to_card:
            return "drop_checksum", None

        four_tuple = source + destination + tcp[:4]
        chosen = service.table[slot(siphash(self.seed, four_tuple), len(service.table))]
        if chosen == 65535 or not self.is_usable(service, chosen):
            chosen = -1
        settled, pending = self.settled.get(four_tuple), self.pending.get(four_tuple)
        if not flags & SYN:
            sequence = int.from_bytes(tcp[4:8], "big")

            def follows(syn: Flow | None) -> bool:
                # The window of a SYN-ACK is not scaled.
                return bool(syn) and (sequence - int.from_bytes(syn.isn, "big") - 1) % 2**32 < 2**16

            earlier = self.earlier.get(four_tuple)
            syn = earlier if follows(earlier) and not follows(pending) else pending
            flow = syn if follows(syn) or not settled else settled
            if flow and flow is syn and flags & ACK and not flags & RST:
                self.settled[four_tuple] = flow
                self.earlier.pop(four_tuple, None)
                if flow is pending:
                    del self.pending[four_tuple]
            if flow:
                if self.is_usable(service, flow.backend):
                    chosen = flow.backend
                elif not self.is_dead(service, flow.backend) or (service.on_dead == "reset" and flags & RST):
                    chosen = -1
                elif service.on_dead == "reset":
                    return "reset", reset(frame[:l3], ip, header, data_offset)
                if chosen >= 0:
                    flow.backend = chosen
            if chosen < 0:
                return "drop_no_backend", None
            key = next((o.key for o in parse(tcp[20:data_offset])[0] if o.key), None)
            if key:
                self.tokens[service.vip, service.port, hashlib.sha256(key).digest()[:4]] = chosen
            packet = ip[:header] + bare[:16] + struct.pack("!H", right) + bare[18:]
            return self.fall_back("fallback_established", frame[:l3], packet, service, four_tuple, chosen)

        options, payload = tcp[20:data_offset], tcp[data_offset:]
        found = parse(options)[0]
        offers = offer(self.experimental) in found
        token = next((o.token for o in found if o.token), None)
        joined = self.tokens.get((service.vip, service.port, token)) if token else None
        if joined is not None and self.is_usable(service, joined):
            chosen = joined
        copies: float = 0
        older = settled or self.earlier.get(four_tuple)
        flow = next((f for f in (pending, older) if f and f.isn == tcp[4:8]), None)
        if flow and self.is_usable(service, flow.backend):
            chosen = flow.backend
            copies = flow.copies
            flow.copies += 1
        elif chosen >= 0:
            if pending and not older:  # one more takes the place of the newer one
                self.earlier[four_tuple] = pending
            flow = self.pending[four_tuple] = Flow(chosen, tcp[4:8], offers)
        else:
            return "drop_no_backend", None
        backend = self.backends[chosen]
        client = ipaddress.ip_address(source)
        if service.mode == "never":
            outcome = "fallback_mode"
        elif payload or any(o.is_unsafe for o in found):
            outcome = "fallback_unsafe"
            flow.copies = math.inf  # none of them is redirected
        elif service.mode == "negotiated" and not offers:
            outcome = "fallback_no_offer"
        elif copies >= 2:
            outcome = "fallback_retransmit"
        elif service.prefixes and not any(client in p for p in service.prefixes):
            outcome = "fallback_prefix"
        elif copies and flow.offered and not offers:
            outcome = "fallback_no_offer"
        elif not self.speaks_cr(service, chosen) or len(backend.address) != len(service.vip):
            outcome = "fallback_no_cr_backend"
        elif not fits(options, self.experimental, service.vip):
            outcome = "fallback_no_room"
        else:
            outcome = "redirected"
        vip = service.vip if outcome == "redirected" else None
        signed = any(o.is_signature for o in found)
        listed = blank(options) if signed else rewrite(options, self.experimental, vip)
        assert listed is not None
        if vip:
            destination = backend.address
        tcp = bare[:12] + bytes([(20 + len(listed)) << 2 | bare[12] & 15]) + bare[13:20] + listed + payload
        right = checksum(pseudo(source, destination, len(tcp)) + tcp)
        if header == 20:
            ip = ip[:2] + struct.pack("!H", 20 + len(tcp)) + ip[4:10] + b"\0\0" + source + destination
            ip = ip[:10] + struct.pack("!H", checksum(ip)) + ip[12:]
        else:
            ip = ip[:4] + struct.pack("!H", len(tcp)) + ip[6:8] + source + destination
        packet = ip[:header] + tcp[:16] + struct.pack("!H", right) + tcp[18:]
        if not vip:
            return self.fall_back(outcome, frame[:l3], packet, service, four_tuple, chosen)
        return outcome, self.ethernet(frame[:l3], backend) + packet

    def ethernet(self, old: bytes, backend: Backend) -> bytes:
        """The Ethernet header to a backend.  VLAN tags are of no meaning on another interface."""
        self.elsewhere = backend.elsewhere
        return backend.mac + backend.source_mac + (old[-2:] if backend.elsewhere else old[12:])

    def fall_back(
        self, outcome: str, ethernet: bytes, ip: bytes, service: Service, four_tuple: bytes, chosen: int
    ) -> tuple[str, bytes | None]:
        """Direct server return: to the backend's MAC address, or encapsulated."""
        backend = self.backends[chosen]
        same = len(backend.address) == len(service.vip)
        if service.fallback == "l2" and not (backend.on_link and same):
            return "drop_no_path", None
        by_mac = backend.on_link and same and service.fallback != "ipip"
        v4 = len(service.vip) == 4
        source = ip[12:16] if v4 else ip[8:24]
        if by_mac and ethernet[6:12] == backend.mac and source != backend.address:
            return "drop_sent_back", None
        hops = 8 if v4 else 7
        if by_mac and ip[hops] <= 1:
            return "drop_hops", None
        fits = backend.mtu
        if not by_mac:  # whom a tunnel's MTU has told less than his family takes would stall
            fits = max(fits - (20 if len(backend.address) == 4 else 40), 552 if v4 else 1280)
        if len(ip) > fits and (not by_mac or backend.elsewhere):
            if v4 and not ip[6] & 0x40:
                return "drop_too_big", None
            return "too_big", ethernet[6:12] + ethernet[:6] + ethernet[12:] + too_big(ip, fits)
        if by_mac:
            ip = ip[:hops] + bytes([ip[hops] - 1]) + ip[hops + 1 :]
            if v4:
                ip = ip[:10] + struct.pack("!H", checksum(ip[:10] + b"\0\0" + ip[12:20])) + ip[12:]
            return outcome, self.ethernet(ethernet, backend) + ip
        traffic_class = ip[1] if v4 else int.from_bytes(ip[:2], "big") >> 4 & 0xFF
        protocol = 4 if v4 else 41
        if len(backend.address) == 4:
            outer = struct.pack("!BBHHHBBH", 0x45, traffic_class, 20 + len(ip), 0, 0x4000, 64, protocol, 0)
            outer += backend.source + backend.address
            outer = outer[:10] + struct.pack("!H", checksum(outer)) + outer[12:]
            kind = b"\x08\0"
        else:
            h = siphash(self.seed, four_tuple)
            label = (h & 15) << 16 | (h >> 4 & 0xFF) << 8 | (h >> 12 & 0xFF)
            outer = struct.pack("!IHBB", 6 << 28 | traffic_class << 20 | label, len(ip), protocol, 64)
            outer += backend.source + backend.address
            kind = b"\x86\xdd"
        return outcome, self.ethernet(ethernet[:-2] + kind, backend) + outer + ip


def reset(ethernet: bytes, ip: bytes, header: int, data_offset: int) -> bytes:
    """The frame that answers one by RST (RFC 9293, 3.10.7.1)."""
    tcp = ip[header:]
    sport, dport, seq, ack = struct.unpack("!HHII", tcp[:12])
    if tcp[13] & ACK:
        numbers = ack, 0, RST
    else:
        numbers = 0, (seq + len(tcp) - data_offset + bool(tcp[13] & FIN)) % 2**32, RST | ACK
    answer = struct.pack("!HHIIBBHHH", dport, sport, numbers[0], numbers[1], 5 << 4, numbers[2], 0, 0, 0)
    if header == 20:
        source, destination = ip[16:20], ip[12:16]
        head = ip[:2] + struct.pack("!H", 40) + ip[4:8] + b"\x40" + ip[9:10] + b"\0\0" + source + destination
        head = head[:10] + struct.pack("!H", checksum(head)) + head[12:]
    else:
        source, destination = ip[24:40], ip[8:24]
        head = ip[:4] + struct.pack("!H", 20) + ip[6:7] + b"\x40" + source + destination
    answer = answer[:16] + struct.pack("!H", checksum(pseudo(source, destination, 20) + answer)) + answer[18:]
    return ethernet[6:12] + ethernet[:6] + ethernet[12:] + head + answer


def too_big(ip: bytes, mtu: int) -> bytes:
    """The ICMP error (an IP packet) that says so."""
    quote = ip[:64]
    if ip[0] >> 4 == 4:
        body = struct.pack("!BBHHH", 3, 4, 0, 0, mtu) + quote
        body = body[:2] + struct.pack("!H", checksum(body)) + body[4:]
        head = struct.pack("!BBHHHBBH", 0x45, 0xC0, 20 + len(body), 0, 0x4000, 64, 1, 0) + ip[16:20] + ip[12:16]
        return head[:10] + struct.pack("!H", checksum(head)) + head[12:] + body
    body = struct.pack("!BBHI", 2, 0, 0, mtu) + quote
    addresses = ip[24:40] + ip[8:24]
    csum = checksum(addresses + struct.pack("!II", len(body), 58) + body)
    body = body[:2] + struct.pack("!H", csum) + body[4:]
    return struct.pack("!IHBB", 6 << 28, len(body), 58, 64) + addresses + body
