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
import os
import select
import time
from collections.abc import Iterator
from typing import Any, Literal, Self

import numpy as np
import numpy.typing as npt

from crablb._native import ffi, lib
from crablb.errors import KernelError
from crablb.kernel import bpf
from crablb.kernel.interface import interface_info

__all__ = ["DESC", "Batch", "XskError", "XskSocket"]

#: ``struct crab_desc``: a frame's address in the UMEM, its length in bytes, 1 if its packet goes on in the next one.
DESC = np.dtype([("addr", "<u8"), ("len", "<u4"), ("more", "<u4")])
HEADROOM = 256  # bytes that the kernel leaves in front of a received frame


class XskError(KernelError):
    """An AF_XDP socket could not be made or failed; ``errno`` says why."""

    def __init__(self, what: str, number: int = 0) -> None:
        self.errno = number
        super().__init__(what)


def _explain(interface: str, queue: int, stage: str, number: int) -> str:
    if number == errno.EPERM:
        return "AF_XDP sockets need CAP_NET_RAW, and their program CAP_BPF and CAP_NET_ADMIN; run as root"
    if number == errno.EAFNOSUPPORT:
        return "this kernel has no AF_XDP; it needs CONFIG_XDP_SOCKETS=y"
    if stage == "bind":
        if number == errno.EBUSY:
            return (
                f"queue {queue} of {interface} has an AF_XDP socket of another program; stop that, or use another queue"
            )
        if number == errno.EINVAL:
            return f"{interface} has no queue {queue} (see ethtool -l {interface})"
        if number == errno.EOPNOTSUPP:
            return f"the driver of {interface} cannot bind in the mode asked for; leave the mode to the kernel"
        if number == errno.ENETDOWN:
            return f"interface {interface} is down; bring it up: ip link set {interface} up"
    if number == errno.ENOMEM:
        return f"no memory for the {stage} of queue {queue} of {interface}"
    return f"cannot make an AF_XDP socket on queue {queue} of {interface} ({stage}): {os.strerror(number)}"


class Batch:
    """Frames in the caller's hands: a sequence of views into the UMEM.

    ``descs`` is an array of :data:`DESC`, shape (n,).  ``batch[i]`` and iteration give ``uint8`` arrays that are the
    frames themselves, valid until the batch is sent or released.  Slices and masks give smaller batches.
    """

    __slots__ = ("_umem", "descs")

    def __init__(self, descs: npt.NDArray[Any], umem: npt.NDArray[np.uint8]) -> None:
        self.descs = descs
        self._umem = umem

    def __len__(self) -> int:
        return len(self.descs)

    def __getitem__(self, i: int) -> npt.NDArray[np.uint8]:
        addr = int(self.descs[i]["addr"])
        return self._umem[addr : addr + int(self.descs[i]["len"])]

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

    def select(self, mask: npt.NDArray[Any]) -> Batch:
        """The frames that a boolean mask or an index array picks."""
        return Batch(self.descs[mask], self._umem)

    def columns(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Bytes ``start`` to ``stop`` of every frame at once: a copy, shape (n, stop - start)."""
        offsets = self.descs["addr"].astype(np.int64)[:, None] + np.arange(start, stop)
        copied: npt.NDArray[np.uint8] = self._umem[offsets]
        return copied


class XskSocket:
    """An AF_XDP socket on one queue of an interface, with a UMEM of its own.

    With ``load_program`` (the default) a program is attached that hands every frame of the interface's bound queues to
    their sockets; without it, put the socket into your own XSKMAP with :meth:`register`.

    ``copy``: True for copy mode, False for zero-copy, None to try zero-copy first.  ``frame_size`` is 2048 or 4096
    bytes, of which 256 are headroom; ``frames`` and ``ring`` are powers of two.

    ``multi_buffer``: take packets too that do not fit into a frame, as there are where the MTU is larger: they lie in
    several frames of a batch, see :attr:`Batch.more`, which have to be sent or released together.  The attribute of
    that name says whether kernel (6.6) and driver do so; without it such packets are dropped.

    Raises :class:`XskError`, :class:`crablb.kernel.bpf.BpfError`, or :class:`KernelError` if the interface does not
    exist or is down.
    """

    def __init__(
        self,
        interface: str,
        queue: int = 0,
        *,
        frames: int = 4096,
        frame_size: int = 2048,
        ring: int = 2048,
        copy: bool | None = None,
        need_wakeup: bool = True,
        load_program: bool = True,
        mode: Literal["auto", "native", "generic"] = "auto",
        multi_buffer: bool = False,
    ) -> None:
        if frame_size not in (2048, 4096):
            raise ValueError(f"frame_size is 2048 or 4096 bytes, not {frame_size}")
        for name, value in (("frames", frames), ("ring", ring)):
            if value < 64 or value & (value - 1):
                raise ValueError(f"{name} is a power of two, 64 or more, not {value}")
        self.interface, self.queue = interface, queue
        self.frame_size = frame_size
        self._xsk: Any = None
        self._program: tuple[bpf.Object, bpf.Link] | None = None
        info = interface_info(interface)
        if not info.up:
            raise KernelError(f"interface {interface} is down; bring it up: ip link set {interface} up")
        flags = lib.CRAB_BIND_NEED_WAKEUP if need_wakeup else 0
        flags |= lib.CRAB_BIND_FRAGS if multi_buffer else 0
        flags |= {None: 0, True: lib.CRAB_BIND_COPY, False: lib.CRAB_BIND_ZEROCOPY}[copy]
        error, stage = ffi.new("int *"), ffi.new("char **")
        self._xsk = lib.crab_xsk_new(info.index, queue, frames, frame_size, ring, flags, error, stage)
        if not self._xsk:
            where = bytes(ffi.string(stage[0])).decode()
            raise XskError(_explain(interface, queue, where, error[0]), error[0])
        self.fd = int(lib.crab_xsk_fd(self._xsk))
        self.zero_copy = bool(lib.crab_xsk_zero_copy(self._xsk))
        self.multi_buffer = bool(lib.crab_xsk_frags(self._xsk))
        #: The UMEM, and behind it room to put one packet together in.
        self.memory: npt.NDArray[np.uint8] = np.frombuffer(
            ffi.buffer(lib.crab_xsk_umem(self._xsk), frames * frame_size + lib.CRAB_WHOLE), np.uint8
        )
        self.umem = self.memory[: frames * frame_size]
        self.mode = ""
        if load_program:
            try:
                self._load(info.index, mode)
            except BaseException:
                self.close()
                raise

    def _load(self, ifindex: int, mode: Literal["auto", "native", "generic"]) -> None:
        program = bpf.Object(bpf.object_path("xsk"), frags=self.multi_buffer)
        try:
            self.register(program.map("sockets"))
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
        sockets.update(self.queue if slot is None else slot, self.fd)

    @property
    def handle(self) -> Any:
        """The C socket (``struct crab_xsk *``), for native code."""
        return self._xsk

    def fileno(self) -> int:
        """Readable when frames have come: for select, asyncio and the like."""
        return self.fd

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for frames, at most ``timeout`` seconds; False if none came.

        Raises :class:`XskError` if the interface is gone.
        """
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            left = 1.0 if end is None else max(0.0, min(1.0, end - time.monotonic()))
            events = poll.poll(left * 1000)
            # An interface that goes is only seen by looking: see crab_xsk_error.
            failed = bool(events) and bool(events[0][1] & (select.POLLERR | select.POLLNVAL))
            if failed or (not events and lib.crab_xsk_error(self._xsk)):
                raise XskError(f"interface {self.interface} is gone", errno.ENETDOWN)
            if events or (end is not None and time.monotonic() >= end):
                return bool(events)

    def receive(self, n: int = 64) -> Batch:
        """Take up to ``n`` frames that have come (none: an empty batch).  They are yours until sent or released.

        With ``multi_buffer`` a batch has whole packets only: ``n`` is 64 or more, so that any fits in.
        """
        if self.multi_buffer and n < lib.CRAB_MAX_FRAGS:
            raise ValueError(f"with multi_buffer take {lib.CRAB_MAX_FRAGS} frames or more, not {n}")
        descs = np.empty(n, DESC)
        got = lib.crab_xsk_receive(self._xsk, ffi.from_buffer("struct crab_desc[]", descs), n)
        lib.crab_xsk_refill(self._xsk)
        return Batch(descs[:got], self.umem)

    def allocate(self, n: int, length: int) -> Batch:
        """Up to ``n`` free frames of ``length`` bytes to write into and send; fewer if fewer are free."""
        lib.crab_xsk_reap(self._xsk)
        descs = np.zeros(n, DESC)
        got = lib.crab_xsk_take(self._xsk, ffi.from_buffer("struct crab_desc[]", descs), n)
        descs["len"] = length
        return Batch(descs[:got], self.umem)

    def release(self, batch: Batch) -> None:
        """Give frames back without sending them."""
        descs = np.ascontiguousarray(batch.descs)
        lib.crab_xsk_release(self._xsk, ffi.from_buffer("struct crab_desc[]", descs), len(descs))

    def send(self, batch: Batch) -> int:
        """Send frames; returns how many the TX ring took.  The rest are released, unsent."""
        descs = np.ascontiguousarray(batch.descs)
        taken = int(lib.crab_xsk_send(self._xsk, ffi.from_buffer("struct crab_desc[]", descs), len(descs)))
        if taken < len(descs):
            self.release(Batch(descs[taken:], self.umem))
        rc = lib.crab_xsk_kick(self._xsk)
        lib.crab_xsk_reap(self._xsk)
        if rc:
            raise XskError(f"cannot send on {self.interface}: {os.strerror(-rc)}", -rc)
        return taken

    def statistics(self) -> dict[str, int]:
        """The kernel's counters of this socket (``struct xdp_statistics``), and ``tx_dropped``."""
        out = ffi.new("struct crab_xsk_stats *")
        rc = lib.crab_xsk_statistics(self._xsk, out)
        if rc:
            raise XskError(f"cannot read the statistics of {self.interface}: {os.strerror(-rc)}", -rc)
        counters = {name: int(getattr(out, name)) for name, _ in ffi.typeof("struct crab_xsk_stats").fields}
        return counters | {"tx_dropped": int(lib.crab_xsk_dropped(self._xsk))}

    def frames(self) -> dict[str, int]:
        """Where the UMEM's frames are; ``all`` is the sum of the others."""
        lib.crab_xsk_reap(self._xsk)
        out = ffi.new("struct crab_xsk_places *")
        lib.crab_xsk_frames(self._xsk, out)
        return {name: int(getattr(out, name)) for name, _ in ffi.typeof("struct crab_xsk_places").fields}

    def close(self) -> None:
        """Detach the program, close the socket; every batch and view becomes invalid."""
        if self._program:
            program, link = self._program
            link.close()
            program.close()
            self._program = None
        if self._xsk:
            lib.crab_xsk_free(self._xsk)
            self._xsk = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
