"""``make deaths``: load balancer, agents and path manager killed at random instants, under live connections."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

from tests.deaths.farm import KINDS, Farm
from tests.deaths.rounds import Tally, acts, play


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make deaths", description=__doc__)
    parser.add_argument("--rounds", type=int, default=200, help="deaths (%(default)s)")
    parser.add_argument("--connections", type=int, default=500, help="that are open all the time (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of what dies when (%(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first round (%(default)s)")
    parser.add_argument("--each", type=int, default=25, help="rounds of one lab; the next has other offloads (%(default)s)")
    parser.add_argument("--only", help="rounds of this kind alone, as 'lb reloading'")
    parser.add_argument("--keep", type=Path, help="folder for logs")
    args = parser.parse_args()
    if args.rounds < 1 or args.each < 1 or args.connections < len(KINDS):
        parser.error(f"--rounds and --each are at least 1, --connections {len(KINDS)}")
    return args


def run(folder: Path, args: argparse.Namespace, tally: Tally) -> None:
    meant = (one for one in acts(args.seed) if args.only in (None, f"{one[1]} {one[2].name}"))
    rounds = islice((one for one in meant if one[0] >= args.first), args.rounds)
    offload = args.first // args.each % 2 == 0
    while some := list(islice(rounds, args.each)):
        where = folder / f"{some[0][0]}"
        with Farm.made(where, offload=offload, seed=args.seed, connections=args.connections) as farm:
            print(f"==> offloads {'on' if offload else 'off'}: {farm.opened['held']}", flush=True)
            begun = farm.packets()
            for number, role, act, at in some:
                since = time.monotonic()
                faults = play(farm, tally, role, act, at)
                took = time.monotonic() - since
                last = farm.nursery.last() or "not at a call"
                print(f"{number}: {role} {act.name} at {at}, {last}: {took:.1f} s", *faults, sep="\n    ", flush=True)
            state = farm.tell("finish")
            for line in state["broken"]:
                tally.lost[line.split()[0]] += 1
                tally.faults.append(f"at the end: {line}")
            tally.add(state, farm.packets() - begun)
            farm.stop()
            tally.faults += [f"left behind: {line}" for line in farm.left()]
        offload = not offload


def main() -> int:
    args, tally = arguments(), Tally()
    with tempfile.TemporaryDirectory(prefix="crablb-deaths-") as made:
        run(args.keep or Path(made), args, tally)
    print(tally.told())
    return bool(tally.faults)


if __name__ == "__main__":
    sys.exit(main())
