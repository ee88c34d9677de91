"""What a load balancer hands over beside packets and flows, as plain values (:mod:`crablb.control.takeover`).

Each part says what of it goes over, and takes it; here is the form of it all.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import Any

import msgspec

from crablb.control.takeover import Offer, Predecessor
from crablb.errors import KernelError
from crablb.overlay import Changes

__all__ = ["Announced", "Door", "Heir", "Parts", "Rest", "Told"]


class Door(msgspec.Struct, frozen=True):
    """A socket that others come to; its descriptor is offered."""

    kind: str  # "api", "admin", "metrics", "reports"
    address: str  # a path, or host and port


class Parts(msgspec.Struct, frozen=True, kw_only=True):
    """What is offered: known before anything stops.  Descriptors: one for each door, then the log's."""

    seed: bytes = b""  # if the configuration does not say it: that of the file, or which is in no file
    admin_group: str = ""  # that the API's socket was to be given to
    changes: Changes = Changes()  # at run time
    health: Any = None  # what checks found out
    doors: tuple[Door, ...] = ()


class Told(msgspec.Struct, frozen=True):
    """The journal."""

    last: int = 0
    events: list[dict[str, Any]] = []


class Announced(msgspec.Struct, frozen=True):
    """VIPs that are held, by interface; whether they are withdrawn."""

    held: dict[str, list[str]] = {}
    withdrawn: bool = False


class Rest(msgspec.Struct, frozen=True, kw_only=True):
    """What is given at the end."""

    journal: Told = Told()
    serving: list[tuple[str, str, bool, float]] = []  # VIP, backend, whether it serves, since when (1970)
    draining: tuple[bool, int] = (False, 0)  # whether, open flows when that began
    log_level: str = ""  # as it was set at run time
    announced: Announced = Announced()
    reports: Any = None
    backends: dict[str, Any] = {}  # what the engine knows of them
    owed: bool = False  # whether somebody has asked for a reload since it began


class Heir:
    """What a successor has from its predecessor, for the parts that take it.

    Raises :class:`KernelError` if it is not what this version knows.
    """

    def __init__(self, predecessor: Predecessor) -> None:
        self.predecessor = predecessor
        # Process 0 is one that is not seen from here, be it this one's parent.
        self._child = bool(predecessor.pid) and os.getppid() == predecessor.pid
        self.rest = Rest()
        try:
            self.parts = msgspec.convert(predecessor.parts, Parts)
        except msgspec.ValidationError as error:
            raise KernelError(f"what is offered is not what this version knows: {error}") from None
        self._doors: dict[Door, socket.socket] = {}
        self._log = -1
        for door in self.parts.doors:
            if predecessor.sockets:
                self._doors[door] = socket.socket(fileno=predecessor.sockets.pop(0))
        if predecessor.sockets:
            self._log = predecessor.sockets.pop(0)

    def door(self, kind: str, address: str) -> socket.socket | None:
        """An open socket for it, the caller's from now on; None: there is none."""
        return self._doors.pop(Door(kind, address), None)

    def place(self) -> str:
        """The path of the API's UNIX socket; empty: there is none."""
        return next((door.address for door in self._doors if door.kind == "api"), "")

    def read_rest(self) -> Rest:
        """Once this one serves packets; what there is stays in ``rest``."""
        if (given := self.predecessor.rest()) is not None:
            try:
                self.rest = msgspec.convert(given, Rest)
            except msgspec.ValidationError as error:
                raise KernelError(f"what is given is not what this version knows: {error}") from None
        return self.rest

    @property
    def log(self) -> int:
        """The log's descriptor, if the predecessor has started this one; else -1."""
        return self._log if self._child else -1

    @property
    def orphaned(self) -> bool:
        """Whether the predecessor has started this one, and has ended since."""
        return self._child and os.getppid() != self.predecessor.pid

    def close(self) -> None:
        """What nobody has taken.  Idempotent."""
        for sock in self._doors.values():
            sock.close()
        self._doors.clear()
        if self._log >= 0:
            os.close(self._log)
            self._log = -1
        self.predecessor.close()


def offer(engine: tuple[Any, list[int]], parts: Parts, fds: Sequence[int]) -> tuple[Offer, list[int]]:
    """All of it, the engine's first."""
    values, own = engine
    return Offer(engine=values, fds=len(own), parts=parts), [*own, *fds]
