"""Reports: what servers tell load balancers about their load.  The messages, and who may be believed.

A report is a datagram with all that a server has to say, so a lost one is made good by the next.  It is authenticated
by HMAC-SHA256 under the backend's own key, which is derived from the load balancer's master key, so a server can speak
for itself only.  It carries a challenge that the load balancer has given, and a number that rises: a recorded report is
never believed again, whatever was restarted and whatever the clocks say.  One without a valid challenge is answered
by one.

    4  "CRLR"           8  session of the agent, random
    1  version         24  challenge: generation, and its MAC under a secret of the load balancer's process
    1  kind             8  number of the report, in its session
    2  entries          4  figure: load in thousandths
   16  backend             then for each VIP: address 16, port 2, flags 2, open 4, half open 4, accept queue 4,
                           redirects begun 4, completed 4 (modulo 2^32)
                       32  HMAC-SHA256 of all before

In version 1 flags are zero, and nothing is said of redirects.  A load balancer answers in the version that it was
asked in; a server that hears nothing tries the other version, as one of before understands 1 only.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from crablb.model import Address, Vip, mapped, unmapped
from crablb.values import BACKEND_KEY, MASTER_KEY, PORT

__all__ = ["PORT", "Judge", "Message", "Refused", "VipReport", "derive", "new_master"]

REPORT, CHALLENGE = 1, 2
NO_CHALLENGE = bytes(24)
HEAD = struct.Struct("!4sBBH16s8s24sQI")
#: By version.
ENTRIES = {1: struct.Struct("!16sHHIII"), 2: struct.Struct("!16sHHIIIII")}
VERSION = 2
LISTENING = 1  # flag: somebody listens on the port
MAC = 32
#: VIPs in one datagram, so that it needs no fragments (IPv6: 1,280 bytes).
MAX_ENTRIES = (1280 - 48 - HEAD.size - MAC) // ENTRIES[VERSION].size


class Refused(Exception):
    """A message that is not believed; ``counter`` is the name of the daemon's counter."""

    def __init__(self, counter: str) -> None:
        super().__init__(counter)
        self.counter = counter


def new_master() -> bytes:
    """A master key: 32 bytes, 24 of them random."""
    return MASTER_KEY + os.urandom(32 - len(MASTER_KEY))


def derive(master: bytes, backend: Address) -> bytes:
    """The key of one backend: 32 bytes, from a master key of 32.  If that says what it is, this one does too."""
    key = hmac.digest(master, b"crablb report key" + mapped(backend), hashlib.sha256)
    return BACKEND_KEY + key[len(BACKEND_KEY) :] if master.startswith(MASTER_KEY) else key


@dataclass(frozen=True, slots=True)
class VipReport:
    """Connections of one VIP and port at a server."""

    vip: Vip
    open: int
    half_open: int = 0
    queue: int = 0  # connections that wait to be accepted (they are open)
    #: Redirects begun and completed, modulo 2^32, and whether somebody listens; None: it is of version 1.
    redirects: tuple[int, int] | None = None
    listening: bool | None = None


@dataclass(frozen=True, slots=True)
class Message:
    """A report, or a challenge (which has no VIPs)."""

    kind: int
    backend: Address
    session: bytes  # 8 bytes
    challenge: bytes = NO_CHALLENGE
    number: int = 0
    figure: int = 0  # thousandths
    vips: tuple[VipReport, ...] = ()
    version: int = VERSION

    def encode(self, key: bytes) -> bytes:
        """As a datagram, at most 1,232 bytes.  ``key``: the backend's."""
        assert len(self.vips) <= MAX_ENTRIES
        limit = 2**32 - 1
        data = HEAD.pack(
            b"CRLR", self.version, self.kind, len(self.vips), mapped(self.backend), self.session, self.challenge,
            self.number, min(self.figure, limit),
        )  # fmt: skip
        for v in self.vips:
            numbers = [min(n, limit) for n in (v.open, v.half_open, v.queue)]
            flags = 0
            if self.version > 1:
                numbers += [n & limit for n in v.redirects or (0, 0)]
                flags = LISTENING * bool(v.listening)
            data += ENTRIES[self.version].pack(mapped(v.vip.address), v.vip.port, flags, *numbers)
        return data + hmac.digest(key, data, hashlib.sha256)

    @classmethod
    def claimed_backend(cls, data: bytes) -> Address:
        """Whose key to try.  Raises :class:`Refused` for what is no message of ours."""
        if len(data) < HEAD.size + MAC or data[:4] != b"CRLR" or data[4] not in ENTRIES:
            raise Refused("reports_malformed")
        return unmapped(HEAD.unpack_from(data)[4])

    @classmethod
    def decode(cls, data: bytes, key: bytes) -> Self:
        """Raises :class:`Refused`."""
        backend = cls.claimed_backend(data)
        if not hmac.compare_digest(hmac.digest(key, data[:-MAC], hashlib.sha256), data[-MAC:]):
            raise Refused("reports_forged")
        _, version, kind, entries, _, session, challenge, number, figure = HEAD.unpack_from(data)
        if kind not in (REPORT, CHALLENGE) or len(data) != HEAD.size + entries * ENTRIES[version].size + MAC:
            raise Refused("reports_malformed")
        vips = []
        for address, port, flags, *numbers in ENTRIES[version].iter_unpack(data[HEAD.size : -MAC]):
            vip = VipReport(Vip(unmapped(address), port), *numbers[:3])
            if version > 1:
                vip = replace(vip, redirects=(numbers[3], numbers[4]), listening=bool(flags & LISTENING))
            vips.append(vip)
        return cls(kind, backend, session, challenge, number, figure, tuple(vips), version)


@dataclass(slots=True)
class _Session:
    generation: int
    session: bytes
    number: int


class Judge:
    """The load balancer's side: tells which reports are to be believed."""

    def __init__(self, master: bytes) -> None:
        self._master = master
        self._secret = os.urandom(32)
        self._generation = 0
        self._sessions: dict[Address, _Session] = {}
        #: Challenges up to this generation were given before the backend was one (again): reports may be recorded ones.
        self._floors: dict[Address, int] = {}
        self._keys: dict[Address, bytes] = {}

    def follow(self, backends: Sequence[Address]) -> None:
        """Believe these backends, and no others."""
        self._keys = {address: derive(self._master, address) for address in backends}
        self._floors = {address: self._floors.get(address, self._generation) for address in backends}
        self._sessions = {a: s for a, s in self._sessions.items() if a in self._keys}

    def _mac(self, backend: Address, session: bytes, generation: int) -> bytes:
        text = mapped(backend) + session + generation.to_bytes(8, "big")
        return hmac.digest(self._secret, text, hashlib.sha256)[:16]

    def judge(self, data: bytes) -> tuple[Message | None, bytes | None]:
        """The report, if it is to be believed, or the challenge to be sent back.  Raises :class:`Refused`."""
        backend = Message.claimed_backend(data)
        key = self._keys.get(backend)
        if key is None:
            raise Refused("reports_unknown")
        message = Message.decode(data, key)
        if message.kind != REPORT:
            raise Refused("reports_malformed")
        generation = int.from_bytes(message.challenge[:8], "big")
        right = self._mac(backend, message.session, generation)
        if not hmac.compare_digest(right, message.challenge[8:]) or generation <= self._floors[backend]:
            self._generation += 1
            new = self._generation.to_bytes(8, "big") + self._mac(backend, message.session, self._generation)
            return None, replace(message, kind=CHALLENGE, challenge=new, vips=(), figure=0).encode(key)
        known = self._sessions.get(backend)
        if known and (generation, message.number) <= (known.generation, known.number):
            raise Refused("reports_replayed")
        self._sessions[backend] = _Session(generation, message.session, message.number)
        return message, None
