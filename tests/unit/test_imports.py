"""What is imported when: a part of the package does not load the rest."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest

import crablb
from tests.helpers.processes import ROOT


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


@pytest.mark.parametrize("statement", ["import crablb.cli.serve", "import crablb; crablb.LoadBalancer"])
def test_what_waits_until_packets_are_served(statement):
    """What the API, metrics and the status page are made with."""
    assert loaded(statement, "prometheus_client", "starlette", "uvicorn", "http.server") == set()


def test_an_agent_without_metrics_does_not_import_them():
    assert loaded("import crablb.cli.agent", "prometheus_client", "http.server") == set()


def test_a_command_imports_only_its_own():
    others = {"crablb.cli.serve", "crablb.lab", "crablb.dataplane.engine", "crablb.agent"}
    assert loaded("from crablb.cli import main; main(['key', 'new'])", "crablb.cli.key", *others) & others == set()


def test_what_the_version_takes():
    """Next to nothing of the package, and of Python's what argparse needs: every module more is time."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from crablb.cli import main\n"
        "try: main(['--version'])\n"
        "except SystemExit: print(*sys.modules)"
    )
    command = [sys.executable, "-I", "-S", "-c", code]  # -S: without what is installed, which looks for editable ones
    version, names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert version == f"crablb {crablb.__version__}"
    modules = set(names.split())
    own = {"crablb", "crablb._version", "crablb.cli", "crablb.cli.streams", "crablb.errors", "crablb.version"}
    assert {name for name in modules if name.startswith("crablb")} == own
    assert len(modules) < 100


UNNEEDED = ("rich", "starlette", "uvicorn", "prometheus_client", "importlib.metadata", "crablb.lab")


@pytest.mark.parametrize("command", ["serve", "agent"])
def test_what_lasts_does_not_carry_what_is_merely_installed(command):
    """Of a daemon, before it serves; rich is there for those who want it afterwards, as a policy may."""
    for name in ("rich", "starlette", "uvicorn", "prometheus_client"):
        assert find_spec(name), f"{name} is not installed, so this proves nothing"
    main = f"import crablb.cli; crablb.cli.make_parser(['{command}']); from crablb import log; log.set_up()"
    assert loaded(main, "structlog", *UNNEEDED) == {"structlog"}
    assert loaded(f"{main}; import rich.console", "rich") == {"rich"}


def test_what_the_api_is_made_with_comes_after_the_first_packet():
    later = ("starlette", "uvicorn", "h11", "prometheus_client", "tomlkit", "crablb.control.admin.app", "rich")
    assert loaded("import crablb.cli.serve", *later) <= {"rich"}  # which structlog brings, if nobody keeps it out


def test_names_resolve():
    assert set(crablb.__all__) <= set(dir(crablb))
    for name in crablb.__all__:
        assert getattr(crablb, name).__name__ == name
    from crablb.model import Vip

    assert crablb.Vip is Vip


def test_names_that_are_none():
    with pytest.raises(AttributeError, match="module 'crablb' has no attribute 'Nothing'"):
        crablb.Nothing  # noqa: B018
