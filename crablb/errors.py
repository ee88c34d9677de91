"""Errors that crablb raises.

The text of each is meant for the person who runs the program: what is wrong, where, and how to mend it.
"""

from __future__ import annotations

from collections.abc import Sequence


class CrablbError(Exception):
    """Base of every error that crablb raises on purpose."""


class ConfigError(CrablbError):
    """A configuration or an argument is wrong.  ``problems`` holds every fault found, one line each."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class KernelError(CrablbError):
    """The kernel refused something."""
