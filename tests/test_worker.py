"""The worker: a queue's frames through the hot loop and out again; every frame accounted for."""

from __future__ import annotations

import random
import socket
from collections import Counter

import pytest
from crablb._native import ffi, lib
from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import Ether

from crablb.kernel.xsk import XskSocket
from tests.native import ELSEWHERE, Core
from tests.reference import packets
from tests.test_differential import reference


class Worker:
    def __init__(self, xsk: XskSocket, reference: packets.LoadBalancer) -> None:
        core = Core(reference, ifindex=socket.if_nametoindex(xsk.interface))
        self.xsk, self.core = xsk, core
        self.c = ffi.gc(lib.crab_worker_new(xsk.handle, core.core, core.counters), lib.crab_worker_free)

    def once(self, timeout_ms: int = 0) -> int:
        n = int(lib.crab_worker_once(self.c, timeout_ms))
        assert n >= 0
        assert lib.crab_xsk_conserved(self.xsk.handle)
        assert self.xsk.frames()["held"] == 0
        return n


def syn(port: int, client: str = "10.0.0.1") -> bytes:
    options = [("MSS", 1460), (42, b""), ("NOP", None), ("NOP", None)]
    tcp = TCP(sport=port, dport=80, flags="S", seq=port, options=options)
    return bytes(Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02") / IP(src=client, dst="10.0.0.100") / tcp)


@pytest.mark.parametrize("mode", ["native", "generic"])
def test_every_frame_goes_somewhere(namespace, mode):
    """Sound SYNs, rubbish and cut frames, in bursts of every size: sent as the reference says, or counted."""
    lb, choose = reference(), random.Random(5)
    sent, expected, got = 0, [], []
    with namespace.wire() as wire, XskSocket("veth0", frames=256, ring=128, mode=mode) as xsk:
        worker = Worker(xsk, lb)
        for _ in range(60):
            burst = choose.randrange(1, 100)
            for _ in range(burst):
                frame = syn(1000 + sent)
                kind = choose.randrange(5)
                if kind == 0:
                    frame = frame[: choose.randrange(14, len(frame))]
                elif kind == 1:
                    frame = frame[:-1] + b"\xff"
                elif kind == 2:
                    frame = frame[:12] + choose.randbytes(60)
                wire.send(frame)
                sent += 1
                out = lb.handle(frame)[1]
                if out:
                    expected.append(out)
            while worker.once(0):
                pass
            while len(got) < worker.core.counts().get("sent", 0):
                got.append(wire.recv(2048))
        counts = worker.core.counts()
        statistics = xsk.statistics()
        lost = statistics["rx_dropped"] + statistics["rx_fill_ring_empty_descs"] + statistics["rx_ring_full"]
        assert counts["received"] + lost == sent
        dropped = sum(n for name, n in counts.items() if name.startswith("drop_"))
        assert counts["sent"] + dropped == counts["received"]
        assert counts["sent"] > 1000
        if not lost and "drop_tx" not in counts:
            assert got == expected
        else:
            assert set(got) <= set(expected)


def test_waits_for_frames(namespace):
    with namespace.wire() as wire, XskSocket("veth0") as xsk:
        worker = Worker(xsk, reference())
        assert worker.once(1) == 0
        wire.send(syn(1))
        assert worker.once(10_000) == 1
        assert worker.core.counts() == {"received": 1, "sent": 1, "redirected": 1}


def test_backends_behind_another_interface(namespace):
    """Half of the backends are; what that interface refuses does not hold back the others."""
    other = socket.if_nametoindex("veth0") + ELSEWHERE
    namespace.ip("link", "add", "veth2", "index", str(other), "type", "veth", "peer", "name", "veth3")
    namespace.ip("link", "set", "veth2", "up")
    namespace.ip("link", "set", "veth3", "up")
    lb = reference(elsewhere=True)
    expected: dict[bool, list[bytes]] = {False: [], True: []}
    reasons: Counter[str] = Counter()
    with namespace.wire() as here, namespace.wire("veth3") as there, XskSocket("veth0") as xsk:
        worker = Worker(xsk, lb)

        def burst(first: int) -> int:
            for port in range(first, first + 60):
                here.send(syn(port))
                reason, out = lb.handle(syn(port))
                assert out
                reasons[reason] += 1
                expected[lb.elsewhere].append(out)
            done = 0
            while done < 60:
                done += worker.once(10_000)
            return len(expected[True])

        away = burst(1)
        assert 10 < away < 50
        assert [here.recv(2048) for _ in expected[False]] == expected[False]
        assert [there.recv(2048) for _ in expected[True]] == expected[True]
        assert worker.core.counts() == {"received": 60, "sent": 60} | reasons
        namespace.ip("link", "set", "veth2", "down")
        expected[False].clear()
        refused = burst(101) - away
        assert [here.recv(2048) for _ in expected[False]] == expected[False]
        counts = worker.core.counts()
        assert counts == {"received": 120, "sent": 120 - refused, "drop_tx": refused} | reasons


def test_stops(namespace):
    with XskSocket("veth0") as xsk:
        worker = Worker(xsk, reference())
        lib.crab_worker_stop(worker.c)
        assert lib.crab_worker_run(worker.c) == 0


def test_a_link_that_is_down_keeps_its_frames(namespace):
    with namespace.wire() as wire, XskSocket("veth0") as xsk:
        worker = Worker(xsk, reference())
        wire.send(syn(1))
        assert xsk.wait(10)
        namespace.ip("link", "set", "veth0", "down")
        assert worker.once() == 1
        assert xsk.frames()["sending"] == 1
        namespace.ip("link", "set", "veth0", "up")
        with namespace.wire() as again:
            while xsk.frames()["sending"]:
                worker.once(1)
            assert again.recv(2048)[30:34] != bytes([10, 0, 0, 100])


def test_the_interface_goes(namespace):
    with XskSocket("veth0") as xsk:
        worker = Worker(xsk, reference())
        namespace.ip("link", "del", "veth0")
        assert lib.crab_worker_run(worker.c) == -100  # ENETDOWN
