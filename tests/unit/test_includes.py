"""What includes what in C: modules build on each other one way."""

from __future__ import annotations

import re
import subprocess
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT

FOLDERS = (ROOT / "native", ROOT / "bpf")
HEADERS = sorted((ROOT / "native").glob("*.h"))


def included(folders: tuple[Path, ...]) -> dict[str, set[str]]:
    """Which modules each module includes.  A module is a header and the source of the same name."""
    modules: dict[str, set[str]] = {}
    for path in (path for folder in folders for path in folder.glob("*.[ch]")):
        names = re.findall(r'^\s*#\s*include\s+"([^"]+)\.h"', path.read_text(), re.MULTILINE)
        modules.setdefault(path.stem, set()).update(names)
    return {name: others - {name} for name, others in modules.items()}


def test_no_module_includes_itself_by_way_of_another():
    modules = included(FOLDERS)
    assert modules["forward"] >= {"batch", "rewrite"}
    assert set().union(*modules.values()) <= modules.keys()
    try:
        tuple(TopologicalSorter(modules).static_order())
    except CycleError as error:
        pytest.fail(" includes ".join(reversed(error.args[1])))


def test_a_cycle_would_be_found(tmp_path):
    (tmp_path / "a.h").write_text("")
    (tmp_path / "a.c").write_text('#include "a.h"\n#include "b.h"\n')
    (tmp_path / "b.h").write_text('#include <stdint.h>\n# include "a.h"\n')
    assert included((tmp_path,)) == {"a": {"b"}, "b": {"a"}}


@pytest.mark.parametrize("header", HEADERS, ids=lambda h: h.name)
def test_a_header_needs_nothing_before_it(header):
    command = ["gcc", "-std=gnu11", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", "-x", "c", "-include", str(header)]
    subprocess.run([*command, *(f"-I{folder}" for folder in FOLDERS), "/dev/null"], check=True)
