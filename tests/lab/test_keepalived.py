"""VRRP decides which of two load balancers has the VIP, as examples/keepalived.conf has it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from crablb.lab import VIP4, VIP6, Node
from crablb.lab.demo import start_agent, start_serve
from tests.helpers.processes import ROOT, until
from tests.helpers.world import World, status

pytestmark = pytest.mark.long

EXAMPLE = ROOT / "examples" / "keepalived.conf"


class Router:
    """keepalived and crablb on a node."""

    def __init__(self, world: World, node: Node, folder: Path, priority: int) -> None:
        self.world, self.node, self.folder = world, node, folder
        folder.mkdir()
        for name, text in {
            "told": f'#!/bin/sh\necho "$3" >> {folder}/states\n',
            "check": f"#!/bin/sh\nkill -0 $(cat {folder}/serving)\n",
        }.items():
            (folder / name).write_text(text)
            (folder / name).chmod(0o700)
        text = EXAMPLE.read_text()
        for old, new in {
            "/usr/bin/systemctl is-active --quiet crablb": f"{folder}/check",
            '"/usr/bin/logger -t keepalived"': f'"{folder}/told"',
            "priority 100": f"priority {priority}",
        }.items():
            assert old in text
            text = text.replace(old, new)
        (folder / "keepalived.conf").write_text(text)
        self.serve()
        pids = [f"--{of}pid={folder}/{of or 'parent'}.pid" for of in ("", "vrrp_", "checkers_")]
        with open(folder / "keepalived.log", "w") as log:
            node.popen(
                "keepalived", "--dont-fork", "--log-console", "--log-detail", "--vrrp",
                f"--use-file={folder}/keepalived.conf", *pids, stdout=log, stderr=log,
            )  # fmt: skip

    def serve(self) -> None:
        what = [f"tcp://{VIP4}:80=10.0.0.11"]
        self.child = start_serve(self.world.lab, self.folder, "--announce", "none", what=what, node=self.node)
        (self.folder / "serving").write_text(str(self.child.pid))

    def kill(self) -> None:
        self.child.kill()
        self.child.wait()

    @property
    def state(self) -> str:
        """As keepalived last told it."""
        states = self.folder / "states"
        told = states.read_text().split() if states.exists() else []
        return told[-1] if told else ""

    def forwarded(self) -> int:
        return int(status(self.world.lab, self.node)["total"]["sent"])


@pytest.fixture
def routers(make_world, tmp_path):
    assert shutil.which("keepalived"), "install keepalived (make test does)"
    world = make_world("bridge", servers=2, offload=False)
    server, second = world.lab.servers
    world.python(server, "serve", server.name, "80", ready=True)
    start_agent(server, "server", "--dsr")
    second.ip(f"addr del {VIP4}/32 dev lo", f"addr del {VIP6}/128 dev lo")
    second.set({"net.ipv4.conf.all.arp_ignore": 0, "net.ipv4.conf.all.arp_announce": 0})
    world.lab.client.ip(f"route del {VIP4}/32")
    yield Router(world, world.lab.lb, tmp_path / "first", 100), Router(world, second, tmp_path / "second", 90)
    world.lab.destroy()


def test_vrrp_decides(routers):
    first, second = routers
    world = first.world
    until(lambda: first.state == "MASTER", 30)
    until(lambda: second.state == "BACKUP", 30)
    assert world.echo(VIP4)["server"] == "server1"
    assert first.forwarded()
    assert not second.forwarded()

    first.kill()
    until(lambda: second.state == "MASTER", 30)
    assert world.echo(VIP4)["server"] == "server1"
    assert second.forwarded()

    first.serve()
    until(lambda: (first.state, second.state) == ("MASTER", "BACKUP"), 30)
    before = second.forwarded()
    assert world.echo(VIP4)["server"] == "server1"
    assert second.forwarded() == before
    assert first.child.poll() is None
