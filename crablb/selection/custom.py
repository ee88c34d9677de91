"""Policies in Python: asked by the workers once a batch, with NumPy arrays."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import structlog

from crablb import carried
from crablb._native import ffi, lib
from crablb.model import Vip
from crablb.seldom import Seldom
from crablb.selection.loads import Backends

__all__ = ["CHOICE", "Asked", "Choose", "Custom"]

log = structlog.get_logger()

#: ``struct crab_choice``: a connection that a policy is asked about.  Addresses are 16 bytes (IPv4-mapped); ``arrival``
#: is in nanoseconds of CLOCK_MONOTONIC, the same for a batch.
CHOICE = np.dtype(
    [
        ("client", "u1", 16),
        ("vip", "u1", 16),
        ("cport", ">u2"),
        ("vport", ">u2"),
        ("service", "<u4"),
        ("hash", "<u8"),
        ("arrival", "<u8"),
        ("isn", ">u4"),
        ("backend", "<u2"),
        ("pad", "<u2"),
    ]
)
assert CHOICE.itemsize == ffi.sizeof("struct crab_choice")

#: Gets the connections of a batch, an array of dtype :data:`CHOICE` and shape (n,), and the backends; returns for each
#: connection the index of a backend, shape (n,), or -1: the hash decides.
Choose = Callable[[npt.NDArray[np.void], Backends], npt.ArrayLike]


class Asked(NamedTuple):
    """A service whose policy is Python."""

    vip: Vip
    choose: Choose
    backends: Backends
    ids: npt.NDArray[np.uint16]  # of the backends, shape (backends,)


class Custom:
    """The services whose policy is Python, asked by the workers once a batch.

    ``failed`` is called, from a worker's thread, for each batch that a policy fails; the hash decides then.
    """

    def __init__(self, failed: Callable[[Vip, str], None]) -> None:
        self._failed = failed
        self._services: Mapping[int, Asked] = {}
        self._seldom = Seldom()
        self._lock = threading.Lock()  # policies are asked by one worker at a time
        self.handle = ffi.new_handle(self)

    def apart(self) -> Custom:
        """Another that asks in turn with this one, whose services are its own."""
        made = Custom(self._failed)
        made._lock, made._seldom = self._lock, self._seldom
        return made

    def publish(self, services: Mapping[int, Asked]) -> None:
        """Ask these from now on, by their index."""
        self._services = services

    def choose(self, choices: npt.NDArray[np.void]) -> None:
        """Fill in ``backend`` of every choice."""
        services = self._services
        with self._lock:
            for index in np.unique(choices["service"]).tolist():
                known = services.get(index)
                if known and len(known.backends):
                    mine = choices["service"] == index
                    choices["backend"][mine] = self._ask(choices[mine], known)

    def _ask(self, batch: npt.NDArray[np.void], asked: Asked) -> npt.NDArray[np.uint16]:
        vip, choose, backends, ids = asked
        try:
            chosen = np.asarray(choose(batch, backends))
            if chosen.shape != batch.shape or chosen.dtype.kind not in "iu":
                raise ValueError(
                    f"it returned {chosen.dtype} of shape {chosen.shape}, not integers of shape {batch.shape}"
                )
            chosen = chosen.astype(np.intp)
            if len(chosen) and not (chosen.min() >= -1 and chosen.max() < len(backends)):
                raise ValueError(
                    f"it returned indices from {chosen.min()} to {chosen.max()} of {len(backends)} backends"
                )
        except BaseException as error:  # whatever somebody's policy does
            if carried.carries() and not isinstance(error, Exception):
                raise  # Ctrl-C, out of process_once
            with suppress(Exception):  # the log or the event loop may be closed; connections are hashed all the same
                self._complain(vip, f"{type(error).__name__}: {error}")
            return np.full(len(batch), lib.CRAB_NO_BACKEND, np.uint16)
        backends.assigned(chosen[chosen >= 0])
        return np.where(chosen >= 0, ids[chosen], np.uint16(lib.CRAB_NO_BACKEND))

    def _complain(self, vip: Vip, reason: str) -> None:
        self._failed(vip, reason)
        if self._seldom.due(vip):
            log.error("policy failed; its connections are hashed", service=str(vip), reason=reason)


@ffi.def_extern(onerror=carried.keep)  # type: ignore[untyped-decorator]
def crab_python_choose(context: Any, choices: Any, n: int) -> None:
    """The workers' call, with the GIL."""
    array = np.frombuffer(ffi.buffer(choices, n * CHOICE.itemsize), CHOICE)
    ffi.from_handle(context).choose(array)
