"""Time of a request by policy, on servers of which one is slow."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path

from bench.context import Context
from bench.farm import Farm, Way
from bench.figures import Curve, Plot, Row, Suite, Table

SERVICE_MS = (5, 5, 5, 20)
RATE = 250  # a second
#: `least-loaded` is not among them: all servers share this machine's CPUs.
POLICIES = ("random", "round-robin", "maglev", "power-of-two", "least-connections")


def run(context: Context) -> Suite:
    suite = Suite("policies", "Policies on servers of which one is slow")
    suite.notes.append(
        f"Four servers answer one request at a time, in {', '.join(map(str, SERVICE_MS))} ms, and report how many "
        f"connections they have; each request is a new connection, redirected. Requests come at random (Poisson), at "
        f"{RATE} a second: an equal share is more than the slow server can do, and its line grows for as long as that "
        f"lasts ({seconds(context)} s here). A request takes from the moment that it was due to its answer."
    )
    service_us = [ms * 1000 for ms in SERVICE_MS]
    ways = {policy: Way(policy) for policy in POLICIES}
    with (
        tempfile.TemporaryDirectory() as folder,
        Farm(context, Path(folder), "policies", ways, service_us, report=True) as farm,
    ):
        found = context.in_turn(
            "policies", {policy: subject(farm, policy) for policy in POLICIES}, context.pick(5, 1, 1), steady=False
        )
    titles = {"p50": "Time of a request: p50", "p99": "The same: p99"}
    suite.tables = [
        Table(f"policies-{figure}", title, "ms", list(found[figure].values()), baseline="random")
        for figure, title in titles.items()
    ]
    suite.plots.append(plot(found))
    return suite


def seconds(context: Context) -> float:
    return context.pick(8, 2, 0.3)


def subject(farm: Farm, policy: str) -> Callable[[], Mapping[str, float]]:
    seeds = count(1)  # the same for all policies in a round

    def measure() -> Mapping[str, float]:
        found = farm.crr(
            policy, "--rate", str(RATE), "--seconds", str(seconds(farm.context)), "--warmup", "0", "--seed",
            str(next(seeds)),
        )  # fmt: skip
        return {figure: found[figure] / 1000 for figure in ("p50", "p99")}

    return measure


def plot(found: Mapping[str, Mapping[str, Row]]) -> Plot:
    servers = ", ".join(map(str, SERVICE_MS))
    return Plot(
        "policies",
        f"Four servers ({servers} ms), {RATE} new connections a second: time of a request",
        "",
        "ms",
        [Curve.of(figure, list(rows.values())) for figure, rows in found.items()],
        "bars",
        [name.replace("-", "-\n", 1) for name in POLICIES],
        log_y=True,
    )
