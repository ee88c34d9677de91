#!/usr/bin/env python3
"""Send every frame of an interface's first queue back to where it came from: crablb.kernel.xsk in ten lines.

In a lab (``crablb lab up``), the load balancer's node becomes a mirror of whatever the client sends it:

    crablb lab exec lb -- python examples/xsk_reflector.py eth0
"""

import sys

from crablb import CrablbError
from crablb.kernel.xsk import XskSocket


def reflect(interface: str) -> None:
    with XskSocket(interface) as xsk:
        print(f"reflecting {xsk.interface}, {xsk.mode} XDP", flush=True)
        while xsk.wait():
            batch = xsk.receive()
            for frame in batch:  # a NumPy view of the frame where it lies
                destination = frame[0:6].copy()
                frame[0:6] = frame[6:12]
                frame[6:12] = destination
            xsk.send(batch)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("which interface? xsk_reflector.py eth0")
    try:
        reflect(sys.argv[1])
    except KeyboardInterrupt:
        pass
    except CrablbError as error:
        sys.exit(str(error))
