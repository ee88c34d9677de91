"""The hashes that are measured beside crablb's tables are those of their papers.

The references are written from the papers' definitions and not from their algorithms: AnchorHash by the sets that its
first algorithm keeps, DxHash by its sequence, JumpBackHash by the active indices of each octave.  What each paper
claims of changes is held for the changes that it claims it for, and for no others.
"""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import IPv4Address
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import hashes
from bench.hashes import TABLELESS, TABLES, Anchor, Dx, JumpBack, Library, Method, room
from crablb.model import Hashing
from crablb.selection import tables
from tests.helpers.bench import quiet

MASK = 2**64 - 1
FEW = hashes.hashes(200)
SOME = hashes.hashes(6000, seed=2)
COUNTS = st.one_of(st.integers(1, 6), st.integers(1, 40))
SIZE = 1009


@pytest.fixture(scope="module")
def library() -> Library:
    return Library.made(quiet())


def splitmix(seed: int, number: int) -> int:
    """The output of this number of SplitMix64 (OOPSLA 2014)."""
    z = (seed + number * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def test_splitmix():
    """Outputs of the generator's published Java and C versions for the seed 1234567."""
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [splitmix(1234567, number) for number in (1, 2, 3, 4)] == known


def below(random: int, n: int) -> int:
    """From 0 to n - 1, by the upper half of 64 bits."""
    return (random >> 32) * n >> 32


# ---- references ----


class AnchorSets:
    """Algorithm 1: for each bucket that is gone, those that were left when it had gone."""

    def __init__(self, capacity: int, working: int) -> None:
        self.anchor = list(range(capacity))
        self.working = list(self.anchor)
        self.left: dict[int, list[int]] = {}
        self.before: list[tuple[int, list[int]]] = []
        for bucket in range(capacity - 1, working - 1, -1):
            self.remove(bucket)

    def remove(self, bucket: int) -> None:
        self.before.append((bucket, list(self.working)))
        self.working[self.working.index(bucket)] = self.working[-1]
        self.working.pop()
        self.left[bucket] = list(self.working)

    def add(self) -> int:
        bucket, self.working = self.before.pop()
        del self.left[bucket]
        return bucket

    def bucket(self, key: int) -> int:
        bucket = self.anchor[below(key, len(self.anchor))]
        while bucket in self.left:
            left = self.left[bucket]
            bucket = left[below(splitmix(key, bucket + 1), len(left))]
        return bucket


def dx_sequence(capacity: int, key: int) -> Iterator[tuple[int, int]]:
    """Buckets, and what each one's weight has to be above; in the end, so that there is one, each in turn."""
    for number in range(1, 64 * capacity + 1):
        random = splitmix(key, number)
        yield random % capacity, random >> 48
    yield from (((random + step) % capacity, 0) for step in range(capacity))


def jumpback(key: int, n: int) -> int:
    """The greatest active index below n."""
    first = splitmix(key, 1)
    has_any = (first ^ first >> 32) & (1 << (n - 1).bit_length()) - 1

    def active(octave: int) -> Iterator[int]:
        """Of [2^octave, 2^(octave + 1)): each is lower than all before it that count, and numbers below it end them."""
        low = 1 << octave
        half = first >> 32 if (has_any & (2 * low - 1)).bit_count() % 2 else first
        yield low + half % low
        number = 1
        while True:
            number += 1
            for part in (splitmix(key, number), splitmix(key, number) >> 32):
                index = part % (2 * low)
                if index < low:
                    return
                yield index

    octaves = [octave for octave in reversed(range(32)) if has_any >> octave & 1]
    return next((index for octave in octaves for index in active(octave) if index < n), 0)


# ---- they are what the papers say ----


@settings(max_examples=200, deadline=None)
@given(working=COUNTS, changes=st.lists(st.integers(0, 999), max_size=20))
def test_anchor(library: Library, working: int, changes: list[int]):
    """Whatever goes and comes; each change moves the hashes of who goes or comes, and no others."""
    ours, paper = Anchor(library, dict.fromkeys(range(working), 1)), AnchorSets(room(working), working)
    holder = {bucket: bucket for bucket in range(working)}
    newest, before = working, ours.look(FEW)
    for change in changes:
        if (change % 2 and len(ours.members) > 1) or len(ours.members) == room(working):
            gone = sorted(ours.members)[change // 2 % len(ours.members)]
            (bucket,) = ours.buckets[gone]
            ours.remove(gone)
            paper.remove(bucket)
            after = ours.look(FEW)
            assert set(np.flatnonzero(before != after)) == set(np.flatnonzero(before == gone))
        else:
            ours.add(newest)
            holder[paper.add()] = newest
            after = ours.look(FEW)
            assert set(np.flatnonzero(before != after)) == set(np.flatnonzero(after == newest))
            newest += 1
        assert after.tolist() == [holder[paper.bucket(int(key))] for key in FEW]
        before = after


def test_anchor_in_every_order(library: Library):
    """All ways in which four of five go, each of which leaves its arrays otherwise; all come back, and go again."""
    keys = FEW[:30]
    for gone in permutations(range(5), 4):
        ours, paper = Anchor(library, dict.fromkeys(range(5), 1)), AnchorSets(room(5), 5)
        for step, bucket in enumerate(gone + gone[::-1] + gone[::-1]):
            if step < 4 or step >= 8:
                ours.remove(bucket)
                paper.remove(bucket)
            else:
                ours.add(bucket)
                assert paper.add() == ours.buckets[bucket][0] == bucket
            assert ours.look(keys).tolist() == [paper.bucket(int(key)) for key in keys]


@settings(max_examples=60, deadline=None)
@given(
    weights=st.lists(st.integers(1, 5), min_size=1, max_size=40), changes=st.lists(st.integers(0, 10**6), max_size=20)
)
def test_dx(library: Library, weights: list[int], changes: list[int]):
    """The same; and what it says is of who is there in which bucket, and not of how that came about."""
    ours = Dx(library, dict(enumerate(weights)))
    capacity = ours.method.buckets
    newest, before = len(weights), ours.look(FEW)
    for change in changes:
        if (change % 2 and len(ours.members) > 1) or len(ours.members) == capacity:
            gone = sorted(ours.members)[change // 2 % len(ours.members)]
            ours.remove(gone)
            after = ours.look(FEW)
            assert set(np.flatnonzero(before != after)) == set(np.flatnonzero(before == gone))
        else:
            ours.add(newest, change % ours.heaviest + 1)
            after = ours.look(FEW)
            assert set(np.flatnonzero(before != after)) == set(np.flatnonzero(after == newest))
            newest += 1
        there = {bucket: backend for backend, bucket in ours.buckets.items()}
        share = {bucket: max(65536 * ours.members[backend] // ours.heaviest, 1) for bucket, backend in there.items()}
        for key, chosen in zip(FEW[:60].tolist(), after.tolist(), strict=False):
            sequence = dx_sequence(capacity, key)
            assert chosen == there[next(bucket for bucket, mark in sequence if mark < share.get(bucket, 0))]
        before = after


def test_dx_of_hardly_anybody(library: Library):
    """Of 2,048 buckets one is there, with a weight of almost nothing: all hashes find it."""
    ours = Dx(library, {0: 1, 1: 60000} | dict.fromkeys(range(2, 1024), 1))
    for backend in range(1, 1024):
        ours.remove(backend)
    assert set(ours.look(FEW).tolist()) == {0}


@settings(max_examples=100, deadline=None)
@given(key=st.integers(0, MASK), n=st.one_of(st.integers(1, 70), st.integers(1, 60000)))
def test_jumpback(library: Library, key: int, n: int):
    """One more bucket gets what it has from the others, and nothing else moves."""
    found = {}
    for working in (n, n + 1):
        method = library.owned(library.lib.jumpback_new(working, working))
        hashes.backends_of(method, working)[:] = np.arange(working, dtype=np.uint16)
        found[working] = int(library.look(method, np.array([key], np.uint64))[0])
        assert found[working] == jumpback(key, working)
    assert found[n + 1] in (found[n], n)


@settings(max_examples=60, deadline=None)
@given(count=st.integers(2, 40), gone=st.integers(0, 39))
def test_jumpback_moves_the_last_too(library: Library, count: int, gone: int):
    """The last can go at no price; for another one, the last moves to its bucket, and that is all."""
    gone %= count
    ours = JumpBack(library, dict.fromkeys(range(count), 1))
    before = ours.look(SOME)
    ours.remove(gone)
    moved = before != ours.look(SOME)
    assert set(before[moved].tolist()) <= {gone, count - 1}
    assert moved[before == gone].all()


# ---- all of them ----


def method(of: type[Method], library: Library, members: dict[int, int]) -> Method:
    return of(library, members, SIZE) if of in TABLES else of(library, members)  # type: ignore[call-arg]


@pytest.mark.parametrize("of", TABLES + TABLELESS)
@settings(max_examples=25, deadline=None)
@given(weights=st.lists(st.integers(1, 3), min_size=1, max_size=20), data=st.data())
def test_all(of: type[Method], library: Library, weights: list[int], data: st.DataObject):
    """Everybody gets something, and who is not there nothing; the same list says the same; what a table says is what is
    looked up in it."""
    members = dict(enumerate(weights))
    ours, other = method(of, library, members), method(of, library, members)
    assert (ours.whole() == other.whole()).all()
    assert set(ours.look(SOME).tolist()) == set(members)
    if len(members) > 1:
        gone = data.draw(st.sampled_from(sorted(members)))
        ours.remove(gone)
        with pytest.raises(KeyError):
            ours.remove(gone)
        assert set(ours.look(SOME).tolist()) == set(members) - {gone}
    ours.add(100)
    assert 100 in ours.look(SOME)
    if of in TABLES:
        assert ours.look(SOME).tolist() == [ours.whole()[below(int(key), SIZE)] for key in SOME]


@pytest.mark.parametrize("of", TABLES + TABLELESS)
def test_weights(of: type[Method], library: Library):
    """A weight of three is three times as much.  Of 1,009 slots or 6,000 hashes chance has its part."""
    found = np.bincount(method(of, library, {0: 3, 1: 1, 2: 4}).look(SOME), minlength=3) / len(SOME)
    assert found == pytest.approx([3 / 8, 1 / 8, 4 / 8], abs=0.05)


@pytest.mark.parametrize("of", TABLELESS)
@pytest.mark.parametrize("count", [2, 3, 13, 32, 33])
def test_even(of: type[Method], count: int, library: Library):
    """Within five standard deviations, also where backends have gone."""
    many = hashes.hashes(60_000, seed=3)
    ours = of(library, dict.fromkeys(range(count + 2), 1))
    ours.remove(count)
    ours.remove(1)
    found = np.bincount(ours.look(many), minlength=count + 2)[sorted(ours.members)]
    share = len(many) / count
    assert abs(found - share).max() < 5 * np.sqrt(share)


@pytest.mark.parametrize("of", TABLES + TABLELESS)
def test_who_cannot_go_or_come(of: type[Method], library: Library):
    ours = method(of, library, {7: 1})
    with pytest.raises(ValueError, match="the last backend"):
        ours.remove(7)
    if of in TABLES[:2]:
        return
    ours.add(8)
    with pytest.raises(ValueError, match="room for 2 buckets"):
        ours.add(9)
    assert set(ours.look(FEW).tolist()) == {7, 8}


def test_dx_heavier_than_all(library: Library):
    with pytest.raises(ValueError, match="2 was the greatest"):
        Dx(library, {0: 2, 1: 1}).add(2, 3)


def test_dx_doubled(library: Library):
    """Half of the hashes look into the new half first, find nobody, and draw again."""
    ours = Dx(library, dict.fromkeys(range(1024), 1))
    before = ours.look(SOME)
    ours.double()
    assert ours.method.buckets == 4096
    after = ours.look(SOME)
    assert set(after.tolist()) <= set(range(1024))
    assert 0.4 < (before != after).mean() < 0.6


@pytest.mark.parametrize("hashing", Hashing)
def test_crablbs_own_are_its_own(hashing: Hashing, library: Library):
    """What is measured as crablb's table is what the daemon makes of the same backends."""
    ours = next(of for of in TABLES if of.name == hashing.value)(library, {0: 1, 1: 2, 5: 3}, SIZE, seed=7)
    members = {i: (IPv4Address(0x0A010000 + i), weight, weight) for i, weight in ((0, 1), (1, 2), (5, 3))}
    assert (ours.whole() == tables.table_of(members, SIZE, bytes([7, *bytes(15)]), hashing)).all()
