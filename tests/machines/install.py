"""``make test-install``: docs/install.md, command by command, from an empty Debian to a served VIP.

Each machine of the page is a root of its own by debootstrap (minbase), entered by ``enter.sh``: own mounts, processes,
cgroups, and a node of a lab for its network.  The host's kernel is theirs too.  What is installed is what lies in
``build``: ``make deb``, ``make wheel``.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from distros import base, own_cgroup, settle
from machine import FOLDER, HERE, LOGS, PROJECT, Failed, Verdict, alone, must, output

sys.path.insert(0, str(PROJECT))
from crablb.lab import Lab, Node
from tests.helpers.pages import Shell, Step, is_as, snippets, steps

PAGE = PROJECT / "docs/install.md"

#: Beside debootstrap's minbase: without it no mirror by https is trusted.
BARE = "ca-certificates"

#: Ways to install: the file, as it is called in build, or in what ``make test-packages`` has left.
WAYS = {"apt": "crablb_[!9]*+debian{release}_*.deb", "pip": "crablb-*.whl", "pipx": "crablb-*.whl"}
RELEASES = {"bookworm": 12, "trixie": 13}

MACHINES = ["server1", "server2", "lb", "client"]
SERVERS = MACHINES[:2]

#: Sections of the page in their order, and who does what they say; first on a machine that the others are copies of.
INSTALL = ["By {way}", "Is it there"]
PLACES = [
    ("Servers", SERVERS),
    ("The load balancer", ["lb"]),
    ("A client", ["client"]),
    ("Did it", ["lb"]),
    ("Off a client", ["client"]),
    ("Off the load balancer", ["lb"]),
    ("Off a server", SERVERS),
    ("Out by {way}", MACHINES),
]

#: Where crablb may leave something, in a root.
LEFT = "/sys/fs/bpf/crablb /etc/crablb /var/lib/crablb /opt/crablb /opt/pipx/venvs/crablb /usr{,/local}/bin/crablb"


class Machine:
    """A root that somebody sits at."""

    def __init__(self, name: str, root: Path, environment: dict[str, str], log: Path) -> None:
        self.name, self.root, self._environment, self._log = name, root, environment, log
        self.shell: Shell

    @contextlib.contextmanager
    def entered(self, node: Node | None) -> Iterator[None]:
        """``node``: whose network it has; the host's, if there is none."""
        with own_cgroup(self.name) as cgroup:
            command = [
                "sh", "-c", 'echo 0 > "$0/cgroup.procs" && exec "$@"', cgroup,
                *(["nsenter", f"--net={node.path}"] if node else []),
                "setpriv", "--pdeathsig", "KILL",
                "unshare", "--mount", "--pid", "--cgroup", "--uts", "--fork", "--kill-child",
                "sh", HERE / "enter.sh", self.root,
                "env", "-i", *(f"{key}={value}" for key, value in self._environment.items()),
                "sh", "-c", 'hostname "$0" && cd "$HOME" && exec bash', self.name,
            ]  # fmt: skip
            with Shell(self.root, list(map(str, command))) as self.shell:
                yield

    def follow(self, section: str) -> None:
        """Do what the page says.  Raises :class:`Failed` if a command fails, or prints something else."""
        for step in steps(PAGE, [section]):
            self._do(step)

    def _do(self, step: Step) -> None:
        printed, failed = self.shell.run(step.snippet.text)
        with open(self._log, "a") as log:
            log.write(f"==> {self.name}: {step.snippet.place}\n{step.snippet.text}\n--\n{printed}\n{failed}\n")
        if failed:
            raise Failed(f"{step.snippet.place}, on {self.name}: {failed}")
        if step.shown is not None and not is_as(step.shown, printed):
            raise Failed(f"{step.snippet.place}, on {self.name}, prints something else")


def untouched(lab: Lab) -> None:
    """Take out of a lab what the page has to do: servers that have the VIP, a route to it."""
    for server in lab.servers:
        server.set({"net.ipv4.conf.all.arp_ignore": 0, "net.ipv4.conf.all.arp_announce": 0})
        server.ip("addr flush dev lo", "addr add 127.0.0.1/8 dev lo")
    lab.client.ip("route del 10.0.0.100", "route del fd00::100")


def network(node: Node) -> str:
    """What crablb might leave in a network namespace: programs, addresses, routes, rules, sysctls."""
    ip = ["ip", "-n", node.netns]
    shown = [output(*ip, "-o", "link"), output(*ip, "-o", "addr"), output("tc", "-n", node.netns, "qdisc", "show")]
    shown += [output(*ip, version, *what) for version in ("-4", "-6") for what in (["route"], ["rule"])]
    shown.append(node.run("sysctl", "-a", "-r", "net.ipv4.conf|net.mptcp").stdout)
    # Queues, states and times are not its.
    return re.sub(r" (numtxqueues|state|valid_lft|preferred_lft|qlen) \S+", "", "".join(shown))


def package(distro: str, way: str) -> Path:
    """What is installed: the newest that there is.  Raises :class:`Failed`."""
    pattern = WAYS[way].format(release=RELEASES[distro])
    # One wheel is for all.
    left = FOLDER / "packages" / (distro if way == "apt" else "*")
    found = [*(PROJECT / "build").glob(f"*/{pattern}"), *left.parent.glob(f"{left.name}/{pattern}")]
    if not found:
        raise Failed(f"there is no {pattern} in build; make it there (make deb, make wheel), or by make test-packages")
    return max(found, key=lambda path: path.stat().st_mtime)


def check(distro: str, way: str, verdict: Verdict) -> None:
    started = time.monotonic()
    what = f"{distro}: {way}"
    log = LOGS / f"install-{distro}-{way}.log"
    log.unlink(missing_ok=True)
    folder = FOLDER / "roots" / f"install-{distro}-{way}"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        file = package(distro, way)
        folder.mkdir()
        image = folder / "image"
        must(["cp", "-a", base(distro, log, BARE), image], log, "copy the root")
        environment = settle(image)
        shutil.copy(file, image / "root")
        # All machines begin as copies of the one that it was installed on.
        first = Machine("image", image, environment, log)
        with first.entered(None):
            for section in INSTALL:
                first.follow(section.format(way=way))
        with contextlib.ExitStack() as stack:
            lab = stack.enter_context(Lab.create(f"install-{os.getpid()}", "bridge", len(SERVERS)))
            untouched(lab)
            machines, before = {}, {}
            for name in MACHINES:
                must(["cp", "-a", image, folder / name], log, "copy the root")
                machines[name] = Machine(name, folder / name, environment, log)
                stack.enter_context(machines[name].entered(lab.node(name)))
                before[name] = network(lab.node(name))
            for section, who in PLACES:
                for name in who:
                    machines[name].follow(section.format(way=way))
            for name, machine in machines.items():
                now = network(lab.node(name))
                left, _ = machine.shell.run(f"ls -d {LEFT} 2> /dev/null || true")
                left += "\n".join(difflib.unified_diff(before[name].split("\n"), now.split("\n"), n=0))
                if left:
                    raise Failed(f"something is left on {name}: {left}")
        verdict.ok(f"{what} ({time.monotonic() - started:.0f} s)")
    except Failed as error:
        verdict.fail(what, str(error), log)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("distros", nargs="*", metavar="DISTRO", help=f"of Debian (default: {' '.join(RELEASES)})")
    parser.add_argument("--ways", default=" ".join(WAYS), help="to install (default: %(default)s)")
    given = parser.parse_args()
    verdict = Verdict()
    followed = {name.format(way=way) for name in (*INSTALL, *(name for name, _ in PLACES)) for way in WAYS}
    if left := {shown.section for shown in snippets(PAGE) if shown.language == "sh"} ^ followed:
        raise Failed(f"{PAGE.name} and this program differ in sections: {', '.join(sorted(left))}")
    with alone("test-install"):
        for distro in given.distros or RELEASES:
            for way in given.ways.split():
                check(distro, way, verdict)
    return verdict.end()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Failed as error:
        sys.exit(f"test-install: {error}")
