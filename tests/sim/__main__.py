"""``make sim``: seeds, until so many connections were made; or one, with everything that happened."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

from tests.sim.scenario import ROOT, Played, Scenario, build, of, play, shrink

#: Seeds that were run, for the record, and per commit: those that test_sim.py runs.
RECORD = Path(__file__).with_name("seeds.json")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make sim", description=__doc__)
    parser.add_argument("--seed", type=int, help="one seed alone: prints its events")
    parser.add_argument("--trace", type=int, default=0, help="with --seed: and the packets of this connection")
    parser.add_argument("--first", type=int, help="first seed (default: the first that was not run yet, by seeds.json)")
    parser.add_argument("--connections", type=int, default=1_000_000, help="clients' connections in all (%(default)s)")
    parser.add_argument("--each", type=int, default=5000, help="of these, of one seed (%(default)s)")
    parser.add_argument("--sanitize", action="store_true", help="with ASan and UBSan")
    parser.add_argument(
        "--record", action="store_true", help="count them in seeds.json, if they follow those that are there"
    )
    args = parser.parse_args()
    if args.connections < 1 or args.each < 1 or args.trace < 0:
        parser.error("--connections and --each are at least 1, --trace at least 0")
    return args


def one(world: Path, scenario: Scenario, trace: int) -> int:
    print(scenario.text(), end="")
    played = play(world, scenario, log=1, **({"trace": trace} if trace else {}))
    print(*played.log, *played.violations, sep="\n")
    print(json.dumps(played.counts))
    return bool(played.found)


def report(world: Path, scenario: Scenario, played: Played) -> None:
    print(f"==> seed {scenario.seed} breaks:", *played.found.values(), sep="\n    ")
    wanted = set(played.found)
    less = shrink(scenario, lambda s: bool(wanted & set(play(world, s).found)))
    print("as a test:\n\n" + less.test(play(world, less).found))


def many(world: Path, args: argparse.Namespace) -> int:
    record = json.loads(RECORD.read_text())
    first = record["seeds"] if args.first is None else args.first
    count = max(1, args.connections // args.each)
    began, broken, sums = time.monotonic(), 0, Counter[str]()
    scenarios = [of(seed, args.each) for seed in range(first, first + count)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        waiting = iter(scenarios)
        for some in iter(lambda: list(islice(waiting, 64)), []):
            for scenario, played in zip(some, pool.map(lambda s: play(world, s), some), strict=True):
                sums.update(played.counts)
                if played.found:
                    broken += 1
                    report(world, scenario, played)
    seconds = time.monotonic() - began
    print(
        f"==> seeds {first} to {first + count - 1}: {broken} broken; {sums['connections']} connections, "
        f"{sums['packets']} packets, {sums['hostile']} strangers' packets, in {seconds:.1f} s"
    )
    print("==> " + ", ".join(f"{name} {value}" for name, value in sums.items()))
    if args.record and not broken and first == record["seeds"]:  # each seed once
        for name in ("connections", "packets"):
            record[name] += sums[name]
        record["seeds"] = max(record["seeds"], first + count)
        RECORD.write_text(json.dumps(record, indent=2) + "\n")
    print(
        f"==> per commit: {record['per_commit']} seeds; in all, by tests/sim/seeds.json: {record['seeds']} seeds, "
        f"{record['connections']} connections, {record['packets']} packets"
    )
    return bool(broken)


def main() -> int:
    args = arguments()
    world = build(ROOT / "build" / ("sim-sanitized" if args.sanitize else "sim"), sanitize=args.sanitize)
    if args.seed is not None:
        return one(world, of(args.seed, args.each), args.trace)
    return many(world, args)


if __name__ == "__main__":
    sys.exit(main())
