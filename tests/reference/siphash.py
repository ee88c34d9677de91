"""SipHash-c-d of byte strings (Aumasson and Bernstein, 2012)."""

from __future__ import annotations

MASK = (1 << 64) - 1


def _rotate(x: int, bits: int) -> int:
    return (x << bits | x >> (64 - bits)) & MASK


def _round(v: list[int]) -> None:
    for a, b, c, d, left, right in ((0, 1, 2, 3, 13, 16), (2, 1, 0, 3, 17, 21)):
        v[a] = (v[a] + v[b]) & MASK
        v[c] = (v[c] + v[d]) & MASK
        v[b] = _rotate(v[b], left) ^ v[a]
        v[d] = _rotate(v[d], right) ^ v[c]
        v[a] = _rotate(v[a], 32)


def siphash(key: bytes, data: bytes, c: int = 1, d: int = 3) -> int:
    """64-bit hash; SipHash-1-3 unless told otherwise."""
    k = [int.from_bytes(key[:8], "little"), int.from_bytes(key[8:], "little")]
    constants = b"somepseudorandomlygeneratedbytes"
    v = [int.from_bytes(constants[i : i + 8], "big") ^ k[i // 8 % 2] for i in range(0, 32, 8)]
    padded = data + bytes(-(len(data) + 1) % 8) + bytes([len(data) % 256])
    for i in range(0, len(padded), 8):
        word = int.from_bytes(padded[i : i + 8], "little")
        v[3] ^= word
        for _ in range(c):
            _round(v)
        v[0] ^= word
    v[2] ^= 0xFF
    for _ in range(d):
        _round(v)
    return v[0] ^ v[1] ^ v[2] ^ v[3]
