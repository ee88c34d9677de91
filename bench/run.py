"""A run: the suites in turn, and what they found, as text, JSON and a report."""

from __future__ import annotations

import importlib
import json
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from bench import machine, report
from bench.context import HERE, Context, Size, Unavailable
from bench.figures import VERSION, Results, Suite
from crablb.errors import ConfigError
from crablb.values import read_text

#: Modules with ``run(context) -> Suite``, in the order in which they run.
SUITES = ("micro", "xsk", "peers", "mptcp", "policies", "paper")
#: Those that a run has when it is asked for them by name.
BY_NAME = ("health", "faults", "scale", "takeover", "tables")


def run(size: Size, suites: list[str], out: Path | None) -> Results:
    """Run suites, print what they find, and write ``results.json``, ``report.md`` and plots into ``out``.

    ``out`` None: a new folder in ``bench/results``.  Files are written after each suite: an interrupted run leaves
    what it had.
    """
    out = out or HERE / "results" / datetime.now().strftime("%Y-%m-%d-%H%M%S")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):  # before what takes minutes
            pass
    except (OSError, ValueError) as error:  # the second: a NUL in the name
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"--out {str(out)!r}: {why}; name a folder that can be written") from None
    context = Context(size)
    results = Results(size, machine.describe())
    for name in suites:
        context.say(f"==> {name}")
        start = time.monotonic()
        module = importlib.import_module(f"bench.{name}")
        try:
            suite = module.run(context)
        except Unavailable as reason:
            suite = Suite(name, (module.__doc__ or name).splitlines()[0].rstrip("."), left_out=[f"all of it: {reason}"])
        suite.seconds = round(time.monotonic() - start, 1)
        results.suites.append(suite)
        print(report.text(suite), flush=True)
        report.write(results, out)
    print(report.text_targets(results))
    context.say(f"==> {out}/report.md, results.json and plots")
    return results


def load(path: Path) -> Results:
    """Results that a run wrote.  Raises ConfigError if the file holds something else."""
    path = path / "results.json" if path.is_dir() else path
    try:
        data: Any = json.loads(read_text(path))
    except ConfigError as error:
        raise ConfigError(f"{error}; name a results.json, or the folder that holds it") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    version = data.get("version") if isinstance(data, dict) else None
    if version != VERSION:
        raise ConfigError(f"{path} is not of this version of the benchmarks (its version: {version}, ours: {VERSION})")
    try:
        return Results.of(data)
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{path} is not what a run writes: {error}") from error
