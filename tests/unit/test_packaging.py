"""The source archive and the wheel: what is in them, and who they are for."""

from __future__ import annotations

import subprocess
import sys
import tarfile

import pytest

from tests.helpers.processes import ROOT

# What a checkout has, and who only builds, reads and tests does not need.
OF_THE_REPOSITORY = {".gitignore", ".ci/run"}


def setup(*code: str) -> str:
    """What a program says that has the project's distribution as ``dist``."""
    start = ["import setuptools, distutils.core", "dist = distutils.core.run_setup('setup.py', stop_after='config')"]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([*start, *code])], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_one_wheel_for_all_pythons():
    said = setup("wheel = dist.get_command_obj('bdist_wheel')", "wheel.ensure_finalized()", "print(*wheel.get_tag())")
    assert said.split()[:2] == ["cp311", "abi3"]


def test_extensions_keep_to_the_limited_api():
    """cffi builds for it by itself, but not in a debug build of Python."""
    for folder in ("crablb", "crablb/kernel"):
        built = [path.name for path in (ROOT / folder).glob("*.so")]
        assert built
        assert all(name.endswith(".abi3.so") for name in built), built


def test_the_source_archive_is_whole(tmp_path):
    """All files of the repository, and no file that was made."""
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=False)
    if tracked.returncode:
        pytest.skip("not a checkout: nothing to compare with")
    script = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, check=True, capture_output=True)
    [archive] = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames() if tar.getmember(name).isfile()}
    assert set(tracked.stdout.split()) - names <= OF_THE_REPOSITORY
    assert not [name for name in names if name.endswith((".o", ".so", ".pyc"))]
    assert {name for name in names if "/" in name and "egg-info" not in name} <= {
        str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file()
    }
