"""Policies: exact sequences where they are deterministic, bounds with fixed seeds where they are not."""

from __future__ import annotations

import heapq
import ipaddress
import random
import threading
from collections import Counter
from fractions import Fraction
from ipaddress import ip_address
from math import gcd

import pytest
from crablb._native import ffi, lib
from hypothesis import given, settings
from hypothesis import strategies as st

from crablb.lab.demo import status
from crablb.model import Backend, Service, State, Vip
from crablb.policy import BUILTIN, Balance, Pool
from tests.native import Core
from tests.reference.siphash import siphash
from tests.test_differential import SEED, reference
from tests.test_worker import syn

weight_lists = st.lists(st.integers(1, 9), min_size=1, max_size=8)


def pool(policy: str, weights: list[int], turn: object = None, loads: list[object] | None = None) -> Pool:
    """Backends 100, 101, ... with these weights."""
    loads = loads or [ffi.new("struct crab_load *") for _ in weights]
    members = {100 + i: (load, w) for i, (load, w) in enumerate(zip(loads, weights, strict=True))}
    made = Pool(policy, members, turn or ffi.new("struct crab_turn *"))
    made.loads = loads
    return made


def picks(made: Pool, n: int, seed: int = 1) -> list[int]:
    numbers = random.Random(seed)
    return [made.pick(numbers.getrandbits(64)) - 100 for _ in range(n)]


def reduced(weights: list[int]) -> list[int]:
    return [w // gcd(*weights) for w in weights]


# ---- deterministic ones ----


def interleaved(weights: list[int]) -> list[int]:
    return [i for round_ in range(max(weights)) for i, w in enumerate(weights) if w > round_]


def smooth(weights: list[int]) -> list[int]:
    """As nginx says it: everybody gains his weight, the richest pays everybody's."""
    credit, out = [0] * len(weights), []
    for _ in range(sum(weights)):
        credit = [c + w for c, w in zip(credit, weights, strict=True)]
        best = credit.index(max(credit))
        credit[best] -= sum(weights)
        out.append(best)
    return out


@given(weight_lists)
@settings(deadline=None)
def test_round_robins(weights):
    for policy, sequence in (("round-robin", interleaved), ("weighted-round-robin", smooth)):
        expected = sequence(reduced(weights))
        assert picks(pool(policy, weights), 2 * len(expected)) == 2 * expected


def test_round_robin_as_printed():
    assert picks(pool("round-robin", [3, 1, 2]), 6) == [0, 1, 2, 0, 2, 0]
    assert picks(pool("weighted-round-robin", [5, 1, 1]), 7) == [0, 0, 1, 0, 2, 0, 0]


@pytest.mark.parametrize("policy", ["round-robin", "weighted-round-robin"])
def test_weights_too_large_for_a_sequence(policy):
    """They are brought down, nobody to nothing."""
    got = Counter(picks(pool(policy, [65535, 65521, 1]), 65600))
    assert got[2] in (1, 2)
    assert abs(got[0] - got[1]) < 20


@pytest.mark.parametrize("policy", ["round-robin", "weighted-round-robin"])
def test_a_turn_outlives_its_pool_and_is_shared(policy):
    turn = ffi.new("struct crab_turn *")
    first, second = (pool(policy, [1, 1, 1], turn) for _ in range(2))
    assert [picks(p, 1)[0] for p in (first, second, first, second)] == [0, 1, 2, 0]
    counts: Counter[int] = Counter()

    def work(made: Pool) -> None:
        counts.update(picks(made, 30000))

    threads = [threading.Thread(target=work, args=(p,)) for p in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(counts.values()) == {20000}


def greedy(base: list[int], weights: list[int], n: int) -> list[int]:
    """Always who is cheapest after the next connection."""
    heap = [(Fraction(b + 1, w), i, b) for i, (b, w) in enumerate(zip(base, weights, strict=True))]
    heapq.heapify(heap)
    out = []
    for _ in range(n):
        _, i, b = heap[0]
        out.append(i)
        heapq.heapreplace(heap, (Fraction(b + 2, weights[i]), i, b + 1))
    return out


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 5)), min_size=1, max_size=8))
@settings(deadline=None)
def test_least_connections(members):
    opens, weights = [o for o, _ in members], [w for _, w in members]
    made = pool("least-connections", weights)
    for load, n in zip(made.loads, opens, strict=True):
        load.open = n
    made.refresh()
    assert picks(made, 500) == greedy(opens, weights, 500)
    # What was assigned counts, until a report says that it has become connections (or is gone).
    made.refresh()
    now = [o + load.assigned for o, load in zip(opens, made.loads, strict=True)]
    assert picks(made, 100) == greedy(now, weights, 100)
    for load in made.loads:
        load.base, load.open = load.assigned, 0
    made.refresh()
    assert picks(made, 100) == greedy([0] * len(weights), weights, 100)


def test_least_connections_when_its_schedule_is_used_up():
    """Without a look at the loads for long it goes on by weight."""
    made = pool("least-connections", [1, 2, 1])
    made.loads[0].open = 100  # made good within the schedule
    made.refresh()
    picks(made, 4096)
    got = Counter(picks(made, 100_000))
    assert got[1] / 2 == pytest.approx(25_000, rel=0.02)
    assert got[0] == pytest.approx(25_000, rel=0.02)


def test_least_connections_by_several_workers():
    """Two threads, and a third that works out schedules: nobody is ahead by more than the error of one schedule."""
    made = pool("least-connections", [1] * 50)
    done = threading.Event()

    def refresh() -> None:
        while not done.is_set():
            made.refresh()

    threads = [threading.Thread(target=picks, args=(made, 40_000)) for _ in range(2)]
    refresher = threading.Thread(target=refresh)
    for thread in (*threads, refresher):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    refresher.join()
    assert sum(load.assigned for load in made.loads) == 80_000
    made.refresh()
    picks(made, 50 * 40)
    assert max(load.assigned for load in made.loads) - min(load.assigned for load in made.loads) <= 1 + 40


def test_least_loaded():
    made = pool("least-loaded", [1, 1, 1])
    for load, figure in zip(made.loads, (900, 100, 500), strict=True):
        load.figure, load.open = figure, 10
    made.refresh()
    # A connection is 1500 / 30 = 50 thousandths: the second takes those up to where the third is.
    got = picks(made, 7)
    assert set(got) == {1}
    assert set(picks(made, 8)) == {1, 2}
    assert 0 not in got
    heavy = pool("least-loaded", [1, 9])
    for load in heavy.loads:
        load.figure, load.open = 500, 10
    heavy.refresh()
    assert set(picks(heavy, 50)) == {1}


# ---- by chance ----


@pytest.mark.parametrize("policy", ["random", "power-of-two"])
@pytest.mark.parametrize("weights", [[1, 1, 1, 1], [1, 2, 3, 4], [1, 1000], [7]])
def test_chance_follows_the_weights(policy, weights):
    n = 60_000
    got = Counter(picks(pool(policy, weights), n, seed=7))
    for i, weight in enumerate(weights):
        expected = n * weight / sum(weights)
        # five standard deviations of a binomial; power-of-two keeps closer than that
        assert abs(got[i] - expected) <= 5 * (expected * (1 - weight / sum(weights))) ** 0.5 + 1


def test_random_is_independent_of_loads():
    made = pool("random", [1, 1])
    made.loads[0].open = 10**6
    made.refresh()
    assert 4700 < Counter(picks(made, 10_000))[0] < 5300


def test_power_of_two_prefers_the_emptier():
    made = pool("power-of-two", [1] * 10)
    made.loads[3].open = 10**6
    got = Counter(picks(made, 10_000))
    assert got[3] < 10_000 / 100 + 60  # only when both draws fall on it
    level = pool("power-of-two", [1] * 10)
    picks(level, 10_000)
    assert max(load.assigned for load in level.loads) - min(load.assigned for load in level.loads) <= 10


@pytest.mark.parametrize("policy", [p for p in BUILTIN if p not in ("maglev", "source-hash")])
def test_nobody_to_choose(policy):
    assert pool(policy, []).pick(1) == lib.CRAB_NO_BACKEND


# ---- in the hot loop ----


def with_policy(policy: str, turn: object = None) -> Core:
    """The reference's services; the first chooses by policy between backends 0, 1 and 3 (2 does not speak CR)."""
    core = Core(reference())
    core.pool = pool(policy, [1, 1, 1])
    members = {i: (load, 1) for i, load in zip((0, 1, 3), core.pool.loads, strict=True)}
    core.pool = Pool(policy, members, turn or ffi.new("struct crab_turn *"))
    core.set_pool(0, core.pool.c)
    return core


def backend_of(frame: bytes | None) -> int:
    assert frame
    return frame[5]


def test_policy_chooses_who_is_redirected():
    core = with_policy("round-robin")
    chosen = [backend_of(core.handle(syn(port))[0]) for port in range(1, 31)]
    assert chosen == [0, 1, 3] * 10
    assert core.counts()["redirected"] == 30
    # A retransmission goes where its first copy went, and takes no turn.
    assert backend_of(core.handle(syn(5))[0]) == chosen[4]
    assert backend_of(core.handle(syn(31))[0]) == 0


def test_fallback_is_hashed_whatever_the_policy():
    plain, hashed = with_policy("round-robin"), Core(reference())
    for port in range(1, 60):
        frame = bytearray(syn(port))
        frame[-4:] = b"\1\1\1\1"  # NOPs instead of an offer
        frame[50:52] = b"\0\0"  # the checksum, left to the card
        total = sum(int.from_bytes(frame[i : i + 2], "big") for i in range(26, 34, 2)) + 6 + len(frame) - 34
        frame[50:52] = ((total & 0xFFFF) + (total >> 16)).to_bytes(2, "big")
        assert plain.handle(bytes(frame)) == hashed.handle(bytes(frame))
    assert "redirected" not in plain.counts()
    assert backend_of(plain.handle(syn(100))[0]) == 0  # no turn was taken


@given(st.integers(0, 2**32 - 1), st.integers(1, 32), st.integers(1, 65535), st.integers(1, 65535))
@settings(deadline=None, max_examples=50)
def test_source_hash(client, bits, one, other):
    """By the client's prefix alone: the slot that SipHash of (prefix, 0, 0, 0) says."""
    expected = reference()
    core = Core(expected)
    core.set_source(0, bits, 128)
    prefix = int(ipaddress.ip_network((client, bits), strict=False).network_address).to_bytes(4, "big")
    table = expected.services[0].table
    slot = ((siphash(SEED, prefix + bytes(8)) >> 32) * len(table)) >> 32
    for port in (one, other):
        frame = syn(port, str(ip_address(client)))
        (out,) = core.handle(frame)
        backend = expected.backends[table[slot]]
        assert out is None or out[:6] == backend.mac


# ---- what outlives a configuration ----

VIP = Vip(ip_address("10.0.0.100"), 80)
A, B, C = (ip_address(f"10.0.0.1{i}") for i in (1, 2, 3))


def test_slow_start():
    service = Service(VIP, (Backend(A, 3), Backend(B, 2)), slow_start=20)
    balance = Balance()
    assert balance.weights(service, service.backends, 0) == {A: 3, B: 2}
    balance.begin(service, B, 100)
    assert balance.weights(service, service.backends, 100) == {A: 30, B: 2}
    assert balance.weights(service, service.backends, 111) == {A: 30, B: 10}
    assert balance.next_step([service], 111) == 112
    assert balance.weights(service, service.backends, 120) == {A: 3, B: 2}
    assert balance.next_step([service], 120) is None
    balance.begin(service, B, 200)
    balance.forget([Service(VIP, (Backend(A),))])
    assert balance.next_step([service], 200) is None


def test_who_gets_no_connections_has_no_weight():
    service = Service(VIP, (Backend(A, 0), Backend(B, state=State.DRAIN), Backend(C, 4)))
    assert Balance().weights(service, service.backends, 0) == {C: 4}


def test_who_does_not_report_is_taken_for_average():
    service = Service(VIP, (Backend(A, 1), Backend(B, 3), Backend(C, 2)))
    balance = Balance()
    a, b, c = (balance.load(VIP, x) for x in (A, B, C))
    a.open, b.open, c.assigned = 10, 30, 77
    a.figure, b.figure = 400, 600
    balance.age(service, {A, B})
    assert (c.open, c.base, c.figure) == (20, 77, 500)
    assert (a.open, b.open) == (10, 30)
    balance.age(service)
    assert (a.open, b.open, c.open) == (0, 0, 0)


# ---- end to end ----


def test_redirected_by_turns(make_world):
    """Thirty connections, three servers, two of them twice as heavy: by the smooth round robin to the connection."""
    world = make_world(servers=3)
    world.servers()
    world.client()
    backends = ",".join(f"{s.ip4}*{w}" for s, w in zip(world.lab.servers, (1, 2, 2), strict=True))
    world.serve("--policy", "weighted-round-robin", what=[f"tcp://{VIP.address}:80={backends}"])
    got = [world.echo(VIP.address, "10")["server"] for _ in range(10)]
    expected = [f"server{1 + i}" for i in smooth([1, 2, 2])] * 2
    assert got == expected
    assert status(world.lab)["total"]["redirected"] == 10
