"""The house, by its imports: who may use whom.

    doors      cli  lab  balancer           what people and programs come in by
               doctor < cli                 what keeps packets from their way
    control  agent                          the daemon's tasks; the endpoints
    selection < dataplane                   which backend; what the workers see
    kernel                                  ways into the kernel
    api        what is said between a daemon and those who ask it
    ground     errors model values options config filters lint overlay reference schema trust log lasting seldom
               carried version

An arrow only goes down.  On one floor, a room uses another one where it says so here.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter

import pytest

from tests.helpers.processes import ROOT

GROUND = {
    "errors",
    "model",
    "values",
    "options",
    "config",
    "filters",
    "lint",
    "trust",
    "overlay",
    "reference",
    "schema",
    "log",
    "lasting",
    "seldom",
    "carried",
    "version",
    "_version",
}
BELOW_CONTROL = GROUND | {"_native", "kernel", "selection", "dataplane"}
#: Room -> the rooms that it may import from, beside itself.  `_native` is the compiled hot loop.
MAY = {
    **dict.fromkeys(GROUND, GROUND),
    "api": GROUND,
    "kernel": {
        "errors",
        "model",
        "lasting",
        "seldom",
        "_native",
    },  # native/xsk.c, and the enumerations that number counters
    "selection": GROUND | {"_native"},
    "dataplane": GROUND | {"_native", "kernel", "selection"},
    "control": BELOW_CONTROL | {"api"},
    "agent": GROUND | {"_native", "kernel", "selection"},
    "balancer": BELOW_CONTROL | {"control", "api"},
    "doctor": BELOW_CONTROL | {"api", "control", "agent"},
    "lab": GROUND | {"kernel", "agent"},
    "cli": BELOW_CONTROL | {"api", "control", "agent", "lab", "balancer", "doctor"},
    "__main__": {"cli"},
    # The public API: names alone, imported when they are used.
    "__init__": BELOW_CONTROL | {"balancer"},
}

PATHS = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "crablb").rglob("*.py"))
}


def imports(name: str) -> Iterator[str]:
    """The modules of the package that a module imports, wherever in it."""
    for node in ast.walk(ast.parse(PATHS[name].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "crablb")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: write imports absolute"
            if node.module and node.module.split(".")[0] == "crablb":
                for alias in node.names:  # a module, or what is in one
                    inner = f"{node.module}.{alias.name}"
                    yield inner if inner in PATHS else node.module


def room(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


@pytest.mark.parametrize("name", PATHS)
def test_arrows_go_down(name):
    mine = room(name)
    assert mine in MAY, f"{name} is in no room; give it one in this file, and say what it may use"
    for other in imports(name):
        there = room(other)
        assert there == mine or there in MAY[mine], (
            f"{name} imports {other}, but {mine}/ may use only {', '.join(sorted(MAY[mine]))}."
            " What a part has to say to those above it is a return value, an event, or a call of a function that it was"
            " given (docs/design.md)."
        )


def test_no_circle():
    graph = {name: set(imports(name)) & PATHS.keys() - {"crablb", name} for name in PATHS if name != "crablb"}
    TopologicalSorter(graph).prepare()  # raises CycleError, which names it


def test_the_ground_is_plain():
    """Nothing compiled and no NumPy, so that a configuration can be checked anywhere."""
    for name, path in PATHS.items():
        if room(name) in GROUND:
            tree = ast.parse(path.read_text())
            roots = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
            roots |= {str(n.module).split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
            heavy = roots & {"numpy", "cffi", "uvloop"}
            assert not heavy, f"{name} is on the ground, and imports {', '.join(heavy)}: a file is checked without it"
