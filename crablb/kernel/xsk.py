"""AF_XDP for Python: receive and send whole frames in batches, without a copy between Python and the UMEM.

::

    with XskSocket("veth0") as xsk:
        while xsk.wait():
            batch = xsk.receive()
            for frame in batch:                       # np.ndarray[uint8], a view into the UMEM
                frame[0:12] = np.roll(frame[0:12], 6)  # turn the MAC addresses round
            xsk.send(batch)

Source: Documentation/networking/af_xdp.rst of the kernel.
"""

from __future__ import annotations

import errno
import math
import operator
import os
import select
import socket
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NoReturn, Self, TypeVar, overload

import msgspec
import numpy as np
import numpy.typing as npt

from crablb._native import ffi, lib
from crablb.errors import KernelError
from crablb.kernel import bpf
from crablb.kernel.interface import interface_info

T = TypeVar("T")

__all__ = ["DESC", "Batch", "FrameError", "Umem", "XskError", "XskSocket"]

#: ``struct crab_desc``: a frame's address in the UMEM, its length in bytes, 1 if its packet goes on in the next one.
DESC = np.dtype([("addr", "<u8"), ("len", "<u4"), ("more", "<u4")])
HEADROOM = 256  # bytes that the kernel leaves in front of a received frame
SHORTEST = 14  # bytes of a frame to send: an Ethernet header
BUSY_BUDGET = 64  # frames that a driver may take at once when busy polling; the kernel's own for interrupts (NAPI)
MOST = 1 << 20  # frames of a UMEM, entries of a ring
#: Of a UMEM, if nothing else is said.
UMEM_OPTIONS = {"frames": 4096, "frame_size": 2048, "need_wakeup": True, "multi_buffer": False}
MOST_PARTS = 18  # frames of a packet to send: MAX_SKB_FRAGS + 1; of longer ones the kernel (6.18) loses the frames


class XskError(KernelError):
    """An AF_XDP socket could not be made, failed, or is closed; ``errno`` says why (EBADF: closed)."""

    def __init__(self, what: str, number: int = 0) -> None:
        self.errno = number
        super().__init__(what)


class FrameError(ValueError, BufferError):
    """A frame is not the caller's (any more), or what is asked for lies outside of it."""


def _explain(interface: str, queue: int, stage: str, number: int) -> str:
    if number == errno.EPERM:
        return "AF_XDP sockets need CAP_NET_RAW, and their program CAP_BPF and CAP_NET_ADMIN; run as root"
    if number == errno.EAFNOSUPPORT:
        return "this kernel has no AF_XDP; it needs CONFIG_XDP_SOCKETS=y"
    if stage == "rings" and number == errno.EBUSY:  # those of a socket that is bound
        return (
            "this kernel lets no other process have AF_XDP sockets in use, as a takeover does (Linux 6.4 does); restart"
            " instead: with keep = SECONDS in the configuration known connections outlive that"
        )
    if stage == "bind":
        if number == errno.EBUSY:
            return (
                f"queue {queue} of {interface} has an AF_XDP socket of another program, or of this one;"
                " close that, or use another queue"
            )
        if number == errno.EINVAL:
            return f"{interface} has no queue {queue} (see ethtool -l {interface})"
        if number == errno.EOPNOTSUPP:
            return (
                f"the driver of {interface} cannot bind in the mode asked for; leave the mode to the kernel,"
                " or, where it is a shared UMEM's, make its first socket with copy=True"
            )
        if number == errno.ENETDOWN:
            return f"interface {interface} is down; bring it up: ip link set {interface} up"
    if number == errno.ENOMEM:
        return f"no memory for the {stage} of queue {queue} of {interface}"
    return f"cannot make an AF_XDP socket on queue {queue} of {interface} ({stage}): {os.strerror(number)}"


class Umem:
    """The memory that frames lie in, and which of them are in whose hands.

    Frames get a number, their ticket, whenever they come into the caller's hands, and lose it when they go: what has
    another number is somebody else's by now.  The memory stays as long as there is a view into it.
    """

    def __init__(self, memory: npt.NDArray[np.uint8], frame_size: int, whole: int = 0) -> None:
        """``whole``: bytes at its end that are one place, for a packet of several frames that was put together."""
        self.memory, self.frame_size = memory, frame_size
        self._frames, more = (len(memory) - whole) // frame_size, int(whole > 0)
        self._tickets = np.zeros(self._frames + more, np.uint64)  # of each place; 0: not in the caller's hands
        self._last = 0

    def _numbers(self, addresses: npt.NDArray[np.uint64]) -> npt.NDArray[np.intp]:
        return np.minimum(addresses // self.frame_size, self._frames).astype(np.intp)

    def room(self, addresses: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        """Bytes from each address to the end of the place that it is in."""
        whole = addresses >= self._frames * self.frame_size
        room: npt.NDArray[np.uint64] = np.where(
            whole, len(self.memory) - addresses, self.frame_size - addresses % self.frame_size
        )
        return room

    def ticket(self) -> int:
        """One that no frame has had."""
        self._last += 1
        return self._last

    def issue(self, descs: npt.NDArray[Any]) -> int:
        """A ticket for these frames."""
        ticket = self.ticket()
        self._tickets[self._numbers(descs["addr"])] = ticket
        return ticket

    @property
    def tickets(self) -> Any:
        """``uint64_t *``, of each frame: for native code."""
        return ffi.from_buffer("uint64_t[]", self._tickets)

    def revoke(self) -> None:
        """No frame is in the caller's hands any more."""
        self._tickets[:] = 0

    def held(self) -> npt.NDArray[np.bool_]:
        """Which frames are in the caller's hands."""
        held: npt.NDArray[np.bool_] = self._tickets != 0
        return held

    def _held(self, addr: int, ticket: int) -> bool:
        return addr < len(self.memory) and int(self._tickets[min(addr // self.frame_size, self._frames)]) == ticket

    def view(self, addr: int, length: int, ticket: int) -> npt.NDArray[np.uint8]:
        """A frame's bytes.  Raises :class:`FrameError`."""
        if not self._held(addr, ticket):
            raise FrameError("the frame was sent or released already, or its address was changed to another frame's")
        room = int(self.room(np.array([addr], np.uint64))[0])
        if length > room:
            raise FrameError(f"a frame of {length} bytes does not fit: there is room for {room}")
        return self.memory[addr : addr + length]

    def owned(self, descs: npt.NDArray[Any], ticket: int) -> npt.NDArray[np.intp]:
        """The frames' numbers.  Raises :class:`FrameError` if one is not in the caller's hands by this ticket."""
        if not isinstance(descs, np.ndarray) or descs.dtype != DESC or descs.ndim != 1:
            raise FrameError("a batch's descs are an array of crablb.kernel.xsk.DESC, shape (n,)")
        inside = descs["addr"] < len(self.memory)
        numbers = self._numbers(descs["addr"])
        if not inside.all() or (self._tickets[numbers] != ticket).any():
            raise FrameError("a frame was sent or released already, or its address was changed to another frame's")
        return numbers

    def sendable(self, descs: npt.NDArray[Any], most: int) -> None:
        """Raises :class:`FrameError` if a frame is longer than its room, or a packet shorter than can be, or not whole.

        ``most``: frames of a packet.
        """
        room, length = self.room(descs["addr"]), descs["len"]
        more = descs["more"] != 0
        begins = np.concatenate(([True], ~more[:-1]))[: len(descs)]
        least = np.where(begins, SHORTEST, 1)
        wrong = (length < least) | (length > room)
        if wrong.any():
            i = int(wrong.argmax())
            raise FrameError(f"frame {i} has {length[i]} bytes; one that is sent has {least[i]} to {room[i]}, its room")
        if more.any():
            ends = np.flatnonzero(~more)
            longest = int(np.diff(ends, prepend=-1).max()) if len(ends) else 0
            if more[-1] or longest > most:
                raise FrameError(f"a packet's frames are sent together, and there are {most} at the most")


@dataclass(frozen=True)
class _Left:
    """What a closed socket had in its rings: the kernel's, until its queue can be had again, or is gone."""

    namespace: int  # SO_NETNS_COOKIE; 0: not known
    ifindex: int
    queue: int
    addresses: npt.NDArray[np.uint64]
    receiving: int
    sending: int


class _File:
    """A descriptor, closed with this object; -1: none."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


def _memory_file(frames: int, frame_size: int) -> int:
    """A memfd for a UMEM.  Raises :class:`MemoryError`."""
    try:
        fd = os.memfd_create("crablb-umem", os.MFD_CLOEXEC)
    except OSError:
        raise MemoryError from None
    try:
        os.ftruncate(fd, lib.crab_umem_size(frames, frame_size))
    except OSError:
        os.close(fd)
        raise MemoryError from None
    return fd


class Bound(msgspec.Struct, frozen=True):
    """How a socket that goes to another process is bound, as plain values."""

    interface: str
    ifindex: int
    queue: int
    ring: int
    flags: int
    frames: Annotated[int, msgspec.Meta(ge=0)]
    frame_size: int


class Given(msgspec.Struct, frozen=True):
    """Of a socket that its process does not use any more: how many frames are where; ``struct crab_xsk_given``."""

    in_fill: int
    in_tx: int
    free_count: int
    dropped: int


class _Pool:
    """A UMEM and the sockets that have it, one or several, which take turns: ``lock``.  Raises :class:`MemoryError`."""

    def __init__(self, frames: int, frame_size: int, file: int = -1) -> None:
        """``file``: a memfd for the memory (:func:`_memory_file`), ours from now on; -1: it is this process's alone."""
        self.file = _File(file)
        c = lib.crab_umem_new(frames, frame_size, file)
        if not c:
            raise MemoryError
        self.c = ffi.gc(c, lib.crab_umem_free)
        # Every view holds the memory, and the memory the C structure that it belongs to.
        held = ffi.gc(lib.crab_umem_memory(c), lambda _, owner=self.c: None)
        size = frames * frame_size
        #: The frames, and behind them room to put one packet together in.
        self.whole: npt.NDArray[np.uint8] = np.frombuffer(ffi.buffer(held, size + lib.CRAB_WHOLE), np.uint8)
        self.umem = Umem(self.whole[:size], frame_size)
        self.lock = threading.RLock()
        self.closing: list[XskSocket] = []  # those to be closed when it is not any more
        self.hands: list[_Hands] = []  # of the open sockets
        self._left: list[_Left] = []

    def share(self) -> int:
        """Get ready for one socket more: 0, or an errno."""
        return -int(lib.crab_umem_share(self.c, ffi.from_buffer("bool[]", self.umem.held())))

    def joined(self, xsk: Any, ifindex: int, queue: int) -> None:
        """A socket was bound to a queue: what a closed one had there is free, and what those of lost interfaces had.

        The kernel lets a queue go when it has done with the frames of the socket that had it, and not before: a child
        of a fork may keep that for a while, and so may a driver.
        """
        namespace = int(lib.crab_xsk_namespace(xsk))
        for left in list(self._left):
            here = namespace and left.namespace == namespace
            if here and ((left.ifindex, left.queue) == (ifindex, queue) or _gone(left.ifindex)):
                self._left.remove(left)
                self._add(left.addresses)
        lib.crab_umem_settle(self.c)

    def _add(self, addresses: npt.NDArray[np.uint64]) -> None:
        lib.crab_umem_add(self.c, ffi.from_buffer("uint64_t[]", addresses), len(addresses))

    def close(self, xsk: Any, ifindex: int, queue: int) -> None:
        """Close a socket.  The last one takes the frames out of the caller's hands."""
        if lib.crab_umem_sockets(self.c) == 1:
            lib.crab_xsk_close(xsk)
            self.umem.revoke()
            return
        lib.crab_xsk_reap(xsk)
        receiving, sending = ffi.new("uint32_t *"), ffi.new("uint32_t *")
        lib.crab_xsk_frames(xsk, receiving, sending)
        addresses = np.empty(len(self.umem.held()), np.uint64)
        n = lib.crab_xsk_in_rings(xsk, ffi.from_buffer("uint64_t[]", addresses))
        left = _Left(int(lib.crab_xsk_namespace(xsk)), ifindex, queue, addresses[:n].copy(), receiving[0], sending[0])
        unbound = lib.crab_xsk_unbound(xsk)
        lib.crab_xsk_close(xsk)
        if unbound:
            self._add(left.addresses)
        else:
            self._left.append(left)
        lib.crab_umem_settle(self.c)

    def places(self) -> dict[str, int]:
        out = ffi.new("struct crab_xsk_places *")
        lib.crab_umem_frames(self.c, out)
        places = {name: int(getattr(out, name)) for name, _ in ffi.typeof("struct crab_xsk_places").fields}
        places["receiving"] += sum(left.receiving for left in self._left)
        places["sending"] += sum(left.sending for left in self._left)
        return places


class _Hand:
    """Frames on their way into the caller's hands: where a signal's handler may raise, whose they are is known.

    A call fills it with the lock, and has to take what it has put there without: no more may be called then, or what
    is raised would leave frames that nobody has.  So another thread, or a handler, may come first.  The frames are
    theirs then: ``descs`` is another array, of which the call that was late takes notice.
    """

    def __init__(self) -> None:
        self.descs = np.empty(0, DESC)
        self.got = ffi.new("uint32_t *")  # how many of those they are
        self.ticket = 0

    def fill(self, xsk: Any, n: int, umem: Umem, *, received: bool) -> None:
        self.descs, self.ticket = np.zeros(n, DESC), umem.ticket()
        out = ffi.from_buffer("struct crab_desc[]", self.descs)
        lib.crab_xsk_hand_out(xsk, out, n, received, umem.tickets, self.ticket, self.got)

    def give_back(self, xsk: Any, umem: Umem) -> None:
        descs = ffi.from_buffer("struct crab_desc[]", self.descs)
        if self.got[0]:
            lib.crab_xsk_hand_in(xsk, descs, self.got[0], False, umem.tickets, self.ticket, ffi.new("uint32_t *"))
            self.descs, self.got[0] = np.empty(0, DESC), 0


class _Hands:
    """What a socket's calls had got when they were interrupted."""

    def __init__(self) -> None:
        self.received = _Hand()  # the next receive() gives it
        self.allocated = _Hand()  # free again at the next call that asks


def _gone(ifindex: int) -> bool:
    try:
        socket.if_indextoname(ifindex)
    except OSError as error:
        return error.errno in (errno.ENXIO, errno.ENODEV)
    return False


class Batch:
    """Frames in the caller's hands: a sequence of views into the UMEM.

    ``descs`` is an array of :data:`DESC`, shape (n,).  ``batch[i]`` and iteration give ``uint8`` arrays that are the
    frames themselves, valid until the batch is sent or released.  Slices and masks give smaller batches.

    Raises :class:`FrameError` for a frame that was sent or released, or that is longer than its room.
    """

    __slots__ = ("_ticket", "_umem", "descs")

    def __init__(self, descs: npt.NDArray[Any], umem: Umem, ticket: int) -> None:
        self.descs = descs
        self._umem, self._ticket = umem, ticket

    def __len__(self) -> int:
        return len(self.descs)

    @overload
    def __getitem__(self, i: int) -> npt.NDArray[np.uint8]: ...
    @overload
    def __getitem__(self, i: slice) -> Batch: ...
    def __getitem__(self, i: int | slice) -> npt.NDArray[np.uint8] | Batch:
        if isinstance(i, slice):
            return self.select(i)
        desc = self.descs[operator.index(i)]
        return self._umem.view(int(desc["addr"]), int(desc["len"]), self._ticket)

    def __iter__(self) -> Iterator[npt.NDArray[np.uint8]]:
        return (self[i] for i in range(len(self)))

    @property
    def lengths(self) -> npt.NDArray[np.uint32]:
        """Bytes of each frame, shape (n,); writable: a shorter or longer frame is sent so."""
        return self.descs["len"]

    @property
    def more(self) -> npt.NDArray[np.bool_]:
        """Which frames' packets go on in the frame behind them, shape (n,): with ``multi_buffer`` alone."""
        more: npt.NDArray[np.bool_] = self.descs["more"] != 0
        return more

    def select(self, mask: npt.NDArray[Any] | slice) -> Batch:
        """The frames that a boolean mask, an index array or a slice picks; its ``descs`` are a copy."""
        picked = np.array(self.descs[mask])
        if picked.ndim != 1:
            raise FrameError("a mask, or an array of indices, has one dimension")
        return Batch(picked, self._umem, self._ticket)

    def columns(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Bytes ``start`` to ``stop`` of every frame at once: a copy, shape (n, stop - start).

        Behind a frame's end: zeros.  Raises :class:`FrameError` if ``stop`` is larger than the UMEM's frames.
        """
        start, stop = operator.index(start), operator.index(stop)
        if not 0 <= start <= stop <= self._umem.frame_size:
            raise FrameError(f"columns are 0 <= start <= stop <= {self._umem.frame_size}, not {start} and {stop}")
        self._umem.owned(self.descs, self._ticket)
        columns = np.arange(start, stop)
        offsets = self.descs["addr"].astype(np.int64)[:, None] + columns
        copied: npt.NDArray[np.uint8] = self._umem.memory[np.minimum(offsets, len(self._umem.memory) - 1)]
        if (self.lengths < stop).any():
            copied[columns >= self.lengths[:, None]] = 0
        return copied


def _counted(name: str, value: int, most: int, least: int = 0) -> int:
    """Raises :class:`ValueError` or :class:`TypeError` if it is not a whole number in these bounds."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} is a whole number, not {value!r}")
    if not least <= value <= most:
        raise ValueError(f"{name} is {least} to {most}, not {value}")
    return int(value)


def _power_of_two(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is a power of two, not {value!r}")
    if not 64 <= value <= MOST or value & (value - 1):
        raise ValueError(f"{name} is a power of two, 64 or more, not {value}")
    return value


def _word(name: str, value: object, words: tuple[object, ...]) -> None:
    if not any(value is word or (isinstance(word, str) and value == word) for word in words):
        raise ValueError(f"{name} is one of {', '.join(map(repr, words))}, not {value!r}")


class XskSocket:
    """An AF_XDP socket on one queue of an interface, with a UMEM of its own, or another's: ``share``.

    With ``load_program`` (the default) a program is attached that hands every frame of the interface's bound queues to
    their sockets; without it, put the socket into your own XSKMAP with :meth:`register`.

    ``copy``: True for copy mode, False for zero-copy, None to try zero-copy first.  ``frame_size`` is 2048 or 4096
    bytes, of which 256 are headroom; ``frames`` and ``ring`` are powers of two.  ``need_wakeup``: the kernel says when
    it wants a system call, instead of getting one for each batch.  ``busy_poll``: microseconds that a system call may
    run the driver, in place of interrupts (preferred busy polling, Linux 5.11; the interface's ``napi_defer_hard_irqs``
    and ``gro_flush_timeout`` go with it); 0: none.

    Any thread may use it, one at a time.  Close it, or use it as a context manager: one that is only forgotten is
    closed with a :class:`ResourceWarning`.  After a fork it is the parent's; the child's is closed.

    ``multi_buffer``: take packets too that do not fit into a frame, as there are where the MTU is larger: they lie in
    several frames of a batch, see :attr:`Batch.more`, which have to be sent or released together.  The attribute of
    that name says whether kernel (6.6) and driver do so; without it such packets are dropped.

    ``share``: an open socket, of another queue or interface, whose UMEM this one is to have too (XDP_SHARED_UMEM, Linux
    5.10): each sends and releases what the other received.  ``frames``, ``frame_size``, ``copy``, ``need_wakeup`` and
    ``multi_buffer`` are the UMEM's then, and need not be said again.  The memory is there until the last is closed.
    Threads take turns with all of them; native code that uses a ``handle`` has to be alone with the UMEM.

    ``memory_file``: have the UMEM's memory lie in a file (memfd_create(2)), so that the open socket can go on in
    another process.  That gets :meth:`bound` and :attr:`files`, for :meth:`adopt`; and when this one does not use the
    socket any more, what :meth:`give` returns, for :meth:`take`.

    Raises :class:`XskError`, :class:`crablb.kernel.bpf.BpfError`, or :class:`KernelError` if the interface does not
    exist or is down; :class:`ValueError` or :class:`TypeError` for other arguments.
    """

    _xsk: Any = None  # struct crab_xsk *; None: closed
    _closed_as = "is closed"
    _pool: _Pool
    _umem: Umem
    _options: dict[str, int]
    zero_copy: bool

    def __init__(
        self,
        interface: str,
        queue: int = 0,
        *,
        frames: int | None = None,
        frame_size: int | None = None,
        ring: int = 2048,
        copy: bool | None = None,
        need_wakeup: bool | None = None,
        busy_poll: int = 0,
        load_program: bool = True,
        mode: Literal["auto", "native", "generic"] = "auto",
        multi_buffer: bool | None = None,
        share: XskSocket | None = None,
        memory_file: bool = False,
    ) -> None:
        if self._xsk:
            raise XskError(f"{self!r} is open", errno.EBUSY)
        if not isinstance(interface, str):
            raise TypeError(f"interface is a name, not {interface!r}")
        if frame_size not in (None, 2048, 4096):
            raise ValueError(f"frame_size is 2048 or 4096 bytes, not {frame_size}")
        if not isinstance(share, XskSocket | None):
            raise TypeError(f"share is an XskSocket, not {share!r}")
        self.interface, self.queue = interface, _counted("queue", queue, 65535)
        if frames is not None:
            _power_of_two("frames", frames)
        ring = _power_of_two("ring", ring)
        busy_poll = _counted("busy_poll", busy_poll, 1_000_000)
        _word("copy", copy, (None, True, False))
        _word("need_wakeup", need_wakeup, (None, True, False))
        _word("load_program", load_program, (True, False))
        _word("multi_buffer", multi_buffer, (None, True, False))
        _word("mode", mode, ("auto", "native", "generic"))
        given = {"frames": frames, "frame_size": frame_size, "need_wakeup": need_wakeup, "multi_buffer": multi_buffer}
        self._options = dict(share._options if share else UMEM_OPTIONS)
        for name, value in given.items():
            if share and value not in (None, self._options[name]):
                raise ValueError(f"{name} is that of the UMEM, {self._options[name]}, not {value}")
            if value is not None:
                self._options[name] = type(self._options[name])(value)
        self._frames, self.frame_size = self._options["frames"], self._options["frame_size"]
        self.mode = ""
        self._program: tuple[bpf.Object, bpf.Link] | None = None
        self._hands = _Hands()
        info = interface_info(interface)
        if not info.up:
            raise KernelError(f"interface {interface} is down; bring it up: ip link set {interface} up")
        self._ifindex = info.index

        def begin(other: Any) -> None:
            if share and copy not in (None, not share.zero_copy):
                raise ValueError(f"copy is that of the UMEM, {not share.zero_copy}, not {copy}")
            self._bind(share, other, ring, copy, memory_file)
            try:
                self._pool.joined(self._xsk, info.index, self.queue)
                if busy_poll and (rc := lib.crab_xsk_busy_poll(self._xsk, busy_poll, BUSY_BUDGET)):
                    raise XskError(f"this kernel does not busy poll (Linux 5.11 does): {os.strerror(-rc)}", -rc)
                self.zero_copy = bool(lib.crab_xsk_zero_copy(self._xsk))
                self.multi_buffer = bool(lib.crab_xsk_frags(self._xsk))
                self.memory, self.umem = self._pool.whole, self._umem.memory
                if load_program:
                    self._load(info.index, mode)
            except BaseException:
                self.close()
                raise

        if share:
            share._using(begin)
        else:
            begin(ffi.NULL)

    def _bind(self, share: XskSocket | None, other: Any, ring: int, copy: bool | None, memory_file: bool) -> None:
        """``other``: ``share``'s C socket."""
        flags = lib.CRAB_BIND_NEED_WAKEUP if self._options["need_wakeup"] else 0
        flags |= lib.CRAB_BIND_FRAGS if self._options["multi_buffer"] else 0
        flags |= {None: 0, True: lib.CRAB_BIND_COPY, False: lib.CRAB_BIND_ZEROCOPY}[copy]
        error, stage = ffi.new("int *"), ffi.new("char **")
        try:
            file = _memory_file(self._frames, self.frame_size) if memory_file and not share else -1
            self._pool = share._pool if share else _Pool(self._frames, self.frame_size, file)
        except MemoryError:
            raise XskError(_explain(self.interface, self.queue, "umem", errno.ENOMEM), errno.ENOMEM) from None
        self._umem = self._pool.umem
        if share and (number := self._pool.share()):
            raise XskError(f"{share!r} cannot share its UMEM: {os.strerror(number)}", number)
        xsk = lib.crab_xsk_new(self._pool.c, other, self._ifindex, self.queue, ring, flags, error, stage)
        if not xsk:
            where = bytes(ffi.string(stage[0])).decode()
            raise XskError(_explain(self.interface, self.queue, where, error[0]), error[0])
        self._have(xsk)

    def _have(self, xsk: Any) -> None:
        self._xsk = ffi.gc(xsk, lambda c, umem=self._pool.c: lib.crab_xsk_free(c))  # which has to outlive it
        self._pool.hands.append(self._hands)
        _open.add(self)

    def _load(self, ifindex: int, mode: Literal["auto", "native", "generic"]) -> None:
        program = bpf.Object(bpf.object_path("xsk"), frags=self.multi_buffer)
        try:
            program.map("sockets").update(self.queue, self.fd)
            try:
                link = program.program("crab_xsk").attach_xdp(ifindex, mode)
            except bpf.BpfBusyError as busy:
                raise bpf.BpfBusyError(
                    f"{self.interface} has an XDP program already (id {bpf.xdp_program(ifindex)[0]});"
                    " remove it, or pass load_program=False and register() in its XSKMAP",
                    busy.errno,
                ) from None
        except BaseException:
            program.close()
            raise
        self._program = program, link
        self.mode = link.mode

    def register(self, sockets: bpf.Map, slot: int | None = None) -> None:
        """Put this socket into an XSKMAP, under ``slot`` (default: its queue's number)."""
        at = self.queue if slot is None else _counted("slot", slot, 0xFFFFFFFF)
        self._using(lambda _: sockets.update(at, self.fd))

    # ---- from one process to the next ----

    def bound(self) -> Bound:
        """What :meth:`adopt` has to know in another process."""
        out = ffi.new("struct crab_xsk_bound *")
        self._using(lambda xsk: lib.crab_xsk_is_bound(xsk, out))
        return Bound(
            self.interface, out.ifindex, self.queue, out.ring_size, out.bind_flags, self._frames, self.frame_size
        )

    @property
    def files(self) -> tuple[int, int]:
        """The socket's descriptor, and that of its memory, for another process; they stay this one's."""
        return self.fd, self._pool.file.fd

    @classmethod
    def adopt(cls, bound: Bound, files: tuple[int, int]) -> Self:
        """Get ready for a socket of another process, which uses it still; :meth:`take` begins.

        ``files``: its :attr:`files`, as they have come here; ours from now on.  Raises :class:`XskError`.
        """
        self = cls.__new__(cls)
        self.interface, self.queue = bound.interface, bound.queue
        self._frames, self.frame_size = bound.frames, bound.frame_size
        self._options = UMEM_OPTIONS | {
            "frames": bound.frames,
            "frame_size": bound.frame_size,
            "need_wakeup": bool(bound.flags & lib.CRAB_BIND_NEED_WAKEUP),
            "multi_buffer": bool(bound.flags & lib.CRAB_BIND_FRAGS),
        }
        self.mode, self._program, self._hands = "", None, _Hands()
        self._ifindex = bound.ifindex
        sock = _File(files[0])
        error, stage = ffi.new("int *"), ffi.new("char **")
        try:
            self._pool = _Pool(bound.frames, bound.frame_size, files[1])
        except MemoryError:
            raise XskError(_explain(bound.interface, bound.queue, "umem", errno.ENOMEM), errno.ENOMEM) from None
        self._umem = self._pool.umem
        how = ffi.new("struct crab_xsk_bound *", (bound.ifindex, bound.queue, bound.ring, bound.flags))
        xsk = lib.crab_xsk_adopt(self._pool.c, sock.fd, how, error, stage)
        if not xsk:
            where = bytes(ffi.string(stage[0])).decode()
            raise XskError(_explain(bound.interface, bound.queue, where, error[0]), error[0])
        sock.fd = -1
        self._have(xsk)
        self.zero_copy = bool(lib.crab_xsk_zero_copy(xsk))
        self.multi_buffer = bool(lib.crab_xsk_frags(xsk))
        self.memory, self.umem = self._pool.whole, self._umem.memory
        return self

    def give(self, free: npt.NDArray[np.uint64]) -> Given:
        """What is known of the frames, while nobody uses the socket; ``free``: room for the addresses of all, shape
        (frames,), of which the first ``free_count`` are those of free ones."""
        out = ffi.new("struct crab_xsk_given *")
        self._using(lambda xsk: lib.crab_xsk_give(xsk, out, ffi.from_buffer("uint64_t[]", free)))
        return Given(out.in_fill, out.in_tx, out.free_count, out.dropped)

    def take(self, given: Given, free: npt.NDArray[np.uint64]) -> None:
        """Begin to use what another process has given."""
        values = ffi.new("struct crab_xsk_given *", (given.in_fill, given.in_tx, given.free_count, given.dropped))
        self._using(lambda xsk: lib.crab_xsk_take_over(xsk, values, ffi.from_buffer("uint64_t[]", free)))

    @property
    def moved(self) -> bool:
        """Whether another process has used the socket since it was given."""
        return self._using(lambda xsk: bool(lib.crab_xsk_moved(xsk)))

    @property
    def handle(self) -> Any:
        """The C socket (``struct crab_xsk *``), for native code."""
        return self._using(lambda xsk: xsk)

    @property
    def fd(self) -> int:
        """The descriptor; -1 when closed."""
        return int(lib.crab_xsk_fd(self._xsk)) if self._xsk else -1

    def fileno(self) -> int:
        """Readable when frames have come: for select, asyncio and the like.  -1 when closed."""
        return self.fd

    def _in_turn(self, do: Callable[[], T]) -> T:
        """Nobody else uses the UMEM meanwhile.

        The interpreter itself lets go of the lock: a generator (contextlib's) that is interrupted in its last steps
        keeps it for as long as somebody keeps the exception.  Raises :class:`XskError` in the middle of itself, by what
        a signal calls.
        """
        pool = self._pool
        if pool.lock._is_owned():  # type: ignore[attr-defined]
            which = f"the AF_XDP socket on queue {self.queue} of {self.interface}"
            raise XskError(f"{which} is in use, by what was interrupted; note what is to be done", errno.EBUSY)
        try:
            with pool.lock:
                done = do()
            return done
        finally:
            while pool.closing:
                pool.closing.pop().close()

    def _using(self, do: Callable[[Any], T]) -> T:
        """The same, with the C socket.  Raises :class:`XskError` if it is closed."""

        def with_it() -> T:
            if not self._xsk:
                which = f"the AF_XDP socket on queue {self.queue} of {self.interface}"
                raise XskError(f"{which} {self._closed_as}", errno.EBADF)
            return do(self._xsk)

        return self._in_turn(with_it)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for frames, at most ``timeout`` seconds; False if none came.

        Raises :class:`XskError` if the interface is gone, or the socket closed meanwhile; :class:`ValueError` for what
        is no time.
        """
        if timeout is not None and math.isnan(timeout):
            raise ValueError(f"timeout is a number of seconds, or None, not {timeout}")
        end = None if timeout is None else time.monotonic() + timeout
        poll = select.poll()

        def begin(_: Any) -> bool:
            poll.register(self.fd, select.POLLIN)
            return bool(self._hands.received.got[0])

        if self._using(begin):
            return True
        while True:
            # What came free since may be what it takes to receive.
            self._using(lambda _: lib.crab_umem_settle(self._pool.c))
            left = 1.0 if end is None else max(0.0, min(1.0, end - time.monotonic()))
            events = poll.poll(left * 1000)
            # An interface that goes is only seen by looking: see crab_xsk_error.
            failed = self._using(lambda xsk: 0 if events else lib.crab_xsk_error(xsk))  # noqa: B023
            if failed or (events and events[0][1] & (select.POLLERR | select.POLLNVAL)):
                raise XskError(f"interface {self.interface} is gone", errno.ENETDOWN)
            if events or (end is not None and time.monotonic() >= end):
                return bool(events)

    def receive(self, n: int = 64) -> Batch:
        """Take up to ``n`` frames that have come (none: an empty batch).  They are yours until sent or released.

        With ``multi_buffer`` a batch has whole packets only: ``n`` is 64 or more, so that any fits in.
        """
        n = min(_counted("n", n, sys.maxsize), self._frames)
        if self.multi_buffer and n < lib.CRAB_MAX_FRAGS:
            raise ValueError(f"with multi_buffer take {lib.CRAB_MAX_FRAGS} frames or more, not {n}")
        hand = self._hands.received

        def fill(xsk: Any) -> tuple[npt.NDArray[Any], Batch, npt.NDArray[Any], int]:
            if not hand.got[0]:  # else a call that was interrupted has received them
                hand.fill(xsk, n, self._umem, received=True)
            descs = hand.descs[: hand.got[0]]
            batch, rest = Batch(descs[:n], self._umem, hand.ticket), descs[n:]
            if len(rest):  # of a call that was for more
                whole = int(np.flatnonzero(np.concatenate(([True], ~batch.more)))[-1])
                batch, rest = Batch(descs[:whole], self._umem, hand.ticket), descs[whole:]
            return hand.descs, batch, rest, len(rest)

        while True:
            filled, batch, rest, left = self._using(fill)
            # Nothing is called from here on, so that neither a signal's handler nor another thread has its turn.
            if hand.descs is filled:
                hand.descs = rest
                hand.got[0] = left
                return batch

    def allocate(self, n: int, length: int) -> Batch:
        """Up to ``n`` free frames of ``length`` bytes to write into and send; fewer if fewer are free."""
        n = min(_counted("n", n, sys.maxsize), self._frames)
        length = _counted("length", length, 0xFFFFFFFF)
        hand = self._hands.allocated

        def fill(xsk: Any) -> tuple[npt.NDArray[Any], Batch]:
            hand.give_back(xsk, self._umem)  # what a call that was interrupted has got
            hand.fill(xsk, n, self._umem, received=False)
            batch = Batch(hand.descs[: hand.got[0]], self._umem, hand.ticket)
            batch.descs["len"] = length
            return hand.descs, batch

        while True:
            filled, batch = self._using(fill)
            # As above.
            if hand.descs is filled:
                hand.got[0] = 0
                return batch

    def _hand_in(self, batch: Batch, *, send: bool) -> int:
        """Its frames, from the caller's hands; how many are sent.  Raises :class:`FrameError`, :class:`XskError`."""
        sent = ffi.new("uint32_t *")

        def hand_in(xsk: Any) -> int:
            if not isinstance(batch, Batch) or batch._umem is not self._umem:
                raise FrameError(
                    f"{batch!r} is no batch of this socket's UMEM: receive(), allocate(), select() give them"
                )
            descs = np.array(batch.descs)  # what is looked at is what is used
            self._umem.owned(descs, batch._ticket)
            if send:
                self._umem.sendable(descs, MOST_PARTS if self.multi_buffer else 1)
            c = ffi.from_buffer("struct crab_desc[]", descs)
            return int(lib.crab_xsk_hand_in(xsk, c, len(descs), send, self._umem.tickets, batch._ticket, sent))

        rc = self._using(hand_in)
        if rc == -errno.EEXIST:
            raise FrameError("a frame is in the batch twice")
        if rc:
            raise XskError(f"cannot send on {self.interface}: {os.strerror(-rc)}", -rc)
        return int(sent[0])

    def release(self, batch: Batch) -> None:
        """Give frames back without sending them.

        Raises :class:`FrameError`, and does nothing, if one of them is not in your hands (any more).
        """
        self._hand_in(batch, send=False)

    def send(self, batch: Batch) -> int:
        """Send frames; returns how many the TX ring took.  The rest are released, unsent.

        Raises :class:`FrameError`, and does nothing, if one of them is not in your hands (any more), or is shorter than
        an Ethernet header or longer than its room; :class:`XskError` if the interface is gone.
        """
        return self._hand_in(batch, send=True)

    def statistics(self) -> dict[str, int]:
        """The kernel's counters of this socket (``struct xdp_statistics``), and ``tx_dropped``."""
        out = ffi.new("struct crab_xsk_stats *")
        rc, dropped = self._using(lambda xsk: (lib.crab_xsk_statistics(xsk, out), int(lib.crab_xsk_dropped(xsk))))
        if rc:
            raise XskError(f"cannot read the statistics of {self.interface}: {os.strerror(-rc)}", -rc)
        counters = {name: int(getattr(out, name)) for name, _ in ffi.typeof("struct crab_xsk_stats").fields}
        return counters | {"tx_dropped": dropped}

    def frames(self) -> dict[str, int]:
        """Where the UMEM's frames are, by whichever socket; ``all`` is the sum of the others."""

        def look(xsk: Any) -> dict[str, int]:
            for hands in self._pool.hands:
                hands.allocated.give_back(xsk, self._umem)
            lib.crab_umem_settle(self._pool.c)
            places = self._pool.places()
            coming = sum(hands.received.got[0] for hands in self._pool.hands)
            return places | {"held": places["held"] - coming, "receiving": places["receiving"] + coming}

        return self._using(look)

    def close(self) -> None:
        """Detach the program, close the socket.  Idempotent.

        The last socket of a UMEM takes its frames along: batches cannot be had any more; an array that was a frame is
        memory of your own from now on.  Of one of several, what it had in its rings (received, not taken; to be
        received into) comes back when one of them binds its queue again, or makes a socket after its interface is gone.

        From a signal's handler that has interrupted a call: as soon as that is done.
        """
        if self._pool.lock._is_owned():  # type: ignore[attr-defined]
            self._pool.closing.append(self)
        else:
            self._in_turn(self._close)

    def _close(self) -> None:
        xsk, self._xsk = self._xsk, None
        if not xsk:
            return
        try:
            if self._program:
                program, link = self._program
                self._program = None
                with suppress(bpf.BpfError):  # the interface is gone
                    link.detach()
                link.close()
                program.close()
        finally:
            self._hands.received.give_back(xsk, self._umem)
            self._hands.allocated.give_back(xsk, self._umem)
            self._pool.hands.remove(self._hands)
            self._pool.close(xsk, self._ifindex, self.queue)

    def _forked(self) -> None:
        """In a child: let go of what keeps the queue and the program, and leave them to the parent."""
        self._pool.lock = threading.RLock()  # another thread of the parent's may have had it
        xsk, self._xsk, self._closed_as = self._xsk, None, "belongs to the process that forked this one; open another"
        if xsk:
            lib.crab_xsk_forked(xsk)
            self._umem.revoke()
        if self._program:
            program, link = self._program
            self._program = None
            link.close()
            program.close()

    def __reduce__(self) -> NoReturn:
        raise TypeError("an XskSocket is one of a kind: it cannot be copied or pickled")

    def __enter__(self) -> Self:
        self._using(lambda _: None)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<XskSocket {self.interface}/{self.queue}{'' if self._xsk else ', closed'}>"

    def __del__(self) -> None:
        if self._xsk:
            warnings.warn(f"unclosed {self!r}", ResourceWarning, stacklevel=2, source=self)
            self.close()


#: To be let go of by the children of this process.
_open: weakref.WeakSet[XskSocket] = weakref.WeakSet()


def _forked() -> None:
    for xsk in list(_open):
        xsk._forked()


os.register_at_fork(after_in_child=_forked)
