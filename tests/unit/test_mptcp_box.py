"""The middlebox of labs takes options out, and nothing else."""

from __future__ import annotations

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet, Raw

from crablb.lab.middlebox import stripped

CAPABLE, PRIO = bytes([30, 4, 0x01, 0x81]), bytes([30, 3, 0x51])


def segment(layer: Packet, flags: str, *options: bytes) -> bytes:
    raw = b"\2\4\5\xb4" + b"".join(options)
    raw += b"\1" * (-len(raw) % 4)
    tcp = TCP(sport=1, dport=80, flags=flags, dataofs=5 + len(raw) // 4)
    return bytes(Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02") / layer / tcp / Raw(raw + b"data!"))


@pytest.mark.parametrize("layer", [IP(dst="10.0.0.1"), IPv6(dst="fd00::1")], ids=["IPv4", "IPv6"])
@pytest.mark.parametrize(
    ("flags", "what"), [("S", "syn"), ("SA", "synack"), ("A", "later"), ("S", "capable"), ("A", "capable")]
)
def test_stripped(layer, flags, what):
    found = stripped(segment(layer, flags, PRIO, CAPABLE), frozenset({what}))
    left = PRIO if what == "capable" else b"\1" * 3
    # Scapy reckons the checksum anew.
    assert found == segment(layer, flags, left, b"\1" * 4)


@pytest.mark.parametrize("what", [(), ("syn",), ("dss",)])
def test_others_stay(what):
    frame = segment(IP(dst="10.0.0.1"), "A", CAPABLE)
    assert stripped(frame, frozenset(what)) == frame
    assert stripped(b"\xff" * 14 + b"no packet", frozenset({"later"})) == b"\xff" * 14 + b"no packet"
