"""Ways from a hash to a backend: crablb's tables beside AnchorHash, DxHash and JumpBackHash."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt

from bench import hashes
from bench.context import Context, one_cpu
from bench.figures import Curve, Plot, Row, Suite, Table
from bench.hashes import TABLELESS, TABLES, Backends, Library, Maglev, Method

#: Weights by number in the list: all alike, or from one to ten.
WEIGHTS: dict[str, Callable[[int], int]] = {"equal weights": lambda i: 1, "weights of 1 to 10": lambda i: 1 + i % 10}
EQUAL = "equal weights"
DEFAULT_SIZE = 65537
LARGE_SIZE = 655373
WITHOUT = ", no table"
#: Of a cold table as many lookups are timed: all of it leaves the caches before each batch of 64.
COLD = 64 * 64


@dataclass(frozen=True)
class Subject:
    """One method, as it is measured."""

    of: type[Method]
    count: int  # of backends
    weights: str
    size: int = 0  # of its table; 0: without

    @property
    def name(self) -> str:
        where = f", {self.size:,} slots" if self.size else WITHOUT
        return f"{self.count:,} backends, {self.weights}: {self.of.name}{where}"

    @property
    def baseline(self) -> str:
        """Maglev's, with a table of the same size, or of the default one."""
        return Subject(Maglev, self.count, self.weights, self.size or DEFAULT_SIZE).name

    def weight(self, backend: int) -> int:
        return WEIGHTS[self.weights](backend)

    def listed(self, backends: Iterable[int]) -> dict[int, int]:
        return {backend: self.weight(backend) for backend in backends}

    def made(self, library: Library, members: Mapping[int, int] | None = None, seed: int = 0) -> Method:
        """With those members; default: all of its count."""
        members = self.listed(range(self.count)) if members is None else members
        return self.of(library, members, *([self.size, seed] if self.size else []))

    def row(self, samples: list[float]) -> Row:
        return Row(self.name, samples, self.baseline if self.baseline != self.name else "")


def run(context: Context) -> Suite:
    suite = Suite("tables", "Ways from a hash to a backend")
    library = Library.made(context)
    subjects = list(all_of(context))
    with one_cpu() as cpu:
        suite.notes += [
            f"All of it runs on CPU {cpu}. Ratios are to Maglev with a table of the same size, or of {DEFAULT_SIZE:,} "
            "slots.",
            "`maglev` and `rendezvous` are crablb's own. The others are written for this comparison "
            "(`bench/tools/hashes.c`), with room for twice as many backends as there are, or up to four times: a power "
            "of two. `filled`: into each slot of a table that is as large goes whom the method means by the slot's "
            "number, hashed. Weights are as many slots in crablb's tables, as many copies of a backend in AnchorHash "
            "and JumpBackHash, and in DxHash how likely it is that a backend takes a hash that comes to it; if it does "
            "not, the next one is drawn.",
        ]
        suite.tables += timed(context, library, subjects)
        left_out(suite)
    suite.tables += told(context, library, subjects)
    suite.plots.append(plot(suite, max(subject.count for subject in subjects)))
    return suite


def all_of(context: Context) -> Iterable[Subject]:
    counts = context.pick((10, 100, 1000), (10, 1000), (10,))
    sizes = context.pick((DEFAULT_SIZE, LARGE_SIZE), (DEFAULT_SIZE,), (DEFAULT_SIZE,))
    for count in counts:
        for weights in WEIGHTS:
            for size in sizes:
                yield from (Subject(of, count, weights, size) for of in TABLES)
            yield from (Subject(of, count, weights) for of in TABLELESS)


# ---- what takes time ----


def timed(context: Context, library: Library, subjects: list[Subject]) -> list[Table]:
    looked = hashes.hashes(context.pick(1 << 17, 1 << 16, 1 << 12))

    def measure(subject: Subject) -> dict[str, float]:
        method = subject.made(library)
        return {
            "build": method.build_ns / 1000,
            "warm": method.look_ns(looked, cold=False),
            "cold": method.look_ns(looked[:COLD], cold=True),
        }

    found = context.in_turn(
        "tables", {subject.name: partial(measure, subject) for subject in subjects}, context.pick(5, 3, 1)
    )
    titles = {
        "build": ("To make it for a list of backends, us", "us", ""),
        "warm": (
            "A lookup, ns", "ns",
            "In batches of 64 of random hashes, as the hot loop makes them: of a table, the batch's slots are "
            "prefetched before the first is read.",
        ),
        "cold": (
            "A lookup, ns, when what it reads is in no cache", "ns",
            "The same; before each batch everything is flushed. The clock is read once a batch, which is in it.",
        ),
    }  # fmt: skip
    tables = []
    for key, (title, unit, note) in titles.items():
        rows = [
            replace(subject.row(row.samples), disturbed=row.disturbed)
            for subject, row in zip(subjects, found[key].values(), strict=True)
        ]
        tables.append(Table(f"tables-{key}", title, unit, rows, note=note))
    return tables


def left_out(suite: Suite) -> None:
    cold = suite.table("tables-cold")
    if cold and min(cold.rows[0].samples) < 0:
        suite.tables.remove(cold)
        suite.left_out.append("lookups without caches: this machine's cannot be flushed from a program")


# ---- what does not ----


def told(context: Context, library: Library, subjects: list[Subject]) -> list[Table]:
    """Each is worked out once: nothing in it is by chance."""
    tables = [Table(f"tables-{key}", title, unit, note=note) for key, (title, unit, note) in FIGURES.items()]
    for subject in subjects:
        context.say(f"  tables: {subject.name}")
        found = figures(context, library, subject)
        for table, key in zip(tables, FIGURES, strict=True):
            table.rows.append(subject.row(found[key]))
    return tables


FIGURES = {
    "most": (
        "The most that a backend has, by its share", "",
        "Of the slots of a table, by the seed. Without one, of 2^24 hashes: its share but for chance, which is the "
        "more, the fewer hashes a backend has.",
    ),
    "least": ("The least that a backend has, by its share", "", "The same."),
    "last": (
        "What moves when the last of the list leaves the configuration, by what was its own", "",
        "1 is the least there can be.",
    ),
    "any": (
        "What moves when one of any place leaves, by what was its own", "",
        "By a load balancer that knew the list before. JumpBackHash's last backend takes the place of who left.",
    ),
    "anew": (
        "The same, when all is made anew of the list, as by a load balancer that is started after it", "",
        "Places of AnchorHash, DxHash and JumpBackHash are places in the list: all behind who left have another one.",
    ),
    "added": (
        "What moves when one is added, by what becomes its own", "",
        "At the end of the list, where there is room for it.",
    ),
    "order": (
        "What two load balancers do not agree on that have heard of the same changes in another order, %", "%",
        "A tenth of the backends leave, at least two, and then half as many others come; the other one hears of those "
        "that leave in the reverse order.",
    ),
    "started": (
        "What two load balancers do not agree on of which one was started after the changes, %", "%",
        "The same changes; the other one has read the list as it is now.",
    ),
    "memory": (
        "Memory, KiB", "KiB",
        "With what changes need. The slots of a table, or the backends of buckets, are two bytes each.",
    ),
}  # fmt: skip


def figures(context: Context, library: Library, subject: Subject) -> dict[str, list[float]]:
    random = np.random.default_rng(subject.count)
    method = subject.made(library)
    whole = method.whole()
    shares = by_share(context, library, subject)
    some = random.choice(subject.count - 1, min(context.pick(8, 4, 2), subject.count - 1), replace=False).tolist()
    found: dict[str, list[float]] = {
        "most": shares.max(axis=1).tolist(),
        "least": shares.min(axis=1).tolist(),
        "last": [leaves(library, subject, whole, subject.count - 1)],
        "any": [leaves(library, subject, whole, gone) for gone in some],
        "anew": [leaves(library, subject, whole, gone, anew=True) for gone in some],
        "added": [comes(library, subject, whole, subject.count + i) for i in range(len(some))],
        "memory": [method.bytes / 1024],
    }
    gone = random.choice(subject.count, max(subject.count // 10, 2), replace=False).tolist()
    come = [subject.count + i for i in range(len(gone) // 2)]
    one = changed(library, subject, gone, come)
    other = changed(library, subject, gone[::-1], come)
    started = subject.made(library, subject.listed([*(i for i in range(subject.count) if i not in gone), *come]))
    for key, beside in (("order", other), ("started", started)):
        found[key] = [float((one.whole() != beside.whole()).mean() * 100)]
    return found


def by_share(context: Context, library: Library, subject: Subject) -> npt.NDArray[np.float64]:
    """What each has by what it should have, of shape (seeds, backends); without a table of one seed."""
    weights = np.array([subject.weight(backend) for backend in range(subject.count)])
    seeds = range(context.pick(16, 4, 1))
    if subject.size:
        made = [subject.made(library, seed=seed).whole() for seed in seeds]
        counts = np.array([np.bincount(whole, minlength=subject.count) for whole in made])
    else:
        method = subject.made(library)
        made = [method.look(hashes.hashes(hashes.MANY, seed)) for seed in seeds]
        counts = np.bincount(np.concatenate(made), minlength=subject.count)[np.newaxis]
    shares: npt.NDArray[np.float64] = counts / (counts.sum(axis=1, keepdims=True) * weights / weights.sum())
    return shares


def leaves(library: Library, subject: Subject, whole: Backends, gone: int, *, anew: bool = False) -> float:
    if anew:
        method = subject.made(library, subject.listed(i for i in range(subject.count) if i != gone))
    else:
        method = subject.made(library)
        method.remove(gone)
    return float((whole != method.whole()).sum() / (whole == gone).sum())


def comes(library: Library, subject: Subject, whole: Backends, newcomer: int) -> float:
    method = subject.made(library)
    method.add(newcomer, subject.weight(newcomer))
    after = method.whole()
    return float((whole != after).sum() / (after == newcomer).sum())


def changed(library: Library, subject: Subject, gone: list[int], come: list[int]) -> Method:
    method = subject.made(library)
    for backend in gone:
        method.remove(backend)
    for backend in come:
        method.add(backend, subject.weight(backend))
    return method


def plot(suite: Suite, count: int) -> Plot:
    """Of one number of backends, alike, and tables of the default size."""
    subjects = [Subject(of, count, EQUAL, DEFAULT_SIZE) for of in TABLES] + [
        Subject(of, count, EQUAL) for of in TABLELESS
    ]
    curves = []
    for key, what in (
        ("any", "moves when one leaves"),
        ("anew", "the same, made anew of the list"),
        ("most", "the most"),
    ):
        table = suite.table(f"tables-{key}")
        rows = [row for s in subjects if table and (row := table.row(s.name))]
        curves.append(Curve.of(what, rows))
    names = [s.of.name + ("" if s.size else WITHOUT) for s in subjects]
    ticks = [name.replace(", ", ",\n").replace("Hash", "-\nHash") for name in names]
    return Plot(
        "tables", f"{count:,} backends, tables of {DEFAULT_SIZE:,} slots", "", "by what was its own; by its share",
        curves, "bars", ticks, log_y=True,
    )  # fmt: skip
