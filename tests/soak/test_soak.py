"""The short form of ``make soak``; and that it finds what is lost."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from crablb.lab import Lab
from tests.helpers.namespaces import unique
from tests.soak.__main__ import Series, soaked
from tests.soak.farm import Farm
from tests.soak.judge import leaks

#: What a look has to find, by what is lost with each change of the configuration (tests/soak/watched.py).
FOUND = {
    "descriptor": "load balancer, descriptors, file",
    "socket": "lb, netlink sockets",
    "map": "load balancer, maps",
    "pin": "lb, pins",
    "memory": "load balancer, malloc KiB",
    "objects": "load balancer, Python objects",
    "thread": "load balancer, threads",
    "mapping": "load balancer, mappings",
    "file": "lb, files in /run/crablb",
}


def grown(series: Series) -> dict[str, float]:
    """What is lost, but for what a process has: allocators take theirs for 25 rounds, and a short form has 8."""
    return {what: more for what, more in leaks(series).items() if what.endswith("malloc KiB") or "KiB" not in what}


@contextmanager
def farm(folder: Path, leak: str = "none") -> Iterator[Farm]:
    with Lab.create(unique(), servers=2) as lab:
        made = Farm(lab, folder, 3, leak=leak, longest=10, workers=2)
        yield made
        made.close()


@pytest.mark.soak
@pytest.mark.timeout(1800)
def test_nothing_grows_and_nothing_breaks(tmp_path):
    found: dict[str, Series] = {}
    with farm(tmp_path) as made:
        soaked(made, 0, found, halves={"alive": ("reloads", "changes", "looks", "flaps")})
        assert grown(found["alive"]) == {}
        soaked(made, 0, found, halves={"replaced": ("takeovers",)})
        assert grown(found["replaced"]) == {}
        assert made.broken() == []
        assert all(told["made"] > 0 for told in made.connections().values())


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("leak", "work", "lost"),
    [("all", "reloads", set(FOUND)), ("file,once", "takeovers", {"file"})],
    ids=["changes", "takeovers"],
)
def test_what_is_lost_is_found(tmp_path, leak, work, lost):
    """One of everything with each change of the configuration, and a file with each process that takes over: each is
    found, and where it was lost."""
    found: dict[str, Series] = {}
    with farm(tmp_path, leak=leak) as made:
        soaked(made, 0, found, halves={"alive": (work,)})
        if work == "takeovers" and made.done["taken over"] <= made.done["takeovers"] / 2:
            pytest.skip("on this machine, now, new processes come too late to take over")
    more = leaks(found["alive"])
    assert {what for what, name in FOUND.items() if name not in more} & lost == set()
