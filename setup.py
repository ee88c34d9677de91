"""Compile what Python alone cannot carry: the cffi extensions and the BPF objects.

Everything else about the package is in pyproject.toml.  An installed wheel holds the results, so it needs neither
clang nor kernel headers, only the libbpf shared library.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

ROOT = Path(__file__).parent
OBJECTS = Path("crablb/kernel/objects")


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
            compile_bpf(source, base / OBJECTS / f"{source.name[:-2]}.o")


# Beside the packages: what they are made of, and all that README.md names.
FOLDERS = ("bench", "bpf", "deploy", "docs", "examples", "native", "tests")
FILES = ("CHANGELOG.md", "Makefile")
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
        shutil.rmtree(base / OBJECTS, ignore_errors=True)


if __name__ == "__main__":
    setup(
        cffi_modules=["native/cffi_build.py:native", "native/cffi_build.py:libbpf"],
        cmdclass={"build_ext": BuildAll, "sdist": Sdist},
        # The extensions use the limited API: one wheel is for all Pythons from 3.11 on.
        options={"bdist_wheel": {"py_limited_api": "cp311"}},
    )
