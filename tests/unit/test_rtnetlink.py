"""crablb.kernel.rtnetlink: messages taken apart."""

from __future__ import annotations

import socket
import struct

from hypothesis import given
from hypothesis import strategies as st

from crablb.kernel import rtnetlink
from crablb.kernel.rtnetlink import NEIGHBOUR, attributes, parse

NEWNEIGH = bytes.fromhex(
    "30000000 1c00 0000 00000000 00000000"  # nlmsghdr: 48 bytes
    "02 000000 03000000 0200 00 01"  # ndmsg
    "0800 0100 0a00000b"  # NDA_DST
    "0a00 0200 020000000100 0000"  # NDA_LLADDR, padded
)


def test_known_message():
    (message,) = parse(NEWNEIGH)
    assert message.kind == rtnetlink.RTM_NEWNEIGH
    assert message.fields(NEIGHBOUR) == (socket.AF_INET, 3, 2, 0, 1)
    found = message.attributes(NEIGHBOUR)
    assert rtnetlink.address(found[rtnetlink.NDA_DST]) == "10.0.0.11"
    assert found[rtnetlink.NDA_LLADDR] == bytes.fromhex("020000000100")
    assert [m.kind for m in parse(NEWNEIGH * 2)] == [28, 28]


def test_nested_attributes_lose_their_flag():
    inner = struct.pack("=HH", 9, 1) + b"veth\0" + bytes(3)
    outer = struct.pack("=HH", 4 + len(inner), 18 | 0x8000) + inner
    assert rtnetlink.text(attributes(attributes(outer)[18])[1]) == "veth"


@given(st.binary(max_size=200))
def test_rubbish_ends(data):
    for message in parse(data):
        attributes(message.body)
