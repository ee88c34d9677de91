"""``make soak``: a load balancer in use for an hour, to which everything is done again and again: what grows?"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
from pathlib import Path
from statistics import median
from typing import Any

from crablb.lab import Lab
from tests.helpers.namespaces import unique
from tests.helpers.processes import end_by_signals
from tests.soak.farm import Farm
from tests.soak.judge import LOOKS, growth, leaks

#: What is done in each half: first no process takes another's place, so that what one loses is seen; then they do, and
#: what is lost between them is seen.
ALIVE = ("reloads", "changes", "looks", "watches", "fails", "flaps")
REPLACED = (*ALIVE, "takeovers", "agents")
HALVES = {"alive": ALIVE, "replaced": REPLACED}

Series = dict[str, list[float]]


def half(farm: Farm, work: tuple[str, ...], seconds: float, say: bool, series: Series) -> None:
    """Rounds for so long, and how much there was of each thing after each."""
    end, rounds, told = time.monotonic() + seconds, 0, len(farm.broken())
    while time.monotonic() < end or rounds < LOOKS:
        begun = time.monotonic()
        farm.round(work)
        rounds += 1
        for name, value in farm.counted().items():
            series.setdefault(name, [0.0] * (rounds - 1)).append(value)
        for looks in series.values():
            looks.extend([0.0] * (rounds - len(looks)))
        if say:
            memory = series["load balancer, Rss KiB"][-1] / 1024
            broken = farm.broken()
            print(
                f"{time.monotonic() - begun:6.1f} s  round {rounds}: {memory:.1f} MiB, {len(broken)} broken", flush=True
            )
            for one in broken[told:]:
                print(f"        broken: {one}", flush=True)
            told = len(broken)


def soaked(
    farm: Farm,
    seconds: float,
    found: dict[str, Series],
    *,
    say: bool = False,
    halves: dict[str, tuple[str, ...]] = HALVES,
) -> None:
    """By half, and the name of what is counted: how much there was after each round."""
    for name, work in halves.items():
        half(farm, work, seconds / len(halves), say, found.setdefault(name, {}))


def faults(found: dict[str, Series]) -> list[str]:
    """What has grown."""
    return [
        f"{name}: {what} has grown by {more:.1f}: {' '.join(f'{value:g}' for value in series[what])}"
        for name, series in found.items()
        for what, more in leaks(series).items()
    ]


def report(found: dict[str, Series]) -> None:
    for name, series in found.items():
        if len(next(iter(series.values()), ())) < LOOKS:
            continue
        print(f"==> {name}: {len(next(iter(series.values())))} rounds; second quarter, last quarter, growth; most")
        for what, looks in sorted(series.items()):
            quarter = len(looks) // 4
            early, late = median(looks[quarter : 2 * quarter]), median(looks[-quarter:])
            if any(looks):
                print(f"    {what:60} {early:10.1f} {late:10.1f} {growth(looks):+10.1f} {max(looks):10.1f}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60, help="how long (%(default)g)")
    parser.add_argument("--seed", type=int, default=1, help="of the order of what is done (%(default)s)")
    parser.add_argument(
        "--leak", default="none", help="lose one with each change (tests/soak/watched.py): is it found?"
    )
    parser.add_argument("--keep", type=Path, help="write all that was counted into this file, as JSON")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    end_by_signals()
    found: dict[str, Series] = {}
    told: dict[str, Any] = {}
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder, Lab.create(unique(), servers=3) as lab:
        farm = Farm(lab, Path(folder), args.seed, leak=args.leak, longest=min(30, args.minutes * 10))
        try:
            soaked(farm, args.minutes * 60, found, say=True)
            wrong += faults(found)
        except (Exception, KeyboardInterrupt):
            wrong.append(traceback.format_exc())
        told = farm.connections()
        wrong += [f"broken: {one}" for one in farm.broken()]
        if args.keep:
            args.keep.write_text(json.dumps({"counted": found, "connections": told, "done": farm.done}))
            args.keep.with_suffix(".log").write_text(farm.log.read_text())
        farm.close()
    report(found)
    for way, one in told.items():
        print(
            f"==> {way}: {one['made']} connections ({one['multipath']} by MPTCP), {one['requests']} requests,"
            f" {len(one['failed'])} failed; at most {one['longest_connect']:.2f} s to connect,"
            f" {one['longest_request']:.2f} s a request"
        )
    print("==> " + ", ".join(f"{count} {name}" for name, count in farm.done.items()))
    print(*(f"==> {one}" for one in wrong), sep="\n")
    print(f"==> {len(wrong)} faults")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
