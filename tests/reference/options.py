"""TCP option lists as the protocol has them: lists of options, never of words.

An oracle by properties: what a load balancer may make of a client's list, wherever it puts the redirect.  It does not
know how the hot loop lays lists out, or :mod:`tests.reference.packets`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

EOL, NOP, WINDOW_SCALE, SACK_PERMITTED, TIMESTAMPS = 0, 1, 3, 4, 8
MD5, AUTHENTICATION, MULTIPATH, FAST_OPEN, CRAB, EXPERIMENT_1, EXPERIMENT_2 = 19, 29, 30, 34, 42, 253, 254
EXID, FAST_OPEN_EXID = b"\x43\x52", b"\xf9\x89"
ROOM = 40  # bytes of options that a TCP header has


class Option(NamedTuple):
    kind: int
    data: bytes | None = None  # without kind and length; None: it is one byte long

    @property
    def raw(self) -> bytes:
        return bytes([self.kind]) if self.data is None else bytes([self.kind, 2 + len(self.data)]) + self.data

    @property
    def is_offer(self) -> bool:
        return self in (offer(False), offer(True))

    @property
    def is_cr(self) -> bool:
        return self.kind == CRAB or (self.kind == EXPERIMENT_1 and self.data is not None and self.data[:2] == EXID)

    @property
    def is_forged(self) -> bool:
        """Only a load balancer sends it, or nobody."""
        return self.is_cr and not self.is_offer

    @property
    def subtype(self) -> int | None:
        """Of MPTCP (RFC 8684)."""
        return self.data[0] >> 4 if self.kind == MULTIPATH and self.data else None

    @property
    def key(self) -> bytes | None:
        """The server's, in the MP_CAPABLE of the third packet: behind the client's (figure 4)."""
        whole = self.subtype == 0 and len(self.data or b"") in (18, 20, 22) and self.data[0] & 15 == 1
        return self.data[10:18] if whole else None

    @property
    def token(self) -> bytes | None:
        """Of the connection that a SYN joins (figure 5)."""
        return self.data[2:6] if self.subtype == 1 and len(self.data or b"") == 10 else None

    @property
    def is_signature(self) -> bool:
        return self.kind in (MD5, AUTHENTICATION)

    @property
    def is_unsafe(self) -> bool:
        """A SYN with it is never redirected."""
        fast_open = self.kind == FAST_OPEN or (self.kind == EXPERIMENT_2 and (self.data or b"")[:2] == FAST_OPEN_EXID)
        return fast_open or self.is_signature or self.subtype == 1


def offer(experimental: bool) -> Option:
    return Option(EXPERIMENT_1, EXID) if experimental else Option(CRAB, b"")


def redirect(vip: bytes, experimental: bool) -> Option:
    return Option(EXPERIMENT_1, EXID + vip) if experimental else Option(CRAB, vip)


@lru_cache(1024)
def parse(options: bytes) -> tuple[list[Option], bytes]:
    """A list's options, and what is behind the last: nothing, or from EOL or a length that cannot be on."""
    found = []
    while options and options[0] != EOL:
        if options[0] == NOP:
            found.append(Option(NOP))
            options = options[1:]
        elif len(options) >= 2 and 2 <= options[1] <= len(options):
            found.append(Option(options[0], options[2 : options[1]]))
            options = options[options[1] :]
        else:
            break
    return found, options


def kept(options: bytes) -> tuple[list[Option], bytes]:
    """What nobody may change."""
    found, rest = parse(options)
    return [o for o in found if o.kind != NOP and not o.is_cr], rest


def answer(options: list[Option]) -> int:
    """Bytes of options in the SYN-ACK of a Linux server: MSS, and what the SYN says that the client knows."""
    kinds = {o.kind for o in options}
    length = 4 + (12 if TIMESTAMPS in kinds else 4 if SACK_PERMITTED in kinds else 0)
    return length + 4 * (WINDOW_SCALE in kinds) + 12 * any(o.subtype == 0 for o in options)


def check_stripped(before: bytes, after: bytes) -> None:
    """By fallback: no CR option goes on, all else does."""
    assert len(after) <= len(before)
    assert len(after) % 4 == 0
    assert kept(after) == kept(before)
    assert not any(o.is_cr for o in parse(after)[0])


def check_redirected(before: bytes, after: bytes, vip: bytes, experimental: bool) -> None:
    """One CR option goes on, which says where the client wanted to."""
    assert len(after) <= ROOM
    assert len(after) % 4 == 0
    assert kept(after) == kept(before)
    assert [o for o in parse(after)[0] if o.is_cr] == [redirect(vip, experimental)]


def check_signed(before: bytes, after: bytes) -> None:
    """By fallback, with a signature: nothing changes but that forged options become NOPs."""
    found, rest = parse(before)
    assert after == b"".join(bytes([NOP]) * len(o.raw) if o.is_forged else o.raw for o in found) + rest


def check_aligned(before: bytes, after: bytes) -> None:
    """What goes on is as far from a word's beginning as it was."""

    def offsets(options: bytes) -> list[int]:
        at, out = 0, []
        for option in parse(options)[0]:
            if option.kind != NOP and not option.is_cr:
                out.append(at % 4)
            at += len(option.raw)
        return out

    assert offsets(after) == offsets(before)


def must_fit(options: bytes, vip: bytes) -> bool:
    """Whether the redirect has room for sure: in front of the list, with NOPs behind it, and not an option left out."""
    return len(options) + (8 if len(vip) == 4 else 20) <= ROOM


def cannot_fit(options: bytes, vip: bytes, experimental: bool) -> bool:
    """Whether the redirect has no room for sure, or its echo has none: with no NOP at all."""
    others, rest = kept(options)
    needed = len(redirect(vip, experimental).raw) + sum(len(o.raw) for o in others) + len(rest)
    padded = answer(others) + (8 if len(vip) == 4 else 20)
    return needed > ROOM or (any(o.subtype == 0 for o in others) and padded > ROOM)
