"""Answering for VIPs on the segment."""

from __future__ import annotations

import json
from ipaddress import ip_address

import pytest
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

from crablb.announce import Question, announcement, answer, parse, probe
from crablb.lab import VIP4, VIP6
from crablb.lab.demo import status
from tests.conftest import until

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


def test_clients_find_the_vip(make_world):
    """The VIPs are on the client's segment, and nobody has a route to them."""
    world = make_world("bridge", servers=2)
    world.servers(dsr=True)
    world.lab.client.ip(f"route del {VIP4}/32", f"route del {VIP6}/128")
    world.serve("--announce", "arp")
    log = world.folder / "serve.log"
    until(lambda: log.read_text().count('"announced"') == 2)
    for vip in (VIP4, VIP6):
        assert world.echo(vip)["accepted_on"] == str(vip)
        neighbour = json.loads(world.lab.client.run("ip", "-j", "neigh", "show", str(vip)).stdout)
        assert neighbour[0]["lladdr"] == world.lab.lb.mac()
    world.client()
    for vip in (VIP4, VIP6):
        assert world.echo(vip)["accepted_on"] != str(vip)
    assert status(world.lab)["total"]["redirected"] == 2


def test_takeover_is_told(make_world):
    """A client that has an old entry learns the new one at once."""
    world = make_world("bridge")
    world.servers(dsr=True)
    client = world.lab.client
    client.ip(f"route del {VIP4}/32", f"route del {VIP6}/128")
    for vip in (VIP4, VIP6):
        client.ip(f"neigh replace {vip} lladdr 02:00:00:00:99:99 nud stale dev eth0")
    world.serve("--announce", "arp")
    mac = world.lab.lb.mac()
    for vip in (VIP4, VIP6):
        until(lambda v=vip: mac in client.run("ip", "neigh", "show", str(v)).stdout)


@pytest.mark.parametrize("family", [4, 6])
def test_an_address_in_use_is_not_taken(make_world, family):
    """It is named in the log; the other VIP is served."""
    world = make_world("bridge", servers=2)
    world.servers(dsr=True)
    world.lab.client.ip(f"route del {VIP4}/32", f"route del {VIP6}/128")
    taken, free = (VIP4, VIP6) if family == 4 else (VIP6, VIP4)
    other = world.lab.servers[1]
    other.ip(f"addr add {taken}/{24 if family == 4 else 64} dev eth0" + (" nodad" if family == 6 else ""))
    if family == 4:
        other.set({"net.ipv4.conf.all.arp_ignore": 0})
    world.serve("--announce", "arp", what=[f"tcp://{VIP4}:80=10.0.0.11", f"tcp://[{VIP6}]:80=fd00::11"])
    log = world.folder / "serve.log"
    until(lambda: '"announced"' in log.read_text())
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    (conflict,) = [e for e in entries if e["event"].startswith("somebody else")]
    assert status(world.lab)["daemon"]["vips_in_use"] == 1
    assert (conflict["vip"], conflict["mac"], conflict["level"]) == (str(taken), other.mac(), "error")
    assert [e["vip"] for e in entries if e["event"] == "announced"] == [str(free)]
    assert world.echo(free)["server"] == "server1"
