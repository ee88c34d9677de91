"""docs/operating.md: every command of it, in its order, and what it prints."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.namespaces import unique
from tests.helpers.processes import ROOT

PAGE = ROOT / "docs/operating.md"


def steps() -> Iterator[tuple[int, str, str | None]]:
    """Line, commands, and what they print, if the page shows it."""
    lines = PAGE.read_text().split("\n")
    fences = [i for i, line in enumerate(lines) if line.startswith("```")]
    blocks = [(a, lines[a][3:], "\n".join(lines[a + 1 : b])) for a, b in zip(fences[::2], fences[1::2], strict=True)]
    for i, (at, language, text) in enumerate(blocks):
        if language == "sh":
            shown = blocks[i + 1][2] if i + 1 < len(blocks) and blocks[i + 1][1] == "" else None
            yield at + 1, text, shown


def is_as(shown: str, printed: str) -> bool:
    """``…`` stands for anything, a line of it for any lines."""
    lines = shown.strip().split("\n")
    patterns = (r"(?:.*\n)*?" if line == "…" else re.escape(line).replace("…", ".*") + r"\n" for line in lines)
    return re.fullmatch("".join(patterns), printed.strip() + "\n") is not None


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("a…c", "abc", True),
        ("a…c", "ab\nc", False),
        ("a\n…\nb", "a\nx\ny\nb", True),
        ("a\n…\nb", "a\nb", True),
        ("a\n…\nb", "a\nx", False),
        ("a", "ab", False),
    ],
)
def test_what_is_the_same(shown, printed, same):
    assert is_as(shown, printed) == same


@pytest.fixture
def shell(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    child = subprocess.Popen(
        ["bash"], cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    yield child
    child.kill()
    child.wait()


def test_each_command(shell):
    name = unique()
    assert shell.stdin and shell.stdout
    bin_ = Path(sys.executable).parent
    shell.stdin.write(f"export PATH={bin_}:$PATH\n")
    try:
        for line, text, shown in steps():
            own = re.sub(r"crablb lab (up|exec|down)", rf"crablb lab \1 --name {name}", text)
            end = f"end of {line}"
            shell.stdin.write(f"{own}\necho '{end}'\n")
            shell.stdin.flush()
            printed = []
            while (said := shell.stdout.readline().rstrip("\n")) != end:
                assert shell.poll() is None, printed
                printed.append(said)
            if shown is not None:
                found = "\n".join(printed)
                assert is_as(shown, found), f"{PAGE.name}:{line} prints\n{found}"
    finally:
        subprocess.run(
            ["crablb", "lab", "down", "--name", name],
            env={"PATH": f"{bin_}:/usr/sbin:/usr/bin:/sbin:/bin"},
            check=False,
            capture_output=True,
        )
