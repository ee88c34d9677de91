"""What is imported when: a part of the package does not load the rest."""

from __future__ import annotations

import subprocess
import sys

import pytest

import crablb


def loaded(statement: str, *names: str) -> set[str]:
    """Which of these modules a fresh interpreter has loaded after a statement."""
    code = f"import sys; {statement}; print(*(n for n in {names!r} if n in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


ALL = ("uvloop", "asyncio", "crablb.dataplane.engine", "crablb.selection.loads", "crablb.lab", "crablb.agent")


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("import crablb", set()),
        ("import crablb.model", set()),
        ("import crablb.kernel.xsk", set()),
        ("from crablb import Vip", set()),
        ("import crablb; crablb.LoadBalancer", {"asyncio", "crablb.dataplane.engine", "crablb.selection.loads"}),
        ("import crablb.cli.serve", {"uvloop", "asyncio", "crablb.dataplane.engine", "crablb.selection.loads"}),
    ],
)
def test_only_what_is_needed(statement, expected):
    assert loaded(statement, *ALL) == expected


def test_a_command_imports_only_its_own():
    others = {"crablb.cli.serve", "crablb.lab", "crablb.dataplane.engine", "crablb.agent"}
    assert loaded("from crablb.cli import main; main(['key', 'new'])", "crablb.cli.key", *others) & others == set()


def test_a_daemon_imports_what_it_needs_after_the_first_packet_later():
    """And what is for people, which structlog would import, never: it starts as crablb.cli.main does."""
    later = ("starlette", "uvicorn", "h11", "prometheus_client", "tomlkit", "crablb.control.admin.app", "rich")
    assert loaded("import crablb.cli.serve", *later) <= {"rich"}
    code = (
        "import sys; sys.argv = ['crablb', 'serve', '--config', '/nonexistent']; from crablb.cli import main;"
        " assert main() == 2; from rich import print"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "ModuleNotFoundError: import of rich halted" in done.stderr


def test_names_resolve():
    assert set(crablb.__all__) <= set(dir(crablb))
    for name in crablb.__all__:
        assert getattr(crablb, name).__name__ == name
    from crablb.model import Vip

    assert crablb.Vip is Vip


def test_names_that_are_none():
    with pytest.raises(AttributeError, match="module 'crablb' has no attribute 'Nothing'"):
        crablb.Nothing  # noqa: B018
