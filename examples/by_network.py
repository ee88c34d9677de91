"""A policy of one's own: clients of one network go to few backends, whose caches then hold what that network asks for.

Each client network (/24, or /56 for IPv6) has two backends by its hash, and a new connection goes to the one of them
that has fewer connections for its weight.  In a lab (``crablb lab up``; servers and client as in the README):

    crablb lab exec lb -- env PYTHONPATH=examples crablb serve --iface eth0 --policy by_network:choose \
        --service tcp://10.0.0.100:80=10.0.0.11,10.0.0.12,10.0.0.13
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from crablb import Backends

MAPPED = np.array([0] * 10 + [255, 255])  # how the address of an IPv4 client begins


def choose(batch: npt.NDArray[Any], backends: Backends) -> npt.NDArray[Any]:
    """Indices of backends, one for each connection of the batch."""
    clients = batch["client"].copy()
    v4 = (clients[:, :12] == MAPPED).all(axis=1)
    clients[v4, 15:] = 0
    clients[~v4, 7:] = 0
    words = clients.view("<u8")
    hashes = (words[:, 0] ^ words[:, 1]) * np.uint64(0x9E3779B97F4A7C15)
    hashes ^= hashes >> np.uint64(29)
    hashes *= np.uint64(0xBF58476D1CE4E5B9)
    one = (hashes >> np.uint64(48)) % len(backends)
    other = (hashes >> np.uint64(32) & np.uint64(0xFFFF)) % len(backends)
    busy = backends.connections / backends.weights
    chosen: npt.NDArray[Any] = np.where(busy[one] <= busy[other], one, other)
    return chosen
