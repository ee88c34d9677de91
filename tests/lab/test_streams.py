"""What a process may be given: closed or full streams, few files, no /proc, no /run, a short PATH.  One line tells."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from crablb.lab import VIP4, Lab
from crablb.lab.demo import VIPS, crablb
from tests.helpers.processes import ROOT, until
from tests.helpers.world import World, status

pytestmark = pytest.mark.long

SERVICE = f"tcp://{VIP4}:80=10.0.0.11"
#: Commands that print.
PRINTING = {
    "help": ["--help"],
    "help-of": ["serve", "--help"],
    "version": ["--version"],
    "example": ["config", "example"],
    "reference": ["config", "reference"],
    "key": ["key", "new"],
    "completion": ["completion", "bash"],
    "agents": ["agent", "status"],
    "remove": ["remove", "--iface", "nothing"],
    "labs": ["lab", "up", "--help"],
}
#: Those that have something to complain of.
WRONG = {
    "argument": ["serve", "--nonsense"],
    "interface": ["status", "--iface", "nothing"],
    "file": ["config", "check", "/nowhere.toml"],
    "root": ["serve", "--iface", "nothing", "--service", SERVICE],
}


def shell(redirection: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {redirection}', "sh", *crablb(*args)],
        capture_output=True, text=True, cwd=ROOT, timeout=300, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("name", PRINTING)
@pytest.mark.parametrize(
    ("redirection", "why"), [(">/dev/full", "No space left on device"), (">&-", "Bad file descriptor")]
)
def test_what_is_printed_cannot_be(name: str, redirection: str, why: str):
    args = PRINTING[name]
    done = shell(redirection, *args)
    assert (done.returncode, done.stderr) == (2, f"crablb: cannot write to standard output: {why}\n")


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("redirection", ["2>/dev/full", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_complaints_cannot_be_printed(name: str, redirection: str):
    """The exit status tells all the same."""
    done = shell(redirection, *WRONG[name])
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


@pytest.mark.parametrize("name", PRINTING)
def test_nobody_reads(name: str):
    """As ``| true``: no traceback, nothing said."""
    reader, writer = os.pipe()
    os.close(reader)
    args = PRINTING[name]
    done = subprocess.run(
        crablb(*args), stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT, timeout=300, check=False
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def full_pipe() -> tuple[int, int]:
    """A pipe without room, and nobody to read it."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    os.set_blocking(writer, True)
    return reader, writer


def test_a_command_whose_reader_stalls_can_be_ended():
    reader, writer = full_pipe()
    child = subprocess.Popen(crablb("config", "example"), stdout=writer, cwd=ROOT)
    until(lambda: "pipe" in Path(f"/proc/{child.pid}/wchan").read_text())
    child.terminate()
    assert child.wait(60) == 128 + signal.SIGTERM
    os.close(reader)
    os.close(writer)


def test_the_load_balancer_does_not_wait_for_who_reads_its_log(make_world: Callable[..., World], tmp_path: Path):
    """It is reloaded, and ends, while its log's reader stalls."""
    world = make_world()
    lb = world.lab.lb
    file = tmp_path / "lb.toml"
    file.write_text(
        f'interface = "eth0"\n[[service]]\naddress = "tcp://{VIP4}:80"\nbackends = ["10.0.0.11"]\ncheck = []\n'
    )
    reader, writer = full_pipe()
    args = crablb("serve", "--config", str(file))
    child = lb.popen(*args, stdout=writer, stderr=writer, cwd=ROOT)
    until(lambda: lb.run(*crablb("status", "--iface", "eth0"), check=False).returncode == 0)
    for n in range(1, 5):
        child.send_signal(signal.SIGHUP)
        until(lambda n=n: status(world.lab)["daemon"]["reloads"] == n)  # type: ignore[misc]
    child.terminate()
    assert child.wait(60) == 0
    os.close(reader)
    os.close(writer)


def test_an_agent_does_not_wait_for_who_reads(make_world: Callable[..., World]):
    world = make_world()
    server = world.lab.servers[0]
    reader, writer = full_pipe()
    args = crablb("agent", "server", "--vip", VIPS[0])
    child = server.popen(*args, stdout=writer, stderr=writer, cwd=ROOT)
    until(lambda: "server" in server.run(*crablb("agent", "status"), check=False).stdout)
    child.terminate()
    assert child.wait(60) == 0
    os.close(reader)
    os.close(writer)


@pytest.mark.parametrize("redirection", ["<&- >&- 2>&-", "<&- >/dev/full 2>/dev/full"])
@pytest.mark.parametrize("what", ["serve", "agent"])
def test_daemons_need_no_streams(make_world: Callable[..., World], what: str, redirection: str):
    world = make_world()
    node = world.lab.lb if what == "serve" else world.lab.servers[0]
    args = ["serve", "--iface", "eth0", "--service", SERVICE]
    ask = ["status", "--iface", "eth0"]
    if what == "agent":
        args, ask = ["agent", "server", "--vip", VIPS[0]], ["agent", "status"]
    child = node.popen("sh", "-c", f'exec "$@" {redirection}', "sh", *crablb(*args), cwd=ROOT)
    until(lambda: f"process {child.pid}" in node.run(*crablb(*ask), check=False).stdout)
    child.terminate()
    assert child.wait(60) == 0


# ---- the machine ----


def in_mounts(lab: Lab, mounts: str, *args: str) -> subprocess.CompletedProcess[str]:
    """A command in the load balancer's node, with other things mounted."""
    script = f'{mounts}; exec "$@"'
    return lab.lb.run("unshare", "--mount", "sh", "-ec", script, "sh", *crablb(*args), check=False)


SERVE = ["serve", "--iface", "eth0", "--service", SERVICE]
SAY_RUN = (
    r"crablb: cannot write /run/crablb[^\n]*: {}; crablb keeps its state in /run/crablb:"
    r" (mount -o remount,rw|df) /run[^\n]*\n"
)
PROC = r"crablb: /proc[^\n]*: No such file or directory; mount it: mount -t proc proc /proc\n"
LACKING = {
    "run-read-only": ("mount -t tmpfs -o ro none /run", SERVE, SAY_RUN.format("Read-only file system")),
    "run-full": (
        "mount -t tmpfs -o size=4k none /run; mkdir /run/crablb; head -c 4096 /dev/zero >/run/full",
        SERVE,
        SAY_RUN.format("No space left on device"),
    ),
    "run-without-inodes": (
        "mount -t tmpfs -o nr_inodes=2 none /run; mkdir /run/crablb",
        SERVE,
        SAY_RUN.format("No space left on device"),
    ),
    "no-proc": ("mount -t tmpfs none /proc", SERVE, PROC),
    "no-proc-status": ("mount -t tmpfs none /proc", ["status", "--iface", "eth0"], PROC),
    "no-proc-agent": ("mount -t tmpfs none /proc", ["agent", "server", "--vip", VIPS[0], "--detach"], PROC),
    "few-files": (
        "ulimit -n 40",
        SERVE,
        r"crablb: 40 files may be open at most, and crablb needs 64 or more; raise the limit: ulimit -n,"
        r" LimitNOFILE= in a systemd unit\n",
    ),
}


@pytest.mark.parametrize("name", LACKING)
def test_what_lacks_is_told(make_lab: Callable[..., Lab], name: str):
    lab = make_lab("bridge")
    mounts, args, words = LACKING[name]
    done = in_mounts(lab, mounts, *args)
    assert done.returncode == 2, done.stderr
    assert re.fullmatch(words, done.stderr), done.stderr
    assert not list(lab.lb.pins.glob("lb-*"))


@pytest.mark.parametrize("files", [64, 70, 80, 90, 100])
def test_files_run_out_later(make_lab: Callable[..., Lab], files: int):
    """Enough to begin with, and too few for its maps and queues: one line, or it serves."""
    lab = make_lab("bridge")
    script = f'ulimit -n {files}; exec timeout -s TERM 3 "$@"'
    queues = ["--queues", "1"]
    done = lab.lb.run("sh", "-c", script, "sh", *crablb(*SERVE, *queues), check=False)
    assert "Traceback" not in done.stderr
    assert done.returncode in (0, 2, 124), done.stderr
    if done.returncode == 2:
        complaints = [line for line in done.stderr.splitlines() if line.startswith("crablb: ")]
        assert len(complaints) == 1
        assert "Too many open files" in complaints[0]
    assert not list(lab.lb.pins.glob("lb-*"))


def test_hidden_processes(make_world: Callable[..., World]):
    """hidepid, for a root who may not look into others' processes: all works."""
    world = make_world()
    script = 'mount -t proc -o hidepid=2 proc /proc; exec setpriv --bounding-set -sys_ptrace "$@"'
    hidden = ["unshare", "--mount", "sh", "-ec", script, "sh"]
    world.servers()
    balancer = world.serve(program=[*hidden, *crablb()])
    assert world.echo(VIP4, "10")["intact"]
    shown = world.lab.lb.run(*hidden, *crablb("status", "--iface", "eth0", "--json")).stdout
    assert json.loads(shown)["pid"] == balancer.pid
    done = world.lab.lb.run(*hidden, *crablb("agent", "status"))
    assert done.stdout == "no agent in this network namespace\n"


def test_programs_that_path_does_not_name(make_world: Callable[..., World]):
    """Those of /usr/sbin are found."""
    world = make_world()
    server = world.lab.servers[0]
    lacking = ["env", "PATH=/nowhere", sys.executable, "-m", "crablb"]
    args = ["agent", "server", "--vip", VIPS[0], "--dsr", "--detach"]
    server.ip(f"addr del {VIP4}/32 dev lo")
    server.run(*lacking, *args)
    assert str(VIP4) in server.run("ip", "addr", "show", "dev", "lo").stdout
    server.run(*lacking, "agent", "remove")
