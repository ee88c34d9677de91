"""``make test-distros``: the README's commands on fresh Debian systems, from a clone of the last commit.

Each system is a root made by debootstrap, entered by ``enter.sh``: the host's kernel and network, and nothing else.
What a fresh machine cannot know it is told from the host's configuration: mirrors, proxies and certificates.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from machine import (
    FOLDER,
    HERE,
    KEYRING,
    LOGS,
    PROJECT,
    Failed,
    Verdict,
    alone,
    command,
    mirror,
    must,
    output,
    pip_settings,
)

DISTROS = ["bookworm", "trixie", "sid"]
COMMANDS = ["demo", "test"]

# What a fresh system must have to begin with: to get the project, and to run make.
BASE = "ca-certificates,git,make"
# Days after which a root is made anew.
STALE = 7

# Root clones what is a user's.
GIT = ["git", "-c", "safe.directory=*"]
CLONE = Path("root/crablb")
CERTIFICATES = Path("etc/ssl/host-certificates.crt")


def base(distro: str, log: Path, include: str = BASE) -> Path:
    """The distro's root with these packages, fresh from debootstrap; made only if there is none, or an old one."""
    root = FOLDER / "roots" / ("-".join([distro, *include.split(",")]) if include != BASE else distro)
    if root.exists() and time.time() - root.stat().st_mtime < STALE * 86400:
        return root
    made = root.with_suffix(".part")
    shutil.rmtree(made, ignore_errors=True)
    made.parent.mkdir(exist_ok=True)
    print(f"==> {distro}: debootstrap", flush=True)
    arguments = ["--variant=minbase", f"--include={include}", f"--keyring={KEYRING}", distro, str(made), mirror()]
    # Its mounts end with it.
    must(["unshare", "--mount", "--pid", "--fork", "--kill-child", "debootstrap", *filter(None, arguments)], log,
         f"make a root of {distro} by debootstrap")  # fmt: skip
    shutil.rmtree(root, ignore_errors=True)
    os.utime(made)
    return made.rename(root)


def settle(root: Path) -> dict[str, str]:
    """Tell a root how the world is reached; returns the environment that says the rest."""
    for name in ("etc/resolv.conf", "etc/hosts"):
        (root / name).unlink(missing_ok=True)
        shutil.copyfile(f"/{name}", root / name)
    acquire = [line for line in output("apt-config", "dump").splitlines()
               if line.startswith(("Acquire::http", "Acquire::Check-", "Acquire::Retries"))]  # fmt: skip
    (root / "etc/apt/apt.conf.d/90host").write_text("\n".join([*acquire, ""]))
    environment = {
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        **{name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")},
        **pip_settings(),
    }
    if "PIP_CERT" in environment:
        shutil.copyfile(environment["PIP_CERT"], root / CERTIFICATES)
        environment["PIP_CERT"] = f"/{CERTIFICATES}"
    return environment


@contextlib.contextmanager
def own_cgroup(name: str) -> Iterator[Path]:
    """A cgroup for all that runs in a root; whatever is left in it at the end is killed."""
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    parent = next((Path(fields[1]) for fields in mounts if fields[2] == "cgroup2"), None)
    if parent is None:
        raise Failed("cgroup v2 is not mounted; mount it: mount -t cgroup2 none /sys/fs/cgroup")
    group = parent / f"crablb-machine-{os.getpid()}-{name}"
    group.mkdir()
    try:
        yield group
    finally:
        with open(group / "cgroup.events") as events:
            (group / "cgroup.kill").write_text("1")
            poll = select.poll()
            poll.register(events, select.POLLPRI)
            while "populated 1" in events.read():
                poll.poll()
                events.seek(0)
        for folder, _, _ in os.walk(group, topdown=False):
            Path(folder).rmdir()


def have(root: Path) -> str:
    """The versions there of what crablb is built with."""
    names = {"gcc": "gcc", "clang": "clang", "python3": "Python", "libbpf-dev": "libbpf"}
    query = output("dpkg-query", f"--admindir={root}/var/lib/dpkg", "-W", "-f", "${Package} ${Version}\n")
    versions = dict(line.split() for line in query.splitlines())
    return ", ".join(
        f"{name} {versions[package].rpartition(':')[2].partition('-')[0]}"
        for package, name in names.items()
        if package in versions
    )


def check(distro: str, commands: list[str], args: str, verdict: Verdict) -> None:
    """Run the commands on one distro, with ``ARGS``."""
    log = LOGS / f"{distro}.log"
    log.unlink(missing_ok=True)
    root = FOLDER / "roots" / f"{distro}.run"
    shutil.rmtree(root, ignore_errors=True)
    try:
        must(["cp", "-a", base(distro, log), root], log, "copy the root")
        environment = settle(root)
        must([*GIT, "clone", "--no-hardlinks", PROJECT, root / CLONE], log, "clone the project")
        for name in commands:
            started = time.monotonic()
            log = LOGS / f"{distro}-{name}.log"
            log.unlink(missing_ok=True)
            make = ["make", "-C", f"/{CLONE}", name, *([f"ARGS={args}"] if args else [])]
            with own_cgroup(distro) as cgroup:
                status = command(
                    ["unshare", "--mount", "--pid", "--cgroup", "--fork", "--kill-child", "sh", HERE / "enter.sh", root,
                     "env", "-i", *(f"{key}={value}" for key, value in environment.items()), *make],
                    log, cgroup,
                )  # fmt: skip
            seconds = time.monotonic() - started
            if status:
                verdict.fail(f"{distro}: make {name}", f"exit status {status} after {seconds:.0f} s", log)
            else:
                verdict.ok(f"{distro}: make {name} ({seconds:.0f} s)")
        print(f"      {distro}: {have(root)}", flush=True)
    except Failed as e:
        verdict.fail(distro, str(e), log)
    finally:
        shutil.rmtree(root, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("distros", nargs="*", metavar="DISTRO", help=f"of Debian (default: {' '.join(DISTROS)})")
    parser.add_argument("--commands", default=" ".join(COMMANDS), help="make targets (default: %(default)s)")
    given = parser.parse_args()
    commit = output(*GIT, "-C", PROJECT, "log", "-1", "--format=%h %s").strip()
    print(f"==> of {commit}")
    if output(*GIT, "-C", PROJECT, "status", "--porcelain", "--untracked-files=no"):
        print("    what is not committed is not tested")
    verdict = Verdict()
    with alone("test-distros"):
        for distro in given.distros or DISTROS:
            check(distro, given.commands.split(), os.environ.get("ARGS", ""), verdict)
    return verdict.end()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Failed as e:
        sys.exit(f"test-distros: {e}")
