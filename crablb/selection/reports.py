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

Flags: 1, somebody listens; 2, MPTCP clients can be led past load balancers; and while connections are to leave one,
4 times (1 and how many have the VIP as their local address, up to 16,382).

In version 1 flags are zero, and nothing is said of redirects.  A load balancer answers in the version that it was
asked in; a server that hears nothing tries the other version, as one of before understands 1 only.

A load balancer that is being drained answers a report by the same message of kind 3, "leave": with the report's
session, challenge and number, and of its VIPs those that connections are to leave.  A server believes it of a report
that it has sent in the last seconds, to this load balancer (the challenge is that one's process'), and that no later
one was answered of; it holds for as long, unless it is said again.  Servers of before refuse it.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from ipaddress import ip_address
from typing import Any, Self

from crablb.model import Address, Vip, mapped, unmapped
from crablb.values import BACKEND_KEY, MASTER_KEY, PORT

__all__ = ["HOLD", "PORT", "Judge", "Message", "Refused", "VipReport", "derive", "new_master"]

REPORT, CHALLENGE, LEAVE = 1, 2, 3
#: Seconds after which a report is too old to be answered by "leave", and such an answer does not hold any more.
HOLD = 5.0
NO_CHALLENGE = bytes(24)
HEAD = struct.Struct("!4sBBH16s8s24sQI")
#: By version.
ENTRIES = {1: struct.Struct("!16sHHIII"), 2: struct.Struct("!16sHHIIIII")}
VERSION = 2
#: Flags: somebody listens on the port; MPTCP clients can be led past load balancers; and from bit 2 on, while
#: connections are to leave a load balancer, how many have the VIP as their local address, and 1: at most MOST_AT_VIP.
LISTENING, LEADS, AT_VIP = 1, 2, 2
MOST_AT_VIP = (1 << 14) - 2
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
    leads: bool | None = None  # likewise: whether the server leads MPTCP clients past load balancers
    at_vip: int | None = None  # connections that came by load balancers' fallback; None: not told, or too many


@dataclass(frozen=True, slots=True)
class Message:
    """A report, a challenge (which has no VIPs), or "leave"."""

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
                told = v.at_vip is not None and v.at_vip <= MOST_AT_VIP
                flags = LISTENING * bool(v.listening) | LEADS * bool(v.leads)
                flags |= ((v.at_vip or 0) + 1) << AT_VIP if told else 0
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
        if kind not in (REPORT, CHALLENGE, LEAVE) or len(data) != HEAD.size + entries * ENTRIES[version].size + MAC:
            raise Refused("reports_malformed")
        vips = []
        for address, port, flags, *numbers in ENTRIES[version].iter_unpack(data[HEAD.size : -MAC]):
            vip = VipReport(Vip(unmapped(address), port), *numbers[:3])
            if version > 1:
                vip = replace(
                    vip,
                    redirects=(numbers[3], numbers[4]),
                    listening=bool(flags & LISTENING),
                    leads=bool(flags & LEADS),
                    at_vip=(flags >> AT_VIP) - 1 if flags >> AT_VIP else None,
                )
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

    def export(self) -> dict[str, Any]:
        """What is known of the servers, as plain values that :meth:`adopt` takes; with the challenges' secret."""
        return {
            "secret": self._secret,
            "generation": self._generation,
            "sessions": [(str(a), s.generation, s.session, s.number) for a, s in self._sessions.items()],
            "floors": [(str(a), floor) for a, floor in self._floors.items()],
        }

    def adopt(
        self,
        secret: bytes,
        generation: int,
        sessions: Iterable[tuple[str, int, bytes, int]],
        floors: Iterable[tuple[str, int]],
    ) -> None:
        """Believe servers as another process did that this one goes on for.  Those it did not know are new.

        Raises ``ValueError``, and changes nothing, for what is no address."""
        known = {ip_address(text): floor for text, floor in floors}
        made = {ip_address(s[0]): _Session(s[1], s[2], s[3]) for s in sessions}
        self._secret, self._generation = secret, generation
        self._sessions = {address: session for address, session in made.items() if address in self._keys}
        self._floors = {a: known.get(a, generation) for a in self._keys}

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

    def leave(self, report: Message, vips: Sequence[Vip]) -> bytes:
        """The answer to a report that was believed: connections to these VIPs, of those in it, are to leave."""
        told = replace(report, kind=LEAVE, figure=0, vips=tuple(VipReport(vip, 0) for vip in vips))
        return told.encode(self._keys[report.backend])
