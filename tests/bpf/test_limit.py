"""How many SYNs a service takes (``syn_rate``): the XDP program's buckets of tokens, in front of the workers' rings."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from ipaddress import ip_address

import numpy as np
import pytest
from crablb._native import ffi, lib
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Dot1AD, Dot1Q

from crablb.config import parse_vip
from crablb.dataplane import flows as flowmap
from crablb.dataplane import paths
from crablb.dataplane.limits import LIMIT, Limits, word
from crablb.dataplane.paths import Ways
from crablb.dataplane.statistics import XDP_COUNTERS
from crablb.kernel import bpf
from crablb.model import Backend, Service
from tests.helpers.frames import ether
from tests.helpers.programs import LO, forwarding
from tests.reference.limit import SECOND, Bucket

SEED = bytes(range(16))
XDP_DROP, XDP_TX, XDP_REDIRECT = 1, 3, 4
VIPS = {4: parse_vip("tcp://10.0.0.100:80"), 6: parse_vip("tcp://[fd00::100]:80")}  # whose indices are 4 and 6
INDICES = {vip: family for family, vip in VIPS.items()}
CLIENTS = {4: "10.0.0.1", 6: "fd00::1"}
BACKENDS = {4: "10.0.0.11", 6: "fd00::11"}


def packet(family: int = 4, flags: str = "S", tags: int = 0, **more: object) -> bytes:
    head = [ether(), ether() / Dot1Q(vlan=7), ether() / Dot1AD(vlan=9) / Dot1Q(vlan=7)][tags]
    ip = (IP if family == 4 else IPv6)(src=CLIENTS[family], dst=str(VIPS[family].address))
    return bytes(head / ip / TCP(**{"sport": 4242, "dport": 80, "flags": flags, **more}))


class Limited:
    """The program, and its map of limits as user space has it."""

    def __init__(self, loaded: bpf.Object) -> None:
        self.maps, self.program = loaded.maps, loaded.program("crab_lb")
        self.limits = Limits(loaded.maps["limits"])
        whole = np.frombuffer(loaded.maps["limits"].mmap(), LIMIT, loaded.maps["limits"].max_entries)
        self.full = whole["full_ns"]

    def serve(self, rate: int, family: int = 4) -> None:
        service = Service(VIPS[family], (Backend(ip_address(BACKENDS[family])),), syn_rate=rate)
        self.limits.publish([service], INDICES)

    def taken(self, frame: bytes, count: int = 1) -> int:
        """Of so many of it, those handed to the worker; the others are dropped."""
        before, dropped = self.counts(), 0
        for _ in range(count):
            verdict = self.program.test_run(frame).retval
            assert verdict in (XDP_REDIRECT, XDP_DROP)
            dropped += verdict == XDP_DROP
        assert self.counts()["drop_syn_rate"] - before["drop_syn_rate"] == dropped
        return count - dropped

    def counts(self) -> dict[str, int]:
        return {name: self.maps["xdp_counters"].sum_u64(i) for i, name in enumerate(XDP_COUNTERS)}


@pytest.fixture
def lb(namespace) -> Iterator[Limited]:
    with forwarding(SEED) as loaded:
        yield Limited(loaded)


@given(rate=st.integers(1, 100_000_000))
def test_a_rate_in_a_word(rate):
    parts = ffi.cast("struct crab_rate *", ffi.new("uint64_t *", word(rate)))
    assert (parts.token_ns, parts.burst) == (SECOND // rate, Bucket(rate).room)
    assert word(rate) and not word(0)


@given(
    rate=st.integers(1, 100_000_000) | st.integers(1, 1000),
    lacks=st.integers(-SECOND, 17 * SECOND) | st.integers(-100_000, 200_000_000),
)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_one_syn(lb, rate, lacks):
    """Whatever there is in the bucket: taken or dropped, and what is left, as of the reference at that moment."""
    lb.serve(rate)
    token, room = SECOND // rate, Bucket(rate).room * (SECOND // rate)
    full = lb.full[4] = time.monotonic_ns() + lacks
    before = time.monotonic_ns()
    took = lb.taken(packet())
    after, then = time.monotonic_ns(), int(lb.full[4])

    def reference(now: int) -> bool:
        """Whether that takes it, having lacked as much."""
        bucket = Bucket(rate, at=now)
        if 0 < full - now <= room:  # more than that no bucket of this rate lacks
            bucket.held -= Fraction(full - now, token)
        return bucket.take(now)

    if (full - before <= room) == (full - after <= room) and reference(before) == reference(after):
        assert took == reference(before)
    if not took:
        assert then == full
    elif after < full <= before + room:
        assert then == full + token
    else:
        assert before + token <= then <= max(after, full) + token


@pytest.mark.parametrize("family", [4, 6])
def test_a_flood_to_one_service_leaves_others_alone(lb, family):
    """What is above the rate is dropped and counted, whatever is wrong with it; other services' is not."""
    assert lb.taken(packet(family), 500) == 500  # without a rate
    lb.serve(100, family)
    begun = time.monotonic()
    kinds = [packet(family), packet(family, tags=1), packet(family, tags=2), packet(family, chksum=1),
             packet(family, flags="SA"), packet(family, dataofs=1)]  # fmt: skip
    taken = sum(lb.taken(kind) for _ in range(200) for kind in kinds)
    took = time.monotonic() - begun
    assert 16 <= taken <= 16 + 100 * took + 1
    counts = lb.counts()
    assert (counts["syn"], counts["drop_syn_rate"]) == (500 + taken, 1200 - taken)
    assert lb.taken(packet(10 - family), 500) == 500


@pytest.mark.parametrize("family", [4, 6])
def test_what_is_no_syn_is_never_dropped(lb, family):
    """Packets of connections that the program knows, and of those that it does not; ICMP errors."""
    lb.serve(1, family)
    assert lb.taken(packet(family), 100) < 100
    assert lb.taken(packet(family, flags="A", sport=5000), 100) == 100
    hash_ = flowmap.flow_hash(SEED, ip_address(CLIENTS[family]), 4243, VIPS[family].address, 80)
    flowmap.FlowTable(lb.maps["flows"]).add(hash_, 7, family)
    backend = ip_address(BACKENDS[family])
    way = paths.path(backend, bytes.fromhex("020000000b0b020000000202"), 1500, ip_address("10.0.0.2"), LO,
                     Ways(True, False, lib.CRAB_PARTIAL_FINISH, True, False))  # fmt: skip
    lb.maps["paths"].update(7, way)
    known = packet(family, flags="PA", sport=4243)
    assert {lb.program.test_run(known).retval for _ in range(100)} == {XDP_TX}
    assert lb.counts()["drop_syn_rate"] < 100 + 1


def test_one_bucket_for_all_cpus(lb):
    """However the SYNs are spread, a service gets as many as it says, and no fewer."""
    cpus = sorted(os.sched_getaffinity(0))
    frame = packet()
    lb.serve(2000)

    def flood(cpu: int) -> None:
        os.sched_setaffinity(0, {cpu})
        while lb.counts()["syn"] < 3000 and time.monotonic() < begun + 60:
            lb.program.test_run(frame, repeat=100)

    begun = time.monotonic()
    with ThreadPoolExecutor(2 * len(cpus)) as pool:
        list(pool.map(flood, cpus * 2))
    took = time.monotonic() - begun
    counts = lb.counts()
    assert counts["drop_syn_rate"] > counts["syn"]
    assert 3000 <= counts["syn"] <= 200 + 2000 * took + 1


def test_a_change_of_something_else_gives_no_tokens(lb):
    lb.serve(1)
    assert 16 <= lb.taken(packet(), 100) < 100
    lb.serve(1)
    assert lb.taken(packet(), 10) < 10
    lb.serve(20)  # a changed rate begins with a full bucket
    assert lb.taken(packet(), 16) == 16
    lb.serve(0)
    assert lb.taken(packet(), 1000) == 1000
    lb.serve(1)
    assert lb.taken(packet(), 100) < 100
    lb.limits.fill(4)  # its index is another service's
    assert lb.taken(packet(), 16) == 16


def test_a_token_taken_by_a_rate_before(lb):
    """On another CPU, just when the rate was changed: the bucket lacks more than it has room for.  It is full then."""
    lb.serve(1000)
    lb.full[4] = time.monotonic_ns() + 16 * SECOND
    assert lb.taken(packet(), 100) == 100


def test_rates_change_while_syns_come(lb):
    """Each change is whole: never more at once than the larger bucket holds, beside what comes with time."""
    frame, stop = packet(), []

    def flood() -> None:
        while not stop:
            lb.program.test_run(frame, repeat=50)

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(flood)
        try:
            begun, changes = time.monotonic(), 0
            while time.monotonic() < begun + 1:
                lb.serve((1, 1000)[changes % 2])
                changes += 1
        finally:
            stop.append(True)
        running.result()
    took = time.monotonic() - begun
    assert changes > 100
    assert lb.counts()["syn"] <= (changes + 1) * 100 + 1000 * took + 1
    lb.serve(0)
    lb.serve(5)
    assert 16 <= lb.taken(frame, 100) < 100
