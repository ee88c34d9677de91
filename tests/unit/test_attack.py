"""Tables that strangers can write to: what they push out, and where what they choose falls."""

from __future__ import annotations

from collections import Counter
from ipaddress import ip_address, ip_network

import numpy as np
import pytest
from crablb._native import lib
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from crablb.dataplane.flows import flow_hash
from tests.helpers.frames import ether, reference
from tests.helpers.native import Core
from tests.unit.test_connections import CLIENT, ISN, LATER, PORT, VIP, Contested, families

BUCKETS = 16  # of a cache of 64 entries


@families
@pytest.mark.parametrize("flags", ["S", "A", "PA", "R", "FA"])
def test_a_flood_pushes_out_nobody_who_lives(family, flags):
    """Ten times what the cache holds, of connections that somebody made up; then others are served as before."""
    world = Contested(family, flows=64, table=True)
    world.open()
    for port in range(10000, 10000 + 64 * 10):
        assert world.send(flags, port, port=port) == world.old
    assert world.entries() <= 64
    world.move()
    assert world.send("PA", ISN + 2) == world.old  # known still, as the table is another
    # One that begins now is served, remembered or not: all its packets go to one server.
    for port in (5000, 5001, 5002):
        assert {world.send(f, LATER + i, port=port) for i, f in enumerate(("S", "A", "PA", "FA"))} == {world.new}
    # What was made up is gone in the end, and all is as it was.
    late = 1000 + lib.CRAB_AGE_OPEN
    assert world.send("S", ISN, port=6000, now=late) == world.new
    assert world.entries(late) == 1


@families
def test_packets_without_a_handshake_take_nobodys_place_in_the_programs_table(family):
    """Others' places are theirs, and others take theirs: connections that begin are written down all the while, and
    those of another load balancer too, of which more than one packet came."""
    world = Contested(family, table=True)
    lone = lib.CRAB_FLOW_LONE
    begun, moved_here = range(5000, 5008), range(6000, 6008)
    for port in begun:
        assert world.send("S", ISN, port=port) == world.send("A", ISN + 1, port=port) == world.old
    for second in (0, 1):
        for port in moved_here:
            assert world.send("A", ISN, port=port, now=1000 + second) == world.old
    states = world.places["state"][world.places["hash"] != 0]
    assert len(states) == 16
    assert lone not in states  # two packets are more than a stranger's one
    kept = set(world.places["hash"].tolist()) - {0}
    # Five times what there is room for, and later again.
    for now, first in ((1010, 10000), (1020, 30000)):
        for port in range(first, first + 5 * len(world.places)):
            assert world.send("A", port, port=port, now=now) == world.old
    assert np.count_nonzero(world.places["hash"]) == len(world.places)
    assert np.count_nonzero(world.places["state"] == lone) == len(world.places) - 16
    assert kept <= set(world.places["hash"].tolist())
    # The table is another; who begins now is known for all that.
    world.move()
    for port in range(7000, 7016):
        assert (
            world.send("S", LATER, port=port, now=1030) == world.send("A", LATER + 1, port=port, now=1030) == world.new
        )
    assert np.count_nonzero(world.places["state"] == lone) == len(world.places) - 32
    for port in (*begun, *moved_here):
        assert world.send("PA", ISN + 2, port=port, now=1030) == world.old


def bucket(seed: bytes, port: int) -> int:
    return flow_hash(seed, ip_address("203.0.113.9"), port, ip_address("10.0.0.100"), 80) % BUCKETS


def test_who_does_not_know_the_seed_fills_no_bucket():
    """4,000 ports that fall into one bucket under a seed fall into all alike under another."""
    theirs, ours = bytes(16), bytes(range(16))
    chosen = [port for port in range(1, 65536) if bucket(theirs, port) == 3]
    assert len(chosen) > 3500
    found = Counter(bucket(ours, port) for port in chosen)
    expected = len(chosen) / BUCKETS
    # Chi-square of 15 degrees of freedom: 44.3 is exceeded by one in 10,000; this is one seed, always the same.
    assert sum((found[i] - expected) ** 2 / expected for i in range(BUCKETS)) < 44.3


@families
@pytest.mark.parametrize("how", ["prefixes", "never"])
def test_who_is_not_to_be_redirected_learns_no_servers_address(family, how):
    """Whatever he sends stays addressed to the VIP, and no server is asked to answer by its own address."""
    expected = reference(mode="never" if how == "never" else "negotiated")
    for backend in expected.backends:
        backend.cr = backend.on_link = True
    for service in expected.services:
        service.prefixes = [ip_network("192.0.2.0/24"), ip_network("2001:db8::/32")] if how == "prefixes" else []
    core = Core(expected)
    redirect = (42, ip_address(VIP[family]).packed)
    for options in ([], [(42, b"")], [redirect], [(42, b""), redirect], [("MSS", 1460), ("SAckOK", b""), (42, b"")]):
        for flags in ("S", "A", "R", "SA", "SF"):
            head = (IP if family == 4 else IPv6)(src=CLIENT[family], dst=VIP[family])
            frame = bytes(ether() / head / TCP(sport=PORT, dport=80, flags=flags, seq=7, options=options))
            for out in core.handle(frame, now=1000):
                if out:
                    sent = Ether(out).payload
                    if not isinstance(sent.payload, TCP):  # a tunnel, whose outer header is for the way alone
                        sent = sent.payload
                    assert sent.dst == VIP[family]
                    # Behind the handshake nobody looks at options.
                    assert flags != "S" or not [kind for kind, _ in sent[TCP].options if kind == 42]
    assert core.counts()["fallback_mode" if how == "never" else "fallback_prefix"]
    assert not core.counts().get("redirected", 0)
