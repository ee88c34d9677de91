"""Load every object of crablb/kernel/objects into the running kernel; what its verifier says of those it refuses."""

from __future__ import annotations

import sys

from machine import PROJECT

from crablb.kernel import bpf

VERDICT = 30  # lines of the verifier's log, whose end says why


def main() -> int:
    refused = 0
    for source in sorted((PROJECT / "bpf").glob("*.bpf.c")):
        path = bpf.object_path(source.name.removesuffix(".bpf.c"))
        try:
            with bpf.Object(path):
                print(f"ok    {path.name}")
        except bpf.BpfError as e:
            refused += 1
            print(f"FAIL  {path.name}: {e}")
            print("\n".join((e.log or "").strip().splitlines()[-VERDICT:]))
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
