"""Test suites of which Debian has the program in one package and the tests in another, or in the source alone.

    python -m tests.foreign.fetch FOLDER

makes FOLDER/varnish (varnishtest, unpacked: its package would start a daemon), FOLDER/haproxy (what HAProxy's authors
released) and FOLDER/linux (selftests of Debian's newest kernel, by its package linux-source).  Nothing is installed.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

from tests.stacks.fetch import Mirror, Missing, run

SELFTESTS = (
    "include/uapi/linux/mptcp*.h",
    "tools/include/*",
    "tools/testing/selftests/kselftest/ktap_helpers.sh",
    "tools/testing/selftests/net/lib.sh",
    "tools/testing/selftests/net/lib/sh/*",
    "tools/testing/selftests/net/mptcp/*",
    "tools/testing/selftests/net/packetdrill/*",
)


def unpack(mirror: Mirror, folder: Path, *packages: str) -> None:
    """The packages' files."""
    folder.mkdir(parents=True)
    mirror.apt("apt-get", "download", *packages, cwd=folder)
    for deb in folder.glob("*.deb"):
        run("dpkg", "-x", deb, folder)
        deb.unlink()


def release(mirror: Mirror, name: str, version: str, folder: Path) -> None:
    """What the authors released as ``version``.  A security update may lie where its first tar archive does not: each
    of the distribution's suites is asked."""
    folder.mkdir(parents=True)
    suites = run("apt-get", "indextargets", "--format", "$(RELEASE)", "Created-By: Packages").split()
    faults = []
    for suite in dict.fromkeys(suites):
        try:
            mirror.apt("apt-get", "source", "--download-only", "--tar-only", f"{name}/{suite}", cwd=folder)
        except Missing as fault:
            faults.append(str(fault))
            continue
        for tar in folder.glob(f"{name}_{version}.orig.tar.*"):
            if tar.suffix != ".asc":
                run("tar", "-xf", tar, "-C", folder, "--strip-components=1")
                return
    raise Missing("\n".join([f"apt's mirror has no source of {name} {version}; another one may", *faults]))


def selftests(folder: Path) -> str:
    """Of the newest kernel that Debian has the sources of, whichever release this is: they are made to run with older
    ones.  Which one that is."""
    with tempfile.TemporaryDirectory(prefix="crablb-linux-", dir=folder.parent) as where:
        mirror = Mirror(Path(where) / "lists", "sid")
        names = re.findall(r"^linux-source-([\d.]+) ", mirror.apt("apt-cache", "search", "^linux-source-"), re.M)
        name = "linux-source-" + max(names, key=lambda version: [int(part) for part in version.split(".")])
        unpack(mirror, Path(where) / "package", name)
        tar = Path(where) / f"package/usr/src/{name}.tar.xz"
        run("tar", "-xf", tar, "-C", where, "--wildcards", *(f"{name}/{one}" for one in SELFTESTS))
        shutil.move(Path(where) / name, folder)
    # What a kernel's headers have that are installed, for programs to be compiled with.
    headers = folder / "headers/linux"
    headers.mkdir(parents=True)
    for header in (folder / "include/uapi/linux").glob("mptcp*.h"):
        shutil.copy(header, headers)
    return name


def upstream(package: str) -> str:
    """The authors' version of an installed package."""
    version = run("dpkg-query", "-W", "-f", "${Version}", package)
    return version.partition(":")[2].rpartition("-")[0] if ":" in version else version.rpartition("-")[0]


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    os.environ.update(LC_ALL="C")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        with tempfile.TemporaryDirectory(prefix="crablb-fetch-") as lists:
            mirror = Mirror(Path(lists))
            needed = mirror.apt("apt-cache", "depends", "varnish").split()
            library = next(one for one in needed if one.startswith("libvarnishapi"))
            unpack(mirror, folder / "varnish", "varnish", library)
            haproxy = upstream("haproxy")
            release(mirror, "haproxy", haproxy, folder / "haproxy")
            linux = selftests(folder / "linux")
    except Missing as missing:
        sys.exit(f"crablb: {missing}")
    print(f"    varnishtest, haproxy {haproxy}, {linux}")


if __name__ == "__main__":
    main()
