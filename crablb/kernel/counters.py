"""Names of counters, from the C enumerations that number them."""

from __future__ import annotations

from crablb._native import ffi

__all__ = ["counter_names"]


def counter_names(enum: str, prefix: str) -> list[str]:
    """Names of a C enumeration's members that begin with ``prefix``, by value, without it, in lower case."""
    members = sorted(ffi.typeof(f"enum {enum}").elements.items())
    return [
        name.removeprefix(prefix).lower()
        for _, name in members
        if name.startswith(prefix) and name != f"{prefix}COUNTERS"
    ]
