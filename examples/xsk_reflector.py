#!/usr/bin/env python3
"""Send every frame of an interface's first queue back to where it came from: crablb.kernel.xsk in ten lines.

In a lab (``crablb lab up``), the load balancer's node becomes a mirror of whatever the client sends it:

    crablb lab exec lb -- python examples/xsk_reflector.py eth0
"""

import sys

from crablb.kernel.xsk import XskSocket

with XskSocket(sys.argv[1]) as xsk:
    print(f"reflecting {xsk.interface}, {xsk.mode} XDP", flush=True)
    while xsk.wait():
        batch = xsk.receive()
        for frame in batch:  # a NumPy view of the frame where it lies
            destination = frame[0:6].copy()
            frame[0:6] = frame[6:12]
            frame[6:12] = destination
        xsk.send(batch)
