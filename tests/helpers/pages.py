"""What pages (README.md, docs/) show, and its execution: a page's commands run one after the other in a shell, and
what they print compared with what the page says that they do.

How a page is written, so that it can be executed:

``sh``
    run, by tests/lab/test_pages.py, in a folder that has deploy/ and examples/ and nothing else, if :data:`ELSEWHERE`
    names no other test; a fence without a language right behind it is what that prints.
``toml``
    a configuration file, or a part of one (:func:`completed`).
``python``
    run, by the test that :data:`PROGRAMS` names.
without a language, ``text``, ``json``, ``ini``, ...
    a drawing, or others' files.
indented
    forms of a command to choose from: their arguments are parsed.

What cannot be executed here is preceded by ``<!-- not run: why -->``.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Self

from tests.helpers.namespaces import unique
from tests.helpers.processes import ROOT

#: Of anything that is printed: a line of it, any lines; within a line, anything.
ANYTHING = "…"

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "tests/machines/README.md"]

#: Pages whose commands another test runs than tests/lab/test_pages.py, which takes all that are not named here.
ELSEWHERE = {
    "docs/api.md": "tests/lab/test_admin.py",
    "docs/commands.md": "tests/lab/test_admin.py",
    "docs/containers.md": "tests/machines/container.py",  # make test-container
    "docs/install.md": "tests/machines/install.py",  # make test-install
    "docs/troubleshooting.md": "tests/lab/test_troubleshooting.py",
}

#: The tests that run the programs of a page, in their order.
PROGRAMS = {
    "docs/api.md": ["tests/lab/test_shown.py"],
    "docs/library.md": ["tests/lab/test_shown.py", "tests/unit/test_documents.py"],
    "docs/policies.md": ["tests/unit/test_documents.py"],
    "docs/xsk.md": ["tests/lab/test_shown.py", "tests/bpf/test_xsk_shared.py"],
}

MARK = re.compile(r"<!-- not run: (.+?) -->", re.DOTALL)


@dataclass(frozen=True)
class Snippet:
    page: Path
    line: int  # of its first line of text
    section: str  # the heading that it is under
    language: str  # of a fence; "" if it has none; "indented"
    text: str
    why_not: str = ""  # it is not run

    @property
    def place(self) -> str:
        """docs/xsk.md:10."""
        return f"{self.page.relative_to(ROOT) if self.page.is_relative_to(ROOT) else self.page}:{self.line}"


def snippets(page: Path) -> list[Snippet]:
    """All of a page, in its order."""
    found: list[Snippet] = []
    lines = page.read_text().split("\n")
    section, mark, n = "", "", 0
    while n < len(lines):
        line, begin = lines[n], n
        if fence := re.match(r"( *)(`{3,})(?=([^`]*)$)", line):
            indent, ticks, language = fence.groups()
            end = next((i for i in range(n + 1, len(lines)) if lines[i] == indent + ticks), None)
            assert end, f"{page}:{n + 1}: this block does not end"
            text = "\n".join(each.removeprefix(indent) for each in lines[n + 1 : end])
            found.append(Snippet(page, begin + 2, section, language.strip(), text, mark))
            n, mark = end, ""
        elif line.startswith("    ") and not lines[n - 1].strip():
            while n + 1 < len(lines) and (lines[n + 1].startswith("    ") or not lines[n + 1].strip()):
                n += 1
            text = "\n".join(each[4:] for each in lines[begin : n + 1]).rstrip()
            found.append(Snippet(page, begin + 1, section, "indented", text, mark))
            mark = ""
        elif line.startswith("<!--"):
            while "-->" not in lines[n]:
                n += 1
            marked = MARK.fullmatch(" ".join(lines[begin : n + 1]))
            mark = marked[1] if marked else mark
        elif heading := re.match(r"#+ (.*)", line):
            section = heading[1]
        n += 1
        # A mark is of what follows it at once.
        if mark and n < len(lines) and lines[n].strip() and not lines[n].startswith(("    ", "<!--")):
            assert lines[n].lstrip().startswith("```"), f"{page}:{n}: not run: what?"
    return found


@dataclass(frozen=True)
class Step:
    snippet: Snippet
    shown: str | None  # what it prints, if the page shows it


def steps(page: Path, sections: Collection[str] | None = None) -> list[Step]:
    """What is to be run of a page (or of some of its sections), in its order."""
    found = []
    for here, behind in pairwise([*snippets(page), None]):
        assert here
        if here.language == "sh" and not here.why_not and (sections is None or here.section in sections):
            lines_of = here.text.count("\n") + 1
            adjoins = behind and behind.language == "" and behind.line - (here.line + lines_of) in (2, 3)
            found.append(Step(here, behind.text if behind and adjoins else None))
    return found


def is_as(shown: str, printed: str) -> bool:
    """``…`` stands for anything, a line of it for any lines."""
    lines = shown.strip().split("\n")
    patterns = (
        r"(?:.*\n)*?" if line == ANYTHING else re.escape(line).replace(ANYTHING, ".*") + r"\n" for line in lines
    )
    return re.fullmatch("".join(patterns), printed.strip() + "\n") is not None


class Shell:
    """A bash that is told one piece after the other, as somebody types them: variables and background jobs stay.

    ``command``: how to get it, if it is to be elsewhere than here (``chroot``, ``ip netns exec``).  What it has started
    is killed with it.
    """

    def __init__(self, folder: Path, command: Sequence[str] = ("bash",), environ: Mapping[str, str] | None = None):
        self._folder, self._command, self._environ = folder, command, environ
        self._count = 0

    def __enter__(self) -> Self:
        self._child = subprocess.Popen(
            self._command,
            cwd=self._folder,
            env=self._environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)
        self._child.communicate()

    def run(self, text: str) -> tuple[str, str]:
        """What it prints, and the first command that failed: "" if none has."""
        assert self._child.stdin and self._child.stdout
        self._count += 1
        end = f"end of piece {self._count}"
        # By a here-document, so that no command of the piece takes what follows it for its input.
        self._child.stdin.write(
            f"failed=; trap ': ${{failed:=\"$BASH_COMMAND\" (exit status $?)}}' ERR\n"
            f"eval \"$(cat <<'{end}'\n{text}\n{end}\n)\" </dev/null\n"
            f'trap - ERR; echo; echo "{end}: $failed"\n'
        )
        self._child.stdin.flush()
        printed = []
        for line in self._child.stdout:
            if line.startswith(end):
                return "".join(printed).removesuffix("\n"), line.removeprefix(f"{end}:").strip()
            printed.append(line)
        raise AssertionError(f"the shell has ended: {''.join(printed)}")


def run_steps(shell: Shell, wanted: Sequence[Step], own: Callable[[str], str] = lambda text: text) -> None:
    """Run what a page shows; fail where a command does, or prints what the page does not say.

    ``own``: what a piece of it is to be here.
    """
    for step in wanted:
        printed, failed = shell.run(own(step.snippet.text))
        assert not failed, f"{step.snippet.place}: {failed}\n{printed}"
        assert step.shown is None or is_as(step.shown, printed), f"{step.snippet.place} prints\n{printed}"


#: Its own lab in place of the one that everybody's `crablb lab` makes.
WRAPPER = """#!/bin/sh
case "$1 $2" in
  "lab up" | "lab down" | "lab exec") what=$2; shift 2; exec {crablb} lab $what --name {name} "$@" ;;
esac
exec {crablb} "$@"
"""


def run_page(page: Path, folder: Path, sections: Collection[str] | None = None) -> None:
    """Every command of a page (of some of its sections), in its order, and what it prints.

    With this Python's programs first, and a lab of its own for ``crablb lab``, which is removed.
    """
    wanted = steps(page, sections)
    assert wanted, f"{page} shows nothing to run"
    name, bin_ = unique(), Path(sys.executable).parent
    own, work = folder / "bin", folder / "work"
    own.mkdir()
    work.mkdir()
    for shipped in ("deploy", "examples"):
        (work / shipped).symlink_to(ROOT / shipped)
    (own / "crablb").write_text(WRAPPER.format(crablb=bin_ / "crablb", name=name))
    (own / "crablb").chmod(0o755)
    environ = dict(os.environ, PATH=f"{own}:{bin_}:{os.environ['PATH']}")
    try:
        with Shell(work, environ=environ) as shell:
            run_steps(shell, wanted)
    finally:
        subprocess.run([bin_ / "crablb", "lab", "down", "--name", name], check=False, capture_output=True)
        shutil.rmtree(work, ignore_errors=True)


# ---- what is looked at without running it ----


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


def completed(text: str) -> str:
    """A configuration file, of a part of one: what is required and not shown is added."""
    found = tomllib.loads(text)
    before = "" if "interface" in found else 'interface = "eth0"\n'
    behind = "" if "service" in found else '\n[[service]]\naddress = "tcp://10.0.0.100:80"\nbackends = ["10.0.0.11"]\n'
    return before + text + behind


# ---- links ----


def anchors(page: Path) -> set[str]:
    """What GitHub names a page's headings, for links."""
    found: list[str] = []
    for heading in re.findall(r"^#+ (.*)", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M):
        shown = re.sub(r"!?\[([^]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        found.append(name if name not in found else f"{name}-{found.count(name)}")
    return set(found)


def links(page: Path) -> set[str]:
    """Targets of links and pictures, without those in code."""
    text = re.sub(r"^```.*?^```|`[^`\n]+`", "", page.read_text(), flags=re.M | re.S)
    return set(re.findall(r"\]\(([^)\s]+)\)", text)) | set(re.findall(r"<img [^>]*src=\"([^\"]+)\"", text))
