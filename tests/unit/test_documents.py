"""What README.md and docs/ show: files are checked, programs typed and run, commands and their flags known."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from crablb.cli import make_parser, parsers
from crablb.config import load_config
from crablb.errors import ConfigError
from tests.helpers.processes import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "tests/machines/README.md"]


@dataclass(frozen=True)
class Snippet:
    place: str  # docs/xsk.md:10
    language: str  # of a fence; "" if it has none; "indented"
    text: str


def snippets(page: Path) -> list[Snippet]:
    found: list[Snippet] = []
    lines = page.read_text().split("\n")
    n = 0
    while n < len(lines):
        begin = n
        if lines[n].startswith("```"):
            block = list(takewhile(lambda line: line != "```", lines[n + 1 :]))
            n += len(block) + 2
            found.append(Snippet(f"{page.relative_to(ROOT)}:{begin + 2}", lines[begin][3:], "\n".join(block)))
        elif lines[n].startswith("    ") and not lines[n - 1]:
            block = list(takewhile(lambda line: line.startswith("    ") or not line, lines[n:]))
            n += len(block)
            text = "\n".join(line[4:] for line in block)
            found.append(Snippet(f"{page.relative_to(ROOT)}:{begin + 1}", "indented", text))
        else:
            n += 1
    return found


ALL = [snippet for page in PAGES for snippet in snippets(page)]


def of(*languages: str) -> list[pytest.ParameterSet]:
    return [pytest.param(s, id=s.place) for s in ALL if s.language in languages]


def test_there_is_something_to_look_at():
    """Whatever a fence is marked with, somebody looks at it; drawings and output are not marked."""
    assert {s.language for s in ALL} == {"", "indented", "python", "sh", "toml"}
    assert len(commands_shown()) > 30


# ---- files ----


@pytest.mark.parametrize("snippet", of("toml"))
def test_a_file_is_accepted(snippet, tmp_path):
    file = tmp_path / "lb.toml"
    file.write_text(snippet.text)
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


def run(start: str) -> ModuleType:
    """The program that has this in it, run."""
    [program] = [s for s in ALL if s.language == "python" and start in s.text]
    module = ModuleType("shown")
    exec(compile(program.text, program.place, "exec"), module.__dict__)
    return module


def test_the_policy_shown():
    batch = np.zeros(3, [("client", "u1", 16)])
    batch["client"][:, 12:] = [[10, 0, 0, 1], [10, 0, 0, 2], [10, 0, 1, 1]]
    assert run("def choose(batch, backends)").choose(batch, [None, None]).tolist() == [0, 0, 1]


def test_the_handler_shown():
    shown = run("def limit(frames: Frames)")
    assert shown.lb._handlers


# ---- commands ----


def commands_in(text: str) -> list[str]:
    """The commands of a piece of shell, without what is round them."""
    found = []
    for line in re.sub(r"\\\n\s*", "", text).split("\n"):
        # Of a command within another (crablb lab exec NODE -- COMMAND) both; a comment, a pipe, the background: not.
        bare = re.split(r"\s#\s|\s#$|\s[|&>;]|\s\d?>", line)[0].strip()
        bare = re.sub(r"^until ", "", bare)
        if bare.startswith("crablb lab exec") and " -- " in bare:
            outer, _, inner = bare.partition(" -- ")
            found += [f"{outer} -- true", inner]
        else:
            found.append(bare)
    return [command for command in found if re.match(r"(crablb|make) [a-z]", command)]


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


@pytest.mark.parametrize("snippet", of("sh"))
def test_shell(snippet):
    subprocess.run(["bash", "-n"], input=snippet.text, text=True, check=True)


# ---- links ----


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_is_linked_is_there(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


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
