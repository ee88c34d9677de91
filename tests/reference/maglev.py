"""Weighted Maglev tables (Eisenbud et al., NSDI 2016, 3.4), by permutations as the paper's pseudocode has them."""

from __future__ import annotations

from collections.abc import Sequence

from tests.reference.siphash import siphash


def table(size: int, members: Sequence[tuple[bytes, int, int]], seed: bytes, full: Sequence[int] = ()) -> list[int]:
    """``members``: (16-byte address, weight, backend id); ``full``: the weight of each when all is well with it, if
    that is more.  Returns ``size`` backend ids, 65535 where there is nobody."""
    fulls = [max(weight, *full[i : i + 1]) if full else weight for i, (_, weight, _) in enumerate(members)]
    entry: list[int | None] = [None] * size
    claims = fill(entry, [(a, f, b) for (a, _, b), f in zip(members, fulls, strict=True)], seed)
    for (_, weight, backend), most in zip(members, fulls, strict=True):
        if most:
            mine = claims[backend]
            for slot_ in mine[len(mine) * weight // most :]:
                entry[slot_] = None
    fill(entry, members, seed)
    return [65535 if e is None else e for e in entry]


def fill(entry: list[int | None], members: Sequence[tuple[bytes, int, int]], seed: bytes) -> dict[int, list[int]]:
    """Have the members claim the entries that are None; each one's claims, in order."""
    taking = sorted((address, weight, backend) for address, weight, backend in members if weight)
    size, free = len(entry), entry.count(None)
    claims: dict[int, list[int]] = {backend: [] for _, _, backend in members}
    second = bytes(b ^ 0xA5 for b in seed)
    permutations = []
    for address, _, _ in taking:
        offset = siphash(seed, address) % size
        skip = siphash(second, address) % (size - 1) + 1
        permutations.append(iter([(offset + j * skip) % size for j in range(size)]))
    heaviest = max((weight for _, weight, _ in taking), default=0)
    credit = [0] * len(taking)
    while free and taking:
        for i, (_, weight, backend) in enumerate(taking):
            credit[i] += weight
            if credit[i] < heaviest:
                continue
            credit[i] -= heaviest
            claimed = next(c for c in permutations[i] if entry[c] is None)
            entry[claimed] = backend
            claims[backend].append(claimed)
            free -= 1
            if not free:
                break
    return claims


def slot(hash_: int, size: int) -> int:
    """Slot of a 64-bit hash: its upper 32 bits, scaled."""
    return (hash_ >> 32) * size >> 32
