"""``crablb quickstart``: what it writes and prints is run as it stands, and a client is answered."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from crablb.lab import VIP4, VIP6, Lab
from crablb.lab.demo import crablb, notify_socket
from tests.helpers.processes import ROOT, until

#: A shell in which `crablb` is this one.
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def shell(command: str) -> list[str]:
    return ["env", f"PATH={PATH}", "bash", "-c", command]


def converse(lab: Lab, answers: list[str], *args: str) -> tuple[int, str]:
    """The command on a terminal, which is told these; its status, and all that the terminal shows."""
    pid, ours = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        argv = lab.lb.command(shell(shlex.join(["crablb", "quickstart", *args])))
        os.execvp(argv[0], argv)
    said, left = b"", [*answers]
    while True:
        try:
            said += os.read(ours, 4096)
        except OSError:  # its end has gone
            break
        if left and re.search(rb"(: |\? \[[YyNn/]+\] )$", said):
            os.write(ours, f"{left.pop(0)}\n".encode())
    os.close(ours)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said.decode().replace("\r\n", "\n")


@pytest.mark.parametrize("topology", ["bridge", "routed"])
def test_what_it_prints_is_run(make_lab, tmp_path, topology):
    lab = make_lab(topology)
    path = tmp_path / "lb.toml"
    for server in lab.servers:  # as they are, before anybody has prepared them
        server.ip(f"addr del {VIP4}/32 dev lo", f"addr del {VIP6}/128 dev lo")
        server.set({"net.ipv4.conf.all.arp_ignore": 0, "net.ipv4.conf.all.arp_announce": 0})
    if topology == "bridge":  # the VIP is announced
        lab.client.ip(f"route del {VIP4}/32", f"route del {VIP6}/128")
    answers = [
        *("", f"{VIP4}:80 [{VIP6}]:80"),
        *(" ".join(server.ip4 for server in lab.servers), ", ".join(server.ip6 for server in lab.servers)),
        "",
    ]
    status, shown = converse(lab, answers, "--output", str(path))
    assert status == 0, shown
    assert ("[vip-routed]" in shown) == (topology == "routed"), shown
    assert lab.lb.run(*crablb("check", "--here", str(path))).stdout == "ok\n"
    here, server_command, *checks = re.findall(r"^    (.*)$", shown.partition(" is written. Next:")[2], re.M)
    assert here == f"crablb serve --config {path}"
    with notify_socket(tmp_path) as (notify, wait), open(tmp_path / "serve.log", "w") as log:
        daemon = lab.lb.popen(*shell(here), stderr=log, env={**os.environ, "NOTIFY_SOCKET": notify})
        assert wait(daemon) == "READY=1"
    for server in lab.servers:
        server.popen(sys.executable, "-m", "http.server", "--bind", "::", "80", cwd=tmp_path, stderr=subprocess.DEVNULL)
        server.run(*shell(server_command))
    assert len(checks) == 2
    for check in checks:  # once the backends answer, and their programs listen
        until(lambda check=check: "lb.toml" in lab.client.run(*shell(check), check=False).stdout)
    told = json.loads(lab.lb.run(*crablb("status", "--json"), check=False).stdout)
    assert told["flows"] >= 2
    # Again: who serves by this file already reads it anew.
    more = ["--yes", "--force", "--vip", f"{VIP4}:80", "--backend", lab.servers[0].ip4, "--output", str(path)]
    status, shown = converse(lab, [], *more)
    assert status == 0, shown
    assert f"here (process {daemon.pid} serves by this file):\n    crablb reload\n" in shown
    lab.lb.run(*shell("crablb reload"))
    told = json.loads(lab.lb.run(*crablb("services", "--json")).stdout)
    assert [one["vip"] for one in told] == [f"tcp://{VIP4}:80"]


@pytest.mark.long
@pytest.mark.parametrize("more", [[], ["--json"]], ids=["text", "json"])
def test_what_cannot_be_told_is_not_written(make_lab, tmp_path, more):
    """And what was there is as it was, with the one before."""
    lab = make_lab()
    words = ["--yes", "--iface", "eth0", "--vip", f"{VIP4}:80", "--backend", lab.servers[0].ip4, *more]

    def told_to(where: str, *also: str) -> tuple[int, str]:
        command = f"{shlex.join(['crablb', 'quickstart', *words, *also])} {where}"
        done = lab.lb.run(*shell(command), check=False)
        return done.returncode, done.stderr

    new = tmp_path / "new.toml"
    status, said = told_to(">/dev/full", "--output", str(new))
    assert (status, "cannot write to standard output: No space left on device" in said) == (2, True), said
    assert list(tmp_path.iterdir()) == []
    old, backup = tmp_path / "lb.toml", tmp_path / "lb.toml.bak"
    old.write_text("old")
    old.chmod(0o640)
    for before in (None, "older"):
        if before:
            backup.write_text(before)
        assert told_to(">/dev/full", "--output", str(old), "--force")[0] == 2
        assert (old.read_text(), old.stat().st_mode & 0o777) == ("old", 0o640)
        assert (backup.read_text() if backup.exists() else None) == before
    assert told_to(">/dev/null", "--output", str(new))[0] == 0
    assert new.exists()
