"""Which version this is: what setup.py wrote.

Nothing has to be searched for, which takes ``importlib.metadata`` longer than all else that ``crablb --version`` does;
and what runs goes on saying what it is when another version is installed beneath it.
"""

from __future__ import annotations

from contextlib import suppress

__all__ = ["VERSION"]

#: PEP 440; "unknown" in a source tree that was never built.
VERSION = "unknown"
with suppress(ModuleNotFoundError):
    from crablb._version import VERSION
