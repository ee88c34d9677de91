"""What a policy in Python costs: decisions a second on one core, in batches of 64 connections, by number of backends.

    pypolicy.py [RUNS]

All that happens in Python for a batch: the call, the policy (which reads the connections' hashes and the backends'
loads), the check of its answer, and the count of what was assigned.  Medians of RUNS runs (default 5), with minimum and
maximum.
"""

from __future__ import annotations

import statistics
import sys
import time
from ipaddress import IPv4Address

import numpy as np
import numpy.typing as npt
from crablb._native import lib

from crablb.model import Vip
from crablb.policy import CHOICE, Backends, Balance, Custom

BATCH, BATCHES = 64, 5000
VIP = Vip(IPv4Address("10.0.0.100"), 80)


def by_hash(batch: npt.NDArray[np.void], backends: Backends) -> npt.NDArray[np.uint64]:
    return batch["hash"] % len(backends)


def by_connections(batch: npt.NDArray[np.void], backends: Backends) -> npt.NDArray[np.uint64]:
    """Of two backends by the connection's hash, the one with fewer connections."""
    connections, hashes = backends.connections, batch["hash"]
    one, other = hashes % len(backends), (hashes >> np.uint64(32)) % len(backends)
    return np.where(connections[one] <= connections[other], one, other)


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    random = np.random.default_rng(1)
    batches = np.zeros((100, BATCH), CHOICE)
    batches["hash"] = random.integers(0, 2**64, batches.shape, np.uint64)
    print(f"{'policy in Python, 10^6 decisions/s':34} {'':>22}")
    for policy in (by_hash, by_connections):
        for count in (10, 1000):
            addresses = [IPv4Address(0x0A000000 + i) for i in range(count)]
            custom = Custom(lambda _, reason: sys.exit(f"the policy failed: {reason}"))
            backends = Balance().backends(VIP, dict.fromkeys(addresses, 1))
            custom.publish({0: (VIP, policy, backends, np.arange(count, dtype=np.uint16))})
            rates = []
            for _ in range(runs):
                start = time.perf_counter()
                for i in range(BATCHES):
                    custom.choose(batches[i % 100])
                rates.append(BATCH * BATCHES / (time.perf_counter() - start) / 1e6)
            assert (batches["backend"] != lib.CRAB_NO_BACKEND).all()
            name = f"{policy.__name__}, {count:,} backends"
            print(f"{name:34} {statistics.median(rates):8.2f} ({min(rates):5.2f} - {max(rates):5.2f})", flush=True)


if __name__ == "__main__":
    main()
