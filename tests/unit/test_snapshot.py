"""Snapshots from configuration and state, also from states that are hard to make in a lab, seen by what a core does."""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from ipaddress import ip_address
from typing import Any

import numpy as np
import pytest
from crablb._native import ffi, lib
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import Ether

from crablb.dataplane import snapshot as snapshot_module
from crablb.dataplane.snapshot import Sight, Snapshot
from crablb.kernel.netlink import HopState, NextHop
from crablb.model import (
    Address,
    Backend,
    Closed,
    Config,
    Mode,
    OnDead,
    Service,
    State,
    Vip,
)
from crablb.selection.loads import Balance
from tests.helpers.frames import SEED

A, B, C = (ip_address(f"10.0.0.1{i}") for i in (1, 2, 3))
WEB, MAIL = Vip(ip_address("10.0.0.100"), 80), Vip(ip_address("10.0.0.100"), 25)
CLIENT = ip_address("10.0.9.1")
OFFER = [("MSS", 1460), (42, b""), ("NOP", None), ("NOP", None)]


def hop(address: Address, **fields: object) -> NextHop:
    mac = b"\2\0\0\0\0" + address.packed[-1:]
    found = NextHop(HopState.RESOLVED, "", 3, None, mac, b"\2\0\0\0\0\xfe", ip_address("10.0.0.2"), 1500)
    return replace(found, **fields)


def sight(config: Config) -> Sight:
    """A state in which every backend is reachable."""
    backends = dict.fromkeys(b.address for s in config.services for b in s.backends)
    return Sight(
        SEED,
        {address: i for i, address in enumerate(backends)},
        {service.vip: i for i, service in enumerate(config.services)},
        {address: hop(address) for address in backends},
        Balance(),
    )


def config(*services: Service, **settings: object) -> Config:
    return replace(Config(("eth0",), services, table_size=61), **settings)


#: The snapshots that a test has built: whose they are, frees them.
built: list[Snapshot] = []


def build(*given: Any) -> Snapshot:
    """See :func:`crablb.dataplane.snapshot.build`."""
    built.append(snapshot_module.build(*given))
    return built[-1]


@pytest.fixture(autouse=True)
def freed() -> Iterator[None]:
    yield
    while built:
        built.pop().free()


class Core:
    """A core that looks into a snapshot."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.counters = ffi.new("uint64_t[]", lib.CRAB_COUNTERS)
        self.core = ffi.gc(lib.crab_core_new(4096, self.counters), lib.crab_core_free)
        self.look(snapshot)

    def look(self, snapshot: Snapshot) -> None:
        lib.crab_core_publish(self.core, snapshot.c)
        self.snapshot = snapshot

    def send(self, vip: Vip, port: int, flags: str = "S") -> tuple[str, object]:
        """What became of a client's packet: ("redirect", DIP), ("fallback", last byte of the MAC address), ("tunnel",
        DIP), ("reset", None) or ("dropped", None)."""
        frame = packet(vip, port, flags)
        memory = ffi.new("uint8_t[]", bytes(64) + frame + bytes(16))
        one = ffi.new("struct crab_frame[1]")
        one[0].data, one[0].len, one[0].ifindex = memory + 64, len(frame), 3
        lib.crab_core_batch(self.core, one, 1, 1000)
        if not one[0].len:
            return "dropped", None
        sent = bytes(ffi.buffer(one[0].data, one[0].len))
        to = ip_address(sent[30:34])
        if to == CLIENT:
            assert sent[47] & 4  # RST
            return "reset", None
        if to == vip.address:
            return "fallback", sent[5]
        return "tunnel" if sent[23] == 4 else "redirect", to


@cache
def packet(vip: Vip, port: int, flags: str) -> bytes:
    tcp = TCP(sport=port, dport=vip.port, flags=flags, seq=1, options=OFFER if "S" in flags else [])
    return bytes(
        Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:fe") / IP(src=str(CLIENT), dst=str(vip.address)) / tcp
    )


def all_of(core: Core, vip: Vip, ports: Iterable[int] = range(2000, 2100)) -> Counter[object]:
    return Counter(core.send(vip, port) for port in ports)


def redirected(*addresses: Address) -> set[object]:
    return {("redirect", address) for address in addresses}


def made(wanted: Config, state: Sight | None = None, before: Snapshot | None = None) -> Core:
    return Core(build(wanted, state or sight(wanted), before))


@pytest.fixture(params=[False, True], ids=["in this order", "in the other order"])
def order(request):
    """Which of two services is named first must not matter."""
    return (lambda *services: services[::-1]) if request.param else (lambda *services: services)


def test_each_service_goes_by_its_own_entry(order):
    """Dead, drained, weightless or without CR in one service is nothing to another."""
    for odd, kinds in (
        (Backend(A, state=State.DEAD), redirected(B)),
        (Backend(A, state=State.DRAIN), redirected(B)),
        (Backend(A, weight=0), redirected(B)),
        (Backend(A, cr=False), {*redirected(B), ("fallback", A.packed[-1])}),
    ):
        web = Service(WEB, (Backend(A), Backend(B)))
        mail = Service(MAIL, (odd, Backend(B)))
        core = made(config(*order(web, mail)))
        assert all_of(core, WEB).keys() == redirected(A, B)
        assert all_of(core, MAIL).keys() == kinds


def test_the_same_under_a_policy(order):
    for policy in ("round-robin", lambda batch, backends: np.zeros(len(batch), np.intp)):
        web = Service(WEB, (Backend(A), Backend(B)), policy=policy)
        mail = Service(MAIL, (Backend(A, cr=False), Backend(B)), policy=policy)
        snapshot = build(config(*order(web, mail)), sight(config(*order(web, mail))))
        if policy == "round-robin":
            core = Core(snapshot)
            assert all_of(core, WEB).keys() == redirected(A, B)
            assert all_of(core, MAIL).keys() == redirected(B)
        else:
            asked = {a.vip: a.backends.addresses for a in snapshot.custom.values()}
            assert asked == {WEB: (A, B), MAIL: (B,)}


@pytest.mark.parametrize("on_dead", OnDead)
def test_what_a_dead_backend_had(order, on_dead):
    """Only the service that calls it dead ends its connections."""
    first = config(*order(Service(WEB, (Backend(A),), Mode.NEVER), Service(MAIL, (Backend(A),), Mode.NEVER)))
    core = made(first)
    for vip in (WEB, MAIL):
        assert core.send(vip, 4000) == ("fallback", 11)
    second = config(
        *order(
            Service(WEB, (Backend(A), Backend(B)), Mode.NEVER),
            Service(MAIL, (Backend(A, state=State.DEAD), Backend(B)), Mode.NEVER, on_dead=on_dead),
        )
    )
    core.look(build(second, sight(second)))
    assert core.send(WEB, 4000, "A") == ("fallback", 11)
    assert core.send(MAIL, 4000, "A") == (("fallback", 12) if on_dead is OnDead.REASSIGN else ("reset", None))


def test_removed_here_and_dead_there(order):
    """A service from which a backend was removed keeps what it has there, whatever another one says of it."""
    web, mail = Service(WEB, (Backend(A),), Mode.NEVER), Service(MAIL, (Backend(A),), Mode.NEVER)
    core = made(config(*order(web, mail)))
    core.send(WEB, 4000)
    after = config(
        *order(replace(web, backends=(Backend(B),)), replace(mail, backends=(Backend(A, state=State.DEAD),)))
    )
    state = sight(after)
    ids = {A: 0, B: 1}
    core.look(build(after, replace(state, backends=ids)))
    assert core.send(WEB, 4000, "A") == ("fallback", 11)
    assert core.send(WEB, 4001) == ("fallback", 12)


def test_a_removed_backend_keeps_its_flows():
    core = made(config(Service(WEB, (Backend(A),), Mode.NEVER)))
    core.send(WEB, 4000)
    after = config(Service(WEB, (Backend(B),), Mode.NEVER))
    state = sight(after)
    hops = {**state.hops, A: hop(A)}
    core.look(build(after, replace(state, backends={A: 0, B: 1}, hops=hops)))
    assert core.send(WEB, 4000, "A") == ("fallback", 11)
    assert core.send(WEB, 4001) == ("fallback", 12)
    # and when its id has been given to another backend, with no flow left, that one gets its own packets only
    core.look(build(after, replace(state, backends={B: 1, C: 0}, hops=hops)))
    assert core.send(WEB, 4001, "A") == ("fallback", 12)


def test_states_of_next_hops():
    wanted = config(Service(WEB, (Backend(A), Backend(B), Backend(C))))
    state = sight(wanted)
    for lost in (NextHop(HopState.UNRESOLVED, "it does not answer"), NextHop(HopState.NO_ROUTE), None):
        hops = {a: h for a, h in {**state.hops, B: lost}.items() if h}
        assert all_of(made(wanted, replace(state, hops=hops)), WEB).keys() == redirected(A, C)
    # Who is back has its slots again, and nobody else's connections moved.
    whole, part = (
        {port: made(wanted, replace(state, hops=hops)).send(WEB, port) for port in range(2000, 2100)}
        for hops in (state.hops, {a: h for a, h in state.hops.items() if a != B})
    )
    assert all(part[port] == found for port, found in whole.items() if found != ("redirect", B))
    nobody = replace(state, hops={})
    assert all_of(made(wanted, nobody), WEB).keys() == {("dropped", None)}
    assert all_of(made(config()), WEB).keys() == {("dropped", None)}


@pytest.mark.parametrize(
    ("closed", "said"),
    [(Closed.AUTO, "reset"), (Closed.RESET, "reset"), (Closed.DROP, "dropped"), (Closed.PASS, "dropped")],
)
def test_a_service_that_is_given_up(closed, said):
    """Its clients are told so, unless a backend may be found in a moment."""
    wanted = config(Service(WEB, (Backend(A), Backend(B), Backend(C, state=State.DRAIN))), closed=closed)
    state = sight(wanted)
    silent, asked = NextHop(HopState.UNRESOLVED), NextHop(HopState.UNRESOLVED, asking=True)
    for lost in (silent, NextHop(HopState.NO_ROUTE), NextHop(HopState.NOT_ETHERNET)):
        core = made(wanted, replace(state, hops={**state.hops, A: silent, B: lost}))
        assert core.send(WEB, 4000) == (said, None)
        assert core.send(WEB, 4000, "A") == ("dropped", None)
    for found in (asked, None):
        hops = {a: h for a, h in {**state.hops, A: silent, B: found}.items() if h}
        assert made(wanted, replace(state, hops=hops)).send(WEB, 4000) == ("dropped", None)
    one = replace(state, hops={**state.hops, A: silent})
    assert made(wanted, one).send(WEB, 4000) == ("redirect", B)


def test_behind_a_gateway():
    """The fallback's way is a tunnel there, and none by MAC address."""
    wanted = config(Service(WEB, (Backend(A),), Mode.NEVER))
    state = replace(sight(wanted), hops={A: hop(A, gateway=ip_address("10.0.0.254"))})
    assert made(wanted, state).send(WEB, 4000) == ("tunnel", A)
    assert made(
        config(
            Service(WEB, (Backend(A),)),
        ),
        state,
    ).send(WEB, 4000) == ("redirect", A)


def test_warming_up():
    """``at`` alone says how far a weight has risen."""
    service = Service(WEB, (Backend(A), Backend(B)), slow_start=100.0)
    wanted = config(service, table_size=6151)
    state = sight(wanted)
    state.balance.begin(service, B, 1000.0)
    shares = []
    for at in (1000.0, 1050.0, 1099.0, 1100.0):
        snapshot = build(wanted, replace(state, at=at))
        (table,) = snapshot.tables.values()
        shares.append(float(np.mean(table == 1)))
        snapshot.free()
    assert shares == sorted(shares)
    assert shares[0] < 0.12 and 0.3 < shares[1] < 0.37 and 0.45 < shares[2] < shares[3] == pytest.approx(0.5, abs=0.01)


def test_what_the_next_one_shares():
    """Tables and pools of the same members are the same objects, so that schedules go on; others are not."""
    services = (Service(WEB, (Backend(A), Backend(B)), policy="round-robin"), Service(MAIL, (Backend(A), Backend(B))))
    wanted = config(*services)
    state = sight(wanted)
    one = build(wanted, state)
    assert len(one.tables) == 1  # two services of the same backends
    two = build(wanted, state, one)
    assert two.pools[WEB][1] is one.pools[WEB][1]
    assert [id(t) for t in two.tables.values()] == [id(t) for t in one.tables.values()]
    heavier = config(replace(services[0], backends=(Backend(A, 2), Backend(B))), services[1])
    three = build(heavier, state, two)
    assert three.pools[WEB][1] is not one.pools[WEB][1]
    # An id that has become another's makes another pool, though the addresses are the same.
    four = build(wanted, replace(state, backends={A: 1, B: 0}), two)
    assert four.pools[WEB][1] is not one.pools[WEB][1]
    for snapshot in (one, two, three, four):
        snapshot.free()
        snapshot.free()  # once more does no harm


def test_a_pool_keeps_the_loads_that_it_writes():
    """A service may be forgotten, and all that is known of it, while a worker looks into an older snapshot."""
    wanted = config(Service(WEB, (Backend(A), Backend(B)), policy="round-robin"))
    state = sight(wanted)
    load = state.balance.load(WEB, A)
    held = weakref.ref(state.balance._blocks[WEB]._loads)
    core = made(wanted, state)
    del load
    state.balance.forget([])
    gc.collect()
    assert held() is not None
    assert all_of(core, WEB, range(2000, 2010)).total() == 10
    core.snapshot.pools.clear()
    gc.collect()
    assert held() is None


STATES = st.sampled_from(State)
MEMBERS = st.dictionaries(
    st.integers(11, 15), st.tuples(st.integers(0, 3), st.booleans(), STATES), min_size=1, max_size=5
)


@given(members=st.lists(MEMBERS, min_size=1, max_size=3), lost=st.sets(st.integers(11, 15)))
def test_any_state(members, lost):
    """Who gets new connections, and how, by the words of the configuration alone."""
    services = tuple(
        Service(
            Vip(WEB.address, 80 + i),
            tuple(Backend(ip_address(f"10.0.0.{n}"), w, cr, s) for n, (w, cr, s) in sorted(own.items())),
        )
        for i, own in enumerate(members)
    )
    wanted = config(*services)
    state = sight(wanted)
    state = replace(state, hops={a: h for a, h in state.hops.items() if a.packed[-1] not in lost})
    core = made(wanted, state)
    for service in services:
        serving = [b for b in service.backends if b.weight and b.state is State.UP and b.address.packed[-1] not in lost]
        expected = {("redirect", b.address) if b.cr else ("fallback", b.address.packed[-1]) for b in serving}
        # Of those whose way is not known yet it may be found.
        nobody = {("dropped" if any(b.share for b in service.backends) else "reset", None)}
        assert all_of(core, service.vip, range(3000, 3100)).keys() <= (expected or nobody)


def test_a_backend_that_completes_no_redirects():
    """In the service where it does not, it gets the fallback: by the hash what it had, and of a pool nothing."""
    services = config(Service(WEB, (Backend(A), Backend(B))), Service(MAIL, (Backend(A), Backend(B))))
    seen = sight(services)
    core = Core(build(services, seen))
    before = all_of(core, WEB)
    assert set(before) == redirected(A, B)
    stopped = Core(build(services, replace(seen, unredirected=frozenset({(WEB, A)}))))
    last = hop(A).dst_mac[-1]
    now = all_of(stopped, WEB)
    assert set(now) == {("fallback", last), ("redirect", B)}
    assert now["fallback", last] == before["redirect", A]
    assert all_of(stopped, MAIL) == all_of(core, MAIL)
    pooled = config(Service(WEB, (Backend(A), Backend(B)), policy="round-robin"))
    seen = replace(sight(pooled), unredirected=frozenset({(WEB, A)}))
    assert set(all_of(Core(build(pooled, seen)), WEB)) == redirected(B)


# ---- of what has not changed nothing is looked at ----


@st.composite
def lives(draw: st.DrawFn) -> list[tuple[Config, Sight]]:
    """A configuration and what is seen, and what becomes of both; what does not change is the same object."""
    numbers = {A: 0, B: 1, C: 2}
    indices = {WEB: 0, MAIL: 1}
    backends = st.builds(
        Backend,
        st.sampled_from([A, B, C]),
        weight=st.integers(0, 3),
        cr=st.booleans(),
        state=st.sampled_from([State.UP, State.DRAIN, State.DEAD]),
    )

    def service(vip: Vip) -> Service:
        own = draw(st.lists(backends, min_size=1, max_size=3, unique_by=lambda b: b.address))
        policy = draw(st.sampled_from(["maglev", "round-robin", "least-connections"]))
        return Service(vip, tuple(own), policy=policy, slow_start=draw(st.sampled_from([0.0, 10.0])))

    services = {vip: service(vip) for vip in (WEB, MAIL)}
    hops = {a: hop(a) for a in numbers}
    balance, version, at, stopped = Balance(), 0, 0.0, frozenset[tuple[Vip, Address]]()
    reached, closed = frozenset[Address](), Closed.AUTO
    life = []
    for _ in range(draw(st.integers(2, 6))):
        match draw(st.integers(0, 7)):
            case 0 | 1:
                vip = draw(st.sampled_from([WEB, MAIL]))
                services = services | {vip: service(vip)}
            case 2:
                services = services | {MAIL: service(MAIL)} if MAIL not in services else {WEB: services[WEB]}
            case 3:
                gone = NextHop(HopState.UNRESOLVED, asking=draw(st.booleans()))
                hops = {a: draw(st.sampled_from([hop(a), gone])) for a in numbers}
            case 4:
                stopped = frozenset({(WEB, draw(st.sampled_from([A, B])))}) if not stopped else frozenset()
            case 5:
                at += 20.0
            case 6:
                reached = frozenset(draw(st.sets(st.sampled_from([A, B]))))
            case 7:
                closed = draw(st.sampled_from([Closed.AUTO, Closed.DROP]))
        at += draw(st.sampled_from([0.0, 3.0]))
        balance._since = {pair: began for pair, began in balance._since.items() if at - began < 10}  # as it forgets
        for vip in services:
            if draw(st.booleans()):
                balance.begin(services[vip], draw(st.sampled_from([A, B, C])), at)
        if draw(st.booleans()):
            balance.give((WEB, draw(st.sampled_from([A, B, C]))), draw(st.sampled_from([100, 50])))
        as_now = Balance()
        as_now._since, as_now._percents = dict(balance._since), dict(balance._percents)
        seen = Sight(SEED, numbers, indices, hops, as_now, at, reached, stopped, version=version)
        life.append((config(*services.values(), closed=closed), seen))
    return life


def contents(made: Snapshot) -> tuple[object, ...]:
    """What a snapshot is, by value."""
    array, count = made.backends
    pools = {vip: key for vip, (key, _) in made.pools.items()}
    tables = {vip: table.tobytes() for vip, table in made.chosen.items()}
    parts = {vip: (part.refuses, part.exceptions) for vip, part in made.parts.items()}
    return bytes(ffi.buffer(array))[: count * ffi.sizeof("struct crab_backend")], pools, tables, parts


@given(lives())
def test_what_is_taken_over_is_as_if_it_was_made_anew(life):
    before = None
    for each, seen in life:
        since = dict(seen.balance._since)
        fresh = build(each, seen)
        seen.balance._since = since  # what had risen is forgotten when it is asked for
        made = build(each, seen, before)
        assert contents(made) == contents(fresh)
        fresh.free()
        if before:
            before.free()
        before = made
    before.free()


def test_one_change_makes_one_service_anew(monkeypatch):
    """Of a thousand: however many there are, what a change costs is what it changes."""
    vips = [Vip(ip_address(f"10.0.{i // 250}.{i % 250 + 1}"), 80) for i in range(1000)]
    many = config(*(Service(vip, (Backend(A), Backend(B))) for vip in vips))
    seen = replace(sight(many), version=1)
    before = build(many, seen)
    made: list[Vip] = []
    choose = snapshot_module._choose
    monkeypatch.setattr(snapshot_module, "_choose", lambda *args: (made.append(args[2].vip), choose(*args))[1])
    monkeypatch.setattr(snapshot_module, "_backends", None)  # not called
    changed = replace(many.services[7], backends=(Backend(A, 3), Backend(B)))
    after = build(replace(many, services=(*many.services[:7], changed, *many.services[8:])), seen, before)
    assert made == [vips[7]]
    # And with another next hop all that it concerns, which may be all.
    monkeypatch.undo()
    lost = replace(seen, hops={A: hop(A), B: NextHop(HopState.UNRESOLVED)})
    last = build(many, lost, after)
    assert set(np.unique(last.chosen[vips[0]])) == {0}
    for each in (before, after, last):
        each.free()


# ---- bit by bit ----

SITES = [Vip(ip_address("10.0.0.100"), port) for port in range(8001, 8007)]


def shares(snapshot: Snapshot) -> dict[Vip, bytes]:
    return {vip: table.tobytes() for vip, table in snapshot.chosen.items()}


def weighed(weights: Iterable[int], **settings: object) -> Config:
    return config(
        *(Service(vip, (Backend(A), Backend(B, weight))) for vip, weight in zip(SITES, weights, strict=False)),
        **settings,
    )


def test_what_is_owed_comes_first():
    """Even if others change again and again."""
    state = sight(weighed([1] * 6))
    snapshot = build(weighed([1] * 6), state)
    old = shares(snapshot)
    wanted = weighed([2, 3, 4, 5, 6, 7])
    whole = shares(build(wanted, state))
    for owed in ({*SITES[2:]}, {*SITES[4:]}, set()):
        snapshot = build(wanted, state, snapshot, 2)
        assert snapshot.owed == owed
        assert shares(snapshot) == {vip: (old if vip in owed else whole)[vip] for vip in SITES}
    for n in range(4):  # the first two change all the time
        wanted = weighed([20 + n, 30 + n, *([40, 50, 60, 70] if n else [4, 5, 6, 7])])
        snapshot = build(wanted, state, snapshot, 2)
    assert shares(snapshot).items() >= {vip: shares(build(wanted, state))[vip] for vip in SITES[2:]}.items()


def test_a_new_service_is_owed_nothing():
    wanted = weighed([2, 3, 4, 5, 6, 7])
    state = sight(wanted)
    snapshot = build(wanted, state, build(weighed([1, 1]), state), 1)
    assert snapshot.owed == {SITES[1]}
    assert shares(snapshot).items() - shares(build(wanted, state)).items() == {(SITES[1], shares(snapshot)[SITES[1]])}


def test_what_is_known_of_backends_is_owed_to_nobody():
    """Of a service that waits for its table SYNs are reset, and what is dead gets nothing, at once."""
    first, second, third = SITES[:3]

    def of(weight: int, state: State) -> Config:
        return config(
            Service(first, (Backend(A), Backend(B, weight))),
            Service(second, (Backend(A), Backend(B, state=state))),
            Service(third, (Backend(C),)),
            closed=Closed.RESET,
        )

    state = sight(of(1, State.UP))
    before = build(of(1, State.UP), state)
    lost = replace(state, hops={**state.hops, C: NextHop(HopState.UNRESOLVED)})
    snapshot = build(of(2, State.DEAD), lost, before, 1)
    assert snapshot.owed == {second, third}
    core = Core(snapshot)
    assert core.send(third, 4000) == ("reset", None)
    assert not all_of(core, second).keys() & redirected(B)


@given(st.lists(st.tuples(st.lists(st.integers(0, 3), min_size=1, max_size=6), st.integers(1, 3)), max_size=6))
def test_in_the_end_all_is_as_if_made_at_once(changes):
    state = sight(weighed([1] * 6))
    wanted = weighed([1] * 6)
    snapshot = build(wanted, state)
    for weights, most in changes:
        wanted = weighed(weights)
        snapshot = build(wanted, state, snapshot, most)
    for _ in range(6):
        snapshot = build(wanted, state, snapshot, 1)
    assert not snapshot.owed
    assert shares(snapshot) == shares(build(wanted, state))
