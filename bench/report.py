"""What people read of a run: text, a Markdown report, plots."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench import targets
from bench.figures import Plot, Results, Row, Suite, Table
from bench.placement import APART

#: Of curves and bars; the paper's are the same in grey.
COLOURS = ("#1f5fa8", "#c0504d", "#4f9a4f", "#8060a8", "#d08c2c", "#30a0a0", "#7f7f7f", "#b04080")
REACHED = {True: "reached", False: "not reached", None: "-"}
#: Tables of the overview, and what they are called there.
OVERVIEW = {
    "peers-connections": "new connections, 1/s",
    "peers-setup-p50": "set-up, us",
    "peers-latency-p50": "request, p50, us",
    "peers-latency-p99": "p99, us",
    "peers-requests": "requests, 1/s",
    "peers-goodput": "download, MB/s",
    "peers-packets": "packets by the load balancer for a GiB",
}
#: The same where the load balancer has a CPU of its own, and what it takes of that.
OVERVIEW_APART = {key.replace("peers-", "peers-apart-"): title for key, title in OVERVIEW.items()} | {
    "peers-cost-connection": "the load balancer's CPU for a new connection, us",
    "peers-cost-gib": "for a GiB, ms",
}


def number(value: float) -> str:
    """Four significant digits at most, and no exponent."""
    if value == 0:
        return "0"
    size = abs(value)
    digits = 0 if size >= 1000 else 1 if size >= 100 else 2 if size >= 1 else 3 if size >= 0.1 else 5
    return f"{value:,.{digits}f}"


def cells(table: Table, row: Row) -> list[str]:
    """Name, median, minimum, maximum, ratio to the baseline and how sure it is, remark."""
    ratios = table.ratio(row)
    ratio = f"{statistics.median(ratios):.2f}" if ratios else ""
    between = f"{min(ratios):.2f} - {max(ratios):.2f}" if len(ratios) > 1 else ""
    remark = "; ".join(filter(None, [row.note, "disturbed" if row.disturbed else ""]))
    return [row.name, number(row.median), number(min(row.samples)), number(max(row.samples)), ratio, between, remark]


def heads(table: Table) -> list[str]:
    return ["", table.unit, "min", "max", f"to {table.baseline}" if table.baseline else "ratio", "min - max", ""]


def body(table: Table) -> list[list[str]]:
    """Heads and rows, without the columns that are empty."""
    rows = [heads(table), *(cells(table, row) for row in table.rows)]
    used = [any(row[i] for row in rows[1:]) for i in range(len(rows[0]))]
    return [[cell for cell, is_used in zip(row, used, strict=True) if is_used] for row in rows]


def text(suite: Suite) -> str:
    """A suite's tables, for a terminal."""
    lines = []
    for table in suite.tables:
        rows = body(table)
        rows[0][0] = table.title
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        for row in rows:
            first, *rest = (
                f"{cell:{'<' if i == 0 else '>'}{width}}"
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            lines.append("  ".join([first, *rest]).rstrip())
        lines += [*filter(None, [table.note]), ""]
    lines += suite.notes
    lines += [f"left out: {reason}" for reason in suite.left_out]
    return "\n".join(lines)


def text_targets(results: Results) -> str:
    rows = [(t.name, REACHED[t.reached], t.value) for t in targets.found(results) if t.reached is not None]
    return "\n".join(f"{name:4} {verdict:12} {value}" for name, verdict, value in rows)


def write(results: Results, out: Path) -> None:
    """``results.json``, ``report.md`` and an SVG a plot."""
    (out / "results.json").write_text(json.dumps(results.json(), indent=1) + "\n")
    for suite in results.suites:
        for plot in suite.plots:
            draw(plot, out / f"{plot.key}.svg")
    (out / "report.md").write_text(markdown(results))


def markdown(results: Results) -> str:
    m = results.machine
    lines = [
        "# What crablb costs",
        "",
        f"Made by `crablb bench` ({results.size}); everything is in [results.json](results.json).",
        "",
    ]
    lines += [
        f"{m['cpu']}, {m['cpus']} CPUs{' (virtual)' if m['hypervisor'] else ''}, {m['memory_mib'] / 1024:.0f} GiB, "
        f"Linux {m['kernel']}, Python {m['python']}; crablb {m['packages'].get('crablb', '')} ({m['revision']}).",
        "",
        "Figures are medians, of samples taken in turn with those that they are compared with. Ratios are medians of "
        "the ratios round by round. A row whose middle half of samples spreads over more than a quarter of its median, "
        "also when measured again, is marked `disturbed`.",
        "",
        "## Targets",
        "",
        *grid([["", "what", "limit", "found", "", "why"], *target_rows(results)]),
    ]
    for title, columns in (("At a glance", OVERVIEW), (f"At a glance, {APART}", OVERVIEW_APART)):
        seen = overview(results, columns)
        if seen:
            lines += ["", f"## {title}", "", *seen, "", "In brackets: of direct. What was measured how is said below."]
    for suite in results.suites:
        lines += ["", f"## {suite.title}", ""]
        for note in suite.notes:
            lines += [note, ""]
        for table in suite.tables:
            lines += [f"### {table.title}", "", *grid(body(table)), ""]
            if table.note:
                lines += [table.note, ""]
        for plot in suite.plots:
            lines += [f"### {plot.title}", "", f"![{plot.title}]({plot.key}.svg)", ""]
            if plot.note:
                lines += [plot.note, ""]
        if suite.left_out:
            lines += ["Left out:", "", *(f"- {reason}" for reason in suite.left_out), ""]
        lines.append(f"({suite.seconds:.0f} s)")
    return "\n".join(lines) + "\n"


def overview(results: Results, columns: Mapping[str, str] = OVERVIEW) -> list[str]:
    """Ways to a server by what they cost; empty if that was not measured."""
    tables = {title: table for key, title in columns.items() if (table := results.table(key))}
    if not tables:
        return []
    rows = [["", *tables]]
    for name in [row.name for row in next(iter(tables.values())).rows]:
        cells = [name]
        for table in tables.values():
            row = table.row(name)
            ratios = table.ratio(row) if row else []
            ratio = f" ({statistics.median(ratios):.2f})" if ratios else ""
            cells.append(f"{number(row.median)}{ratio}" if row else "")
        rows.append(cells)
    return grid(rows)


def target_rows(results: Results) -> list[list[str]]:
    return [[t.name, *targets.TARGETS[t.name], t.value, REACHED[t.reached], t.why] for t in targets.found(results)]


def grid(rows: list[list[str]]) -> list[str]:
    """A Markdown table; figures, which are all but the first cell if they look so, to the right."""
    figures = [
        all(cell[:1].isdigit() or not cell for cell in column) for column in list(zip(*rows[1:], strict=True))[1:]
    ]
    rule = [":--", *("--:" if right else ":--" for right in figures)]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in [rows[0], rule, *rows[1:]]]


def draw(plot: Plot, path: Path) -> None:
    """An SVG of a plot: the same bytes for the same plot."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "crablb"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4), layout="constrained")
    width = 0.8 / max(1, len(plot.curves))
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(dict.fromkeys(c.name for c in plot.curves))}
    for i, curve in enumerate(plot.curves):
        paper = curve.source == "paper"
        label = f"{curve.name} (paper)" if paper else curve.name
        colour = colours[curve.name]
        bars = None
        if curve.low:
            bars = [
                [max(0.0, y - low) for y, low in zip(curve.y, curve.low, strict=True)],
                [max(0.0, high - y) for y, high in zip(curve.y, curve.high, strict=True)],
            ]
        if plot.kind == "bars":
            at = [x + (i - (len(plot.curves) - 1) / 2) * width for x in curve.x]
            look: dict[str, Any] = {"alpha": 0.45, "hatch": "//"} if paper else {}
            axes.bar(at, curve.y, width, yerr=bars, capsize=3, color=colour, label=label, **look)
        else:
            look = {"linestyle": "--", "alpha": 0.55, "marker": "x"} if paper else {"marker": "o", "capsize": 3}
            axes.errorbar(curve.x, curve.y, yerr=bars, color=colour, label=label, markersize=4, **look)
    if plot.ticks:
        axes.set_xticks(range(len(plot.ticks)), plot.ticks)
    if plot.log_x:
        axes.set_xscale("log")
    if plot.log_y:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set(xlabel=plot.x_label, ylabel=plot.y_label, title=plot.title)
    axes.grid(axis="y", alpha=0.3)
    if len(plot.curves) > 1:
        axes.legend(fontsize="small")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
