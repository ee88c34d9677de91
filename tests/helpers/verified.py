"""How long the verifier follows each BPF program, by the compiler that made it: what is noted, and what is found."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from crablb.kernel import bpf

#: ``{kernel: {clang: {program: instructions}}}``; `make test-compilers ARGS=--write` writes it of the kernel that runs,
#: `make test-kernels ARGS=--write` of Debian's.
NOTED = Path(__file__).parent.parent / "bpf/verified.json"
LIMIT = 1_000_000  # BPF_COMPLEXITY_LIMIT_INSNS
TOLERATED = 0.10


def kernel(release: str = "") -> str:
    """Whose verifier it is (without ``release`` that of the kernel that runs): its counts are its own."""
    return ".".join((release or os.uname().release).split(".")[:2])


def clang(command: Sequence[str | Path] = ("clang",)) -> str:
    """The compiler's major version."""
    said = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"clang version (\d+)", said)
    assert found, said
    return found[1]


def followed(objects: Sequence[Path]) -> dict[str, int]:
    """Instructions by program.  Raises :class:`bpf.BpfError` if one is refused."""
    found = {}
    for path in objects:
        with bpf.Object(path) as loaded:
            found |= {name: program.verified for name, program in loaded.programs.items()}
    return found


def noted() -> dict[str, dict[str, dict[str, int]]]:
    return json.loads(NOTED.read_text()) if NOTED.exists() else {}  # type: ignore[no-any-return]


def note(found: Mapping[str, Mapping[str, int]], release: str = "") -> None:
    """By clang; of this kernel, or another one."""
    known, whose = noted(), kernel(release)
    known[whose] = known.get(whose, {}) | {version: dict(counts) for version, counts in found.items()}
    NOTED.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


def differ(before: Mapping[str, int], now: Mapping[str, int]) -> list[str]:
    """What is not as noted, in words."""
    problems = [f"{name} is not noted" for name in now.keys() - before.keys()]
    problems += [f"{name} is no more" for name in before.keys() - now.keys()]
    for name in before.keys() & now.keys():
        if abs(now[name] - before[name]) > TOLERATED * before[name]:
            problems.append(f"{name}: the verifier follows {now[name]} instructions; noted are {before[name]}")
    return sorted(problems)
