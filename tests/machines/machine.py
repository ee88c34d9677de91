"""What ``distros.py`` and ``kernels.py`` share: the host's settings, commands that leave nothing, the verdict.

Everything is kept in ``.machines`` of the project: what can be used again, and ``logs``.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent.parent
HERE = PROJECT / "tests/machines"
FOLDER = PROJECT / ".machines"
LOGS = FOLDER / "logs"

# Debian's own signatures, whatever the host is (package debian-archive-keyring).
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"

# Seconds; only so that a hang ends as a failure.
LIMIT = 3600

# How much of a log is shown of what failed.
TAIL = 40


class Failed(Exception):
    """A step without which the machine cannot be had; its text says which, and why."""


def command(args: Sequence[str | Path], log: Path, cgroup: Path | None = None) -> int:
    """Run a command, its output into a log.  Returns its exit status; 124 if it took longer than ``LIMIT``.

    However it ends, and however this program does, the command does not outlive it.
    """
    wrapped = ["setpriv", "--pdeathsig", "KILL", *map(str, args)]
    if cgroup is not None:
        wrapped = ["sh", "-c", 'echo 0 > "$0/cgroup.procs" && exec "$@"', str(cgroup), *wrapped]
    # A session of its own: Ctrl-C is for this program, which then ends the command.
    with open(log, "ab") as out, subprocess.Popen(
        wrapped, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
    ) as process:  # fmt: skip
        try:
            return process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            out.write(f"\ngiven up after {LIMIT} seconds\n".encode())
            return 124
        finally:
            process.kill()


def must(args: Sequence[str | Path], log: Path, what: str) -> None:
    """Run a command that has to succeed.  Raises :class:`Failed`."""
    if command(args, log):
        raise Failed(f"cannot {what}")


def output(*args: str | Path) -> str:
    """What a quick command says.  Raises :class:`Failed` with its complaint."""
    done = subprocess.run(list(map(str, args)), capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(f"{' '.join(map(str, args))}: {done.stderr.strip()}")
    return done.stdout


def mirror() -> str:
    """Where the host gets Debian's packages from, or ``$MIRROR``.  Empty if neither says it."""
    if given := os.environ.get("MIRROR"):
        return given
    wanted = ["Created-By: Packages", "Origin: Debian", "Label: Debian"]
    return next(iter(output("apt-get", "indextargets", "--format", "$(REPO_URI)", *wanted).split()), "")


def pip_settings() -> dict[str, str]:
    """Where the host gets Python's packages from, as environment variables for pip.

    What lies on the host's own disk is left out, as are constraints: a fresh machine has none.
    """
    settings = {}
    for line in output(sys.executable, "-m", "pip", "config", "list").splitlines():
        name, _, value = line.partition("=")
        name, value = name.rpartition(".")[2], value.strip("'\"")
        if name in ("index-url", "extra-index-url", "proxy", "trusted-host", "timeout", "default-timeout", "cert"):
            kept = " ".join(v for v in value.split() if not v.startswith("file:"))
            if kept:
                settings[f"PIP_{name.upper().replace('-', '_')}"] = kept
    return settings


@contextlib.contextmanager
def alone(what: str) -> Iterator[None]:
    """One run of this at a time; on SIGTERM and SIGHUP everything is cleaned up as on Ctrl-C."""
    LOGS.mkdir(parents=True, exist_ok=True)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit("terminated"))
    with open(FOLDER / f"{what}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            sys.exit(f"{what} runs already in {FOLDER}")
        try:
            yield
        except KeyboardInterrupt:
            sys.exit("interrupted")


class Verdict:
    """What passed and what failed, told as it happens."""

    def __init__(self) -> None:
        self.passed = 0
        self.failed: list[str] = []

    def ok(self, what: str) -> None:
        self.passed += 1
        print(f"ok    {what}", flush=True)

    def fail(self, what: str, problem: str, log: Path | None = None) -> None:
        """``what`` has failed; the end of the log says why."""
        self.failed.append(what)
        print(f"FAIL  {what}: {problem}{f'; {log} ends:' if log else ''}")
        lines = log.read_text(errors="replace").splitlines() if log and log.exists() else []
        for line in lines[-TAIL:]:
            print("        " + re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", line))
        sys.stdout.flush()

    def end(self) -> int:
        """Say how many; the exit status."""
        for what in self.failed:
            print(f"failed: {what}")
        print(f"{self.passed} passed, {len(self.failed)} failed")
        return 1 if self.failed or not self.passed else 0
