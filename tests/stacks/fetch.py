"""Programs of Debian with the test suites that only their source packages have, unpacked into a folder.

    python fetch.py FOLDER

makes FOLDER/NAME/program, what the packages hold, and FOLDER/NAME/source, what their authors released, for each NAME.
Nothing is installed but the libraries that the programs need: no daemon starts, no database is made, and programs and
tests are of one version.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path


class Missing(Exception):
    """What the mirror does not have."""


def run(*args: str | Path, cwd: Path | None = None) -> str:
    command = [str(arg) for arg in args]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Missing(f"{shlex.join(command)}: {done.stderr.strip()}")
    return done.stdout


class Mirror:
    """The mirrors that this machine's apt has its distribution from, sources included, with lists of their own."""

    def __init__(self, folder: Path, *releases: str) -> None:
        """``releases``: of Debian, beside the machine's own if that is Debian."""
        self.folder = folder
        (folder / "lists/partial").mkdir(parents=True)
        origin = re.search(r"^ID=\W?(\w+)", Path("/etc/os-release").read_text(), re.M)[1]  # type: ignore[index]
        where = run(
            "apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)",
            "Created-By: Packages", f"Origin: {origin.capitalize()}",
        )  # fmt: skip
        if not where:
            raise Missing(f"apt's sources name no mirror of {origin}, or it was never updated: run apt-get update")
        keyring = f"[signed-by=/usr/share/keyrings/{origin}-archive-keyring.gpg]"
        places = set(where.splitlines())
        archive = next((line.split()[0] for line in sorted(places) if "security" not in line), "")
        if origin == "debian":
            places |= {f"{archive} {release} main" for release in releases}
        lines = [f"{kind} {keyring} {line}\n" for kind in ("deb", "deb-src") for line in sorted(places)]
        (folder / "sources.list").write_text("".join(lines))
        settings = {
            "Dir::Etc::SourceList": folder / "sources.list",
            "Dir::Etc::SourceParts": "-",
            "Dir::State::Lists": folder / "lists",
            "Dir::Cache::PkgCache": "",
            "Dir::Cache::SrcPkgCache": "",
            "APT::Sandbox::User": "",  # who may not see into a folder that is only the user's
        }
        self._options = [part for name, value in settings.items() for part in ("-o", f"{name}={value}")]
        self.apt("apt-get", "update")

    def apt(self, program: str, *args: str, cwd: Path | None = None) -> str:
        return run(program, "-q", *self._options, *args, cwd=cwd)

    def versions(self, package: str) -> list[str]:
        """The newest first."""
        rows = (line.split(" | ") for line in self.apt("apt-cache", "madison", package).splitlines())
        return list(dict.fromkeys(version.strip() for _, version, where in rows if where.endswith("Packages")))


def fetch(mirror: Mirror, name: str, programs: list[str], headers: list[str], folder: Path) -> str:
    """The newest version that the mirror has whole: it may have a newer program than source.  Which one that is."""
    faults = []
    for version in mirror.versions(programs[0]):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            mirror.apt("apt-get", "download", *(f"{p}={version}" for p in programs + headers), cwd=folder)
            # A rebuild (+b1) has the source of what was rebuilt.
            rebuilt = re.sub(r"\+b\d+$", "", version)
            mirror.apt("apt-get", "source", "--download-only", "--tar-only", f"{name}={rebuilt}", cwd=folder)
        except Missing as fault:
            faults.append(str(fault))
            continue
        source = folder / "source"
        source.mkdir()
        tar = next(path for path in folder.glob("*.orig.tar.*") if path.suffix != ".asc")
        run("tar", "-xf", tar, "-C", source, "--strip-components=1")
        debs = {package: next(folder.glob(f"{package}_*.deb")) for package in programs + headers}
        for deb in debs.values():
            run("dpkg", "-x", deb, folder / "program")
        needed = [one for package in programs for one in needs(debs[package], name.partition("-")[0])]
        run("apt-get", "satisfy", "-qq", "--no-install-recommends", "-y", ", ".join(needed))
        for archive in set(folder.iterdir()) - {source, folder / "program"}:
            archive.unlink()
        return version
    raise Missing("\n".join([f"apt's mirror has no {programs[0]} with its source; another one may", *faults]))


def needs(deb: Path, family: str) -> Iterator[str]:
    """What a package depends on, but for its relatives."""
    for needed in run("dpkg-deb", "-f", deb, "Depends").strip().split(", "):
        if not needed.startswith(family):
            yield needed


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    os.environ.update(DEBIAN_FRONTEND="noninteractive", RUNLEVEL="1", LC_ALL="C")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        run("apt-get", "update", "-q")
        with tempfile.TemporaryDirectory(prefix="crablb-fetch-") as lists:
            mirror = Mirror(Path(lists))
            redis = fetch(mirror, "redis", ["redis-server", "redis-tools"], [], folder / "redis")
            name = mirror.apt("apt-cache", "depends", "postgresql").split("Depends: ")[1].split()[0]
            client, dev = (name.replace("-", f"-{what}-") for what in ("client", "server-dev"))
            postgresql = fetch(mirror, name, [name, client], [dev], folder / "postgresql")
    except Missing as missing:
        sys.exit(f"crablb: {missing}")
    print(f"    redis {redis}, {name} {postgresql}")


if __name__ == "__main__":
    main()
