"""A machine that lacks what others have: what is missing is said with what brings it, before anything is made."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from crablb.lab.programs import PACKAGES
from tests.helpers.processes import ROOT

#: Of crablb, in a process whose PATH is all that it looks into.
PROGRAM = """
import sys
from crablb.cli import main, streams
streams.SBIN = ()
{patch}
sys.exit(main(sys.argv[1:]))
"""
#: What the nodes' shells and the test itself use.
PLAIN = ("cat", "sh", "env", "true", "sleep", "rm", "mkdir")


def folder_with(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
        assert found, name
        (folder / name).symlink_to(found)
    return folder


def run(folder: Path, *args: str, patch: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.format(patch=patch), *args],
        cwd=ROOT, env={"PATH": str(folder), "HOME": "/root"}, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("there", "args", "words"),
    [
        (
            ["apt-get"],
            ["demo"],
            "the demo needs ip, sysctl, bash, nsenter, nginx, curl, which are not installed: apt-get install bash curl"
            " iproute2 nginx-light procps util-linux",
        ),
        (
            ["apt-get", "ip", "sysctl", "bash", "nsenter", "curl"],
            ["demo"],
            "the demo needs nginx, which is not installed: apt-get install nginx-light",
        ),
        (
            ["ip", "bash", "nsenter"],
            ["lab", "up", "--name", "t-without"],
            "a lab needs sysctl, which is not installed: install what Debian calls procps, by this system's package"
            " manager",
        ),
        (
            ["apt-get", "ip", "sysctl", "bash", "nsenter"],
            ["lab", "up", "--name", "t-without", "--no-offload"],
            "a lab needs ethtool, which is not installed: apt-get install ethtool",
        ),
    ],
)
def test_what_is_needed(tmp_path, there, args, words):
    state = tmp_path / "labs"  # other tests' labs come and go beside this one
    patch = f"import pathlib\nfrom crablb.lab import lab\nlab.STATE = pathlib.Path({str(state)!r})"
    done = run(folder_with(tmp_path / "bin", *there), *args, patch=patch)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"crablb: {words}\n")
    assert not state.exists() or not list(state.iterdir())


@pytest.mark.long
def test_the_demo_does_what_it_can(tmp_path):
    """Without tcpdump, nft and ethtool, an interface that knows no GRO, and an ip of before MPTCP."""
    lacking = {"tcpdump", "nft", "ethtool"}
    folder = folder_with(tmp_path / "bin", "apt-get", *PLAIN, *{"sysctl", "bash", "nsenter", "nginx", "curl"})
    real = shutil.which("ip", path="/usr/sbin:/sbin:/usr/bin:/bin")
    (folder / "ip").write_text(
        f'#!/bin/sh\n[ "$1" != mptcp ] || {{ echo "Object mptcp is unknown" >&2; exit 1; }}\nexec {real} "$@"\n'
    )
    (folder / "ip").chmod(0o755)
    patch = "from crablb.kernel import ethtool\ndef switch(*_, **__): raise OSError(95, 'no')\nethtool.switch = switch"
    done = run(folder, "demo", "--json", patch=patch)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["held"]
    assert not report["survival"]
    assert list(report["costs"]) == ["prepared", "unprepared"]
    assert "tcpdump is not installed, so what is on the load balancer's wire is not looked at: apt-get" in done.stderr
    assert "nft is not installed, so nothing dies on a client's way but the load balancer: apt-get" in done.stderr
    assert "no MPTCP client: ip mptcp limits set" in done.stderr
    assert lacking.isdisjoint(path.name for path in folder.iterdir())


def test_every_program_has_a_package():
    from crablb.cli.bench import USED
    from crablb.lab.demo import NEEDED, OPTIONAL

    assert {*USED, *NEEDED, *OPTIONAL} <= PACKAGES.keys()
