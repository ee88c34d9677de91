"""``make test-packages``: what is installed from, made on fresh Debian systems and installed on others.

One root of a Debian has the compilers, and makes the packages from a clone of the last commit; another one, which has
none, installs, upgrades, removes and purges them.  What is left then is compared with what was there before.  Made
packages stay in ``.machines/packages``.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import sys
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from distros import CLONE, GIT, base, own_cgroup, settle
from machine import FOLDER, HERE, LOGS, PROJECT, Failed, Verdict, alone, command, must, output

#: The oldest first: its C library is the oldest too, so it makes the wheel for all.
DISTROS = ["bookworm", "trixie"]
MADE = FOLDER / "packages"
HIGHER = "99.0.0"
#: Bytes that a wheel may take when it is unpacked.
MOST = 3 << 20
#: What changes when anything is installed, beside what is installed.
OTHERS = ("var/log", "var/cache", "var/lib/apt", "var/lib/dpkg", "run", "tmp", "root", "proc", "sys", "dev", "mnt")


class Root:
    """A copy of a fresh Debian, for as long as it is entered by ``with``."""

    def __init__(self, distro: str, purpose: str) -> None:
        self.log = LOGS / f"packages-{distro}-{purpose}.log"
        self.log.unlink(missing_ok=True)
        self.path = FOLDER / "roots" / f"packages-{distro}-{purpose}"
        shutil.rmtree(self.path, ignore_errors=True)
        must(["cp", "-a", base(distro, self.log), self.path], self.log, "copy the root")
        self._environment = settle(self.path) | {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
        for name in ("packages.sh", "without_xdp.py"):
            shutil.copy(HERE / name, self.path / "root")

    def __enter__(self) -> Root:
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def run(self, what: str, script: str) -> None:
        """Run a program of the shell there, which has the functions of ``packages.sh``.

        Raises :class:`Failed`, which says ``what`` could not be done.
        """
        with self.log.open("a") as log:
            log.write(f"\n==> {what}: {script}\n")
        with own_cgroup("packages") as cgroup:
            status = command(
                ["unshare", "--mount", "--pid", "--cgroup", "--fork", "--kill-child",
                 "sh", HERE / "enter.sh", self.path,
                 "env", "-i", *(f"{key}={value}" for key, value in self._environment.items()),
                 "sh", "-euc", f"cd /root\n. ./packages.sh\n{script}"],
                self.log, cgroup,
            )  # fmt: skip
        if status:
            raise Failed(f"{what}: exit status {status}")

    def files(self) -> set[str]:
        """All that is there but what others leave."""
        found = set()
        for folder, names, files in os.walk(self.path):
            below = Path(folder).relative_to(self.path)
            names[:] = [name for name in names if str(below / name) not in OTHERS]
            found |= {str(below / name) for name in (*names, *files)}
        return found


def make(distro: str) -> None:
    """The packages of a Debian into ``MADE``: of the commit as it is, and as with a tag.  Raises :class:`Failed`."""
    oldest = distro == DISTROS[0]
    folder = MADE / distro
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with Root(distro, "make") as root:
        must([*GIT, "clone", "--no-hardlinks", PROJECT, root.path / CLONE], root.log, "clone the project")
        targets = "wheel deb" if oldest else "deb"
        root.run("make packages", f"make -C /{CLONE} {targets}")
        root.run("lintian", f"lintian --allow-root --fail-on error,warning /{CLONE}/build/deb/*.changes")
        kept = ["deb/*.deb", *(["sdist/*", "wheel/*"] if oldest else [])]
        for path in [path for pattern in kept for path in (root.path / CLONE / "build").glob(pattern)]:
            shutil.copy(path, folder)
        must([*GIT, "-C", root.path / CLONE, "tag", f"v{HIGHER}"], root.log, "tag the commit")
        root.run("make a higher version", f"make -C /{CLONE} deb")
        for path in (root.path / CLONE / "build/deb").glob("*.deb"):
            shutil.copy(path, folder)


def check_deb(distro: str) -> None:
    """Raises :class:`Failed`."""
    higher = next((MADE / distro).glob(f"*_{HIGHER}+*.deb"))
    [lower] = set((MADE / distro).glob("*.deb")) - {higher}
    fields = [output("dpkg-deb", "-f", higher, field).strip() for field in ("Depends", "Recommends", "Suggests")]
    needs = shlex.quote(", ".join(fields))
    with Root(distro, "deb") as root:
        for path in (higher, lower):
            shutil.copy(path, root.path / "root")
        names = f"LOWER=./{lower.name} HIGHER=./{higher.name}"
        # What it needs is others': it is there before, and stays.
        root.run("install what it needs", f"apt-get update -qq; apt-get satisfy -qq --no-install-recommends {needs}")
        before = root.files()
        root.run("install, serve and show", f"{names}; installed; served; demo crablb")
        root.run("a kernel without AF_XDP", "without_xdp crablb")
        root.run("upgrade", f"{names}; upgraded")
        root.run("remove with what is in the kernel", "removed")
        if left := {path for path in root.files() - before if not path.startswith(("etc", "var"))}:
            raise Failed(f"removed, it leaves: {', '.join(sorted(left))}")
        root.run("purge", "purged")
        if changed := root.files() ^ before:
            raise Failed(f"purged, it leaves or has taken: {', '.join(sorted(changed))}")


def check_wheel(distro: str) -> None:
    """Raises :class:`Failed`."""
    [wheel] = (MADE / DISTROS[0]).glob("*.whl")
    unpacked = sum(each.file_size for each in zipfile.ZipFile(wheel).infolist())
    if unpacked > MOST:
        raise Failed(f"unpacked, the wheel takes {unpacked:,} bytes; {MOST:,} are enough")
    with Root(distro, "wheel") as root:
        shutil.copy(wheel, root.path / "root")
        root.run("install the wheel", f"wheel ./{wheel.name}")
        root.run("serve and show", "demo ./venv/bin/crablb")
        root.run("a kernel without AF_XDP", "without_xdp ./venv/bin/crablb")


def judged(what: str, log: Path, verdict: Verdict, check: Callable[[], None]) -> bool:
    """Whether it passed."""
    started = time.monotonic()
    try:
        check()
    except Failed as error:
        verdict.fail(what, str(error), log)
        return False
    verdict.ok(f"{what} ({time.monotonic() - started:.0f} s)")
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("distros", nargs="*", metavar="DISTRO", help=f"of {', '.join(DISTROS)} (default: all)")
    parser.add_argument("--made", action="store_true", help="take what is made already")
    given = parser.parse_args()
    verdict = Verdict()
    with alone("test-packages"):
        for distro in given.distros or DISTROS:
            steps = {"deb": check_deb, "wheel": check_wheel}
            if not given.made:
                steps = {"make": make} | steps
            for name, step in steps.items():
                log = LOGS / f"packages-{distro}-{name}.log"
                if not judged(f"{distro}: {name}", log, verdict, partial(step, distro)) and step is make:
                    break  # there is nothing to install
    return verdict.end()


if __name__ == "__main__":
    sys.exit(main())
