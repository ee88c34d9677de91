"""What Python makes of the C parts, under LeakSanitizer: memory of theirs that nothing points at any more when all is
done."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.lsan import lost

#: Tests by which structures are made, exchanged and given up: flow caches, snapshots, pools, tokens, rings, sockets,
#: handlers, programs and maps.
UNIT = ("joins", "limit", "snapshot", "handler", "flows", "answer", "shared_backends", "queues")
KERNEL = ("worker", "tap", "handler")
#: Cores, which nobody frees.
LOSES = """
from crablb._native import ffi, lib

def test_loses():
    counters = ffi.new("uint64_t[]", lib.CRAB_COUNTERS)
    for _ in range(10):
        assert lib.crab_core_new(64, counters)
"""


@pytest.mark.each
@pytest.mark.timeout(3600)
def test_nothing_of_ours_is_lost(tmp_path: Path) -> None:
    files = [f"tests/unit/test_{name}.py" for name in UNIT] + [f"tests/bpf/test_{name}.py" for name in KERNEL]
    status, found, said = lost(tmp_path, *files)
    assert status == 0, said
    assert found == []


@pytest.mark.long
@pytest.mark.timeout(600)
def test_what_is_lost_is_found(tmp_path: Path) -> None:
    test = tmp_path / "test_loses.py"
    test.write_text(LOSES)
    status, found, said = lost(tmp_path, "-c", "pyproject.toml", str(test))
    assert status == 0, said
    assert any("crab_core_new" in paragraph for paragraph in found)
