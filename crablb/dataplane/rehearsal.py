"""What would become of a SYN: the hot loop's own code, on a frame that nobody sent, with a core and loads of its own.

Nothing that serves is changed by it: no flow is made, no turn taken, no connection counted.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import IPv4Address, ip_address
from typing import Any

import numpy as np

from crablb._native import ffi, lib
from crablb.dataplane.flows import FLOW, flow_hash, now
from crablb.dataplane.snapshot import FORMS, Sight, Snapshot, build
from crablb.dataplane.statistics import WORKER_COUNTERS
from crablb.kernel.checksum import checksum
from crablb.kernel.interface import Interface
from crablb.kernel.netlink import HopState, NextHop
from crablb.model import CONSISTENT, Address, Config, OptionForm, Service, Vip
from crablb.selection.custom import Custom
from crablb.selection.loads import WHOLE, Load
from crablb.selection.standing import Pair, Standing, Verdict, judge

__all__ = ["ACTIONS", "Asked", "Done", "Memory", "Rehearsal", "choice_hash", "rehearse", "slot", "syn"]

#: What an XDP program may return (linux/bpf.h, enum xdp_action).
ACTIONS = ("aborted", "drop", "pass", "tx", "redirect")
#: Room in front of a frame and behind it.
ROOM = 64
#: Who sends the frame: nobody's MAC address, locally administered.
SOMEBODY = bytes.fromhex("02637261626c")
#: What a Linux client sends: MSS, SACK permitted and timestamps, window scale.
LINUX = bytes.fromhex("020405b40402080a000000010000000001030307")
OFFERS = {OptionForm.CRAB: bytes.fromhex("2a020101"), OptionForm.EXPERIMENTAL: bytes.fromhex("fd044352")}
assert OFFERS.keys() == FORMS.keys()
MP_CAPABLE = bytes.fromhex("1e040101")


@dataclass(frozen=True, slots=True)
class Memory:
    """What is known of a connection that goes by fallback."""

    where: str  # "the XDP program", "queue 0 of eth0"
    backend: Any  # its id; in a :class:`Rehearsal` its address, or None
    state: str  # "new": its SYN is not acknowledged; "open", "ending"
    idle: int  # seconds


@dataclass(frozen=True, slots=True)
class Done:
    """What the hot loop did with a frame."""

    outcome: str  # name of the counter that went up, of :data:`crablb.dataplane.statistics.WORKER_COUNTERS`
    frame: bytes  # that goes out; empty: none
    ifindex: int  # of the interface that it goes out by
    beside: tuple[str, ...]  # counters of what was seen on the way


@dataclass(frozen=True, slots=True)
class Asked:
    """A SYN that might come."""

    client: Address
    port: int
    vip: Vip
    interface: Interface  # that it would come in by
    frame: bytes
    action: str  # of the XDP program
    down: frozenset[Address] = frozenset()  # backends that are taken to be unhealthy


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What would become of a SYN, and why."""

    interface: str  # that it would come in by
    frame: bytes
    action: str  # of the XDP program: "pass", "drop", "redirect" (to user space), ...
    verdict: Verdict | None = None  # None: no such service.  All below then says nothing
    known: tuple[Memory, ...] = ()
    connection: int = 0  # hash
    choice: int = 0  # hash that the table is asked by
    slot: int = -1
    seat: Address | None = None  # who has that slot
    asked: tuple[tuple[Address, int, Load], ...] = ()  # whom a policy chooses from: weight, load
    wanted: Service | None = None  # as the operator has it
    standings: Mapping[Pair, Standing] = field(default_factory=dict)  # of its backends
    hops: Mapping[Address, NextHop] = field(default_factory=dict)  # to its backends, as far as they are known
    assumed: frozenset[Address] = frozenset()  # backends whose way is not known, and was taken to be there
    done: Done | None = None
    backend: Address | None = None  # that it would go to
    hop: NextHop | None = None  # of that


def syn(
    client: Address,
    port: int,
    vip: Vip,
    mac: bytes,
    form: OptionForm | None,
    *,
    mptcp: bool = False,
    join: bytes | None = None,
) -> bytes:
    """The frame of a SYN as Linux sends it, from ``client`` and ``port``, to ``mac``; ``form``: of its offer, if it
    makes one; ``mptcp``: it would speak MPTCP; ``join``: token, 4 bytes, of the MPTCP connection that it joins."""
    options = LINUX
    if join is not None:
        options += bytes.fromhex("1e0c1001") + join + bytes.fromhex("63726162")
    elif mptcp:
        options += MP_CAPABLE
    options += OFFERS[form] if form else b""
    isn = 0x63726162
    tcp = struct.pack("!HHIIBBHHH", port, vip.port, isn, 0, (20 + len(options)) << 2, 2, 64240, 0, 0) + options
    addresses = client.packed + vip.address.packed
    pseudo = addresses + struct.pack("!II", len(tcp), 6)
    tcp = tcp[:16] + checksum(pseudo + tcp) + tcp[18:]
    if isinstance(client, IPv4Address):
        ip = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(tcp), 0, 0x4000, 64, 6, 0) + addresses
        ip = ip[:10] + checksum(ip) + ip[12:]
        return mac + SOMEBODY + b"\x08\x00" + ip + tcp
    return mac + SOMEBODY + b"\x86\xdd" + struct.pack("!IHBB", 0x60000000, len(tcp), 6, 64) + addresses + tcp


def choice_hash(seed: bytes, service: Service, client: Address, port: int) -> int:
    """What a service's table is asked by: the connection's hash, or with ``source-hash`` its client's."""
    if service.policy != "source-hash":
        return flow_hash(seed, client, port, service.vip.address, service.vip.port)
    bits = service.source_prefix[client.version == 6]
    width = client.max_prefixlen
    prefix = type(client)(int(client) >> (width - bits) << (width - bits))
    return flow_hash(seed, prefix, 0, type(client)(0), 0)


def slot(choice: int, table_size: int) -> int:
    """The slot of a table that a hash leads to (native/snapshot.h, crab_slot)."""
    return ((choice >> 32) * table_size) >> 32


def rehearse(
    asked: Asked,
    config: Config,
    sight: Sight,
    standings: Mapping[Pair, Standing],
    custom: Custom,
    remembered: Callable[[int], Sequence[Memory]],
    joins: Any,
) -> Rehearsal:
    """Have a core of its own work on the SYN.

    ``custom``: who asks policies in Python; ``remembered``: what is known of a connection, by its hash; ``joins``:
    ``struct crab_joins *``, MPTCP connections' tokens.
    """
    found = Rehearsal(asked.interface.name, asked.frame, asked.action)
    service = next((s for s in config.services if s.vip == asked.vip), None)
    if not service:
        return found
    down = {(asked.vip, a): replace(standings.get((asked.vip, a), Standing()), healthy=False) for a in asked.down}
    standings = {**standings, **down}
    verdict = judge(service, standings)
    ids, hops = dict(sight.backends), dict(sight.hops)
    assumed = frozenset(b.address for b in service.backends if b.address not in hops)
    for backend in service.backends:  # the way to one that was removed may be known still
        ids.setdefault(backend.address, max(ids.values(), default=-1) + 1)
    for address in assumed:
        hops[address] = NextHop(HopState.RESOLVED, dst_mac=bytes(6), src_mac=bytes(6), source=address, mtu=1500)
    balance = sight.balance.copy(asked.vip)
    for address in (b.address for b in service.backends):
        balance.give((asked.vip, address), standings.get((asked.vip, address), Standing()).percent or WHOLE)
    number = sight.services.get(asked.vip)
    services = {asked.vip: number or 0}
    apart = replace(sight, backends=ids, services=services, hops=hops, balance=balance, version=None, taps=None)
    connection = flow_hash(sight.seed, asked.client, asked.port, asked.vip.address, asked.vip.port)
    choice = choice_hash(sight.seed, service, asked.client, asked.port)
    known = tuple(remembered(connection))
    chosen_from = tuple(
        (b.address, b.share, balance.read(asked.vip, b.address))
        for b in verdict.service.backends
        if b.share and hops[b.address].state is HopState.RESOLVED and service.policy not in CONSISTENT
    )
    snapshot = build(replace(config, services=(verdict.service,)), apart)
    try:
        (table,) = snapshot.tables.values()
        place = slot(choice, config.table_size)
        done = _work(snapshot, custom, asked, connection, known, ffi.NULL if number is None else joins)
        names = {number: address for address, number in ids.items()}
        receiver = _receiver(done.frame, asked.vip, verdict.service, hops)
        return replace(
            found,
            verdict=verdict,
            known=tuple(replace(m, backend=names.get(m.backend)) for m in known),
            connection=connection,
            choice=choice,
            slot=place,
            seat=names.get(int(table[place])),
            asked=chosen_from,
            wanted=service,
            standings=standings,
            hops=sight.hops,
            assumed=assumed,
            done=done,
            backend=receiver,
            hop=hops.get(receiver) if receiver else None,
        )
    finally:
        snapshot.free()


def _receiver(frame: bytes, vip: Vip, service: Service, hops: Mapping[Address, NextHop]) -> Address | None:
    """Which backend a frame goes to: the one that it is addressed to, or by MAC address the one whose that is."""
    if not frame:
        return None
    four = frame[12:14] == b"\x08\x00"
    to = ip_address(frame[30:34] if four else frame[38:54])
    if to != vip.address:
        return next((b.address for b in service.backends if b.address == to), None)
    near = (b.address for b in service.backends if (hop := hops.get(b.address)) and hop.on_link)
    return next((address for address in near if hops[address].dst_mac == frame[:6]), None)


def _work(
    snapshot: Snapshot, custom: Custom, asked: Asked, connection: int, known: Sequence[Memory], joins: Any
) -> Done:
    counters = ffi.new("uint64_t[]", lib.CRAB_COUNTERS)
    core = lib.crab_core_new(64, counters)
    if not core:
        raise MemoryError("no memory for a rehearsal")
    try:
        apart = custom.apart()  # whose handle is to live as long as the core
        apart.publish(snapshot.custom)
        lib.crab_core_ask(core, lib.crab_python_choose, apart.handle)
        lib.crab_core_join(core, joins)
        at = now()
        settled = [memory for memory in known if memory.state != "new"][:1]
        flows = np.zeros(len(settled), FLOW)
        for flow, memory in zip(flows, settled, strict=True):
            state = lib.CRAB_FLOW_OPEN if memory.state == "open" else lib.CRAB_FLOW_ENDING
            flow["hash"], flow["backend"], flow["seen"], flow["state"] = connection, memory.backend, at & 0xFFFF, state
        lib.crab_core_adopt(core, ffi.from_buffer("struct crab_flow[]", flows), len(flows), at)
        lib.crab_core_publish(core, snapshot.c)
        return _run(core, counters, asked.frame, asked.interface.index, at)
    finally:
        lib.crab_core_publish(core, ffi.NULL)
        lib.crab_core_free(core)


def _run(core: Any, counters: Any, frame: bytes, ifindex: int, at: int) -> Done:
    memory = ffi.new("uint8_t[]", ROOM + len(frame) + ROOM)
    ffi.memmove(memory + ROOM, frame, len(frame))
    frames = ffi.new("struct crab_frame[1]")
    frames[0].data, frames[0].len, frames[0].ifindex = memory + ROOM, len(frame), ifindex
    lib.crab_core_batch(core, frames, 1, at)
    counted = [name for name, n in zip(WORKER_COUNTERS, counters, strict=False) if n and name != "received"]
    beside = tuple(name for name in counted if WORKER_COUNTERS.index(name) >= lib.CRAB_C_REASSIGNED)
    (outcome,) = [name for name in counted if name not in beside]
    out = bytes(ffi.buffer(frames[0].data, frames[0].len)) if frames[0].len else b""
    return Done(outcome, out, frames[0].ifindex, beside)
