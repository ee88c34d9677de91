"""The Internet checksum (RFC 1071), of packets that Python makes or reads."""

from __future__ import annotations

import sys

from crablb._native import lib


def checksum(data: bytes) -> bytes:
    """The field that makes the sum right; zero of data that holds a right one."""
    folded: int = lib.crab_csum(data, len(data))
    return (~folded & 0xFFFF).to_bytes(2, sys.byteorder)
