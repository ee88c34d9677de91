"""crablb.kernel.xsk: frames in, frames out, none lost."""

from __future__ import annotations

import errno
import socket
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crablb.errors import KernelError
from crablb.kernel import bpf
from crablb.kernel.xsk import HEADROOM, XskError, XskSocket
from tests.helpers.programs import several_buffers

ETHER = bytes.fromhex("0200000000020200000000011234")


def frame(i: int, length: int = 60) -> bytes:
    return ETHER + i.to_bytes(4, "big") + bytes(length - len(ETHER) - 4)


def conserved(xsk: XskSocket, frames: int) -> None:
    places = xsk.frames()
    assert places.pop("all") == frames
    assert sum(places.values()) == frames
    assert places["held"] == 0


def receive(xsk: XskSocket, n: int) -> list[bytes]:
    """The next ``n`` frames, copied and released."""
    got: list[bytes] = []
    while len(got) < n:
        assert xsk.wait(60)
        batch = xsk.receive(n - len(got))
        got += [bytes(f) for f in batch]
        xsk.release(batch)
    return got


@pytest.mark.parametrize("mode", ["native", "generic"])
@pytest.mark.parametrize("frame_size", [2048, 4096])
def test_echo(namespace, mode, frame_size):
    with namespace.wire() as wire, XskSocket("veth0", mode=mode, frame_size=frame_size) as xsk:
        assert xsk.mode == mode
        assert not xsk.zero_copy  # veth has none
        assert not xsk.wait(0)
        lengths = [60, 61, 1000, 1514]
        for i, length in enumerate(lengths):
            wire.send(frame(i, length))
        seen = []
        while len(seen) < len(lengths):
            assert xsk.wait(60)
            batch = xsk.receive()
            assert all(f.base is not None for f in batch)  # views, not copies
            assert (batch.columns(12, 14) == [0x12, 0x34]).all()
            seen += batch.lengths.tolist()
            for f in batch:
                f[0:12] = np.roll(f[0:12], 6)
            assert xsk.send(batch) == len(batch)
        assert seen == lengths
        for i, length in enumerate(lengths):
            assert wire.recv(2048) == ETHER[6:12] + ETHER[:6] + frame(i, length)[12:]
        conserved(xsk, 4096)
        statistics = xsk.statistics()
        del statistics["tx_ring_empty_descs"]  # only says that there was nothing to send
        assert not any(statistics.values()), statistics


@several_buffers
@pytest.mark.parametrize("mode", ["native", "generic"])
@pytest.mark.parametrize("frame_size", [2048, 4096])
def test_packets_in_several_frames(namespace, mode, frame_size):
    """A packet that is longer than a frame comes whole, is sent whole, and costs no frame."""
    lengths = [60, frame_size - HEADROOM, frame_size - HEADROOM + 1, 5000, 9014]
    for name in ("veth0", "veth1"):
        namespace.ip("link", "set", name, "mtu", "9000")
    with (
        namespace.wire() as wire,
        XskSocket("veth0", mode=mode, frame_size=frame_size, multi_buffer=True) as xsk,
    ):
        assert (xsk.mode, xsk.multi_buffer) == (mode, True)
        with pytest.raises(ValueError, match="64 frames or more"):
            xsk.receive(63)
        sent = [frame(i, length)[:-4] + b"last" for i, length in enumerate(lengths)]
        for one in sent:
            wire.send(one)
        seen: list[bytes] = [b""]
        while len(seen) <= len(lengths):
            assert xsk.wait(60)
            batch = xsk.receive()
            for part, more in zip(batch, batch.more, strict=True):
                assert len(part) <= frame_size - HEADROOM
                seen[-1] += bytes(part)
                seen += [] if more else [b""]
            assert not batch.more[-1]
            assert xsk.send(batch) == len(batch)
        assert seen[:-1] == sent
        assert [wire.recv(10000) for _ in lengths] == sent
        conserved(xsk, 4096)


@pytest.mark.parametrize("multi_buffer", [False, pytest.param(True, marks=several_buffers)])
def test_packets_that_do_not_fit(namespace, multi_buffer):
    """Without several frames a longer packet is dropped by the kernel, which counts it; a ring cuts none."""
    for name in ("veth0", "veth1"):
        namespace.ip("link", "set", name, "mtu", "3000")
    with namespace.wire() as wire, XskSocket("veth0", ring=64, multi_buffer=multi_buffer) as xsk:
        for i in range(40):
            wire.send(frame(i, 3014))
        wire.send(frame(40))
        assert xsk.wait(60)
        assert xsk.statistics()["rx_dropped"] == (0 if multi_buffer else 40)
        assert xsk.statistics()["rx_ring_full"] == (9 if multi_buffer else 0)
        batch = xsk.receive()
        assert batch.lengths.tolist() == [1792, 1222] * 32 if multi_buffer else [60]
        xsk.release(batch)
        conserved(xsk, 4096)


def test_send_what_was_not_received(namespace):
    with namespace.wire() as wire, XskSocket("veth0", copy=True) as xsk:
        batch = xsk.allocate(3, 60)
        for i, view in enumerate(batch):
            view[:] = np.frombuffer(frame(i), np.uint8)
        batch.lengths[1] = 70
        assert xsk.send(batch) == 3
        assert [len(wire.recv(2048)) for _ in range(3)] == [60, 70, 60]
        conserved(xsk, 4096)


def test_select(namespace):
    with namespace.wire() as wire, XskSocket("veth0") as xsk:
        for i in range(8):
            wire.send(frame(i))
        kept: list[int] = []
        seen = 0
        while seen < 8:
            assert xsk.wait(60)
            batch = xsk.receive()
            seen += len(batch)
            odd = batch.columns(17, 18)[:, 0] % 2 == 1
            kept += [int(f[17]) for f in batch.select(odd)]
            xsk.release(batch.select(~odd))
            xsk.send(batch.select(odd))
        assert kept == [1, 3, 5, 7]
        assert [wire.recv(2048)[17] for _ in kept] == kept
        conserved(xsk, 4096)


def test_more_than_there_is_room_for(namespace):
    """What does not fit is told and given back; nothing is lost."""
    with namespace.wire(), XskSocket("veth0", frames=256, ring=64) as xsk:
        batch = xsk.allocate(1000, 60)
        assert len(batch) == 128  # the kernel holds the other half for receiving
        assert xsk.send(batch) == 64
        conserved(xsk, 256)
        assert len(xsk.allocate(10, 60)) == 10


def test_a_flood_is_counted(namespace):
    with namespace.wire() as wire, XskSocket("veth0", frames=64, ring=64) as xsk:
        for i in range(100):
            wire.send(frame(i))
        got = receive(xsk, 32)
        assert [int.from_bytes(f[14:18], "big") for f in got] == list(range(32))
        statistics = xsk.statistics()
        assert statistics["rx_fill_ring_empty_descs"] + statistics["rx_dropped"] >= 68
        conserved(xsk, 64)
        wire.send(frame(7))
        assert receive(xsk, 1) == [frame(7)]


@settings(max_examples=60)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["arrive", "receive", "allocate", "send", "release"]), st.integers(1, 80)),
        max_size=40,
    )
)
def test_frames_are_conserved(namespace, steps):
    """Whatever is done with batches, every frame is in one place, and what is sent arrives unchanged."""
    with namespace.wire() as wire, XskSocket("veth0", frames=128, ring=64) as xsk:
        held, number = [], 0
        sent: Counter[bytes] = Counter()
        for step, n in steps:
            if step == "arrive":
                for _ in range(n):
                    wire.send(frame(number))
                    number += 1
            elif step == "receive":
                held.append(xsk.receive(n))
            elif step == "allocate":
                batch = xsk.allocate(n, 60)
                for view in batch:
                    view[:] = np.frombuffer(frame(number), np.uint8)
                    number += 1
                held.append(batch)
            elif held:
                batch = held.pop()
                if step == "release":
                    xsk.release(batch)
                else:
                    contents = [bytes(f) for f in batch]
                    sent.update(contents[: xsk.send(batch)])
            places = xsk.frames()
            assert places["all"] == 128 == sum(v for k, v in places.items() if k != "all")
            assert places["held"] == sum(len(b) for b in held)
        for batch in held:
            xsk.release(batch)
        sent_back: Counter[bytes] = Counter()
        for _ in range(sent.total() - xsk.statistics()["tx_dropped"]):
            sent_back[wire.recv(2048)] += 1
        assert sent_back <= sent
        conserved(xsk, 128)


def test_two_queues(namespace):
    """Each queue has its socket, and one program serves both."""
    line = "link add wide numrxqueues 2 numtxqueues 2 type veth peer name other numrxqueues 2 numtxqueues 2"
    namespace.ip(*line.split())
    for name in ("wide", "other"):
        namespace.ip("link", "set", name, "up")
    with (
        XskSocket("wide", 0, load_program=False) as first,
        XskSocket("wide", 1, load_program=False) as second,
        bpf.Object(bpf.object_path("xsk")) as program,
        program.program("crab_xsk").attach_xdp(socket.if_nametoindex("wide")),
    ):
        for xsk in (first, second):
            xsk.register(program.map("sockets"))
        # A frame sent on queue n of one end comes in on queue n of the other.
        for queue, xsk in enumerate((first, second)):
            with XskSocket("other", queue, load_program=False) as sender:
                batch = sender.allocate(1, 60)
                batch[0][:] = np.frombuffer(frame(queue), np.uint8)
                sender.send(batch)
                assert receive(xsk, 1) == [frame(queue)]


REFUSED = {
    "no-interface": (("nothing",), {}, KernelError, r"interface nothing does not exist; there are: .*veth0"),
    "no-queue": (("veth0", 7), {}, XskError, r"veth0 has no queue 7 \(see ethtool -l veth0\)"),
    "zero-copy": (("veth0",), {"copy": False}, XskError, "cannot bind in the mode asked for"),
    "frames": (("veth0",), {"frames": 100}, ValueError, "frames is a power of two, 64 or more, not 100"),
    "ring": (("veth0",), {"ring": 0}, ValueError, "ring is a power of two, 64 or more, not 0"),
    "frame-size": (("veth0",), {"frame_size": 1500}, ValueError, "2048 or 4096 bytes, not 1500"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(namespace, name):
    args, more, kind, words = REFUSED[name]
    with pytest.raises(kind, match=words):
        XskSocket(*args, **more)
    assert bpf.xdp_program(2)[0] == 0


def test_down(namespace):
    namespace.ip("link", "set", "veth0", "down")
    with pytest.raises(KernelError, match="interface veth0 is down; bring it up: ip link set veth0 up"):
        XskSocket("veth0")


def test_busy(namespace):
    with XskSocket("veth0") as first:
        with pytest.raises(XskError, match="queue 0 of veth0 has an AF_XDP socket of another program") as caught:
            XskSocket("veth0", load_program=False)
        assert caught.value.errno == errno.EBUSY
        assert first.mode == "native"
    # Closed, it leaves the queue and the interface free.
    with (
        bpf.Object(bpf.object_path("lb")) as other,
        other.program("crab_lb").attach_xdp(socket.if_nametoindex("veth0")),
        pytest.raises(bpf.BpfBusyError, match=r"veth0 has an XDP program already \(id \d+\)"),
    ):
        XskSocket("veth0")
    with XskSocket("veth0") as again:
        assert again.mode == "native"


def test_the_interface_goes(namespace):
    with XskSocket("veth0") as xsk:
        namespace.ip("link", "del", "veth0")
        with pytest.raises(XskError, match="interface veth0 is gone"):
            xsk.wait()


def test_headroom(namespace):
    """A frame may grow at its front, where the kernel left room."""
    with namespace.wire() as wire, XskSocket("veth0") as xsk:
        wire.send(frame(1))
        assert xsk.wait(60)
        batch = xsk.receive()
        assert int(batch.descs["addr"][0]) % 2048 >= HEADROOM
        batch.descs["addr"] -= 8
        batch.descs["len"] += 8
        batch[0][:] = np.frombuffer(ETHER + b"eight..." + frame(1)[14:], np.uint8)
        xsk.send(batch)
        assert wire.recv(2048) == ETHER + b"eight..." + frame(1)[14:]
