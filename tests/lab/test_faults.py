"""System calls of a serving load balancer that fail or come short: every packet is counted, no frame is lost, it serves
again without anybody's help, and says what there was in a line, not in a flood of them."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from errno import (
    EAGAIN,
    EBUSY,
    EINTR,
    EINVAL,
    EIO,
    EMFILE,
    EMSGSIZE,
    ENETDOWN,
    ENOBUFS,
    ENOMEM,
    ENOSPC,
    ENXIO,
    EPERM,
)
from errno import errorcode as NAMES
from typing import Any

import pytest

from tests.helpers.faulted import Faulted
from tests.helpers.processes import until
from tests.helpers.shim import END, SHORT

FAILED = "a socket failed; it is made anew"

#: Calls of a worker, what they are of, what becomes of them, and whether the socket has failed then.
WORKER = [
    *(("sendto", "xdp", error, False) for error in (EAGAIN, EBUSY, ENOBUFS, ENETDOWN, ENOMEM, EINTR)),
    *(("sendto", "xdp", error, True) for error in (EIO, ENXIO, EPERM)),
    ("poll", "xdp", EINTR, False),
    *(("poll", "xdp", error, True) for error in (ENOMEM, EAGAIN, EINVAL)),
    *(("sendmmsg", "packet", error, False) for error in (EAGAIN, ENOBUFS, ENETDOWN, ENOMEM, EINTR, EPERM, EMSGSIZE)),
    ("sendmmsg", "packet", SHORT, False),
    *(("getsockopt", "xdp 283 7", error, False) for error in (ENOMEM, EIO)),  # XDP_STATISTICS
    *(("read", "eventfd", error, False) for error in (EAGAIN, EINTR)),
]
#: One of a kind.
ONES = [
    ("sendto", ENOMEM),
    ("sendto", EBUSY),
    ("sendto", EIO),
    ("poll", ENOMEM),
    ("sendmmsg", ENOBUFS),
    ("sendmmsg", SHORT),
]
QUICK = [case for case in WORKER if (case[0], case[2]) in ONES]


def named(case: tuple[Any, ...]) -> str:
    return f"{case[0]}-{NAMES.get(case[2], 'short')}"


@pytest.fixture(scope="module")
def faulted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Faulted]:
    with Faulted.made(tmp_path_factory.mktemp("faulted")) as made:
        yield made
        made.close()
        assert "Traceback" not in made.log.read_text()


def calm(faulted: Faulted) -> None:
    """It serves, and all is accounted for."""
    until(faulted.served)
    until(faulted.accounted)


def strike(faulted: Faulted, case: tuple[str, str, int, bool], hits: int) -> None:
    """So many calls fail, in a row, as packets come; then none does."""
    call, of, does, fails = case
    calm(faulted)
    before = len(faulted.logged())
    with faulted.shim.rule(call, of, does, count=hits) as rule:

        def done() -> bool:
            faulted.syns(4)
            time.sleep(0.005)  # slow enough for the cable, whose drops nobody counts
            return rule.hits >= hits

        until(done)
    calm(faulted)
    said = [line["event"] for line in faulted.logged()[before:] if line["level"] != "info"]
    about = "the kernel dropped packets in front of the workers", "the kernel refused to send packets"
    assert not [event for event in said if not event.startswith((*about, FAILED))]
    assert said.count(FAILED) <= 1  # in ten seconds
    if fails:
        (*_, line) = faulted.logged(FAILED)
        assert line["interface"] == "veth0"


@pytest.mark.xdist_group("faulted")
@pytest.mark.parametrize("case", QUICK, ids=named)
def test_a_call_of_a_worker_fails(faulted, case):
    strike(faulted, case, 1)


@pytest.mark.long
@pytest.mark.xdist_group("faulted")
@pytest.mark.parametrize("case", WORKER, ids=named)
def test_every_call_of_a_worker_fails_for_a_while(faulted, case):
    """As often as it takes for whoever would loop to be seen; a socket that has failed fails when it is made anew."""
    strike(faulted, case, 3 if case[3] else 1000 if case[1] == "xdp" and case[0] == "sendto" else 10)


@pytest.mark.xdist_group("faulted")
def test_the_thread_of_a_worker_ends(faulted):
    """Without a word, as by an oops in the kernel: it is named, and another one is begun."""

    def told() -> bool:
        for call in ("poll", "sendto"):
            calm(faulted)
            with faulted.shim.rule(call, "xdp", END, count=1) as rule:
                until(lambda rule=rule: faulted.syns(1) or rule.hits)
            calm(faulted)
        return any(line["reason"] == "queue 0 of veth0 failed: its thread has ended" for line in faulted.logged(FAILED))

    until(told)  # one line in ten seconds, of whatever fails


#: Calls of all that is not a worker, as links, routes, files and people have it work.
CONTROL = [
    *((call, "netlink", error) for call in ("socket", "send", "recv", "setsockopt") for error in (ENOMEM, EPERM)),
    ("recvfrom", "netlink", ENOBUFS),
    *(("bpf", f"command {number}.", error) for number in (1, 2, 3) for error in (ENOMEM, EBUSY, EPERM)),
    *((call, of, error) for call, of in (("write", "/crablb"), ("open", ""), ("fsync", ""), ("rename", ""))
      for error in (ENOSPC, EIO)),
    ("write", "/crablb", SHORT),
    ("open", "", EMFILE),
    ("pthread_create", "", EAGAIN),
    ("socket", "unix", ENOMEM),
    ("sendto", "unix", ENOBUFS),
    ("memfd_create", "", ENOMEM),
]  # fmt: skip
#: Calls of these kinds there need not be, in what is done here.
SELDOM = ("fsync", "rename", "memfd_create", "pthread_create", "bpf", "open")
FEW = [
    ("socket", "netlink", ENOMEM),
    ("bpf", "command 2.", ENOMEM),
    ("write", "/crablb", ENOSPC),
    ("pthread_create", "", EAGAIN),
]


def upset(faulted: Faulted, case: tuple[str, str, int], hits: int) -> None:
    """As links, neighbours, the file and people change things, such calls fail; in the end all is as it was told."""
    call, of, does = case
    calm(faulted)
    before = len(faulted.lines())
    pair = faulted.pair
    with faulted.shim.rule(call, of, does, count=hits) as rule:
        faulted.reload(weight=2)
        asked = faulted.answered("weight", "10.0.1.11", "50", "--iface", "veth0")
        assert asked in (0, 1, 2, 4)
        for name, mtu in (("veth2", "1400"), ("veth0", "1450")):
            pair.ip("link", "set", name, "mtu", mtu)
        until(lambda: rule.hits or call in SELDOM or of == "unix")
        until(faulted.served)  # all the while
    for name in ("veth2", "veth0"):
        pair.ip("link", "set", name, "mtu", "1500")
    calm(faulted)
    reloads = len(faulted.logged("reloaded"))
    faulted.reload(weight=1)
    until(lambda: len(faulted.logged("reloaded")) > reloads)
    until(lambda: faulted.answered("weight", "10.0.1.11", "100", "--iface", "veth0") == 0)
    calm(faulted)
    lines = faulted.lines()[before:]
    assert not [line for line in lines if "Traceback" in line]
    assert len(lines) < 40
    assert faulted.process.poll() is None


@pytest.mark.xdist_group("faulted")
@pytest.mark.parametrize("case", FEW, ids=named)
def test_a_call_of_the_control_side_fails(faulted, case):
    upset(faulted, case, 1)


@pytest.mark.long
@pytest.mark.xdist_group("faulted")
@pytest.mark.parametrize("case", CONTROL, ids=named)
def test_every_call_of_the_control_side_fails_for_a_while(faulted, case):
    upset(faulted, case, 2**60)


#: What the world does to it, again and again: commands of ip(8), and what undoes them.
FLAPS = {
    "a link": (
        ["link set veth2 down", "link set veth2 up"],
        ["neigh replace 10.0.1.11 lladdr 02:00:00:00:01:01 dev veth2"],
    ),
    "a neighbour": (
        ["neigh replace 10.0.0.11 lladdr 02:00:00:00:01:0a dev veth0", "neigh del 10.0.0.11 dev veth0"],
        ["neigh replace 10.0.0.11 lladdr 02:00:00:00:01:00 dev veth0"],
    ),
    "a route": (["route replace unreachable 10.0.1.11", "route del unreachable 10.0.1.11"], []),
    "an address": (["addr add 10.9.0.2/24 dev veth0", "addr del 10.9.0.2/24 dev veth0"], []),
}


@pytest.mark.long
@pytest.mark.xdist_group("faulted")
@pytest.mark.parametrize("what", FLAPS)
def test_something_flaps(faulted, what):
    there_and_back, undone = FLAPS[what]
    calm(faulted)
    before = len(faulted.lines())
    for _ in range(50):
        for command in there_and_back:
            faulted.pair.ip(*command.split())
            faulted.syns(2)
    for command in undone:
        faulted.pair.ip(*command.split(), "nud", "permanent")
    calm(faulted)
    lines = faulted.lines()[before:]
    assert not [line for line in lines if "Traceback" in line]
    assert len(lines) < 60


def test_the_clock_steps(tmp_path):
    """A month ahead, and behind: CLOCK_REALTIME; CLOCK_MONOTONIC never does.  Nothing is said of it, by a daemon of its
    own: others tell at their next sweep, half a minute later, of what befell them before."""
    with Faulted.made(tmp_path) as faulted:
        calm(faulted)
        before = len(faulted.lines())
        for month in (1, -1, 0):
            faulted.shim.step_clock(month * 30 * 86400)
            assert faulted.answered("weight", "10.0.1.11", "50", "--iface", "veth0") == 0
            reloads = len(faulted.logged("reloaded"))
            faulted.reload(weight=2 + month)
            until(lambda n=reloads: len(faulted.logged("reloaded")) > n)
            calm(faulted)
        assert [line for line in faulted.logged()[before:] if line["level"] != "info"] == []
        faulted.close()


@pytest.mark.long
@pytest.mark.xdist_group("faulted")
def test_it_is_stopped_for_ten_seconds(faulted):
    """What came meanwhile waits, as much as there are frames for; the rest is counted."""
    calm(faulted)
    before = faulted.status()["total"]["received"]
    faulted.process.send_signal(signal.SIGSTOP)
    try:
        for _ in range(100):
            faulted.syns(15)
            time.sleep(0.1)
    finally:
        faulted.process.send_signal(signal.SIGCONT)
    calm(faulted)
    assert faulted.status()["total"]["received"] >= before + 1500
