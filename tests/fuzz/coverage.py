"""Which branches of native/ are reached, and which are not: by the corpora, by native/'s own tests, and from Python.

All of it is compiled anew by clang with counters; the tests that call the hot loop, its sockets and its workers from
Python run with such an extension in a copy of the package.  A branch is two, one a side; one in a header is one for all
that include it.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
from collections import defaultdict
from pathlib import Path

from tests.fuzz.corpus import BUILD, FOLDER, PROJECT, TARGETS, found, kept

HERE = BUILD / "coverage"
PROFILES = HERE / "profiles"
TREE = HERE / "tree"
#: Tests that call native/ from Python; those of tests/bpf need root.
CALLING = [
    *(
        f"tests/unit/test_{name}.py"
        for name in ("answer", "connections", "differential", "flows", "handler", "joins", "policy", "tap")
    ),
    *(f"tests/unit/test_{name}.py" for name in ("shared_backends", "snapshot", "syn")),
    *(f"tests/bpf/test_{name}.py" for name in ("library_life", "tap", "worker", "xsk", "xsk_misuse", "xsk_shared")),
]
#: At least so many of a hundred.
GOAL = 95
COUNTED = ["-std=gnu11", "-g", "-fno-strict-aliasing", "-I.", "-I../../native", "-I../../native/../bpf", "-O0",
           "-fprofile-instr-generate", "-fcoverage-mapping", "-DCRAB_DEBUG", "-fPIC", "-shared"]  # fmt: skip
#: One side of a branch: file, line, column, and which.
Side = tuple[str, int, int, bool]


def make_tree() -> None:
    """A copy of the package whose extension counts."""
    shutil.rmtree(TREE, ignore_errors=True)
    shutil.copytree(PROJECT / "crablb", TREE / "crablb", ignore=shutil.ignore_patterns("_native*.so", "__pycache__"))
    for name in (
        "tests",
        "bench",
        "bpf",
        "docs",
        "examples",
        "native",
        "deploy",
        "pyproject.toml",
        "setup.py",
        "README.md",
        "CHANGELOG.md",
    ):
        (TREE / name).symlink_to(PROJECT / name)
    made = HERE / "_native.c"
    runpy.run_path(str(PROJECT / "native/cffi_build.py"))["native"].emit_c_code(str(made))
    # By the same names as in the other programs: a function of one file is known by the file's.
    sources = [f"../../native/{path.name}" for path in sorted((PROJECT / "native").glob("*.c"))]
    include = f"-I{sysconfig.get_path('include')}"
    subprocess.run(
        ["clang", *COUNTED, include, "-DPy_LIMITED_API=0x030b0000", made, *sources, "-pthread",
         "-o", TREE / "crablb/_native.abi3.so"],
        cwd=FOLDER, check=True,
    )  # fmt: skip


def run_all() -> None:
    shutil.rmtree(PROFILES, ignore_errors=True)
    PROFILES.mkdir(parents=True)
    counting = os.environ | {"LLVM_PROFILE_FILE": str(PROFILES / "%p-%m.profraw"), "PYTHONPATH": str(TREE)}
    for target in TARGETS:
        inputs = kept(target) + [data for other, data in found().values() if other == target]
        lines = "".join(data.hex() + "\n" for data in inputs)
        subprocess.run([HERE / target], input=lines, text=True, env=counting, check=True)
    for path in sorted((PROJECT / "native/tests").glob("test_*.c")):
        subprocess.run([HERE / path.stem], env=counting, check=True)
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *CALLING]
    if subprocess.run(pytest, cwd=TREE, env=counting, check=False).returncode:
        print("some tests failed: what they did is counted", file=sys.stderr)


def sides() -> dict[Side, bool]:
    """Whether each was reached."""
    merged = HERE / "merged.profdata"
    subprocess.run(["llvm-profdata", "merge", "-o", merged, *PROFILES.glob("*.profraw")], check=True)
    programs = [HERE / "libnative.so", TREE / "crablb/_native.abi3.so", *(HERE / target for target in TARGETS)]
    programs += [HERE / path.stem for path in (PROJECT / "native/tests").glob("test_*.c")]
    objects = [word for program in programs[1:] for word in ("-object", program)]
    export = ["llvm-cov", "export", programs[0], *objects, f"-instr-profile={merged}"]
    told = json.loads(subprocess.run(export, capture_output=True, text=True, check=True).stdout)
    reached: dict[Side, bool] = defaultdict(bool)
    for function in told["data"][0]["functions"]:
        for line, column, _, _, taken, not_taken, file, *_ in function["branches"]:
            path = Path(function["filenames"][file]).resolve()
            if path.parent in (PROJECT / "native", PROJECT / "bpf"):
                for side, count in ((True, taken), (False, not_taken)):
                    reached[str(path.relative_to(PROJECT)), line, column, side] |= count > 0
    return reached


def report() -> int:
    subprocess.run(["make", "-s", "-C", FOLDER, "coverage"], check=True)
    make_tree()
    run_all()
    reached = sides()
    files = sorted({side[0] for side in reached})
    for file in files:
        own = {side: yes for side, yes in reached.items() if side[0] == file}
        missing = sorted(side for side, yes in own.items() if not yes)
        print(f"{file}: {len(own) - len(missing)} of {len(own)} branches")
        source = (PROJECT / file).read_text().splitlines()
        for _, line, column, side in missing:
            print(f"  {line}:{column} never {'true' if side else 'false'}: {source[line - 1].strip()}")
    share = 100 * sum(reached.values()) / len(reached)
    print(f"native/: {sum(reached.values()):,} of {len(reached):,}, {share:.1f} %; at least {GOAL} % are wanted")
    return 0 if share >= GOAL else 1
