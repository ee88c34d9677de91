"""Connections of one four-tuple, one after the other or forged: which one a packet belongs to, and who may end whom."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import numpy as np
import pytest
from crablb._native import ffi, lib
from scapy.layers.inet import ICMP, IP, TCP
from scapy.layers.inet6 import ICMPv6DestUnreach, IPv6

from crablb.dataplane.flows import FLOW, flow_hash
from tests.helpers.frames import SEED, ether, reference
from tests.helpers.native import Core

PORT = 4242
ISN, LATER = 1_000_000, 3_000_000_000  # of the connection that is there, and of a newer SYN
CLIENT, VIP = {4: "10.0.0.1", 6: "fd00::1"}, {4: "10.0.0.100", 6: "fd00::100"}


class Contested:
    """A service of two backends: its table leads everybody to ``old``, and to ``new`` after :meth:`move`."""

    def __init__(self, family: int = 4, *, table: bool = False, flows: int = 4096) -> None:
        self.family = family
        self.expected = reference()
        first = 0 if family == 4 else 4
        self.old, self.new = first, first + 3
        for i in (self.old, self.new):
            self.expected.backends[i].cr = self.expected.backends[i].on_link = True
        self.service = self.expected.services[0 if family == 4 else 2]
        self.service.table = [self.old] * 61
        self.core = Core(self.expected, flows)
        self.places = np.zeros(64 * lib.CRAB_BUCKET, FLOW)
        self.hash = flow_hash(SEED, ip_address(CLIENT[family]), PORT, ip_address(VIP[family]), 80)
        if table:
            buckets = ffi.cast("struct crab_bucket *", ffi.from_buffer(self.places))
            self.table = ffi.gc(lib.crab_table_new(buckets, 64), lib.crab_table_free)
            lib.crab_core_learn(self.core.core, self.table)

    def move(self) -> None:
        """As when ``old`` is drained, or removed."""
        self.service.table = [self.new] * 61
        self.core.publish()

    def send(self, flags: str, seq: int, *, now: int = 1000, port: int = PORT, **more: Any) -> int | None:
        """The backend that a packet went to."""
        ip = (IP if self.family == 4 else IPv6)(src=CLIENT[self.family], dst=VIP[self.family])
        return self.went(bytes(ether() / ip / TCP(sport=port, dport=80, flags=flags, seq=seq % 2**32, **more)), now)

    def went(self, frame: bytes, now: int = 1000) -> int | None:
        (out,) = self.core.handle(frame, now=now)
        macs = [backend.mac for backend in self.expected.backends]
        return macs.index(out[:6]) if out else None

    def open(self) -> None:
        assert self.send("S", ISN) == self.send("A", ISN + 1) == self.old

    def entries(self, now: int = 1000, open_only: bool = False) -> int:
        counts = ffi.new("uint32_t[8]")
        lib.crab_core_count(self.core.core, counts, 8, now, open_only)
        return sum(counts)

    @property
    def written(self) -> np.void | None:
        """The flow in the XDP program's table."""
        found = self.places[self.places["hash"] == self.hash]
        return found[0] if len(found) else None


families = pytest.mark.parametrize("family", [4, 6])
bypass = pytest.mark.parametrize("table", [False, True], ids=["off", "on"])


@families
@bypass
@pytest.mark.parametrize("end", ["", "FA", "R", "RA"])
def test_a_port_used_again(family, table, end):
    """However the connection before ended, seen or not: the new one is decided anew, and is then the only one."""
    world = Contested(family, table=table)
    world.open()
    if end:
        assert world.send(end, ISN + 9) == world.old
    world.move()
    assert [world.send("S", LATER) for _ in range(3)] == [world.new] * 3
    assert world.core.counts()["retransmitted_syn"] == 2
    assert world.send("A", LATER + 1) == world.new
    assert world.entries() == 1
    for seq in (LATER + 10**6, ISN + 10):
        assert world.send("PA", seq) == world.new


@families
def test_which_are_open(family):
    """Those whose client was answered, and has not begun to end them."""
    world = Contested(family)
    assert world.send("S", ISN) == world.old
    assert (world.entries(), world.entries(open_only=True)) == (1, 0)
    assert world.send("A", ISN + 1) == world.old
    assert (world.entries(), world.entries(open_only=True)) == (1, 1)
    assert world.send("FA", ISN + 9) == world.old
    assert (world.entries(), world.entries(open_only=True)) == (1, 0)


@families
def test_a_flow_is_written_when_its_packets_have_gone(family):
    """Lest the XDP program sends what follows before them."""
    world = Contested(family, table=True)
    core = world.core.core
    lib.crab_core_put_off(core)
    world.open()
    assert world.send("PA", ISN + 1) == world.old
    assert world.written is None
    lib.crab_core_settle(core)
    assert world.written["backend"] == world.old
    assert world.written["state"] == lib.CRAB_FLOW_OPEN
    # What is written is kept right at once.
    world.send("FA", ISN + 2)
    assert world.written["state"] == lib.CRAB_FLOW_ENDING


@families
def test_what_has_changed_meanwhile_is_not_written(family):
    """A newer SYN, whose packets only the core can tell from the others; or another snapshot, whose backends may be
    others."""
    world = Contested(family, table=True)
    core = world.core.core
    lib.crab_core_put_off(core)
    world.open()
    world.send("S", LATER)
    lib.crab_core_settle(core)
    assert world.written is None

    world = Contested(family, table=True)
    core = world.core.core
    lib.crab_core_put_off(core)
    world.open()
    world.move()
    lib.crab_core_settle(core)
    assert world.written is None
    assert world.send("A", ISN + 3) == world.old
    lib.crab_core_settle(core)
    assert world.written["backend"] == world.old


FORGED = ["S", "RS", "RRS", "SR", "FS", "FFS", "SF", "SFR", "SSSS"]


@families
@bypass
@pytest.mark.parametrize("flags", FORGED)
def test_what_is_forged_moves_nothing(family, table, flags):
    """By somebody who knows the four-tuple, and no sequence number.  Nor does the silence of hours that follows."""
    world = Contested(family, table=table)
    world.open()
    world.move()
    for i, flag in enumerate(flags):
        world.send("FA" if flag == "F" else flag, LATER + (i if flag == "S" else 0), now=1001)
    for now in (1001, 1002, 1200, 1200 + lib.CRAB_AGE_OPEN - 1):
        assert world.send("PA", ISN + now, now=now) == world.old
    assert world.core.counts().get("flows_full", 0) == 0


@pytest.mark.parametrize("isn", [LATER, 2**32 - 1, 2**32 - 60000])
def test_what_may_follow_a_syn(isn):
    """What its client may send before more than the SYN is acknowledged: a window, from the number behind it."""
    for seq, flags, follows in [
        (isn, "A", False), (isn + 1, "A", True), (isn + 1, "R", True), (isn + 1, "FA", True), (isn + 1449, "PA", True),
        (isn + 65536, "A", True), (isn + 65537, "A", False), (isn - 1, "A", False), (isn + 2**31, "A", False),
    ]:  # fmt: skip
        world = Contested()
        world.open()
        world.move()
        world.send("S", isn)
        assert world.send(flags, seq) == (world.new if follows else world.old), (seq, flags)
        # Only an acknowledgement shows that the client was answered.
        assert world.send("A", ISN + 100) == (world.new if follows and flags != "R" else world.old)
        assert world.entries() == (1 if follows and flags != "R" else 2)


def test_forged_syns_have_one_place():
    """However many: they push out no other connection, and the flow itself stays."""
    world = Contested(flows=64)
    for port in range(5000, 5020):
        assert world.send("S", 1, port=port) == world.send("A", 2, port=port) == world.old
    world.open()
    before = world.entries()
    world.move()
    for i in range(1000):
        assert world.send("S", LATER + i) == world.new
    assert world.entries() == before + 1
    assert world.send("A", ISN + 5) == world.old


def test_a_syn_that_is_pending_alone_is_not_strict():
    """Where nothing was there before, packets out of order, or seen late, are its connection's."""
    world = Contested()
    assert world.send("S", ISN) == world.old
    world.move()
    assert world.send("PA", ISN + 10**6) == world.old
    assert world.send("PA", ISN - 10**6) == world.old


def test_a_pending_syn_is_forgotten():
    world = Contested(table=True)
    world.open()
    world.move()
    assert world.send("S", LATER) == world.new
    assert world.send("A", LATER + 1, now=1000 + lib.CRAB_AGE_SYN) == world.old
    assert world.entries(1000 + lib.CRAB_AGE_SYN) == 1


# ---- with the XDP program's table ----


def test_while_a_syn_is_pending_the_xdp_program_asks():
    world = Contested(table=True)
    world.open()
    assert (world.written["backend"], world.written["flags"]) == (world.old, 0)
    world.move()
    world.send("S", LATER)
    for seq in (ISN + 2, ISN + 3):
        assert world.send("A", seq) == world.old
        assert world.written["flags"] & lib.CRAB_FLOW_ASK
    assert world.send("A", LATER + 1) == world.new
    assert (world.written["backend"], world.written["flags"]) == (world.new, 0)


@families
def test_a_flow_that_the_table_alone_knows(family):
    """What the XDP program forwards is not seen by a worker, and its own entry is dead in two hours."""
    world = Contested(family, table=True)
    world.open()
    world.move()
    late = 1000 + lib.CRAB_AGE_OPEN + 5
    world.places["seen"] = late
    assert world.entries(late) == 0
    quoted = (IP if family == 4 else IPv6)(src=VIP[family], dst=CLIENT[family]) / TCP(sport=80, dport=PORT)
    error = ICMP(type=3, code=4) if family == 4 else ICMPv6DestUnreach()
    router = IP(src="10.0.0.254", dst=VIP[4]) if family == 4 else IPv6(src="fd00::fe", dst=VIP[6])
    assert world.went(bytes(ether() / router / error / quoted), late) == world.old
    assert world.send("A", ISN + 5, now=late) == world.old
    assert world.send("S", LATER, now=late) == world.new
    assert world.send("A", ISN + 6, now=late) == world.old
    assert world.went(bytes(ether() / router / error / quoted), late) == world.old
    assert world.send("A", LATER + 1, now=late) == world.new
    assert world.written["backend"] == world.new


@pytest.mark.parametrize("end", ["FA", "R"])
def test_the_table_learns_that_a_flow_ends(end):
    world = Contested(table=True)
    world.open()
    assert world.send(end, ISN + 5) == world.old
    assert world.written["state"] == lib.CRAB_FLOW_ENDING
    world.send("A", ISN + 6)
    assert world.written["state"] == lib.CRAB_FLOW_ENDING


def test_a_stray_reset_makes_no_flow():
    world = Contested(table=True)
    assert world.send("R", 1) == world.old
    assert world.written is None


def test_a_reassigned_flow_does_not_go_back():
    world = Contested(table=True)
    world.open()
    world.move()
    world.service.said = {world.old: (True, True)}
    world.core.publish()
    assert world.send("A", ISN + 5) == world.new
    world.service.said = {}
    world.core.publish()
    assert world.send("A", ISN + 6) == world.new
    assert world.written["backend"] == world.new


def fill(world: Contested, count: int, state: int) -> None:
    """Take over so many flows that are in the same bucket (of a cache of 64 entries) as the connection."""
    flows = ffi.new("struct crab_flow[]", count)
    for i, flow in enumerate(flows):
        flow.hash, flow.state, flow.backend = (i + 1) << 16 | world.hash & 15, state, world.old
    lib.crab_core_adopt(world.core.core, flows, count, 1000)


@families
@bypass
@pytest.mark.parametrize("end", ["", "FA"])
def test_a_port_used_again_in_a_full_bucket(family, table, end):
    """What has ended makes room.  Where nothing does, all of the new connection goes where the one before it went."""
    world = Contested(family, table=table, flows=64)
    world.open()
    if end:
        world.send(end, ISN + 5)
    fill(world, 3, lib.CRAB_FLOW_OPEN)
    world.move()
    then = world.new if end else world.old
    assert [world.send("S", LATER) for _ in range(2)] == [then] * 2
    assert world.core.counts().get("flows_full", 0) == (0 if end else 2)
    assert [world.send(flags, LATER + 1) for flags in ("A", "PA", "FA")] == [then] * 3


@families
def test_a_port_used_again_that_the_xdp_program_alone_knows(family):
    """No room to remember its SYN: it goes where the program's flow goes, as all that follows does."""
    world = Contested(family, table=True, flows=64)
    fill(world, 4, lib.CRAB_FLOW_OPEN)
    assert world.send("S", ISN) == world.send("A", ISN + 1) == world.send("FA", ISN + 2) == world.old
    assert world.written["backend"] == world.old
    world.move()
    assert world.send("S", LATER) == world.send("A", LATER + 1) == world.send("PA", LATER + 1) == world.old
    world.service.said[world.old] = (True, True)  # dead: nobody is sent there
    world.core.publish()
    assert world.send("S", LATER + 10**6) == world.new


def test_flows_taken_over_that_have_ended_give_way():
    """As they did in the daemon before."""
    world = Contested(flows=64)
    fill(world, 4, lib.CRAB_FLOW_ENDING)
    assert world.send("S", ISN, now=1009) == world.old
    assert world.core.counts().get("flows_full") == 1
    assert world.send("S", ISN, now=1010) == world.old
    assert world.core.counts()["flows_full"] == 1
