"""``make fuzz``: libFuzzer over native/, with ASan and UBSan; then more of ``test_inputs.py`` than the tests do.

The targets run one after the other from ``tests/fuzz/corpus``.  What they find that is new is in ``build/fuzz/corpus``;
``--keep`` makes it the repository's, as small as can be.  How many inputs were executed in all is in ``executed.json``:
of a run that is ended early, what is before its last five minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.corpus import BUILD, FOLDER, TARGETS, build, kept, replay

TOTAL = FOLDER / "executed.json"
FOUND = BUILD / "failed"
#: Parts of the time: most of what there is is in whole packets.
SHARE = {"packet": 8, "option": 1, "parse": 1}
#: Bytes of an input at most, while looking and of what is kept.
LONGEST = {"packet": 240, "option": 81, "parse": 400}
#: Bytes of hexadecimal that a target's corpus may have in the repository.
ROOM = {"packet": 200_000, "option": 30_000, "parse": 50_000}
#: Seconds after which what was executed is written down.
SLICE = 300


def write(folder: Path, inputs: list[bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, data in enumerate(inputs):
        (folder / f"kept{i}").write_bytes(data)


def fuzz(target: str, seconds: int, jobs: int) -> tuple[int, bool]:
    """How many inputs were executed, and whether one failed."""
    folder = BUILD / "corpus" / target
    write(folder, kept(target))
    FOUND.mkdir(exist_ok=True)
    command = [
        BUILD / f"{target}-fuzz", f"-max_total_time={seconds}", f"-max_len={LONGEST[target]}", "-entropic=0",
        "-reload=5", "-print_final_stats=1", "-timeout=20", f"-artifact_prefix={FOUND}/{target}-", folder,
    ]  # fmt: skip
    logs = [BUILD / f"{target}-{i}.log" for i in range(jobs)]
    # Where memory was taken is not asked of what is not found; what failed is replayed by the slower one.
    quick = os.environ | {"ASAN_OPTIONS": "malloc_context_size=0:quarantine_size_mb=16"}
    running = []
    for log in logs:
        with log.open("w") as to:
            running.append(subprocess.Popen(["nice", "-n", "19", *map(str, command)], stdout=to, stderr=to, env=quick))
    failures = [process.wait() for process in running]
    executed = 0
    for log in logs:
        text = log.read_text(errors="replace")
        counts = re.findall(r"stat::number_of_executed_units: (\d+)", text) or re.findall(r"^#(\d+)", text, re.M)[-1:]
        executed += sum(map(int, counts))
        if "Test unit written to" in text:
            print(text[text.find("ERROR") - 3000 :] if "ERROR" in text else text[-3000:], file=sys.stderr)
    return executed, any(failures)


def keep(target: str) -> None:
    """Make the repository's corpus of the fewest inputs that reach all that is reached, the shortest first."""
    folder = BUILD / "corpus" / target
    write(folder, kept(target))
    with tempfile.TemporaryDirectory() as small:
        merge = [BUILD / f"{target}-fuzz", "-merge=1", f"-max_len={LONGEST[target]}", small, folder]
        subprocess.run(["nice", "-n", "19", *merge], check=True, capture_output=True)
        inputs = sorted((path.read_bytes() for path in Path(small).iterdir()), key=lambda data: (len(data), data))
    size, lines = 0, []
    for data in inputs:
        size += 2 * len(data) + 1
        if size > ROOM[target]:
            break
        lines.append(data.hex())
    (FOLDER / "corpus" / f"{target}.txt").write_text("".join(f"{line}\n" for line in lines))
    print(f"kept {len(lines)} of {len(inputs)} inputs of {target}")


def count(target: str, executed: int, seconds: float) -> None:
    total = json.loads(TOTAL.read_text())
    total[target] += executed
    TOTAL.write_text(json.dumps(total, indent=2) + "\n")
    print(
        f"{target}: {executed:,} inputs executed, {executed / max(seconds, 1):,.0f} a second; {total[target]:,} in all",
        flush=True,
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="make fuzz", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seconds", type=int, default=60, help="for all targets together (60)")
    parser.add_argument("--jobs", type=int, default=1, help="processes at the same time (1), at the lowest priority")
    parser.add_argument("--target", choices=TARGETS, action="append", help="only this one; may be repeated")
    parser.add_argument("--keep", action="store_true", help="make what was found the repository's corpus")
    parser.add_argument(
        "--coverage", action="store_true", help="only say which branches of native/ are reached, and which not"
    )
    given = parser.parse_args()
    if given.coverage:
        from tests.fuzz.coverage import report

        return report()
    targets = given.target or list(TARGETS)
    build()
    build("fuzzers")
    for target in targets:
        replay(target, kept(target))
    parts = sum(SHARE[target] for target in targets)
    failed = False
    for target in targets:
        left = max(1, given.seconds * SHARE[target] // parts)
        while left > 0 and not failed:
            begun = time.monotonic()
            executed, failed = fuzz(target, min(left, SLICE), max(1, given.jobs))
            count(target, executed, time.monotonic() - begun)
            left -= SLICE
    if not given.target:
        examples = {"CRABLB_FUZZ_EXAMPLES": str(max(60, given.seconds * 3 // 2))}
        pytest = [sys.executable, "-m", "pytest", "-q", "--timeout=0", FOLDER / "test_inputs.py"]
        failed |= subprocess.run(["nice", "-n", "19", *pytest], env=os.environ | examples, check=False).returncode != 0
    if failed:
        print(f"what failed is in {FOUND}: mend it, and add a line to {FOLDER / 'found.txt'}", file=sys.stderr)
        return 1
    if given.keep:
        for target in targets:
            keep(target)
    return 0


if __name__ == "__main__":
    sys.exit(main())
