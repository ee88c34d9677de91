"""Who has how many flows, and how many places in the tables: counted in a thread, of what the workers see."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from crablb._native import lib
from crablb.dataplane.flows import FlowTable, now
from crablb.model import Address, Vip
from crablb.selection.standing import Pair
from crablb.selection.tables import Table

__all__ = ["Census", "FoundFlow", "count", "count_flows", "find"]


@dataclass(frozen=True, slots=True)
class Census:
    """By service and backend."""

    flows: Mapping[Pair, int]  # that the XDP program has
    shares: Mapping[Pair, float]  # of the service's table, 0 to 1


@dataclass(frozen=True, slots=True)
class FoundFlow:
    """A flow of the XDP program's table."""

    hash: int
    vip: Vip
    backend: Address
    idle: int  # seconds since its last packet
    state: Literal["new", "open", "ending"]  # new: of its last packets one was a SYN


def count(
    flows: FlowTable | None,
    tables: Mapping[Vip, Table],
    backends: Mapping[int, Address],
    services: Mapping[int, Vip],
) -> Census:
    """``tables``: by service; ``backends``, ``services``: by number.  Flows of others are not counted."""
    found = count_flows(flows, backends, services) if flows else {}
    counted: dict[int, list[tuple[int, int]]] = {}  # services with the same backends share a table
    shares: dict[Pair, float] = {}
    for vip, table in tables.items():
        places = counted.get(id(table))
        if places is None:
            all_ = np.bincount(table)  # as long as the highest number: not to be kept for each table
            numbers = np.flatnonzero(all_)
            places = counted[id(table)] = list(zip(numbers.tolist(), all_[numbers].tolist(), strict=True))
        for number, count in places:
            if address := backends.get(number):
                shares[vip, address] = count / len(table)
    return Census(found, shares)


def count_flows(
    flows: FlowTable, backends: Mapping[int, Address], services: Mapping[int, Vip], *, open_only: bool = False
) -> dict[Pair, int]:
    """By service and backend; ``open_only``: those whose client has not begun to end them."""
    found: dict[Pair, int] = {}
    there = flows.going_on()
    if open_only:
        there = there[there["state"] != lib.CRAB_FLOW_ENDING]
    pairs = there["service"].astype(np.uint32) << 16 | there["backend"]
    for pair, n in zip(*(part.tolist() for part in np.unique(pairs, return_counts=True)), strict=True):
        vip, address = services.get(pair >> 16), backends.get(pair & 0xFFFF)
        if vip and address:
            found[vip, address] = n
    return found


def find(
    flows: FlowTable,
    backends: Mapping[int, Address],
    services: Mapping[int, Vip],
    limit: int,
    hashes: Collection[int] | None = None,
) -> tuple[int, int, list[FoundFlow]]:
    """The flows of these backends and services, by number, and if there are some with one of these hashes.

    How many there are, how many of them are ending, and the first ``limit`` of them.
    """
    there = flows.going_on()
    fit = np.isin(there["backend"], list(backends)) & np.isin(there["service"], list(services))
    if hashes is not None:
        fit &= np.isin(there["hash"], np.fromiter(hashes, np.uint64, len(hashes)))
    there = there[fit]
    at = now()
    ending = (there["state"] == lib.CRAB_FLOW_ENDING) & (there["flags"] & lib.CRAB_FLOW_ASK == 0)
    return (
        len(there),
        int(np.count_nonzero(ending)),
        [
            FoundFlow(
                int(flow["hash"]),
                services[int(flow["service"])],
                backends[int(flow["backend"])],
                _age(at, int(flow["seen"])),
                _state(int(flow["state"]), int(flow["flags"])),
            )
            for flow in there[:limit]
        ],
    )


def _age(at: int, seen: int) -> int:
    """Seconds, as the XDP program reckons."""
    age = (at - seen) & 0xFFFF
    return 0 if age > lib.CRAB_AGE_NEGATIVE else age


def _state(state: int, flags: int) -> Literal["new", "open", "ending"]:
    if flags & lib.CRAB_FLOW_ASK:
        return "new"
    return "ending" if state == lib.CRAB_FLOW_ENDING else "open"
