#!/usr/bin/env python3
"""A small proxy of one's own on crablb.kernel.xsk: a bump in the wire that limits the SYNs of each source.

It joins two interfaces, forwards every frame from each to the other, and lets a source make so many IPv4 connections a
second through the first: what is beyond is dropped and named.

    python examples/syn_limiter.py eth0 eth1 --rate 100
"""

import argparse
import select
import sys
import time
from collections import Counter
from ipaddress import IPv4Address

import numpy as np
import numpy.typing as npt

from crablb import CrablbError
from crablb.kernel.xsk import Batch, XskSocket


def is_syn(batch: Batch) -> npt.NDArray[np.bool_]:
    """Which frames are IPv4 TCP segments (without IP options) that open a connection, shape (n,)."""
    heads = batch.columns(0, 54)
    syn: npt.NDArray[np.bool_] = (
        (batch.lengths >= 54)
        & (heads[:, 12:15] == [8, 0, 0x45]).all(axis=1)
        & (heads[:, 23] == 6)
        & (heads[:, 47] & 0x12 == 0x02)
    )
    return syn


class Limiter:
    """At most ``rate`` SYNs a source in each second."""

    def __init__(self, rate: int) -> None:
        self.rate, self.second, self.seen, self.refused = rate, 0, Counter[bytes](), Counter[bytes]()

    def allowed(self, batch: Batch) -> npt.NDArray[np.bool_]:
        keep = np.ones(len(batch), bool)
        for i in np.flatnonzero(is_syn(batch)):
            source = bytes(batch[int(i)][26:30])
            self.seen[source] += 1
            if self.seen[source] > self.rate:
                keep[i] = False
                self.refused[source] += 1
        return keep

    def tick(self) -> None:
        """Begin another second, if it has."""
        if int(time.monotonic()) != self.second:
            for source, count in self.refused.items():
                print(f"{IPv4Address(source)}: {count} SYNs refused", flush=True)
            self.second = int(time.monotonic())
            self.seen.clear()
            self.refused.clear()


def forward(batch: Batch, keep: npt.NDArray[np.bool_], source: XskSocket, target: XskSocket) -> None:
    """Each socket has a memory of its own, so frames are copied; what finds no free frame is lost, as in any queue."""
    kept = batch.select(keep)
    out = target.allocate(len(kept), 0)
    for i in range(len(out)):
        out.lengths[i] = kept.lengths[i]
        out[i][:] = kept[i]
    target.send(out)
    source.release(batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("near")
    parser.add_argument("far")
    parser.add_argument("--rate", type=int, default=100, help="SYNs a second and source")
    args = parser.parse_args()
    limiter = Limiter(args.rate)
    with XskSocket(args.near) as near, XskSocket(args.far) as far:
        print(f"joining {near.interface} and {far.interface}", flush=True)
        while True:
            ready, _, _ = select.select([near, far], [], [], 1.0)
            limiter.tick()
            if not ready:
                for xsk in (near, far):
                    xsk.wait(0)  # raises if its interface is gone
            if near in ready:
                batch = near.receive()
                forward(batch, limiter.allowed(batch), near, far)
            if far in ready:
                batch = far.receive()
                forward(batch, np.ones(len(batch), bool), far, near)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        pass
    except CrablbError as error:
        sys.exit(str(error))
