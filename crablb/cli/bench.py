"""``crablb bench``: what the load balancer costs on this machine, beside what else people use."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from crablb.errors import ConfigError, CrablbError, KernelError

ROOT = Path(__file__).parents[2]


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("bench", help="measure, beside other load balancers, and write a report")
    size = parser.add_mutually_exclusive_group()
    size.add_argument(
        "--quick", dest="size", action="store_const", const="quick", help="every suite, in under two minutes"
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
        help="only this one; repeatable (default: all but health)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where the report goes (default: a new one in bench/results)"
    )
    parser.set_defaults(run=run, size="full")
    more = parser.add_subparsers(title="commands", metavar="compare A B")
    compare = more.add_parser("compare", help="two runs side by side")
    compare.add_argument("a", type=Path, metavar="A", help="a results.json, or its folder")
    compare.add_argument("b", type=Path, metavar="B", help="another")
    compare.set_defaults(run=run_compare)


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
    run(args.size, [name for name in SUITES + BY_NAME if name in (args.suite or SUITES)], args.out)
    return 0


def run_compare(args: argparse.Namespace) -> int:
    find()
    from bench.compare import compare
    from bench.run import load

    print(compare(load(args.a), load(args.b)))
    return 0
