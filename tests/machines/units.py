"""``make test-units``: the units of deploy/ where systemd runs: started, reloaded, killed, hung, stopped.

The machine is a root of Debian by debootstrap, with what is built here, booted by systemd-nspawn in the network
namespaces of a lab: the load balancer's is the machine's own, an agent's its unit's (NetworkNamespacePath=).  The
kernel is the host's.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from distros import base, own_cgroup, settle
from machine import FOLDER, HERE, LOGS, PROJECT, Failed, Verdict, alone, must

sys.path.insert(0, str(PROJECT))
from crablb.lab import VIP4, Lab
from tests.helpers.frozen import frozen, thread

DISTROS = ["bookworm", "trixie"]
PACKAGES = "systemd systemd-sysv dbus python3-venv libbpf1 iproute2 procps curl"
UNITS = ["crablb", "crablb-agent-server", "crablb-agent-client"]

#: Seconds; only so that a hang ends as a failure.
LIMIT = 120
#: In place of the units' WatchdogSec=: nobody wants to wait so long.
WATCHDOG = 4
#: systemd's mark of what a unit could do, in tenths: less than 3.
MOST = 29

CONFIGURATION = f"""\
interface = "eth0"
[[service]]
address = "tcp://{VIP4}:80"
backends = ["10.0.0.11"]
"""
VIP = f"--vip tcp://{VIP4}:80"
AGENTS = {"server": VIP, "client": f"{VIP} --backends 10.0.0.0/24"}
#: What systemctl says of each, when all is well.
WELL = {
    "crablb": "serving 1 service, 1 of 1 backend",
    "crablb-agent-server": "server endpoint of 1 VIP",
    "crablb-agent-client": "client endpoint of 1 VIP",
}
#: A thread of each whose hanging is to be noticed.
THREADS = {"crablb": "crablb-eth0/0", "crablb-agent-client": "crablb-watch"}


def inside(root: Path, environment: dict[str, str], *command: str) -> list[str | Path]:
    """A command in the root before it is booted."""
    return ["unshare", "--mount", "--pid", "--cgroup", "--fork", "--kill-child", "sh", HERE / "enter.sh", root,
            "env", "-i", *(f"{key}={value}" for key, value in environment.items()), *command]  # fmt: skip


def prepare(root: Path, wheel: Path, lab: Lab, log: Path) -> None:
    """Install crablb as a package would, and say what it is to do."""
    environment = settle(root)
    must(inside(root, environment, "sh", "-c", f"""set -e
        apt-get -qq update
        DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends {PACKAGES} >/dev/null"""),
        log, f"install {PACKAGES}")  # fmt: skip
    shutil.copy(wheel, root / "root")
    must(inside(root, environment, "sh", "-c", f"""set -e
        python3 -m venv /usr/lib/crablb
        /usr/lib/crablb/bin/pip install -q /root/{wheel.name}
        ln -s /usr/lib/crablb/bin/crablb /usr/bin/crablb"""), log, "install the wheel")  # fmt: skip
    units, settings = root / "etc/systemd/system", root / "etc/crablb"
    settings.mkdir()
    (settings / "lb.toml").write_text(CONFIGURATION)
    nodes = {"server": lab.servers[0], "client": lab.client}
    for unit in UNITS:
        shutil.copy(PROJECT / f"deploy/{unit}.service", units)
        more = f"[Service]\nWatchdogSec={WATCHDOG}\n"
        role = unit.removeprefix("crablb-agent-")
        if role in nodes:
            (settings / f"agent-{role}.env").write_text(f"CRABLB_AGENT={AGENTS[role]}\n")
            more += f"NetworkNamespacePath={nodes[role].path}\n"
        (units / f"{unit}.service.d").mkdir()
        (units / f"{unit}.service.d/override.conf").write_text(more)


class Machine:
    """One that has been booted: its first process, and the cgroup that all is in."""

    def __init__(self, leader: int, cgroup: Path, log: Path) -> None:
        self._leader, self._cgroup, self._log = leader, cgroup, log

    def run(self, *command: str, check: bool = True) -> str:
        """What a command prints.  Raises :class:`Failed` if it fails."""
        enter = ["nsenter", "-t", str(self._leader), "-m", "-u", "-i", "-p", "-C", "-n", "-r", "-w"]
        settings = ["env", "-i", "PATH=/usr/sbin:/usr/bin", "LANG=C.UTF-8", "SYSTEMD_PAGER=cat", "SYSTEMD_COLORS=0"]
        done = subprocess.run([*enter, *settings, *command], capture_output=True, text=True, check=False, timeout=LIMIT)
        with open(self._log, "a") as log:
            log.write(f"==> {' '.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}\n")
        if check and done.returncode:
            raise Failed(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout.strip()

    def show(self, unit: str, what: str) -> str:
        return self.run("systemctl", "show", "--value", "-p", what, unit)

    def until(self, what: str, condition: Callable[[], object]) -> None:
        """Raises :class:`Failed` if it does not come about."""
        end = time.monotonic() + LIMIT
        while not condition():
            if time.monotonic() > end:
                raise Failed(f"it did not come about that {what}")
            time.sleep(0.1)  # not to ask all the time

    def process(self, unit: str) -> int:
        """The unit's process, as the host numbers it."""
        (found,) = self._cgroup.glob(f"**/system.slice/{unit}.service/cgroup.procs")
        return int(found.read_text().split()[0])

    def processes(self, unit: str) -> int:
        """How many the unit has."""
        return sum(len(each.read_text().split()) for each in self._cgroup.glob(f"**/{unit}.service/cgroup.procs"))

    def well(self, unit: str) -> bool:
        return self.show(unit, "ActiveState") == "active" and self.show(unit, "StatusText") == WELL[unit]


@contextlib.contextmanager
def booted(root: Path, lab: Lab, log: Path) -> Iterator[Machine]:
    """The root as a machine whose network is the load balancer's."""
    name = f"crablb-units-{os.getpid()}"
    nodes = [lab.lb, lab.client, *lab.servers]
    with own_cgroup("units") as cgroup, open(log, "ab") as out:
        command = [
            "sh", "-c", 'echo 0 > "$0/cgroup.procs" && exec "$@"', str(cgroup),
            "setpriv", "--pdeathsig", "KILL", "unshare", "--mount",
            # It would leave folders there.
            "sh", "-c", 'mkdir -p /run/systemd && mount -t tmpfs none /run/systemd && exec "$@"', "-",
            "env", "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1", "SYSTEMD_NSPAWN_API_VFS_WRITABLE=yes",
            "systemd-nspawn", "-M", name, "-D", str(root), "--register=no", "--keep-unit",
            f"--network-namespace-path={lab.lb.path}", *(f"--bind={node.path}" for node in nodes),
            # As a machine of its own has it: all capabilities, bpf(2).
            "--capability=all", "--system-call-filter=bpf perf_event_open", "--console=read-only", "--boot",
        ]  # fmt: skip
        nspawn = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
        try:
            yield begun(nspawn, cgroup, log)
        finally:
            nspawn.kill()
            nspawn.wait()


def begun(nspawn: subprocess.Popen[bytes], cgroup: Path, log: Path) -> Machine:
    """Wait until it has booted."""
    end = time.monotonic() + LIMIT
    while nspawn.poll() is None and time.monotonic() < end:
        children = subprocess.run(["pgrep", "-P", str(nspawn.pid)], capture_output=True, text=True, check=False).stdout
        if children:
            machine = Machine(int(children.split()[0]), cgroup, log)
            if machine.run("systemctl", "is-system-running", check=False) in ("running", "degraded"):
                # PID 1 of a machine mounts it, that of a container does not.
                machine.run("mount", "-t", "bpf", "-o", "mode=700", "bpf", "/sys/fs/bpf")
                return machine
        time.sleep(0.2)
    raise Failed("it does not boot")


#: What harms a process as long as the context lasts, and is to be called meanwhile.
Harm = Callable[[int], contextlib.AbstractContextManager[Callable[[], object]]]


# ---- what is tried ----


def starts(machine: Machine, lab: Lab) -> None:
    machine.run("systemd-run", "-q", "--unit=web", f"-pNetworkNamespacePath={lab.servers[0].path}",
                "-pWorkingDirectory=/usr/share", "python3", "-m", "http.server", "80")  # fmt: skip
    machine.run("systemctl", "enable", *UNITS)
    machine.run("systemctl", "start", *UNITS)
    for unit in UNITS:
        machine.until(f"{unit} is well", lambda unit=unit: machine.well(unit))
    answered(machine, lab)


def answered(machine: Machine, lab: Lab) -> None:
    machine.until("a request is answered", lambda: machine.run(
        "nsenter", f"--net={lab.client.path}", "curl", "-sf", "-m2", f"http://{VIP4}/", check=False))  # fmt: skip


def is_kept_from_much(machine: Machine, lab: Lab) -> None:
    """By this systemd's own reckoning."""
    for unit in UNITS:
        machine.run("systemd-analyze", "security", f"--threshold={MOST}", f"{unit}.service")
        errors = machine.run(
            "systemd-analyze", "verify", "--man=no", f"/etc/systemd/system/{unit}.service", check=False
        )
        if errors:
            raise Failed(errors)


def is_reloaded(machine: Machine, lab: Lab) -> None:
    """Another process of the same service, and not a restart."""
    before = machine.show("crablb", "MainPID")
    machine.run("systemctl", "reload", "crablb")
    if machine.show("crablb", "MainPID") == before or machine.show("crablb", "NRestarts") != "0":
        raise Failed("it was not taken over")
    machine.until("it is well", lambda: machine.well("crablb"))
    answered(machine, lab)


def restarted(machine: Machine, unit: str, harm: Harm) -> None:
    """What harms the unit's process, for as long as the context lasts, has it started anew."""
    before, times = machine.show(unit, "MainPID"), int(machine.show(unit, "NRestarts"))
    with harm(machine.process(unit)) as meanwhile:

        def anew() -> bool:
            meanwhile()
            return int(machine.show(unit, "NRestarts")) > times

        machine.until(f"{unit} is started anew", anew)
    machine.until(f"{unit} is well", lambda: machine.well(unit))
    if machine.show(unit, "MainPID") == before:
        raise Failed(f"{unit} is the process of before")


@contextlib.contextmanager
def killed(process: int) -> Iterator[Callable[[], object]]:
    os.kill(process, 9)
    yield lambda: None


def is_started_anew_when_killed(machine: Machine, lab: Lab) -> None:
    for unit in UNITS:
        restarted(machine, unit, killed)
    answered(machine, lab)


def is_started_anew_when_a_thread_hangs(machine: Machine, lab: Lab) -> None:
    for unit, name in THREADS.items():
        restarted(machine, unit, lambda process, name=name: frozen(thread(process, name)))
        said = machine.run("journalctl", "-o", "cat", "-u", unit)
        for wanted in ("threads have hung", "Watchdog timeout", "Fatal Python error: Aborted"):
            if wanted not in said:
                raise Failed(f"the journal of {unit} has no {wanted!r}")
    answered(machine, lab)


def come(machine: Machine, stage: str, *command: str) -> None:
    """Have a takeover begin, and wait until the journal says that it has come so far."""

    def said() -> int:
        return machine.run("journalctl", "-o", "cat", "-u", "crablb").count(stage)

    before = said()
    machine.run(*command)
    machine.until(f"the journal has {stage!r}", lambda: said() > before)


RELOAD = ("systemctl", "reload", "--no-block", "crablb")


def is_started_anew_when_killed_in_a_takeover(machine: Machine, lab: Lab) -> None:
    """And the process that systemd knows is the only one."""
    for stage, command in (
        ("a successor is started", RELOAD),
        ("a takeover begins", RELOAD),
        ("a takeover begins", ("systemctl", "kill", "--kill-whom=main", "-s", "USR2", "crablb")),
    ):
        main = machine.show("crablb", "MainPID")
        come(machine, stage, *command)
        machine.run("kill", "-9", main, check=False)  # if it has not ended in order
        machine.until("another process serves", lambda main=main: machine.show("crablb", "MainPID") not in ("0", main))
        machine.until("it is well, and alone", lambda: machine.well("crablb") and machine.processes("crablb") == 1)
        answered(machine, lab)


def is_stopped_in_a_takeover(machine: Machine, lab: Lab) -> None:
    come(machine, "a takeover begins", *RELOAD)
    machine.run("systemctl", "stop", "crablb")
    if (state := machine.show("crablb", "ActiveState")) != "inactive":
        raise Failed(f"it is {state}")
    machine.run("systemctl", "start", "crablb")
    machine.until("it is well, and alone", lambda: machine.well("crablb") and machine.processes("crablb") == 1)


def is_stopped(machine: Machine, lab: Lab) -> None:
    """One does not take what is the others' with it; the last leaves nothing."""
    machine.run("systemctl", "stop", "crablb-agent-server")
    if not machine.run("sh", "-c", "ls /run/crablb/*-lb-eth0.lock"):
        raise Failed("the load balancer's lock is gone")
    answered(machine, lab)
    machine.run("systemctl", "stop", *UNITS)
    for unit in UNITS:
        if (state := machine.show(unit, "ActiveState")) != "inactive":
            raise Failed(f"{unit} is {state}")
    left = machine.run("sh", "-c", "find /sys/fs/bpf/crablb /run/crablb -mindepth 1 2>/dev/null", check=False)
    left += "".join(line for line in machine.run("ip", "link").splitlines() if "xdp" in line)
    if left := "\n".join(one for one in left.splitlines() if not one.endswith("mptcp-limits.lock")):
        raise Failed(f"something is left: {left}")


#: In the order in which they are tried.
STEPS = [starts, is_kept_from_much, is_reloaded, is_started_anew_when_killed, is_started_anew_when_a_thread_hangs,
         is_started_anew_when_killed_in_a_takeover, is_stopped_in_a_takeover, is_stopped]  # fmt: skip


def check(distro: str, wheel: Path, verdict: Verdict) -> None:
    log = LOGS / f"units-{distro}.log"
    log.unlink(missing_ok=True)
    root = FOLDER / "roots" / f"units-{distro}"
    shutil.rmtree(root, ignore_errors=True)
    began = time.monotonic()
    try:
        must(["cp", "-a", base(distro, log), root], log, "copy the root")
        with Lab.create(f"units-{os.getpid()}", servers=1) as lab:
            prepare(root, wheel, lab, log)
            with booted(root, lab, log) as machine:
                print(f"==> {distro}: {machine.run('systemctl', '--version').split(')')[0]})", flush=True)
                for step in STEPS:
                    what = f"{distro}: {step.__name__.replace('_', ' ')}"
                    try:
                        step(machine, lab)
                        verdict.ok(what)
                    except Failed as error:
                        machine.run("journalctl", "--no-pager", "-b", *(f"-u{unit}" for unit in UNITS), check=False)
                        verdict.fail(what, str(error), log)
    except Failed as error:
        verdict.fail(distro, str(error), log)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    print(f"      in {time.monotonic() - began:.0f} s", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("distros", nargs="*", metavar="DISTRO", help=f"of Debian (default: {' '.join(DISTROS)})")
    given = parser.parse_args()
    verdict = Verdict()
    with alone("test-units"):
        folder = FOLDER / "units"
        shutil.rmtree(folder, ignore_errors=True)
        log = LOGS / "units.log"
        log.unlink(missing_ok=True)
        must([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, PROJECT], log, "make a wheel")
        (wheel,) = folder.glob("*.whl")
        for distro in given.distros or DISTROS:
            check(distro, wheel, verdict)
    return verdict.end()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Failed as error:
        sys.exit(f"test-units: {error}")
