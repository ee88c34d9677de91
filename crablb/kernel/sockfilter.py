"""Socket filters: what is not for us is left in the kernel, and cannot fill a socket (socket(7), SO_ATTACH_FILTER).

Programs are of classic BPF (https://docs.kernel.org/networking/filter.html): (code, jt, jf, k) a step, at most 4,096.
"""

from __future__ import annotations

import ctypes
import socket
import struct
from collections.abc import Collection

__all__ = ["MOST", "Step", "among", "attach"]

Step = tuple[int, int, int, int]
#: BPF_MAXINSNS
MOST = 4096
SO_ATTACH_FILTER = 26
TAKE, LEAVE = (0x06, 0, 0, 0x40000), (0x06, 0, 0, 0)  # ret #


def attach(sock: socket.socket, program: Collection[Step]) -> None:
    """In place of the filter before.  Raises OSError if the kernel refuses it."""
    steps = b"".join(struct.pack("=HBBI", *step) for step in program)
    held = (ctypes.c_char * len(steps)).from_buffer_copy(steps)
    sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("=HxxxxxxQ", len(program), ctypes.addressof(held)))


def among(words: Collection[int]) -> list[Step]:
    """Take it if the accumulator is one of these; otherwise go on."""
    return [step for word in sorted(set(words)) for step in ((0x15, 0, 1, word), TAKE)]
