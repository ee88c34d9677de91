"""``make test-pythons``: the wheel, built once from the source archive alone, with every Python that there is.

Looked for on PATH and among pyenv's; one that is not here is named, and is no failure: other systems have it
(``make test-distros``).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import LOGS, PROJECT, Failed, Verdict, alone, must

VERSIONS = ["3.11", "3.12", "3.13", "3.14"]
TAG = "cp311-abi3"

# What meets the interpreter: extensions, callbacks from C, threads, asyncio, forks, the command line.
TESTS = [
    "tests/unit/test_library.py",
    "tests/unit/test_cli.py",
    "tests/unit/test_config.py",
    "tests/unit/test_handler.py",
    "tests/unit/test_imports.py",
    "tests/unit/test_policy.py",
    "tests/bpf/test_handler.py",
    "tests/bpf/test_library_life.py",
    "tests/bpf/test_worker.py",
    "tests/bpf/test_xsk.py",
    "tests/bpf/test_xsk_misuse.py",
]


def interpreter(version: str) -> Path | None:
    """A Python of this version that runs."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    on_path = shutil.which(f"python{version}")
    for found in ([Path(on_path)] if on_path else []) + sorted(pyenv.glob(f"{version}.*/bin/python{version}")):
        if subprocess.run([found, "-c", ""], capture_output=True, check=False).returncode == 0:
            return found
    return None


def build(folder: Path, log: Path) -> tuple[Path, Path]:
    """The wheel, and the tree of the source archive that it was built from.  Raises :class:`Failed`."""
    script = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    must(["env", "-C", PROJECT, sys.executable, "-c", script, folder], log, "make a source archive")
    [archive] = folder.glob("*.tar.gz")
    shutil.unpack_archive(archive, folder)
    must([sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, archive], log, "build it alone")
    [wheel] = folder.glob("*.whl")
    if TAG not in wheel.name:
        raise Failed(f"{wheel.name} is not for all Pythons: it has no tag {TAG}")
    tree = folder / archive.name.removesuffix(".tar.gz")
    shutil.rmtree(tree / "crablb")  # what is tested is what is installed
    return wheel, tree


def try_with(python: Path, wheel: Path, tree: Path, folder: Path, log: Path) -> None:
    """Raises :class:`Failed`."""
    must([python, "-m", "venv", folder], log, "make a virtual environment")
    own = folder / "bin/python"
    must([own, "-m", "pip", "install", "-q", f"{wheel}[test]"], log, "install the wheel")
    must(["env", "-C", tree, f"PATH={own.parent}:{os.environ['PATH']}", own, "-m", "pytest", *TESTS], log, "pass tests")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("versions", nargs="*", metavar="VERSION", help=f"of {', '.join(VERSIONS)}; default: all")
    wanted = parser.parse_args().versions or VERSIONS
    verdict = Verdict()
    with alone("pythons"), tempfile.TemporaryDirectory(prefix="crablb-pythons-") as temporary:
        folder = Path(temporary)
        log = LOGS / "pythons-build.log"
        log.unlink(missing_ok=True)
        try:
            wheel, tree = build(folder, log)
        except Failed as error:
            verdict.fail("wheel", str(error), log)
            return verdict.end()
        verdict.ok(wheel.name)
        for version in wanted:
            python = interpreter(version)
            if python is None:
                print(f"      Python {version} is not here: not tested", flush=True)
                continue
            log = LOGS / f"python-{version}.log"
            log.unlink(missing_ok=True)
            try:
                try_with(python, wheel, tree, folder / version, log)
                verdict.ok(f"Python {version}")
            except Failed as error:
                verdict.fail(f"Python {version}", str(error), log)
        return verdict.end()


if __name__ == "__main__":
    sys.exit(main())
