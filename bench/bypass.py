"""Known fallback flows, which the XDP program forwards by itself, beside a program that only writes MAC addresses."""

from __future__ import annotations

import statistics
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address
from types import TracebackType
from typing import Self

import numpy as np
from crablb._native import ffi, lib

from bench.context import Context
from crablb.dataplane import flows as flowmap
from crablb.dataplane.paths import Ways, path
from crablb.kernel import bpf
from crablb.model import Vip

VIP = Vip(IPv4Address("10.0.0.100"), 80)
BACKEND = IPv4Address("10.0.0.11")
SEED = bytes(16)
LO = 1  # test runs come in by it


def client(i: int) -> tuple[bytes, int]:
    """Address and port of the i-th flow's client."""
    return (0x0B000000 + (i >> 14)).to_bytes(4, "big"), 1024 + (i & 16383)


def packet(i: int) -> bytes:
    """An ACK of the i-th flow."""
    address, port = client(i)
    ip = bytearray(struct.pack("!BBHHHBBH", 0x45, 0, 40, 1, 0x4000, 64, 6, 0) + address + VIP.address.packed)
    ip[10:12] = struct.pack("=H", ~lib.crab_csum(bytes(ip), len(ip)) & 0xFFFF)
    tcp = struct.pack("!HHIIBBHHH", port, VIP.port, 1, 1, 0x50, 0x10, 500, 0, 0)
    right = ffi.new("uint16_t *")
    lib.crab_csum_state(bytes(ip) + tcp, len(ip) + len(tcp), right)
    return bytes(6) + b"\x02\0\0\0\0\x01\x08\0" + bytes(ip) + tcp[:16] + bytes(ffi.buffer(right)) + tcp[18:] + bytes(6)


def fill(table: flowmap.FlowTable, count: int, tunnel: bool) -> list[int]:
    """Flows 0 to ``count`` - 1; returns those that found room, and were not pushed out by later ones."""
    flags = lib.CRAB_FLOW_TUNNEL if tunnel else 0
    hashes = [
        flowmap.flow_hash(SEED, IPv4Address(a), port, VIP.address, VIP.port) for a, port in map(client, range(count))
    ]
    for hash_ in hashes:
        table.add(hash_, 0, 0, flags=flags)
    there = np.isin(np.array(hashes, np.uint64), table.flows()["hash"])
    return [int(i) for i in np.flatnonzero(there)]


@dataclass
class Loaded:
    """The load balancer's program with flows, and the numbers of those that found room."""

    ours: bpf.Program
    mac: bpf.Program
    numbers: list[int]

    def subjects(self, context: Context) -> dict[str, Callable[[], Mapping[str, float]]]:
        random = np.random.default_rng(1)
        packets = context.pick(4000, 1000, 50)

        def subject(program: bpf.Program) -> Callable[[], Mapping[str, float]]:
            def measure() -> Mapping[str, float]:
                picks = random.choice(self.numbers, packets)
                return {"ns": statistics.median(one(program, int(i)) for i in picks)}

            return measure

        return {"MAC only": subject(self.mac), "ours": subject(self.ours)}


def one(program: bpf.Program, i: int) -> int:
    """Nanoseconds of a run on a packet of the i-th flow."""
    done = program.test_run(packet(i))
    assert done.retval == 3, f"{program.name} did not answer XDP_TX"
    return done.duration_ns


class Programs:
    """Context manager: what is measured is loaded while in it."""

    def __init__(self, context: Context) -> None:
        self._stack = ExitStack()
        self._mac = self._stack.enter_context(bpf.Object(context.bpf("mac"))).program("mac")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, where: TracebackType | None
    ) -> None:
        self._stack.close()

    @contextmanager
    def loaded(self, count: int, tunnel: bool) -> Iterator[Loaded]:
        buckets = flowmap.buckets_for(count)
        with bpf.Object(bpf.object_path("lb"), max_entries={"flows": buckets}) as program:
            program.map("services").update(VIP.key(), 0)
            program.map("hashing").update(0, flowmap.hashing(SEED, buckets))
            there = path(BACKEND, bytes(12), 1500, IPv4Address("10.0.0.2"), LO, Ways(tx=True))
            program.map("paths").update(0, there)
            numbers = fill(flowmap.FlowTable(program.map("flows")), count, tunnel)
            yield Loaded(program.program("crab_lb"), self._mac, numbers)
