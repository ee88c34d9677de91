"""What holds for every room.  Fixtures are in the rooms that can have them."""

from __future__ import annotations

import gc
import os
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

#: By what tests need, and in the order that they run in: what fails soonest first.
ROOMS = ("unit", "fuzz", "sim", "bpf", "lab", "soak", "stacks", "foreign", "machines")


def room(item: pytest.Item) -> int:
    name = item.path.relative_to(Path(__file__).parent).parts[0]
    if name not in ROOMS:
        raise pytest.UsageError(f"{item.nodeid}: put it into one of the rooms {', '.join(ROOMS)}")
    return ROOMS.index(name)


def pytest_configure() -> None:
    # How long an example takes decides nothing; a fixture may serve all of a test's examples.
    unneeded = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    settings.register_profile("crablb", deadline=None, suppress_health_check=unneeded)
    settings.load_profile("crablb")
    # A script's background jobs ignore SIGINT, and so would all that tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # A terminated run removes its namespaces like an interrupted one.
    signal.signal(signal.SIGTERM, lambda *_: pytest.exit("terminated"))


def pytest_collection_finish() -> None:
    # What is there now stays to the end: looked through again and again it would be a tenth of all work.
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=room)
    if os.geteuid() != 0:
        for item in items:
            if room(item) > ROOMS.index("fuzz"):
                item.add_marker(pytest.mark.skip(reason="network namespaces and BPF need root"))
