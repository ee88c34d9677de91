"""BPF programs as their tests run them."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from crablb._native import lib

from crablb.config import parse_vip
from crablb.dataplane import flows
from crablb.kernel import bpf
from crablb.kernel.xsk import XskSocket

LO = 1  # ifindex that test runs come in by


@contextmanager
def forwarding(seed: bytes) -> Iterator[bpf.Object]:
    """The load balancer's program where it may forward flows, of port 80 of the lab's VIPs, by itself.

    Its thread is in a namespace with veth0.  A service's number is its family; ``seed``: of the flows' hashes.
    """
    with (
        bpf.Object(
            bpf.object_path("lb"),
            max_entries={"flows": 64, "service_counters": 8, "limits": 8},
            frags=bool(lib.crab_xsk_knows_frags()),
        ) as loaded,
        XskSocket("veth0", load_program=False) as xsk,
    ):
        xsk.register(loaded.map("sockets"))
        loaded.map("interfaces").update(LO, struct.pack("=II", 0, 1))
        loaded.map("hashing").update(0, flows.hashing(seed, 64))
        for family, vip in ((4, "tcp://10.0.0.100:80"), (6, "tcp://[fd00::100]:80")):
            loaded.map("services").update(parse_vip(vip).key(), family)
        yield loaded


#: For tests of packets in several buffers.
several_buffers = pytest.mark.skipif(
    not lib.crab_xsk_knows_frags(), reason="this kernel has no AF_XDP sockets with several buffers (Linux 6.6)"
)
