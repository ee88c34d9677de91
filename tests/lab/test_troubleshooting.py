"""docs/troubleshooting.md: each symptom made, and the lines run that the page has for it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from itertools import groupby
from pathlib import Path

import pytest

from crablb.lab import VIP4, Lab, Node
from crablb.lab.demo import start_agent, start_serve
from tests.helpers.namespaces import unique
from tests.helpers.pages import Step, is_as, steps
from tests.helpers.processes import ROOT, until
from tests.helpers.world import command, status

#: One lab serves all of it.
pytestmark = [pytest.mark.long, pytest.mark.xdist_group("troubleshooting")]

PAGE = ROOT / "docs/troubleshooting.md"
SECTIONS = {title: list(found) for title, found in groupby(steps(PAGE), lambda step: step.snippet.section)}
VIP = f"tcp://{VIP4}:80"
FILE = f"""interface = "eth0"

[[service]]
address = "{VIP}"
backends = ["10.0.0.11", "10.0.0.12"]
"""


class Site:
    """Two web servers with their agents, and a load balancer for each test."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab, self.folder = lab, folder
        self.client, self.lb, self.switch = lab.client, lab.lb, lab.middle
        self.first, self.second = lab.servers
        (folder / "empty").mkdir()
        self.web = {server.name: self.listen(server) for server in lab.servers}
        self.agents = {server.name: start_agent(server, "server") for server in lab.servers}

    def listen(self, server: Node) -> subprocess.Popen[str]:
        program = [sys.executable, "-m", "http.server", "--directory", str(self.folder / "empty"), "80"]
        child = server.popen(*program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until(lambda: ":80 " in server.run("ss", "-Hltn").stdout)
        return child

    def serve(self, text: str = FILE) -> None:
        (self.folder / "lb.toml").write_text(text)
        self.child = start_serve(self.lab, self.folder, config=self.folder / "lb.toml")
        until(lambda: status(self.lab)["state"] != "starting")
        until(lambda: "not checked yet" not in command(self.lb, "status", expected=None))

    def end(self) -> None:
        if self.child.poll() is None:
            self.child.terminate()
        self.child.wait()
        command(self.lb, "remove", "--iface", "eth0", expected=None)
        for left in Path("/var/lib/crablb").glob(f"*netns-{self.lb.netns}-*"):
            left.unlink()

    def again(self, text: str) -> None:
        self.end()
        self.serve(text)

    def get(self, seconds: str = "10") -> subprocess.CompletedProcess[str]:
        return self.client.run("curl", "-s", "--max-time", seconds, f"http://{VIP4}/", check=False)

    def shows(self, word: str) -> None:
        """``crablb backends`` has come to it."""
        until(lambda: word in command(self.lb, "backends"))


@contextmanager
def changed(node: Node, *commands: tuple[str, str]) -> Iterator[None]:
    """Something is otherwise in a node: what makes it so, and what puts it back."""
    try:
        for make, _ in commands:
            node.run(*make.split())
        yield
    finally:
        for _, back in commands:
            node.run(*back.split(), check=False)


#: Makes what a section's lines are about, one after the other, and says where each is run.
Maker = Callable[[Site], Generator[Node | list[str]]]
MAKERS: dict[str, Maker] = {}


def makes(title: str) -> Callable[[Maker], Maker]:
    def keep(maker: Maker) -> Maker:
        MAKERS[title] = maker
        return maker

    return keep


VIP_OFF = (f"ip addr del {VIP4}/32 dev lo", f"ip addr add {VIP4}/32 dev lo")


@makes("Clients hang")
def hang(site: Site) -> Generator[Node]:
    site.child.kill()
    site.child.wait()
    yield site.lb
    site.again(FILE)
    yield site.lb
    with changed(site.first, VIP_OFF):
        site.shows("down")
        yield site.lb


@makes("Connections are refused")
def refused(site: Site) -> Generator[Node]:
    for backend in ("10.0.0.11", "10.0.0.12"):
        command(site.lb, "drain", backend)
    assert site.get().returncode == 7
    yield site.lb
    command(site.lb, "reload", "--discard")
    yield site.lb
    site.web["server1"].terminate()
    site.web["server1"].wait()
    site.shows("refused")
    yield site.lb
    site.web["server1"] = site.listen(site.first)


@makes("Connections that were open are reset")
def reset(site: Site) -> Generator[Node]:
    command(site.lb, "drain", "10.0.0.12")
    yield site.lb


@makes("Some clients only")
def some(site: Site) -> Generator[Node]:
    yield site.lb
    # Its agent does not know these backends.
    agent = start_agent(
        site.client, "client", "--backends", "10.0.0.99/32", "--backends", "fd00::99/128", "--no-verify"
    )
    assert site.get().returncode == 0
    until(lambda: "  wrong: " in command(site.client, "agent", "status", expected=None))
    yield site.client
    agent.terminate()
    agent.wait()
    with changed(
        site.first, ("sysctl -qw net.ipv4.conf.all.arp_ignore=0", "sysctl -qw net.ipv4.conf.all.arp_ignore=1")
    ):
        yield site.lb


@makes("Small answers come, big ones hang")
def big(site: Site) -> Generator[Node]:
    with changed(site.lb, ("sysctl -qw net.ipv4.ip_no_pmtu_disc=1", "sysctl -qw net.ipv4.ip_no_pmtu_disc=0")):
        yield site.lb
    site.again('xdp_mode = "generic"\n' + FILE.replace("backends", 'fallback = "dsr-ipip"\nbackends'))
    with changed(site.lb, ("ethtool -K eth0 gro on", "ethtool -K eth0 gro off")):
        yield site.lb


@makes("One server gets nothing")
def nothing(site: Site) -> Generator[Node]:
    command(site.lb, "drain", "10.0.0.12")
    yield site.lb
    with changed(site.switch, ("ip link set server1 down", "ip link set server1 up")):
        site.shows("does not answer")
        yield site.lb


@makes("Everything goes by the fallback")
def fallback(site: Site) -> Generator[Node]:
    assert site.get().returncode == 0
    yield site.lb
    for server in (site.first, site.second):
        site.agents[server.name].terminate()
        site.agents[server.name].wait()
    until(lambda: command(site.lb, "backends").count("without the redirect") == 2)
    until(lambda: "10.0.0.11 is not redirected to" in command(site.lb, "doctor", expected=None))
    yield site.lb
    yield site.lb
    site.agents = {server.name: start_agent(server, "server") for server in site.lab.servers}


@makes("After an upgrade")
def upgrade(site: Site) -> Generator[Node]:
    command(site.lb, "weight", "10.0.0.11", "2")
    site.child.terminate()
    site.child.wait()
    [state] = Path("/var/lib/crablb").glob(f"*netns-{site.lb.netns}-eth0.state.json")
    state.write_text("of another version")
    site.serve()
    yield site.lb


@makes("After a reboot")
def reboot(site: Site) -> Generator[Node]:
    yield site.client  # on which there is none


@makes("In a container")
def container(site: Site) -> Generator[list[str]]:
    yield site.lb.command(["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin", "bash"])


@makes("VLANs")
def vlans(site: Site) -> Generator[Node]:
    yield site.lb


@makes("SYNs are dropped")
def dropped(site: Site) -> Generator[Node]:
    site.again(FILE.replace('"eth0"', '"eth0"\nclosed = "drop"').replace("backends", "check = []\nbackends"))
    down = [(f"ip link set {server} down", f"ip link set {server} up") for server in ("server1", "server2")]
    with changed(site.switch, *down):
        until(lambda: command(site.lb, "backends").count("does not answer") == 2)
        # One that is dropped is sent again each second, so they are many enough to be seen within one.
        waiting = [
            site.client.popen("curl", "-s", "--max-time", "30", f"http://{VIP4}/", stdout=subprocess.DEVNULL)
            for _ in range(20)
        ]
        until(lambda: status(site.lab)["total"]["drop_no_backend"] >= 20)
        yield site.lb
        for child in waiting:
            child.terminate()
            child.wait()


@makes("MPTCP does not leave the load balancer")
def mptcp(site: Site) -> Generator[Node]:
    yield site.client
    site.agents["server1"].terminate()
    site.agents["server1"].wait()
    with changed(site.first, VIP_OFF):
        agent = start_agent(site.first, "server", "--dsr", "--mptcp")
        yield site.first
        agent.terminate()
        agent.wait()
    site.agents["server1"] = start_agent(site.first, "server")


@makes('"is run already by process"')
def already(site: Site) -> Generator[Node]:
    until(lambda: status(site.lab)["state"] == "serving")
    yield site.lb


@makes("High CPU")
def busy(site: Site) -> Generator[Node]:
    with changed(site.switch, ("ethtool -K lb gro off", "ethtool -K lb gro on")):
        until(lambda: "[bypass]" in command(site.lb, "doctor", expected=None))
        yield site.lb
    site.again('xdp_mode = "generic"\n' + FILE)
    yield site.lb


@makes("Two load balancers, and nobody or both have the VIP")
def two(site: Site) -> Generator[Node]:
    with changed(
        site.second, ("sysctl -qw net.ipv4.conf.all.arp_ignore=0", "sysctl -qw net.ipv4.conf.all.arp_ignore=1")
    ):
        site.again('announce = "arp"\n' + FILE)
        until(lambda: "in use" in command(site.lb, "services"))
        yield site.lb


@makes("No command reaches it")
def unreached(site: Site) -> Generator[Node]:
    yield site.client


@makes('"the takeover failed"')
def not_taken_over(site: Site) -> Generator[Node]:
    until(lambda: status(site.lab)["state"] == "serving")
    yield site.lb


# ---- the test ----


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with Lab.create(unique(), servers=2) as lab:
        yield Site(lab, tmp_path_factory.mktemp("troubleshooting"))


def test_each_symptom_is_made():
    assert list(SECTIONS) == list(MAKERS)


def run(step: Step, where: Node | list[str], folder: Path) -> None:
    entered = where.command(["bash"]) if isinstance(where, Node) else where
    environ = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        entered, input=step.snippet.text, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder,
        env=environ, check=False,
    )  # fmt: skip
    assert step.shown is not None
    assert is_as(step.shown, done.stdout), f"{step.snippet.place} prints\n{done.stdout}"


@pytest.mark.parametrize("title", SECTIONS)
def test_a_symptom(title, site):
    site.serve()
    try:
        with closing(MAKERS[title](site)) as made:
            for step, where in zip(SECTIONS[title], made, strict=True):
                run(step, where, site.folder)
    finally:
        site.end()
