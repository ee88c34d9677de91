"""The redirect in the kernel alone (``tools/redirect.bpf.c``), which crablb is measured against.

As a program it serves one backend on eth0 of the network namespace that it is in, until it is ended:

    python -m bench.redirect OBJECT VIP BACKEND DST_MAC SRC_MAC
"""

from __future__ import annotations

import socket
import struct
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from crablb._native import ffi, lib

from crablb.kernel import bpf
from crablb.model import Address, Hashing, Vip, mapped
from crablb.selection.tables import table_of

TABLE_SIZE = 65537


@dataclass(frozen=True)
class Hop:
    """A backend, and how frames get to it."""

    address: Address
    dst_mac: bytes
    src_mac: bytes
    ifindex: int = 0  # to send on by XDP_REDIRECT; 0: by XDP_TX


class Redirect:
    """The program, with its services.  A context manager; what it attached is detached in the end.

    ``path``: the compiled object.  ``services``: backends of each VIP, all with one weight.
    """

    def __init__(self, path: Path, services: Mapping[Vip, Sequence[Hop]], seed: bytes) -> None:
        self.object = bpf.Object(path, max_entries={"table": TABLE_SIZE * len(services)})
        self._links: list[bpf.Link] = []
        maps = self.object.maps
        maps["settings"].update(0, seed + struct.pack("=II", TABLE_SIZE, 0))
        ids: dict[Hop, int] = {}
        for number, (vip, hops) in enumerate(services.items()):
            for hop in hops:
                backend = ids.setdefault(hop, len(ids))
                maps["backends"].update(
                    backend, mapped(hop.address) + hop.dst_mac + hop.src_mac + struct.pack("=I", hop.ifindex)
                )
            table = table_of({ids[hop]: (hop.address, 1, 1) for hop in hops}, TABLE_SIZE, seed, Hashing.MAGLEV)
            first = number * TABLE_SIZE
            for slot, backend in enumerate(table.tolist()):
                maps["table"].update(first + slot, backend)
            option = ffi.new("uint8_t[20]")
            size = lib.crab_option_redirect(option, lib.CRAB_FORM_CRAB, mapped(vip.address))
            value = struct.pack("=II", first, lib.crab_csum(option, size)) + bytes(option)
            maps["services"].update(vip.key(), value)

    def test_frame(self, frame: bytes, *, v6: bool) -> None:
        """What ``renewed`` and ``harness`` start from: 78 bytes, or 98 of IPv6."""
        value = struct.pack("=IHH", len(frame), 0, v6) + frame.ljust(104, b"\0")
        self.object.map("frames").update(0, value)

    def attach(self, ifindex: int, mode: Literal["auto", "native", "generic"] = "native") -> None:
        self._links.append(self.object.program("redirect").attach_xdp(ifindex, mode))

    def counts(self) -> dict[str, int]:
        """Packets redirected, and sent on by MAC address."""
        counters = self.object.map("counters")
        return {"redirected": counters.sum_u64(0), "fallback": counters.sum_u64(1)}

    def close(self) -> None:
        for link in self._links:
            link.detach()
            link.close()
        self._links.clear()
        self.object.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()


def main(path: str, vip: str, backend: str, *macs: str) -> None:
    index = socket.if_nametoindex("eth0")
    hop = Hop(ip_address(backend), bytes.fromhex(macs[0]), bytes.fromhex(macs[1]), index)
    with Redirect(Path(path), {Vip(ip_address(vip), port): [hop] for port in (7, 80)}, bytes(16)) as redirect:
        redirect.attach(index)
        print("ready", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
