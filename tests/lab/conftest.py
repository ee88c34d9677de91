"""Labs with unique names, removed whatever happens."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from crablb.lab import Lab
from tests.helpers.namespaces import unique
from tests.helpers.standing import Standing
from tests.helpers.world import World


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """With ``-rP``: what test_never_worse measured, as a table."""
    reports = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    rows = [value for report in reports for name, value in report.user_properties if name == "never worse"]
    if not rows or "P" not in terminalreporter.config.getoption("reportchars"):
        return
    terminalreporter.section("never worse")
    terminalreporter.line(
        "connect, in ms: unprepared, the first and the median; prepared, the first and the others' median"
    )
    for path, family, *ms, retransmitted, redirected in rows:
        figures = "".join(f"{one:9.2f}" for one in ms)
        terminalreporter.line(
            f"{path:36} IPv{family} {figures}  retransmitted {retransmitted}  redirected {redirected}"
        )


@pytest.fixture
def make_lab() -> Iterator[Callable[..., Lab]]:
    """``make_lab(topology="bridge", servers=1, offload=True)``: a lab of its own."""
    with ExitStack() as labs:

        def make(topology: str = "bridge", servers: int = 1, *, offload: bool = True) -> Lab:
            return labs.enter_context(Lab.create(unique(), topology, servers, offload=offload))  # type: ignore[arg-type]

        yield make


@pytest.fixture
def make_world(make_lab: Callable[..., Lab], tmp_path: Path) -> Callable[..., World]:
    def make(topology: str = "bridge", servers: int = 1, *, offload: bool = True) -> World:
        return World(make_lab(topology, servers, offload=offload), tmp_path)

    return make


@pytest.fixture(scope="package")
def all_standing() -> Iterator[Standing]:
    standing = Standing()
    yield standing
    standing.close()


@pytest.fixture
def standing(all_standing: Standing, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Callable[..., World]]:
    """``standing(topology="bridge", servers=1, offload=True, dsr=False)``: a world whose servers serve, and may have
    served other tests: only for tests that end connections they make, and put back what they change in a node."""
    failures = request.session.testsfailed

    def world(topology: str = "bridge", servers: int = 1, *, offload: bool = True, dsr: bool = False) -> World:
        return all_standing.world(tmp_path, topology, servers, offload=offload, dsr=dsr)

    yield world
    all_standing.put_back(failed=request.session.testsfailed > failures)


@pytest.fixture
def other_xdp_program(tmp_path: Path) -> Path:
    """Somebody else's XDP program, compiled: ``ip link set eth0 xdp obj PATH sec xdp``."""
    source, target = tmp_path / "pass.bpf.c", tmp_path / "pass.bpf.o"
    source.write_text('__attribute__((section("xdp"), used)) int pass(void *c) { return 2; }\n')
    subprocess.run(["clang", "-target", "bpf", "-O2", "-c", source, "-o", target], check=True)
    return target
