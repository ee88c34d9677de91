"""Weighted Maglev tables (Eisenbud et al., NSDI 2016, 3.4), by permutations as the paper's pseudocode has them."""

from __future__ import annotations

from collections.abc import Sequence

from tests.reference.siphash import siphash


def table(size: int, members: Sequence[tuple[bytes, int, int]], seed: bytes) -> list[int]:
    """``members``: (16-byte address, weight, backend id).  Returns ``size`` backend ids."""
    taking = sorted((address, weight, backend) for address, weight, backend in members if weight)
    if not taking:
        return [65535] * size
    second = bytes(b ^ 0xA5 for b in seed)
    permutations = []
    for address, _, _ in taking:
        offset = siphash(seed, address) % size
        skip = siphash(second, address) % (size - 1) + 1
        permutations.append(iter([(offset + j * skip) % size for j in range(size)]))
    heaviest = max(weight for _, weight, _ in taking)
    credit = [0] * len(taking)
    entry: list[int | None] = [None] * size
    free = size
    while True:
        for i, (_, weight, backend) in enumerate(taking):
            credit[i] += weight
            if credit[i] < heaviest:
                continue
            credit[i] -= heaviest
            entry[next(c for c in permutations[i] if entry[c] is None)] = backend
            free -= 1
            if not free:
                return [e for e in entry if e is not None]


def slot(hash_: int, size: int) -> int:
    """Slot of a 64-bit hash: its upper 32 bits, scaled."""
    return (hash_ >> 32) * size >> 32
