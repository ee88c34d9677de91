"""The BPF programs by BPF_PROG_TEST_RUN, and libbpf's binding.

The kernel has no test run for sock_ops and iterators: crab_server, crab_arm and crab_offer are tested end to end.
"""

from __future__ import annotations

import errno
import itertools
import os
import re
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crablb._native import ffi, lib
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP
from scapy.layers.inet6 import ICMPv6DestUnreach, ICMPv6PacketTooBig, IPv6, IPv6ExtHdrFragment, IPv6ExtHdrHopByHop
from scapy.layers.l2 import ARP, Dot1AD, Dot1Q, Ether
from scapy.packet import Packet, Raw

from crablb.agent import offering, verify
from crablb.agent.client import start_sweeping
from crablb.agent.dsr import EVERYWHERE
from crablb.config import parse_vip
from crablb.dataplane import flows as flowmap
from crablb.dataplane import paths, statistics
from crablb.dataplane.paths import Ways
from crablb.kernel import bpf, pins
from crablb.kernel.counters import counter_names
from crablb.kernel.xsk import XskSocket
from crablb.model import lpm_key, mapped
from tests.helpers.frames import a_hop_less, ether
from tests.helpers.namespaces import Pair
from tests.helpers.native import compiled
from tests.helpers.processes import until
from tests.helpers.programs import LO, forwarding, several_buffers
from tests.reference import packets as reference
from tests.reference.options import parse
from tests.reference.siphash import siphash

CLIENT = {4: "10.0.0.1", 6: "fd00::1"}
DIP = {4: "10.0.0.11", 6: "fd00::11"}
VIP = {4: "10.0.0.100", 6: "fd00::100"}
OTHER_VIP = {4: "10.0.0.101", 6: "fd00::101"}
OUTSIDE = {4: "203.0.113.9", 6: "2001:db8::9"}
XDP_DROP, XDP_PASS, XDP_TX, XDP_REDIRECT = 1, 2, 3, 4
TC_UNSPEC, TC_SHOT, TC_REDIRECT = 0xFFFFFFFF, 2, 7
LWT_OK, LWT_REROUTE = 0, 128


def layer(family: int) -> type[Packet]:
    return IP if family == 4 else IPv6


# ---- load balancer ----


class Counted:
    """A loaded object whose per-CPU counters are read by name."""

    def __init__(self, loaded: bpf.Object, counters: str, names: list[str]) -> None:
        self.maps, self.programs, self._counters, self._names = loaded.maps, loaded.programs, counters, names
        self.table = flowmap.FlowTable(loaded.map("flows")) if "flows" in loaded.maps else None

    def counts(self) -> dict[str, int]:
        found = {name: self.maps[self._counters].sum_u64(i) for i, name in enumerate(self._names)}
        return {name: n for name, n in found.items() if n}


@pytest.fixture
def lb(namespace) -> Iterator[Counted]:
    with bpf.Object(bpf.object_path("lb")) as loaded:
        for family in (4, 6):
            loaded.map("services").update(parse_vip(url(VIP[family], 80)).key(), 0)
        yield Counted(loaded, "xdp_counters", list(statistics.XDP_COUNTERS))


def url(host: str, port: int) -> str:
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def to_vip(family: int, **more: object) -> Packet:
    return layer(family)(src=CLIENT[family], dst=VIP[family]) / TCP(
        **{"sport": 4242, "dport": 80, "flags": "S", **more}
    )


LEFT_ALONE = {
    "arp": (ether() / ARP(pdst=VIP[4]), "pass_not_vip"),
    "other-port": (ether() / IP(src=CLIENT[4], dst=VIP[4]) / TCP(dport=81, flags="S"), "pass_not_vip"),
    "other-address": (ether() / IPv6(src=CLIENT[6], dst=DIP[6]) / TCP(dport=80, flags="S"), "pass_not_vip"),
    "icmp": (ether() / IP(dst=VIP[4]) / ICMP(), "pass_not_vip"),
    "icmpv6": (ether() / IPv6(dst=VIP[6]) / ICMPv6DestUnreach(), "pass_not_vip"),
    "fragment": (ether() / IP(dst=VIP[4], flags="MF", proto=6) / Raw(bytes(64)), "pass_fragment"),
    "last-fragment": (ether() / IP(dst=VIP[4], frag=3, proto=6) / Raw(bytes(64)), "pass_fragment"),
    "fragment6": (ether() / IPv6(dst=VIP[6]) / IPv6ExtHdrFragment() / TCP(dport=80, flags="S"), "pass_fragment"),
    "ip-options": (ether() / IP(dst=VIP[4], options=b"\x01" * 4) / TCP(dport=80, flags="S"), "pass_ip_options"),
    "extension": (ether() / IPv6(dst=VIP[6]) / IPv6ExtHdrHopByHop() / TCP(dport=80, flags="S"), "pass_ip_options"),
    "three-tags": (ether() / Dot1Q() / Dot1Q() / Dot1Q() / to_vip(4), "pass_not_vip"),
    "cut": (Raw(bytes(ether() / to_vip(4))[:50]), "pass_malformed"),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_lb_leaves_alone(lb, name):
    packet, reason = LEFT_ALONE[name]
    frame = bytes(packet)
    run = lb.programs["crab_lb"].test_run(frame)
    assert run.retval == XDP_PASS
    assert run.data == frame
    assert lb.counts() == {reason: 1}


@pytest.mark.parametrize("tags", [0, 1, 2], ids=["plain", "vlan", "qinq"])
@pytest.mark.parametrize("family", [4, 6])
def test_lb_takes_a_vips_packets(lb, namespace, family, tags):
    head = [ether(), ether() / Dot1Q(vlan=7), ether() / Dot1AD(vlan=9) / Dot1Q(vlan=7)][tags]
    syn, ack = bytes(head / to_vip(family)), bytes(head / to_vip(family, flags="A"))
    fast_open = bytes(head / to_vip(family, options=[("TFO", (1, 2)), ("NOP", None), ("NOP", None)]) / Raw(bytes(900)))
    # Without a daemon: dropped, because the kernel would answer with a RST.
    assert lb.programs["crab_lb"].test_run(syn).retval == XDP_DROP
    assert lb.programs["crab_lb"].test_run(ack).retval == XDP_DROP
    lb.maps["interfaces"].update(LO, struct.pack("=II", 5, 0))  # a queue that is not served
    assert lb.programs["crab_lb"].test_run(ack).retval == XDP_DROP
    with XskSocket("veth0", load_program=False) as xsk:
        xsk.register(lb.maps["sockets"], 5)
        lb.maps["interfaces"].update(LO, struct.pack("=II", 5, 1))
        for frame in (syn, fast_open, ack):
            run = lb.programs["crab_lb"].test_run(frame)
            assert run.retval == XDP_REDIRECT
            assert run.data == frame
    # A socket that is closed leaves the map by itself.
    assert lb.programs["crab_lb"].test_run(syn).retval == XDP_DROP
    assert lb.counts() == {"syn": 2, "other": 1, "drop_no_socket": 4}


@pytest.mark.parametrize("family", [4, 6])
def test_lb_at_every_length(lb, family):
    frame = bytes(ether() / to_vip(family))
    for length in range(14, len(frame)):
        assert lb.programs["crab_lb"].test_run(frame[:length]).retval == XDP_PASS
    assert lb.counts() == {"pass_malformed": len(frame) - 14}


MAPPED = {
    "source": (f"::ffff:{CLIENT[4]}", VIP[6]),
    "destination": (CLIENT[6], f"::ffff:{VIP[4]}"),
    "both": (f"::ffff:{CLIENT[4]}", f"::ffff:{VIP[4]}"),
}


@pytest.mark.parametrize("flags", ["S", "A", "icmp"])
@pytest.mark.parametrize("where", MAPPED)
def test_mapped_addresses_on_the_wire_are_nobodys(flows, where, flags):
    """Dropped and counted, even if they are a known flow's; whoever they are sent to otherwise, they are let alone."""
    client, vip = MAPPED[where]
    packed = ip_address(client).packed + ip_address(vip).packed

    def frame(to: str, port: int) -> bytes:
        if flags == "icmp":
            quoted = IPv6(src=to, dst=client) / TCP(sport=port, dport=4242)
            return bytes(ether() / IPv6(src="fd00::fe", dst=VIP[6]) / ICMPv6PacketTooBig(mtu=1300) / quoted)
        return bytes(ether() / IPv6(src=client, dst=to) / TCP(sport=4242, dport=port, flags=flags))

    know(flows, 6, DIP[6])
    flows.table.places["hash"] = 0
    assert flows.table.add(siphash(SEED, packed + ports(4242)), 7, 6, age=0, flags=0)
    assert flows.table.add(flowmap.flow_hash(SEED, ip_address(CLIENT[4]), 4242, ip_address(VIP[4]), 80), 7, 4)
    run = flows.programs["crab_lb"].test_run
    assert run(frame(vip, 80)).retval == XDP_DROP
    assert flows.counts() == {"drop_mapped": 1}
    for to, port in ((vip, 81), (f"::ffff:{DIP[4]}", 80)):
        other = frame(to, port)
        got = run(other)
        assert (got.retval, got.data) == (XDP_PASS, other)
    assert flows.counts() == {"drop_mapped": 1, "pass_not_vip": 2}


# ---- client ----


@pytest.fixture
def client(namespace) -> Iterator[Counted]:
    with bpf.Object(bpf.object_path("client"), max_entries={offering.TABLE: FLOWS}) as loaded:
        loaded.map("client_settings").update(0, offering.settings(FLOWS))
        for family in (4, 6):
            loaded.map("client_vips").update(parse_vip(url(VIP[family], 80)).key(), 0)
        for prefix in (ip_network("10.0.0.0/24"), ip_network("fd00::/64")):
            bits = prefix.prefixlen + (96 if prefix.version == 4 else 0)
            loaded.map("client_backends").update(
                bits.to_bytes(4, "little") + mapped(prefix.network_address), prefix.version
            )
        yield Counted(loaded, "client_counters", counter_names("crab_client_counter", "CRAB_CLIENT_"))


FLOWS = 4096


def ports(local: int, remote: int = 80) -> bytes:
    return struct.pack("!HH", local, remote)


OWNER = 77  # a socket's cookie


def place(family: int, port: int = 4242) -> bytes:
    """The key of our connection in client_flows."""
    return mapped(ip_address(CLIENT[family])) + ports(port)


def put(client: Counted, family: int, port: int = 4242, **fields: object) -> bytes:
    """Note a connection of ours to the VIP; ``fields`` of struct crab_client_flow.  Returns its key."""
    known = {"owner": OWNER, "vip": mapped(ip_address(VIP[family])), "offer": lib.CRAB_CLIENT_OUT, "opening": 1}
    value = ffi.new("struct crab_client_flow *", {**known, **fields})
    client.maps["client_flows"].update(place(family, port), bytes(ffi.buffer(value)))
    return place(family, port)


def number(value: int) -> int:
    """As a __be32 in a struct."""
    return int.from_bytes(value.to_bytes(4, "big"), "little")


def waiting(family: int, *, isn: int = 999, form: int = 0, left: bool = True) -> dict[str, object]:
    """What a SYN that was sent with an offer leaves in a flow; with ``left``, egress has seen it."""
    kind, size = (253, 4) if form else (42, 2)
    size += len(ip_address(VIP[family]).packed)
    return {"state": lib.CRAB_CLIENT_WAITING, "ack": number(isn + 1), "kind": kind, "size": size, "left": left}


def pend(client: Counted, family: int, *, port: int = 4242, **how: Any) -> bytes:
    """Note a SYN of ours as sent."""
    return put(client, family, port, **waiting(family, **how))


def redirected(client: Counted, family: int, port: int = 4242, **fields: object) -> bytes:
    """Note a connection as redirected, and taken by its socket."""
    dip = mapped(ip_address(DIP[family]))
    taken = {"state": lib.CRAB_CLIENT_TAKEN, "dip": dip, "ack": number(1000), "seq": number(5)}
    return put(client, family, port, **{**taken, **fields})


def flow_at(client: Counted, key: bytes) -> Any:
    """The entry, None if there is none."""
    value = client.maps["client_flows"].lookup(key)
    return ffi.from_buffer("struct crab_client_flow *", value) if value else None


def take(client: Counted, family: int) -> None:
    """The socket takes the redirect, as sock_ops hears."""
    flow = flow_at(client, place(family))
    assert flow.state == lib.CRAB_CLIENT_ACCEPTED
    flow.state = lib.CRAB_CLIENT_TAKEN
    client.maps["client_flows"].update(place(family), bytes(ffi.buffer(flow)))


def sent(family: int, flags: str = "A", **more: object) -> Packet:
    """A packet of our connection to the VIP, as the kernel gives it to the route's program."""
    fields = {"sport": 4242, "dport": 80, "flags": flags, "seq": 999, **more}
    return ether() / layer(family)(src=CLIENT[family], dst=VIP[family]) / TCP(**fields)


def redirect(vip: str, experimental: bool = False) -> list[tuple[object, object]]:
    packed = ip_address(vip).packed
    option = (253, b"\x43\x52" + packed) if experimental else (42, packed)
    return [("MSS", 1460), option, ("NOP", None), ("NOP", None)]


def answer(family: int, **more: object) -> Packet:
    """A backend's SYN-ACK to our SYN, as it should be."""
    fields = {"sport": 80, "dport": 4242, "flags": "SA", "seq": 5, "ack": 1000, "options": redirect(VIP[family])}
    return ether() / layer(family)(src=DIP[family], dst=CLIENT[family]) / TCP(**{**fields, **more})


def as_from_vip(frame: bytes, family: int) -> bytes:
    """What Scapy makes of the frame with the VIP as its source, all checksums its own."""
    packet = Ether(frame)
    packet[layer(family)].src = VIP[family]
    del packet[TCP].chksum
    if family == 4:
        del packet[IP].chksum
    return bytes(packet)


@pytest.mark.parametrize("form", [0, 1], ids=["crab", "experimental"])
@pytest.mark.parametrize("family", [4, 6])
def test_client_takes_up_a_redirect(client, family, form):
    key = pend(client, family, form=form)
    frame = bytes(answer(family, options=redirect(VIP[family], bool(form))))
    run = client.programs["crab_ingress"].test_run(frame)
    assert run.retval == TC_UNSPEC
    assert run.data == as_from_vip(frame, family)
    # It stays until the socket is connected.  Only then what we send is translated.
    assert flow_at(client, key).state == lib.CRAB_CLIENT_ACCEPTED
    mine = sent(family) / b"hi"
    assert client.programs["crab_egress"].test_run(bytes(mine)).retval == LWT_OK
    take(client, family)
    data = bytes(answer(family, flags="PA", options=[]) / Raw(b"hello"))
    run = client.programs["crab_ingress"].test_run(data)
    assert run.data == as_from_vip(data, family)
    run = client.programs["crab_egress"].test_run(bytes(mine))
    assert run.retval == LWT_REROUTE
    expected = mine.copy()
    expected[layer(family)].dst = DIP[family]
    assert run.data[14:] == bytes(expected)[14:]
    assert client.counts() == {"redirected": 1, "completed": 1, "packets_in": 2, "packets_out": 1}


FORGED = {
    "acknowledgement": ({"ack": 1001}, TC_UNSPEC, None),
    "port": ({"dport": 4243}, TC_UNSPEC, None),
    "other-service-port": ({"sport": 81}, TC_UNSPEC, None),
    "no-option": ({"options": [("MSS", 1460)]}, TC_SHOT, "drop_vip"),
    "other-vip": ({"options": "other"}, TC_SHOT, "drop_vip"),
    "cut-option": ({"options": [(42, b"\x0a\x00"), ("NOP", None), ("NOP", None)]}, TC_SHOT, "drop_vip"),
    "other-form": ({"options": "experimental"}, TC_SHOT, "drop_vip"),
    "behind-eol": ({"options": "eol"}, TC_SHOT, "drop_vip"),
    "source": ({"src": "outside"}, TC_SHOT, "drop_source"),
}


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("name", FORGED)
def test_client_refuses_what_is_forged(client, family, name):
    fields, verdict, reason = FORGED[name]
    fields = dict(fields)
    special = {
        "other": redirect(OTHER_VIP[family]),
        "experimental": redirect(VIP[family], experimental=True),
        "eol": [("EOL", None), ("EOL", None), *redirect(VIP[family])],
    }
    if isinstance(fields.get("options"), str):
        fields["options"] = special[fields["options"]]
    outside = fields.pop("src", None)
    key = pend(client, family)
    packet = answer(family, **fields)
    if outside:
        packet[layer(family)].src = OUTSIDE[family]
    frame = bytes(packet)
    run = client.programs["crab_ingress"].test_run(frame)
    assert run.retval == verdict
    assert run.data == frame
    assert {n: k for n, k in client.counts().items() if n != "failed"} == ({reason: 1} if reason else {})
    # and the sound answer still finds its SYN waiting
    assert flow_at(client, key).state == lib.CRAB_CLIENT_WAITING
    client.programs["crab_ingress"].test_run(bytes(answer(family)))
    assert client.counts()["redirected"] == 1


@pytest.mark.parametrize("where", ["ours", "theirs", "both"])
def test_client_knows_no_mapped_addresses_on_the_wire(client, where):
    """An IPv6 header with IPv4-mapped addresses is not the IPv4 connection's."""
    mine = f"::ffff:{CLIENT[4]}" if where != "theirs" else CLIENT[6]

    def on_wire(packet: Packet, source: str, target: str) -> bytes:
        return bytes(ether() / IPv6(src=source, dst=target) / packet[TCP])

    def theirs(address: str) -> str:
        return f"::ffff:{address}" if where != "ours" else DIP[6]

    key = pend(client, 4)
    ingress, egress = client.programs["crab_ingress"].test_run, client.programs["crab_egress"].test_run
    frame = on_wire(answer(4), theirs(DIP[4]), mine)
    run = ingress(frame)
    assert (run.retval, run.data, flow_at(client, key).state) == (TC_UNSPEC, frame, lib.CRAB_CLIENT_WAITING)
    key = redirected(client, 4)
    before = client.maps["client_flows"].lookup(key)
    frame = on_wire(answer(4, flags="PA", options=[]), theirs(DIP[4]), mine)
    assert ingress(frame).data == frame
    frame = on_wire(sent(4), mine, theirs(VIP[4]))
    run = egress(frame)
    assert (run.retval, run.data[14:]) == (LWT_OK, frame[14:])
    quoted = IPv6(src=mine, dst=theirs(DIP[4])) / TCP(sport=4242, dport=80, seq=999)
    frame = bytes(ether() / IPv6(src="fd00::fe", dst=CLIENT[6]) / ICMPv6DestUnreach() / quoted)
    run = ingress(frame)
    assert (run.retval, run.data) == (TC_UNSPEC, frame)
    assert client.maps["client_flows"].lookup(key) == before
    assert client.counts() == {}


def test_client_prefixes_are_of_one_family(client):
    """::/0 holds IPv4-mapped addresses; it is no prefix of IPv4 backends."""
    prefixes = client.maps["client_backends"]
    for key in list(prefixes.keys()):
        prefixes.delete(key)
    prefixes.update(bytes(20), 6)
    for family, state in ((4, lib.CRAB_CLIENT_WAITING), (6, lib.CRAB_CLIENT_ACCEPTED)):
        key = pend(client, family)
        client.programs["crab_ingress"].test_run(bytes(answer(family)))
        assert flow_at(client, key).state == state
    assert client.counts()["drop_source"] == 1


def is_reset(run: bpf.TestRun, family: int, to: str) -> bool:
    """Did the program answer by a RST?"""
    if run.retval != TC_REDIRECT:
        return False
    reset = Ether(run.data)
    return (reset[layer(family)].dst, str(reset[TCP].flags), reset[TCP].seq) == (to, "R", 1000)


@pytest.mark.parametrize("by", ["backend", "vip"])
@pytest.mark.parametrize("connected", [False, True])
@pytest.mark.parametrize("family", [4, 6])
def test_client_second_answer_changes_nothing(client, family, connected, by):
    pend(client, family)
    run = client.programs["crab_ingress"].test_run
    run(bytes(answer(family)))
    if connected:
        take(client, family)
    flows = dict(client.maps["client_flows"].items())
    late = answer(family, seq=77)
    other = VIP[family] if by == "vip" else "10.0.0.12" if family == 4 else "fd00::12"
    late[layer(family)].src = other
    frame = bytes(late)
    got = run(frame)
    if connected and by == "backend":
        # It is nobody's packet: the kernel, which knows no such connection, resets it.
        assert (got.retval, got.data) == (TC_UNSPEC, frame)
    else:
        assert is_reset(got, family, other)
        assert client.counts()["reset_late"] == 1
    assert dict(client.maps["client_flows"].items()) == flows


@pytest.mark.parametrize("family", [4, 6])
def test_client_takes_up_none_for_a_syn_that_left_another_way(client, family):
    """What egress did not see leave it will not translate either."""
    key = pend(client, family, left=False)
    run = client.programs["crab_ingress"].test_run
    assert is_reset(run(bytes(answer(family))), family, DIP[family])
    assert flow_at(client, key).state == lib.CRAB_CLIENT_WAITING
    assert client.counts() == {"reset_route": 1, "failed": 1}
    (health,) = [h for h in healths(client) if h.reason]
    assert (health.vip, health.reason) == (url(VIP[family], 80), "route")
    # Another connection's SYN is none of it; its own is.
    egress = client.programs["crab_egress"].test_run
    for other in (sent(family, "S", sport=4243), sent(family, "SA")):
        egress(bytes(other))
    assert is_reset(run(bytes(answer(family))), family, DIP[family])
    syn = bytes(sent(family, "S"))
    got = egress(syn)
    assert (got.retval, got.data[14:]) == (LWT_OK, syn[14:])
    assert run(bytes(answer(family))).retval == TC_UNSPEC
    assert client.counts()["redirected"] == 1


def healths(client: Counted) -> list[offering.Health]:
    return list(offering.redirects(client.maps["client_vips"], client.maps["client_paths"]))


STATES = ("WAITING", "HELD", "ACCEPTED", "TAKEN")


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("ours", [True, False], ids=["retransmission", "somebody's"])
@pytest.mark.parametrize("family", [4, 6])
def test_client_never_translates_a_syn(client, family, ours, state):
    """Whatever there is for its four-tuple; and what is there ends, but for a redirect that the socket may take yet."""
    number_of = getattr(lib, f"CRAB_CLIENT_{state}")
    key = redirected(client, family, state=number_of)
    syn = bytes(sent(family, "S", seq=999 if ours else 998))
    run = client.programs["crab_egress"].test_run(syn)
    assert (run.retval, run.data[14:]) == (LWT_OK, syn[14:])
    stays = ours and state != "TAKEN"
    flow = flow_at(client, key)
    assert flow.state == (number_of if stays else lib.CRAB_CLIENT_FREE)
    assert (flow.left, flow.again) == (stays, stays and state != "WAITING")
    assert client.programs["crab_egress"].test_run(bytes(sent(family))).retval == LWT_OK


@pytest.mark.parametrize("family", [4, 6])
def test_client_another_vips_packets(client, family):
    """From the same ports to another VIP, by a program outside of the cgroup: none of the redirected connection's."""
    key = redirected(client, family)
    for flags in ("S", "A"):
        other = sent(family, flags)
        other[layer(family)].dst = OTHER_VIP[family]
        run = client.programs["crab_egress"].test_run(bytes(other))
        assert (run.retval, run.data[14:]) == (LWT_OK, bytes(other)[14:])
    assert flow_at(client, key).state == lib.CRAB_CLIENT_TAKEN


@pytest.mark.parametrize("lives", [True, False])
@pytest.mark.parametrize("family", [4, 6])
def test_client_reset_by_the_vip(client, family, lives):
    """What a redirected connection sends while the route is lost goes to the VIP, where nobody knows it."""
    redirected(client, family, ends_ns=0 if lives else time.monotonic_ns() + 10**10)
    reset = answer(family, flags="R", seq=7, ack=0, options=[])
    reset[layer(family)].src = VIP[family]
    run = client.programs["crab_ingress"].test_run(bytes(reset))
    assert (run.retval, client.counts()) == ((TC_SHOT, {"drop_reset": 1}) if lives else (TC_UNSPEC, {}))
    # Its backend's is a reset.
    reset[layer(family)].src = DIP[family]
    assert client.programs["crab_ingress"].test_run(bytes(reset)).retval == TC_UNSPEC
    assert client.counts()["packets_in"] == 1


@pytest.mark.parametrize("family", [4, 6])
def test_client_direct_connection_from_the_ports_of_a_closed_one(client, family):
    """By a program outside of the cgroup, straight to the backend: its SYN-ACK is another one than the redirect's."""
    key = redirected(client, family, owner=0, ends_ns=time.monotonic_ns() + 10**10)
    run = client.programs["crab_ingress"].test_run
    for frame in (bytes(answer(family, ack=4321, options=[])), bytes(answer(family, flags="A", options=[]))):
        got = run(frame)
        assert (got.retval, got.data) == (TC_UNSPEC, frame)
    assert flow_at(client, key).state == lib.CRAB_CLIENT_FREE


@contextmanager
def direct_connection(namespace: Pair, family: int) -> Iterator[None]:
    """One to the backend, with the four-tuple of the redirected one."""
    Path("/proc/sys/net/ipv6/conf/lo/disable_ipv6").write_text("0")
    for host in (CLIENT[family], DIP[family]):
        namespace.ip("addr", "add", host, "dev", "lo", *(["nodad"] if family == 6 else []))
    kind = socket.AF_INET if family == 4 else socket.AF_INET6
    with socket.create_server((DIP[family], 80), family=kind), socket.socket(kind) as direct:
        direct.bind((CLIENT[family], 4242))
        # The kernel adds the route to an IPv6 address later, by a work queue.
        until(lambda: direct.connect_ex((DIP[family], 80)) == 0)
        yield


@pytest.mark.parametrize("flags", ["S", "SA", "SAE", "R", "RA", "FA", "A", "PA"])
@pytest.mark.parametrize("family", [4, 6])
def test_client_forged_packets_end_no_connection(client, family, flags):
    """By somebody who knows its four-tuple, and no sequence number: the socket is asked, which knows better."""
    key = pend(client, family)
    client.programs["crab_ingress"].test_run(bytes(answer(family)))
    take(client, family)
    before = flow_at(client, key)
    frame = bytes(answer(family, flags=flags, seq=4321, ack=0 if flags in ("S", "R") else 4321, options=[]))
    run = client.programs["crab_ingress"].test_run(frame)
    assert (run.retval, run.data) == (TC_UNSPEC, as_from_vip(frame, family))
    after = flow_at(client, key)
    assert (after.state, after.owner, after.ends_ns) == (lib.CRAB_CLIENT_TAKEN, before.owner, 0)
    assert not [h for h in healths(client) if h.reason]


@pytest.mark.parametrize("family", [4, 6])
def test_client_direct_connection_from_the_ports_of_one_whose_end_was_not_heard(client, namespace, family):
    """By a program outside of the cgroup: there is a socket for what comes."""
    key = redirected(client, family)
    with direct_connection(namespace, family):
        frame = bytes(answer(family, ack=4321, options=[]))
        got = client.programs["crab_ingress"].test_run(frame)
        assert (got.retval, got.data) == (TC_UNSPEC, frame)
        assert flow_at(client, key).state == lib.CRAB_CLIENT_FREE


def test_client_redirect_after_one_that_the_host_dropped(client):
    """The SYN is sent again: another backend's redirect may be accepted now."""
    pend(client, 4)
    run = client.programs["crab_ingress"].test_run
    run(bytes(answer(4)))
    other = answer(4, seq=77)
    other[IP].src = "10.0.0.12"
    fallback = answer(4, seq=78, options=[])
    fallback[IP].src = VIP[4]
    assert is_reset(run(bytes(other)), 4, "10.0.0.12")
    assert is_reset(run(bytes(fallback)), 4, VIP[4])
    client.programs["crab_egress"].test_run(bytes(sent(4, "S")))
    assert run(bytes(fallback)).data == bytes(fallback)
    assert run(bytes(other)).data == as_from_vip(bytes(other), 4)
    assert client.counts()["redirected"] == 2
    # And what the first one still sends is nobody's.
    assert is_reset(run(bytes(answer(4))), 4, DIP[4])


def test_client_remembers_backends_that_fail(client):
    """By VIP and by backend; the VIP's word is its worst backend's; a success is its own backend's, and time's."""
    run = client.programs["crab_ingress"].test_run
    pend(client, 4)
    no_echo = bytes(answer(4, options=[("MSS", 1460)]))
    run(no_echo)
    run(no_echo)  # while there are no offers, more of it says nothing new
    vip, backend = sorted((h for h in healths(client) if h.failed), key=lambda h: h.backend or "")
    assert (vip.vip, vip.backend, vip.reason, vip.blamed, vip.failed) == (url(VIP[4], 80), None, "no_echo", DIP[4], 2)
    assert (backend.backend, backend.reason, backend.failed) == (DIP[4], "no_echo", 2)
    for health in (vip, backend):
        assert 0 < health.backing_off <= offering.BACK_OFF
    # Another backend's success changes nothing while it lasts, its own ends it.
    good, bad = answer(4, seq=6), answer(4, seq=6)
    good[IP].src = "10.0.0.12"
    for frame, held in ((good, True), (bad, False)):
        run(bytes(frame))
        take(client, 4)
        data = frame.copy()
        data[TCP].flags = "A"
        run(bytes(data))
        vip = next(h for h in healths(client) if h.vip == url(VIP[4], 80) and h.backend is None)
        assert (vip.backing_off is not None) == held
        pend(client, 4)
    assert vip.completed == 2


@pytest.mark.parametrize("failures", range(9))
def test_client_back_off_doubles(client, failures):
    """From ten seconds to ten minutes; what comes when it is over counts as the next failure."""
    backend = mapped(ip_address(VIP[4])) + mapped(ip_address(DIP[4])) + struct.pack("!HBx", 80, 6)
    before = ffi.new("struct crab_client_health *", {"failures": failures, "since_ns": 1, "until_ns": 2})
    client.maps["client_paths"].update(backend, bytes(ffi.buffer(before)))
    pend(client, 4)
    client.programs["crab_ingress"].test_run(bytes(answer(4, options=[])))
    (health,) = [h for h in healths(client) if h.backend]
    expected = min(10 * 2**failures, 600)
    assert expected - 5 < health.backing_off <= expected


@pytest.mark.parametrize("family", [4, 6])
def test_client_hears_that_a_backend_is_mute(client, family):
    """Its SYN-ACK comes again: ours does not get there.  Until it speaks."""
    pend(client, family)
    run = client.programs["crab_ingress"].test_run
    frame = bytes(answer(family))
    assert run(frame).data == as_from_vip(frame, family)
    assert run(frame).data == as_from_vip(frame, family)  # twice on the wire: the socket has it yet to take
    assert client.counts() == {"redirected": 1, "packets_in": 2}
    take(client, family)
    for _ in range(2):
        assert run(frame).data == as_from_vip(frame, family)
    assert client.counts()["failed"] == 1
    assert {h.reason for h in healths(client)} == {None, "silent"}
    data = bytes(answer(family, flags="A", options=[]))
    run(data)
    assert {h.reason for h in healths(client)} == {None}
    run(frame)
    run(data)
    counts = client.counts()
    assert (counts["failed"], counts["completed"]) == (1, 1)


@pytest.mark.parametrize("family", [4, 6])
def test_client_closed_port(client, family):
    """Or a firewall that rejects: the fallback may do better.  Where there is none the socket is told."""
    run = client.programs["crab_ingress"].test_run
    frame = bytes(answer(family, flags="RA", options=[], seq=0))
    key = pend(client, family)
    got = run(frame)
    assert (got.retval, got.data) == (TC_SHOT, frame)
    assert flow_at(client, key).state == lib.CRAB_CLIENT_WAITING  # the socket's end takes it away
    assert {h.reason for h in healths(client)} == {None, "refused"}
    for fields in ({"retransmitted": 1}, {"offer": lib.CRAB_CLIENT_NONE}):
        put(client, family, **waiting(family), **fields)
        assert run(frame).data == as_from_vip(frame, family)
    assert client.counts() == {"refused_port": 3, "failed": 1}


@pytest.mark.parametrize("family", [4, 6])
def test_client_icmp_about_a_redirected_syn(client, family):
    l3 = layer(family)
    quoted = l3(src=CLIENT[family], dst=DIP[family]) / TCP(sport=4242, dport=80, seq=999, flags="S")
    error = ICMP(type=3, code=13) if family == 4 else ICMPv6DestUnreach(code=1)
    router = "10.0.0.254" if family == 4 else "fd00::fe"
    frame = bytes(ether() / l3(src=router, dst=CLIENT[family]) / error / quoted)
    run = client.programs["crab_ingress"].test_run
    pend(client, family)
    assert run(frame).retval == TC_SHOT
    assert {h.reason for h in healths(client)} == {None, "refused"}
    put(client, family, **waiting(family), retransmitted=1)
    got = run(frame)
    assert (got.retval, client.counts()["icmp"]) == (TC_UNSPEC, 1)
    assert got.data != frame


@pytest.mark.parametrize("family", [4, 6])
def test_client_resets_a_collision(client, namespace, family):
    """A direct connection to the backend has this four-tuple: the SYN-ACK is answered by a RST."""
    with direct_connection(namespace, family):
        key = pend(client, family)
        frame = answer(family, options=[*redirect(VIP[family]), ("Timestamp", (7, 8)), ("NOP", None), ("NOP", None)])
        run = client.programs["crab_ingress"].test_run(bytes(frame))
        assert run.retval == TC_REDIRECT
        reset = Ether(run.data)
        assert (reset.src, reset.dst) == ("02:00:00:00:00:02", "02:00:00:00:00:01")
        assert (reset[layer(family)].src, reset[layer(family)].dst) == (CLIENT[family], DIP[family])
        assert (reset[TCP].sport, reset[TCP].dport, reset[TCP].flags, reset[TCP].seq) == (4242, 80, "R", 1000)
        assert {option for option, _ in reset[TCP].options} == {"NOP"}
        right = reset.copy()
        del right[TCP].chksum
        assert Ether(bytes(right))[TCP].chksum == reset[TCP].chksum
        assert client.counts() == {"reset_collision": 1}
        assert flow_at(client, key).state == lib.CRAB_CLIENT_WAITING


@pytest.mark.parametrize("family", [4, 6])
def test_client_translates_quoted_packets(client, family):
    pend(client, family)
    client.programs["crab_ingress"].test_run(bytes(answer(family)))
    l3 = layer(family)
    quoted = l3(src=CLIENT[family], dst=DIP[family]) / TCP(sport=4242, dport=80, seq=3)
    error = ICMP(type=3, code=4, nexthopmtu=1400) if family == 4 else ICMPv6PacketTooBig(mtu=1400)
    router = "10.0.0.254" if family == 4 else "fd00::fe"
    run = client.programs["crab_ingress"].test_run(bytes(ether() / l3(src=router, dst=CLIENT[family]) / error / quoted))
    quoted = l3(src=CLIENT[family], dst=VIP[family]) / TCP(sport=4242, dport=80, seq=3, chksum=quoted_checksum(quoted))
    expected = bytes(ether() / l3(src=router, dst=CLIENT[family]) / error / quoted)
    assert run.data == expected
    assert client.counts()["icmp"] == 1


def quoted_checksum(packet: Packet) -> int:
    return int(type(packet)(bytes(packet))[TCP].chksum)


@pytest.mark.parametrize("program", ["crab_ingress", "crab_egress"])
@pytest.mark.parametrize("family", [4, 6])
def test_client_at_every_length(client, family, program):
    """However it is cut, a frame goes on as it came."""
    pend(client, family)
    frame = bytes(answer(family))
    header = 14 + (40 if family == 6 else 20)
    for length in range(header, header + 20):
        run = client.programs[program].test_run(frame[:length])
        assert run.retval in (TC_UNSPEC, LWT_OK)
        assert run.data[14:] == frame[14:length]
    assert client.counts() == {}


@settings(max_examples=300)
@given(options=st.binary(max_size=40), family=st.sampled_from([4, 6]))
def test_client_any_options(client, options, family):
    """A SYN-ACK is accepted exactly if an independent reader finds the redirect in it."""
    from tests.reference.packets import split

    options += bytes(-len(options) % 4)
    pend(client, family)
    packet = answer(family, options=[], dataofs=5 + len(options) // 4) / Raw(options)
    run = client.programs["crab_ingress"].test_run(bytes(packet))
    wanted = b"\x2a" + bytes([2 + len(ip_address(VIP[family]).packed)]) + ip_address(VIP[family]).packed
    first = next((o for o in split(options)[0] if o[:1] == b"\x2a" and len(o) == len(wanted)), b"")
    assert run.retval == (TC_UNSPEC if first == wanted else TC_SHOT)


# ---- proof that a backend hears us ----


@pytest.fixture
def verifying(client) -> Iterator[tuple[Counted, list[bytes], Callable[[], int]]]:
    """The client's programs, with somebody there who asks; what they want asked, and a function that looks for it."""
    asked: list[bytes] = []
    let(client)
    with bpf.Ring(client.maps["client_asks"], asked.append) as ring:
        yield client, asked, ring.consume


def let(client: Counted, seconds: float = 3600, since_ns: int = 0) -> None:
    until = time.monotonic_ns() + int(seconds * 1e9)
    value = ffi.new("struct crab_client_verifier *", {"until_ns": until, "since_ns": since_ns})
    client.maps["client_verifier"].update(0, bytes(ffi.buffer(value)))


def test_a_ring_goes_on_after_a_failure(client):
    """What a record's taker raises comes out when all were taken; the next ones are taken as before."""
    let(client)
    taken: list[bytes] = []

    def take(record: bytes) -> None:
        taken.append(record)
        if len(taken) < 3:
            raise MemoryError(f"record {len(taken)}")

    with bpf.Ring(client.maps["client_asks"], take) as ring:
        for family in (4, 6):
            pend(client, family)
            client.programs["crab_ingress"].test_run(bytes(full_answer(family)))
        with pytest.raises(MemoryError, match="record 1"):
            ring.consume()
        assert len(taken) == 2
        pend(client, 4)
        client.programs["crab_ingress"].test_run(bytes(full_answer(4)))
        assert ring.consume() == len(taken) - 2


LONG = [("MSS", 1460), ("SAckOK", b""), ("Timestamp", (7, 8)), ("NOP", None), ("WScale", 7)]


def full_answer(family: int) -> Packet:
    """A SYN-ACK with all that Linux puts into one; IPv6: all 40 bytes of options."""
    return answer(family, options=[*LONG, *redirect(VIP[family])[1:]], window=64000)


@pytest.mark.parametrize("size", ["same", "short", "long", "padded"])
@pytest.mark.parametrize("family", [4, 6])
def test_client_asks_a_backend_first(verifying, family, size):
    """The SYN-ACK is held until the backend has answered what the process sends; then it is as if it came only now."""
    client, asked, look = verifying
    run = client.programs["crab_ingress"].test_run
    key = pend(client, family)
    held = bytes(full_answer(family))
    for _ in range(2):  # the server may repeat it
        got = run(held)
        assert (got.retval, got.data) == (TC_SHOT, held)
    assert look() == 1
    source, target, packet = verify.probe(asked[0])
    assert (source, target) == (CLIENT[family], DIP[family])
    probe = layer(family)(packet)
    assert (probe.src, probe.dst) == (source, target)
    assert (probe[TCP].sport, probe[TCP].dport, str(probe[TCP].flags)) == (4242, 80, "A")
    # Out of the backend's window, but not far; and no SYN cookie of another size.
    assert (probe[TCP].seq, probe[TCP].ack) == (1000 - 16, 6)
    right = probe.copy()
    del right[TCP].chksum
    assert layer(family)(bytes(right))[TCP].chksum == probe[TCP].chksum
    # Others' packets, and what does not answer it, change nothing.
    more = {"same": LONG, "short": [], "long": [*LONG, ("Timestamp", (1, 2)), *[("NOP", None)] * 2], "padded": []}[size]
    reply = answer(family, flags="A", seq=6, options=more)
    for wrong in (answer(family, flags="A", seq=6, ack=1001), answer(family, flags="A", ack=1000, sport=81)):
        assert run(bytes(wrong)).data == bytes(wrong)
    assert flow_at(client, key).state == lib.CRAB_CLIENT_HELD
    frame = bytes(reply) + bytes(6 if size == "padded" else 0)
    got = run(frame)
    assert got.retval == TC_UNSPEC
    assert got.data == as_from_vip(held, family)
    assert flow_at(client, key).state == lib.CRAB_CLIENT_ACCEPTED
    assert client.counts() == {"redirected": 1, "verified": 1, "packets_in": 1}
    # It is known from now on.
    pend(client, family, port=4243)
    assert run(bytes(answer(family, dport=4243))).retval == TC_UNSPEC
    assert client.counts()["redirected"] == 2
    assert look() == 0


@pytest.mark.parametrize("family", [4, 6])
def test_client_rst_proves_nothing(verifying, family):
    """A backend sends one if it keeps no SYNs; a firewall as well."""
    client, _, _ = verifying
    run = client.programs["crab_ingress"].test_run
    key = pend(client, family)
    run(bytes(full_answer(family)))
    assert run(bytes(answer(family, flags="R", seq=6, ack=0, options=[]))).retval == TC_SHOT
    assert flow_at(client, key).state == lib.CRAB_CLIENT_HELD
    assert client.counts() == {}


PROOFS = {
    "nobody-there": (lambda client: let(client, -1), False),
    "fresh": (lambda client: spoke(client, 1), False),
    "old": (lambda client: spoke(client, offering.PROVEN + 1), True),
    "before-the-routes-changed": (lambda client: (spoke(client, 1), let(client, since_ns=time.monotonic_ns())), True),
    "failed-since": (lambda client: spoke(client, 0), True),
}


def spoke(client: Counted, ago: float) -> None:
    """A backend has shown that it hears us; 0: never."""
    backend = mapped(ip_address(VIP[4])) + mapped(ip_address(DIP[4])) + struct.pack("!HBx", 80, 6)
    proven = time.monotonic_ns() - int(ago * 1e9) if ago else 0
    health = ffi.new("struct crab_client_health *", {"proven_ns": max(proven, 1) if ago else 0})
    client.maps["client_paths"].update(backend, bytes(ffi.buffer(health)))


@pytest.mark.parametrize("name", PROOFS)
def test_client_asks_when(verifying, name):
    client, _, look = verifying
    prepare, asks = PROOFS[name]
    prepare(client)
    key = pend(client, 4)
    client.programs["crab_ingress"].test_run(bytes(answer(4)))
    assert look() == asks
    assert flow_at(client, key).state == (lib.CRAB_CLIENT_HELD if asks else lib.CRAB_CLIENT_ACCEPTED)


@pytest.mark.parametrize("family", [4, 6])
def test_client_fallback_while_a_redirect_is_held(verifying, family):
    """Its SYN-ACK comes first: the socket has it, and the backend is nobody's any more."""
    client, _, _ = verifying
    run = client.programs["crab_ingress"].test_run
    pend(client, family)
    run(bytes(full_answer(family)))
    client.programs["crab_egress"].test_run(bytes(sent(family, "S")))
    fallback = answer(family, seq=78, options=[])
    fallback[layer(family)].src = VIP[family]
    got = run(bytes(fallback))
    assert (got.retval, got.data) == (TC_UNSPEC, bytes(fallback))


# ---- the sweep ----


@pytest.mark.parametrize(("crowd", "gone"), [(0, {2, 7}), (FLOWS // 2, {2, 3, 7})])
def test_sweep_forgets_closed_connections(client, crowd, gone):
    """Those whose time is over; when there is little room, 55 s sooner.  Never those that live."""
    now = time.monotonic_ns()
    for port, owner, ends_s in ((1, OWNER, 0), (2, 0, -1), (3, 0, 40), (4, 0, 65), (5, OWNER, -1)):
        redirected(client, 4, port, owner=owner, ends_ns=now + int(ends_s * 1e9) if ends_s else 0)
    put(client, 4, 6)
    put(client, 4, 7, owner=0)
    for port in range(crowd):
        redirected(client, 4, 1000 + port)
    start_sweeping(client.programs["crab_sweep"])
    until(lambda: flow_at(client, place(4, 2)) is None, 15)
    until(lambda: len(list(client.maps["client_flows"].keys())) == 7 - len(gone) + crowd, 5)
    assert {port for port in range(1, 8) if flow_at(client, place(4, port)) is None} == gone


# ---- the binding ----


def test_load_errors_carry_the_verifiers_words(tmp_path):
    source, target = tmp_path / "bad.bpf.c", tmp_path / "bad.bpf.o"
    source.write_text(
        '#include <linux/bpf.h>\n#include <bpf/bpf_helpers.h>\nSEC("xdp") int reads_past(struct xdp_md *c)\n'
        '{ return *(int *)(long)c->data; }\nchar LICENSE[] SEC("license") = "GPL";\n'
    )
    triplet = subprocess.run(["gcc", "-print-multiarch"], capture_output=True, text=True, check=True).stdout.strip()
    subprocess.run(
        ["clang", "-target", "bpf", "-O2", "-g", f"-I/usr/include/{triplet}", "-c", source, "-o", target], check=True
    )
    with pytest.raises(bpf.BpfLoadError) as caught:
        bpf.Object(target)
    assert "invalid access to packet" in caught.value.log
    assert "bad.bpf.o" in str(caught.value)


def test_object_errors(tmp_path):
    with pytest.raises(bpf.BpfNotFoundError, match=r"nothing\.o"):
        bpf.Object(tmp_path / "nothing.o")
    (tmp_path / "text.o").write_text("this is no object")
    with pytest.raises(bpf.BpfLoadError, match=r"text\.o"):
        bpf.Object(tmp_path / "text.o")
    with bpf.Object(bpf.object_path("xsk")) as loaded:
        with pytest.raises(bpf.BpfNotFoundError, match="has no program nothing; it has crab_xsk"):
            loaded.program("nothing")
        with pytest.raises(bpf.BpfNotFoundError, match="has no map nothing; it has sockets"):
            loaded.map("nothing")


def test_maps_and_pins():
    folder = bpf.ensure_bpffs() / f"crablb-test-{os.getpid()}"  # whose descriptor stays
    before = len(os.listdir("/proc/self/fd"))
    try:
        with bpf.Object(bpf.object_path("client"), max_entries={"client_flows": 3}) as loaded:
            flows = loaded.map("client_flows")
            assert flows.max_entries == 3
            for i in range(3):
                flows.update(bytes([i]) * flows.key_size, bytes(flows.value_size))
            with pytest.raises(bpf.BpfError, match=r"client_flows is full \(3 entries\)"):
                flows.update(bytes([9]) * flows.key_size, bytes(flows.value_size))
            with pytest.raises(ValueError, match=f"a key has {flows.key_size} bytes, not 1"):
                flows.update(b"x", bytes(flows.value_size))
            with pytest.raises(ValueError, match=f"a value has {flows.value_size} bytes, not 1"):
                flows.update(bytes(flows.key_size), b"x")
            assert flows.delete(bytes([0]) * flows.key_size)
            assert not flows.delete(bytes([0]) * flows.key_size)
            assert sorted(key[0] for key, _ in flows.items()) == [1, 2]
            flows.pin(folder / "flows")
            with pytest.raises(bpf.BpfBusyError):
                flows.pin(folder / "flows")
        # It outlives its object by its pin.
        with bpf.Map.from_pin(folder / "flows") as again:
            assert sorted(key[0] for key, _ in again.items()) == [1, 2]
            with bpf.Object(bpf.object_path("client"), reuse={"client_flows": again}) as other:
                assert other.map("client_flows").id == again.id
        with pytest.raises(bpf.BpfNotFoundError, match="other"):
            bpf.Map.from_pin(folder / "other")
    finally:
        pins.remove(folder)
    assert len(os.listdir("/proc/self/fd")) == before


def test_links(namespace):
    with bpf.Object(bpf.object_path("xsk")) as loaded, bpf.Object(bpf.object_path("lb")) as other:
        program = loaded.program("crab_xsk")
        index = socket.if_nametoindex("veth0")
        assert bpf.xdp_program(index)[0] == 0
        with program.attach_xdp(index) as link:
            assert link.mode == "native"
            assert bpf.xdp_program(index) == (program.id, "native")
            with pytest.raises(bpf.BpfBusyError):
                program.attach_xdp(index)
            link.update(other.program("crab_lb"))
            assert bpf.xdp_program(index)[0] == other.program("crab_lb").id
        assert bpf.xdp_program(index)[0] == 0
        with program.attach_xdp(index, "generic") as link:
            assert bpf.xdp_program(index) == (program.id, "generic")
        with pytest.raises(bpf.BpfError) as caught:
            program.attach_xdp(9999)
        assert caught.value.errno in (errno.ENODEV, errno.EINVAL)


def tc(*args: str) -> str:
    return subprocess.run(["tc", *args], capture_output=True, text=True, check=True).stdout


def prefs() -> set[str]:
    return set(re.findall(r"pref \d+", tc("filter", "show", "dev", "veth0", "ingress")))


def test_tc_filters(namespace):
    index = socket.if_nametoindex("veth0")
    with bpf.Object(bpf.object_path("client")) as loaded:
        program = loaded.program("crab_ingress")
        mine, made = bpf.attach_tc(program, index, priority=7)
        assert made
        _, made = bpf.attach_tc(program, index, priority=8)
        assert not made
        assert {"pref 7", "pref 8"} <= prefs()
        mine.detach()
        mine.detach()  # nothing happens
        assert "pref 8" in prefs() and "pref 7" not in prefs()
        mine.destroy_hook()
        assert "clsact" not in tc("qdisc", "show", "dev", "veth0")


# ---- the load balancer's flows ----

MACS = bytes.fromhex("020000000b0b020000000202")
TUNNEL_SRC = {4: "10.0.0.2", 6: "fd00::2"}


SEED = bytes(range(16))


def know(lb: Counted, family: int, backend: str, *, tunnel: bool = False, mtu: int = 1500, age: int = 0,
         ifindex: int = LO, tx: bool = True, redirect: bool = False,
         partial: int = lib.CRAB_PARTIAL_FINISH, frags: bool = True, room: bool = False) -> int:  # fmt: skip
    """Make the flow of :func:`to_vip` known, to backend 7; returns its hash."""
    client, vip, address = ip_address(CLIENT[family]), ip_address(VIP[family]), ip_address(backend)
    hash_ = flowmap.flow_hash(SEED, client, 4242, vip, 80)
    flags = lib.CRAB_FLOW_TUNNEL if tunnel else 0
    assert lb.table.add(hash_, 7, family, age=age, flags=flags)
    source = ip_address(TUNNEL_SRC[address.version])
    how = Ways(tx, redirect, partial, frags, room)
    lb.maps["paths"].update(7, paths.path(address, MACS, mtu, source, ifindex, how))
    return hash_


def known(lb: Counted, hash_: int) -> np.void | None:
    (places,) = np.nonzero(lb.table.places["hash"] == hash_)
    return lb.table.places[places[0]] if len(places) else None


@pytest.fixture
def flows(namespace) -> Iterator[Counted]:
    with forwarding(SEED) as loaded:
        yield Counted(loaded, "xdp_counters", list(statistics.XDP_COUNTERS))


@pytest.mark.parametrize("family", [4, 6])
def test_flow_by_mac(flows, family):
    know(flows, family, DIP[family])
    frame = bytes(ether() / to_vip(family, flags="PA") / b"data")
    run = flows.programs["crab_lb"].test_run(frame)
    assert run.retval == XDP_TX
    assert run.data == a_hop_less(MACS + frame[12:])
    assert flows.counts() == {"flow": 1}
    counted = statistics.read_services(flows.maps["services"], flows.maps["service_counters"])
    assert counted[url(VIP[family], 80)] == {"packets": 1, "bytes": len(frame)}
    assert counted[url(VIP[10 - family], 80)] == {"packets": 0, "bytes": 0}


@pytest.mark.parametrize("tunnel", [False, True])
@pytest.mark.parametrize("family", [4, 6])
def test_flow_with_room_in_front(flows, family, tunnel):
    """What may lie in zero-copy memory has zeros in front, by either way; other frames have nothing."""
    frame = bytes(ether() / to_vip(family, flags="PA") / b"data")
    for tx, verdict in ((True, XDP_TX), (False, XDP_REDIRECT)):
        sent = {}
        for room in (False, True):
            know(flows, family, DIP[family], tunnel=tunnel, tx=tx, redirect=not tx, room=room)
            run = flows.programs["crab_lb"].test_run(frame)
            assert run.retval == verdict
            sent[room] = run.data
            flows.table.places["hash"] = 0
        assert sent[True] == bytes(lib.CRAB_ROOM) + sent[False]


@pytest.mark.parametrize("state", [lib.CRAB_FLOW_LONE, lib.CRAB_FLOW_ENDING, lib.CRAB_FLOW_OPEN])
def test_a_packet_of_another_second_makes_a_flow_more_than_one_packets(flows, state):
    hash_ = know(flows, 4, DIP[4], age=5)
    known(flows, hash_)["state"] = state
    frame = bytes(ether() / to_vip(4, flags="A"))
    assert flows.programs["crab_lb"].test_run(frame).retval == XDP_TX
    flow = known(flows, hash_)
    assert (flowmap.now() - int(flow["seen"])) & 0xFFFF < 5
    assert flow["state"] == (lib.CRAB_FLOW_OPEN if state == lib.CRAB_FLOW_LONE else state)


@settings(max_examples=200)
@given(st.integers(1, 2**32 - 2), st.integers(1, 65535), st.integers(0, 2**64 - 1), st.booleans())
def test_flow_is_found_by_its_hash(flows, client, port, seed, v6):
    """The program's hash is SipHash-1-3 of the four-tuple, as the independent reference has it."""
    family = 6 if v6 else 4
    key = seed.to_bytes(8, "little") * 2
    address = ip_address(f"fd00::{client >> 16:x}:{client & 0xFFFF:x}") if v6 else ip_address(client)
    flows.maps["hashing"].update(0, flowmap.hashing(key, 64))
    flows.table.places["hash"] = 0
    flows.maps["paths"].update(7, paths.path(ip_address(DIP[4]), MACS, 1500, None, LO, Ways(tx=True)))
    message = address.packed + ip_address(VIP[family]).packed + port.to_bytes(2, "big") + (80).to_bytes(2, "big")
    place = (siphash(key, message) & 63) * lib.CRAB_BUCKET + port % lib.CRAB_BUCKET
    flows.table.places[place] = (siphash(key, message), 7, family, flowmap.now() & 0xFFFF, lib.CRAB_FLOW_OPEN, 0)
    packet = layer(family)(src=str(address), dst=VIP[family]) / TCP(sport=port, dport=80, flags="A")
    assert flows.programs["crab_lb"].test_run(bytes(ether() / packet)).retval == XDP_TX
    other = layer(family)(src=str(address), dst=VIP[family]) / TCP(sport=port ^ 1, dport=80, flags="A")
    assert flows.programs["crab_lb"].test_run(bytes(ether() / other)).retval == XDP_REDIRECT


@pytest.mark.parametrize("tunnel", [False, True])
def test_flow_by_another_interface(flows, tunnel):
    """By a redirect; what does not fit there, and what that interface does not take, goes to user space."""
    frame = bytes(ether() / to_vip(4, flags="PA") / bytes(1000))
    program, other = flows.programs["crab_lb"], socket.if_nametoindex("veth1")
    know(flows, 4, DIP[4], tunnel=tunnel, ifindex=other, tx=True, redirect=True)
    assert program.test_run(frame).data.startswith(MACS)
    assert flows.counts() == {"flow": 1}
    know(flows, 4, DIP[4], tunnel=tunnel, ifindex=other, tx=True, redirect=True, mtu=1000)
    assert program.test_run(frame).data == frame
    know(flows, 4, DIP[4], tunnel=tunnel, ifindex=other, tx=True, redirect=False)
    assert program.test_run(frame).data == frame
    # Back by the interface that it came from: both ways.
    know(flows, 4, DIP[4], tunnel=tunnel, tx=False, redirect=True)
    assert program.test_run(frame).retval == XDP_REDIRECT
    know(flows, 4, DIP[4], tunnel=tunnel, tx=False, redirect=False)
    assert program.test_run(frame).data == frame
    assert flows.counts() == {"flow": 2, "other": 3}


@pytest.mark.parametrize("outer", [4, 6])
@pytest.mark.parametrize("inner", [4, 6])
@pytest.mark.parametrize("padding", [0, 6])
def test_flow_by_tunnel(flows, inner, outer, padding):
    know(flows, inner, DIP[outer], tunnel=True)
    frame = bytes(ether() / to_vip(inner, flags="A"))
    run = flows.programs["crab_lb"].test_run(frame + bytes(padding))
    assert run.retval == XDP_TX
    got, again = Ether(run.data), Ether(run.data)
    assert run.data[:12] == MACS
    assert (got[1].src, got[1].dst) == (TUNNEL_SRC[outer], DIP[outer])
    assert bytes(got[1].payload) == frame[14:]
    if outer == 4:
        del again[1].chksum
        assert (got[1].ttl, got[1].flags, got[1].proto) == (64, "DF", 4 if inner == 4 else 41)
    assert bytes(again) == run.data


@pytest.mark.parametrize("outer", [4, 6])
@pytest.mark.parametrize("inner", [4, 6])
def test_the_class_is_outside_what_it_is_inside(flows, inner, outer):
    """With its congestion mark (RFC 6040, 4.1, normal mode)."""
    know(flows, inner, DIP[outer], tunnel=True)
    for ecn in range(4):
        packet = to_vip(inner, flags="A")
        setattr(packet, "tos" if inner == 4 else "tc", 0xB8 | ecn)
        got = Ether(flows.programs["crab_lb"].test_run(bytes(ether() / packet)).data)[1]
        assert (got.tos if outer == 4 else got.tc) == 0xB8 | ecn
        assert bytes(got.payload) == bytes(packet)


ASKED = {
    "syn": {"flags": "S"},
    "other-port": {"flags": "A", "sport": 4243},
}


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("name", ASKED)
def test_flow_user_space_is_asked(flows, family, name):
    know(flows, family, DIP[family])
    frame = bytes(ether() / to_vip(family, **ASKED[name]))
    run = flows.programs["crab_lb"].test_run(frame)
    assert (run.retval, run.data) == (XDP_REDIRECT, frame)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("tunnel", [False, True])
@pytest.mark.parametrize("size", [0, 1, 2, 3, 1000, 1399])
def test_flow_whose_checksum_was_left_to_the_card(flows, family, tunnel, size):
    """It is finished, or, where a socket buffer says that it is still to be done, left so; else user space does it."""
    run = flows.programs["crab_lb"].test_run
    data = bytes(range(7, 256)) * 6
    whole = bytes(ether() / to_vip(family, flags="PA") / data[:size])
    addresses = [ip_address(a).packed for a in (CLIENT[family], VIP[family])]
    left = ~reference.checksum(reference.pseudo(*addresses, 20 + size)) & 0xFFFF
    partial = bytes(ether() / to_vip(family, flags="PA", chksum=left) / data[:size])
    know(flows, family, DIP[family], tunnel=tunnel)
    got, wanted = run(partial), run(whole)
    assert (got.retval, wanted.retval) == (XDP_TX, XDP_TX)
    assert got.data == wanted.data
    assert flows.counts() == {"flow": 2}
    wrong = bytes(ether() / to_vip(family, flags="PA", chksum=(left + 1) & 0xFFFF) / data[:size])
    assert run(wrong).retval == XDP_REDIRECT
    know(flows, family, DIP[family], tunnel=tunnel, partial=lib.CRAB_PARTIAL_ASK)
    asked = run(partial)
    assert (asked.retval, asked.data) == (XDP_REDIRECT, partial)
    assert run(whole).retval == XDP_TX
    know(flows, family, DIP[family], tunnel=tunnel, partial=lib.CRAB_PARTIAL_KEEP)
    kept = run(partial)
    assert (kept.retval, kept.data[-len(partial) + 34 :]) == (XDP_TX, partial[34:])


@several_buffers
@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("tunnel", [False, True])
@pytest.mark.parametrize("size", [3000, 5001, 8948, 8190, 20003, 65000])
def test_flow_in_several_buffers(flows, family, tunnel, size):
    """The program reaches the first buffer alone; the checksum is of all.  An interface that takes no more asks."""
    run = flows.programs["crab_lb"].test_run
    data = bytes((i * 7 + i // 251) & 0xFF for i in range(size))
    whole = bytes(ether() / to_vip(family, flags="PA") / data)
    addresses = [ip_address(a).packed for a in (CLIENT[family], VIP[family])]
    left = ~reference.checksum(reference.pseudo(*addresses, 20 + size)) & 0xFFFF
    partial = bytes(ether() / to_vip(family, flags="PA", chksum=left) / data)
    know(flows, family, DIP[family], tunnel=tunnel, mtu=65535)
    got, finished = run(whole), run(partial)
    assert (got.retval, finished.retval) == (XDP_TX, XDP_TX)
    assert got.data == finished.data
    assert got.data[-size - 20 :] == whole[-size - 20 :]
    assert flows.counts() == {"flow": 2}
    for at in (14 + 40, len(whole) // 2, len(whole) - 1):
        wrong = bytearray(whole)
        wrong[at] ^= 1
        asked = run(bytes(wrong))
        assert (asked.retval, asked.data) == (XDP_REDIRECT, bytes(wrong))
    cut = run(whole[:-1])
    assert (cut.retval, cut.data) == (XDP_REDIRECT, whole[:-1])
    for frags in (False, True):
        know(flows, family, DIP[family], tunnel=tunnel, mtu=65535, tx=False, redirect=True, frags=frags)
        assert run(whole).data.startswith(MACS) == (frags or size == 3000)


@pytest.mark.parametrize("family", [4, 6])
def test_flow_loses_a_hop(flows, family):
    """By MAC address: what would go round ends.  Through a tunnel the inner packet stays as it is."""
    run = flows.programs["crab_lb"].test_run
    hops = "ttl" if family == 4 else "hlim"

    def frame(left: int) -> bytes:
        packet = to_vip(family, flags="FA")
        setattr(packet, hops, left)
        return bytes(ether() / packet)

    flows.maps["interfaces"].delete(LO)  # without a daemon, so that the program alone has to do with a FIN
    hash_ = know(flows, family, DIP[family])
    for left in (1, 0):
        assert run(frame(left)).retval == XDP_DROP
    assert known(flows, hash_)["state"] == lib.CRAB_FLOW_OPEN  # it was not forwarded: nothing has happened
    assert flows.counts() == {"drop_hops": 2}
    for left in (2, 64, 255):
        assert run(frame(left)).data == a_hop_less(MACS + frame(left)[12:])
    know(flows, family, DIP[family], tunnel=True)
    assert run(frame(1)).data.endswith(frame(1)[14:])


@pytest.mark.parametrize("family", [4, 6])
def test_flow_that_its_backend_sends_back(flows, family):
    """It ends here.  A backend that is the client itself is served, and so is everybody else that it forwards for."""
    run = flows.programs["crab_lb"].test_run
    frame = bytes(ether() / to_vip(family, flags="A"))
    back = frame[:6] + MACS[:6] + frame[12:]
    know(flows, family, DIP[family])
    assert run(back).retval == XDP_DROP
    assert flows.counts() == {"drop_sent_back": 1}
    know(flows, family, CLIENT[family])  # the backend's address is the packet's source
    assert run(back).retval == XDP_TX
    know(flows, family, DIP[family], tunnel=True)
    assert run(back).retval == XDP_TX


def test_flow_too_large_for_the_tunnel(flows):
    know(flows, 4, DIP[4], tunnel=True, mtu=100)
    fits = bytes(ether() / to_vip(4, flags="A") / bytes(40))
    assert flows.programs["crab_lb"].test_run(fits).retval == XDP_TX
    large = bytes(ether() / to_vip(4, flags="A") / bytes(41))
    assert flows.programs["crab_lb"].test_run(large).retval == XDP_REDIRECT


def test_flow_ends(flows):
    """By a SYN user space is asked again; of a FIN or a RST it is told, if it is there; age alone deletes."""
    ack = bytes(ether() / to_vip(4, flags="A"))
    run = flows.programs["crab_lb"].test_run
    hash_ = know(flows, 4, DIP[4])
    run(bytes(ether() / to_vip(4, flags="S")))
    assert run(ack).retval == XDP_REDIRECT  # until user space has decided
    know(flows, 4, DIP[4])
    assert run(ack).retval == XDP_TX
    ends = [bytes(ether() / to_vip(4, flags=flags)) for flags in ("FA", "FPA", "R", "RA")]
    queues = flows.maps["interfaces"].lookup(LO)
    for end in ends:
        assert run(end).retval == XDP_REDIRECT
        assert known(flows, hash_)["state"] == lib.CRAB_FLOW_OPEN
        flows.maps["interfaces"].delete(LO)
        assert run(end).retval == XDP_TX
        assert known(flows, hash_)["state"] == lib.CRAB_FLOW_ENDING
        assert run(ack).retval == XDP_TX  # and it goes on
        flows.maps["interfaces"].update(LO, queues)
        know(flows, 4, DIP[4])
    know(flows, 4, DIP[4], age=lib.CRAB_AGE_OPEN + 1)
    assert run(ack).retval == XDP_REDIRECT
    assert known(flows, hash_) is None
    # Another CPU's clock may be a little ahead.
    know(flows, 4, DIP[4], age=-1)
    assert run(ack).retval == XDP_TX
    know(flows, 4, DIP[4], age=30)
    assert run(ack).retval == XDP_TX
    assert (flowmap.now() - int(known(flows, hash_)["seen"])) & 0xFFFF <= 1


def test_flow_without_a_path(flows):
    know(flows, 4, DIP[4])
    flows.maps["paths"].update(7, paths.no_path(ip_address(DIP[4])))
    assert flows.programs["crab_lb"].test_run(bytes(ether() / to_vip(4, flags="A"))).retval == XDP_REDIRECT


def test_sweep(flows):
    young, old = know(flows, 4, DIP[4], age=lib.CRAB_AGE_OPEN - 5), know(flows, 6, DIP[6], age=lib.CRAB_AGE_OPEN + 5)
    assert flows.table.count() == 1
    services = np.ones(1 << 16, np.bool_)
    assert flows.table.sweep(services).tolist() == [0] * 7 + [1]
    assert known(flows, young) is not None
    assert known(flows, old) is None
    # One that has ended makes room, and is not counted, but stays as long as any other.
    place = known(flows, young)
    place["state"] = lib.CRAB_FLOW_ENDING
    flows.table.places[flows.table.places["hash"] == young] = place
    assert flows.table.count() == 0
    assert flows.table.sweep(services).tolist() == [0] * 7 + [1]
    services[4] = False
    assert flows.table.sweep(services).tolist() == []
    assert known(flows, young) is None


def test_what_is_inherited(flows, tmp_path):
    folder = bpf.ensure_bpffs() / f"crablb-test-{os.getpid()}"
    know(flows, 4, DIP[4])
    with pytest.raises(bpf.BpfNotFoundError):
        flowmap.Inherited.open(folder, SEED)
    try:
        for name in ("services", "hashing", "flows", "paths"):
            flows.maps[name].pin(folder / name)
        inherited = flowmap.Inherited.open(folder, SEED)
        assert inherited.backends == {ip_address(DIP[4]): 7}
        assert inherited.services == {parse_vip(url(VIP[f], 80)): f for f in (4, 6)}
        inherited.close()
        with pytest.raises(ValueError, match="another seed"):
            flowmap.Inherited.open(folder, bytes(16))
        (folder / "paths").unlink()
        flows.maps["xdp_counters"].pin(folder / "paths")
        with pytest.raises(ValueError, match="another version"):
            flowmap.Inherited.open(folder, SEED)
    finally:
        pins.remove(folder)


def icmp_error(family: int, kind: int, quoted: Packet, cut: int | None = None) -> bytes:
    """A router's error about a packet of the server."""
    router = "10.0.0.254" if family == 4 else "fd00::fe"
    error = ICMP(type=kind, code=4) if family == 4 else ICMPv6DestUnreach(type=kind)
    return bytes(ether() / layer(family)(src=router, dst=VIP[family]) / error / Raw(bytes(quoted)[:cut]))


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("kind", [1, 2, 3, 4, 11, 12, 8])
def test_icmp_errors_follow_the_flow(flows, family, kind):
    errors = {4: (3, 11, 12), 6: (1, 2, 3, 4)}[family]
    quoted = layer(family)(src=VIP[family], dst=CLIENT[family]) / TCP(sport=80, dport=4242, seq=7)
    run = flows.programs["crab_lb"].test_run
    frame = icmp_error(family, kind, quoted, (20 if family == 4 else 40) + 8)
    assert run(frame).retval == (XDP_REDIRECT if kind in errors else XDP_PASS)
    know(flows, family, DIP[family])
    got = run(frame)
    assert got.retval == (XDP_TX if kind in errors else XDP_PASS)
    assert got.data == (a_hop_less(MACS + frame[12:]) if kind in errors else frame)
    for wrong in (
        layer(family)(src=DIP[family], dst=CLIENT[family]) / TCP(sport=80, dport=4242),
        layer(family)(src=VIP[family], dst=CLIENT[family]) / TCP(sport=81, dport=4242),
    ):
        assert run(icmp_error(family, kind, wrong)).retval == XDP_PASS
    for length in range(14, len(frame)):
        assert run(frame[:length]).retval in (XDP_PASS, XDP_REDIRECT)


# ---- whose frames ----


def macs(*own: str) -> bytes:
    """``struct crab_macs``."""
    listed = [bytes.fromhex(mac.replace(":", "")) + bytes(2) for mac in own]
    return b"".join(listed + listed[:1] * (lib.CRAB_MAX_MACS - len(listed)))


OURS, ROUTERS, FOREIGN = "02:00:00:00:00:02", "00:00:5e:00:01:07", "02:00:00:00:99:99"


def sent_to(mac: str, frame: bytes) -> bytes:
    return bytes.fromhex(mac.replace(":", "")) + frame[6:]


@pytest.mark.parametrize("tunnel", [False, True])
@pytest.mark.parametrize("family", [4, 6])
def test_frames_to_another_mac_address_are_let_alone(flows, family, tunnel):
    know(flows, family, DIP[family], tunnel=tunnel)
    flows.maps["macs"].update(LO, macs(OURS, ROUTERS))
    quoted = layer(family)(src=VIP[family], dst=CLIENT[family]) / TCP(sport=80, dport=4242)
    frames = [bytes(ether() / to_vip(family, flags=flags)) for flags in ("A", "S")]
    frames += [bytes(ether() / Dot1Q(vlan=5) / to_vip(family)), icmp_error(family, 3, quoted)]
    run = flows.programs["crab_lb"].test_run
    for frame in frames:
        for mac in (FOREIGN, "00:00:00:00:00:00", "02:00:00:00:00:03", "03:00:00:00:00:02", "ff:ff:ff:ff:ff:ff"):
            got = run(sent_to(mac, frame))
            assert (got.retval, got.data) == (XDP_PASS, sent_to(mac, frame))
    assert flows.counts() == {"pass_other_mac": 3 * len(frames), "pass_not_vip": 2 * len(frames)}
    for mac in (OURS, ROUTERS):
        know(flows, family, DIP[family], tunnel=tunnel)  # the SYN has it asked about
        assert {run(sent_to(mac, frame)).retval for frame in frames} == {XDP_TX, XDP_REDIRECT}
    # A handler may have what is no VIP's, and nothing else.
    flows.maps["handlers"].update(0, bytes(ffi.buffer(compiled([{"protocol": 6}, {"ethertype": 0x0806}]))))
    other = bytes(ether() / layer(family)(dst=OTHER_VIP[family]) / TCP(dport=80))
    for mac in (FOREIGN, "ff:ff:ff:ff:ff:ff"):
        assert run(sent_to(mac, frames[0])).retval == XDP_PASS
        assert run(sent_to(mac, other)).retval == XDP_REDIRECT
        assert run(sent_to(mac, bytes(ether() / ARP()))).retval == XDP_REDIRECT
    # What is said of another interface is nothing to this one.
    flows.maps["macs"].delete(LO)
    flows.maps["macs"].update(LO + 1, macs(ROUTERS))
    assert run(sent_to(FOREIGN, frames[1])).retval == XDP_REDIRECT


# ---- direct server return on the server ----


@pytest.fixture
def dsr(namespace) -> Iterator[Counted]:
    with bpf.Object(bpf.object_path("dsr")) as loaded:
        for family in (4, 6):
            loaded.map("dsr_vips").update(mapped(ip_address(VIP[family])), 1)
        for prefix in EVERYWHERE:
            loaded.map("dsr_sources").update(lpm_key(prefix), prefix.version)
        yield Counted(loaded, "dsr_counters", counter_names("crab_dsr_counter", "CRAB_DSR_"))


@pytest.mark.parametrize("outer", [4, 6])
@pytest.mark.parametrize("inner", [4, 6])
def test_decapsulation(dsr, inner, outer):
    packet = to_vip(inner, flags="A") / b"data"
    frame = bytes(ether() / layer(outer)(src=TUNNEL_SRC[outer], dst=DIP[outer]) / packet)
    run = dsr.programs["crab_decap"].test_run(frame)
    assert (run.retval, run.data) == (XDP_PASS, bytes(ether() / packet))
    assert dsr.counts() == {"decapsulated": 1}
    for length in range(14, len(frame) - len(packet) + (20 if inner == 4 else 40)):
        assert dsr.programs["crab_decap"].test_run(frame[:length]).data == frame[:length]
    other = bytes(ether() / layer(outer)(dst=DIP[outer]) / layer(inner)(dst=OTHER_VIP[inner]) / TCP())
    assert dsr.programs["crab_decap"].test_run(other).data == other
    assert dsr.counts() == {"decapsulated": 1, "not_vip": 1}


@pytest.mark.parametrize("outer", [4, 6])
@pytest.mark.parametrize("inner", [4, 6])
def test_decapsulation_of_several_buffers(dsr, inner, outer):
    packet = to_vip(inner, flags="A") / (bytes(range(256)) * 34)
    frame = bytes(ether() / layer(outer)(src=TUNNEL_SRC[outer], dst=DIP[outer]) / packet)
    run = dsr.programs["crab_decap"].test_run(frame)
    assert (run.retval, run.data) == (XDP_PASS, bytes(ether() / packet))
    assert dsr.counts() == {"decapsulated": 1}


@pytest.mark.parametrize("outer", [4, 6])
def test_tunnels_to_another_mac_address_are_let_alone(dsr, outer):
    dsr.maps["dsr_macs"].update(LO, macs(OURS))
    frame = bytes(ether() / layer(outer)(src=TUNNEL_SRC[outer], dst=DIP[outer]) / to_vip(4, flags="A"))
    run = dsr.programs["crab_decap"].test_run
    for mac in (FOREIGN, "00:00:00:00:00:00", "ff:ff:ff:ff:ff:ff", "01:00:5e:00:00:01"):
        assert run(sent_to(mac, frame)).data == sent_to(mac, frame)
    assert dsr.counts() == {"other_mac": 4}
    assert len(run(frame).data) < len(frame)
    assert dsr.counts() == {"other_mac": 4, "decapsulated": 1}


@pytest.mark.parametrize("outer", [4, 6])
@pytest.mark.parametrize("inner", [4, 6])
def test_tunnels_from_elsewhere_are_dropped(dsr, inner, outer):
    """Of prefixes that load balancers are in, the other family's says nothing, ::/0 neither."""
    for prefix in EVERYWHERE:
        dsr.maps["dsr_sources"].delete(lpm_key(prefix))
    run = dsr.programs["crab_decap"].test_run
    packet = to_vip(inner, flags="A") / b"data"

    def tunnel(source: str) -> bytes:
        return bytes(ether() / layer(outer)(src=source, dst=DIP[outer]) / packet)

    assert run(tunnel(TUNNEL_SRC[outer])).retval == XDP_DROP
    assert dsr.counts() == {"drop_source": 1}
    theirs = ip_network("::/0" if outer == 4 else "0.0.0.0/0")
    own = ip_network(f"{TUNNEL_SRC[outer]}/{31 if outer == 4 else 127}", strict=False)
    dsr.maps["dsr_sources"].update(lpm_key(theirs), theirs.version)
    assert run(tunnel(TUNNEL_SRC[outer])).retval == XDP_DROP
    dsr.maps["dsr_sources"].update(lpm_key(own), own.version)
    assert (run(tunnel(TUNNEL_SRC[outer])).retval, run(tunnel(str(own[1]))).retval) == (XDP_PASS, XDP_PASS)
    outside = str(own.network_address - 1), str(own.broadcast_address + 1)
    assert [run(tunnel(source)).retval for source in outside] == [XDP_DROP, XDP_DROP]
    assert dsr.counts() == {"drop_source": 4, "decapsulated": 2}
    # What is no VIP's, or not for this machine, is not looked at.
    other = layer(inner)(dst=OTHER_VIP[inner]) / TCP()
    stranger = bytes(ether() / layer(outer)(src=outside[0], dst=DIP[outer]) / other)
    assert run(stranger).retval == XDP_PASS
    dsr.maps["dsr_macs"].update(LO, macs(OURS))
    assert run(sent_to(FOREIGN, tunnel(outside[0]))).retval == XDP_PASS
    assert dsr.counts() == {"drop_source": 4, "decapsulated": 2, "not_vip": 1, "other_mac": 1}


@pytest.mark.parametrize(
    ("outer", "source", "target"),
    [
        (None, f"::ffff:{CLIENT[4]}", VIP[6]),
        (None, CLIENT[6], f"::ffff:{VIP[4]}"),
        (None, f"::ffff:{CLIENT[4]}", f"::ffff:{VIP[4]}"),
        ((f"::ffff:{TUNNEL_SRC[4]}", f"::ffff:{DIP[4]}"), CLIENT[6], VIP[6]),
    ],
)
def test_mapped_addresses_are_not_decapsulated(dsr, outer, source, target):
    inner = IPv6(src=source, dst=target) / TCP(dport=80, flags="A")
    for family in (4, 6):
        ends = outer or (TUNNEL_SRC[family], DIP[family])
        tunnel = IPv6 if outer else layer(family)
        frame = bytes(ether() / tunnel(src=ends[0], dst=ends[1]) / inner)
        run = dsr.programs["crab_decap"].test_run(frame)
        assert (run.retval, run.data) == (XDP_PASS, frame)
    assert "decapsulated" not in dsr.counts()
    options = [("MSS", 1460)]
    frame = bytes(ether() / IPv6(src=f"::ffff:{VIP[4]}", dst=CLIENT[6]) / TCP(sport=80, flags="SA", options=options))
    assert dsr.programs["crab_clamp"].test_run(frame).data == frame


def with_ecn(family: int, ecn: int, src: str, dst: str) -> Packet:
    """An IP header; its other six bits of the class say something too."""
    return IP(src=src, dst=dst, tos=0xB8 | ecn) if family == 4 else IPv6(src=src, dst=dst, tc=0xB8 | ecn)


@pytest.mark.parametrize("outer", [4, 6])
@pytest.mark.parametrize("inner", [4, 6])
def test_congestion_marks_survive_decapsulation(dsr, inner, outer):
    """The table of RFC 6040, 4.2, whatever the checksum is that changes with it."""
    not_ect, ect1, ect0, ce = range(4)
    for inside in range(4):
        for outside, number in itertools.product(range(4), range(0, 0x10000, 0x1111)):
            packet = with_ecn(inner, inside, CLIENT[inner], VIP[inner]) / TCP(dport=80, flags="A")
            if inner == 4:
                packet.id = number
            got = dsr.programs["crab_decap"].test_run(
                bytes(ether() / with_ecn(outer, outside, TUNNEL_SRC[outer], DIP[outer]) / packet)
            )
            if (inside, outside) == (not_ect, ce):
                assert got.retval == XDP_DROP
                continue
            after = ce if outside == ce else ect1 if (inside, outside) == (ect0, ect1) else inside
            if inner == 4:
                packet.tos = 0xB8 | after
            else:
                packet.tc = 0xB8 | after
            assert (got.retval, got.data) == (XDP_PASS, bytes(ether() / packet))
    counts = dsr.counts()
    assert counts == {"decapsulated": 15 * 16, "marked": 3 * 16, "drop_marked": 16}


def syn_ack(family: int, mss: int, source: str = "", flags: str = "SA", before: Sequence[object] = ()) -> bytes:
    tcp = TCP(sport=80, flags=flags, options=[*before, ("MSS", mss)])
    return bytes(ether() / layer(family)(src=source or VIP[family], dst=CLIENT[family]) / tcp)


def tunnel_comes_in(dsr: Counted) -> None:
    """At LO."""
    frame = bytes(ether() / layer(4)(src=TUNNEL_SRC[4], dst=DIP[4]) / to_vip(4))
    assert len(dsr.programs["crab_decap"].test_run(frame).data) < len(frame)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("before", [[], [("NOP", None)], [("SAckOK", b"")], [("NOP", None), ("Timestamp", (1, 2))]])
def test_mss_is_clamped(dsr, namespace, family, before):
    """Wherever the option stands, and only in SYN-ACKs of a VIP."""
    namespace.ip("link", "set", "lo", "mtu", "1500")
    tunnel_comes_in(dsr)
    limit = 1420 if family == 4 else 1400
    run = dsr.programs["crab_clamp"].test_run
    assert run(syn_ack(family, 1460, before=before)).data == syn_ack(family, limit, before=before)
    for left in (
        syn_ack(family, limit - 1, before=before),
        syn_ack(family, 1460, DIP[family], before=before),
        syn_ack(family, 1460, flags="S", before=before),
    ):
        assert run(left).data == left
    assert dsr.counts() == {"decapsulated": 1, "clamped": 1}


def lowered(options: bytes, limit: int) -> bytes:
    """RFC 9293, 3.1: the first MSS option of the list, wherever it can be read to."""
    at = 0
    for option in parse(options)[0]:
        if option.kind == 2 and len(option.data or b"") == 2:
            mss = min(limit, int.from_bytes(option.data or b"", "big"))
            return options[: at + 2] + mss.to_bytes(2, "big") + options[at + 4 :]
        at += len(option.raw)
    return options


OPTION = st.one_of(
    st.sampled_from([b"\0", b"\1", b"\4\2", b"\3\3\7", b"\2\3\5", b"\2\6\5\xb4\0\0", b"\2", b"\2\0", b"\x08\xff"]),
    st.integers(0, 65535).map(lambda mss: b"\2\4" + mss.to_bytes(2, "big")),
    st.binary(max_size=6),
)


def test_mss_is_clamped_in_any_list(dsr, namespace):
    namespace.ip("link", "set", "lo", "mtu", "1500")
    tunnel_comes_in(dsr)

    @settings(max_examples=1000)
    @given(st.lists(OPTION, min_size=1, max_size=40), st.sampled_from([4, 6]))
    def any_list(parts: list[bytes], family: int) -> None:
        joined = b"".join(parts)[:40]
        options = joined + bytes(-len(joined) % 4)
        length = {"len": 40 + len(options)} if family == 4 else {}
        head = ether() / layer(family)(src=VIP[family], dst=CLIENT[family], **length)

        def segment(options: bytes) -> bytes:
            return bytes(head / TCP(sport=80, flags="SA", dataofs=5 + len(options) // 4) / Raw(options))

        after = dsr.programs["crab_clamp"].test_run(segment(options)).data
        assert after == segment(lowered(options, 1420 if family == 4 else 1400))

    any_list()


def test_mss_is_what_the_tunnels_interfaces_take(dsr, namespace):
    """Of those alone that tunnels have come in by, as their MTU is now."""

    def offered() -> int:
        data = dsr.programs["crab_clamp"].test_run(syn_ack(4, 1460)).data
        return next(value for name, value in Ether(data)[TCP].options if name == "MSS")

    namespace.ip("link", "set", "lo", "mtu", "1400")
    namespace.ip("link", "set", "veth0", "mtu", "1000")
    assert offered() == 1460  # none came
    other = layer(4)(src=TUNNEL_SRC[4], dst=DIP[4]) / layer(4)(dst=OTHER_VIP[4]) / TCP()
    dsr.programs["crab_decap"].test_run(bytes(ether() / other))
    assert offered() == 1460  # nor that of something else
    tunnel_comes_in(dsr)
    assert offered() == 1320
    namespace.ip("link", "set", "lo", "mtu", "1300")
    assert offered() == 1220
    dsr.maps["dsr_tunnels"].update(socket.if_nametoindex("veth0"), 1)
    assert offered() == 920
    namespace.ip("link", "del", "veth0")
    assert offered() == 1220
    namespace.ip("link", "set", "lo", "mtu", "80")  # no room for any
    assert offered() == 1460


# ---- what is loaded ----


@pytest.mark.xdist_group("bpf-stats")
def test_run_times_of_loaded_programs():
    """Counted while the sysctl says so."""
    switch = Path("/proc/sys/kernel/bpf_stats_enabled")
    was = switch.read_text()
    with bpf.Object(bpf.object_path("xsk")) as loaded:
        program = loaded.program("crab_xsk")
        try:
            switch.write_text("1")
            program.test_run(bytes(64), repeat=100)
        finally:
            switch.write_text(was)
        found = []
        for other in bpf.programs():
            with other:
                if other.id == program.id:
                    found.append((other.name, other.run_time()))
    ((name, (ns, count)),) = found
    assert name == "crab_xsk"
    assert count >= 1
    assert ns > 0
