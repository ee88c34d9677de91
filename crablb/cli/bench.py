"""``crablb bench``: what the load balancer costs on this machine, beside what else people use."""

from __future__ import annotations

import argparse
import os
import sys
from importlib.util import find_spec
from pathlib import Path

from crablb.cli import streams
from crablb.errors import ConfigError, CrablbError, KernelError
from crablb.lab.lab import PROGRAMS
from crablb.lab.programs import missing, remedy

ROOT = Path(__file__).parents[2]
#: What it measures beside crablb, and with.
USED = (*PROGRAMS, "make", "nginx", "curl", "nft", "haproxy", "wrk", "mptcpize", "tcpdump", "valgrind")


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("bench", help="measure, beside other load balancers, and write a report")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--quick", dest="size", action="store_const", const="quick", help="every suite, in some five minutes"
    )
    size.add_argument(
        "--tiny",
        dest="size",
        action="store_const",
        const="tiny",
        help="only to see that all of it runs: figures mean nothing",
    )
    parser.add_argument(
        "--suite",
        action="append",
        default=[],
        metavar="NAME",
        help="only this one; repeatable (default: all but health, faults, scale, takeover and tables)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where the report goes (default: a new one in bench/results)"
    )
    parser.set_defaults(run=run, size="full")
    more = parser.add_subparsers(title="commands", metavar="compare A B, sizing A")
    compare = more.add_parser("compare", help="two runs side by side")
    compare.add_argument("a", type=Path, metavar="A", help="a results.json, or its folder")
    compare.add_argument("b", type=Path, metavar="B", help="another")
    compare.set_defaults(run=run_compare)
    sizing = more.add_parser("sizing", help="how much a load balancer does with a core, by a run's results")
    sizing.add_argument("a", type=Path, metavar="A", help="a results.json, or its folder")
    sizing.set_defaults(run=run_sizing)


def find() -> None:
    """Make the package ``bench`` importable: it belongs to the source tree and is not installed."""
    if not (ROOT / "bench" / "run.py").is_file():
        raise CrablbError(f"the benchmarks are not in {ROOT}: run `make bench` in crablb's source tree")
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))


def run(args: argparse.Namespace) -> int:
    find()
    from bench.run import BY_NAME, SUITES, run

    unknown = [name for name in args.suite if name not in SUITES + BY_NAME]
    if unknown:
        raise ConfigError(f"--suite {unknown[0]}: there is no such suite; name one of {', '.join(SUITES + BY_NAME)}")
    if os.geteuid() != 0:
        raise KernelError("crablb bench makes network namespaces; run it as root")
    if not find_spec("matplotlib"):
        raise CrablbError("the report's plots are drawn by matplotlib, which is not installed: make bench brings it")
    if lacking := missing(USED):
        what = f"not installed: {', '.join(lacking)}; what needs them is left out. They are brought by"
        streams.complain(f"{what}: {remedy(lacking)}")
    run(args.size, [name for name in SUITES + BY_NAME if name in (args.suite or SUITES)], args.out)
    return 0


def run_compare(args: argparse.Namespace) -> int:
    find()
    from bench.compare import compare
    from bench.run import load

    print(compare(load(args.a), load(args.b)))
    return 0


def run_sizing(args: argparse.Namespace) -> int:
    find()
    from bench.run import load
    from bench.sizing import sizing

    print(sizing(load(args.a)))
    return 0
