"""What README.md and docs/ show: files are checked, programs typed and run, commands and their flags known."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from crablb.cli import make_parser, parsers
from crablb.config import load_config
from crablb.errors import ConfigError
from tests.helpers.pages import ELSEWHERE, PAGES, PROGRAMS, Snippet, anchors, commands_in, completed, links, snippets
from tests.helpers.processes import ROOT

ALL = [snippet for page in PAGES for snippet in snippets(page)]


def of(*languages: str) -> list[pytest.ParameterSet]:
    return [pytest.param(s, id=s.place) for s in ALL if s.language in languages and not s.why_not]


#: Fences that nobody runs: drawings, output, the files of others.
TOLD = {"", "caddyfile", "haproxy", "ini", "json", "text", "yaml", "{toctree}"}

#: How many blocks of a page are not run but read (their arguments parsed, their syntax looked at): forms of a command,
#: indented, and what is marked as "not run" with the reason (tests/helpers/pages.py).  A new one is to be meant.
READ_ONLY = {
    "README.md": 3,
    "docs/benchmarks.md": 1,
    "docs/capture.md": 3,
    "docs/commands.md": 1,
    "docs/configuration.md": 5,
    "docs/doctor.md": 1,
    "docs/endpoints.md": 4,
    "docs/install.md": 1,
    "docs/lab.md": 1,
    "docs/metrics.md": 2,
    "docs/mptcp.md": 4,
    "docs/packages.md": 3,
    "docs/policies.md": 1,
    "docs/takeover.md": 1,
    "docs/xsk.md": 1,
    "tests/machines/README.md": 9,
}


def test_whatever_is_shown_somebody_looks_at():
    assert {s.language for s in ALL} <= TOLD | {"indented", "python", "sh", "toml"}
    assert len(commands_shown()) > 30


def by_page(found: Iterable[Snippet]) -> dict[str, int]:
    return dict(Counter(str(s.page.relative_to(ROOT)) for s in found))


def test_what_is_not_run_is_counted():
    assert by_page(s for s in ALL if s.why_not or s.language == "indented") == READ_ONLY


def test_whatever_is_not_run_by_all_is_run_by_one():
    programs = by_page(s for s in ALL if s.language == "python" and not s.why_not)
    assert programs == {page: len(tests) for page, tests in PROGRAMS.items()}
    for page, tests in [*((page, [test]) for page, test in ELSEWHERE.items()), *PROGRAMS.items()]:
        for test in tests:
            assert page in (ROOT / test).read_text(), f"{test} runs nothing of {page}"


# ---- files ----


@pytest.mark.parametrize("snippet", of("toml"))
def test_a_file_is_accepted(snippet, tmp_path):
    file = tmp_path / "lb.toml"
    file.write_text(completed(snippet.text))
    assert load_config(file).services


# ---- programs ----


def test_programs_are_typed(tmp_path):
    """By mypy, as far as they have types."""
    programs = [s for s in ALL if s.language == "python"]
    assert len(programs) >= 4
    files = [tmp_path / f"program_{i}.py" for i in range(len(programs))]
    for file, program in zip(files, programs, strict=True):
        file.write_text(f"# {program.place}\n{program.text}\n")
    shorter = ["--allow-untyped-defs", "--allow-untyped-calls", "--allow-any-generics"]  # than --strict would have them
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *shorter, *files], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stdout


def run(page: str, start: str) -> ModuleType:
    """The program of a page that has this in it, run."""
    [program] = [s for s in snippets(ROOT / page) if s.language == "python" and start in s.text]
    module = ModuleType("shown")
    exec(compile(program.text, program.place, "exec"), module.__dict__)
    return module


def test_the_policy_shown():
    batch = np.zeros(3, [("client", "u1", 16)])
    batch["client"][:, 12:] = [[10, 0, 0, 1], [10, 0, 0, 2], [10, 0, 1, 1]]
    assert run("docs/policies.md", "def choose").choose(batch, [None, None]).tolist() == [0, 0, 1]


def test_the_handler_shown():
    shown = run("docs/library.md", "def limit(frames: Frames)")
    assert shown.lb._handlers
    frames = SimpleNamespace(columns=lambda a, b: np.zeros((2, b - a), np.uint8), interfaces=np.zeros(2, np.uint32))
    assert shown.limit(frames).tolist() == [True, True]
    assert frames.interfaces.tolist() == [3, 3]


# ---- commands ----


def commands_shown() -> list[pytest.ParameterSet]:
    shown = [(s.place, c) for s in ALL if s.language in ("sh", "indented") for c in commands_in(s.text)]
    return [pytest.param(command, id=f"{place}-{command[:40]}") for place, command in shown]


def parser_of(words: list[str]) -> argparse.ArgumentParser:
    """Of the innermost command that is named."""
    by_name = {parser.prog: parser for parser in parsers(make_parser())}
    longest = max(n for n in range(1, len(words) + 1) if " ".join(words[:n]) in by_name)
    assert longest > 1, f"there is no such command: {' '.join(words)}"
    return by_name[" ".join(words[:longest])]


def flags_known(command: str) -> None:
    words = re.sub(r"[\[\]|]", " ", command).replace("=", " ").split()
    parser = parser_of(words)
    known = {flag for action in parser._actions for flag in action.option_strings}
    for word in words:
        if word.startswith("-") and word != "--":
            assert word in known, f"{parser.prog} has no {word}"


@pytest.mark.parametrize("command", commands_shown())
def test_a_command_is_known(command):
    """It parses; one that is shown in part (...) or as a pattern ([--name NAME]) has flags that there are."""
    words = shlex.split(command)
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert words[1] in targets
        for word in words[2:]:
            name, _, value = word.partition("=")
            if name == "ARGS" and words[1] in ("bench", "demo"):
                make_parser().parse_args([words[1], *shlex.split(value)])
    elif "..." in command or "[" in re.sub(r"\[[0-9a-f:]*\]", "", command):
        flags_known(command)
    else:
        make_parser().parse_args(words[1:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_a_sentence_are_known(page):
    flat = re.sub(r"\s*\n\s*", " ", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S))
    for command in re.findall(r"`(crablb [a-z][^`]*)`", flat):
        for each in commands_in(command.replace("...", "")):
            flags_known(each)


@pytest.mark.parametrize("snippet", [s for s in ALL if s.language == "sh"], ids=lambda s: s.place)
def test_shell(snippet):
    subprocess.run(["bash", "-n"], input=snippet.text, text=True, check=True)


# ---- links ----


LINKING = [
    *PAGES,
    *(
        ROOT / page
        for page in (
            "CHANGELOG.md",
            "SECURITY.md",
            "bench/report/report.md",
            "tests/stacks/README.md",
            "tests/foreign/README.md",
        )
    ),
]


@pytest.mark.parametrize("page", LINKING, ids=lambda page: str(page.relative_to(ROOT)))
def test_what_is_linked_is_there(page):
    """As GitHub sees it: a file, a folder, a heading."""
    for target in links(page):
        file, _, anchor = target.partition("#")
        if "://" not in target:
            there = page.parent / file if file else page
            assert there.exists(), target
            assert not anchor or anchor in anchors(there), target


# ---- it can fail ----


def test_these_tests_can_fail(tmp_path):
    (tmp_path / "lb.toml").write_text('interface = "eth0"\n[[services]]\n')
    with pytest.raises(ConfigError):
        load_config(tmp_path / "lb.toml")
    for command in ("crablb serve --ifaces eth0 ...", "crablb serves ...", "crablb agent client --queues 2"):
        with pytest.raises(AssertionError):
            flags_known(command)
    assert commands_in("a=1 crablb x\ncrablb lab exec lb -- crablb serve --iface a \\\n  --x & # why") == [
        "crablb lab exec lb -- true",
        "crablb serve --iface a --x",
    ]
