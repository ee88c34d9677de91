"""What another configuration changes, for people."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from crablb.api import types

__all__ = ["changes", "show"]


def changes(plan: types.Plan) -> bool:
    """Whether there is anything to do."""
    return bool(plan.services or plan.settings or plan.restart)


def show(plan: types.Plan) -> None:
    lines = [line for service in plan.services for line in _service(service)] + plan.settings
    for line in lines or ([] if plan.restart else ["nothing to do: it is so already"]):
        print(line)
    if plan.restart:
        print("a reload refuses this:")
        for line in plan.restart:
            print(f"  {line}")
    for warning in plan.warnings:
        print(f"crablb: {warning}", file=sys.stderr)


def _service(service: types.PlanService) -> Iterator[str]:
    yield f"{service.vip} {service.change}"
    yield from (f"  {said}" for said in service.settings)
    yield from (f"  + {backend}" for backend in service.backends_added)
    yield from (f"  - {backend}" for backend in service.backends_removed)
    yield from (f"  ~ {backend}" for backend in service.backends_changed)
    yield from (f"  {said}" for said in service.serving)
    if service.moved:
        yield f"  {service.moved:.1%} of its table gets another backend"
    flows = service.flows
    counts = ((flows.stay, "stay"), (flows.move, "move to another backend"), (flows.lost, "are lost"))
    if told := ", ".join(f"{count:,} {what}" for count, what in counts if count):
        yield f"  of its fallback flows {told}"
