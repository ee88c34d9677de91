"""Everything about the machine that is needed to repeat a run, or to judge it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = ("crablb", "numpy", "cffi", "uvloop", "structlog", "matplotlib")
#: Programs and how they tell their version.
PROGRAMS = {
    "gcc": ["gcc", "--version"],
    "clang": ["clang", "--version"],
    "nginx": ["nginx", "-v"],
    "haproxy": ["haproxy", "-v"],
    "wrk": ["wrk", "-v"],
    "iperf3": ["iperf3", "--version"],
    "nft": ["nft", "--version"],
    "valgrind": ["valgrind", "--version"],
}


def describe() -> dict[str, Any]:
    """As JSON.  What cannot be found out is left out."""
    return {
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "cpu": _cpuinfo("model name"),
        "cpus": len(os.sched_getaffinity(0)),
        "caches": _caches(),
        "memory_mib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 20,
        "hypervisor": "hypervisor" in _cpuinfo("flags").split(),
        "mitigations": _mitigations(),
        "clock": _read("/sys/devices/system/clocksource/clocksource0/current_clocksource"),
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "huge_pages": _chosen("/sys/kernel/mm/transparent_hugepage/enabled"),
        "bpf_jit": _read("/proc/sys/net/core/bpf_jit_enable"),
        "python": platform.python_version(),
        "packages": {name: version for name in PACKAGES if (version := _package(name))},
        "programs": {name: version for name, command in PROGRAMS.items() if (version := _version(command))},
        "revision": _output(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]).strip(),
        "load_at_start": os.getloadavg()[0],
    }


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _chosen(path: str) -> str:
    match = re.search(r"\[(\w+)\]", _read(path))
    return match[1] if match else ""


def _cpuinfo(field: str) -> str:
    match = re.search(rf"^{field}\s*:\s*(.*)$", _read("/proc/cpuinfo"), re.MULTILINE)
    return match[1] if match else ""


def _caches() -> dict[str, str]:
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        kind = {"Data": "d", "Instruction": "i"}.get(_read(index / "type"), "")
        found[f"L{_read(index / 'level')}{kind}"] = _read(index / "size")
    return found


def _mitigations() -> dict[str, str]:
    folder = Path("/sys/devices/system/cpu/vulnerabilities")
    found = {path.name: _read(path) for path in sorted(folder.glob("*"))}
    return {name: state for name, state in found.items() if state and state != "Not affected"}


def _package(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout + done.stderr


def _version(command: list[str]) -> str:
    match = re.search(r"\d+\.[\w.+~-]+", _output(command))
    return match[0] if match else ""
