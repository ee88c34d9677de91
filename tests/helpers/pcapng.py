"""Capture files, read by the format's description alone (draft-ietf-opsawg-pcapng)."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Interface:
    name: str
    description: str
    snap: int
    per_second: int
    statistics: list[dict[int, bytes]] = field(default_factory=list)


@dataclass
class Packet:
    interface: str
    at: int  # ticks since 1970
    data: bytes
    length: int
    comment: str
    outbound: bool
    number: int  # alike for what came in and what went out
    queue: int | None
    verdict: int | None
    dropped: int


@dataclass
class File:
    application: str
    comment: str
    interfaces: list[Interface]
    packets: list[Packet]

    @property
    def ended(self) -> str:
        """What the last statistics say."""
        return self.interfaces[0].statistics[-1].get(1, b"").decode()

    @property
    def missing(self) -> int:
        return sum(struct.unpack("=Q", i.statistics[-1][5])[0] for i in self.interfaces)


def options(raw: bytes) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    while raw:
        code, length = struct.unpack_from("=HH", raw)
        if not code:
            assert raw == bytes(4)
            break
        assert code not in found
        found[code] = raw[4 : 4 + length]
        raw = raw[4 + (length + 3) // 4 * 4 :]
    return found


def read(path: Path | str) -> File:
    """A whole file, each of whose blocks is whole; every field that is fixed is as it has to be."""
    raw = Path(path).read_bytes()
    file = File("", "", [], [])
    first = True
    while raw:
        kind, length = struct.unpack_from("=II", raw)
        assert length % 4 == 0
        assert len(raw) >= length >= 12, "a block is cut"
        assert struct.unpack_from("=I", raw, length - 4)[0] == length
        body, raw = raw[8 : length - 4], raw[length:]
        if first:
            assert kind == 0x0A0D0D0A
            assert struct.unpack_from("=IHHq", body) == (0x1A2B3C4D, 1, 0, -1)
            said = options(body[16:])
            file.application, file.comment = said[4].decode(), said[1].decode()
            first = False
        elif kind == 1:
            link, reserved, snap = struct.unpack_from("=HHI", body)
            assert (link, reserved) == (1, 0)
            said = options(body[8:])
            assert said[9] == b"\x09"
            file.interfaces.append(Interface(said[2].decode(), said[3].decode(), snap, 10 ** said[9][0]))
        elif kind == 6:
            number, high, low, kept, size = struct.unpack_from("=IIIII", body)
            interface = file.interfaces[number]
            assert kept <= size
            assert kept <= interface.snap
            said = options(body[20 + (kept + 3) // 4 * 4 :])
            file.packets.append(
                Packet(
                    interface.name,
                    high << 32 | low,
                    body[20 : 20 + kept],
                    size,
                    said[1].decode(),
                    {1: False, 2: True}[struct.unpack("=I", said[2])[0] & 3],
                    struct.unpack("=Q", said[5])[0],
                    struct.unpack("=I", said[6])[0] if 6 in said else None,
                    struct.unpack("=BQ", said[7])[1] if 7 in said else None,
                    struct.unpack("=Q", said[4])[0] if 4 in said else 0,
                )
            )
        elif kind == 5:
            file.interfaces[struct.unpack_from("=I", body)[0]].statistics.append(options(body[12:]))
        else:
            raise AssertionError(f"a block of type {kind}")
    assert not first
    return file
