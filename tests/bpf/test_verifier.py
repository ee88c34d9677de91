"""How long the verifier follows the programs: what costs it more is seen before another compiler exceeds its limit."""

from __future__ import annotations

import pytest

from crablb.kernel import bpf
from tests.helpers.processes import ROOT
from tests.helpers.verified import LIMIT, clang, differ, followed, kernel, noted

pytestmark = pytest.mark.xdist_group("verifier")


@pytest.fixture(scope="module")
def found() -> dict[str, int]:
    names = [source.name.removesuffix(".bpf.c") for source in sorted((ROOT / "bpf").glob("*.bpf.c"))]
    # A tracing program, which not every machine lets anybody load.
    return followed([bpf.object_path(name) for name in names if name != "sockets"])


def test_far_from_the_limit(found):
    assert len(found) >= 10
    assert {name: count for name, count in found.items() if count > LIMIT * 3 // 4} == {}


def test_as_noted(found):
    """On a kernel, and by a compiler, whose counts are noted; of others test_far_from_the_limit holds alone."""
    before = noted().get(kernel(), {}).get(clang())
    if before is not None:
        assert not differ(before, found), "if that is meant: make test-compilers ARGS=--write"


def test_every_compiler_has_room():
    """Of all that were tried: clang 14 to the newest on one kernel, what is built here on Debian's."""
    assert any({"14", "19"} <= by_clang.keys() for by_clang in noted().values())
    assert {"6.1", "6.12", "7.3"} <= noted().keys()
    for whose, by_clang in noted().items():
        for version, counts in by_clang.items():
            assert max(counts.values()) <= LIMIT * 3 // 4, (whose, version)


def test_a_difference_is_told():
    assert differ({"a": 100, "b": 1}, {"a": 110, "b": 1}) == []
    assert differ({"a": 100, "b": 1}, {"a": 111, "c": 1}) == [
        "a: the verifier follows 111 instructions; noted are 100",
        "b is no more",
        "c is not noted",
    ]
