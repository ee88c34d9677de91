"""The fuzzer's frames through the XDP program, each as of a flow that it knows: what it sends, user space sends too."""

from __future__ import annotations

import pytest
from crablb._native import lib

from tests.bpf.test_valid import VIP, both  # noqa: F401  (a fixture)
from tests.fuzz import corpus
from tests.helpers.frames import SEED

pytestmark = pytest.mark.xdist_group("fuzz")


def flow_of(frame: bytes) -> dict[int, int]:
    """The hash of the connection that a frame without tags says to be of, or, if it is an ICMP error, what it quotes.

    Empty, if that is none to the VIP, port 80."""
    family = {b"\x08\0": 4, b"\x86\xdd": 6}.get(frame[12:14])
    if family is None:
        return {}
    start, source, size = (14, 12, 4) if family == 4 else (14, 8, 16)
    header = source + 2 * size
    ip = frame[start:]
    is_error = ip[9 if family == 4 else 6 : (9 if family == 4 else 6) + 1] in (b"\x01", b"\x3a")
    if is_error:
        ip = ip[header + 8 :]
    first, second, ports = ip[source : source + size], ip[source + size : header], ip[header : header + 4]
    if is_error:
        first, second, ports = second, first, ports[2:] + ports[:2]
    if len(ports) < 4 or second != VIP[family].packed or ports[2:] != b"\0\x50":
        return {}
    data = first + second + ports
    return {family: lib.crab_siphash13(SEED, data, len(data))}


def test_the_program_sends_what_user_space_sends(both):  # noqa: F811
    corpus.build()
    forwarded = 0
    frames = {
        bytes.fromhex(frame) for script in corpus.scripts(corpus.kept("packet")) for frame, *_ in script["frames"]
    }
    for frame in sorted(frames):
        known = flow_of(frame)
        if len(frame) < 14 or not known:
            continue
        by_program, by_user_space = both.forward(frame, known)
        if by_program is None:
            continue
        forwarded += 1
        assert by_user_space is not None, frame.hex()
        # Ethernet's padding may stay; a checksum of 0 may be written in either way.
        assert by_program[: len(by_user_space)].replace(b"\xff\xff", bytes(2)) == by_user_space.replace(
            b"\xff\xff", bytes(2)
        ), frame.hex()
    assert forwarded > 100
