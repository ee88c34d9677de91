"""How the suites measure: in turn, several times, and again if the machine was disturbed."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from bench.figures import WIDE, Row, spread
from crablb.lab.programs import remedy

HERE = Path(__file__).parent
BUILD = HERE / "build"
T = TypeVar("T")
Size = Literal["full", "quick", "tiny"]
#: How often a measurement that was disturbed is made again, by size.
AGAIN = {"full": 2, "quick": 1, "tiny": 0}


def _make(target: str) -> None:
    with open(HERE / "Makefile") as makefile:
        fcntl.flock(makefile, fcntl.LOCK_EX)  # nobody starts what another one has not finished
        try:
            subprocess.run(["make", "-s", "-C", str(HERE), target], check=True)
        except FileNotFoundError:
            raise Unavailable(f"make is not installed: {remedy(['make'])}") from None
        except subprocess.CalledProcessError:
            raise Unavailable(f"{target} cannot be compiled; make says why: make -C {HERE} {target}") from None


class Unavailable(Exception):
    """What cannot be measured on this machine, and why; the report says so."""


@dataclass
class Context:
    """A run's size, and what every suite needs.

    ``full``: the report's figures.  ``quick``: all suites in some five minutes.  ``tiny``: everything runs, as fast as
    it can, and no figure means anything: for the tests.
    """

    size: Size = "full"
    say: Callable[[str], None] = lambda text: print(text, file=sys.stderr, flush=True)
    disturbed: list[str] = field(default_factory=list)  # what stayed disturbed when measured again

    def pick(self, full: T, quick: T, tiny: T) -> T:
        """The value for this run's size."""
        return {"full": full, "quick": quick, "tiny": tiny}[self.size]

    def tool(self, name: str) -> str:
        """The path of a program.  Raises :class:`Unavailable` if there is none."""
        path = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
        if path is None:
            raise Unavailable(f"{name} is not installed: {remedy([name])}")
        return path

    def in_turn(
        self,
        what: str,
        subjects: Mapping[str, Callable[[], Mapping[str, float]]],
        rounds: int,
        *,
        steady: bool = True,
        least: Mapping[str, float] | None = None,
    ) -> dict[str, dict[str, Row]]:
        """Measure the subjects in turn, ``rounds`` times.

        A subject is called once a round and returns figures by name.  Returns rows by figure and subject, whose samples
        are those of the same rounds.  If some row's samples are too far apart (another load on the machine), all is
        measured again; of all tries the calmest counts, and rows that are still too wide are marked.  Not ``steady``:
        samples differ by what they are, by other arrivals in each round for example, and nothing is made of it.
        ``least``: by figure, what is as good as nothing: samples that differ by some of that are not too far apart.
        """
        least = least or {}
        best: dict[str, dict[str, Row]] | None = None
        for attempt in range(1 + AGAIN[self.size] * steady):
            found: dict[str, dict[str, Row]] = {}
            for number in range(rounds):
                for name, subject in subjects.items():
                    self.say(f"  {what}: {name}, {number + 1} of {rounds}" + (", again" if attempt else ""))
                    for figure, value in subject().items():
                        found.setdefault(figure, {}).setdefault(name, Row(name, [])).samples.append(value)
            if best is None or widest(found, least) < widest(best, least):
                best = found
            if widest(best, least) <= WIDE:
                break
        assert best is not None
        for figure, rows in best.items() if steady else ():
            for row in rows.values():
                self.mark(f"{what}, {figure}", row, least.get(figure, 0.0))
        return best

    def mark(self, what: str, row: Row, least: float = 0.0) -> Row:
        """Mark a row whose samples are too far apart."""
        row.disturbed = spread(row.samples, least) > WIDE
        if row.disturbed:
            self.disturbed.append(f"{what}: {row.name}")
        return row

    def make(self, program: str) -> Path:
        """A program of ``tools/`` in C, compiled."""
        _make(f"build/{program}")
        return BUILD / program

    def bpf(self, name: str) -> Path:
        """An object of ``tools/NAME.bpf.c``, compiled."""
        _make(f"build/{name}.bpf.o")
        return BUILD / f"{name}.bpf.o"

    def output(self, *command: str | Path, **more: Any) -> str:
        """What a command prints.  Raises :class:`Unavailable`, with what it says, if it fails."""
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, **more)
        if done.returncode:
            raise Unavailable(f"{Path(str(command[0])).name} failed: {(done.stderr or done.stdout).strip()[-500:]}")
        return str(done.stdout)

    def parsed(self, done: subprocess.CompletedProcess[str], what: str) -> Any:
        """The JSON that a program printed, which ran to its end.  Raises :class:`Unavailable` if it failed."""
        if done.returncode:
            raise Unavailable(f"{what} failed: {(done.stderr or done.stdout).strip()[-500:]}")
        return json.loads(done.stdout)

    def json(self, *command: str | Path, **more: Any) -> Any:
        """What a command prints, as JSON."""
        return json.loads(self.output(*command, **more))


@contextmanager
def one_cpu() -> Iterator[int]:
    """This process, and what it starts, on one CPU while in the context: the last of those allowed."""
    allowed = os.sched_getaffinity(0)
    cpu = max(allowed)
    os.sched_setaffinity(0, {cpu})
    try:
        yield cpu
    finally:
        os.sched_setaffinity(0, allowed)


def widest(found: Mapping[str, Mapping[str, Row]], least: Mapping[str, float]) -> float:
    return max(
        (spread(row.samples, least.get(figure, 0.0)) for figure, rows in found.items() for row in rows.values()),
        default=0.0,
    )
