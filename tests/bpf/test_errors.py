"""Why the kernel refuses a program: told by its cause."""

from __future__ import annotations

import subprocess
import sys

import pytest

from crablb.agent import base
from crablb.errors import KernelError
from crablb.kernel import bpf
from tests.helpers.processes import ROOT

LOAD = """
from crablb.kernel import bpf
try:
    bpf.Object(bpf.object_path("server"))
    print("loaded")
except bpf.BpfPermissionError as error:
    print(error)
"""


def load(*where: str) -> str:
    """Load a program in a process that is started so; what it says."""
    done = subprocess.run(
        [*where, sys.executable, "-c", LOAD], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("where", "why"),
    [
        (["unshare", "--user", "--map-root-user"], "this is a user namespace, whose root may not load BPF programs"),
        (["setpriv", "--bounding-set", "-sys_admin,-cap_39"], "root lacks capabilities here, as in a container"),
        (["setpriv", "--reuid", "1", "--clear-groups"], "run as root, or with CAP_BPF and CAP_NET_ADMIN"),
    ],
    ids=["user-namespace", "capabilities", "user"],
)
def test_what_is_lacking(where, why):
    said = load(*where)
    assert why in said
    assert ("run as root" in said) == ("--reuid" in where)


def test_the_limit_of_locked_memory_is_none_of_bpf():
    """Maps are charged to the cgroup since Linux 5.11."""
    assert load("prlimit", "--memlock=0") == "loaded"


def test_what_libbpf_says_is_told(tmp_path):
    (tmp_path / "junk.o").write_text("junk")
    with pytest.raises(bpf.BpfLoadError, match=r"cannot open BPF object .* \(libbpf: .*not a proper ELF object\)"):
        bpf.Object(tmp_path / "junk.o")
    with pytest.raises(bpf.BpfLoadError, match=r"Argument list too long \(libbpf: .*server_vips"):
        bpf.Object(bpf.object_path("server"), max_entries={"server_vips": 1 << 30})


@pytest.mark.parametrize(
    ("mounts", "advice"),
    [
        ("proc /proc proc rw 0 0\n", "mount it: mount -t cgroup2 none /sys/fs/cgroup"),
        (
            "tmpfs /sys/fs/cgroup tmpfs rw 0 0\ncgroup /sys/fs/cgroup/memory cgroup rw,memory 0 0\n",
            "it can be beside cgroup v1: mkdir -p /run/cgroup2 && mount -t cgroup2 none /run/cgroup2",
        ),
    ],
    ids=["none", "v1"],
)
def test_no_cgroup_v2(monkeypatch, mounts, advice):
    monkeypatch.setattr(base.Path, "read_text", lambda _: mounts)
    with pytest.raises(KernelError) as caught:
        base.cgroup_root()
    assert str(caught.value) == f"cgroup v2 is not mounted; {advice}"


def test_where_sys_is_masked():
    """How many values a per-CPU map has cannot be told then, nor guessed."""
    code = """
from crablb.kernel import bpf
program = bpf.Object(bpf.object_path("lb"), max_entries={"flows": 64, "service_counters": 8})
try:
    program.map("xdp_counters").sum_u64(0)
except bpf.BpfError as error:
    print(error)
"""
    hidden = 'mount -t tmpfs none /sys/devices/system/cpu && exec "$@"'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", hidden, "sh", sys.executable, "-c", code],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.stdout.startswith("cannot read /sys/devices/system/cpu/possible; mount it: mount -t sysfs"), done.stderr
