"""The threat model: each row of what stops somebody has tests, which there are, and which `make test` runs."""

from __future__ import annotations

import ast
import re

import pytest

from tests.helpers.processes import ROOT

PAGE = "docs/security.md"
#: Marks of tests that `make test` leaves out, or whose failing is nothing.
LEFT_OUT = {"long", "each", "skip", "xfail"}


def rows(page: str) -> list[list[str]]:
    """Of the tables whose last column is "test", their cells."""
    found, within = [], False
    for line in page.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if not cells:
            within = False
        elif cells[-1] == "test":
            within = True
        elif within and not set(cells[-1]) <= {"-"}:
            found.append(cells)
    return found


def named(cell: str) -> list[str]:
    """``unit/test_log.py::test_no_room``, each between backticks, and nothing else."""
    tests = re.findall(r"`(\w+/test_\w+\.py::test_\w+)`", cell)
    assert cell == ", ".join(f"`{test}`" for test in tests), cell
    return tests


def marks(node: ast.AST) -> set[str]:
    return {each.attr for each in ast.walk(node) if isinstance(each, ast.Attribute)}


def runs(test: str) -> bool:
    """Whether `make test` runs it."""
    file, name = test.split("::")
    path = ROOT / "tests" / file
    if not path.exists() or file.split("/")[0] not in ("unit", "bpf", "lab"):
        return False
    module = ast.parse(path.read_text())
    left_out = any(
        marks(node.value) & LEFT_OUT
        for node in module.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"
    )
    found = [node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == name]
    # A mark of one of its parameters leaves others.
    whole = [ast.unparse(d).partition("(")[0].rpartition(".")[2] for node in found for d in node.decorator_list]
    return bool(found) and not left_out and not set(whole) & (LEFT_OUT | {"skipif"})


ROWS = rows((ROOT / PAGE).read_text())


def test_whom_it_is_about():
    assert len(ROWS) > 35
    for cells in ROWS:
        assert len(cells) == 5, cells
        assert all((cells[0], cells[1], cells[2])), cells


@pytest.mark.parametrize("row", ROWS, ids=lambda row: re.sub(r"\W+", "-", row[0])[:50])
def test_what_stops_it_is_shown(row):
    tests = named(row[-1])
    assert tests
    assert [test for test in tests if not runs(test)] == []


def test_these_can_fail():
    assert rows("| a | test |\n|---|---|\n| x | `unit/test_log.py::test_no_room` |\n\n| a | b |\n| c | d |") == [
        ["x", "`unit/test_log.py::test_no_room`"]
    ]
    assert runs("unit/test_log.py::test_no_room")
    for none in ("unit/test_log.py::test_none", "unit/test_none.py::test_none", "stacks/test_redis.py::test_redis"):
        assert not runs(none)
    assert not runs("lab/test_never_worse.py::test_never_worse")  # a long one
    for wrong in ("unit/test_log.py::test_no_room", "`test_no_room`", "`unit/test_log.py::test_no_room` and more"):
        with pytest.raises(AssertionError):
            named(wrong)


def test_where_to_report_is_said():
    assert "SECURITY.md" in (ROOT / "README.md").read_text()
    assert "SECURITY.md" in (ROOT / PAGE).read_text()
