"""``make test-kernels``: BPF programs, the whole demo and more of the tests in Debian's kernels, on this very system.

Each kernel runs in qemu, which needs neither KVM nor an image: the host's root is mounted read-only (9p) below a tmpfs
(``init``).  It has pairs of network cards, each on a wire, in a network namespace of its own.  The kernel's packages
are fetched by apt and unpacked, not installed.
"""

from __future__ import annotations

import argparse
import compileall
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from machine import FOLDER, HERE, KEYRING, LOGS, PROJECT, Failed, Verdict, alone, command, mirror, must, output

sys.path.insert(0, str(PROJECT))

from tests.helpers.verified import LIMIT, clang, differ, kernel, note, noted

# Where Debian has them.  The first is the oldest that the README promises.
KERNELS = {"6.1": "bookworm", "6.12": "trixie", "newest": "trixie-backports"}


def pytest(*what: str) -> list[str]:
    """Test by test, so that the log says where it is; which of them take long."""
    return [".venv/bin/python", "-m", "pytest", "-v", "-p", "pytest_timeout", "--durations=10", *what]


# What runs in each, as the console's log and the report name it.  To load the load balancer's program takes a minute
# here, and a process seconds to start: a test that needs a lab of its own is dear.
OBJECTS, CARDS = "BPF objects", "cards"
STEPS = {
    OBJECTS: [".venv/bin/python", "tests/machines/objects.py"],
    "demo": [".venv/bin/crablb", "demo"],
    "ways": pytest("tests/machines/ways.py"),
    "MPTCP": pytest(
        "tests/lab/test_mptcp_listeners.py", "tests/lab/test_mptcp.py", "-k", "listeners or leave and all_kinds"
    ),
    "takeover": pytest("tests/lab/test_takeover.py", "-k", "all_goes_over or killed_in_the_midst"),
    "bonds": pytest("tests/machines/links.py", "-k", "bond"),
    "VLANs": pytest("tests/machines/links.py", "-k", "vlan"),
    "netem": pytest("tests/machines/links.py", "-k", "bad_link"),
    "IPVS": pytest("-p", "xdist.plugin", "-mlong", "tests/lab/test_migration.py", "-k", "ipvs or keepalived"),
    # All files there are in memory, or of the host: who reads files has nothing that others could have in its place.
    "memory": pytest("-p", "xdist.plugin", "-mlong", "tests/lab/test_memory.py", "-k", "little"),
    CARDS: pytest("-s", "tests/machines/cards.py"),
}

# Variables of the environment that steps go by.
PASSED = ["CRABLB_SYNS", "PYTEST_ADDOPTS"]

# Pairs of cards, each on a wire of its own: the model, and how many queues it has at most (0: as many as it is made
# with).  Of virtio's one pair has none to spare for what XDP programs send, and one has.
PAIRS = [("virtio-net-pci", 2), ("virtio-net-pci", 4), ("igb", 0)]
CPUS = 2

# The wires.  Who runs what follows leaves no interface behind.
WIRES = """set -e
sysctl -qw net.ipv6.conf.default.disable_ipv6=1
pairs=$0
for pair in $pairs; do
    ip link add name wire${pair%:*} type bridge
    for end in 0 1; do
        ip tuntap add dev tap${pair%:*}$end mode tap vnet_hdr ${pair#*:}
        ip link set dev tap${pair%:*}$end master wire${pair%:*} up
    done
    ip link set dev wire${pair%:*} up
done
exec "$@"
"""

# What the kernel cannot load by itself, as it needs them to find its modules.
BOOT_MODULES = ["virtio_pci", "9p", "9pnet_virtio", "overlay"]

# Much of a kernel's modules, and of no use here.  Of network cards' drivers igb stays, and what is beside it.
LEFT_OUT = [
    "sound",
    "drivers/gpu",
    "drivers/media",
    "drivers/infiniband",
    "drivers/net/wireless",
    "drivers/net/ethernet/[!i]*",
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


def initramfs(folder: Path, version: str, steps: Sequence[str], log: Path) -> Path:
    """What boots: busybox, ``init``, the modules that it takes to mount the host's root, and the job."""
    tree, root = folder / "tree", folder / "initramfs"
    shutil.rmtree(root, ignore_errors=True)
    (root / "modules").mkdir(parents=True)
    shutil.copy(next(p for p in (tree / "usr/bin/busybox", tree / "bin/busybox") if p.exists()), root / "busybox")
    shutil.copy(HERE / "init", root / "init")
    (root / "init").chmod(0o755)
    (root / "tree").write_text(str(tree))
    (root / "job").write_text(job(steps))
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


def job(steps: Sequence[str]) -> str:
    """The shell script that runs in the virtual machine.  A step's line on the second serial port: status, name."""
    lines = [
        "export HOME=/root LANG=C.UTF-8 PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        f"cd {shlex.quote(str(PROJECT))}",
        # To import all that it has takes two minutes here.
        "export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1",
        *(f"export {name}={shlex.quote(os.environ[name])}" for name in PASSED if name in os.environ),
    ]
    for name in steps:
        lines += [f"echo '==> {name}'", f'{shlex.join(STEPS[name])} </dev/null; echo "$? {name}" >/dev/ttyS1']
    return "\n".join([*lines, "exec /run/busybox poweroff -f", ""])


def qemu(log: Path) -> list[str | Path]:
    """How to call one that has igb (8.0): this machine's, or else that of its backports, unpacked beside."""
    here = "qemu-system-x86_64"
    if "mac=" in output(here, "-device", "igb,help"):
        return [here]
    tree = FOLDER / "qemu/tree"
    binary = tree / "usr/bin/qemu-system-x86_64"
    if not binary.exists():
        print("==> fetching a newer qemu", flush=True)
        suite = f"{platform.freedesktop_os_release()['VERSION_CODENAME']}-backports"
        tree.mkdir(parents=True, exist_ok=True)
        packages = ["qemu-system-data", "seabios", "ipxe-qemu", "qemu-system-x86"]
        Apt(FOLDER / "qemu/apt", suite).unpack(packages, tree, log)
    firmware = [tree / "usr/share/qemu", tree / "usr/share/seabios", tree / "usr/lib/ipxe/qemu"]
    return [binary, *(part for folder in firmware for part in ("-L", folder))]


def cards() -> list[str]:
    """Options of qemu.  virtio's have what AF_XDP's zero-copy mode needs (Linux 6.13)."""
    options = []
    virtio = "mq=on,rss=on,rx_queue_size=1024,iommu_platform=on,disable-legacy=on,queue_reset=on"
    for n, (model, queues) in enumerate(PAIRS):
        for end in (f"{n}0", f"{n}1"):
            tap = f"tap,id=net{end},ifname=tap{end},script=no,downscript=no,vhost=off"
            # No ROM, by which the machine's firmware would look for a system on each.
            card = f"{model},bus=port{end},netdev=net{end},mac=52:54:00:00:00:{end},romfile="
            options += [
                # igb does checksums and segments by itself, as hardware does.
                "-netdev", f"{tap},queues={queues}" if queues else f"{tap},vnet_hdr=off",
                "-device", f"pcie-root-port,id=port{end},chassis={int(end) + 1}",
                "-device", f"{card},{virtio}" if queues else card,
            ]  # fmt: skip
    return options


def run(folder: Path, version: str, steps: Sequence[str], log: Path) -> dict[str, int]:
    """Boot and do the job.  Returns the exit status of each step that ended."""
    archive = initramfs(folder, version, steps, log)
    image = next(p for p in folder.glob("tree/**/vmlinuz*"))
    statuses = folder / "statuses"
    statuses.unlink(missing_ok=True)
    accel = os.environ.get("ACCEL")
    # Time goes by what its processors do, each in its turn: how busy the host is decides nothing.
    clock = ["-accel", accel] if accel else ["-accel", "tcg,thread=single", "-icount", "shift=1"]
    wires = " ".join(f"{n}:{'multi_queue' if queues else ''}" for n, (_, queues) in enumerate(PAIRS))
    command(
        ["unshare", "--net", "sh", "-c", WIRES, wires, *qemu(log),
         "-machine", "q35", *clock, "-cpu", "max", "-smp", str(CPUS), "-m", "2048",
         "-nodefaults", "-display", "none", *(cards() if CARDS in steps else []), "-no-reboot",
         "-serial", "stdio", "-serial", f"file:{statuses}",
         "-virtfs", "local,path=/,mount_tag=host,security_model=none,readonly=on,multidevs=remap",
         "-kernel", image, "-initrd", archive, "-append", "console=ttyS0 quiet panic=-1 mitigations=off"],
        log,
    )  # fmt: skip
    told = statuses.read_text() if statuses.exists() else ""
    return {name: int(status) for status, name in re.findall(r"^(\d+) (.+?)\r?$", told, re.M)}


def judge(version: str, log: Path, write: bool, verdict: Verdict) -> None:
    """How many instructions its verifier has followed, by the log, and as noted."""
    told = re.findall(r"^followed (\S+) (\d+)\r?$", log.read_text(errors="replace"), re.M)
    found, what = {program: int(count) for program, count in told}, f"Linux {version}: the verifier's instructions"
    if not found:
        verdict.fail(what, "none were told", log)
        return
    print("      " + ", ".join(f"{program} {count:,}" for program, count in sorted(found.items())))
    if write:
        note({clang(): found}, version)
    before = noted().get(kernel(version), {}).get(clang())
    near = {program: count for program, count in found.items() if count > LIMIT * 3 // 4}
    problems = [f"{program}: {count:,}, too near to {LIMIT:,}" for program, count in near.items()]
    if problems := problems + (differ(before, found) if before else []):
        verdict.fail(what, "; ".join(problems))
    else:
        verdict.ok(what if before else f"{what}, which nothing is noted of: ARGS=--write")


def check(name: str, steps: Sequence[str], write: bool, verdict: Verdict) -> None:
    """Run the steps in one kernel."""
    log = LOGS / f"linux-{name}.log"
    log.unlink(missing_ok=True)
    folder = FOLDER / "kernels" / name
    folder.mkdir(parents=True, exist_ok=True)
    try:
        version = fetch(folder, KERNELS[name], log)
        print(f"==> Linux {version}", flush=True)
        started = time.monotonic()
        ended = run(folder, version, steps, log)
        seconds = time.monotonic() - started
    except Failed as e:
        verdict.fail(f"Linux {name}", str(e), log)
        return
    for step in steps:
        what = f"Linux {version}: {step}"
        if ended.get(step) == 0:
            verdict.ok(what)
        elif step in ended:
            verdict.fail(what, f"exit status {ended[step]}", log)
        else:
            verdict.fail(what, f"did not end in {seconds:.0f} s", log)
    if ended.get(OBJECTS) == 0:
        judge(version, log, write, verdict)
    print(f"      in {seconds:.0f} s", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("kernels", nargs="*", metavar="KERNEL", help=f"of {', '.join(KERNELS)} (all)")
    parser.add_argument(
        "--step", action="append", choices=STEPS, metavar="STEP", help=f"of {', '.join(STEPS)} (all); several times"
    )
    parser.add_argument("--write", action="store_true", help="note the instructions that the verifier followed")
    given = parser.parse_args()
    names = given.kernels or list(KERNELS)
    for name in names:
        if name not in KERNELS:
            parser.error(f"no kernel {name} is known; known are {', '.join(KERNELS)}")
    if os.uname().machine != "x86_64":
        raise Failed(f"these are kernels for x86_64, and this machine is {os.uname().machine}")
    verdict = Verdict()
    # Where nothing can be kept from one boot to the next.
    for folder in ("crablb", "tests"):
        compileall.compile_dir(PROJECT / folder, quiet=1)
    with alone("test-kernels"):
        for name in names:
            check(name, given.step or list(STEPS), given.write, verdict)
    return verdict.end()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Failed as e:
        sys.exit(f"test-kernels: {e}")
