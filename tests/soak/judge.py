"""What grows.  A number is looked at again and again, each time when all is as it was at the beginning; it may rise at
first (what is made at the first use, tables that fill), and go up and down, but not rise on and on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median

__all__ = ["growth", "leaks", "least"]

#: How much one may have grown in the end, beyond the first quarter: things that are counted, and, by how their names
#: end, what goes up and down by itself: what is in use of malloc()'s and Python's memory, and what a process has, of
#: which allocators keep some back, in pieces of up to a MiB, however many.  One that is lost a look is many times as
#: much.
COUNTED = 1.5
LOOSE = {"malloc KiB": 512, "KiB": 2048, "Python objects": 1000, "Python blocks": 3000, "mappings": 8}
#: Looks at least, that the quarters of a run are something.
LOOKS = 8


def growth(looks: Sequence[float]) -> float:
    """By how much it has grown since its first quarter, the warm-up: the less of what two ways of looking say, each of
    which is misled by something else.  The median of all slopes is not moved by what comes and goes, nor by a step that
    is taken once; the medians of the second and the last quarter are not moved by ups and downs."""
    quarter = len(looks) // 4
    body = looks[quarter:]
    slope = median((b - a) / (j - i) for i, a in enumerate(body) for j, b in enumerate(body) if i < j)
    # From the middle of the second quarter to that of the last it is two thirds of the body.
    step = (median(looks[-quarter:]) - median(looks[quarter : 2 * quarter])) * 3 / 2
    return min(slope * (len(body) - 1), step)


def leaks(series: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Those that have grown too much, by name, and by how much."""
    found = {}
    for name, looks in series.items():
        if len(looks) < LOOKS:
            raise ValueError(f"{len(looks)} looks tell nothing; {LOOKS} are needed")
        allowed = next((most for end, most in LOOSE.items() if name.endswith(end)), COUNTED)
        if (more := growth(looks)) > allowed:
            found[name] = more
    return found


def least(looks: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The least of several looks in a row, each number by itself: what is under way is gone in one of them, what has
    been lost is in all."""
    names = {name for look in looks for name in look}
    return {name: min(look.get(name, 0) for look in looks) for name in sorted(names)}
