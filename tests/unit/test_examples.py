"""The programs of examples/, their parts."""

from __future__ import annotations

import importlib
import subprocess
import sys
from ipaddress import ip_address

import numpy as np
import pytest

from crablb.model import Vip, mapped
from crablb.selection.custom import CHOICE
from crablb.selection.loads import Balance
from tests.helpers.processes import ROOT

EXAMPLES = ROOT / "examples"


@pytest.fixture
def importable(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES))


def test_by_network(importable):
    choose = importlib.import_module("by_network").choose
    vip, addresses = Vip(ip_address("10.0.0.100"), 80), [ip_address(f"10.0.0.1{i}") for i in (1, 2, 3)]
    backends = Balance().backends(vip, dict(zip(addresses, (1, 1, 2), strict=True)))

    def chosen(*clients: str) -> list[int]:
        batch = np.zeros(len(clients), CHOICE)
        for i, client in enumerate(clients):
            batch["client"][i] = np.frombuffer(mapped(ip_address(client)), np.uint8)
        return choose(batch, backends).tolist()

    for network in (["10.1.2.3", "10.1.2.99"], ["fd00:1:2:300::1", "fd00:1:2:3ff::2"]):
        assert len(set(chosen(*network))) == 1
    # Many networks go everywhere, one to two backends at most, whatever their loads.
    assert set(chosen(*(f"10.1.{i}.1" for i in range(100)))) == {0, 1, 2}
    seen = set()
    for busy in range(3):
        backends.assigned(np.array([busy] * 50))
        seen |= set(chosen("10.1.2.3"))
    assert len(seen) <= 2


def test_they_are_typed():
    """As a stranger's program is checked: by mypy --strict."""
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", *map(str, EXAMPLES.glob("*.py"))],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
