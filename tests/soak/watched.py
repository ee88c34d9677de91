"""``python -m tests.soak.watched FILE LEAK ...`` is ``crablb ...``, which at SIGRTMIN writes into FILE.PID what it
holds (of what the kernel says that a process has, allocators keep some for later); and loses something with each change
of the configuration, or each start, if LEAK says so (``none``: it does not): what a soak has to find.
"""

from __future__ import annotations

import ctypes
import gc
import json
import mmap
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crablb import cli
from crablb.control import daemon
from crablb.dataplane.engine import Engine
from crablb.kernel import bpf, pins

kept: list[Any] = []


def _map() -> None:
    array = 2  # BPF_MAP_TYPE_ARRAY
    fd = ctypes.CDLL("libbpf.so.1", use_errno=True).bpf_map_create(array, b"lost", 4, 8, 1, None)
    assert fd >= 0, ctypes.get_errno()


def _pin() -> None:
    with bpf.Map.from_pin(pins.folder("lb-eth0") / "flows") as found:
        found.pin(pins.folder("lb-eth0") / f"lost{os.urandom(4).hex()}")


def _socket() -> None:
    kept.append(socket.socket(socket.AF_NETLINK, socket.SOCK_RAW))
    kept[-1].bind((0, 0))  # the kernel lists none that has no address


def _file() -> None:
    (pins.RUN / f"{pins.namespace()}-lost{os.urandom(4).hex()}").touch()


#: What can be lost.
LEAKS: dict[str, Callable[[], object]] = {
    "descriptor": lambda: os.dup(0),
    "socket": _socket,
    "map": _map,
    "pin": _pin,
    "memory": lambda: kept.append(bytearray(os.urandom(200 << 10))),
    "objects": lambda: kept.append([[] for _ in range(1000)]),  # such as the collector of cycles knows
    "thread": lambda: threading.Thread(target=threading.Event().wait, daemon=True).start(),
    "mapping": lambda: kept.append(mmap.mmap(-1, 1 << 12)),
    "file": _file,
}


def _lose(leak: str) -> None:
    """With each change of the configuration; of a name with ``once``, when it starts.  ``all``: one of each."""
    what, _, when = leak.partition(",")
    lost = list(LEAKS.values()) if what == "all" else [LEAKS[what]]
    owner, name = (Engine, "apply") if when != "once" else (daemon, "_seen")
    whole = getattr(owner, name)

    def loses(*args: Any) -> Any:
        for lose in lost:
            lose()
        return whole(*args)

    setattr(owner, name, loses)


class _Mallinfo(ctypes.Structure):
    """mallinfo(3), of glibc since 2.33."""

    _fields_ = [
        ("before", ctypes.c_size_t * 4),
        ("hblkhd", ctypes.c_size_t),  # in mappings of their own
        ("between", ctypes.c_size_t * 2),
        ("uordblks", ctypes.c_size_t),  # in arenas
        ("behind", ctypes.c_size_t * 2),
    ]


def held() -> dict[str, float]:
    """What the collector of cycles knows; what Python has made; what it and libraries have from malloc()."""
    gc.collect()
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = _Mallinfo
    found = mallinfo()
    return {
        "Python objects": len(gc.get_objects()),
        "Python blocks": sys.getallocatedblocks(),
        "malloc KiB": (found.uordblks + found.hblkhd) / 1024,
    }


def _tell(path: Path) -> None:
    new = path.with_suffix(".new")
    new.write_text(json.dumps(held()))
    new.rename(path)


def main(file: str, leak: str, *arguments: str) -> int:
    if leak != "none":
        _lose(leak)
    signal.signal(signal.SIGRTMIN, lambda *_: _tell(Path(f"{file}.{os.getpid()}")))
    sys.argv[1:] = arguments
    return cli.main()  # as a program's: its successors are this again


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
