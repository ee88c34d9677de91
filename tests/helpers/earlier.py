"""``crablb`` of other revisions, compiled here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT


def _git(*args: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, check=False)


def compiled(revision: str, folder: Path) -> list[str]:
    """The command.  Skips the test if the history is not here."""
    if _git("cat-file", "-e", revision).returncode:
        pytest.skip(f"the history is not here (a shallow clone?): git fetch --unshallow brings revision {revision}")
    subprocess.run(["tar", "x", "-C", folder], input=_git("archive", revision).stdout, check=True)
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    done = subprocess.run(build, cwd=folder, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    # From its own folder, so that today's is not found first.
    return ["env", "-C", str(folder), sys.executable, "-m", "crablb"]


def released() -> str:
    """The last revision before this one that has a version's tag; where there is none (a clone without tags), this one.

    Its files are those that were committed, compiled by themselves.
    """
    found = _git("describe", "--tags", "--abbrev=0", "--match", "v*", "HEAD^")
    return found.stdout.decode().strip() or "HEAD"
