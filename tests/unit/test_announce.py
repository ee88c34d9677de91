"""Answering for VIPs on the segment."""

from __future__ import annotations

from ipaddress import ip_address

from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet6 import (
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    ICMPv6NDOptDstLLAddr,
    ICMPv6NDOptSrcLLAddr,
    IPv6,
)
from scapy.layers.l2 import ARP, Ether

from crablb.control.announce import Question, announcement, answer, parse, probe
from crablb.lab import VIP4, VIP6

MAC, OTHER = "02:00:00:00:00:02", "02:00:00:00:00:01"
MAC_BYTES, OTHER_BYTES = bytes.fromhex(MAC.replace(":", "")), bytes.fromhex(OTHER.replace(":", ""))
CLIENT4, CLIENT6 = ip_address("10.0.0.1"), ip_address("fd00::1")


def test_arp_against_scapy():
    who = Ether(src=OTHER, dst="ff:ff:ff:ff:ff:ff") / ARP(op=1, hwsrc=OTHER, psrc=str(CLIENT4), pdst=str(VIP4))
    question = parse(bytes(who))
    assert question == Question(VIP4, True, OTHER_BYTES, CLIENT4)
    reply = Ether(src=MAC, dst=OTHER) / ARP(op=2, hwsrc=MAC, psrc=str(VIP4), hwdst=OTHER, pdst=str(CLIENT4))
    assert answer(question, MAC_BYTES) == bytes(reply)
    assert parse(bytes(reply)) == Question(VIP4, False, MAC_BYTES, VIP4)
    own = Ether(src=MAC, dst="ff:ff:ff:ff:ff:ff")
    zero = "00:00:00:00:00:00"
    asked = own / ARP(op=1, hwsrc=MAC, psrc="0.0.0.0", hwdst=zero, pdst=str(VIP4))
    assert probe(VIP4, MAC_BYTES) == bytes(asked)
    assert parse(bytes(asked)) == Question(VIP4, True, MAC_BYTES, None)
    told = own / ARP(op=1, hwsrc=MAC, psrc=str(VIP4), hwdst=zero, pdst=str(VIP4))
    assert announcement(VIP4, MAC_BYTES) == bytes(told)
    assert parse(bytes(told)) == Question(VIP4, False, MAC_BYTES, VIP4)


def test_an_ordinary_question_against_scapy():
    """From this host's own address, so that nobody takes it for a rival's."""
    asked = Ether(src=OTHER, dst="ff:ff:ff:ff:ff:ff") / ARP(
        op=1, hwsrc=OTHER, psrc=str(CLIENT4), hwdst="00:00:00:00:00:00", pdst=str(VIP4)
    )
    assert probe(VIP4, OTHER_BYTES, CLIENT4) == bytes(asked)
    assert parse(bytes(asked)) == Question(VIP4, True, OTHER_BYTES, CLIENT4)
    solicited = (
        Ether(src=OTHER, dst="33:33:ff:00:01:00")
        / IPv6(src=str(CLIENT6), dst="ff02::1:ff00:100", hlim=255)
        / ICMPv6ND_NS(tgt=str(VIP6))
        / ICMPv6NDOptSrcLLAddr(lladdr=OTHER)
    )
    assert probe(VIP6, OTHER_BYTES, CLIENT6) == bytes(solicited)
    assert parse(bytes(solicited)) == Question(VIP6, True, OTHER_BYTES, CLIENT6)


def test_neighbour_discovery_against_scapy():
    ns = (
        Ether(src=OTHER, dst="33:33:ff:00:01:00")
        / IPv6(src=str(CLIENT6), dst="ff02::1:ff00:100", hlim=255)
        / ICMPv6ND_NS(tgt=str(VIP6))
        / ICMPv6NDOptSrcLLAddr(lladdr=OTHER)
    )
    question = parse(bytes(ns))
    assert question == Question(VIP6, True, OTHER_BYTES, CLIENT6)
    na = (
        Ether(src=MAC, dst=OTHER)
        / IPv6(src=str(VIP6), dst=str(CLIENT6), hlim=255)
        / ICMPv6ND_NA(R=0, S=1, O=1, tgt=str(VIP6))
        / ICMPv6NDOptDstLLAddr(lladdr=MAC)
    )
    assert answer(question, MAC_BYTES) == bytes(na)
    assert parse(bytes(na)) == Question(VIP6, False, MAC_BYTES, VIP6)
    asked = (
        Ether(src=MAC, dst="33:33:ff:00:01:00")
        / IPv6(src="::", dst="ff02::1:ff00:100", hlim=255)
        / ICMPv6ND_NS(tgt=str(VIP6))
    )
    assert probe(VIP6, MAC_BYTES) == bytes(asked)
    told = (
        Ether(src=MAC, dst="33:33:00:00:00:01")
        / IPv6(src=str(VIP6), dst="ff02::1", hlim=255)
        / ICMPv6ND_NA(R=0, S=0, O=1, tgt=str(VIP6))
        / ICMPv6NDOptDstLLAddr(lladdr=MAC)
    )
    assert announcement(VIP6, MAC_BYTES) == bytes(told)
    wrong = bytearray(bytes(ns))
    wrong[-1] ^= 1
    assert parse(bytes(wrong)) is None  # its checksum
    routed = ns.copy()
    routed[IPv6].hlim = 254
    assert parse(bytes(routed)) is None  # it came from another segment


@given(st.sampled_from([b"\x08\x06", b"\x86\xdd", b""]), st.binary(max_size=120))
@settings(max_examples=300)
def test_rubbish_is_no_question(kind, rest):
    found = parse(bytes(12) + kind + rest)
    assert found is None or found.mac
