"""Frames of one's own, beside the services: a function gets those that match, in batches; it says what goes out."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import structlog

from crablb import carried
from crablb._native import ffi, lib
from crablb.errors import ConfigError
from crablb.kernel.xsk import DESC, Batch, Umem
from crablb.model import Address, mapped
from crablb.seldom import Seldom

__all__ = ["Frames", "Handle", "Handlers", "Match"]

log = structlog.get_logger()

#: ``struct crab_handled``.
HANDLED = np.dtype(
    [("data", "u8"), ("len", "u4"), ("ifindex", "u4"), ("handler", "u2"), ("verdict", "u2"), ("pad", "u4")]
)
#: IP protocols with ports where TCP has them: TCP, UDP, DCCP, SCTP, UDP-Lite.
WITH_PORTS = (6, 17, 33, 132, 136)


@dataclass(frozen=True, slots=True)
class Match:
    """Which frames a handler takes: those that have all that is named, and are no service's.

    A frame's EtherType is that inside of up to two VLAN tags.  A fragment other than the first has no port, nor has an
    IPv6 packet with extension headers.  Raises :class:`ConfigError` for what cannot be.
    """

    ethertype: int | None = None
    protocol: int | None = None  # of IP: 17 is UDP
    port: int | None = None  # destination port; with a protocol that has ports
    address: Address | None = None  # destination address

    def __post_init__(self) -> None:
        problems = []
        if all(getattr(self, name) is None for name in self.__slots__):
            problems.append("a match has to name something: all frames would be taken, the kernel's ARP with them")
        for name, most in (("ethertype", 0xFFFF), ("protocol", 0xFF), ("port", 0xFFFF)):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and 0 <= value <= most):
                problems.append(f"{name} is a number from 0 to {most}, not {value!r}")
        if self.port is not None and self.protocol not in WITH_PORTS:
            problems.append(f"a port needs a protocol that has ports: one of {', '.join(map(str, WITH_PORTS))}")
        if self.address is not None and not isinstance(self.address, Address):
            problems.append(f"address is an IPv4Address or an IPv6Address, not {self.address!r}")
        if problems:
            raise ConfigError(problems)

    def fill(self, entry: Any) -> None:
        """Write it into a ``struct crab_match``."""
        for name, value, flag in (
            ("ethertype", self.ethertype, lib.CRAB_MATCH_ETHERTYPE),
            ("proto", self.protocol, lib.CRAB_MATCH_PROTO),
            ("port", self.port, lib.CRAB_MATCH_PORT),
            ("addr", self.address, lib.CRAB_MATCH_ADDR),
        ):
            if value is None:
                continue
            entry.fields |= flag
            if isinstance(value, int):
                in_network_order = name in ("ethertype", "port")
                setattr(entry, name, int.from_bytes(value.to_bytes(2, "big"), "little") if in_network_order else value)
            else:
                entry.addr = mapped(value)

    def __str__(self) -> str:
        named = ((name, getattr(self, name)) for name in self.__slots__)
        return ", ".join(f"{name} {value}" for name, value in named if value is not None)


class Frames(Batch):
    """Frames that a handler got: a :class:`crablb.kernel.xsk.Batch`, valid until it returns.

    ``frames[i]`` is the frame itself, a ``uint8`` array; ``lengths`` and ``interfaces`` are writable, shape (n,).
    """

    __slots__ = ("_room", "interfaces")

    def __init__(
        self,
        descs: npt.NDArray[Any],
        umem: Umem,
        interfaces: npt.NDArray[np.uint32],
        room: npt.NDArray[Any],
    ) -> None:
        super().__init__(descs, umem, umem.issue(descs))
        self.interfaces = interfaces  # ifindex: came in by; goes out by, if it is sent
        self._room = room

    @property
    def room(self) -> npt.NDArray[np.uint32]:
        """Bytes that each frame may grow to, shape (n,)."""
        return self._room.astype(np.uint32)


#: Gets frames; returns which of them are to be sent, a boolean array of shape (n,).  The others are done with, as are
#: all if it returns None.
Handle = Callable[[Frames], npt.ArrayLike | None]


def check(match: Match, there: Collection[Match]) -> None:
    """Raises :class:`ConfigError` if it is no match, there is a handler for it already, or no room for one."""
    if not isinstance(match, Match):
        raise ConfigError(f"{match!r} is no Match: write Match(protocol=17, port=53), for example")
    if match in there:
        raise ConfigError(f"there is a handler for {match} already")
    if len(there) == lib.CRAB_MAX_MATCHES:
        raise ConfigError(f"there are {lib.CRAB_MAX_MATCHES} handlers already, and no room for more")


class Handlers:
    """All handlers of a load balancer, called by the workers once a batch.

    ``failed`` is called, from a worker's thread, for each batch that a handler fails; its frames are dropped then.
    """

    def __init__(self, failed: Callable[[Match, str], None]) -> None:
        self._failed = failed
        self._numbers: dict[Match, int] = {}
        # By number; a number is never used again, for a batch on its way may still name it.
        self._functions: Mapping[int, tuple[Match, Handle]] = {}
        self._next = 0
        self._seldom = Seldom()
        self._lock = threading.Lock()  # handlers are called by one worker at a time

    def add(self, match: Match, function: Handle) -> None:
        """Raises :class:`ConfigError` if there is one for it, or no room."""
        check(match, self._numbers)
        if self._next > 0xFFFF:
            raise ConfigError("65,536 handlers have been added since the start; restart the program")
        self._numbers[match] = self._next
        self._functions = {**self._functions, self._next: (match, function)}
        self._next += 1

    def remove(self, match: Match) -> None:
        number = self._numbers.pop(match)
        self._functions = {n: known for n, known in self._functions.items() if n != number}

    def matches(self) -> Any:
        """A ``struct crab_matches *``, in the order in which they were added."""
        matches = ffi.new("struct crab_matches *")
        matches.count = len(self._numbers)
        for entry, (match, number) in zip(matches.list, self._numbers.items(), strict=False):
            match.fill(entry)
            entry.handler = number
        return matches

    def run(self, handled: npt.NDArray[np.void], umem: Umem) -> None:
        """Fill in the verdict of every frame, a :data:`HANDLED`."""
        functions = self._functions
        with self._lock:
            for number in np.unique(handled["handler"]).tolist():
                mine = np.flatnonzero(handled["handler"] == number)
                known = functions.get(number)
                if known:
                    handled[mine] = self._call(handled[mine], umem, *known)
                else:  # it was removed meanwhile, and nobody wants them: given back
                    handled["verdict"][mine] = lib.CRAB_HANDLED_KEPT

    def _call(self, handled: npt.NDArray[Any], umem: Umem, match: Match, handle: Handle) -> npt.NDArray[Any]:
        descs = np.zeros(len(handled), DESC)
        descs["addr"] = handled["data"] - umem.memory.ctypes.data
        descs["len"] = handled["len"]
        room = umem.room(descs["addr"])
        frames = Frames(descs, umem, handled["ifindex"], room)
        try:
            answer = handle(frames)
            sent = np.zeros(len(handled), np.bool_) if answer is None else np.asarray(answer)
            if sent.shape != descs.shape or sent.dtype.kind != "b":
                raise ValueError(f"it returned {sent.dtype} of shape {sent.shape}, not booleans of shape {descs.shape}")
            wrong = sent & ((descs["len"] < 14) | (descs["len"] > room))
            if wrong.any():
                i = int(wrong.argmax())
                raise ValueError(f"it made a frame of {descs['len'][i]} bytes, not of 14 to {room[i]}")
        except BaseException as error:  # whatever somebody's handler does
            if carried.carries() and not isinstance(error, Exception):
                raise  # Ctrl-C, out of process_once
            with suppress(Exception):  # the log or the event loop may be closed; frames are dropped all the same
                self._complain(match, f"{type(error).__name__}: {error}")
            handled["verdict"] = lib.CRAB_HANDLED_FAILED
            return handled
        finally:
            umem.revoke()
        handled["verdict"] = np.where(sent, lib.CRAB_HANDLED_SEND, lib.CRAB_HANDLED_KEPT)
        handled["len"] = descs["len"]
        return handled

    def _complain(self, match: Match, reason: str) -> None:
        self._failed(match, reason)
        if self._seldom.due(match):
            log.error("handler failed; its frames are dropped", match=str(match), reason=reason)


class Entrance:
    """Where one worker calls the handlers from: they see its UMEM."""

    def __init__(self, handlers: Handlers, umem: npt.NDArray[np.uint8], frame_size: int) -> None:
        self._handlers, self._umem = handlers, Umem(umem, frame_size, lib.CRAB_WHOLE)
        self.handle = ffi.new_handle(self)

    def run(self, handled: npt.NDArray[np.void]) -> None:
        self._handlers.run(handled, self._umem)


@ffi.def_extern(onerror=carried.keep)  # type: ignore[untyped-decorator]
def crab_python_handle(context: Any, frames: Any, n: int) -> None:
    """The workers' call, with the GIL."""
    array = np.frombuffer(ffi.buffer(frames, n * HANDLED.itemsize), HANDLED)
    ffi.from_handle(context).run(array)
