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

#: Seconds; only so that a hang ends as a failure.  A suite takes minutes, on a machine that has much to do many.
LIMIT = 1500
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
#: What a test says of its suite goes with its report, as it may run in another process.
ROW = "suite"
LONGEST = ("test_tls", "test_redis", "test_packetdrill", "test_haproxy")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins first."""
    here = Path(__file__).parent
    items.sort(key=lambda item: item.path.parent == here and item.path.stem not in LONGEST)


def direct(suite: str) -> Result:
    """What came out straight at the server; known while the other ways run."""
    return _direct[suite]


@pytest.fixture
def compare(request: pytest.FixtureRequest) -> Callable[..., None]:
    """``compare(suite, way, straight, through)``: run both and hold them against each other.

    What fails through the load balancer fails straight at the server as well, and both run the same tests.
    """

    def both(suite: str, way: str, straight: Callable[[], Result], through: Callable[[], Result]) -> None:
        if suite not in _direct:
            _direct[suite] = straight()
        plain, found = _direct[suite], through()
        differing = plain.passed & found.failed
        row = [suite, way, *map(sorted, (plain.passed, plain.failed, found.passed, differing))]
        request.node.user_properties.append((ROW, row))
        assert found.run == plain.run, "\n".join(["run in one of both alone:", *sorted(plain.run ^ found.run)])
        assert len(found.passed) > 0
        assert not differing, "\n".join(["fail through the load balancer alone:", *sorted(differing)])

    return both


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for some in terminalreporter.stats.values() for report in some]
    rows = [
        value
        for report in reports
        if getattr(report, "when", "") == "call"
        for name, value in report.user_properties
        if name == ROW
    ]
    if not rows:
        return
    say = terminalreporter.write_line
    terminalreporter.section("suites")
    for suite in dict.fromkeys(row[0] for row in rows):
        of_it = [row[1:] for row in rows if row[0] == suite]
        _, passed, failed, *_ = of_it[0]
        say(f"{suite}: {len(passed) + len(failed)} tests; without the load balancer {len(passed)} passed")
        for name in failed:
            say(f"    failed: {name}")
        for way, _, _, well, differing in of_it:
            say(f"  {way}: {len(well)} passed, {len(differing)} failed here alone")
            for name in differing:
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
