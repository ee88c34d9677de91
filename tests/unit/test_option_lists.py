"""Option lists of every kind through the hot loop, judged by an oracle that was written from the protocol alone.

``python -m tests.unit.test_option_lists COUNT [SEED]`` makes as many of them as you have time for.
"""

from __future__ import annotations

import logging
import random
import struct
import sys
from collections import Counter
from functools import cache

import pytest
from crablb._native import ffi, lib
from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import Ether

from tests.helpers.frames import VIP4, VIP6, reference
from tests.helpers.native import Core, mapped
from tests.reference import options as oracle
from tests.reference import packets

COUNT = 12_000
MODES = ["negotiated", "always", "never"]
#: Bytes that look like options where they are data.
ALIKE = b"\x01\x01\x01\x01\x2a\x02\xfd\x04\x43\x52\x00\x06\x12\x13\x1e\x22"


#: Kind and length of options that there are, and what their data begin with where that matters.
PLAIN = [(2, 4, b""), (3, 3, b""), (4, 2, b""), (5, 10, b""), (8, 10, b"")]
OFFERS = [b"\x2a\x02", b"\x2a\x02\x01\x01", b"\x01\x01\x2a\x02", b"\xfd\x04\x43\x52"]
FORGED = [(42, n, b"") for n in (6, 6, 18, 3, 10)] + [(253, n, oracle.EXID) for n in (8, 8, 20, 5)]
EXPERIMENTS_AND_MPTCP = [
    (253, 6, b""),
    (254, 6, b""),
    (253, 3, b""),
    (30, 4, b"\x01"),
    (30, 12, b"\x01"),
    (30, 12, b"\x10"),
]
UNSAFE = [(34, 2, b""), (34, 10, b""), (254, 12, oracle.FAST_OPEN_EXID), (19, 18, b""), (29, 16, b"")]


def data(rng: random.Random, length: int) -> bytes:
    return bytes(rng.choices(ALIKE, k=length)) if rng.random() < 0.7 else rng.randbytes(length)


def sized(rng: random.Random, kind: int, length: int, begin: bytes = b"") -> bytes:
    return bytes([kind, length]) + begin + data(rng, length - 2 - len(begin))


def option(rng: random.Random) -> bytes:
    """An option, or what is nearly one."""
    what = rng.random()
    if what < 0.2:
        return b"\x01" * rng.randint(1, 4)
    if what < 0.5:
        return b"\x01" * rng.choice([0, 0, 1, 2]) + sized(rng, *rng.choice(PLAIN))
    if what < 0.75:
        return rng.choice(OFFERS)
    if what < 0.83:
        return sized(rng, *rng.choice(FORGED))
    if what < 0.87:
        return sized(rng, *rng.choice(EXPERIMENTS_AND_MPTCP))
    if what < 0.9:
        return sized(rng, *rng.choice(UNSAFE))
    if what < 0.96:
        return sized(rng, rng.randint(5, 255), rng.randint(2, 12))
    return rng.choice([b"\x00", b"\x00", bytes([rng.randint(2, 255), rng.choice([0, 1, 41, 255])])])


def make(rng: random.Random) -> bytes:
    """0 to 40 bytes, whole words: what is too long is cut off, what is too short ends by NOPs, EOLs or rubbish."""
    length = rng.choice([0, 4, 8, 12, 12, 16, 16, 20, 20, 20, 24, 24, 24, 28, 32, 36, 40])
    out = b""
    while len(out) < length and (rng.random() < 0.9 or not out):
        out += option(rng)
    return (out + rng.choice([b"\x01" * 40, bytes(40), data(rng, 40)]))[:length]


def rewritten(options: bytes, experimental: bool, vip: bytes | None) -> bytes | None:
    out = ffi.new("uint8_t[40]")
    n = lib.crab_option_rewrite(options, len(options), experimental, mapped(vip) if vip else ffi.NULL, out)
    return None if n < 0 else bytes(ffi.buffer(out, n))


def read_by_scapy(options: bytes) -> list[object]:
    """What Scapy finds in a list, but for NOPs and CR options."""
    header = bytes(12) + bytes([(20 + len(options)) << 2]) + bytes(7)
    found = TCP(header + options).options
    ours = [o for o in found if o[0] == 42 or (o[0] == 253 and bytes(o[1])[:2] == oracle.EXID)]
    return [o for o in found if o[0] != "NOP" and o not in ours]


def check_list(options: bytes, experimental: bool, vip: bytes) -> None:
    """The rewriter alone: C, Python and Scapy."""
    stripped, out = rewritten(options, experimental, None), rewritten(options, experimental, vip)
    assert stripped is not None
    oracle.check_stripped(options, stripped)
    oracle.check_aligned(options, stripped)
    assert stripped == packets.rewrite(options, experimental, None)
    assert out == packets.rewrite(options, experimental, vip)
    found, rest = oracle.parse(options)
    if out is None:
        assert not oracle.must_fit(options, vip)
    else:
        oracle.check_redirected(options, out, vip, experimental)
        if any(o.is_cr for o in found) or len(vip) == 4:
            oracle.check_aligned(options, out)
    blanked = ffi.new("uint8_t[40]", options)
    lib.crab_option_blank(blanked, len(options))
    oracle.check_signed(options, bytes(ffi.buffer(blanked, len(options))))
    # Scapy goes on behind a length that cannot be, and wants TCP-AO's to be right.
    if rest[:1] in (b"", b"\0") and oracle.AUTHENTICATION not in {o.kind for o in found}:
        before = read_by_scapy(options)
        assert read_by_scapy(stripped) == before
        assert out is None or read_by_scapy(out) == before


@cache
def head(v6: bool, length: int) -> bytes:
    """Headers of a SYN, whose segment is ``length`` bytes long, up to its ports; its checksum is left to the card."""
    ether = b"\2\0\0\0\0\2\2\0\0\0\0\1"
    source = b"\xfd\0\0\x05" + bytes(11) + b"\1" if v6 else b"\x0a\0\0\1"
    vip = VIP6 if v6 else VIP4
    left = ~packets.checksum(packets.pseudo(source, vip, length)) & 0xFFFF
    if v6:
        return ether + struct.pack("!HIHBB", 0x86DD, 6 << 28, length, 6, 64) + source + vip + left.to_bytes(2, "big")
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + length, 0, 0x4000, 64, 6, 0) + source + vip
    return ether + b"\x08\0" + ip[:10] + packets.checksum(ip).to_bytes(2, "big") + ip[12:] + left.to_bytes(2, "big")


def syn(options: bytes, v6: bool, isn: int, payload: bytes) -> bytes:
    """As a neighbour sends it who leaves the checksum to its card: so any list has the right one."""
    front = head(v6, 20 + len(options) + len(payload))
    tcp = struct.pack("!HHIIBBH", 7, 80, isn, 0, (20 + len(options)) << 2, 2, 64240) + front[-2:] + b"\0\0"
    return front[:-2] + tcp + options + payload


def expected(options: bytes, mode: str, experimental: bool, payload: bytes) -> str:
    """The counter of a SYN that has room for all."""
    found = oracle.parse(options)[0]
    if mode == "never":
        return "fallback_mode"
    if payload or any(o.is_unsafe for o in found):
        return "fallback_unsafe"
    if mode == "negotiated" and oracle.offer(experimental) not in found:
        return "fallback_no_offer"
    return "redirected"


class World:
    """A load balancer all of whose backends speak CR, on the segment."""

    def __init__(self, mode: str, experimental: bool) -> None:
        self.mode, self.experimental = mode, experimental
        load_balancer = reference(experimental, mode)
        for backend in load_balancer.backends:
            backend.cr = backend.on_link = True
        self.core = Core(load_balancer)
        self.isn = 0

    def check(self, lists: list[bytes], v6: bool, payload: bytes = b"") -> Counter[str]:
        """Up to 64 SYNs with these options, of as many connections.  Returns what became of them."""
        vip, l4 = (VIP6, 54) if v6 else (VIP4, 34)
        frames = []
        for options in lists:
            self.isn += 1
            frames.append(syn(options, v6, self.isn, payload))
        before = Counter(self.core.counts())
        wanted: Counter[str] = Counter()
        right = ffi.new("uint16_t *")
        for options, out in zip(lists, self.core.handle(*frames), strict=True):
            assert out is not None
            assert lib.crab_csum_state(out[14:], len(out) - 14, right) == lib.CRAB_CSUM_OK
            assert v6 or packets.checksum(out[14:34]) == 0
            told = expected(options, self.mode, self.experimental, payload)
            end = l4 + (out[l4 + 12] >> 4) * 4
            after, found = out[l4 + 20 : end], oracle.parse(options)[0]
            assert out[end:] == payload
            if out[l4 - len(vip) : l4] != vip:
                assert told == "redirected", options.hex()
                assert not oracle.cannot_fit(options, vip, self.experimental)
                oracle.check_redirected(options, after, vip, self.experimental)
            else:
                if told == "redirected":
                    told = "fallback_no_room"
                    assert not oracle.must_fit(options, vip) or any(o.subtype == 0 for o in found), options.hex()
                if any(o.is_signature for o in found):
                    oracle.check_signed(options, after)
                else:
                    oracle.check_stripped(options, after)
                    assert any(o.is_cr for o in found) or after == options
            wanted[told] += 1
        assert {n: c for n, c in (Counter(self.core.counts()) - before).items() if n in wanted} == wanted
        assert sum(wanted.values()) == len(lists)
        return wanted


def run(count: int, seed: int) -> Counter[str]:
    rng = random.Random(seed)
    worlds = [World(mode, experimental) for mode in MODES for experimental in (False, True)]
    seen: Counter[str] = Counter()
    for _ in range(0, count, 64):
        lists = [make(rng) for _ in range(64)]
        for i in range(1, 64):
            if rng.random() < 0.3:  # a neighbour's list, a few bytes changed: what was remembered must not hold
                changed = bytearray(lists[i - 1])
                for _ in range(rng.randint(0, 2) if changed else 0):
                    changed[rng.randrange(len(changed))] = rng.choice(ALIKE)
                lists[i] = bytes(changed)
        for options in lists:
            check_list(options, rng.random() < 0.5, rng.choice([VIP4, VIP6]))
        for world in rng.sample(worlds, 2):
            seen += world.check(lists, rng.random() < 0.5, b"data" if rng.random() < 0.05 else b"")
    return seen


@pytest.fixture(autouse=True)
def quiet_scapy():
    logging.getLogger("scapy.runtime").setLevel(logging.CRITICAL)


def test_lists():
    seen = run(COUNT, 1)
    for outcome in ("redirected", "mode", "no_offer", "no_room", "unsafe"):
        assert seen[outcome if outcome == "redirected" else f"fallback_{outcome}"] > COUNT // 50, seen


#: Lists, and what has lists somewhere in it, of which a byte of one option was once taken for another.
FOUND = {
    "window scale 1": "020405b4 01010303012a0201",
    "window scale 1, experimental form": "0101030301fd0443 52010101",
    "MSS 257": "0101020401012a0201030307",
    "a signature that ends by NOPs": "13120000000000c80000000000000000 01012a02",
    "a frame": "07ffffff5fc000290a8c00a800098100000586dd60000000002c0640fd000000000000000000000000000001fd000000"
    "000000000000000000000066000600510000000100000000b0022000f5f300001312000000c80000000000000000000001012a02",
    "an unknown option": "2a0102505050505050505050020a00006400000001012a020ac6050001",
}


@pytest.mark.parametrize("name", FOUND)
def test_data_is_no_option(name):
    """Every part of them that may be a list."""
    raw = bytes.fromhex(FOUND[name])
    parts = {raw[i : i + n] for i in range(len(raw)) for n in range(0, 41, 4) if i + n <= len(raw)}
    parts |= {part + bytes(4) for part in parts if len(part) < 40}
    for options in parts:
        for vip in (VIP4, VIP6):
            check_list(options, False, vip)
            check_list(options, True, vip)
    ordered = sorted(parts)
    for mode in MODES:
        for experimental in (False, True):
            world = World(mode, experimental)
            for i in range(0, len(ordered), 64):
                world.check(ordered[i : i + 64], False)
                world.check(ordered[i : i + 64], True)


@pytest.mark.parametrize("mode", MODES)
def test_window_scale_1_before_an_unaligned_offer(mode):
    frame = bytes.fromhex(
        "020000000001020000000099080045000034000140004006265f0a0000010a000064"
        "9c40005000000001000000008002faf0c5080000020405b401010303012a0201"
    )
    world = World(mode, False)
    (out,) = world.core.handle(frame)
    got = Ether(out)
    listed = [o for o in got[TCP].options if o[0] != "NOP"]
    again = Ether(out)
    del again[IP].chksum, again[TCP].chksum
    assert bytes(again) == out
    if mode == "never":
        assert (got[IP].dst, listed) == ("10.0.0.100", [("MSS", 1460), ("WScale", 1)])
        return
    assert got[IP].dst != "10.0.0.100"
    assert listed == [("MSS", 1460), ("WScale", 1), (42, VIP4)]


if __name__ == "__main__":
    logging.getLogger("scapy.runtime").setLevel(logging.CRITICAL)
    print(run(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1))
