"""What the client's programs are told about offers, and what they tell: see struct crab_client_settings and
struct crab_client_health in bpf/maps.h."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from crablb._native import ffi, lib
from crablb.kernel import bpf, pins
from crablb.kernel.counters import counter_names
from crablb.model import Address, Vip, unmapped

#: Seconds: until a SYN that offered is sent again, and how long a VIP gets no offers after a failure.
RETRANSMISSION, BACK_OFF, LONGEST_BACK_OFF = 0.25, 10.0, 600.0
#: Seconds for which a backend is known to hear this client after it has shown it.
PROVEN = 600.0
#: Nanoseconds that a struct crab_client_minute counts for.
MINUTE: int = lib.CRAB_CLIENT_MINUTE_NS
#: Redirected connections that there is room for.
FLOWS: int = lib.CRAB_CLIENT_FLOWS
#: The table of connections; of versions before, that of those that are translated outward.
TABLE, TABLE_BEFORE = "client_flows", "client_out"

CLOCK_MONOTONIC_COARSE = 6
RETRIES = Path("/proc/sys/net/ipv4/tcp_syn_retries")
LINEAR = Path("/proc/sys/net/ipv4/tcp_syn_linear_timeouts")
#: The system's own timeout of a SYN (RFC 6298, 2.1).
SYSTEM_RTO = 1.0


def whole(first: float, count: int, linear: int) -> float:
    """Seconds until a SYN is given up that is sent again ``count`` times, the first time after ``first`` seconds.

    The first ``linear`` timeouts are not doubled, and are not counted either (tcp_syn_linear_timeouts, Linux 6.5).
    """
    return first * (linear + 2.0 ** (count + 1) - 1)


def settings(flows: int, *, retransmission: float = RETRANSMISSION, offering: bool = True) -> bytes:
    """The value of map ``client_settings``, for this network namespace."""
    hz = round(1 / time.clock_getres(CLOCK_MONOTONIC_COARSE))
    linear = int(LINEAR.read_text()) if LINEAR.exists() else 0
    value = ffi.new("struct crab_client_settings *")
    value.netns_cookie = pins.cookie()
    value.backoff_ns, value.backoff_max_ns = int(BACK_OFF * 1e9), int(LONGEST_BACK_OFF * 1e9)
    value.proven_ns = int(PROVEN * 1e9)
    value.flows, value.hz, value.offering = flows, hz, offering
    if 0 < retransmission < SYSTEM_RTO:
        # A little later is better than once oftener, which doubles the whole.
        count, more = int(RETRIES.read_text()), round(math.log2(SYSTEM_RTO / retransmission))
        needed = whole(SYSTEM_RTO, count, linear) / whole(1, count + more, linear)
        if needed > 1.1 * retransmission:
            needed = 0
        value.rto = math.ceil(max(needed, retransmission) * hz)
        for i in range(lib.CRAB_CLIENT_RETRIES):
            more = 0
            while whole(value.rto / hz, i + 1 + more, linear) < whole(SYSTEM_RTO, i + 1, linear):
                more += 1
            value.more[i] = more
    return bytes(ffi.buffer(value))


def withdrawn(told: bytes) -> bytes:
    """Settings, but for new offers: there are to be none."""
    value = ffi.from_buffer("struct crab_client_settings *", changed := bytearray(told))
    value.offering = 0
    return bytes(changed)


@dataclass(frozen=True, slots=True)
class Health:
    """How redirects of a VIP fare, or those to one of its backends (``backend``).

    ``minute``: offered (of a VIP alone), taken, completed and failed in the last sixty seconds.  ``backing_off``:
    seconds until the next offer, 0 if one is due; None: offers are made.  ``since``: seconds since the first of the
    failures in a row; ``reason``: of the last one, as in enum crab_client_failure.
    """

    vip: str
    backend: str | None
    offered: int | None
    taken: int | None
    completed: int
    failed: int
    minute: dict[str, int]
    backing_off: float | None
    since: float | None
    reason: str | None
    blamed: str | None


def last_minute(counts: Any, now_ns: int) -> list[int]:
    """What a struct crab_client_minute says of the sixty seconds before ``now_ns``: of the minute before as much as the
    present one leaves, as if it was spread evenly."""
    age = max(now_ns - counts.since_ns, 0)
    if age >= MINUTE:  # the minute before is what is the present one there
        return [round(n * max(2 * MINUTE - age, 0) / MINUTE) for n in counts.now]
    left = (MINUTE - age) / MINUTE
    return [n + round(before * left) for n, before in zip(counts.now, counts.before, strict=True)]


def _health(vip: Vip, backend: Address | None, health: Any, **more: Any) -> Health:
    now = time.monotonic_ns()
    held = bool(health.failures or health.until_ns)
    minute = dict(zip(("offered", "taken", "completed", "failed"), last_minute(health.minute, now), strict=True))
    if backend:
        del minute["offered"]
    return Health(
        vip=str(vip), backend=str(backend) if backend else None, offered=more.get("offered"),
        taken=more.get("taken"), completed=int(health.completed), failed=int(health.failed), minute=minute,
        backing_off=max(0.0, (health.until_ns - now) / 1e9) if held else None,
        since=(now - health.since_ns) / 1e9 if held else None,
        reason=counter_names("crab_client_failure", "CRAB_CLIENT_")[health.reason] if held else None,
        blamed=more.get("blamed") if held else None,
    )  # fmt: skip


def redirects(vips: bpf.Map, paths: bpf.Map) -> Iterator[Health]:
    """How redirects fare: each VIP, and behind it those of its backends that were redirected to."""
    backends = list(paths.items())
    for key, value in vips.items():
        vip, entry = Vip.from_key(key), ffi.from_buffer("struct crab_client_vip *", value)
        blamed = bytes(entry.blamed)
        yield _health(
            vip,
            None,
            entry.health,
            offered=int(entry.offered),
            taken=int(entry.taken),
            blamed=str(unmapped(blamed)) if any(blamed) else None,
        )
        for path, health in backends:
            if path[:16] + path[32:] == key:
                yield _health(vip, unmapped(path[16:32]), ffi.from_buffer("struct crab_client_health *", health))


def room(folder: Path) -> int:
    """Redirected connections that an agent whose maps are pinned in ``folder`` has room for.

    Raises :class:`bpf.BpfNotFoundError` if there is none.
    """
    with bpf.Map.from_pin(folder / (TABLE if (folder / TABLE).exists() else TABLE_BEFORE)) as table:
        return table.max_entries


#: So many offers of a minute, and no redirect among their answers, are told.
IN_VAIN = 5

#: enum crab_client_failure, as a person says it.
REASONS = {
    "lost": "no redirect came",
    "source": "the backend is outside of --backends",
    "route": "the SYN left by another route",
    "no_echo": "the backend answers without the redirect: no agent there, or not told of this VIP",
    "not_taken": "this host drops the redirect (rp_filter, firewall)",
    "refused": "the redirected SYN is answered by a RST or an ICMP error",
    "silent": "the backend does not hear this client",
}


def in_vain(redirects: Mapping[str, Any]) -> str:
    """What is wrong with the redirects of a VIP (:class:`Health`, as plain values); empty: nothing that is known."""
    if reason := redirects["reason"]:
        return REASONS[reason] + (f" ({redirects['blamed']})" if redirects["blamed"] else "")
    minute = redirects["minute"]
    if minute["offered"] < IN_VAIN or minute["taken"] or minute["failed"]:
        return ""
    return (
        f"{minute['offered']} offers in the last minute, and no redirect: does the load balancer redirect, by the same"
        " form of the option, and does nothing take the option out of SYNs?"
    )


def owned(folder: Path) -> dict[bytes, int]:
    """Connections whose socket has not ended, as far as an agent whose maps are pinned in ``folder`` has heard: local
    address and ports of each, and its socket's cookie.

    Raises :class:`bpf.BpfNotFoundError` if there is no agent.
    """
    with bpf.Map.from_pin(folder / TABLE) as held:
        keys, values = held.dump()
    size = ffi.sizeof("struct crab_client_ports")
    flows = ffi.from_buffer("struct crab_client_flow[]", values)
    return {
        keys[i * size : (i + 1) * size]: int(flow.owner)
        for i, flow in enumerate(flows)
        if flow.owner > lib.CRAB_CLIENT_GONE
    }


def ended(ports: bytes, owner: int) -> bytes:
    """What program crab_end is told of one of these."""
    value = ffi.new("struct crab_client_ended *", {"owner": owner})
    ffi.memmove(ffi.addressof(value, "ports"), ports, len(ports))
    return bytes(ffi.buffer(value))


def translated(folder: Path) -> set[bytes]:
    """Connections that an agent whose maps are pinned in ``folder`` translates: local address, ports, and VIP of each.

    Closed ones are among them for a while.  Raises :class:`bpf.BpfNotFoundError` if there is no agent.
    """
    if not (folder / TABLE).exists():
        with bpf.Map.from_pin(folder / TABLE_BEFORE) as out:
            return {key[:16] + key[32:] + key[16:32] for key in out.keys()}  # noqa: SIM118
    with bpf.Map.from_pin(folder / TABLE) as held:
        keys, values = held.dump()
    size = ffi.sizeof("struct crab_client_ports")
    flows = ffi.from_buffer("struct crab_client_flow[]", values)
    return {
        keys[i * size : (i + 1) * size] + bytes(flow.vip)
        for i, flow in enumerate(flows)
        if flow.state == lib.CRAB_CLIENT_TAKEN
    }


def told(folder: Path) -> list[dict[str, Any]]:
    """The same of an agent whose maps are pinned in ``folder``, as plain values; of versions before nothing."""
    if not (folder / TABLE).exists():
        return []
    with bpf.Map.from_pin(folder / "client_vips") as vips, bpf.Map.from_pin(folder / "client_paths") as paths:
        return [asdict(health) for health in redirects(vips, paths)]
