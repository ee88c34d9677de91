"""A backend of several services, of which one says otherwise of it: dead, alive, with CR or without."""

from __future__ import annotations

import ipaddress

import numpy as np
import pytest
from crablb._native import ffi, lib
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP
from scapy.layers.inet6 import ICMPv6PacketTooBig, IPv6
from scapy.layers.l2 import Ether

from crablb.model import Vip
from crablb.selection.custom import Asked, Custom
from crablb.selection.loads import Balance
from crablb.selection.pool import Pool
from tests.helpers.frames import VIP4, VIP6, reference
from tests.helpers.native import Core
from tests.reference import packets
from tests.unit.test_differential import OFFER, frames

HEAD = Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02")
SHARED = 1  # of each family's four backends, the one that services do not agree on
OURS, THEIRS = 80, 443


# ---- whatever comes ----

opinions = st.lists(
    st.dictionaries(st.integers(0, 7), st.tuples(st.booleans(), st.booleans()), max_size=4), min_size=4, max_size=4
)


@settings(max_examples=300)
@given(
    st.lists(st.one_of(frames(), frames(), frames(), opinions), min_size=1, max_size=16),
    st.sets(st.integers(0, 7), max_size=3),
    st.sampled_from(["reassign", "reset"]),
    st.booleans(),
)
def test_frames(sequence, dead, on_dead, backwards):
    """Frame by frame as the reference has it, while services change their opinions."""
    expected = reference()
    for i in dead:
        expected.backends[i].dead = True
    for service in expected.services:
        service.on_dead = on_dead
    if backwards:
        expected.services.reverse()
    core = Core(expected)
    for step in sequence:
        if isinstance(step, list):
            for service, said in zip(expected.services, step, strict=True):
                service.said = said
            core.publish()
        else:
            assert core.outcome(step) == expected.handle(step)


# ---- case by case ----


class Shared:
    """Two services on one address, ports OURS and THEIRS, with the same four backends and the same table."""

    def __init__(self, v6: bool = False, ours_first: bool = True, on_dead: str = "reassign") -> None:
        self.v6, first = v6, 4 if v6 else 0
        self.expected = reference()
        for backend in self.expected.backends:
            backend.cr = backend.on_link = True
        self.shared = first + SHARED
        self.backend = self.expected.backends[self.shared]
        table = self.expected.services[2 if v6 else 0].table
        self.ours, self.theirs = (
            packets.Service(VIP6 if v6 else VIP4, port, table=table, on_dead=on_dead) for port in (OURS, THEIRS)
        )
        self.expected.services = [self.ours, self.theirs] if ours_first else [self.theirs, self.ours]
        self.core = Core(self.expected)

    def say(self, cr: bool, dead: bool) -> None:
        """Our service alone."""
        self.ours.said = {self.shared: (cr, dead)}
        self.core.publish()

    def frame(self, sport: int, dport: int, flags: str = "S", offers: bool = True) -> bytes:
        ip = IPv6(src="fd00::1", dst="fd00::100") if self.v6 else IP(src="10.0.0.1", dst="10.0.0.100")
        return bytes(HEAD / ip / TCP(sport=sport, dport=dport, flags=flags, options=OFFER if offers else []))

    def send(self, *packet, **more) -> tuple[str, int | None]:
        """What became of it, and the backend it went to (None: none); the reference says the same."""
        frame = self.frame(*packet, **more)
        told, out = self.core.outcome(frame)
        assert (told, out) == self.expected.handle(frame)
        macs = [backend.mac for backend in self.expected.backends]
        return told, macs.index(out[:6]) if out and out[:6] in macs else None

    def hashed(self, dport: int, wanted: int) -> list[int]:
        """Source ports from which the table leads to the shared backend."""
        agreed = Shared(self.v6)
        found = [sport for sport in range(1, 40 * wanted) if agreed.send(sport, dport)[1] == self.shared]
        return found[:wanted]


both_orders = pytest.mark.parametrize("ours_first", [True, False], ids=["ours-first", "theirs-first"])
both_families = pytest.mark.parametrize("v6", [False, True], ids=["IPv4", "IPv6"])


@both_families
@both_orders
def test_dead_in_one(v6, ours_first):
    """New connections: ours find nobody there, theirs go on."""
    world = Shared(v6, ours_first)
    world.say(cr=True, dead=True)
    for sport in world.hashed(OURS, 3):
        assert world.send(sport, OURS) == ("drop_no_backend", None)
        assert world.send(sport, OURS, offers=False) == ("drop_no_backend", None)
        assert world.send(sport, OURS, "A") == ("drop_no_backend", None)
    for sport in world.hashed(THEIRS, 3):
        assert world.send(sport, THEIRS) == ("redirected", world.shared)
        assert world.send(sport + 2000, THEIRS, "A")[0] == "fallback_established"


@both_families
@both_orders
def test_alive_in_one(v6, ours_first):
    """The other way round: dead to all but us."""
    world = Shared(v6, ours_first)
    world.backend.dead = True
    world.core = Core(world.expected)
    world.say(cr=True, dead=False)
    for sport in world.hashed(OURS, 3):
        assert world.send(sport, OURS) == ("redirected", world.shared)
    for sport in world.hashed(THEIRS, 3):
        assert world.send(sport, THEIRS) == ("drop_no_backend", None)


@both_families
@both_orders
@pytest.mark.parametrize("with_us", [True, False])
def test_cr_in_one(v6, ours_first, with_us):
    world = Shared(v6, ours_first)
    world.backend.cr = not with_us
    world.core = Core(world.expected)
    world.say(cr=with_us, dead=False)
    told = {True: "redirected", False: "fallback_no_cr_backend"}
    for port, speaks in ((OURS, with_us), (THEIRS, not with_us)):
        for sport in world.hashed(port, 3):
            assert world.send(sport, port) == (told[speaks], world.shared)


@both_families
@both_orders
@pytest.mark.parametrize("on_dead", ["reassign", "reset"])
def test_established_connections(v6, ours_first, on_dead):
    world = Shared(v6, ours_first, on_dead)
    [ours], [theirs] = world.hashed(OURS, 1), world.hashed(THEIRS, 1)
    for sport, port in ((ours, OURS), (theirs, THEIRS)):
        assert world.send(sport, port, offers=False) == ("fallback_no_offer", world.shared)
        assert world.send(sport, port, "A") == ("fallback_established", world.shared)
    elsewhere = world.shared + 1
    world.ours.table = [elsewhere] * len(world.ours.table)
    world.say(cr=True, dead=True)
    for flags in ("A", "PA", "FA", "R", "RA"):
        expected = "fallback_established", elsewhere
        if on_dead == "reset":
            expected = "drop_no_backend" if "R" in flags else "reset", None
        assert world.send(ours, OURS, flags) == expected
        assert world.send(theirs, THEIRS, flags) == ("fallback_established", world.shared)
    counts = world.core.counts()
    assert (counts.get("reset", 0), counts.get("reassigned", 0)) == ((3, 0) if on_dead == "reset" else (0, 1))


@both_families
@both_orders
def test_retransmissions(v6, ours_first):
    """Ours are decided anew, and by redirect again; theirs go where the first copy went."""
    world = Shared(v6, ours_first)
    [ours], [theirs] = world.hashed(OURS, 1), world.hashed(THEIRS, 1)
    for _ in range(2):
        assert world.send(ours, OURS) == ("redirected", world.shared)
        assert world.send(theirs, THEIRS) == ("redirected", world.shared)
    elsewhere = world.shared + 1
    world.ours.table = world.theirs.table = [elsewhere] * len(world.ours.table)
    world.say(cr=True, dead=True)
    assert world.send(ours, OURS) == ("redirected", elsewhere)
    assert world.send(theirs, THEIRS) == ("fallback_retransmit", world.shared)


@both_families
@both_orders
def test_icmp_errors(v6, ours_first):
    """What is about a connection of one that is dead is no other's."""
    world = Shared(v6, ours_first)
    [ours], [theirs] = world.hashed(OURS, 1), world.hashed(THEIRS, 1)
    for sport, port in ((ours, OURS), (theirs, THEIRS)):
        world.send(sport, port, offers=False)
    world.ours.table = world.theirs.table = [world.shared + 1] * len(world.ours.table)
    world.say(cr=True, dead=True)
    layer, vip, client = (IPv6, "fd00::100", "fd00::1") if v6 else (IP, "10.0.0.100", "10.0.0.1")
    error = ICMPv6PacketTooBig(mtu=1300) if v6 else ICMP(type=3, code=4, nexthopmtu=1300)
    for sport, port, expected in ((ours, OURS, "drop_no_backend"), (theirs, THEIRS, "fallback_icmp")):
        quoted = bytes(layer(src=vip, dst=client) / TCP(sport=port, dport=sport))[: (48 if v6 else 28)]
        told, out = world.core.outcome(bytes(HEAD / layer(src=client, dst=vip) / error / quoted))
        assert told == expected
        assert not out if port == OURS else mac_index(world, out) == world.shared


def mac_index(world: Shared, frame: bytes | None) -> int:
    assert frame
    return [backend.mac for backend in world.expected.backends].index(frame[:6])


@both_orders
def test_pools(ours_first):
    """Who picked it takes that back, and the table decides; the other service's pool keeps it."""
    world = Shared(ours_first=ours_first)
    elsewhere = world.shared + 1
    world.ours.table = world.theirs.table = [elsewhere] * len(world.ours.table)
    world.say(cr=True, dead=True)
    loads, pools = {}, []
    for i, service in enumerate(world.expected.services):
        loads[service.port] = ffi.new("struct crab_load *")
        pools.append(Pool("round-robin", {world.shared: (loads[service.port], 1)}, ffi.new("struct crab_turn *")))
        world.core.set_pool(i, pools[-1].c)
    sent = world.core.handle(*(world.frame(sport, port) for sport in range(1, 11) for port in (OURS, THEIRS)))
    assert [mac_index(world, frame) for frame in sent] == [elsewhere, world.shared] * 10
    assert (loads[OURS].assigned, loads[THEIRS].assigned) == (0, 10)
    # A retransmission stays where it went, and a backend that only lost CR is still picked.
    world.say(cr=False, dead=False)
    again = world.core.handle(*(world.frame(sport, OURS) for sport in (1, 11)))
    assert [mac_index(world, frame) for frame in again] == [elsewhere, world.shared]
    assert world.core.counts()["fallback_no_cr_backend"] == 1


@both_orders
def test_pools_are_asked_again_about_who_was_with_the_dead(ours_first):
    world = Shared(ours_first=ours_first)
    picked, hashed = world.shared + 1, world.shared + 2
    world.ours.table = world.theirs.table = [hashed] * len(world.ours.table)
    load, pools = ffi.new("struct crab_load *"), []
    for i in range(2):
        members = {world.shared: (load, 1), picked: (load, 1)}
        pools.append(Pool("round-robin", members, ffi.new("struct crab_turn *")))
        world.core.set_pool(i, pools[-1].c)
    syns = [world.frame(1, port) for port in (OURS, THEIRS)]
    assert [mac_index(world, frame) for frame in world.core.handle(*syns)] == [world.shared] * 2
    world.say(cr=True, dead=True)
    assert [mac_index(world, frame) for frame in world.core.handle(*syns)] == [picked, world.shared]
    assert load.assigned == 3


@both_orders
def test_policies_in_python(ours_first):
    world = Shared(ours_first=ours_first)
    elsewhere = world.shared + 1
    world.ours.table = world.theirs.table = [elsewhere] * len(world.ours.table)
    world.say(cr=True, dead=True)
    balance, known = Balance(), {}
    custom = Custom(lambda vip, reason: pytest.fail(reason))
    for i, service in enumerate(world.expected.services):
        vip = Vip(ipaddress.ip_address(VIP4), service.port)
        backends = balance.backends(vip, {ipaddress.ip_address(world.backend.address): 1})
        ids = np.array([world.shared], np.uint16)
        known[i] = Asked(vip, lambda batch, backends: [0] * len(batch), backends, ids)
    custom.publish(known)
    for i in known:
        world.core.set_custom(i, i, custom)
    sent = world.core.handle(*(world.frame(sport, port) for sport in range(1, 11) for port in (OURS, THEIRS)))
    assert [mac_index(world, frame) for frame in sent] == [elsewhere, world.shared] * 10


# ---- what is refused ----


@pytest.mark.parametrize(
    ("exceptions", "first", "count", "right"),
    [
        ([(0, 0), (1, 0)], 0, 2, True),
        ([(0, 0), (1, 0)], 2, 0, True),
        ([(1, 0), (0, 0)], 1, 1, True),  # each service's are in order
        ([(1, 0), (0, 0)], 0, 2, False),
        ([(1, 0), (1, 0)], 0, 2, False),
        ([(2, 0)], 0, 1, False),
        ([(65535, 0)], 0, 1, False),
        ([(0, 0), (1, 0)], 0, 3, False),
        ([(0, 0), (1, 0)], 3, 0, False),
        ([(0, 0), (1, 0)], 2**32 - 1, 2, False),
    ],
)
def test_exceptions_that_are_wrong_are_refused(exceptions, first, count, right):
    table = ffi.new("uint16_t[7]")
    services = ffi.new("struct crab_service[1]")
    services[0].table, services[0].first_exception, services[0].exception_count = table, first, count
    made = lib.crab_snapshot_new(
        services, 1, ffi.new("struct crab_backend[2]"), 2, ffi.NULL, 0, ffi.new("struct crab_exception[]", exceptions),
        len(exceptions), 7, lib.CRAB_FORM_CRAB, bytes(16),
    )  # fmt: skip
    assert bool(made) == right
    lib.crab_snapshot_free(made)
