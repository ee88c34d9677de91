"""``make test-container``: docs/containers.md, command by command, by Podman.

The image's base is a root by debootstrap, and its package what lies in ``build/deb``.  Load balancer and one server are
containers, each on a host of its own: a node of a lab with its own /sys/fs/bpf, /run/crablb and so on.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from distros import base, settle
from install import BARE, untouched
from machine import FOLDER, LOGS, PROJECT, Failed, Verdict, alone, must

sys.path.insert(0, str(PROJECT))
from crablb.lab import VIP4, Lab, Node
from crablb.lab.demo import crablb
from tests.helpers.pages import Shell, is_as, snippets, steps

PAGE = PROJECT / "docs/containers.md"
DISTRO, PACKAGE = "bookworm", "crablb_*+debian12_*.deb"
#: As the page calls it, so that nothing is fetched.
IMAGE = "docker.io/library/debian:bookworm-slim"

#: Sections in their order, and who does what they say.
PLACES = [("A server's agent", "server1"), ("The load balancer", "lb")]
END = [("Stop, upgrade", "lb")]
#: What comes first, where there is the network that packages come from.
BUILD = "In a container"
SECTIONS = [BUILD, *(section for section, _ in (*PLACES, *END))]

#: What a host of containers shares with them.
SHARED = ("etc/crablb", "run/crablb", "var/lib/crablb")
#: A command in a host's namespaces: $0, its folder; $1, its network; the rest, the command.
ENTER = """
set -e
for name in {shared}; do
  mkdir -p /$name $0/$name
  mount --bind $0/$name /$name
done
mount -t bpf bpf /sys/fs/bpf
net=$1
shift
exec nsenter --net=$net "$@"
""".format(shared=" ".join(SHARED))


def settings(folder: Path) -> dict[str, str]:
    """Environment of a Podman whose images and containers are in a folder, with no more than this machine can do."""
    (folder / "storage.conf").write_text(
        f'[storage]\ndriver = "overlay"\ngraphroot = "{folder}/images"\nrunroot = "{folder}/run"\n'
    )
    # So that it works without systemd, with cgroups of both versions (crun refuses them), and where limits cannot be
    # raised.
    (folder / "containers.conf").write_text(
        '[engine]\nruntime = "runc"\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n'
        '[containers]\ndefault_ulimits = ["nofile=1024:1024", "nproc=4096:4096"]\n'
    )
    return {
        **os.environ,
        "BUILDAH_ISOLATION": "chroot",
        "CONTAINERS_CONF": str(folder / "containers.conf"),
        "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }


@contextlib.contextmanager
def podman(folder: Path) -> Iterator[dict[str, str]]:
    """The environment; in the end no container is there."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = settings(folder)
    try:
        yield environment
    finally:
        subprocess.run(["podman", "rm", "--all", "--force"], env=environment, capture_output=True, check=False)


def import_base(environment: dict[str, str], folder: Path, log: Path) -> None:
    root = folder / "base"
    shutil.rmtree(root, ignore_errors=True)
    try:
        must(["cp", "-a", base(DISTRO, log, BARE), root], log, "copy the root")
        settle(root)
        archive = folder / "base.tar"
        must(["tar", "-C", root, "-cf", archive, "."], log, "pack the root")
        must(
            ["env", *(f"{k}={v}" for k, v in environment.items()), "podman", "import", archive, IMAGE], log, "import it"
        )
        archive.unlink()
    finally:
        shutil.rmtree(root, ignore_errors=True)


@contextlib.contextmanager
def host(node: Node, folder: Path, environment: dict[str, str]) -> Iterator[Shell]:
    (folder / node.name).mkdir()
    command = ["unshare", "--mount", "bash", "-c", ENTER, str(folder / node.name), str(node.path), "bash"]
    with Shell(PROJECT, command, environment) as shell:
        yield shell


def follow(shell: Shell, section: str, log: Path) -> None:
    """Raises :class:`Failed`."""
    for step in steps(PAGE, [section]):
        printed, failed = shell.run(step.snippet.text)
        with open(log, "a") as out:
            out.write(f"==> {step.snippet.place}\n{step.snippet.text}\n--\n{printed}\n{failed}\n")
        if failed:
            raise Failed(f"{step.snippet.place}: {failed}")
        if step.shown is not None and not is_as(step.shown, printed):
            raise Failed(f"{step.snippet.place} prints something else")


def check(environment: dict[str, str], folder: Path, log: Path) -> None:
    """Raises :class:`Failed`."""
    with contextlib.ExitStack() as stack:
        lab = stack.enter_context(Lab.create(f"container-{os.getpid()}", "bridge", 2))
        untouched(lab)
        hosts = {name: stack.enter_context(host(lab.node(name), folder, environment)) for name in ("lb", "server1")}
        for server in lab.servers:
            (folder / f"{server.name}-page").mkdir()
            (folder / f"{server.name}-page/index.html").write_text(f"{server.name}\n")
        lab.servers[1].run(*crablb("agent", "server", "--vip", f"tcp://{VIP4}:80", "--dsr", "--detach"))
        for server in lab.servers:
            page = str(folder / f"{server.name}-page")
            server.popen(
                "python3", "-m", "http.server", "--directory", page, "80",
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip
        for section, name in PLACES:
            follow(hosts[name], section, log)
        asked = ["curl", "-s", "--max-time", "10", f"http://{VIP4}/?[1-10]"]
        plain = lab.client.run(*asked, check=False).stdout.split()
        lab.client.run(*crablb("agent", "client", "--vip", f"tcp://{VIP4}:80", "--backends", "10.0.0.0/24", "--detach"))
        offering = lab.client.run(*asked, check=False).stdout.split()
        for answers in (plain, offering):
            if len(answers) != 10 or set(answers) != {"server1", "server2"}:
                raise Failed(f"of ten requests these are the answers: {answers}")
        counted, _ = hosts["lb"].run("podman exec crablb crablb status | grep -E ' (redirected|fallback_no_offer) '")
        if counted.split() != ["redirected", "10", "fallback_no_offer", "10"]:
            raise Failed(f"ten redirected, ten not; counted is: {counted}")
        healthy, _ = hosts["lb"].run("podman healthcheck run crablb && echo healthy")
        if "healthy" not in healthy.split("\n"):
            raise Failed(f"the container is not healthy: {healthy}")
        for section, name in END:
            follow(hosts[name], section, log)
        ended, failed = hosts["server1"].run(
            "podman stop crablb-agent-server; ls -A /sys/fs/bpf/crablb 2> /dev/null || true"
        )
        if failed or ended.split() != ["crablb-agent-server"]:
            raise Failed(f"the agent leaves something, or complains: {ended}")
        if f"{VIP4}/" in lab.servers[0].run("ip", "-4", "addr", "show", "dev", "lo").stdout:
            raise Failed("the agent leaves the VIP")


def main() -> int:
    argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0]).parse_args()
    verdict = Verdict()
    if left := {shown.section for shown in snippets(PAGE) if shown.language == "sh"} ^ set(SECTIONS):
        raise Failed(f"{PAGE.name} and this program differ in sections: {', '.join(sorted(left))}")
    if not list((PROJECT / "build/deb").glob(PACKAGE)):
        raise Failed(f"there is no build/deb/{PACKAGE}; on Debian 12 make one: make deb")
    log = LOGS / "container.log"
    with alone("test-container"), podman(FOLDER / "containers") as environment:
        log.unlink(missing_ok=True)
        hosts = FOLDER / "containers/hosts"
        shutil.rmtree(hosts, ignore_errors=True)
        hosts.mkdir()
        try:
            import_base(environment, FOLDER / "containers", log)
            with Shell(PROJECT, environ=environment) as shell:
                follow(shell, BUILD, log)
            check(environment, hosts, log)
            verdict.ok(PAGE.name)
        except Failed as error:
            verdict.fail(PAGE.name, str(error), log)
    return verdict.end()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Failed as error:
        sys.exit(f"test-container: {error}")
