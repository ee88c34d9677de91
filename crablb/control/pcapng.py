"""Capture files: blocks of the pcapng format (draft-ietf-opsawg-pcapng), in this machine's byte order.

Nanosecond stamps, Ethernet; interfaces are numbered in the order of their blocks.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

__all__ = [
    "COMMENT",
    "DROPPED",
    "FLAGS",
    "PACKET",
    "STATISTICS",
    "Blocks",
    "interface",
    "options",
    "packet",
    "section",
    "statistics",
]

SECTION, INTERFACE, STATISTICS, PACKET = 0x0A0D0D0A, 1, 5, 6
ETHERNET = 1  # LINKTYPE_ETHERNET
#: Codes of options.
COMMENT = 1
FLAGS = 2  # of a packet
DROPPED = 5  # of statistics
INBOUND, OUTBOUND = 1, 2
#: Longer than any block that is written here: what says that it is so long is no block.
LONGEST = 1 << 20


def _option(code: int, value: bytes) -> bytes:
    return struct.pack("=HH", code, len(value)) + value + bytes(-len(value) % 4)


def _text(code: int, text: str) -> bytes:
    return _option(code, text.encode()[:0xFFFF]) if text else b""


def _block(kind: int, body: bytes, options: bytes) -> bytes:
    if options:
        options += bytes(4)  # opt_endofopt
    length = 12 + len(body) + len(options)
    return struct.pack("=II", kind, length) + body + options + struct.pack("=I", length)


def section(application: str, comment: str) -> bytes:
    """The section header block, which every file begins with."""
    body = struct.pack("=IHHq", 0x1A2B3C4D, 1, 0, -1)
    return _block(SECTION, body, _text(COMMENT, comment) + _text(4, application))


def interface(name: str, description: str, snap: int) -> bytes:
    """An interface description block; ``snap``: bytes of a packet that are kept at most."""
    body = struct.pack("=HHI", ETHERNET, 0, snap)
    return _block(INTERFACE, body, _text(2, name) + _text(3, description) + _option(9, b"\x09"))


def packet(
    number: int,
    at: int,
    data: bytes,
    length: int,
    *,
    comment: str,
    outbound: bool,
    id: int,
    queue: int | None = None,
    verdict: int | None = None,
    dropped: int = 0,
) -> bytes:
    """An enhanced packet block.

    ``number``: the interface's; ``at``: nanoseconds since 1970; ``length``: bytes of the packet, of which ``data`` are
    the first; ``id``: alike for a packet as it came in and as it went out; ``verdict``: an XDP action; ``dropped``:
    packets that are missing in front of it.
    """
    body = struct.pack("=IIIII", number, at >> 32, at & 0xFFFFFFFF, len(data), length) + data + bytes(-len(data) % 4)
    options = _text(COMMENT, comment) + _option(FLAGS, struct.pack("=I", OUTBOUND if outbound else INBOUND))
    if dropped:
        options += _option(4, struct.pack("=Q", dropped))
    options += _option(5, struct.pack("=Q", id))
    if queue is not None:
        options += _option(6, struct.pack("=I", queue))
    if verdict is not None:
        options += _option(7, struct.pack("=BQ", 2, verdict))
    return _block(PACKET, body, options)


def statistics(number: int, began: int, ended: int, received: int, dropped: int, comment: str) -> bytes:
    """An interface statistics block: packets of an interface that were captured, and that were not for want of room."""
    words = {2: (began >> 32, began & 0xFFFFFFFF), 3: (ended >> 32, ended & 0xFFFFFFFF)}
    options = b"".join(_option(code, struct.pack("=II", *pair)) for code, pair in words.items())
    options += _option(4, struct.pack("=Q", received)) + _option(DROPPED, struct.pack("=Q", dropped))
    body = struct.pack("=III", number, ended >> 32, ended & 0xFFFFFFFF)
    return _block(STATISTICS, body, _text(COMMENT, comment) + options)


class Blocks:
    """Takes a stream apart into whole blocks; what has only begun is held back."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """The blocks that are whole now: type and bytes.  Raises :class:`ValueError` for what is none."""
        self._rest += data
        while len(self._rest) >= 8:
            kind, length = struct.unpack_from("=II", self._rest)
            if not 12 <= length <= LONGEST or length % 4:
                raise ValueError(f"no pcapng block has {length} bytes")
            if len(self._rest) < length:
                return
            block, self._rest = self._rest[:length], self._rest[length:]
            yield kind, block


def options(block: bytes) -> dict[int, bytes]:
    """The options of a block made by :func:`packet` or :func:`statistics`, by code."""
    kind, length = struct.unpack_from("=II", block)
    at = 20
    if kind == PACKET:
        at = 28 + (int(struct.unpack_from("=I", block, 20)[0]) + 3) // 4 * 4
    found = {}
    while at + 8 <= length:
        code, size = struct.unpack_from("=HH", block, at)
        if not code:
            break
        found[code] = block[at + 4 : at + 4 + size]
        at += 4 + (size + 3) // 4 * 4
    return found
