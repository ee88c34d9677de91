"""Suites that run once straight at a server and then through the load balancer, in three ways, and what differs.

``prepared``: the client has an agent, connections are redirected.  ``fallback``: it has none.  ``mptcp``: it has none
either, but client and server are run by ``mptcpize``, and the server's agent leads connections to its own address.
"""

from __future__ import annotations

import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from crablb.lab import VIP4, VIP6, Lab, Node
from tests.helpers.namespaces import unique
from tests.stacks.conftest import Site, kernel

#: What unmodified programs get MPTCP sockets by.
MPTCPIZE = ("mptcpize", "run")
WAYS = ("prepared", "fallback", "mptcp")


@dataclass
class Result:
    """What a suite said of its tests, by their names."""

    passed: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)

    @property
    def run(self) -> set[str]:
        return self.passed | self.failed


class ForeignSite(Site):
    """A site whose client takes one of ``WAYS``."""

    def __init__(self, lab: Lab, folder: Path, ports: tuple[int, ...], way: str, one_cgroup: bool = False) -> None:
        self.way = way
        self._of = ("--cgroup", str(lab.servers[0].cgroup)) if one_cgroup else ()
        super().__init__(lab, folder, ports, way == "prepared", *(["--mptcp"] if way == "mptcp" else []))
        if way == "mptcp":
            lab.client.run("ip", "mptcp", "limits", "set", "add_addr_accepted", "1", "subflows", "2")

    def client(self, *more: str) -> subprocess.Popen[str]:
        # A machine that has much to do is not a way that redirects do not survive.
        return super().client(*more, "--retransmission", "0", *self._of)

    @property
    def by(self) -> tuple[str, ...]:
        """In front of the programs of client and server."""
        return MPTCPIZE if self.way == "mptcp" else ()

    @contextmanager
    def went(self, connections: int | None = None, only_these: bool = True) -> Iterator[None]:
        """What goes on inside goes through the load balancer, in the site's way.

        ``only_these``: the clients have no connections but by their way, and the servers none but with them.
        """
        if self.way != "mptcp" and only_these:
            with self.counted(connections):
                yield
            return
        before = self._multipath()
        yield
        counts = self._multipath()
        counts.subtract(before)
        if self.way == "prepared":
            assert counts["redirected"] == counts["offered"] > 0, counts
            return
        assert counts["redirected"] == 0 < counts["fallback"], counts
        if self.way == "mptcp":
            # Those that the servers took for MPTCP too; not all of them live long enough to be led anywhere.
            assert 0 < counts["multipath"] <= counts["fallback"], counts
            assert counts["joined"] > 0 or not only_these, counts

    def _multipath(self) -> Counter[str]:
        found = self._counts()
        own = kernel(self.lab.client)
        found["multipath"], found["joined"] = own["MPTcpExtMPCapableSYNACKRX"], own["MPTcpExtMPJoinSynAckRx"]
        return found


#: By suite: straight at the server.  Once for all ways.
_direct: dict[str, Result] = {}
#: Suite, way; what failed there, and what of that did not straight at the server.
_rows: list[tuple[str, str, Result, set[str]]] = []


def compare(
    suite: str, way: str, straight: Callable[[], Result], through: Callable[[], Result], excused: dict[str, str]
) -> None:
    """Run both and hold them against each other.

    ``excused``: the tests that may fail through the load balancer alone, with the reason.  Whatever else fails there
    fails straight at the server as well, and both run the same tests.
    """
    if suite not in _direct:
        _direct[suite] = straight()
    direct, found = _direct[suite], through()
    differing = direct.passed & found.failed
    _rows.append((suite, way, found, differing))
    assert found.run == direct.run, "\n".join(["run in one of both alone:", *sorted(direct.run ^ found.run)])
    assert len(found.passed) > 0
    unknown = differing - excused.keys()
    assert not unknown, "\n".join(["fail through the load balancer alone:", *sorted(unknown)])


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not _rows:
        return
    say = terminalreporter.write_line
    terminalreporter.section("suites")
    for suite, direct in _direct.items():
        say(f"{suite}: {len(direct.run)} tests; straight at the server {len(direct.passed)} passed")
        for name in sorted(direct.failed):
            say(f"    failed: {name}")
        for way, found, differing in (row[1:] for row in _rows if row[0] == suite):
            say(f"  {way}: {len(found.passed)} of {len(found.run)} passed, {len(differing)} failed here alone")
            for name in sorted(differing):
                say(f"    failed here alone: {name}")


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make_site(way: str, tmp_path: Path) -> Iterator[Callable[..., ForeignSite]]:
    """``make_site(*ports, servers=2, one_cgroup=False)``; ``one_cgroup``: the client's programs run in the first
    server's cgroup, those in the client's network namespace being its own."""
    with ExitStack() as sites:

        def make(*ports: int, servers: int = 2, one_cgroup: bool = False) -> ForeignSite:
            lab = sites.enter_context(Lab.create(unique(), "bridge", servers))
            return ForeignSite(lab, tmp_path, ports, way, one_cgroup)

        yield make


def targets(server: Node) -> dict[int, tuple[str, str]]:
    """By family: the server's own address, and the VIP."""
    return {4: (server.ip4, str(VIP4)), 6: (server.ip6, str(VIP6))}
