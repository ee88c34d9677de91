"""What another configuration would change, and what of the traffic it would move: a function of its arguments."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from crablb.api import types
from crablb.model import Address, Config, OnDead, Service, State, Vip
from crablb.options import held, of, remedy
from crablb.overlay import ServiceEdit, backend_words, between, settings_words, word
from crablb.selection.loads import WHOLE, Balance
from crablb.selection.standing import Pair, Standing, judge
from crablb.selection.tables import table_of
from crablb.values import counted

__all__ = ["Seen", "plan", "summary"]


@dataclass(frozen=True, slots=True)
class Seen:
    """What is there now, beside the configuration."""

    seed: bytes
    standings: Mapping[Pair, Standing]
    then: Mapping[Pair, Standing]  # with the other configuration, which may check otherwise
    lost: Container[Address] = ()  # backends that are not reached
    flows: Mapping[Pair, int] | None = None  # live fallback flows
    interfaces: Sequence[str] = ()  # as they are called now; else as configured


def plan(before: Config, after: Config, seen: Seen, warnings: Sequence[str] = ()) -> types.Plan:
    """From the one to the other.  What is fixed at the start has a reload refuse the whole."""
    if after.interfaces == tuple(seen.interfaces):
        after = replace(after, interfaces=before.interfaces)
    settings: list[str] = []
    restart: list[str] = []
    for option in of(Config):
        was, now = getattr(before, option.field), getattr(after, option.field)
        if option.name != "service" and was != now:
            said = f"{option.name}: {word(held(option, was))} -> {word(held(option, now))}"
            if option.reload:
                settings.append(said)
            else:
                restart.append(f"{said} ({remedy(option.field)})")
    old = {service.vip: service for service in before.services}
    new = {service.vip: service for service in after.services}
    flows: dict[Vip, dict[Address, int]] = {}
    for (vip, address), count in (seen.flows or {}).items():
        flows.setdefault(vip, {})[address] = count
    names = {str(vip): vip for vip in (*old, *new)}
    services = [
        _service(vip, edit, old.get(vip), new.get(vip), before, seen, flows.get(vip, {}))
        for vip, edit in ((names[name], edit) for name, edit in between(before, after).services.items())
    ]
    return types.Plan(services=services, settings=settings, restart=restart, warnings=list(warnings))


def _service(
    vip: Vip,
    edit: ServiceEdit,
    before: Service | None,
    after: Service | None,
    config: Config,
    seen: Seen,
    flows: Mapping[Address, int],
) -> types.PlanService:
    names = edit.backends.items()
    added = [backend_words(name, member) for name, member in names if member.added is not None]
    removed = [name for name, member in names if member.removed]
    if not before and after:
        added = [str(backend.address) for backend in after.backends]
    if not after and before:
        removed = [str(backend.address) for backend in before.backends]
    return types.PlanService(
        vip=str(vip),
        change="changed" if before and after else "added" if after else "removed",
        settings=settings_words(edit.settings),
        backends_added=added,
        backends_removed=removed,
        backends_changed=[backend_words(name, member) for name, member in names if member.settings],
        serving=_serving(before, after, seen) if before and after else [],
        moved=moved(before, after, config, seen) if before and after else 0.0,
        flows=_flows(after, flows),
    )


def moved(before: Service, after: Service, config: Config, seen: Seen) -> float:
    """Share of the service's table that another backend gets, 0 to 1; with what is healthy and reached as it is now,
    and when all have begun that begin slowly."""
    both = {b.address for service in (before, after) for b in service.backends}
    ids = {address: i for i, address in enumerate(sorted(both, key=str))}

    def members(service: Service, standings: Mapping[Pair, Standing]) -> dict[int, tuple[Address, int, int]]:
        served = judge(service, standings).service
        balance = Balance()
        for backend in served.backends:
            pair = served.vip, backend.address
            balance.give(pair, standings.get(pair, Standing()).percent or WHOLE)
        weights = balance.weights(served, (b for b in served.backends if b.address not in seen.lost), 0.0)
        scale = balance.scale(served, weights)
        return {ids[b.address]: (b.address, weights.get(b.address, 0), b.weight * scale) for b in served.backends}

    old, new = members(before, seen.standings), members(after, seen.then)
    if old == new:
        return 0.0
    tables = (table_of(each, config.table_size, seen.seed, config.table) for each in (old, new))
    return float(np.mean(np.not_equal(*tables)))


def _serving(before: Service, after: Service, seen: Seen) -> list[str]:
    """Which backends begin or cease to get connections, though the operator says the same of them."""
    old, new = judge(before, seen.standings), judge(after, seen.then)
    was = {b.address: b for b in old.service.backends}
    wanted = {b.address for b in before.backends if b.share} & {b.address for b in after.backends if b.share}
    told = []
    for backend in new.service.backends:
        if backend.address not in wanted or bool(backend.share) is bool(was[backend.address].share):
            continue
        pair = after.vip, backend.address
        then, now = (of.get(pair, Standing()) for of in (seen.then, seen.standings))
        if backend.share:
            why = "panic: health is disregarded" if new.panic else ""
            if then.healthy and not now.healthy:
                why = "it is not healthy, and not checked any more"
            what = "gets new connections again"
        else:
            why = "" if then.healthy else "it is not healthy"
            what = "gets no new connections"
        told.append(f"{backend.address} {what}" + (f": {why}" if why else ""))
    return told


def _flows(after: Service | None, flows: Mapping[Address, int]) -> types.Moved:
    """A flow stays at its backend, whatever becomes of the configuration, unless that is dead or the service goes."""
    if not after:
        return types.Moved(lost=sum(flows.values()))
    dead = {b.address for b in after.backends if b.state is State.DEAD}
    gone = sum(count for address, count in flows.items() if address in dead)
    stay = sum(flows.values()) - gone
    if after.on_dead is OnDead.RESET or not any(b.share for b in after.backends):
        return types.Moved(stay=stay, lost=gone)
    return types.Moved(stay=stay, move=gone)


def summary(planned: types.Plan) -> list[str]:
    """In a line for each service and setting."""
    lines = [*planned.restart, *planned.settings]
    for service in planned.services:
        parts = list(service.settings)
        for title, which in (("added", "backends_added"), ("removed", "backends_removed"), ("", "backends_changed")):
            parts += [f"{each} {title}".strip() for each in getattr(service, which)]
        parts += service.serving
        if service.change != "changed":
            parts = [service.change]
        if service.moved:
            parts.append(f"{service.moved:.1%} of the table moves")
        if service.flows.move:
            parts.append(f"{counted(service.flows.move, 'flow')} to move to another backend")
        if service.flows.lost:
            parts.append(f"{counted(service.flows.lost, 'flow')} lost")
        lines.append(f"{service.vip} {'; '.join(parts)}")
    return lines
