"""What a network card's driver does in place of the kernel: features, as ``ethtool -k`` and ``-K`` name them.

Source: linux/ethtool.h, by the ioctl SIOCETHTOOL.
"""

from __future__ import annotations

import ctypes
import fcntl
import socket
import struct
from dataclasses import dataclass

__all__ = ["OFF", "ON", "Feature", "driver", "features", "switch"]

SIOCETHTOOL = 0x8946
GDRVINFO, GSTRINGS, GSSET_INFO, GFEATURES, SFEATURES = 0x03, 0x1B, 0x37, 0x3A, 0x3B
ETH_SS_FEATURES = 4
ETH_GSTRING_LEN = 32
WORD = 32  # features in each word of bits


@dataclass(frozen=True, slots=True)
class Feature:
    active: bool
    changeable: bool


#: One that is not there, and one that can be switched off.
OFF = Feature(active=False, changeable=False)
ON = Feature(active=True, changeable=True)


def _ask(interface: str, request: bytes) -> bytes:
    """Raises OSError."""
    data = ctypes.create_string_buffer(request, len(request))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, SIOCETHTOOL, struct.pack("=16sQ", interface.encode(), ctypes.addressof(data)))
    return data.raw


def _names(interface: str) -> list[str]:
    (count,) = struct.unpack("=16xI", _ask(interface, struct.pack("=IIQI", GSSET_INFO, 0, 1 << ETH_SS_FEATURES, 0)))
    head = struct.pack("=III", GSTRINGS, ETH_SS_FEATURES, count)
    listed = _ask(interface, head + bytes(count * ETH_GSTRING_LEN))[len(head) :]
    names = (listed[i : i + ETH_GSTRING_LEN] for i in range(0, len(listed), ETH_GSTRING_LEN))
    return [name.partition(b"\0")[0].decode() for name in names]


def features(interface: str) -> dict[str, Feature]:
    """An interface's features by name; empty where it cannot be asked."""
    try:
        names = _names(interface)
        words = -(-len(names) // WORD)
        answer = _ask(interface, struct.pack("=II", GFEATURES, words) + bytes(16 * words))
    except OSError:
        return {}
    found = {}
    for i, name in enumerate(names):
        available, _, active, never = struct.unpack_from("=4I", answer, 8 + 16 * (i // WORD))
        bit = 1 << i % WORD
        found[name] = Feature(bool(active & bit), bool(available & bit & ~never))
    return found


def driver(interface: str) -> str:
    """The name of an interface's driver; empty where it cannot be asked."""
    try:
        answer = _ask(interface, struct.pack("=I192x", GDRVINFO))  # struct ethtool_drvinfo
    except OSError:
        return ""
    return answer[4:36].partition(b"\0")[0].decode(errors="replace")


def switch(interface: str, feature: str, *, on: bool) -> None:
    """Switch a feature.  Raises OSError; the driver may do nothing all the same: see :func:`features`."""
    names = _names(interface)
    at = names.index(feature)
    bits = [[0, 0] for _ in range(-(-len(names) // WORD))]
    bits[at // WORD] = [1 << at % WORD, on << at % WORD]
    _ask(interface, struct.pack("=II", SFEATURES, len(bits)) + b"".join(struct.pack("=II", *word) for word in bits))
