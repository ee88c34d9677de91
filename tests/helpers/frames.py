"""Frames, and a load balancer of the reference that they are for."""

from __future__ import annotations

import ipaddress

from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from tests.helpers.native import mapped
from tests.reference import maglev, packets

VIP4, VIP6 = bytes([10, 0, 0, 100]), ipaddress.ip_address("fd00::100").packed
SEED = bytes(range(16))


def ether() -> Packet:
    return Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02")


def a_hop_less(frame: bytes) -> bytes:
    """An untagged or tagged frame, its TTL or hop limit one less."""
    l3 = 14 + 4 * (frame[12:14] in (b"\x81\x00", b"\x88\xa8")) + 4 * (frame[16:18] in (b"\x81\x00", b"\x88\xa8"))
    ip = bytearray(frame[l3:])
    if ip[0] >> 4 == 6:
        ip[7] -= 1
    else:
        ip[8] -= 1
        ip[10:12] = packets.checksum(bytes(ip[:10] + b"\0\0" + ip[12:20])).to_bytes(2, "big")
    return frame[:l3] + bytes(ip)


def syn(port: int, client: str = "10.0.0.1") -> bytes:
    options = [("MSS", 1460), (42, b""), ("NOP", None), ("NOP", None)]
    tcp = TCP(sport=port, dport=80, flags="S", seq=port, options=options)
    return bytes(Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02") / IP(src=client, dst="10.0.0.100") / tcp)


#: Of ways to backends, by their place in a family: one by which nothing long fits, and one by which the longest do not.
MTUS = {1: 200, 2: 1400}


def reference(experimental: bool = False, mode: str = "negotiated", fallback: str = "l2", *,
              elsewhere: bool = False) -> packets.LoadBalancer:  # fmt: skip
    """``elsewhere``: the last backend of each family is behind another interface, with a small MTU."""
    mac, addresses = b"\2\0\0\0\0\2", [ipaddress.ip_address(f"10.0.0.{11 + i}").packed for i in range(4)]
    backends = [
        packets.Backend(a, bytes([2, 0, 0, 0, 1, i]), mac, cr=i != 2, on_link=i != 1, mtu=MTUS.get(i, 1500))
        for i, a in enumerate(addresses)
    ]
    source = ipaddress.ip_address("fd00::2").packed
    addresses = [ipaddress.ip_address(f"fd00::{11 + i}").packed for i in range(4)]
    backends += [
        packets.Backend(a, bytes([2, 0, 0, 0, 2, i]), mac, cr=i != 2, source=source, mtu=MTUS.get(i, 1500))
        for i, a in enumerate(addresses)
    ]
    four = maglev.table(61, [(mapped(b.address), 1, i) for i, b in enumerate(backends[:4])], SEED)
    six = maglev.table(61, [(b.address, 1, i + 4) for i, b in enumerate(backends[4:])], SEED)
    if elsewhere:
        for backend in (backends[3], backends[7]):
            backend.elsewhere, backend.mtu = True, 150
    services = [
        packets.Service(VIP4, 80, mode, [], four),
        packets.Service(VIP4, 443, mode, [ipaddress.ip_network("10.0.0.0/15")], four),
        packets.Service(VIP6, 80, mode, [ipaddress.ip_network("fd00:5::/33")], six),
        packets.Service(VIP6, 81, "never", [], six),
    ]
    for service in services:
        service.fallback = fallback
    if fallback == "ipip":  # tunnels may lead from one family to the other
        services[1].table, services[3].table = six, four
    return packets.LoadBalancer(services, backends, SEED, experimental)
