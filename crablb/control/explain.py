"""Why a client goes where it goes: :meth:`.engine.Engine.rehearse`, in words."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from ipaddress import ip_address

from crablb.api.types import Explanation, Step
from crablb.dataplane.engine import Engine
from crablb.dataplane.rehearsal import Memory, Rehearsal
from crablb.errors import ConfigError, Problems
from crablb.kernel.interface import interface_name
from crablb.model import Address, Backend, Config, Mode, Service, State, Vip, host_port
from crablb.values import parse_address, parse_vip, shown

__all__ = ["explain", "parse_connection"]

#: What the XDP program does with the SYN, by what it returns.
ACTIONS = {
    "redirect": ("handed to user space", "it is a SYN to a service"),
    "pass": ("left to the kernel", "it is no service's, or sent to another machine's MAC address"),
    "drop": ("dropped", "no socket takes it: no daemon serves this queue"),
    "none": ("not asked", "the interface is gone"),
}
#: Whether the client is redirected, by the counter that its SYN has.
OUTCOMES = {
    "redirected": ("redirected", "the client offered, and service and backend take part"),
    "fallback_no_offer": ("not redirected", "the client made no offer"),
    "fallback_mode": ("not redirected", "the service's mode is never"),
    "fallback_prefix": ("not redirected", "the client is in none of the service's redirect_clients"),
    "fallback_no_cr_backend": (
        "not redirected",
        "the backend does not take part in redirects, or is not redirected to",
    ),
    "fallback_unsafe": ("not redirected", "the SYN carries data, or an option that is good for the VIP alone"),
    "fallback_no_room": ("not redirected", "the redirect has no room in the TCP header"),
    "fallback_retransmit": ("not redirected", "its SYNs by redirection were not answered"),
    "refused": ("refused: a RST to the client", "no backend of the service can take it"),
    "drop_no_backend": ("dropped", "no backend of the service can take it"),
    "drop_no_path": ("dropped", "the backend is behind a gateway, where DSR by MAC address does not reach it"),
    "drop_hops": ("dropped", "no hop is left to forward it by MAC address"),
    "too_big": ("answered: too big", "it does not fit on the way"),
}
SERVED = ("redirected", "fallback")  # what those counters begin with that send the SYN on
STATES = {"new": "its SYN is not acknowledged yet", "open": "open", "ending": "a side has closed it"}
#: Policies of which the next connection may see another choice.
BY_CHANCE = ("random", "power-of-two", "least-loaded")
#: Backends that are named one by one.
MANY = 12


def parse_connection(text: str) -> tuple[Address, int]:
    """A client's ``10.0.0.1:40000`` or ``[fd00::1]:40000``.  Raises :class:`ConfigError`."""
    match = re.fullmatch(r"(?:\[([^\]]*)\]|([^:\[\]]*)):([0-9]{1,5})", text.strip())
    if not match or not 0 < int(match[3]) < 65536:
        raise ConfigError(f"{shown(text)} is not ADDRESS:PORT of a client (10.0.0.1:40000, [fd00::1]:40000)")
    try:
        return ip_address(match[1] or match[2]), int(match[3])
    except ValueError:
        raise ConfigError(f"{shown(match[1] or match[2])} is not an IP address") from None


def explain(
    engine: Engine,
    client: str,
    vip: str,
    *,
    offer: bool = True,
    down: Collection[str] = (),
    config: Config | None = None,
    frame: bool = False,
) -> Explanation:
    """What becomes of a client's SYN, step by step.

    ``client``: address and port; ``vip``: with ``tcp://`` or without; ``down``: backends taken to be unhealthy;
    ``config``: if that were served; ``frame``: with the frame that would go out.

    Raises :class:`ConfigError` with every fault.
    """
    problems = Problems()
    connection = problems.attempt("client", parse_connection, client)
    to = problems.attempt("VIP", parse_vip, vip if "://" in vip else f"tcp://{vip}")
    unhealthy = [problems.attempt("backend", parse_address, each) for each in down]
    problems.finish()
    assert connection and to
    if connection[0].version != to.address.version:
        raise ConfigError(f"client: {connection[0]} cannot connect to {to}: the one is IPv4, the other IPv6")
    served = next((s for s in (config or engine.config).services if s.vip == to), None)
    for address in unhealthy:
        if served and not any(b.address == address for b in served.backends):
            there = ", ".join(str(b.address) for b in served.backends)
            raise ConfigError(f"backend: {address} is no backend of {to}; there are: {there}")
    found = engine.rehearse(
        *connection, to, offer=offer, config=config, down=[address for address in unhealthy if address]
    )
    out = found.done.frame if found.done else b""
    redirected = bool(found.done and found.done.outcome == "redirected")
    return Explanation(
        steps=[*_steps(found, *connection, to, engine.config.table_size)],
        backend=str(found.backend or ""),
        redirected=redirected,
        frame=out.hex() if frame else "",
    )


def _steps(found: Rehearsal, client: Address, port: int, vip: Vip, size: int) -> Iterator[Step]:
    outcome, why = ACTIONS.get(found.action, (found.action, ""))
    if found.action == "redirect" and not found.verdict:
        why = "it is to a VIP, but to no service's port: it is refused there, or dropped (closed)"
    yield Step(what="XDP program", outcome=f"{outcome}, from queue 0 of {found.interface}", why=why)
    if not (found.verdict and found.done):
        yield Step(what="service", outcome="none", why=f"nothing is served at {vip}")
        return
    service = found.verdict.service
    serving = sum(1 for b in service.backends if b.share)
    count = len(service.backends)
    yield Step(
        what="service",
        outcome=str(vip),
        why=f"mode {service.mode.value}, policy {_policy(service)}; {serving} of {count} backends take new connections",
    )
    yield from _flow(found.known)
    yield from _health(found, service)
    by = f"{host_port(client, port)} to {host_port(vip.address, vip.port)}"
    if service.policy == "source-hash":
        by = f"{client}/{service.source_prefix[client.version == 6]} alone, by policy source-hash"
    yield Step(what="hash", outcome=f"{found.choice:016x}", why=f"keyed by the seed, of {by}")
    seat = f"{found.seat}" if found.seat else "nobody: no backend takes new connections"
    yield Step(what="slot", outcome=f"{found.slot} of {size}: {seat}", why="its place in the service's Maglev table")
    yield from _policy_step(found, service)
    outcome, why = OUTCOMES.get(found.done.outcome, (found.done.outcome, ""))
    if found.done.outcome == "redirected" and service.mode is Mode.ALWAYS:
        why = "the service's mode is always, and the backend takes part"
    if found.backend and found.backend in found.assumed:
        why += "; the way to it is not known yet, and taken to be there"
    yield Step(what="redirect", outcome=outcome, why=why)
    if found.backend and found.hop:
        yield Step(what="backend", outcome=str(found.backend), why=_way(found))
    if found.done.frame:
        yield Step(what="out", outcome=_summary(found.done.frame), why=", ".join(found.done.beside))


def _policy(service: Service) -> str:
    return service.policy if isinstance(service.policy, str) else getattr(service.policy, "__name__", "of Python")


def _flow(known: Collection[Memory]) -> Iterator[Step]:
    if not known:
        yield Step(what="flow", outcome="none is known", why="its SYN is decided as any new one")
    for memory in known:
        yield Step(
            what="flow",
            outcome=f"{memory.backend or 'a backend that was removed'}, {STATES[memory.state]}",
            why=f"{memory.where} remembers it, idle for {memory.idle} s; its packets go there, and a new SYN is decided"
            " anew beside it",
        )


def _health(found: Rehearsal, service: Service) -> Iterator[Step]:
    assert found.verdict
    if found.verdict.panic:
        yield Step(
            what="health",
            outcome="disregarded",
            why=f"panic: {found.verdict.healthy} of weight {found.verdict.weight} healthy, less than {service.panic} %",
        )
    out = [b for b in service.backends if not b.share]
    for backend in out[:MANY]:
        yield Step(what="health", outcome=f"{backend.address} takes no new connections", why=_not_serving(backend))
    if len(out) > MANY:
        yield Step(what="health", outcome=f"{len(out) - MANY} more take no new connections")
    if not out and not found.verdict.panic:
        yield Step(what="health", outcome="every backend takes new connections")


def _not_serving(backend: Backend) -> str:
    if backend.state is State.UP:
        return "its weight is 0"
    return f"{backend.state.value}: the operator's word, its health, or a backup that is not needed"


def _policy_step(found: Rehearsal, service: Service) -> Iterator[Step]:
    assert found.done
    name = _policy(service)
    if not found.asked:
        yield Step(what="policy", outcome="the slot decides", why=f"policy {name}")
        return
    inputs = [
        f"{address} (weight {weight}, {load.open} connections, load {load.figure:g})"
        for address, weight, load in found.asked[:MANY]
    ]
    more = f", and {len(found.asked) - MANY} more" if len(found.asked) > MANY else ""
    if found.done.outcome == "redirected":
        chance = " this time, by chance" if name in BY_CHANCE else ""
        outcome = f"{name} chose {found.backend}{chance}"
        yield Step(what="policy", outcome=outcome, why=f"from {', '.join(inputs)}{more}")
    else:
        why = "it chooses for clients that are redirected; by the fallback the slot decides"
        yield Step(what="policy", outcome="not asked", why=f"policy {name}: {why}")


def _way(found: Rehearsal) -> str:
    """How the backend is reached; nothing is sent to one whose way is not resolved."""
    hop = found.hop
    if not hop or found.backend in found.assumed:
        return "not known yet"
    via = f" via {hop.gateway}" if hop.gateway else ""
    return f"{interface_name(hop.ifindex)}{via}, MAC {hop.dst_mac.hex(':')}, MTU {hop.mtu}"


def _summary(frame: bytes) -> str:
    """What a frame that goes out is."""
    four = frame[12:14] == b"\x08\x00"
    source, to = (frame[26:30], frame[30:34]) if four else (frame[22:38], frame[38:54])
    tunnel = frame[23 if four else 20] in (4, 41)
    kind = "IP in IP" if tunnel else "TCP"
    return f"{len(frame)} bytes, {kind} {ip_address(source)} -> {ip_address(to)}, to MAC {frame[:6].hex(':')}"
