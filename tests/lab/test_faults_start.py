"""A start, of a load balancer or an agent, whose calls of the kernel fail, each in turn: it works all the same, or says
why not, and leaves nothing."""

from __future__ import annotations

import os
from errno import EMFILE, ENOMEM, ENOSPC, EPERM
from errno import errorcode as NAMES
from pathlib import Path

import pytest

from tests.helpers.shim import tried

#: Calls that libraries have their own mind about: libuv aborts when it gets no pipe for its signals (there was one a
#: moment before, or crablb says so); libbpf goes on without a program's BTF, and the verifier takes a minute then.
LIBRARIES = ("pipe2", "bpf command 18.")
#: CPython (3.11) waits for ever for a thread that has no memory for its first steps.
THREADLESS = "Exception ignored in thread started by"


def start(folder: Path, what: str, does: int, first: int, step: int, call: str = "ask", of: str = "") -> int:
    """How many such calls there are."""
    found = tried(folder, "failing", what, call, of, does, first, step, backends=range(11, 13), seconds=1400)
    faults = {
        at: what
        for at, what in found["faults"].items()
        if not at.split(": ")[1].startswith(LIBRARIES) and THREADLESS not in what
    }
    assert faults == {}
    assert found["refused"]
    return int(found["points"])


def steps(number: int) -> int:
    """CRABLB_LONG=58: each."""
    return max(number // int(os.environ.get("CRABLB_LONG", "1")), 1)


@pytest.mark.long
def test_some_calls_of_a_start_fail(tmp_path):
    assert start(tmp_path, "serve", ENOMEM, 200, 250) > 300


@pytest.mark.long
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    "does", [ENOMEM, *(pytest.param(does, marks=pytest.mark.each) for does in (EPERM, EMFILE))], ids=NAMES.get
)
def test_the_calls_of_a_start_fail_one_after_the_other(tmp_path, does):
    assert start(tmp_path, "serve", does, 1, steps(29)) > 300


@pytest.mark.long
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    "what", ["client", *(pytest.param(what, marks=pytest.mark.each) for what in ("server", "mptcp"))]
)
def test_the_calls_of_an_agents_start_fail_one_after_the_other(tmp_path, what):
    assert start(tmp_path, what, ENOMEM, 1, steps(58)) > 300


@pytest.mark.long
@pytest.mark.parametrize("what", ["serve", "client", "server", "mptcp"])
def test_there_is_no_room_for_what_a_start_writes(tmp_path, what):
    """In /run/crablb: locks, states."""
    assert start(tmp_path, what, ENOSPC, 1, 1, "write", "/run/crablb") > 1


@pytest.mark.long
@pytest.mark.parametrize(
    ("call", "of"), [("socketpair", ""), ("eventfd", ""), ("epoll_create1", ""), ("ioctl", "unix")]
)
def test_no_event_loop_can_be_made(tmp_path, call, of):
    """In a line of crablb's own."""
    assert start(tmp_path, "serve", EMFILE, 1, 1, call, of) > 1
