"""Tables by rendezvous hashing with bounded loads: a slot is his in whose order it comes first, as long as he has
no more than a 32nd beyond his share."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate
from math import ceil, gcd

from tests.reference.siphash import siphash


def table(size: int, members: Sequence[tuple[bytes, int, int]], seed: bytes, full: Sequence[int]) -> list[int]:
    """``members``: (16-byte address, weight, backend id); ``full``: the weight of each when all is well with it, if
    that is more.  Returns ``size`` backend ids, 65535 where there is nobody."""
    entry: list[int | None] = [None] * size
    most = {backend: max(weight, f) for (_, weight, backend), f in zip(members, full, strict=True)}
    claims: dict[int, list[int]] = {backend: [] for backend in most}
    claim(entry, [(address, most[backend], backend) for address, _, backend in members], seed, claims)
    for _, weight, backend in members:
        if most[backend]:
            keeps = len(claims[backend]) * weight // most[backend]
            for slot in claims[backend][keeps:]:
                entry[slot] = None
            del claims[backend][keeps:]
    claim(entry, members, seed, claims)
    return [65535 if e is None else e for e in entry]


def order(size: int, address: bytes, seed: bytes) -> list[int]:
    """Of slots, of a member: values of a polynomial that is a permutation of the field."""
    power = next(k for k in range(3, size + 3, 2) if gcd(k, size - 1) == 1)
    begin, scale, shift = (siphash(bytes(b ^ x for b in seed), address) for x in (0x5A, 0xA5, 0))
    scale = scale % (size - 1) + 1
    return [(scale * pow(begin + n, power, size) + shift) % size for n in range(size)]


def claim(
    entry: list[int | None], members: Sequence[tuple[bytes, int, int]], seed: bytes, claims: dict[int, list[int]]
) -> None:
    """Have those with a weight look at slots, until none is free."""
    taking = sorted((address, weight, backend) for address, weight, backend in members if weight)
    size, sum_, heaviest = len(entry), sum(w for _, w, _ in taking), max((w for _, w, _ in taking), default=0)
    orders = {b: order(size, a, seed) for a, _, b in taking}
    bound = {b: ceil(Fraction(size * w, sum_) * Fraction(33, 32)) for _, w, b in taking}
    # When the looks are made, in looks of one that draws slots by chance, until it has one that it had not yet.
    times = list(accumulate(((size << 16) // (size - n) for n in range(size - 1)), initial=0))
    looks = []
    for i, (_, weight, backend) in enumerate(taking):
        ratio = (heaviest << 16) // weight
        for n, time in enumerate(times):
            round_ = time * ratio >> 32
            looks.append((round_, -i if round_ % 2 else i, backend, orders[backend][n]))
    for *_, backend, slot in sorted(looks):
        if entry[slot] is None and len(claims[backend]) < bound[backend]:
            entry[slot] = backend
            claims[backend].append(slot)
