"""``make test-compilers``: every BPF program, by every clang from 14 on, through this kernel's verifier.

Debian's ``clang-N`` that are here, and those that the package index has inside of builds of zig.  ``--write`` notes
how many instructions the verifier followed (tests/bpf/verified.json); else they may differ by a tenth.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import FOLDER, LOGS, PROJECT, Failed, Verdict, alone, must

sys.path.insert(0, str(PROJECT))

from crablb.kernel.bpf import BpfError
from setup import compile_bpf
from tests.helpers.verified import clang as version_of
from tests.helpers.verified import differ, followed, kernel, note, noted

OLDEST, NEWEST = 14, 40
# By the version of clang inside, where Debian has none: each release of zig has one.
ZIG = {"17": "0.12.1", "18": "0.13.0", "20": "0.15.2", "21": "0.16.0", "22": "0.17.1"}
VERDICT = 12  # lines of the verifier's log, whose end says why


def compiler(version: str, log: Path) -> list[str] | None:
    """How to call this clang.  None: there is none.  Raises :class:`Failed`."""
    if shutil.which(f"clang-{version}"):
        return [f"clang-{version}"]
    if version not in ZIG:
        return None
    folder = FOLDER / "clangs" / version
    zig = folder / "ziglang/zig"
    if not zig.exists():
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder]
        must([*pip, f"ziglang=={ZIG[version]}"], log, f"get ziglang {ZIG[version]}")
    return [str(zig), "clang", "-isystem", str(zig.parent / "lib/include")]


def check(version: str, command: list[str], log: Path) -> dict[str, int]:
    """Instructions that the verifier followed, by program.  Raises :class:`Failed`."""
    if version_of(command) != version:
        raise Failed(f"{' '.join(command)} is clang {version_of(command)}")
    with tempfile.TemporaryDirectory() as folder:
        objects = []
        for source in sorted((PROJECT / "bpf").glob("*.bpf.c")):
            objects.append(Path(folder) / f"{source.name[:-2]}.o")
            try:
                compile_bpf(source, objects[-1], command)
            except subprocess.CalledProcessError:
                raise Failed(f"{source.name} does not compile") from None
        try:
            # A tracing program, which not every machine lets anybody load, compiles.
            return followed([path for path in objects if path.stem != "sockets.bpf"])
        except BpfError as error:
            log.write_text("\n".join((error.log or "").strip().splitlines()[-VERDICT:]))
            raise Failed(str(error).split(" (")[0]) from None


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("versions", nargs="*", metavar="VERSION", help="of clang; default: all that there are")
    parser.add_argument("--write", action="store_true", help="note the instructions that the verifier followed")
    given = parser.parse_args()
    verdict, found = Verdict(), {}
    with alone("compilers"):
        for version in given.versions or map(str, range(OLDEST, NEWEST)):
            log = LOGS / f"clang-{version}.log"
            log.unlink(missing_ok=True)
            try:
                command = compiler(version, log)
                if command is None:
                    if given.versions:
                        raise Failed(f"there is no clang-{version} here: apt-get install clang-{version}")
                    continue
                found[version] = check(version, command, log)
            except Failed as error:
                verdict.fail(f"clang {version}", str(error), log)
                continue
            most = max(found[version], key=found[version].__getitem__)
            before = noted().get(kernel(), {}).get(version)
            changed = differ(before, found[version]) if before and not given.write else []
            if changed:
                verdict.fail(f"clang {version}", "; ".join(changed))
            else:
                verdict.ok(f"clang {version}: most instructions for {most}, {found[version][most]:,}")
        if given.write:
            note(found)
        return verdict.end()


if __name__ == "__main__":
    sys.exit(main())
