"""What is measured: plain values, which are the JSON file as they are (``schema.json``)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Self

VERSION = 1
#: A row whose middle half of samples is wider than this share of its median was disturbed.
WIDE = 0.25


def spread(samples: list[float], least: float = 0.0) -> float:
    """The width of the middle half of the samples, as a share of their median; 0 for fewer than four.

    ``least``: what is as good as nothing, of which it is a share if the median is smaller.
    """
    middle = max(abs(statistics.median(samples)), least)
    if len(samples) < 4 or not middle:
        return 0.0
    low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
    return (high - low) / middle


@dataclass
class Row:
    """One thing measured several times: samples in the order in which they were taken."""

    name: str
    samples: list[float]
    baseline: str = ""  # the row it is a ratio of, measured in turn with it; default: the table's
    note: str = ""
    disturbed: bool = False  # the samples stayed too far apart when measured again

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def over(self, base: Row) -> float:
        """The median of the ratios round by round to a row that was measured in turn with this one."""
        return statistics.median(a / b for a, b in zip(self.samples, base.samples, strict=True))


@dataclass
class Table:
    """Rows of one unit."""

    key: str  # what programs know it by: "peers-latency-p99"
    title: str
    unit: str
    rows: list[Row] = field(default_factory=list)
    better: Literal["lower", "higher", ""] = "lower"
    baseline: str = ""  # the row that the others are ratios of
    note: str = ""

    def row(self, name: str) -> Row | None:
        return next((row for row in self.rows if row.name == name), None)

    def ratio(self, row: Row) -> list[float]:
        """Sample by sample to the baseline; empty if it has none.  Samples of one number were taken in turn."""
        base = self.row(row.baseline or self.baseline)
        if base is None or base is row or len(base.samples) != len(row.samples) or not all(base.samples):
            return []
        return [a / b for a, b in zip(row.samples, base.samples, strict=True)]


@dataclass
class Curve:
    """Points of a plot, of medians if there are ``low`` and ``high`` (minimum and maximum)."""

    name: str
    x: list[float]
    y: list[float]
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    source: Literal["here", "paper"] = "here"  # the paper's own are drawn beside ours

    @classmethod
    def of(cls, name: str, rows: Sequence[Row], x: Sequence[float] | None = None) -> Self:
        """Of rows, at ``x``; default: at 0, 1, 2..., as bars are."""
        samples = [row.samples for row in rows]
        at = [float(n) for n in (range(len(rows)) if x is None else x)]
        return cls(name, at, [row.median for row in rows], list(map(min, samples)), list(map(max, samples)))


@dataclass
class Plot:
    """A picture.  ``bars``: ``x`` are positions named by ``ticks``."""

    key: str
    title: str
    x_label: str
    y_label: str
    curves: list[Curve] = field(default_factory=list)
    kind: Literal["lines", "bars"] = "lines"
    ticks: list[str] = field(default_factory=list)
    log_x: bool = False
    log_y: bool = False
    note: str = ""  # what differs from the paper's, for example


@dataclass
class Target:
    """A figure that crablb is to reach; all of them are in ``targets``."""

    name: str  # "P1"
    value: str  # what was found, with its unit
    reached: bool | None  # None: not measured in this run
    why: str = ""  # if not: by how much and why


@dataclass
class Suite:
    """What one suite found."""

    name: str
    title: str
    tables: list[Table] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)  # what could not be measured here, and why
    seconds: float = 0.0

    def table(self, key: str) -> Table | None:
        return next((table for table in self.tables if table.key == key), None)


@dataclass
class Results:
    """A whole run: the JSON file."""

    size: str
    machine: dict[str, Any]
    suites: list[Suite] = field(default_factory=list)
    version: int = VERSION

    def suite(self, name: str) -> Suite | None:
        return next((suite for suite in self.suites if suite.name == name), None)

    def table(self, key: str) -> Table | None:
        return next((t for suite in self.suites for t in suite.tables if t.key == key), None)

    def json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of(cls, data: dict[str, Any]) -> Results:
        """The reverse of :meth:`json`, for data that the schema holds to be right."""
        suites = []
        for raw in data["suites"]:
            tables = [Table(**{**t, "rows": [Row(**r) for r in t["rows"]]}) for t in raw["tables"]]
            plots = [Plot(**{**p, "curves": [Curve(**c) for c in p["curves"]]}) for p in raw["plots"]]
            targets = [Target(**t) for t in raw["targets"]]
            suites.append(Suite(**{**raw, "tables": tables, "plots": plots, "targets": targets}))
        return cls(data["size"], data["machine"], suites, data["version"])
