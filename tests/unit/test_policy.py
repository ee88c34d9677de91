"""Policies: exact sequences where they are deterministic, bounds with fixed seeds where they are not."""

from __future__ import annotations

import heapq
import ipaddress
import json
import threading
import time
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from ipaddress import ip_address
from math import gcd

import numpy as np
import pytest
from crablb._native import ffi, lib
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import Ether

from crablb.config import parse_policy
from crablb.errors import ConfigError
from crablb.model import CONSISTENT, Backend, Service, State, Vip
from crablb.model import POLICIES as BUILTIN
from crablb.selection import custom
from crablb.selection.custom import Custom
from crablb.selection.loads import Balance, Load
from crablb.selection.pool import Pool
from crablb.values import resolve
from tests.helpers.frames import SEED, reference, syn
from tests.helpers.native import Core
from tests.reference.round_robin import interleaved, smooth
from tests.reference.siphash import siphash

#: Policies that choose among a pool's members; the others look into a table.
POOLED = [policy for policy in BUILTIN if policy not in CONSISTENT]
weight_lists = st.lists(st.integers(1, 9), min_size=1, max_size=8)


def pool(policy: str, weights: list[int], turn: object = None, loads: list[object] | None = None) -> Pool:
    """Backends 100, 101, ... with these weights."""
    loads = loads or [ffi.new("struct crab_load *") for _ in weights]
    members = {100 + i: (load, w) for i, (load, w) in enumerate(zip(loads, weights, strict=True))}
    made = Pool(policy, members, turn or ffi.new("struct crab_turn *"))
    made.loads = loads
    return made


def picks(made: Pool, n: int, seed: int = 1, at_once: int = lib.CRAB_BATCH) -> list[int]:
    state = ffi.new("uint64_t *", seed)
    sizes = [min(at_once, n - i) for i in range(0, n, at_once)]
    return [backend - 100 for size in sizes for backend in made.pick(state, size)]


def reduced(weights: list[int]) -> list[int]:
    return [w // gcd(*weights) for w in weights]


# ---- deterministic ones ----


@given(weight_lists)
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


@pytest.mark.parametrize("policy", POOLED)
def test_nobody_to_choose(policy):
    assert pool(policy, []).pick(ffi.new("uint64_t *", 1), 3) == []


@pytest.mark.parametrize("policy", POOLED)
@given(weight_lists, st.integers(1, lib.CRAB_BATCH))
def test_many_at_once_are_one_after_the_other(policy, weights, at_once):
    one, many = pool(policy, weights), pool(policy, weights)
    assert picks(one, 200, at_once=1) == picks(many, 200, at_once=at_once)
    assert [load.assigned for load in one.loads] == [load.assigned for load in many.loads]


# ---- in the hot loop ----


def with_policy(policy: str, turn: object = None) -> Core:
    """The reference's services; the first chooses by policy between backends 0, 1 and 3 (2 does not speak CR)."""
    core = Core(reference())
    core.loads = [ffi.new("struct crab_load *") for _ in range(3)]
    members = {i: (load, 1) for i, load in zip((0, 1, 3), core.loads, strict=True)}
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


@pytest.mark.parametrize("policy", POOLED)
def test_a_connection_is_assigned_once_however_often_its_syn_is_in_a_batch(policy):
    core = with_policy(policy)
    frames = [syn(port) for port in (1, 2, 1, 3, 2)]
    chosen = [backend_of(frame) for frame in core.handle(*frames)]
    assert (chosen[2], chosen[4]) == (chosen[0], chosen[1])
    assert sum(load.assigned for load in core.loads) == 3
    assert core.counts()["retransmitted_syn"] == 2


def test_a_member_that_cannot_be_reached_leaves_it_to_the_table():
    core, hashed = with_policy("round-robin"), Core(reference())
    there, gone = ffi.new("struct crab_load *"), ffi.new("struct crab_load *")
    core.pool = Pool("round-robin", {0: (there, 1), 999: (gone, 1)}, ffi.new("struct crab_turn *"))
    core.set_pool(0, core.pool.c)
    frames = [syn(port) for port in range(1, 21)]
    sent, by_table = core.handle(*frames), hashed.handle(*frames)
    assert [backend_of(frame) for frame in sent[::2]] == [0] * 10
    assert sent[1::2] == by_table[1::2]
    assert (there.assigned, gone.assigned) == (10, 0)


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
@settings(max_examples=50)
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


# ---- in Python ----


class Asked:
    """The first service chooses by a function between backends 0, 1 and 3."""

    def __init__(self, choose) -> None:
        self.core = Core(reference())
        self.failures = 0
        self.balance = Balance()
        vip = Vip(ip_address("10.0.0.100"), 80)
        addresses = [ip_address(f"10.0.0.{11 + i}") for i in (0, 1, 3)]
        self.backends = self.balance.backends(vip, dict.fromkeys(addresses, 1))
        self.custom = Custom(self.fail)
        self.custom.publish({5: custom.Asked(vip, choose, self.backends, np.array([0, 1, 3], np.uint16))})
        self.core.set_custom(0, 5, self.custom)

    def fail(self, vip: Vip, reason: str) -> None:
        self.failures += 1

    def chosen(self, *ports: int) -> list[int]:
        return [backend_of(frame) for frame in self.core.handle(*(syn(port) for port in ports))]


def test_a_policy_in_python():
    batches = []

    def choose(batch, backends):
        batches.append((batch.copy(), backends.connections.tolist(), backends.load.tolist()))
        return batch["cport"] % len(backends)

    asked = Asked(choose)
    asked.balance.report(Vip(ip_address("10.0.0.100"), 80), ip_address("10.0.0.12"), 7, 250)
    assert asked.chosen(3, 4, 5, 6) == [0, 1, 3, 0]
    assert len(batches) == 1  # once a batch
    batch, connections, load = batches[0]
    assert batch["cport"].tolist() == [3, 4, 5, 6]
    assert batch["isn"].tolist() == [3, 4, 5, 6]
    assert bytes(batch["client"][0]) == bytes(10) + b"\xff\xff" + ip_address("10.0.0.1").packed
    assert bytes(batch["vip"][0])[12:] == ip_address("10.0.0.100").packed
    message = ip_address("10.0.0.1").packed + ip_address("10.0.0.100").packed + b"\0\3\0\x50"
    assert int(batch["hash"][0]) == siphash(SEED, message)
    assert 0 <= time.monotonic_ns() - int(batch["arrival"][0]) < 60 * 10**9
    assert (connections, load) == ([0, 7, 0], [0, 0.25, 0])
    assert asked.backends.connections.tolist() == [2, 8, 1]
    # Retransmissions, and clients that do not offer, are not asked about.
    assert asked.chosen(4) == [1]
    plain = bytes(
        Ether(src="02:00:00:00:00:01") / IP(src="10.0.0.1", dst="10.0.0.100") / TCP(sport=9, dport=80, flags="S")
    )
    asked.core.handle(plain)
    assert len(batches) == 1
    assert asked.failures == 0


def raises(batch, backends):
    raise RuntimeError("no idea")


NONSENSE = {
    "raises": raises,
    "none": lambda batch, backends: None,
    "too-few": lambda batch, backends: [0] * (len(batch) - 1),
    "a-matrix": lambda batch, backends: np.zeros((len(batch), 1), int),
    "floats": lambda batch, backends: np.zeros(len(batch)),
    "too-large": lambda batch, backends: [len(backends)] * len(batch),
    "negative": lambda batch, backends: [-2] * len(batch),
    "text": lambda batch, backends: ["a"] * len(batch),
}


@pytest.mark.parametrize("name", [*NONSENSE, "undecided"])
def test_a_policy_that_fails_is_replaced_by_the_hash(name, capsys):
    asked = Asked(NONSENSE.get(name, lambda batch, backends: np.full(len(batch), -1)))
    hashed = Core(reference())
    ports = range(1, 20)
    frames = [syn(port) for port in ports]
    assert asked.core.handle(*frames) == hashed.handle(*frames)
    assert asked.core.handle(syn(50)) == hashed.handle(syn(50))
    assert asked.failures == (0 if name == "undecided" else 2)
    assert capsys.readouterr().out.count("policy failed") == (0 if name == "undecided" else 1)  # not for each batch


@given(st.lists(st.integers(1, 60000), min_size=1, max_size=64, unique=True))
@settings(max_examples=50)
def test_a_batch_with_choices_is_its_frames(ports):
    def by_port(batch, backends):
        return batch["cport"] % 3

    together, one = Asked(by_port), Asked(by_port)
    assert together.chosen(*ports) == [one.chosen(port)[0] for port in ports]


def test_a_policy_that_cannot_be_found():
    for name, problem in (
        ("no_such_module:choose", "module 'no_such_module' cannot be imported: ModuleNotFoundError: No module"),
        ("json:choose", "module 'json' has no function 'choose'"),
        ("json:__doc__", "module 'json' has no function '__doc__'"),
    ):
        with pytest.raises(ConfigError, match=problem):
            parse_policy(name)
    assert resolve("json:loads") is json.loads


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


def test_a_step_of_a_service_that_is_gone_or_steps_no_more():
    """Whatever began after the moment that is asked about."""
    slow = Service(VIP, (Backend(A), Backend(B)), slow_start=10.0)
    for services in ([], [replace(slow, slow_start=0.0)]):
        balance = Balance()
        balance.begin(slow, B, 100)
        assert balance.next_step(services, 99) is None
        assert balance.next_step(services, 101) is None
    balance = Balance()
    balance.begin(replace(slow, slow_start=1e-310), B, 100)
    assert balance.next_step([replace(slow, slow_start=1e-310)], 99) == pytest.approx(100)


def test_who_gets_no_connections_has_no_weight():
    service = Service(VIP, (Backend(A, 0), Backend(B, state=State.DRAIN), Backend(C, 4)))
    assert Balance().weights(service, service.backends, 0) == {C: 4}


def test_who_does_not_report_is_taken_for_average():
    service = Service(VIP, (Backend(A, 1), Backend(B, 3), Backend(C, 2)))
    balance = Balance()
    a, b, c = (balance.load(VIP, x) for x in (A, B, C))
    a.open, b.open, c.assigned = 10, 30, 77
    a.figure, b.figure = 400, 600
    assert balance.heard(A, at=10.0) and balance.heard(B, at=11.0)
    assert not balance.heard(A, at=10.5)  # it was known
    balance.age(service)
    assert (c.open, c.base, c.figure) == (20, 77, 500)
    assert (a.open, b.open) == (10, 30)
    assert [balance.silent(at) for at in (13.4, 13.6, 13.7, 14.1)] == [set(), {A}, set(), {B}]
    balance.age(service)
    assert (a.open, b.open, c.open) == (0, 0, 0)


def test_loads_of_more_backends_than_there_is_room_for():
    """Of a service that scales all the time: what a policy in Python sees is what workers and reports write, always."""
    balance, other = Balance(), Vip(ip_address("10.0.0.100"), 81)
    kept = balance.load(other, A)
    kept.open = 7
    for generation in range(12):
        addresses = [ip_address((10 << 24) + generation * 10_000 + i) for i in range(10_000)]
        services = [Service(VIP, tuple(map(Backend, addresses))), Service(other, (Backend(A),))]
        seen = balance.backends(VIP, dict.fromkeys(addresses, 1))
        assert not seen.connections.any()
        assert not seen.load.any()
        last = balance.load(VIP, addresses[-1])
        last.open = generation + 1
        seen.assigned(np.array([9_999, 9_999, 3], np.intp))
        assert seen.connections.sum() == generation + 4
        assert (last.assigned, seen.connections[9_999]) == (2, generation + 3)
        balance.forget(services)
    assert (kept.open, balance.read(other, A).open) == (7, 7)


def test_loads_cool_before_they_are_anothers():
    """A worker may be assigning to a backend that was removed, until the snapshots before are gone."""
    balance, service = Balance(), Service(VIP, (Backend(A),))
    gone = balance.load(VIP, B)
    balance.forget([service])
    new = balance.load(VIP, C)
    gone.assigned = 5
    assert new.assigned == 0
    assert balance.load(VIP, B).assigned == 5  # it came back in time
    balance.forget([service])
    balance.forget([service])
    assert [balance.load(VIP, x).assigned for x in (B, C)] == [0, 0]


def test_to_look_at_loads_takes_no_memory():
    """A scrape asks for the load of each of 10,000 backends, of which perhaps none is reported."""
    balance, vip, backend = Balance(), Vip(ip_address("10.0.0.100"), 80), ip_address("10.0.0.11")
    assert balance.read(vip, backend) == Load(0, 0, 0.0)
    assert balance._blocks == {}
    balance.report(vip, backend, 5, 250)
    assert balance.read(vip, backend) == Load(0, 5, 0.25)
    block = balance._blocks[vip]
    balance.load(vip, backend)
    assert balance._blocks[vip] is block
