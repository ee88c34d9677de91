"""BPF ring buffers: what programs tell user space, in order (https://docs.kernel.org/bpf/ringbuf.html)."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any, Self

from crablb.kernel._libbpf import ffi, lib
from crablb.kernel.bpf.errors import check, error
from crablb.kernel.bpf.maps import Map

__all__ = ["Ring"]


class Ring:
    """The reader of a ring buffer; of each there may be one.  ``fileno()`` is readable when there is something to take.

    ``take`` gets each record, as bytes, while :meth:`consume` runs; the first error that it raises, consume raises when
    it is through.
    """

    def __init__(self, ring: Map, take: Callable[[bytes], None]) -> None:
        self._take = take
        self._raised: BaseException | None = None
        self._taken = 0
        self._most: int | None = None
        self._context = ffi.new_handle(self)
        self._ring = lib.ring_buffer__new(ring.fd, lib.crab_ring_sample, self._context, ffi.NULL)
        if not self._ring:
            raise error(f"cannot read ring buffer {ring.name}", -(ffi.errno or errno.EINVAL))

    def fileno(self) -> int:
        return int(lib.ring_buffer__epoll_fd(self._ring))

    def consume(self, most: int | None = None) -> int:
        """Take what there is, but no more than ``most`` records; how many they were."""
        self._taken, self._most = 0, most
        result = lib.ring_buffer__consume(self._ring)
        if result != -errno.ECANCELED:  # which is ours
            check(result, "cannot read a ring buffer")
        if self._raised:
            raised, self._raised = self._raised, None
            raise raised
        return self._taken

    def close(self) -> None:
        if self._ring:
            lib.ring_buffer__free(self._ring)
            self._ring = ffi.NULL

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def record(self, data: Any, size: int) -> int:
        self._taken += 1
        try:
            self._take(bytes(ffi.buffer(data, size)))
        except BaseException as raised:  # it cannot pass libbpf
            self._raised = self._raised or raised
        return -errno.ECANCELED if self._taken == self._most else 0


@ffi.def_extern()  # type: ignore[untyped-decorator]
def crab_ring_sample(context: Any, data: Any, size: int) -> int:
    return int(ffi.from_handle(context).record(data, size))
