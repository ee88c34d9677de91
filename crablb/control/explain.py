"""Why a client goes where it goes: :meth:`.engine.Engine.rehearse`, in words."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from ipaddress import ip_address

from crablb.api.types import Explanation, Step
from crablb.control.serving import serves
from crablb.dataplane.engine import Engine
from crablb.dataplane.rehearsal import Memory, Rehearsal
from crablb.errors import ConfigError, Problems
from crablb.kernel.interface import interface_name
from crablb.kernel.netlink import HopState, NextHop
from crablb.model import Address, Backend, Config, Mode, Service, Vip, host_port
from crablb.selection.standing import Pair, Standing
from crablb.values import counted, parse_address, parse_client, parse_short_vip, shown

__all__ = ["explain", "parse_connection", "parse_token"]

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
    "fallback_unsafe": ("not redirected", "the SYN carries data, a Fast Open option, a signature or MP_JOIN"),
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
#: What is said of a backend that the question takes to be unhealthy.
ASKED = "it is taken to be unhealthy"
#: The way to a backend that is nobody's yet.
ASSUMED = NextHop(HopState.RESOLVED)
#: Backends that are named one by one.
MANY = 12


def parse_connection(text: str) -> tuple[Address, int]:
    """A client's ``10.0.0.1:40000`` or ``[fd00::1]:40000``.  Raises :class:`ConfigError`."""
    match = re.fullmatch(r"(?:\[([^\]]*)\]|([^:\[\]]*)):([0-9]{1,5})", text.strip())
    if not match or not 0 < int(match[3]) < 65536:
        raise ConfigError(f"{shown(text)} is not ADDRESS:PORT of a client (10.0.0.1:40000, [fd00::1]:40000)")
    return parse_client(match[1] or match[2]), int(match[3])


def parse_token(text: str) -> bytes:
    """An MPTCP connection's token, as ``ss -M`` has it (``token:9a0b1c2d``).  Raises :class:`ConfigError`."""
    if not re.fullmatch(r"[0-9a-fA-F]{1,8}", text.strip()):
        raise ConfigError(f"{shown(text)} is not the token of an MPTCP connection: up to 8 hexadecimal digits")
    return int(text, 16).to_bytes(4, "big")


def explain(
    engine: Engine,
    client: str,
    vip: str,
    *,
    offer: bool = True,
    mptcp: bool = False,
    join: str = "",
    down: Collection[str] = (),
    config: Config | None = None,
    standings: Mapping[Pair, Standing] | None = None,
    unhealthy: Callable[[Pair], str] = lambda _: "",
    frame: bool = False,
) -> Explanation:
    """What becomes of a client's SYN, step by step.

    ``client``: address and port; ``vip``: with ``tcp://`` or without; ``mptcp``: it speaks MPTCP; ``join``: token of
    the MPTCP connection that it joins, hexadecimal; ``down``: backends taken to be unhealthy; ``config``: if that were
    served, with these ``standings``; ``unhealthy``: why checks say that a backend is not healthy; ``frame``: with the
    frame that would go out.

    Raises :class:`ConfigError` with every fault.
    """
    problems = Problems()
    connection = problems.attempt("client", parse_connection, client)
    to = problems.attempt("VIP", parse_short_vip, vip)
    taken = [problems.attempt("backend", parse_address, each) for each in down]
    token = problems.attempt("join", parse_token, join) if join else None
    problems.finish()
    assert connection and to
    if connection[0].version != to.address.version:
        raise ConfigError(f"client: {connection[0]} cannot connect to {to}: the one is IPv4, the other IPv6")
    served = next((s for s in (config or engine.config).services if s.vip == to), None)
    if connection[0] in (config or engine.config).vips | engine.config.vips:
        raise ConfigError(f"client: {connection[0]} is a VIP; no client's packets come from there")
    for address in taken:
        if served and not any(b.address == address for b in served.backends):
            there = ", ".join(str(b.address) for b in served.backends)
            raise ConfigError(f"backend: {address} is no backend of {to}; there are: {there}")
    doubted = frozenset(address for address in taken if address)
    found = engine.rehearse(
        *connection, to, offer=offer, mptcp=mptcp, join=token, config=config, standings=standings, down=doubted
    )
    out = found.done.frame if found.done else b""
    redirected = bool(found.done and found.done.outcome == "redirected")
    proposed = all(service.vip != to for service in engine.config.services)

    def why_not(backend: Backend) -> str:
        assert found.verdict and found.wanted
        pair = to, backend.address
        said = ASKED if backend.address in doubted else unhealthy(pair)
        standing = found.standings.get(pair, Standing())
        hop = found.hops.get(backend.address, ASSUMED)
        return serves(found.wanted, backend, found.verdict, standing, hop, said)[1]

    steps = _steps(found, *connection, to, (config or engine.config).table_size, token, proposed, why_not)
    return Explanation(
        steps=[*steps],
        backend=str(found.backend or ""),
        redirected=redirected,
        frame=out.hex() if frame else "",
    )


def _steps(
    found: Rehearsal,
    client: Address,
    port: int,
    vip: Vip,
    size: int,
    token: bytes | None,
    proposed: bool,
    why_not: Callable[[Backend], str],
) -> Iterator[Step]:
    """``token``: of the connection that it joins; ``proposed``: the service is not served now; ``why_not``: a backend
    gets no new connections."""
    outcome, why = ACTIONS.get(found.action, (found.action, ""))
    if found.verdict and proposed:
        outcome, why = "would be handed to user space", f"{vip} is not served now, and would be then"
    elif found.action == "redirect" and not found.verdict:
        why = "it is to a VIP, but to no service's port: it is refused there, or dropped (closed)"
    yield Step(what="XDP program", outcome=f"{outcome}, from queue 0 of {found.interface}", why=why)
    if not (found.verdict and found.done):
        yield Step(what="service", outcome="none", why=f"nothing is served at {vip}")
        return
    service = found.verdict.service
    serving = sum(1 for b in service.backends if b.share and b.address not in _lost(found))
    backends, take = counted(len(service.backends), "backend"), "takes" if serving == 1 else "take"
    yield Step(
        what="service",
        outcome=str(vip),
        why=f"mode {service.mode.value}, policy {_policy(service)}; {serving} of {backends} {take} new connections",
    )
    yield from _flow(found.known)
    yield from _health(found, service, why_not)
    by = f"{host_port(client, port)} to {host_port(vip.address, vip.port)}"
    if service.policy == "source-hash":
        by = f"{client}/{service.source_prefix[client.version == 6]} alone, by policy source-hash"
    yield Step(what="hash", outcome=f"{found.choice:016x}", why=f"keyed by the seed, of {by}")
    seat = f"{found.seat}" if found.seat else "nobody: no backend takes new connections"
    yield Step(what="slot", outcome=f"{found.slot} of {size}: {seat}", why="its place in the service's table")
    if token is not None:
        yield _join_step(found.done.beside, token)
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
        yield Step(what="out", outcome=_summary(found), why=", ".join(found.done.beside))


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


def _lost(found: Rehearsal) -> set[Address]:
    """Where nothing can be sent to."""
    return {address for address, hop in found.hops.items() if hop.state is not HopState.RESOLVED}


def _health(found: Rehearsal, service: Service, why_not: Callable[[Backend], str]) -> Iterator[Step]:
    assert found.verdict and found.wanted
    if found.verdict.panic:
        yield Step(
            what="health",
            outcome="disregarded",
            why=f"panic: {found.verdict.healthy} of weight {found.verdict.weight} healthy, less than {service.panic} %",
        )
    pairs = zip(found.wanted.backends, service.backends, strict=True)
    out = [wanted for wanted, b in pairs if not b.share or b.address in _lost(found)]
    for backend in out[:MANY]:
        yield Step(what="health", outcome=f"{backend.address} takes no new connections", why=why_not(backend))
    if len(out) > MANY:
        yield Step(what="health", outcome=f"{len(out) - MANY} more, which take no new connections")
    if not out and not found.verdict.panic:
        yield Step(what="health", outcome="every backend takes new connections")


def _join_step(beside: Collection[str], token: bytes) -> Step:
    if "mptcp_join_known" in beside:
        outcome, why = "the connection's backend, whatever the slot", "a worker saw its server's key"
    else:
        outcome, why = "not known: the slot decides", "no worker saw its server's key, or its backend cannot take it"
    return Step(what="MPTCP token", outcome=f"{token.hex()}: {outcome}", why=why)


def _policy_step(found: Rehearsal, service: Service) -> Iterator[Step]:
    assert found.done
    name = _policy(service)
    if not found.asked:
        yield Step(what="policy", outcome="the slot decides", why=f"policy {name}")
        return
    inputs = [
        f"{address} (weight {weight}, {counted(load.open, 'connection')}, load {load.figure:g})"
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


def _summary(found: Rehearsal) -> str:
    """What the frame that goes out is."""
    assert found.done
    frame = found.done.frame
    four = frame[12:14] == b"\x08\x00"
    source, to = (frame[26:30], frame[30:34]) if four else (frame[22:38], frame[38:54])
    tunnel = frame[23 if four else 20] in (4, 41)
    kind = "IP in IP" if tunnel else "TCP"
    where = f"to MAC {frame[:6].hex(':')}"
    if found.backend in found.assumed:
        where = "to a MAC address that is not known yet: its neighbour was not asked, as nobody serves by it"
    return f"{len(frame)} bytes, {kind} {ip_address(source)} -> {ip_address(to)}, {where}"
