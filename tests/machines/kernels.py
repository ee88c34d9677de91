"""``make test-kernels``: every BPF program, the whole demo, bonds and VLANs in Debian's kernels, on this very system.

Each kernel runs in qemu, which needs neither KVM nor an image: the host's root is mounted read-only (9p) below a tmpfs
(``init``).  The kernel's packages are fetched by apt and unpacked, not installed.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from machine import FOLDER, HERE, KEYRING, LOGS, PROJECT, Failed, Verdict, alone, command, mirror, must, output

# Where Debian has them.  The first is the oldest that the README promises.
KERNELS = {"6.1": "bookworm", "6.12": "trixie", "newest": "trixie-backports"}

# What runs in each, as the console's log and the report name it.
STEPS = {
    "BPF objects": [".venv/bin/python", "tests/machines/objects.py"],
    "demo": [".venv/bin/crablb", "demo"],
    "bonds and VLANs": [".venv/bin/python", "-m", "pytest", "-q", "tests/machines/links.py"],
}

# What the kernel cannot load by itself, as it needs them to find its modules.
BOOT_MODULES = ["virtio_pci", "9p", "9pnet_virtio", "overlay"]

# Much of a kernel's modules, and of no use here.
LEFT_OUT = [
    "sound",
    "drivers/gpu",
    "drivers/media",
    "drivers/infiniband",
    "drivers/net/wireless",
    "drivers/net/ethernet",
]


class Apt:
    """apt for one suite, beside the host's own sources and lists."""

    def __init__(self, folder: Path, suite: str) -> None:
        uri = mirror()
        if not uri:
            raise Failed("this host's apt has no Debian mirror; say which to use: make test-kernels MIRROR=http://...")
        for name in ("lists/partial", "cache/archives/partial", "debs"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        # Backports have only what is newer.
        suites = sorted({suite, suite.removesuffix("-backports")})
        sources = [f"deb [signed-by={KEYRING}] {uri} {name} main\n" for name in suites]
        (folder / "sources.list").write_text("".join(sources))
        self.debs = folder / "debs"
        self.options = [
            f"-oDir::Etc::SourceList={folder}/sources.list", "-oDir::Etc::SourceParts=/dev/null",
            f"-oDir::State::Lists={folder}/lists", f"-oDir::Cache={folder}/cache", "-oAPT::Sandbox::User=root",
            f"-oAPT::Default-Release={suite}", "-oDir::State::status=/dev/null",
        ]  # fmt: skip
        output("apt-get", *self.options, "-qq", "update")

    def depends(self, package: str, *prefixes: str) -> list[str]:
        """What a package depends on, of these beginnings."""
        listed = output("apt-cache", *self.options, "depends", "--important", package).splitlines()
        names = [line.partition("Depends: ")[2] for line in listed]
        return [name for name in names if name.startswith(prefixes)]

    def unpack(self, packages: list[str], tree: Path, log: Path) -> None:
        """Fetch packages and unpack them into a tree."""
        shutil.rmtree(self.debs)
        self.debs.mkdir()
        get = ["apt-get", *self.options, "download", *packages]
        must(["env", "-C", self.debs, *get], log, f"download {', '.join(packages)}")
        skip = [f"--exclude=*/kernel/{folder}" for folder in LEFT_OUT]
        for deb in self.debs.iterdir():
            extract = 'dpkg-deb --fsys-tarfile "$0" | tar -x --keep-directory-symlink -C "$@"'
            must(["sh", "-c", extract, deb, tree, *skip], log, f"unpack {deb}")
        shutil.rmtree(self.debs)


def fetch(folder: Path, suite: str, log: Path) -> str:
    """The newest kernel of the suite into ``folder/tree``, if it is not there.  Returns its version."""
    apt = Apt(folder / "apt", suite)
    image = apt.depends("linux-image-amd64", "linux-image-")[0]
    version = image.removeprefix("linux-image-")
    tree, done = folder / "tree", folder / "version"
    if done.exists() and done.read_text() == version:
        return version
    print(f"==> fetching Linux {version}", flush=True)
    done.unlink(missing_ok=True)
    shutil.rmtree(tree, ignore_errors=True)
    (tree / "usr/lib").mkdir(parents=True)
    (tree / "lib").symlink_to("usr/lib")
    more = apt.depends(image, "linux-binary-", "linux-modules-")
    apt.unpack([image, *more, "busybox-static"], tree, log)
    must(["depmod", "-b", tree, version], log, "list the modules")
    done.write_text(version)
    return version


def plain_module(path: Path) -> bytes:
    """A module, unpacked: the kernel cannot do it so early, nor busybox."""
    tool = {".xz": "xz", ".zst": "zstd"}.get(path.suffix)
    return subprocess.run([tool, "-dc", path], stdout=subprocess.PIPE, check=True).stdout if tool else path.read_bytes()


def initramfs(folder: Path, version: str, log: Path) -> Path:
    """What boots: busybox, ``init``, the modules that it takes to mount the host's root, and the job."""
    tree, root = folder / "tree", folder / "initramfs"
    shutil.rmtree(root, ignore_errors=True)
    (root / "modules").mkdir(parents=True)
    shutil.copy(next(p for p in (tree / "usr/bin/busybox", tree / "bin/busybox") if p.exists()), root / "busybox")
    shutil.copy(HERE / "init", root / "init")
    (root / "init").chmod(0o755)
    (root / "tree").write_text(str(tree))
    (root / "job").write_text(job())
    order: list[str] = []
    modules = tree / "lib/modules" / version
    for module in BOOT_MODULES:
        # Not every kernel's packages list what is built in.
        if not list(modules.rglob(f"{module}.ko*")):
            continue
        shown = output("modprobe", "-d", tree, "-S", version, "--show-depends", module)
        for path in map(Path, re.findall(r"^insmod (.+?) *$", shown, re.M)):
            plain = path.name.partition(".ko")[0] + ".ko"
            if plain not in order:
                order.append(plain)
                (root / "modules" / plain).write_bytes(plain_module(path))
    (root / "modules/order").write_text("".join(f"{name}\n" for name in order))
    archive = folder / "initramfs.cpio"
    must(["sh", "-c", 'cd "$0" && find . | cpio --quiet -o -H newc >"$1"', root, archive], log, "pack the initramfs")
    return archive


def job() -> str:
    """The shell script that runs in the virtual machine.  A step's line on the second serial port: status, name."""
    lines = [
        "export HOME=/root LANG=C.UTF-8 PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        f"cd {shlex.quote(str(PROJECT))}",
    ]
    for name, step in STEPS.items():
        lines += [f"echo '==> {name}'", f'{shlex.join(step)} </dev/null; echo "$? {name}" >/dev/ttyS1']
    return "\n".join([*lines, "exec /run/busybox poweroff -f", ""])


def run(folder: Path, version: str, log: Path) -> dict[str, int]:
    """Boot and do the job.  Returns the exit status of each step that ended."""
    archive = initramfs(folder, version, log)
    kernel = next(p for p in folder.glob("tree/**/vmlinuz*"))
    statuses = folder / "statuses"
    statuses.unlink(missing_ok=True)
    accel = os.environ.get("ACCEL")
    # Time goes by what its one processor does: how busy the host is decides nothing.
    clock = ["-accel", accel, "-smp", "2"] if accel else ["-accel", "tcg,thread=single", "-icount", "shift=1"]
    command(
        ["qemu-system-x86_64", "-machine", "q35", *clock, "-cpu", "max", "-m", "2048",
         "-nodefaults", "-display", "none", "-nic", "none", "-no-reboot",
         "-serial", "stdio", "-serial", f"file:{statuses}",
         "-virtfs", "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap",
         "-kernel", kernel, "-initrd", archive, "-append", "console=ttyS0 quiet panic=-1 mitigations=off"],
        log,
    )  # fmt: skip
    told = statuses.read_text() if statuses.exists() else ""
    return {name: int(status) for status, name in re.findall(r"^(\d+) (.+?)\r?$", told, re.M)}


def check(name: str, verdict: Verdict) -> None:
    """Run the steps in one kernel."""
    log = LOGS / f"linux-{name}.log"
    log.unlink(missing_ok=True)
    folder = FOLDER / "kernels" / name
    folder.mkdir(parents=True, exist_ok=True)
    try:
        version = fetch(folder, KERNELS[name], log)
        print(f"==> Linux {version}", flush=True)
        started = time.monotonic()
        ended = run(folder, version, log)
        seconds = time.monotonic() - started
    except Failed as e:
        verdict.fail(f"Linux {name}", str(e), log)
        return
    for step in STEPS:
        what = f"Linux {version}: {step}"
        if ended.get(step) == 0:
            verdict.ok(what)
        elif step in ended:
            verdict.fail(what, f"exit status {ended[step]}", log)
        else:
            verdict.fail(what, f"did not end in {seconds:.0f} s", log)
    print(f"      in {seconds:.0f} s", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=f"of {', '.join(KERNELS)} (all)")
    given = parser.parse_args().kernels or list(KERNELS)
    for name in given:
        if name not in KERNELS:
            parser.error(f"no kernel {name} is known; known are {', '.join(KERNELS)}")
    if os.uname().machine != "x86_64":
        raise Failed(f"these are kernels for x86_64, and this machine is {os.uname().machine}")
    verdict = Verdict()
    with alone("test-kernels"):
        for name in given:
            check(name, verdict)
    return verdict.end()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Failed as e:
        sys.exit(f"test-kernels: {e}")
