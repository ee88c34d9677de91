"""``make deaths``: load balancer, agents and path manager killed at random instants, or at each call that somebody
notices, under live connections."""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from itertools import count, islice
from pathlib import Path

from tests.deaths.farm import KINDS, Farm
from tests.deaths.rounds import ACTS, BARE, UNKEPT, Tally, acts, first, play
from tests.helpers.processes import end_by_signals


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make deaths", description=__doc__)
    parser.add_argument("--rounds", type=int, default=200, help="deaths (%(default)s)")
    parser.add_argument("--connections", type=int, default=500, help="that are open all the time (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of what dies when (%(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first round (%(default)s)")
    parser.add_argument("--each", type=int, default=25, help="rounds of one lab; the next has other offloads")
    parser.add_argument("--unkept", type=int, default=10, help="deaths more, of one that keeps nothing (%(default)s)")
    parser.add_argument("--only", help="rounds of this kind alone, as 'lb reloading'")
    parser.add_argument("--calls", action="store_true", help="no rounds: at each call, one after the other")
    parser.add_argument("--every", type=int, default=1, help="with --calls: at each such call (%(default)s)")
    parser.add_argument("--keep", type=Path, help="folder for logs")
    args = parser.parse_args()
    if args.each < 1 or args.every < 1 or args.connections < len(KINDS):
        parser.error(f"--each and --every are at least 1, --connections {len(KINDS)}")
    names = {f"{role} {act.name}" for role, several in ACTS.items() for act in several}
    if args.only == f"lb {UNKEPT.name}":
        args.rounds = 0
    elif args.only not in {None, *names, *(f"{role} first" for role in BARE)}:
        parser.error(f"--only is one of: {', '.join(sorted(names))}")
    return args


def rounds(folder: Path, args: argparse.Namespace, tally: Tally) -> None:
    meant = (one for one in acts(args.seed) if args.only in (None, f"{one[1]} {one[2].name}"))
    chosen = islice((one for one in meant if one[0] >= args.first), args.rounds)
    offload = args.first // args.each % 2 == 0
    while some := list(islice(chosen, args.each)):
        where = folder / f"{some[0][0]}"
        try:
            with Farm.made(where, offload=offload, seed=args.seed, connections=args.connections) as farm:
                print(f"==> offloads {'on' if offload else 'off'}: {farm.opened['held']}", flush=True)
                for number, role, act, at in some:
                    since = time.monotonic()
                    faults = play(farm, tally, role, act, at)
                    said = f"{number}: {role} {act.name} at {at}, {tally.last}: {time.monotonic() - since:.1f} s"
                    print(said, *faults, sep="\n    ", flush=True)
                tally.end(farm)
        except AssertionError as error:  # the rest of this lab's rounds is not played
            tally.faults.append(f"{error}")
            print(f"fault: {error}", flush=True)
        print(tally.told(), flush=True)
        offload = not offload


def unkept(folder: Path, args: argparse.Namespace, tally: Tally) -> None:
    """Those that come to their end, or are killed at a call of it, and leave nothing to the next one."""
    role, act, choose = "lb", UNKEPT, random.Random(f"{args.seed}:unkept")
    if not args.unkept or args.only not in (None, f"{role} {act.name}"):
        return
    try:
        with Farm.made(folder / "unkept", offload=True, seed=args.seed, connections=args.connections, keep=0) as farm:
            for number in range(args.unkept):
                at = choose.randint(1, act.steps)
                faults = play(farm, tally, role, act, at)
                print(f"{number}: {role} {act.name} at {at}, {tally.last}", *faults, sep="\n    ", flush=True)
            tally.end(farm)
    except AssertionError as error:
        tally.faults.append(f"{error}")
        print(f"fault: {error}", flush=True)


def calls(folder: Path, args: argparse.Namespace, tally: Tally) -> None:
    """Each act is ended at its first call, at its second, and so on, until it comes to its own end."""
    chosen = [
        (role, act)
        for role, several in ACTS.items()
        for act in several
        if act.name != "serving" and args.only in (None, f"{role} {act.name}")
    ]
    if chosen:
        with Farm.made(folder / "live", offload=True, seed=args.seed, connections=args.connections) as farm:
            for role, act in chosen:
                for at in count(args.first + 1, args.every):
                    faults = play(farm, tally, role, act, at)
                    print(f"{role} {act.name} at {at}, {tally.last}", *faults, sep="\n    ", flush=True)
                    if not tally.last:
                        break
            tally.end(farm)
    firsts = [role for role in BARE if args.only in (None, f"{role} first")]
    if firsts:
        with Farm.made(folder / "first", offload=True, connections=0) as farm:
            for role in firsts:
                for at in count(args.first + 1, args.every):
                    faults = first(farm, tally, role, at)
                    print(f"{role} first at {at}, {tally.last}", *faults, sep="\n    ", flush=True)
                    if not tally.last:
                        break


def main() -> int:
    args, tally = arguments(), Tally()
    end_by_signals()
    with tempfile.TemporaryDirectory(prefix="crablb-deaths-") as made:
        folder = args.keep or Path(made)
        try:
            if args.calls:
                calls(folder, args, tally)
            else:
                rounds(folder, args, tally)
                unkept(folder, args, tally)
        except KeyboardInterrupt:
            tally.faults.append("it was told to end before its end")
    print(tally.told())
    return bool(tally.faults)


if __name__ == "__main__":
    sys.exit(main())
