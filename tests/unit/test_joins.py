"""Subflows that join an MPTCP connection by way of a VIP: whose backend they get to."""

from __future__ import annotations

import hashlib

import pytest
from crablb._native import ffi, lib
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6

from crablb.control import outcome
from tests.helpers.frames import ether, reference
from tests.helpers.native import Core
from tests.unit.test_tap import Shown

KEY = bytes(range(100, 108))
OTHERS = bytes(range(200, 208))  # key of another connection
CLIENT, ELSEWHERE, VIP = (
    {4: "10.0.0.1", 6: "fd00:5::1"},
    {4: "10.3.0.1", 6: "fd00:5::99"},
    {4: "10.0.0.100", 6: "fd00::100"},
)
families = pytest.mark.parametrize("family", [4, 6])


def token(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()[:4]


def capable(key: bytes, *, version: int = 1, more: bytes = b"") -> tuple[int, bytes]:
    return 30, bytes([version, 1]) + bytes(8) + key + more


def join(key: bytes) -> tuple[int, bytes]:
    return 30, b"\x10\x01" + token(key) + bytes(4)


class World:
    """A service whose table leads everybody to ``old``, and after :meth:`move` to ``new``."""

    def __init__(self, family: int = 4, mode: str = "negotiated") -> None:
        self.family, self.lb = family, reference(mode=mode)
        first = 0 if family == 4 else 4
        self.old, self.new = first, first + 3
        self.backends = self.lb.backends
        for i in (self.old, self.new):
            self.backends[i].on_link = True
            self.backends[i].cr = mode != "always"  # which would redirect the first subflow, too
        for service in self.lb.services:
            service.prefixes = []
            service.table = [self.old] * 61
        self.core = Core(self.lb)

    def move(self) -> None:
        for service in self.lb.services:
            service.table = [self.new] * 61
        self.core.publish()

    def send(self, flags: str, *options: tuple[int, bytes], port: int = 4242, elsewhere: bool = False, seq: int = 1000,
             dport: int = 80, now: int = 1000) -> int | None:  # fmt: skip
        """The backend that a packet went to."""
        client = (ELSEWHERE if elsewhere else CLIENT)[self.family]
        ip = (IP if self.family == 4 else IPv6)(src=client, dst=VIP[self.family])
        tcp = TCP(sport=port, dport=dport, flags=flags, seq=seq, options=[*options])
        (out,) = self.core.handle(bytes(ether() / ip / tcp), now=now)
        return [b.mac for b in self.backends].index(out[:6]) if out else None

    def connect(self, key: bytes = KEY, port: int = 4242, **more) -> None:
        self.send("S", (30, b"\x01\x01"), port=port)
        assert self.send("A", capable(key, **more), port=port, seq=1001) == self.old

    def count(self, name: str) -> int:
        return self.core.counts().get(name, 0)


@families
@pytest.mark.parametrize("mode", ["negotiated", "always", "never"])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_join_follows_its_connection(family, mode, elsewhere):
    """From whatever address and port, by fallback, and all that follows it; where the table leads by then or not."""
    world = World(family, mode)
    world.connect()
    assert (world.count("mptcp"), world.count("mptcp_join")) == (1, 0)
    world.move()
    assert world.send("S", join(KEY), (42, b""), port=7, elsewhere=elsewhere) == world.old
    assert (world.count("mptcp_join"), world.count("mptcp_join_known"), world.count("redirected")) == (1, 1, 0)
    assert world.send("S", join(KEY), port=7, elsewhere=elsewhere) == world.old
    assert world.count("retransmitted_syn") == 1
    assert world.send("A", port=7, elsewhere=elsewhere, seq=1001) == world.old
    # Others go where the table leads.
    assert world.send("S", join(OTHERS), port=8, elsewhere=elsewhere) == world.new
    assert world.send("S", port=9, elsewhere=elsewhere) == world.new
    assert (world.count("mptcp"), world.count("mptcp_join"), world.count("mptcp_join_known")) == (1, 3, 2)


def test_it_is_told_why():
    """In captures and traces: of the connection's beginning, of a join that is known, and of one that is not."""
    world = World()
    core = world.core = Shown(world.lb)
    world.connect()
    world.send("S", join(KEY), port=7)
    world.send("S", join(OTHERS), port=8)
    first, _, known, unknown = (seen for _, seen in core.shown())
    said = [outcome.told(seen, outcome.headers(seen.frame), None) for seen in (first, known, unknown)]
    assert "its client speaks MPTCP" in said[0]
    assert "where the connection is that it joins, by its token" in said[1]
    assert "it joins an MPTCP connection; which is known by its token" in said[1]
    assert "it joins an MPTCP connection" in said[2]
    assert "chosen by the hash table" in said[2]
    assert "token" not in said[2]


@pytest.mark.parametrize(
    ("known", "option"),
    [
        (True, capable(KEY)),
        (True, capable(KEY, more=b"\0\5")),
        (True, capable(KEY, more=b"\0\5\1\2")),
        (False, capable(KEY, version=0)),
        (False, capable(KEY, more=b"\0")),
        (False, (30, b"\x01\x01" + bytes(8))),
        (False, (30, b"\x11\x01" + bytes(8) + KEY)),
        (False, (31, b"\x01\x01" + bytes(8) + KEY)),
    ],
)
def test_what_says_the_key(known, option):
    """The MP_CAPABLE of RFC 8684 with both keys, alone, with data, with a checksum; nothing else that looks like it."""
    world = World()
    world.send("S", (30, b"\x01\x01"))
    world.send("PA", option, seq=1001)
    world.move()
    assert world.send("S", join(KEY), port=7) == (world.old if known else world.new)


def test_an_ack_whose_syn_another_one_saw():
    """By several load balancers, or after a restart: it goes by the table, and so do the joins."""
    world = World()
    assert world.send("A", capable(KEY), seq=1001) == world.old
    world.move()
    assert world.send("S", join(KEY), port=7) == world.old


@pytest.mark.parametrize("length", [3, 4, 10, 11, 13])
def test_a_join_without_its_token(length):
    """It is counted, and goes by the table."""
    world = World()
    world.connect()
    world.move()
    kind, data = join(KEY)
    assert world.send("S", (kind, (data + bytes(4))[: length - 2]), port=7) == world.new
    assert (world.count("mptcp_join"), world.count("mptcp_join_known")) == (1, 0)


def test_a_token_is_its_services_alone():
    world = World()
    world.connect()
    world.move()
    assert world.send("S", join(KEY), port=7, dport=443) == world.new
    assert world.send("S", join(KEY), port=7) == world.old


@pytest.mark.parametrize("fault", ["dead", "unusable", "gone"])
def test_a_backend_that_cannot_take_it(fault):
    """As if nothing were known."""
    world = World()
    world.connect()
    world.move()
    if fault == "dead":
        world.lb.services[0].said[world.old] = False, True
    elif fault == "unusable":
        world.core._backends[world.old].flags &= ~lib.CRAB_BACKEND_USABLE
    else:
        kept = [bytes(i != world.old for i in range(1 << 16)), bytes([1]) * (1 << 16)]
        lib.crab_joins_keep(world.core.joins, *(ffi.from_buffer("bool[]", each) for each in kept))
    world.core.publish()
    assert world.send("S", join(KEY), port=7) == world.new
    assert (world.count("mptcp_join"), world.count("mptcp_join_known")) == (1, 0)


def test_joins_by_the_thousand():
    """Forged ones: by fallback, each to one backend, none redirected; the connection's own gets through after them."""
    world = World()
    world.connect()
    world.move()
    for i in range(3000):
        assert world.send("S", join(i.to_bytes(8, "big")), (42, b""), port=1 + i, elsewhere=True) == world.new
    assert (world.count("mptcp_join"), world.count("redirected")) == (3000, 0)
    assert world.send("S", join(KEY), port=7) == world.old


def test_keys_that_somebody_makes_up():
    """A flood of them pushes out tokens: a join goes where one of them led, or the table does."""
    world = World()
    world.connect()
    for i in range(3000):
        world.send("A", capable(i.to_bytes(8, "big")), port=1 + i, elsewhere=True, seq=5)
    world.move()
    assert world.send("S", join(KEY), port=7) in (world.old, world.new)
    assert world.send("S", join((2999).to_bytes(8, "big")), port=8) == world.old
