"""What workers are lent while another process takes over."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
from crablb._native import ffi, lib

from crablb.config import config_from_args
from crablb.dataplane.queues import _Worker
from crablb.errors import KernelError


class Busy(_Worker):
    """Its thread is in a batch, and may be for longer than anybody waits."""

    busy = False

    def _until_turned(self) -> None:
        if self.busy:
            raise KernelError("it does not turn")


def test_memory_is_kept_as_long_as_a_thread_may_write_into_it():
    """A batch that began before it was told to note nothing more notes what it changes all the same."""
    counters = ffi.new("uint64_t[]", lib.CRAB_COUNTERS)
    config = config_from_args(["eth0"], ["tcp://10.0.0.100:80=10.0.0.11"], flows=64)
    worker = Busy(config, counters, cast(Any, None), cast(Any, SimpleNamespace(handle=ffi.NULL)))
    memory = np.zeros(8, np.uint8)
    kept = weakref.ref(memory)
    worker.note(memory)
    del memory
    worker.busy = True
    with pytest.raises(KernelError):
        worker.note(None)
    assert kept() is not None
    worker.busy = False
    worker.note(None)
    assert kept() is None
    worker.busy = True
    worker.note(None)  # nobody has to wait for it
    worker.close()
