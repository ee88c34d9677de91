"""What holds for every room.  Fixtures are in the rooms that can have them."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

UNIT = Path(__file__).parent / "unit"


def pytest_configure() -> None:
    # How long an example takes decides nothing; a fixture may serve all of a test's examples.
    unneeded = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    settings.register_profile("crablb", deadline=None, suppress_health_check=unneeded)
    settings.load_profile("crablb")
    # A terminated run removes its namespaces like an interrupted one.
    signal.signal(signal.SIGTERM, lambda *_: pytest.exit("terminated"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.geteuid() != 0:
        for item in items:
            if UNIT not in item.path.parents:
                item.add_marker(pytest.mark.skip(reason="network namespaces and BPF need root"))
