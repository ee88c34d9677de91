"""Who else could have written what is run: modules, a configuration that names programs, those programs."""

from __future__ import annotations

import os
import sys
from importlib.util import cache_from_source
from pathlib import Path
from py_compile import compile as compiled

import pytest

from crablb import ConfigError, trust
from crablb.cli import capture
from crablb.config import load_config

MALLORY = 4711


def given_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To another user; where this one cannot, all others' files are this user's no more, but for those of the test."""
    if os.geteuid() == 0:
        os.chown(path, MALLORY, -1, follow_symlinks=False)
        return
    real = os.lstat(path).st_ino
    before = trust.others
    monkeypatch.setattr(trust, "others", lambda found: "it is user 4711's" if found.st_ino == real else before(found))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where configurations and modules are, and is forgotten."""
    before = list(sys.path), set(sys.modules)
    where = tmp_path / "etc" / "crablb"
    where.mkdir(parents=True)
    yield where
    sys.path[:] = before[0]
    for name in set(sys.modules) - before[1]:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


FILE = 'interface = "eth0"\n[[service]]\naddress = "tcp://10.0.0.100:80"\nbackends = ["10.0.0.11"]\n'
RAN = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\n"
CHOOSE = "def choose(batch, backends):\n    return [0] * len(batch)\n"


def wanting_policy(folder: Path, name: str = "crab_trusted") -> Path:
    file = folder / "lb.toml"
    file.write_text(f'{FILE}policy = "{name}:choose"\n')
    return file


def module(folder: Path, name: str = "crab_trusted") -> Path:
    file = folder / f"{name}.py"
    file.write_text(RAN + CHOOSE)
    return file


def test_ones_own_is_imported(folder):
    module(folder)
    assert load_config(wanting_policy(folder)).services[0].policy == "crab_trusted:choose"
    assert (folder / "ran").exists()


def package(folder: Path, *inner: str) -> Path:
    made = folder / "crab_package"
    made.mkdir()
    for name in inner:
        (made / name).write_text(RAN + CHOOSE)
    return made


def writable_module(folder: Path, give: object) -> str:
    module(folder).chmod(0o666)
    return "crab_trusted"


def group_writable_module(folder: Path, give: object) -> str:
    module(folder).chmod(0o664)
    return "crab_trusted"


def anothers_module(folder, give):
    give(module(folder))
    return "crab_trusted"


def link_to_anothers(folder, give):
    elsewhere = folder.parent / "home"
    elsewhere.mkdir()
    target = module(elsewhere)
    (folder / target.name).symlink_to(target)
    give(target)
    return "crab_trusted"


def through_anothers_folder(folder, give):
    """The file is root's, and its folder is not: whose the folder is can put another one there."""
    elsewhere = folder.parent / "home"
    elsewhere.mkdir()
    target = module(elsewhere)
    (folder / target.name).symlink_to(target)
    give(elsewhere)
    return "crab_trusted"


def anothers_link(folder, give):
    elsewhere = folder.parent / "elsewhere"
    elsewhere.mkdir()
    link = folder / "crab_trusted.py"
    link.symlink_to(module(elsewhere))
    give(link)
    return "crab_trusted"


def anothers_compiled(folder, give):
    """In whose place Python takes what another user has compiled."""
    file = module(folder)
    made = Path(str(compiled(str(file))))
    give(made)
    return "crab_trusted"


def anothers_cache(folder, give):
    file = module(folder)
    cache = Path(cache_from_source(str(file))).parent
    cache.mkdir()
    give(cache)
    return "crab_trusted"


def anothers_package(folder, give):
    give(package(folder, "__init__.py"))
    return "crab_package"


def module_of_a_package(folder, give):
    give(package(folder, "__init__.py", "inner.py") / "inner.py")
    return "crab_package.inner"


def package_without_a_file(folder, give):
    give(package(folder, "inner.py"))
    return "crab_package.inner"


def what_it_imports(folder, give):
    module(folder, "crab_helper")
    give(folder / "crab_helper.py")
    (folder / "crab_trusted.py").write_text("import crab_helper\n" + CHOOSE)
    return "crab_trusted"


MODULES = [
    writable_module,
    group_writable_module,
    anothers_module,
    link_to_anothers,
    through_anothers_folder,
    anothers_link,
    anothers_compiled,
    anothers_cache,
    anothers_package,
    module_of_a_package,
    package_without_a_file,
    what_it_imports,
]


@pytest.mark.parametrize("how", MODULES)
def test_a_module_that_others_could_have_written_is_not_run(folder, monkeypatch, how):
    name = how(folder, lambda path: given_away(path, monkeypatch))
    with pytest.raises(ConfigError, match=r"it is user 4711's|others can write it \(mode") as told:
        load_config(wanting_policy(folder, name))
    assert "; chmod go-w " in str(told.value)
    ran = [file.parent for file in folder.parent.rglob("ran")]
    # A package's own file is its owner's alone here: what is in it that others could have written is what is not run.
    assert ran == ([folder / "crab_package"] if how is module_of_a_package else [])


def open_folder(folder: Path, file: Path, give: object) -> None:
    folder.chmod(0o777)


def sticky_folder(folder: Path, file: Path, give: object) -> None:
    """As /tmp: nobody replaces the file, and anybody can put a module beside it."""
    folder.chmod(0o1777)


def open_folder_above(folder: Path, file: Path, give: object) -> None:
    folder.parent.chmod(0o777)


def open_file(folder: Path, file: Path, give: object) -> None:
    file.chmod(0o622)


def anothers_file(folder, file, give):
    give(file)


def anothers_folder(folder, file, give):
    give(folder)


CONFIGURATIONS = [open_folder, open_folder_above, open_file, anothers_file, anothers_folder]


@pytest.mark.parametrize("how", [*CONFIGURATIONS, sticky_folder])
def test_a_configuration_that_others_could_have_written_imports_nothing(folder, monkeypatch, how):
    module(folder)
    file = wanting_policy(folder)
    how(folder, file, lambda path: given_away(path, monkeypatch))
    with pytest.raises(ConfigError, match=r"it is user 4711's|others can write it \(mode"):
        load_config(file)
    assert not (folder / "ran").exists()


def wanting_program(folder: Path, program: str) -> Path:
    file = folder / "lb.toml"
    file.write_text(f'{FILE}check = [{{ type = "exec", command = ["{program}", "x"] }}]\n')
    return file


@pytest.mark.parametrize("how", CONFIGURATIONS)
def test_nor_has_it_programs_run(folder, monkeypatch, how):
    file = wanting_program(folder, "/bin/true")
    assert load_config(file)
    how(folder, file, lambda path: given_away(path, monkeypatch))
    with pytest.raises(ConfigError, match="what a configuration names is run as user"):
        load_config(file)


@pytest.mark.parametrize("how", CONFIGURATIONS)
def test_what_runs_nothing_may_be_anybodys(folder, monkeypatch, how):
    """Who lets others say where packets go may."""
    file = folder / "lb.toml"
    file.write_text(FILE)
    how(folder, file, lambda path: given_away(path, monkeypatch))
    assert load_config(file).services


@pytest.mark.parametrize("how", CONFIGURATIONS)
def test_a_program_that_others_could_have_written_is_not_run(folder, tmp_path, monkeypatch, how):
    elsewhere = tmp_path / "opt" / "bin"
    elsewhere.mkdir(parents=True)
    program = elsewhere / "probe"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    file = wanting_program(folder, str(program))
    assert load_config(file)
    how(elsewhere, program, lambda path: given_away(path, monkeypatch))
    if how is open_file:
        program.chmod(0o777)
    with pytest.raises(ConfigError, match=r"check: .*, and it would be run as user"):
        load_config(file)


def test_paths(tmp_path, monkeypatch):
    """Links that lead round, names that are none, and a place that nobody can write."""
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert "Too many levels of symbolic links" in trust.writer(tmp_path / "a")
    assert "cannot be looked at: No such file" in trust.writer(tmp_path / "none")
    assert "cannot be looked at" in trust.writer("nul\0")
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "up").symlink_to("../d")
    (tmp_path / "d").write_text("")
    assert trust.writer(tmp_path / "c" / "up") == trust.writer(tmp_path / "c" / ".." / "d") == ""
    (tmp_path / "d").chmod(0o666)
    assert trust.writer(tmp_path / "c" / "up").startswith(f"{tmp_path / 'd'}: others can write it (mode 0666)")
    real = os.statvfs
    monkeypatch.setattr(trust.os, "statvfs", lambda path: ReadOnly(real(path)))
    assert trust.writer(tmp_path / "c" / "up") == ""


class ReadOnly:
    def __init__(self, found: os.statvfs_result) -> None:
        self.f_flag = found.f_flag | os.ST_RDONLY


def test_captures_go_into_no_file_of_anothers(tmp_path, monkeypatch):
    """Who made it beforehand would read what passes; or has a link lead to what is to be written over."""
    for mode in (0o666, 0o662):
        file = tmp_path / f"{mode:o}.pcapng"
        file.write_text("before")
        file.chmod(mode)
        with pytest.raises(ConfigError, match=r"others can write it \(mode 066"):
            capture._File(str(file))
        assert file.read_text() == "before"
    theirs, link = tmp_path / "theirs", tmp_path / "lb.pcapng"
    theirs.write_text("before")
    link.symlink_to(theirs)
    given_away(theirs, monkeypatch)
    with pytest.raises(ConfigError, match="it is user 4711's"):
        capture._File(str(link))
    assert theirs.read_text() == "before"
    new = tmp_path / "new.pcapng"
    before = os.umask(0)
    try:
        os.close(capture._File(str(new))._fd)
    finally:
        os.umask(before)
    assert new.stat().st_mode & 0o777 == 0o600
