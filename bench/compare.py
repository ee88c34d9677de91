"""Two runs side by side."""

from __future__ import annotations

from bench.figures import Results, Row


def compare(a: Results, b: Results) -> str:
    """A table of what both measured: medians, and B as a ratio of A.

    A difference counts if the two rows' samples do not overlap at all: noise rarely does that.
    """
    lines = []
    for what in ("kernel", "cpu", "cpus", "revision"):
        if a.machine.get(what) != b.machine.get(what):
            lines.append(f"{what} differs: {a.machine.get(what)} | {b.machine.get(what)}")
    if a.size != b.size:
        lines.append(f"the runs were not of one size: {a.size} | {b.size}")
    for suite in a.suites:
        for table in suite.tables:
            other = b.table(table.key)
            pairs = [(row, match) for row in table.rows if other and (match := other.row(row.name))]
            if not pairs:
                continue
            lines += ["", f"{table.title}, {table.unit}"]
            width = max(len(row.name) for row, _ in pairs)
            for row, match in pairs:
                ratio = f"{match.median / row.median:7.3f}" if row.median else "      -"
                verdict = judge(row, match, table.better)
                lines.append(
                    f"  {row.name:{width}} {row.median:12,.4g} {match.median:12,.4g} {ratio}  {verdict}".rstrip()
                )
    if not any(line.startswith("  ") for line in lines):
        lines.append("the runs have nothing in common")
    return "\n".join(lines).lstrip("\n")


def judge(a: Row, b: Row, better: str) -> str:
    if min(len(a.samples), len(b.samples)) < 3:
        return ""
    lower, higher = max(b.samples) < min(a.samples), min(b.samples) > max(a.samples)
    if not (lower or higher):
        return "same"
    if not better:
        return "lower" if lower else "higher"
    return "better" if lower == (better == "lower") else "worse"
