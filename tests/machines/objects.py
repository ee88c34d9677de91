"""Load every object of crablb/kernel/objects into the running kernel: how many instructions its verifier followed of
each program (``followed NAME COUNT``), and what it says of those it refuses."""

from __future__ import annotations

import sys
from pathlib import Path

from machine import PROJECT

from crablb.kernel import bpf

VERDICT = 30  # lines of the verifier's log, whose end says why
#: What an object needs of a kernel that not every one has: a function that programs may change.
NEEDS = {"sockets": "update_socket_protocol"}


def main() -> int:
    refused = 0
    functions = {line.split()[2] for line in Path("/proc/kallsyms").read_text().splitlines()}
    for source in sorted((PROJECT / "bpf").glob("*.bpf.c")):
        path = bpf.object_path(name := source.name.removesuffix(".bpf.c"))
        if (needed := NEEDS.get(name)) and needed not in functions:
            print(f"none  {path.name}: this kernel has no {needed}")
            continue
        try:
            with bpf.Object(path) as loaded:
                print(f"ok    {path.name}")
                for program, one in loaded.programs.items() if name not in NEEDS else ():
                    print(f"followed {program} {one.verified}")
        except bpf.BpfError as e:
            refused += 1
            print(f"FAIL  {path.name}: {e}")
            print("\n".join((e.log or "").strip().splitlines()[-VERDICT:]))
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
