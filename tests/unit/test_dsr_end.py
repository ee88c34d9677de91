"""A server's agent with ``--dsr`` ends whatever lacks by then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from crablb.agent import dsr
from crablb.errors import KernelError


class Sysctl:
    """One that may be read, and not be written, as in a container."""

    def __init__(self, value: str) -> None:
        self._value = value

    def read_text(self) -> str:
        return f"{self._value}\n"

    def write_text(self, value: str) -> None:
        raise OSError(30, "Read-only file system")


STATE: dict[str, Any] = {"addresses": ["10.0.0.100/32"], "sysctls": dict.fromkeys(dsr.SILENT, "1")}


@pytest.fixture(autouse=True)
def poor(monkeypatch: pytest.MonkeyPatch) -> None:
    """No ip, or one that knows of no such address; nothing may be written."""

    def refused(*args: str) -> str:
        raise KernelError(f"{args[0]} is not installed")

    monkeypatch.setattr(dsr, "tool", refused)
    monkeypatch.setattr(dsr, "_sysctl", lambda _: Sysctl("1"))


def test_nothing_to_put_back_is_written(tmp_path: Path):
    dsr.tear_down(STATE, tmp_path)


def test_what_is_to_be_put_back_is(tmp_path: Path):
    with pytest.raises(OSError, match="Read-only"):
        dsr.tear_down(STATE | {"sysctls": dict.fromkeys(dsr.SILENT, "0")}, tmp_path)
