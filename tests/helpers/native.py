"""The C hot loop, called from Python."""

from __future__ import annotations

import ipaddress
from typing import Any

from crablb._native import ffi, lib

from crablb import Match
from crablb.dataplane import statistics
from crablb.dataplane.handlers import Handlers
from tests.reference import packets

MODES = {"negotiated": lib.CRAB_MODE_NEGOTIATED, "always": lib.CRAB_MODE_ALWAYS, "never": lib.CRAB_MODE_NEVER}
FALLBACKS = {"auto": lib.CRAB_FALLBACK_AUTO, "l2": lib.CRAB_FALLBACK_L2, "ipip": lib.CRAB_FALLBACK_IPIP}
ON_DEAD = {"reassign": lib.CRAB_ON_DEAD_REASSIGN, "reset": lib.CRAB_ON_DEAD_RESET}
CANARY = 0xA5
ELSEWHERE = 1000


def mapped(address: bytes) -> bytes:
    return address if len(address) == 16 else bytes(10) + b"\xff\xff" + address


def flags(cr: bool, dead: bool) -> int:
    return cr * lib.CRAB_BACKEND_CR | dead * lib.CRAB_BACKEND_DEAD


class Core:
    """A core with the services and backends of a reference load balancer."""

    def __init__(self, reference: packets.LoadBalancer, flows: int = 4096, ifindex: int = 3) -> None:
        self.ifindex = ifindex  # that frames come in by; a backend that is elsewhere is behind ELSEWHERE more
        self.elsewhere = False  # whether the last frame left by another
        self.counters = ffi.new("uint64_t[]", lib.CRAB_COUNTERS)
        self.core = ffi.gc(lib.crab_core_new(flows, self.counters), lib.crab_core_free)
        self.joins = ffi.gc(lib.crab_joins_new(64), lib.crab_joins_free)
        lib.crab_core_join(self.core, self.joins)
        backends = ffi.new("struct crab_backend[]", max(1, len(reference.backends)))
        self.reference = reference
        for entry, b in zip(backends, reference.backends, strict=False):
            entry.addr, entry.dst_mac, entry.src_mac = mapped(b.address), b.mac, b.source_mac
            entry.tunnel_src, entry.mtu = mapped(b.source), b.mtu
            entry.ifindex = ifindex + ELSEWHERE * b.elsewhere
            entry.flags = (
                b.usable * lib.CRAB_BACKEND_USABLE
                | flags(b.cr, b.dead)
                | b.on_link * lib.CRAB_BACKEND_ON_LINK
                | (len(b.address) == 16) * lib.CRAB_BACKEND_V6
            )
        services = ffi.new("struct crab_service[]", max(1, len(reference.services)))
        prefixes: list[Any] = []
        size = 7
        for entry, s in zip(services, reference.services, strict=False):
            size = len(s.table)
            entry.addr, entry.protocol, entry.mode = mapped(s.vip), 6, MODES[s.mode]
            entry.index = reference.services.index(s)
            entry.fallback, entry.on_dead = FALLBACKS[s.fallback], ON_DEAD[s.on_dead]
            entry.port_be = int.from_bytes(s.port.to_bytes(2, "big"), "little")
            entry.first_prefix, entry.prefix_count = len(prefixes), len(s.prefixes)
            prefixes += s.prefixes
        c_prefixes = ffi.new("struct crab_prefix[]", max(1, len(prefixes)))
        for entry, p in zip(c_prefixes, prefixes, strict=False):
            entry.addr = mapped(p.network_address.packed)
            entry.bits = p.prefixlen + (96 if isinstance(p, ipaddress.IPv4Network) else 0)
        form = lib.CRAB_FORM_EXPERIMENTAL if reference.experimental else lib.CRAB_FORM_CRAB
        self.services, self._backends = services, backends
        self._answers: tuple[list[tuple[bytes]], bool, bool] = [], False, False
        self._snapshot = lambda exceptions, count: lib.crab_snapshot_new(
            services, len(reference.services), backends, len(reference.backends), c_prefixes, len(prefixes),
            exceptions, count, size, form, reference.seed,
        )  # fmt: skip
        self.publish()

    def publish(self) -> None:
        """Publish ``services`` as they are now, with the reference's tables and what its services say of backends."""
        said: list[tuple[int, int]] = []
        tables = [ffi.new("uint16_t[]", s.table) for s in self.reference.services]
        for entry, s, table in zip(self.services, self.reference.services, tables, strict=False):
            entry.table = table
            entry.first_exception, entry.exception_count = len(said), len(s.said)
            said += [(backend, flags(cr, dead)) for backend, (cr, dead) in sorted(s.said.items())]
        new = ffi.gc(self._snapshot(ffi.new("struct crab_exception[]", said), len(said)), lib.crab_snapshot_free)
        vips, ping, reset = self._answers
        assert not lib.crab_snapshot_answer(new, ffi.new("struct crab_address[]", vips), len(vips), ping, reset)
        lib.crab_core_publish(self.core, new)
        self.snapshot, self.tables = new, tables

    def set_pool(self, service: int, pool: Any) -> None:
        self.services[service].pool = pool
        self.publish()

    def set_answers(self, *vips: str, ping: bool = True, reset: bool = True) -> None:
        """What is done about packets to these VIPs that are no service's."""
        self._answers = [(mapped(ipaddress.ip_address(vip).packed),) for vip in vips], ping, reset
        self.publish()

    def set_refusal(self, service: int) -> None:
        self.services[service].refuses = 1
        self.publish()

    def set_custom(self, service: int, index: int, custom: Any) -> None:
        """Ask a :class:`crablb.selection.custom.Custom` about a service, whose index is ``index``."""
        self.services[service].custom, self.services[service].index = 1, index
        self.custom = custom
        lib.crab_core_ask(self.core, lib.crab_python_choose, custom.handle)
        self.publish()

    def set_source(self, service: int, bits4: int, bits6: int) -> None:
        self.services[service].source4, self.services[service].source6 = bits4, bits6
        self.publish()

    def handle(self, *frames: bytes, now: int = 1000) -> list[bytes | None]:
        """Frames through one batch.  Fails if a byte outside of them and their headroom was written."""
        array = ffi.new("struct crab_frame[]", len(frames))
        memories = []
        for entry, frame in zip(array, frames, strict=True):
            memory = ffi.new("uint8_t[]", bytes([CANARY] * 16) + bytes(64) + frame + bytes([CANARY] * 16))
            memories.append(memory)
            entry.data, entry.len, entry.ifindex = memory + 80, len(frame), self.ifindex
        lib.crab_core_batch(self.core, array, len(frames), now)
        out: list[bytes | None] = []
        for entry, memory, frame in zip(array, memories, frames, strict=True):
            raw = bytes(ffi.buffer(memory))
            self.elsewhere = entry.ifindex != self.ifindex
            assert raw[:16] == bytes([CANARY] * 16)
            assert raw[80 + len(frame) : 96 + len(frame)] == bytes([CANARY] * 16)
            out.append(bytes(ffi.buffer(entry.data, entry.len)) if entry.len else None)
        return out

    def counts(self) -> dict[str, int]:
        return {name: n for name, n in zip(statistics.WORKER_COUNTERS, self.counters, strict=True) if n}

    def outcome(self, frame: bytes) -> tuple[str, bytes | None]:
        """What became of one frame, as the reference tells it."""
        before = self.counts()
        (sent,) = self.handle(frame)
        aside = {"received", "reassigned", "retransmitted_syn", "forged_option", "flows_full", "encapsulated"}
        aside |= {"mptcp", "mptcp_join", "mptcp_join_known"}
        changed = [n for n, v in self.counts().items() if v != before.get(n, 0) and n not in aside]
        assert len(changed) == 1, changed
        return changed[0], sent


def compiled(wanted: list[dict[str, Any]]) -> Any:
    """The matches of handlers, each given by its fields."""
    handlers = Handlers(lambda match, reason: None)
    for fields in wanted:
        handlers.add(Match(**fields), lambda frames: None)
    return handlers.matches()
