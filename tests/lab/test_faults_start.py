"""A start whose calls of the kernel fail, each in turn: it serves all the same, or says why not, and leaves nothing."""

from __future__ import annotations

import os
from errno import EMFILE, ENOMEM, EPERM
from errno import errorcode as NAMES
from pathlib import Path

import pytest

from tests.helpers.shim import tried

#: Calls that libraries have their own mind about: libuv and uvloop end the process, or raise errors of their own, when
#: they can make no event loop; libbpf goes on without a program's BTF, and the verifier takes a minute then.
LIBRARIES = ("pipe2", "socketpair", "eventfd", "ioctl unix", "bpf command 18.")
#: CPython (3.11) waits for ever for a thread that has no memory for its first steps.
THREADLESS = "Exception ignored in thread started by"


def start(folder: Path, does: int, first: int, step: int) -> None:
    found = tried(folder, "failing", does, first, step, backends=range(11, 13), seconds=1400)
    assert found["refused"] and found["points"] > 300
    faults = {
        at: what
        for at, what in found["faults"].items()
        if not at.split(": ")[1].startswith(LIBRARIES) and THREADLESS not in what
    }
    assert faults == {}


def test_some_calls_of_a_start_fail(tmp_path):
    start(tmp_path, ENOMEM, 200, 250)


@pytest.mark.long
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("does", [ENOMEM, EPERM, EMFILE], ids=NAMES.get)
def test_the_calls_of_a_start_fail_one_after_the_other(tmp_path, does):
    """Of 29 one; CRABLB_LONG=29: each."""
    start(tmp_path, does, 1, max(29 // int(os.environ.get("CRABLB_LONG", "1")), 1))
