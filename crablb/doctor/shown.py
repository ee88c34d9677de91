"""Findings, for people."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence

from crablb.doctor.finding import Finding, Severity

__all__ = ["lines", "summary", "terminal"]

COLOURS = {Severity.OK: "32", Severity.NOTE: "36", Severity.WARNING: "33", Severity.FAULT: "31"}
INDENT = 11
PLURALS = {Severity.FAULT: "faults", Severity.WARNING: "warnings", Severity.NOTE: "notes"}


def lines(findings: Sequence[Finding], *, colour: bool, width: int) -> Iterator[str]:
    """Grouped by what they are about."""
    for where in dict.fromkeys(finding.where for finding in findings):
        yield _clean(where)
        for finding in findings:
            if finding.where == where:
                yield from _one(finding, colour, width)


def _one(finding: Finding, colour: bool, width: int) -> Iterator[str]:
    word = f"{finding.severity.value:{INDENT - 3}}"
    if colour:
        word = f"\033[{COLOURS[finding.severity]}m{word}\033[0m"
    known = "" if finding.severity is Severity.OK else f" [{finding.id}]"
    first, *more = _wrapped(finding.what + known, width)
    yield f"  {word} {first}"
    for text, sign in ((finding.why, ""), (finding.remedy, "> ")):
        more += _wrapped(text, width, sign)
    for line in more:
        yield " " * INDENT + line


def _wrapped(text: str, width: int, sign: str = "") -> list[str]:
    room = max(width - INDENT, 20)
    return textwrap.wrap(
        _clean(text),
        room,
        initial_indent=sign,
        subsequent_indent=" " * len(sign),
        break_long_words=False,
        break_on_hyphens=False,
    )


def _clean(text: str) -> str:
    """Without what a terminal would obey: interfaces and programs are named by others."""
    return "".join(c if c.isprintable() else "?" for c in text)


def summary(findings: Sequence[Finding]) -> str:
    counts = Counter(finding.severity for finding in findings)
    told = [
        f"{counts[severity]} {word if counts[severity] != 1 else severity.value}"
        for severity, word in PLURALS.items()
        if counts[severity]
    ]
    return ", ".join(told) or "nothing found"


def terminal() -> tuple[bool, int]:
    """Whether standard output is one that shows colours, and how wide it is."""
    tty = sys.stdout.isatty()
    colour = tty and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"
    return colour, shutil.get_terminal_size((80, 24)).columns if tty else 80
