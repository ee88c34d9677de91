"""What another configuration would change, and what of the traffic it would move: a function of its arguments."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from crablb.api import types
from crablb.model import Address, Config, OnDead, Service, State, Vip
from crablb.options import held, of
from crablb.overlay import ServiceEdit, backend_words, between, settings_words, word
from crablb.selection.maglev import maglev_table
from crablb.selection.standing import Pair, Standing, judge

__all__ = ["Seen", "plan", "summary"]


@dataclass(frozen=True, slots=True)
class Seen:
    """What is there now, beside the configuration."""

    seed: bytes
    standings: Mapping[Pair, Standing]
    lost: Container[Address] = ()  # backends that are not reached
    flows: Mapping[Pair, int] | None = None  # live fallback flows
    interfaces: Sequence[str] = ()  # as they are called now; else as configured


def plan(before: Config, after: Config, seen: Seen, warnings: Sequence[str] = ()) -> types.Plan:
    """From the one to the other.  What needs a restart has a reload refuse the whole."""
    if after.interfaces == tuple(seen.interfaces):
        after = replace(after, interfaces=before.interfaces)
    settings: list[str] = []
    restart: list[str] = []
    for option in of(Config):
        was, now = getattr(before, option.field), getattr(after, option.field)
        if option.name != "service" and was != now:
            said = f"{option.name}: {word(held(option, was))} -> {word(held(option, now))}"
            (settings if option.reload else restart).append(said)
    old = {service.vip: service for service in before.services}
    new = {service.vip: service for service in after.services}
    flows: dict[Vip, dict[Address, int]] = {}
    for (vip, address), count in (seen.flows or {}).items():
        flows.setdefault(vip, {})[address] = count
    services = [
        _service(vip, edit, old.get(vip), new.get(vip), before.table_size, seen, flows.get(vip, {}))
        for vip, edit in ((_vip(name, old, new), edit) for name, edit in between(before, after).services.items())
    ]
    return types.Plan(services=services, settings=settings, restart=restart, warnings=list(warnings))


def _vip(name: str, *known: Mapping[Vip, Service]) -> Vip:
    return next(vip for services in known for vip in services if str(vip) == name)


def _service(
    vip: Vip,
    edit: ServiceEdit,
    before: Service | None,
    after: Service | None,
    table_size: int,
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
        moved=moved(before, after, table_size, seen) if before and after else 0.0,
        flows=_flows(after, flows),
    )


def moved(before: Service, after: Service, table_size: int, seen: Seen) -> float:
    """Share of the service's table that another backend gets, 0 to 1; with what is healthy and reached as it is now."""
    both = {b.address for service in (before, after) for b in service.backends}
    ids = {address: i for i, address in enumerate(sorted(both, key=str))}

    def members(service: Service) -> dict[int, tuple[Address, int, int]]:
        served = judge(service, seen.standings).service
        return {
            ids[b.address]: (b.address, 0 if b.address in seen.lost else b.share, b.weight) for b in served.backends
        }

    old, new = members(before), members(after)
    if old == new:
        return 0.0
    tables = (maglev_table(each, table_size, seen.seed) for each in (old, new))
    return float(np.mean(np.not_equal(*tables)))


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
    lines = [f"{said} (needs a restart)" for said in planned.restart] + list(planned.settings)
    for service in planned.services:
        parts = list(service.settings)
        for title, which in (("added", "backends_added"), ("removed", "backends_removed"), ("", "backends_changed")):
            parts += [f"{each} {title}".strip() for each in getattr(service, which)]
        if service.change != "changed":
            parts = [service.change]
        if service.moved:
            parts.append(f"{service.moved:.1%} of the table moves")
        for name in (field for field in ("move", "lost") if getattr(service.flows, field)):
            parts.append(f"{getattr(service.flows, name):,} flows {'move' if name == 'move' else 'are lost'}")
        lines.append(f"{service.vip} {'; '.join(parts)}")
    return lines
