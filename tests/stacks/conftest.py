"""Sites: a client, a load balancer and real servers, and the count of the connections between them."""

from __future__ import annotations

import itertools
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from crablb.lab import VIP4, VIP6, Lab, Node
from crablb.lab.demo import start_agent
from tests.helpers.namespaces import inside, unique
from tests.helpers.processes import ROOT, until
from tests.helpers.world import World, agent_status, status

#: Seconds; only so that a hang ends as a failure.
LIMIT = 500
#: In front of a command: not as root, which some servers refuse, but files are open to it as to root.
UNPRIVILEGED = (
    "setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups",
    "--inh-caps=+dac_override", "--ambient-caps=+dac_override",
    "--securebits=+no_setuid_fixup",  # or access(2) would not know of it
    "--",
)  # fmt: skip
#: What fetch.py has fetched.
FETCHED = ROOT / ".stacks"


class Site(World):
    """Behind the VIPs' ports: whatever is started on the servers.  ``prepared``: whether the client has an agent."""

    def __init__(self, lab: Lab, folder: Path, ports: tuple[int, ...], prepared: bool, *more: str) -> None:
        """``more``: options of the servers' agents."""
        super().__init__(lab, folder)
        self.prepared = prepared
        self._numbers = itertools.count()
        vips = [part for port in ports for vip in (VIP4, f"[{VIP6}]") for part in ("--vip", f"tcp://{vip}:{port}")]
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda server: start_agent(server, "server", "--dsr", *vips, *more), lab.servers))
        four, six = (
            ",".join(addresses) for addresses in zip(*((s.ip4, f"[{s.ip6}]") for s in lab.servers), strict=True)
        )
        self.serve(what=[f"tcp://{vip}:{p}={own}" for p in ports for vip, own in ((VIP4, four), (f"[{VIP6}]", six))])
        if prepared:
            self.client(*vips)

    def start(self, server: Node, port: int, *command: str | Path) -> subprocess.Popen[str]:
        """A server's program; on return it listens."""
        log = self.folder / f"{server.name}-{next(self._numbers)}.log"
        with open(log, "w") as out:
            child = self._kept(server.popen(*map(str, command), stdin=subprocess.DEVNULL, stdout=out, stderr=out))

        def listens() -> bool:
            assert child.poll() is None, log.read_text()
            return f"pid={child.pid}," in server.run("ss", "-HltMnp", f"sport = :{port}").stdout

        until(listens, LIMIT)
        return child

    def use(self, *command: str | Path, **more: object) -> str:
        """A client's program; what it says."""
        done = self.lab.client.run(*map(str, command), check=False, timeout=LIMIT, **more)
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
        return done.stdout

    def accepted_on(self, server: Node, family: int) -> str:
        """The server's address as it sees it itself."""
        if self.prepared:
            return server.ip4 if family == 4 else server.ip6
        return str(VIP4 if family == 4 else VIP6)

    @contextmanager
    def counted(self, connections: int | None = None, *, left: int = 0, fallback: str = "") -> Iterator[None]:
        """What goes on inside are connections through the load balancer, all of them, and in the way that is the
        site's: one SYN of each passes it if the client is prepared, all that the client sends if not.

        ``left``: so many at the most the client leaves before they are answered.
        ``fallback``: the counter of why a prepared client makes no offers, if it makes none.
        """
        before = self._counts()
        yield
        counts: Counter[str] = Counter()

        def arrived() -> bool:  # what a client sent as the last thing before it ended
            counts.clear()
            counts.update(self._counts())
            counts.subtract(before)
            return counts["accepted"] >= counts["opened"] - left

        with suppress(AssertionError):  # the next one says more
            until(arrived)
        opened = counts["opened"]
        again = counts["syn"] - opened
        assert opened == (opened if connections is None else connections) > 0, counts
        # A prepared client sends its SYN again soon, without an offer; where both are answered it resets the second.
        assert opened - left <= counts["accepted"] <= opened + again, counts
        assert 0 <= again <= counts["sent again"], counts
        if self.prepared and not fallback:
            assert counts["offered"] == counts["redirected"] == opened, counts
            assert opened - left <= counts["taken"] <= opened and counts["failed"] <= left, counts
            assert counts["fallback"] == again, counts
            assert counts["other"] + counts["flow"] <= again, counts
        else:
            assert counts["redirected"] == counts["offered"] == counts["taken"] == 0, counts
            assert counts["fallback"] == counts["syn"] and counts["other"] + counts["flow"] > 0, counts
            assert not fallback or counts[fallback] == opened, counts

    def _counts(self) -> Counter[str]:
        """By the kernels' and crablb's own counters."""
        client, total = self.lab.client, status(self.lab)
        found = Counter(total["xdp"])
        found["redirected"] = total["total"]["redirected"]
        found["fallback"] = total["total"]["fallback_no_offer"]
        own = kernel(client)
        # Without what it has with itself, and what was refused.
        found["opened"] = own["TcpActiveOpens"] - own["TcpPassiveOpens"] - own["TcpAttemptFails"]
        found["sent again"] = own["TcpExtTCPSynRetrans"]
        found["accepted"] = sum(kernel(server)["TcpPassiveOpens"] for server in self.lab.servers)
        if self.prepared:
            told = Counter(agent_status(client)["client"]["counters"])
            found["taken"] = told.pop("redirected")
            found.update(told)
        return found


def kernel(node: Node) -> dict[str, int]:
    """The counters of the node's kernel, by the names that nstat gives them."""
    found = {}
    with inside(node.netns):
        for table in ("snmp", "netstat"):
            lines = iter(Path(f"/proc/thread-self/net/{table}").read_text().splitlines())
            for names, values in zip(lines, lines, strict=True):
                (title, *columns), (_, *numbers) = names.split(), values.split()
                found |= {title[:-1] + column: int(number) for column, number in zip(columns, numbers, strict=True)}
    return found


@pytest.fixture(params=[True, False], ids=["prepared", "unprepared"])
def prepared(request: pytest.FixtureRequest) -> bool:
    """Whether the client of the site has an agent."""
    return bool(request.param)


@pytest.fixture
def make_site(prepared: bool, tmp_path: Path) -> Iterator[Callable[..., Site]]:
    """``make_site(*ports, servers=2, topology="bridge")``"""
    with ExitStack() as sites:

        def make(*ports: int, servers: int = 2, topology: str = "bridge") -> Site:
            lab = sites.enter_context(Lab.create(unique(), topology, servers))  # type: ignore[arg-type]
            return Site(lab, tmp_path, ports, prepared)

        yield make
