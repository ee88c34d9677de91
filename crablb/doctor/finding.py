"""What the doctor finds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any

__all__ = ["Finding", "Severity", "fault", "few", "note", "ok", "warning"]

#: Findings of one kind in a place that are told one by one.
MOST = 20


class Severity(Enum):
    """From the least to the worst."""

    OK = "ok"
    NOTE = "note"  # good to know
    WARNING = "warning"  # some packets, or some time, are lost by it
    FAULT = "fault"  # it does not work so


@dataclass(frozen=True, slots=True)
class Finding:
    """``id``: of docs/doctor.md; ``where``: what it is about, filled in by who examines; ``remedy``: a command, or what
    else mends it."""

    id: str
    severity: Severity
    what: str
    why: str = ""  # it matters
    remedy: str = ""
    where: str = ""

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "id": self.id,
            "severity": self.severity.value,
            "where": self.where,
            "what": self.what,
            "why": self.why,
            "remedy": self.remedy,
        }


def ok(name: str, what: str) -> Finding:
    return Finding(name, Severity.OK, what)


def note(name: str, what: str, why: str = "", remedy: str = "") -> Finding:
    return Finding(name, Severity.NOTE, what, why, remedy)


def warning(name: str, what: str, why: str, remedy: str) -> Finding:
    return Finding(name, Severity.WARNING, what, why, remedy)


def fault(name: str, what: str, why: str, remedy: str) -> Finding:
    return Finding(name, Severity.FAULT, what, why, remedy)


def few(findings: Iterable[Finding]) -> Iterator[Finding]:
    """Of one kind :data:`MOST`, and how many there are beside: who has 10,000 backends without a route wants to see
    the rest too."""
    seen: Counter[tuple[str, Severity]] = Counter()
    for finding in findings:
        kind = finding.id, finding.severity
        seen[kind] += 1
        if seen[kind] <= MOST:
            yield finding
    for (name, severity), count in seen.items():
        if count > MOST:
            yield Finding(name, severity, f"and {count - MOST:,} more like these")
