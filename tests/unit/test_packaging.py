"""The source archive and the wheel: what is in them, and who they are for."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
from itertools import pairwise
from pathlib import Path

import pytest

import setup as project
from crablb.cli import COMMANDS
from deploy import package
from tests.helpers.processes import ROOT

# What a checkout has, and who only builds, reads and tests does not need.
OF_THE_REPOSITORY = {".gitignore", ".gitattributes", ".git_archival.txt", ".ci/run"}


def configured(*code: str) -> str:
    """What a program says that has the project's distribution as ``dist``."""
    start = ["import setuptools, distutils.core", "dist = distutils.core.run_setup('setup.py', stop_after='config')"]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join([*start, *code])], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_one_wheel_for_all_pythons():
    said = configured(
        "wheel = dist.get_command_obj('bdist_wheel')", "wheel.ensure_finalized()", "print(*wheel.get_tag())"
    )
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


# ---- what is in them ----

#: Bytes: of an unpacked wheel at most, and of libbpf, libelf and the extensions in it, a little more than measured.
MOST, COMPILED = 3 << 20, 850 << 10


@pytest.fixture
def share(tmp_path, monkeypatch) -> Path:
    """Manual pages and completions, as ``make sdist`` makes them."""
    monkeypatch.setattr(package, "SHARE", tmp_path / "share")
    return package.share()


def test_manual_pages_and_completions(share):
    pages = {path.name for path in (share / "man/man1").iterdir()}
    assert pages == {"crablb.1.gz", *(f"crablb-{name}.1.gz" for name in COMMANDS)}
    for place in package.COMPLETIONS.values():
        assert "drain-lb" in (share / place).read_text(), place


def test_a_wheel_has_room(share):
    """It is told here, while the package grows, and not when it is made."""
    parts = [path for path in (ROOT / "crablb").rglob("*") if path.suffix not in (".so", ".pyc") and path.is_file()]
    parts += [path for path in share.rglob("*") if path.is_file()]
    parts += [ROOT / name for _, names in project.data_files() for name in names if name.startswith("deploy/")]
    assert sum(path.stat().st_size for path in parts) + COMPILED < MOST


def test_what_is_deployed_is_in_the_wheel():
    deployed = {name for folder, names in project.data_files() if folder == "share/crablb" for name in names}
    units = ("crablb", "crablb-agent-server", "crablb-agent-client")
    assert {*(f"deploy/{unit}.service" for unit in units), "deploy/crablb.lua"} <= deployed
    assert all((ROOT / name).is_file() for name in deployed)


def test_programs_of_the_network_have_no_dwarf():
    """It is half of what they would take; BTF stays, without which the kernel would not have them."""
    for path in (ROOT / "crablb/kernel/objects").glob("*.bpf.o"):
        code = path.read_bytes()
        assert b".BTF" in code
        assert b".debug_info" not in code, path.name
        assert b"\0LBB" not in code, path.name  # labels: a tenth of it


# ---- Debian's ----

DEBIAN = ROOT / "deploy/debian"


@pytest.mark.parametrize("script", ["crablb.postinst", "crablb.prerm", "crablb.postrm"])
def test_maintainer_scripts(script):
    """What they do is for make test-packages to see."""
    text = (DEBIAN / script).read_text()
    assert text.startswith("#!/bin/sh\nset -e\n")
    assert "#DEBHELPER#" in text.splitlines()
    subprocess.run(["sh", "-n", DEBIAN / script], check=True)


def test_units_are_installed_by_the_names_that_they_have():
    rules = (DEBIAN / "rules").read_text()
    units = {path.stem for path in (ROOT / "deploy").glob("*.service")}
    agents = set(re.search(r"^AGENTS := (.*)$", rules, re.M)[1].split())
    assert units == {"crablb", *agents}
    for unit in units:
        assert f"{unit}.service" in (DEBIAN / "crablb.prerm").read_text()
        assert "=/usr/bin/crablb " in (ROOT / f"deploy/{unit}.service").read_text()


ORDER = ["0.1.0.dev0+g1", "0.1.0rc1.dev2+g1", "0.1.0rc1", "0.1.0", "0.1.1.dev9+g1", "0.1.1.dev10+g1", "0.1.1"]


def test_debian_orders_versions_as_they_came():
    versions = [f"{package.debian(each)}+{system}" for each in ORDER for system in ("debian12", "debian13")]
    for lower, higher in pairwise(versions):
        subprocess.run(["dpkg", "--compare-versions", lower, "lt", higher], check=True)


# ---- the version ----

CHANGELOG = "# Changelog\n\n## {}\n\n- 1.2.3 of something.\n\n## [0.0.9] - 2020-01-01\n"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A checkout of one commit, which has no tag."""
    folder = tmp_path / "tree"
    folder.mkdir()
    (folder / "CHANGELOG.md").write_text(CHANGELOG.format("0.1.0 - 2026-01-01"))
    for name in (".git_archival.txt", ".gitattributes"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    git(folder, "init", "-q")
    git(folder, "add", ".")
    commit(folder)
    return folder


def git(folder: Path, *args: str) -> str:
    who = ["-c", "user.name=Somebody", "-c", "user.email=somebody@example.com", "-c", "commit.gpgsign=false"]
    command = ["git", *who, "-C", str(folder), *args]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def commit(folder: Path) -> str:
    """Its name, for a version."""
    git(folder, "commit", "-q", "--allow-empty", "-m", "Something")
    return f"+g{git(folder, 'rev-parse', '--short', 'HEAD')}"


def test_the_version_of_a_checkout(tree):
    first = commit(tree)
    assert project.version(tree) == f"0.1.0.dev0{first}"
    git(tree, "tag", "other-9.9")
    git(tree, "tag", "v0.1.0")
    assert project.version(tree) == "0.1.0"
    (tree / "CHANGELOG.md").write_text(CHANGELOG.format("Unreleased"))
    assert project.version(tree) == f"0.1.1.dev0{first}.changed"
    git(tree, "add", ".")
    second = commit(tree)
    assert project.version(tree) == f"0.1.1.dev1{second}"
    git(tree, "tag", "-a", "-m", "It", "v0.2.0rc1")
    assert project.version(tree) == "0.2.0rc1"
    third = commit(tree)
    assert project.version(tree) == f"0.2.0rc2.dev1{third}"


def test_the_version_of_a_clone_without_tags(tree, tmp_path):
    git(tree, "tag", "v0.1.0")
    (tree / "CHANGELOG.md").write_text(CHANGELOG.format("[Unreleased]"))
    git(tree, "add", ".")
    last = commit(tree)
    git(tmp_path, "clone", "-q", "--depth=1", "--no-tags", f"file://{tree}", "shallow")
    assert project.version(tmp_path / "shallow") == f"0.0.10.dev0{last}"


@pytest.mark.parametrize("tagged", [True, False])
def test_the_version_of_what_git_archives(tree, tagged, tmp_path):
    if tagged:
        git(tree, "tag", "v0.1.0")
        later = commit(tree)
    git(tree, "archive", "--prefix=it/", "-o", str(tmp_path / "it.tar"), "HEAD")
    # In another's repository, which is not to be asked.
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "Other")
    git(tmp_path, "tag", "v9.9.9")
    shutil.unpack_archive(tmp_path / "it.tar", tmp_path)
    expected = f"0.1.1.dev1{later}" if tagged else f"0.1.0.dev0+g{git(tree, 'rev-parse', '--short', 'HEAD')}"
    assert project.version(tmp_path / "it") == expected


def test_the_version_of_a_source_archive_is_its_own(tree):
    (tree / "PKG-INFO").write_text("Metadata-Version: 2.4\nName: crablb\nVersion: 3.4.5.dev6+g7\nSummary: Version: 1\n")
    assert project.version(tree) == "3.4.5.dev6+g7"


def test_the_version_where_nothing_is_known(tree, monkeypatch, tmp_path):
    """Files alone; git's placeholders not filled in; no git to be had."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert project.version(tree) == "0.1.0.dev0"
    (tree / ".git").rename(tmp_path / "aside")
    assert project.version(tree) == "0.1.0.dev0"
    (tree / ".git_archival.txt").unlink()
    assert project.version(tree) == "0.1.0.dev0"


def test_the_version_of_this_tree():
    """What pip and apt can order, whatever this is a tree of."""
    assert re.fullmatch(r"\d+\.\d+\.\d+(rc\d+)?(\.dev\d+)?(\+g?[0-9a-f]+(\.changed)?)?", project.version(ROOT))
