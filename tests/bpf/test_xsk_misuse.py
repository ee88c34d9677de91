"""crablb.kernel.xsk in the hands of strangers: whatever a plain program does with it, an error is all that it gets."""

from __future__ import annotations

import copy
import errno
import gc
import itertools
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import crablb.kernel.xsk
from crablb import KernelError, LoadBalancer
from crablb.kernel import bpf, pins
from crablb.kernel.xsk import DESC, Batch, FrameError, XskError, XskSocket
from tests.helpers.processes import until
from tests.helpers.programs import several_buffers
from tests.helpers.torn import Torn
from tests.helpers.torn import torn as torn_in

FRAME = np.frombuffer(bytes.fromhex("ffffffffffff02000000000188b5") + bytes(46), np.uint8)


torn = partial(torn_in, crablb.kernel.xsk)


def small(**options) -> XskSocket:
    return XskSocket("veth0", frames=64, ring=64, **options)


def all_there(xsk: XskSocket) -> None:
    places = xsk.frames()
    assert places == {"all": 64, "free": 32, "receiving": 32, "held": 0, "sending": 0}
    assert xsk.statistics()["tx_invalid_descs"] == 0


# ---- frames that are not the caller's ----


def twice_in(batch: Batch) -> Batch:
    return batch.select(np.array([0, 1, 0]))


def moved(batch: Batch, by: int) -> Batch:
    batch.descs["addr"] += np.uint64(by)
    return batch


def with_descs(batch: Batch, descs: object) -> Batch:
    batch.descs = descs  # type: ignore[assignment]
    return batch


NOT_OURS: dict[str, Callable[[Batch], Batch]] = {
    "twice in one": twice_in,
    "another frame": lambda b: moved(b, 2048 * 40),
    "behind the end": lambda b: moved(b, 1 << 40),
    "behind all ends": lambda b: moved(b, (1 << 64) - 4096),
    "another dtype": lambda b: with_descs(b, np.zeros(2, np.uint8)),
    "another shape": lambda b: with_descs(b, np.zeros((2, 2), DESC)),
    "no array": lambda b: with_descs(b, [1, 2]),
}


@pytest.mark.parametrize("do", ["send", "release"])
@pytest.mark.parametrize("name", NOT_OURS)
def test_frames_that_are_not_the_callers(namespace, name, do):
    with small() as xsk:
        kept = xsk.allocate(3, 60)
        wrong = NOT_OURS[name](copy.copy(kept[:]))
        with pytest.raises(FrameError):
            getattr(xsk, do)(wrong)
        assert xsk.frames()["held"] == 3  # nothing half done
        xsk.release(kept)
        all_there(xsk)


@pytest.mark.parametrize("first", ["send", "release"])
@pytest.mark.parametrize("then", ["send", "release"])
def test_given_twice(namespace, first, then):
    """Also when the frames are somebody else's by then."""
    with small() as xsk:
        batch = xsk.allocate(8, 60)
        part = batch[2:4]
        getattr(xsk, first)(batch)
        for again in (batch, part):
            with pytest.raises(FrameError, match="was sent or released already"):
                getattr(xsk, then)(again)
        others = xsk.allocate(32, 60)
        with pytest.raises(FrameError):
            getattr(xsk, then)(batch)
        for look in (lambda: batch[0], lambda: list(batch), lambda: batch.columns(0, 14)):
            with pytest.raises(BufferError):
                look()
        xsk.release(others)
        all_there(xsk)


def test_of_another_socket(namespace):
    with small(load_program=False) as xsk, XskSocket("veth1", load_program=False) as other:
        batch = other.allocate(4, 60)
        for wrong in (batch, None, [1], copy.deepcopy(batch)):
            for give in (xsk.send, xsk.release):
                with pytest.raises(FrameError, match="is no batch of this socket"):
                    give(wrong)
        other.release(batch)
        all_there(xsk)


@pytest.mark.parametrize("length", [0, 1, 13, 1793, 4096, 0xFFFFFFFF])
def test_a_length_that_cannot_be(namespace, length):
    with small() as xsk:
        batch = xsk.allocate(4, 60)
        batch.lengths[2] = length
        if length > 1792:
            with pytest.raises(FrameError, match=rf"a frame of {length} bytes does not fit: there is room for 1792"):
                batch[2]
        with pytest.raises(FrameError, match=rf"frame 2 has {length} bytes; one that is sent has 14 to 1792"):
            xsk.send(batch)
        batch.lengths[2] = 14
        assert xsk.send(batch) == 4
        all_there(xsk)


@several_buffers
def test_packets_that_are_not_whole(namespace):
    """A packet's frames are sent together, of which only the first needs a header, and so many as the kernel takes."""
    with small(multi_buffer=True) as xsk:
        batch = xsk.allocate(20, 60)
        for more in ([0] * 19 + [1], [1] * 18 + [0, 0], [1] * 20):
            batch.descs["more"] = more
            with pytest.raises(FrameError, match="a packet's frames are sent together, and there are 18 at the most"):
                xsk.send(batch)
        batch.descs["more"] = [1, 0] + [0] * 18
        batch.lengths[:2] = [20, 1]
        assert xsk.send(batch) == 20
        all_there(xsk)
    with small() as xsk:
        batch = xsk.allocate(2, 60)
        batch.descs["more"] = [1, 0]
        with pytest.raises(FrameError, match="are sent together"):
            xsk.send(batch)
        xsk.release(batch)
        all_there(xsk)


def test_the_longest_frame_touches_no_other(namespace):
    with small() as xsk:
        before = xsk.allocate(32, 1792)
        for i, view in enumerate(before):
            view[:] = i
        assert [set(view.tolist()) for view in before] == [{i} for i in range(32)]


def test_columns(namespace):
    """Behind a frame's end are zeros, never another frame's bytes; the last frame of the UMEM is like all others."""
    with small() as xsk:
        batch = xsk.allocate(32, 1792)
        for view in batch:
            view[:] = 7
        batch.lengths[:] = 20
        assert (batch.columns(18, 22) == [7, 7, 0, 0]).all()
        assert batch.columns(0, 2048).shape == (32, 2048)
        for start, stop in ((-1, 4), (4, 2), (0, 2049)):
            with pytest.raises(FrameError, match="columns are 0 <= start <= stop <= 2048"):
                batch.columns(start, stop)


STEPS = ["receive", "allocate", "release", "send", "again", "select", "lengths", "addresses", "look"]


@settings(max_examples=40)
@given(steps=st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 70)), max_size=40))
def test_no_order_of_calls_loses_a_frame(namespace, steps):
    with small() as xsk:
        batches = [xsk.allocate(0, 60)]
        for step, n in steps:
            batch = batches[n % len(batches)]
            try:
                match step:
                    case "receive":
                        batches.append(xsk.receive(n))
                    case "allocate":
                        batches.append(xsk.allocate(n, n * 40))
                    case "release" | "send":
                        getattr(xsk, step)(batch)
                    case "again":
                        xsk.release(batch)
                        xsk.send(batch)
                    case "select":
                        batches.append(batch.select(np.arange(n) // 2 % max(1, len(batch))))
                    case "lengths":
                        batch.lengths[:] = n * 40
                    case "addresses":
                        batch.descs["addr"] += np.uint64(n * 64)
                    case "look":
                        for view in batch:
                            view[:] = n
            except (FrameError, IndexError):
                pass
            places = xsk.frames()
            assert places.pop("all") == 64 == sum(places.values())
            assert all(0 <= place <= 64 for place in places.values())


def test_threads_take_turns(namespace):
    """Calls at once by several threads lose no frame and give none out twice."""
    with small() as xsk:
        failed: list[BaseException] = []

        def work() -> None:
            try:
                for _ in range(300):
                    batch = xsk.allocate(3, 60)
                    xsk.send(batch[:1])
                    xsk.release(batch[1:])
                    xsk.release(xsk.receive(8))
            except BaseException as error:
                failed.append(error)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failed
        all_there(xsk)


# ---- the end of a socket ----


@pytest.mark.parametrize("interrupted", ["send", "release"])
def test_a_signal_in_the_middle_of_a_call(namespace, monkeypatch, interrupted):
    """Its handler runs in the same thread, which the lock lets in."""
    with small() as xsk:
        batch, other = xsk.allocate(2, 60), xsk.allocate(2, 60)
        owned = type(xsk._umem).owned

        def signalled(umem, descs, ticket):
            for call in (xsk.receive, xsk.frames, lambda: xsk.send(batch), lambda: xsk.release(other)):
                with pytest.raises(XskError, match="is in use, by what was interrupted") as refused:
                    call()
                assert refused.value.errno == errno.EBUSY
            return owned(umem, descs, ticket)

        with monkeypatch.context() as patched:
            patched.setattr(type(xsk._umem), "owned", signalled)
            getattr(xsk, interrupted)(batch)
        xsk.release(other)
        assert xsk.frames()["held"] == 0


def outcome(call: Callable[[], object], after: int) -> tuple[bool, Any]:
    """Whether a call has ended that is torn so late, and what it returned."""
    try:
        with torn(after):
            return True, call()
    except Torn:
        return False, None


@pytest.mark.parametrize("name", ["send", "release"])
def test_a_signal_that_raises_in_the_middle_of_giving(namespace, name):
    """At each place where it can: the frames are still the caller's, or were given."""
    with small() as xsk:
        for after in itertools.count():
            batch = xsk.allocate(4, 60)
            done, _ = outcome(partial(getattr(xsk, name), batch), after)
            with suppress(FrameError):
                xsk.release(batch)
            until(lambda: not xsk.frames()["sending"])
            all_there(xsk)
            if done:
                break
        assert after > 10


def test_a_signal_that_raises_in_the_middle_of_allocating(namespace):
    with small() as xsk:
        for after in itertools.count():
            done, batch = outcome(partial(xsk.allocate, 4, 60), after)
            if done:
                break
            if after % 2:
                xsk.release(xsk.allocate(32, 60))
            all_there(xsk)
        assert len(batch) == 4 and after > 10


@pytest.mark.parametrize("most", [64, 1])
def test_a_signal_that_raises_in_the_middle_of_receiving(namespace, most):
    """What had come comes with the next calls, of which none gives more than is asked for."""
    wire = namespace.wire()
    with small() as xsk:
        for after in itertools.count():
            for n in range(3):
                wire.send(bytes(12) + bytes([0x88, 0xB5, n]) + bytes(45))
            assert xsk.wait(60)
            done, batch = outcome(xsk.receive, after)
            came = []
            while True:
                if batch is not None:
                    came += [int(frame[14]) for frame in batch]
                    xsk.release(batch)
                if len(came) == 3:
                    break
                assert xsk.wait(60)
                batch = xsk.receive(most)
                assert len(batch) <= most
            assert came == [0, 1, 2]
            all_there(xsk)
            if done:
                break
        assert after > 10
    wire.close()


@pytest.mark.parametrize("name", ["send", "release", "allocate", "receive", "frames", "wait"])
def test_whoever_keeps_what_a_signal_raised_can_go_on(namespace, name):
    """And so can others: nothing is locked by an exception, whose traceback has all that was interrupted."""
    with small() as xsk:
        for after in itertools.count():
            batch = xsk.allocate(2, 60)
            calls: dict[str, Callable[[], object]] = {
                "send": partial(xsk.send, batch), "release": partial(xsk.release, batch), "frames": xsk.frames,
                "allocate": partial(xsk.allocate, 1, 60), "receive": xsk.receive, "wait": partial(xsk.wait, 0),
            }  # fmt: skip
            try:
                with torn(after):
                    got = calls[name]()
            except Torn:
                xsk.frames()
                other = threading.Thread(target=xsk.frames, daemon=True)
                other.start()
                other.join(60)
                assert not other.is_alive()
                interrupted = True
            else:
                interrupted = False
                if isinstance(got, Batch):
                    xsk.release(got)
            with suppress(FrameError):  # they are gone
                xsk.release(batch)
            until(lambda: not xsk.frames()["sending"])
            all_there(xsk)
            if not interrupted:
                break
        assert after > 5


def by_a_handler(_: XskSocket, call: Callable[[], object]) -> None:
    """In the same thread; in the middle of a call it is told so."""
    with suppress(XskError):
        call()


def by_a_thread(xsk: XskSocket, call: Callable[[], object]) -> None:
    """In another one, where it need not wait for its turn."""

    def work() -> None:
        if xsk._pool.lock.acquire(blocking=False):
            xsk._pool.lock.release()
            call()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


@pytest.mark.parametrize("whose", [by_a_handler, by_a_thread])
@pytest.mark.parametrize("between", ["receive", "allocate", "frames"])
@pytest.mark.parametrize("name", ["receive", "allocate"])
def test_two_calls_never_have_the_same_frames(namespace, name, between, whose):
    """Wherever one comes between the other's instructions; and each frame that came is had once."""
    wire = namespace.wire()

    def comes_between(xsk: XskSocket, after: int) -> bool:
        """Whether the first call was not over yet."""
        for n in range(3):
            wire.send(bytes(12) + bytes([0x88, 0xB5, n]) + bytes(45))
        assert xsk.wait(60)
        received: list[Batch] = []
        allocated: list[Batch] = []
        calls: dict[str, Callable[[], object]] = {
            "receive": lambda: received.append(xsk.receive()),
            "allocate": lambda: allocated.append(xsk.allocate(4, 60)),
            "frames": xsk.frames,
        }
        acted = []

        def act() -> None:
            acted.append(True)
            whose(xsk, calls[between])

        with torn(after, act):
            calls[name]()
        for batch in allocated:
            assert [len(frame) for frame in batch] == [60] * 4
            xsk.release(batch)
        came: list[int] = []
        while True:
            while received:
                batch = received.pop()
                came += [int(frame[14]) for frame in batch]
                xsk.release(batch)
            if len(came) == 3:
                break
            assert xsk.wait(60)
            calls["receive"]()
        assert sorted(came) == [0, 1, 2]
        all_there(xsk)
        return bool(acted)

    with small() as xsk:
        assert sum(1 for _ in itertools.takewhile(partial(comes_between, xsk), itertools.count())) > 10
    wire.close()


def test_closed_by_a_signal_in_the_middle_of_a_call(namespace, monkeypatch):
    """Which is done first."""
    xsk = small()
    batch = xsk.allocate(2, 60)
    owned = type(xsk._umem).owned

    def signalled(umem, descs, ticket):
        xsk.close()
        xsk.close()
        assert xsk.fileno() >= 0
        return owned(umem, descs, ticket)

    monkeypatch.setattr(type(xsk._umem), "owned", signalled)
    xsk.release(batch)
    assert xsk.fileno() == -1
    assert bpf.xdp_program(socket.if_nametoindex("veth0"))[0] == 0


def test_copies(namespace):
    with small() as xsk:
        for make in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="cannot be copied or pickled"):
                make(xsk)
        with pytest.raises(XskError, match="is open"):
            xsk.__init__("veth0")
        all_there(xsk)


def test_closed(namespace):
    xsk = small()
    batch = xsk.allocate(4, 60)
    view = batch[0]
    xsk.close()
    xsk.close()
    calls = {
        "receive": xsk.receive,
        "allocate": lambda: xsk.allocate(1, 60),
        "release": lambda: xsk.release(batch),
        "send": lambda: xsk.send(batch),
        "wait": lambda: xsk.wait(0),
        "statistics": xsk.statistics,
        "frames": xsk.frames,
        "handle": lambda: xsk.handle,
        "enter": xsk.__enter__,
    }
    for call in calls.values():
        with pytest.raises(XskError, match="socket on queue 0 of veth0 is closed") as caught:
            call()
        assert caught.value.errno == errno.EBADF
    assert xsk.fileno() == -1
    with pytest.raises(ValueError):
        select.select([xsk], [], [], 0)
    with pytest.raises(BufferError):
        batch[0]
    view[:] = 1  # memory of its own
    assert view.sum() == 60


def test_closed_while_somebody_waits(namespace):
    with small() as xsk:
        threading.Timer(0, xsk.close).start()
        with pytest.raises(XskError, match="is closed"):
            xsk.wait(30)


def test_forgotten(namespace):
    """A socket that nobody has any more leaves queue and interface, and says so; views and batches do not hold it."""
    xsk = small()
    batch = xsk.allocate(1, 60)
    view = batch[0]
    with pytest.warns(ResourceWarning, match="unclosed <XskSocket veth0/0>"):
        del xsk
        gc.collect()
    assert bpf.xdp_program(socket.if_nametoindex("veth0"))[0] == 0
    with small() as again:
        all_there(again)
    view[:] = 1


@pytest.mark.parametrize(
    "options",
    [{"mode": "fast"}, {"mode": None}, {"frames": 1 << 40}, {"ring": -64}, {"copy": "yes"}, {"need_wakeup": 2},
     {"queue": -1}, {"queue": 1 << 20}, {"busy_poll": -1}, {"load_program": "no"}],
)  # fmt: skip
def test_arguments_that_cannot_be(namespace, options):
    """Nothing is left open."""
    before = os.listdir("/proc/self/fd")
    with pytest.raises(ValueError, match=next(iter(options))):
        XskSocket("veth0", **options)
    assert os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("options", [{"frames": 64.0}, {"ring": "64"}, {"queue": None}, {"busy_poll": 0.5}])
def test_arguments_of_other_types(namespace, options):
    with pytest.raises(TypeError, match=next(iter(options))):
        XskSocket("veth0", **options)


@pytest.mark.parametrize("n", [-1, 1 << 70])
def test_counts_that_cannot_be(namespace, n):
    with small() as xsk:
        for call in (xsk.receive, lambda n: xsk.allocate(n, 60), lambda n: xsk.allocate(1, n)):
            with pytest.raises(ValueError, match=r"(n|length) is 0 to"):
                call(n)
        assert len(xsk.allocate(1 << 40, 60)) == 32


# ---- options ----


@pytest.mark.parametrize("need_wakeup", [True, False])
@pytest.mark.parametrize("busy_poll", [0, 20])
def test_wakeups_and_busy_polling(namespace, need_wakeup, busy_poll):
    with namespace.wire() as wire, small(need_wakeup=need_wakeup, busy_poll=busy_poll) as xsk:
        for _ in range(100):  # more than there are frames
            wire.send(FRAME.tobytes())
            assert xsk.wait(60)
            assert xsk.send(xsk.receive()) == 1
            assert wire.recv(100) == FRAME.tobytes()
        all_there(xsk)


def test_copy_by_request(namespace):
    with small(copy=True) as xsk:
        assert not xsk.zero_copy


# ---- fork ----


@contextmanager
def child(do: Callable[[], object] | None = None) -> Iterator[int]:
    """A fork of this process that does something, and then lives until the context ends; it must not have failed."""
    ready, tell = os.pipe()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            if do:
                do()
            status = 0
        finally:
            os.write(tell, bytes([status]))
            signal.pause()
    os.close(tell)
    try:
        assert os.read(ready, 1) == b"\0"
        yield pid
    finally:
        os.close(ready)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def refused(call: Callable[[], object]) -> None:
    with pytest.raises(KernelError, match="belongs to the process that"):
        call()


def test_fork(namespace):
    """The socket stays the parent's: it sends and receives as before, and its queue is free when it closes it."""
    with namespace.wire() as wire:
        xsk = small()
        wire.send(FRAME.tobytes())
        assert xsk.wait(60)
        batch = xsk.receive()

        def in_the_child() -> None:
            for call in (xsk.receive, xsk.frames, lambda: xsk.send(batch), lambda: xsk.wait(0)):
                refused(call)
            xsk.umem[:] = 1
            xsk.close()

        with child(in_the_child):
            assert batch[0].tobytes() == FRAME.tobytes()
            for _ in range(100):
                assert xsk.send(batch) == 1
                assert wire.recv(100) == FRAME.tobytes()
                wire.send(FRAME.tobytes())
                assert xsk.wait(60)
                batch = xsk.receive()
            xsk.release(batch)
            all_there(xsk)
            subprocess.run(["true"], check=True)
            assert bpf.xdp_program(socket.if_nametoindex("veth0"))[0]
            xsk.close()
            assert bpf.xdp_program(socket.if_nametoindex("veth0"))[0] == 0
            with small() as again:
                all_there(again)


def test_the_parent_dies(namespace):
    """Its children keep neither queue nor program."""
    program = """
import os, signal
from crablb.kernel.xsk import XskSocket
xsk = XskSocket("veth0")
pid = os.fork()
if not pid:
    signal.pause()
print(pid, flush=True)
signal.pause()
"""
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout
    pid = int(parent.stdout.readline())
    try:
        parent.kill()
        parent.wait()
        with small() as again:
            all_there(again)
    finally:
        os.kill(pid, signal.SIGKILL)
        parent.stdout.close()


def test_fork_beside_a_load_balancer(namespace):
    """It is the parent's: the child can neither use nor end it, and does not keep it."""
    namespace.ip("address", "add", "10.0.0.2/24", "dev", "veth0")
    services = ["tcp://10.0.0.100:80=10.0.0.11"]
    with LoadBalancer("veth0", services) as lb:

        def in_the_child() -> None:
            for call in (lb.statistics, lambda: lb.add_service("tcp://10.0.0.100:81=10.0.0.11"), lb.process_once):
                refused(call)
            lb.__exit__(None, None, None)

        with child(in_the_child):
            assert bpf.xdp_program(socket.if_nametoindex("veth0"))[0]
            assert pins.owner("lb-veth0") == os.getpid()
            lb.add_service("tcp://10.0.0.100:81=10.0.0.11")
            lb.__exit__(None, None, None)
            with LoadBalancer("veth0", services) as again:
                assert again.statistics()
        lb.__enter__()
