"""Several sockets of crablb.kernel.xsk with one UMEM: what one receives another sends, and no frame is lost."""

from __future__ import annotations

import errno
import gc
import os
import socket
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crablb.errors import KernelError
from crablb.kernel import bpf
from crablb.kernel.xsk import FrameError, XskError, XskSocket
from tests.bpf.test_xsk import frame
from tests.bpf.test_xsk_misuse import child, refused
from tests.helpers.namespaces import Pair
from tests.helpers.programs import several_buffers
from tests.unit.test_documents import run


@pytest.fixture
def two(namespace) -> Iterator[Pair]:
    """Two cables: veth0 to veth1, veth2 to veth3."""
    another_cable(namespace)
    yield namespace


def another_cable(namespace: Pair) -> None:
    namespace.ip("link", "add", "veth2", "type", "veth", "peer", "name", "veth3")
    for name in ("veth2", "veth3"):
        namespace.ip("link", "set", name, "up")


def places(xsk: XskSocket) -> dict[str, int]:
    found = xsk.frames()
    assert found["all"] == sum(v for k, v in found.items() if k != "all")
    return found


def forward(one: XskSocket, other: XskSocket, n: int) -> list[int]:
    """What comes in by one goes out by the other, n frames; their addresses."""
    addresses: list[int] = []
    while len(addresses) < n:
        assert one.wait(60)
        batch = one.receive()
        assert all(np.shares_memory(view, other.umem) for view in batch)
        addresses += batch.descs["addr"].tolist()
        assert other.send(batch) == len(batch)
    return addresses


@pytest.mark.parametrize("mode", ["native", "generic"])
def test_received_by_one_sent_by_the_other(two, mode):
    """More often than there are frames, both ways; all are where they were in the end."""
    with (
        two.wire() as left,
        two.wire("veth3") as right,
        XskSocket("veth0", frames=64, ring=64, mode=mode) as a,
        XskSocket("veth2", ring=64, mode=mode, share=a) as b,
    ):
        assert (b.mode, b.frame_size, b.umem.ctypes.data) == (mode, a.frame_size, a.umem.ctypes.data)
        seen = set()
        for i in range(100):
            for start, end, one, other in ((left, right, a, b), (right, left, b, a)):
                start.send(frame(i, 60 + i))
                seen.update(forward(one, other, 1))
                assert end.recv(2048) == frame(i, 60 + i)
        assert len(seen) > 32
        assert places(a) == places(b) == {"all": 64, "free": 32, "receiving": 32, "held": 0, "sending": 0}
        for xsk in (a, b):
            assert xsk.statistics()["tx_invalid_descs"] == 0


def test_written_for_one_sent_by_the_other(two):
    """Free frames are everybody's, too."""
    with two.wire("veth3") as right, XskSocket("veth0") as a, XskSocket("veth2", share=a) as b:
        batch = a.allocate(2, 60)
        for i, view in enumerate(batch):
            view[:] = np.frombuffer(frame(i), np.uint8)
        a.release(batch[1:])
        assert b.send(batch[:1]) == 1
        assert right.recv(100) == frame(0)
        with pytest.raises(FrameError, match="was sent or released already"):
            a.send(batch)
        assert places(a)["held"] == 0


@several_buffers
def test_packets_in_several_frames(two):
    """The UMEM's sockets all do as the first."""
    for name in ("veth0", "veth1", "veth2", "veth3"):
        two.ip("link", "set", name, "mtu", "9000")
    with (
        two.wire() as left,
        two.wire("veth3") as right,
        XskSocket("veth0", multi_buffer=True) as a,
        XskSocket("veth2", share=a) as b,
    ):
        assert b.multi_buffer
        for start, end, one, other in ((left, right, a, b), (right, left, b, a)):
            start.send(frame(1, 9014))
            assert len(forward(one, other, 1)) == 6
            assert end.recv(10000) == frame(1, 9014)
        assert places(a)["held"] == 0


def test_two_queues_and_two_interfaces(namespace):
    for name, other in (("wide", "far"),):
        line = f"link add {name} numrxqueues 2 numtxqueues 2 type veth peer name {other} numrxqueues 2 numtxqueues 2"
        namespace.ip(*line.split())
        for end in (name, other):
            namespace.ip("link", "set", end, "up")
    with (
        namespace.wire() as wire,
        XskSocket("veth0", load_program=False) as a,
        XskSocket("wide", 0, load_program=False, share=a) as b,
        XskSocket("wide", 1, load_program=False, share=b) as c,
        bpf.Object(bpf.object_path("xsk")) as program,
        program.program("crab_xsk").attach_xdp(socket.if_nametoindex("wide")),
        XskSocket("far", 0, load_program=False) as far,
        XskSocket("far", 1, load_program=False, share=far) as farther,
    ):
        for xsk in (b, c):
            xsk.register(program.map("sockets"))
        for i, (sender, receiver) in enumerate(((far, b), (farther, c))):
            batch = sender.allocate(1, 60)
            batch[0][:] = np.frombuffer(frame(i), np.uint8)
            sender.send(batch)
            forward(receiver, a, 1)
            assert wire.recv(100) == frame(i)
        assert places(c)["held"] == 0


STEPS = ["arrive", "receive", "allocate", "send", "release", "close", "open"]


@settings(max_examples=40)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(STEPS), st.integers(0, 1), st.integers(0, 1), st.integers(1, 60)), max_size=40
    )
)
def test_frames_are_conserved(steps):
    """Whatever is done by whichever socket, every frame is in one place, and what is sent arrives unchanged, once."""
    with Pair.made() as namespace, ExitStack() as stack:
        another_cable(namespace)
        wires = [stack.enter_context(namespace.wire(name)) for name in ("veth1", "veth3")]
        names = ["veth0", "veth2"]
        sockets = [XskSocket("veth0", frames=128, ring=64)]
        sockets.append(XskSocket("veth2", ring=64, share=sockets[0]))
        held, number = [], 0
        sent: list[Counter[bytes]] = [Counter(), Counter()]
        dropped = 0
        try:
            for step, i, j, n in steps:
                xsk, open_ones = sockets[i], [s for s in sockets if s.fileno() >= 0]
                if step == "arrive":
                    for _ in range(n):
                        wires[j].send(frame(number))
                        number += 1
                elif step == "open":
                    if xsk.fileno() < 0:
                        sockets[i] = XskSocket(names[i], ring=64, share=open_ones[0])
                elif step == "close":
                    if xsk in open_ones and len(open_ones) > 1:
                        dropped += xsk.statistics()["tx_dropped"]
                        xsk.close()
                elif xsk.fileno() < 0:
                    continue
                elif step == "receive":
                    held.append(xsk.receive(n))
                elif step == "allocate":
                    batch = xsk.allocate(n, 60)
                    for view in batch:
                        view[:] = np.frombuffer(frame(number), np.uint8)
                        number += 1
                    held.append(batch)
                elif held:
                    batch = held.pop(j * (len(held) - 1))
                    if step == "release":
                        xsk.release(batch)
                    else:
                        contents = [bytes(f) for f in batch]
                        sent[i].update(contents[: xsk.send(batch)])
                for s in sockets:
                    if s.fileno() >= 0:
                        found = places(s)
                        assert found["all"] == 128
                        assert found["held"] == sum(len(b) for b in held)
                addresses = [int(a) // 2048 for b in held for a in b.descs["addr"]]
                assert len(set(addresses)) == len(addresses)
            last = next(s for s in sockets if s.fileno() >= 0)
            for batch in held:
                last.release(batch)
            dropped += sum(s.statistics()["tx_dropped"] for s in sockets if s.fileno() >= 0)
            assert places(last)["held"] == 0
            if not dropped:
                for wire, expected in zip(wires, sent, strict=True):
                    assert Counter(wire.recv(2048) for _ in range(expected.total())) == expected
            for i, xsk in enumerate(sockets):  # all can be had again
                if xsk.fileno() < 0:
                    sockets[i] = XskSocket(names[i], ring=64, share=last)
            total = places(last)
            assert total["free"] + total["receiving"] == 128
            for s in sockets:
                assert s.statistics()["tx_invalid_descs"] == 0
        finally:
            for s in sockets:
                s.close()


def test_threads_take_turns(two):
    """A thread for each socket, each sending by the other's what it received."""
    failed: list[BaseException] = []
    with XskSocket("veth0", frames=256, ring=64) as a, XskSocket("veth2", ring=64, share=a) as b:

        def work(own: XskSocket, other: XskSocket) -> None:
            try:
                for i in range(500):
                    batch = own.allocate(4, 60)
                    for view in batch:
                        view[:] = i % 256
                    assert all((view == i % 256).all() for view in batch)
                    own.send(batch[:1])
                    other.send(batch[1:2])
                    other.release(batch[2:])
                    other.send(own.receive(8))
                    own.release(other.receive(8))
                    assert own.frames()["all"] == 256
            except BaseException as error:
                failed.append(error)

        with (
            XskSocket("veth1", frames=64, ring=64) as far,  # whatever comes goes back
            XskSocket("veth3", ring=64, share=far) as farther,
        ):
            threads = [threading.Thread(target=work, args=pair) for pair in ((a, b), (b, a))]
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                for xsk in (far, farther):
                    xsk.send(xsk.receive())
            for thread in threads:
                thread.join()
        assert not failed
        assert places(a)["held"] == 0
        assert a.statistics()["tx_invalid_descs"] == b.statistics()["tx_invalid_descs"] == 0


def test_every_socket_gets_something_to_receive_into(namespace):
    """Also where the first took its half before the others came, and nothing moves; something is left to send."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(XskSocket("veth0", frames=256))]
        for i in range(3):
            namespace.ip("link", "add", f"x{i}", "type", "veth", "peer", "name", f"y{i}")
            for name in (f"x{i}", f"y{i}"):
                namespace.ip("link", "set", name, "up")
            sockets.append(stack.enter_context(XskSocket(f"x{i}", share=sockets[-1])))
        for i in range(3):
            with namespace.wire(f"y{i}") as wire, namespace.wire() as end:
                wire.send(frame(i))
                forward(sockets[i + 1], sockets[0], 1)
                assert end.recv(100) == frame(i)
        assert len(sockets[3].allocate(5, 60)) == 5


def test_frames_that_were_all_held(two):
    """They are received into when they are given back, by whichever socket, and whether or not somebody receives."""
    with (
        two.wire() as left,
        two.wire("veth3") as right,
        XskSocket("veth0", frames=64, ring=64) as a,
        XskSocket("veth2", ring=64, share=a) as b,
    ):
        held = []
        while places(a)["receiving"]:
            for wire, xsk in ((left, a), (right, b)):
                wire.send(frame(0))
                held += [xsk.receive(), xsk.allocate(8, 60)]
        for batch in held:
            a.release(batch)
        right.send(frame(1))
        assert b.wait(60)
        b.release(b.receive())
        left.send(frame(2))
        assert a.wait(60)
    with two.wire() as left, XskSocket("veth0", frames=64, ring=64) as alone:
        held = []
        while places(alone)["receiving"]:
            left.send(frame(0))
            held += [alone.receive(), alone.allocate(8, 60)]
        for batch in held:
            alone.release(batch)
        left.send(frame(1))
        assert alone.wait(60)


# ---- the end of one, and of all ----


@pytest.mark.parametrize("first", [0, 1])
def test_one_closes(two, first):
    """The other goes on, and gives away what the closed one had received; the last takes the frames along."""
    wires = [two.wire(), two.wire("veth3")]
    a = XskSocket("veth0", frames=64, ring=64)
    both = [a, XskSocket("veth2", ring=64, share=a)]
    gone, stays = both[first], both[1 - first]
    try:
        wires[first].send(frame(1))
        assert gone.wait(60)
        batch = gone.receive()
        wires[first].send(frame(2))
        assert gone.wait(60)  # and is not taken
        gone.close()
        with pytest.raises(XskError, match="is closed"):
            gone.send(batch)
        with pytest.raises(XskError, match="is closed"):
            XskSocket("veth1", share=gone)
        assert places(stays)["held"] == 1
        assert batch[0].tobytes() == frame(1)
        stays.send(batch)
        assert wires[1 - first].recv(100) == frame(1)
        for i in range(100):
            wires[1 - first].send(frame(i))
            forward(stays, stays, 1)
            assert wires[1 - first].recv(100) == frame(i)
        batch = stays.allocate(1, 60)
        view = batch[0]
        stays.close()
        with pytest.raises(FrameError):
            batch[0]
        view[:] = 1
        assert view.sum() == 60
        for name in ("veth0", "veth2"):
            assert bpf.xdp_program(socket.if_nametoindex(name))[0] == 0
            XskSocket(name).close()
    finally:
        for closing in (*both, *wires):
            closing.close()


def test_a_queue_that_is_bound_again_brings_its_frames(two):
    """Each time: a program may close and open a port as often as it likes."""
    with two.wire("veth3") as right, XskSocket("veth0", frames=64, ring=64) as a:
        for i in range(30):
            with XskSocket("veth2", ring=64, share=a) as b:
                for _ in range(3):
                    right.send(frame(i))
                assert b.wait(60)
                b.send(b.receive(1))
                assert right.recv(100) == frame(i)
            assert places(a)["held"] == 0
        with XskSocket("veth2", ring=64, share=a) as b:
            assert places(b) == {"all": 64, "free": places(a)["free"], "receiving": places(a)["receiving"]} | {
                "held": 0,
                "sending": 0,
            }
            assert places(b)["free"] + places(b)["receiving"] == 64
            assert b._pool._left == []


@pytest.mark.parametrize("closed_first", [False, True])
def test_an_interface_that_goes_brings_its_frames(two, closed_first):
    """At once, or when the next socket comes."""
    with XskSocket("veth0", frames=64, ring=64) as a:
        for _ in range(10):
            b = XskSocket("veth2", ring=64, share=a)
            if closed_first:
                b.close()
            two.ip("link", "del", "veth2")
            if not closed_first:
                with pytest.raises(XskError, match="interface veth2 is gone"):
                    b.wait()
                b.close()
                assert a._pool._left == []
            another_cable(two)
        with XskSocket("veth2", ring=64, share=a):
            assert a._pool._left == []
            assert places(a)["free"] + places(a)["receiving"] == 64


def test_what_the_kernel_may_still_write_to_is_nobodys(two):
    """Somebody else keeps a closed socket: what it receives then lies in no frame that can be had."""
    with (
        two.wire("veth3") as right,
        bpf.Object(bpf.object_path("xsk")) as program,
        program.program("crab_xsk").attach_xdp(socket.if_nametoindex("veth2")),
        XskSocket("veth0", frames=64, ring=64) as a,
    ):
        b = XskSocket("veth2", ring=64, share=a, load_program=False)
        b.register(program.map("sockets"))
        kept = os.dup(b.fd)
        try:
            b.close()
            assert places(a)["receiving"] > 32
            batch = a.allocate(64, 60)
            assert len(batch) > 0
            for view in batch:
                view[:] = 7
            before = a.umem.copy()
            for i in range(40):
                right.send(frame(i))
            changed = np.flatnonzero((a.umem != before).reshape(64, 2048).any(axis=1))
            assert len(changed)  # they did come in
            assert not set(changed) & set((batch.descs["addr"] // 2048).tolist())
            with pytest.raises(XskError, match="queue 0 of veth2 has an AF_XDP socket of another program, or of this"):
                XskSocket("veth2", share=a, load_program=False)
            a.release(batch)
        finally:
            os.close(kept)
        with XskSocket("veth2", ring=64, share=a, load_program=False):
            assert a._pool._left == []
            assert places(a)["free"] + places(a)["receiving"] == 64


def test_forgotten(two):
    with two.wire() as left, XskSocket("veth0", frames=64, ring=64) as a:
        b = XskSocket("veth2", ring=64, share=a)
        batch = b.allocate(1, 60)
        with pytest.warns(ResourceWarning, match="unclosed <XskSocket veth2/0>"):
            del b
            gc.collect()
        batch[0][:] = np.frombuffer(frame(3), np.uint8)
        a.send(batch)
        assert left.recv(100) == frame(3)
        assert places(a)["held"] == 0


def test_fork(two):
    """All stay the parent's."""
    with two.wire() as left, two.wire("veth3") as right:
        a = XskSocket("veth0", frames=64, ring=64)
        b = XskSocket("veth2", ring=64, share=a)

        def in_the_child() -> None:
            for xsk in (a, b):
                refused(xsk.receive)
            refused(lambda: XskSocket("veth1", share=a))
            a.umem[:] = 1
            a.close()
            b.close()

        with child(in_the_child):
            for i in range(100):
                left.send(frame(i))
                forward(a, b, 1)
                assert right.recv(100) == frame(i)
            subprocess.run(["true"], check=True)
            a.close()
            with XskSocket("veth0", ring=64, share=b) as again:
                assert places(again)["free"] + places(again)["receiving"] == 64
            b.close()


# ---- misuse ----


OTHERS = {
    "frames": (128, r"frames is that of the UMEM, 64, not 128"),
    "frame_size": (4096, r"frame_size is that of the UMEM, 2048, not 4096"),
    "need_wakeup": (False, r"need_wakeup is that of the UMEM, True, not False"),
    "multi_buffer": (True, r"multi_buffer is that of the UMEM, False, not True"),
    "copy": (False, r"copy is that of the UMEM, True, not False"),
}


@pytest.mark.parametrize("option", OTHERS)
def test_options_that_are_the_umems(two, option):
    value, words = OTHERS[option]
    same = {"frames": 64, "frame_size": 2048, "need_wakeup": True, "multi_buffer": False, "copy": True}
    with XskSocket("veth0", frames=64, ring=64) as a:
        with pytest.raises(ValueError, match=words):
            XskSocket("veth2", share=a, **{option: value})
        with XskSocket("veth2", share=a, **{option: same[option]}):
            pass


@pytest.mark.parametrize("share", ["veth0", 3, XskSocket, True])
def test_what_is_no_socket_cannot_be_shared(namespace, share):
    with pytest.raises(TypeError, match="share is an XskSocket, not"):
        XskSocket("veth0", share=share)


def test_a_socket_that_cannot_be_made_costs_no_frame(two):
    """Nor a descriptor, and the other goes on."""
    two.ip("link", "set", "veth3", "down")
    two.ip("link", "set", "veth2", "up")
    two.ip("link", "add", "low", "type", "veth", "peer", "name", "lower")
    wrong: list[tuple[tuple[str, int], type[Exception], str]] = [
        (("veth0", 0), XskError, "queue 0 of veth0 has an AF_XDP socket of another program, or of this one"),
        (("veth2", 7), XskError, "veth2 has no queue 7"),
        (("nothing", 0), KernelError, "interface nothing does not exist"),
        (("low", 0), KernelError, "interface low is down"),
    ]
    with two.wire() as left, XskSocket("veth0", frames=64, ring=64) as a:
        batch = a.allocate(2, 60)
        before, open_files = places(a), os.listdir("/proc/self/fd")
        for args, kind, words in wrong:
            with pytest.raises(kind, match=words):
                XskSocket(*args, share=a)
            assert places(a) == before
            assert os.listdir("/proc/self/fd") == open_files
        with (  # it is bound, but its program is not to be had
            bpf.Object(bpf.object_path("lb")) as other,
            other.program("crab_lb").attach_xdp(socket.if_nametoindex("veth2")),
            pytest.raises(bpf.BpfBusyError, match="veth2 has an XDP program already"),
        ):
            XskSocket("veth2", ring=64, share=a)
        assert places(a)["held"] == 2
        with XskSocket("veth2", ring=64, share=a) as b:
            assert places(b)["free"] + places(b)["receiving"] == 62
            with pytest.raises(XskError, match="has an AF_XDP socket") as caught:
                XskSocket("veth2", share=a)
            assert caught.value.errno == errno.EBUSY
        a.release(batch)
        left.send(frame(1))
        forward(a, a, 1)
        assert left.recv(100) == frame(1)


def test_a_batch_of_another_umem(two):
    with (
        XskSocket("veth0", frames=64) as a,
        XskSocket("veth2", share=a) as b,
        XskSocket("veth1", frames=64) as other,
        XskSocket("veth3", share=other) as another,
    ):
        for own, foreign in ((a, other), (b, another), (other, b), (another, a)):
            batch = foreign.allocate(2, 60)
            for give in (own.send, own.release):
                with pytest.raises(FrameError, match="is no batch of this socket's UMEM"):
                    give(batch)
            foreign.release(batch)
        for xsk in (a, another):
            assert places(xsk)["held"] == 0


def test_given_once_by_any(two):
    with XskSocket("veth0", frames=64) as a, XskSocket("veth2", share=a) as b:
        for first in (a.send, b.send, a.release, b.release):
            for then in (a.send, b.send, a.release, b.release):
                batch = a.allocate(4, 60)
                first(batch)
                for wrong in (batch, batch[1:]):
                    with pytest.raises(FrameError, match="was sent or released already"):
                        then(wrong)
        assert places(a)["held"] == 0


# ---- what docs/xsk.md shows ----


def test_the_cable_shown(two):
    cable = run("docs/xsk.md", "def cable(").cable
    ended: list[BaseException] = []

    def work() -> None:
        try:
            cable("veth0", "veth2")
        except XskError as error:
            ended.append(error)

    with two.wire() as left, two.wire("veth3") as right:
        thread = threading.Thread(target=work)
        thread.start()
        left.settimeout(0.1)
        right.settimeout(0.1)
        for start, end in ((left, right), (right, left)):
            for _ in range(100):  # until the sockets are there
                start.send(frame(1))
                try:
                    got = end.recv(100)
                except TimeoutError:
                    continue
                break
            assert got == frame(1)
        two.ip("link", "del", "veth0")
        for _ in range(100):
            right.send(frame(2))
            thread.join(0.1)
            if not thread.is_alive():
                break
        assert len(ended) == 1
