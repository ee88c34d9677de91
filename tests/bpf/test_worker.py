"""The worker: a queue's frames through the hot loop and out again; every frame accounted for."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from crablb._native import ffi, lib
from scapy.layers.inet import IP, TCP

from crablb.kernel.xsk import XskSocket
from tests.helpers.frames import ether, reference, syn
from tests.helpers.native import ELSEWHERE, Core
from tests.helpers.processes import until
from tests.helpers.programs import several_buffers
from tests.reference import packets


class Worker:
    def __init__(self, xsk: XskSocket, reference: packets.LoadBalancer, core: Core | None = None) -> None:
        core = core or Core(reference, ifindex=socket.if_nametoindex(xsk.interface))
        self.xsk, self.core = xsk, core
        self.c = ffi.gc(lib.crab_worker_new(xsk.handle, core.core, core.counters), lib.crab_worker_free)

    def once(self, timeout_ms: int = 0) -> int:
        n = int(lib.crab_worker_once(self.c, timeout_ms))
        assert n >= 0
        assert lib.crab_xsk_conserved(self.xsk.handle)
        assert self.xsk.frames()["held"] == 0
        return n


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


def test_what_the_kernel_drops_adds_up(namespace):
    """Its counts begin at zero with each socket; the worker's go on."""
    for name in ("veth0", "veth1"):
        namespace.ip("link", "set", name, "mtu", "3000")
    lb, core = reference(), None
    with namespace.wire() as wire:
        for dropped in (3, 5):  # with the first socket, and with another one
            with XskSocket("veth0", frame_size=2048) as xsk:
                worker = Worker(xsk, lb, core)
                core = worker.core
                for _ in range(dropped - core.counts().get("xsk_rx_dropped", 0)):
                    wire.send(bytes(ether()) + bytes(2500))
                until(lambda w=worker, n=dropped: w.once() == 0 and w.core.counts().get("xsk_rx_dropped") == n)


def test_waits_for_frames(namespace):
    with namespace.wire() as wire, XskSocket("veth0") as xsk:
        worker = Worker(xsk, reference())
        assert worker.once(1) == 0
        wire.send(syn(1))
        assert worker.once(10_000) == 1
        assert worker.core.counts() == {"received": 1, "sent": 1, "redirected": 1}


def test_rounds_are_counted(namespace):
    """All by their frames; one in so many by its time too, in which empty rounds have no turn."""
    sizes = [1, 2, 3, 4, 5, 8, 9, 64] + [2] * (3 * lib.CRAB_ROUND_SAMPLE)
    with namespace.wire() as wire, XskSocket("veth0") as xsk:
        worker = Worker(xsk, reference())
        rounds = ffi.new("struct crab_rounds *")
        lib.crab_worker_rounds(worker.c, rounds)
        began, timed, port = time.monotonic_ns(), 0, 1
        for number, size in enumerate(sizes):
            for _ in range(size):
                wire.send(syn(port := port % 60000 + 1))
            assert worker.once() == size
            assert worker.once() == 0
            timed += size if number % lib.CRAB_ROUND_SAMPLE == 0 else 0
            assert sum(rounds.times) == timed
        elapsed = time.monotonic_ns() - began
    expected = [0] * lib.CRAB_ROUND_SIZES
    for size in sizes:
        expected[(size - 1).bit_length()] += 1
    assert list(rounds.sizes) == expected
    assert rounds.frames == sum(sizes)
    assert 0 < rounds.timed_ns < elapsed * max(sizes)
    # No frame's time is less than the bound before its place.
    least = sum(n * lib.CRAB_ROUND_NS << place - 1 for place, n in enumerate(rounds.times) if place)
    most = sum(n * lib.CRAB_ROUND_NS << place for place, n in enumerate(rounds.times))
    assert least < rounds.timed_ns
    assert rounds.timed_ns <= most or rounds.times[lib.CRAB_ROUND_TIMES - 1]


@several_buffers
@pytest.mark.parametrize("mode", ["native", "generic"])
def test_packets_in_several_frames(namespace, mode):
    """They go the ways of the others, in their turn, whatever else is in the batch; one that is wrong is counted."""
    for name in ("veth0", "veth1"):
        namespace.ip("link", "set", name, "mtu", "9000")
    lb, choose = reference(), random.Random(6)
    expected, reasons = [], Counter[str]()
    with namespace.wire() as wire, XskSocket("veth0", mode=mode, multi_buffer=True) as xsk:
        worker = Worker(xsk, lb)
        for _ in range(20):
            for _ in range(choose.randrange(1, 40)):
                data = choose.randbytes(choose.choice([0, 100, 1700, 1792, 3000, 8900]))
                tcp = TCP(sport=choose.randrange(1, 65536), dport=80, flags="A") / data
                frame = bytes(ether() / IP(src="10.0.0.1", dst="10.0.0.100") / tcp)
                if choose.randrange(4) == 0:
                    frame = frame[:-1] + bytes([frame[-1] ^ 1])
                wire.send(frame)
                reason, out = lb.handle(frame)
                reasons[reason] += 1
                expected += [out] if out else []
            while worker.once(0):
                pass
        assert {"fallback_established", "drop_checksum", "drop_no_path"} == set(reasons)
        assert worker.core.counts() == {"received": reasons.total(), "sent": len(expected), **reasons}
        assert [wire.recv(10000) for _ in expected] == expected


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


def test_a_queue_that_only_receives(namespace):
    """Its frames leave by a socket of another kind, and none waits in its own for what never comes."""
    lb = reference()
    with namespace.wire() as wire, XskSocket("veth0") as xsk:
        worker = Worker(xsk, lb)
        lib.crab_worker_send_elsewhere(worker.c)
        reasons: Counter[str] = Counter()
        for first in range(1, 601, 60):
            expected = []
            for port in range(first, first + 60):
                wire.send(syn(port))
                reason, out = lb.handle(syn(port))
                reasons[reason] += 1
                expected.append(out)
            while sum(reasons.values()) > worker.core.counts().get("received", 0):
                worker.once(10_000)
            assert [wire.recv(2048) for _ in expected] == expected
            frames = xsk.frames()
            assert frames["sending"] == 0
            assert frames["free"] + frames["receiving"] == frames["all"]
        assert worker.core.counts() == {"received": 600, "sent": 600} | reasons


def test_stops(namespace):
    with XskSocket("veth0") as xsk:
        worker = Worker(xsk, reference())
        lib.crab_worker_stop(worker.c)
        assert lib.crab_worker_run(worker.c) == 0


def test_a_link_that_is_down_keeps_its_frames(namespace):
    with namespace.wire() as wire, XskSocket("veth0") as xsk:
        worker = Worker(xsk, reference())
        wire.send(syn(1))
        assert xsk.wait(60)
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


def test_the_interface_goes_while_others_wake_it_all_the_time(namespace):
    """Whoever asks whether it lives does not keep it from seeing that."""
    ended: list[int] = []
    with XskSocket("veth0") as xsk:
        worker = Worker(xsk, reference())
        thread = threading.Thread(target=lambda: ended.append(lib.crab_worker_run(worker.c)))
        thread.start()
        until(lambda: lib.crab_worker_turns(worker.c))
        namespace.ip("link", "del", "veth0")
        while thread.is_alive():
            lib.crab_worker_wake(worker.c)
            thread.join(0.01)
    assert ended == [-100]  # ENETDOWN


def test_it_turns_when_it_is_woken(namespace):
    """At once, and each time but once: the sleep in front of the wake-up, and the one behind it."""
    with XskSocket("veth0") as xsk, Running(xsk, 0) as running:
        c = running.worker.c
        for _ in range(50):
            until(lambda: running.id and running.state() == "S")
            before = lib.crab_worker_turns(c)
            lib.crab_worker_wake(c)
            until(lambda before=before: lib.crab_worker_turns(c) > before)
        assert lib.crab_worker_turns(c) <= before + 10  # it has gone to sleep again, and does not turn for ever


class Running:
    """A worker in a thread, as the daemon has it."""

    def __init__(self, xsk: XskSocket, spin: int) -> None:
        self.worker = Worker(xsk, reference())
        lib.crab_worker_spin(self.worker.c, spin)
        self.id = 0
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self.id = threading.get_native_id()
        self.result = lib.crab_worker_run(self.worker.c)

    def received(self) -> int:
        return self.worker.core.counts().get("received", 0)

    def state(self) -> str:
        """R: it runs; S: it sleeps."""
        return Path(f"/proc/self/task/{self.id}/stat").read_text().rsplit(")", 1)[1].split()[0]

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        lib.crab_worker_stop(self.worker.c)
        self._thread.join()
        assert self.result == 0


@pytest.mark.parametrize("spin", [0, 50])
def test_no_frame_is_overlooked_when_it_falls_asleep(namespace, spin):
    """Bursts just before, while, and just after the worker goes to sleep: all of them in, and at once.

    One that was overlooked would wait for the next, or for the second after which the worker looks anyway.
    """
    choose, sent = random.Random(7), 0
    with namespace.wire() as wire, XskSocket("veth0") as xsk, Running(xsk, spin) as running:
        for _ in range(400):
            for _ in range(choose.randrange(1, 4)):
                wire.send(syn(1000 + sent))
                sent += 1
            until(lambda: running.received() == sent, 0.8)  # noqa: B023 - called at once
            pause = time.perf_counter() + choose.uniform(0, 3 * 50e-6)
            while time.perf_counter() < pause:
                pass
        until(lambda: running.worker.core.counts().get("sent", 0) == sent)
        assert "drop_tx" not in running.worker.core.counts()
        assert not any(xsk.statistics()[name] for name in ("rx_dropped", "rx_ring_full", "rx_fill_ring_empty_descs"))


def test_it_turns_when_frames_come_close_together_and_sleeps_when_not(namespace):
    with namespace.wire() as wire, XskSocket("veth0") as xsk, Running(xsk, 1_000_000) as running:
        until(lambda: running.id and running.state() == "S")
        wire.send(syn(1))  # sooner than it would have turned
        until(lambda: running.received() == 1)
        assert all(running.state() == "R" for _ in range(100))
        until(lambda: running.state() == "S")  # in vain
    with namespace.wire() as wire, XskSocket("veth0") as xsk, Running(xsk, 60_000_000) as running:
        until(lambda: running.id and running.state() == "S")
        wire.send(syn(1))
        until(lambda: running.received() == 1)
        assert running.state() == "R"
        # Leaving the context stops it while it turns.


def test_more_than_a_round(namespace):
    """A round takes four of the core's batches."""
    with namespace.wire() as wire, XskSocket("veth0") as xsk:
        worker = Worker(xsk, reference())
        for port in range(1, 601):
            wire.send(syn(port))
        rounds = []
        while sum(rounds) < 600:
            rounds.append(worker.once(10_000))
        assert rounds == [256, 256, 88]
        counts = worker.core.counts()
        assert counts["received"] == counts["sent"] == 600
