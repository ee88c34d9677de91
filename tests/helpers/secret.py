"""Files that hold keys."""

from __future__ import annotations

from pathlib import Path


def secret(path: Path, text: str) -> Path:
    """Write it so that nobody else may read it."""
    path.touch(0o600)
    path.write_text(text)
    return path
