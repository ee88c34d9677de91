"""Compile what Python alone cannot carry: the cffi extensions and the BPF objects.

Everything else about the package is in pyproject.toml.  An installed wheel holds the results, so it needs neither
clang nor kernel headers, only the libbpf shared library.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).parent
OBJECTS = Path("crablb/kernel/objects")
VERSION = Path("crablb/_version.py")

# What git describes a commit by: the last release's tag and the commits since, if there is a tag; the commit.
DESCRIBED = re.compile(r"(?:v(?P<tag>\d[\w.]*)(?:-(?P<since>\d+)-g|$))?(?P<commit>[0-9a-f]*)(?P<changed>-dirty)?")


def version(root: Path) -> str:
    """The version of a source tree (PEP 440).

    A source archive has its own.  A checkout has its tag's, X.Y.Z of vX.Y.Z, and beyond it the one of a development
    release that comes before the next: X.Y.Z+1.devN+gCOMMIT.  A tree made by ``git archive`` is told what git knew then
    (gitattributes(5), export-subst).  Where there is no tag (a shallow clone), CHANGELOG.md says what this is to be.
    """
    if (root / "PKG-INFO").exists():
        return re.search(r"^Version: (\S+)$", (root / "PKG-INFO").read_text(), re.M)[1]
    if (root / ".git").exists():  # else the repository is another's, in which this tree lies
        told = described(root)
    else:
        told = (root / ".git_archival.txt").read_text().split() if (root / ".git_archival.txt").exists() else []
    found = next(filter(None, map(DESCRIBED.fullmatch, told)), None)
    since, commit, changed = found.group("since", "commit", "changed") if found else (None, "", None)
    if found and (release := found["tag"]):
        if not changed and since in (None, "0"):
            return release
        release = following(release)
    else:
        headings = re.findall(r"^## +\[?([\w.]+)", (root / "CHANGELOG.md").read_text(), re.M)
        release = following(headings[1]) if headings[0] == "Unreleased" else headings[0]
    return f"{release}.dev{since or 0}" + (f"+g{commit}" if commit else "") + (".changed" if changed else "")


def described(root: Path) -> list[str]:
    """Nothing where git is not installed."""
    # safe.directory: root builds what is a user's.
    command = ["git", "-c", "safe.directory=*", "-C", str(root)]
    command += ["describe", "--tags", "--match=v[0-9]*", "--long", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    except FileNotFoundError:
        return []


def following(release: str) -> str:
    """0.1.1 of 0.1.0; 0.2.0rc2 of 0.2.0rc1."""
    return re.sub(r"\d+$", lambda last: str(int(last[0]) + 1), release)


def multiarch_include() -> list[str]:
    """The directory of <asm/types.h>: Debian keeps it under the triplet, where ``clang -target bpf`` does not look."""
    triplet = subprocess.run(["gcc", "-print-multiarch"], capture_output=True, text=True, check=False).stdout.strip()
    return [f"-I/usr/include/{triplet}"] if triplet else []


def compile_bpf(source: Path, target: Path, clang: Sequence[str] = ("clang",)) -> None:
    """Compile one ``bpf/*.bpf.c`` to an object with BTF.  ``clang``: how to call it."""
    if shutil.which(clang[0]) is None:
        raise SystemExit("crablb: clang is needed to compile bpf/: install it (Debian: apt-get install clang)")
    target.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [*clang, "-target", "bpf", "-O2", "-g", "-mcpu=v3", "-Wall", "-Wextra", "-Werror",
         *multiarch_include(), "-c", str(source), "-o", str(target)],
        check=True,
    )  # fmt: skip


class BuildAll(build_ext):
    """``build_ext`` that also compiles the BPF objects, beside the extensions."""

    def run(self) -> None:
        super().run()
        base = ROOT if self.inplace or self.editable_mode else Path(self.build_lib)
        for source in sorted((ROOT / "bpf").glob("*.bpf.c")):
            target = base / OBJECTS / f"{source.name[:-2]}.o"
            compile_bpf(source, target)
            if shutil.which("llvm-strip"):  # of DWARF, and what linkers would want; BTF, which the kernel wants, stays
                removed = ["--remove-section=.rel.BTF", "--remove-section=.rel.BTF.ext"]
                labels = ["--wildcard", "--strip-symbol=LBB*"]  # where jumps go
                subprocess.run(["llvm-strip", "--strip-debug", *removed, *labels, str(target)], check=True)


class BuildPython(build_py):
    """``build_py`` that also writes the version into a module: to ask for the installed package's takes longer."""

    def run(self) -> None:
        super().run()
        base = ROOT if self.editable_mode else Path(self.build_lib)
        (base / VERSION).write_text(f'# Written by setup.py.\nVERSION = "{self.distribution.get_version()}"\n')


# Manual pages and completions: a source archive made by deploy/package.py has them, and so has what is built of that.
SHARE = Path("build/share")
# What of deploy/ is for those who run crablb.
DEPLOYED = ("*.service", "*.json", "*.lua", "*.yml")


def data_files() -> list[tuple[str, list[str]]]:
    """Folder below the prefix, and the files for it."""
    made = [path.relative_to(ROOT) for path in (ROOT / SHARE).rglob("*") if path.is_file()]
    placed = [(str(Path("share") / path.parent.relative_to(SHARE)), [str(path)]) for path in made]
    deployed = [str(path.relative_to(ROOT)) for form in DEPLOYED for path in (ROOT / "deploy").glob(form)]
    return sorted([*placed, ("share/crablb", sorted(deployed))])


# Beside the packages: what they are made of, and all that README.md names.
FOLDERS = ("bench", "bpf", "deploy", "docs", "examples", "native", "tests")
FILES = ("CHANGELOG.md", "Makefile", "SECURITY.md")
MADE = shutil.ignore_patterns("__pycache__", "build", "results", "*.o", "*.so", "*.py[co]")


class Sdist(sdist):
    """Source archives carry all sources, and nothing that was made of them."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        super().make_release_tree(base_dir, files)
        base = Path(base_dir)
        for folder in FOLDERS:
            shutil.copytree(ROOT / folder, base / folder, dirs_exist_ok=True, ignore=MADE)
        for file in FILES:
            shutil.copyfile(ROOT / file, base / file)
        if (ROOT / SHARE).exists():
            shutil.copytree(ROOT / SHARE, base / SHARE, dirs_exist_ok=True)
        shutil.rmtree(base / OBJECTS, ignore_errors=True)
        (base / VERSION).unlink(missing_ok=True)


if __name__ == "__main__":
    setup(
        version=version(ROOT),
        cffi_modules=["native/cffi_build.py:native", "native/cffi_build.py:libbpf"],
        data_files=data_files(),
        cmdclass={"build_ext": BuildAll, "build_py": BuildPython, "sdist": Sdist},
        # The extensions use the limited API: one wheel is for all Pythons from 3.11 on.
        options={"bdist_wheel": {"py_limited_api": "cp311"}},
    )
