"""tests/helpers/pages.py: what is taken of a page, and how its commands are run."""

from __future__ import annotations

from pathlib import Path

import pytest

from crablb.config import load_config
from tests.helpers.pages import Shell, anchors, completed, is_as, links, run_steps, snippets, steps

PAGE = """# First

    crablb status

Some words.

```sh
echo one
```
```
one
```

## Second

<!-- not run: it takes a disk -->
```sh
mkfs /dev/sda
```

- in a list:

  ```sh
  x=2
  cat <<'EOF'
  in a document
  EOF
  ```

Some words.

```
a drawing
```

<!-- any
comment -->
```python
print()
```
"""


@pytest.fixture
def page(tmp_path: Path) -> Path:
    file = tmp_path / "page.md"
    file.write_text(PAGE)
    return file


def test_snippets(page):
    found = [(s.line, s.section, s.language, s.text.split("\n")[0], s.why_not) for s in snippets(page)]
    assert found == [
        (3, "First", "indented", "crablb status", ""),
        (8, "First", "sh", "echo one", ""),
        (11, "First", "", "one", ""),
        (18, "Second", "sh", "mkfs /dev/sda", "it takes a disk"),
        (24, "Second", "sh", "x=2", ""),
        (33, "Second", "", "a drawing", ""),
        (39, "Second", "python", "print()", ""),
    ]


def test_steps(page):
    assert [(s.snippet.line, s.shown) for s in steps(page)] == [(8, "one"), (24, None)]
    assert [s.snippet.line for s in steps(page, ["Second"])] == [24]


@pytest.mark.parametrize("text", ["```sh\nls\n", "<!-- not run: because -->\nWords.\n"], ids=["open", "of nothing"])
def test_a_page_that_is_written_wrongly(tmp_path, text):
    (tmp_path / "page.md").write_text(text)
    with pytest.raises(AssertionError, match=r"page\.md:1"):
        snippets(tmp_path / "page.md")


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
def shell(tmp_path):
    with Shell(tmp_path) as shell:
        yield shell


@pytest.mark.parametrize(
    ("text", "printed", "failed"),
    [
        ("echo a; echo b", "a\nb\n", ""),
        ("printf a", "a", ""),
        ("cat", "", ""),  # what comes behind is not its input
        ("false", "", "false (exit status 1)"),
        ("for i in 1 2; do false; done; ls /nowhere >/dev/null 2>&1", "", "false (exit status 1)"),
        ("false || echo 'exit status' $?", "exit status 1\n", ""),
        ("until true; do :; done; ! false", "", ""),
        ("cat <<'EOF'\n$x\nEOF", "$x\n", ""),
        ("nothing.there 2>/dev/null", "", "nothing.there 2> /dev/null (exit status 127)"),
    ],
)
def test_a_piece(shell, text, printed, failed):
    assert shell.run(text) == (printed, failed)
    assert shell.run("echo still here") == ("still here\n", "")


def test_pieces_are_of_one_shell(shell):
    shell.run("x=1; cd /; sleep 60 & job=$!")
    assert shell.run("echo $x $PWD; kill $job") == ("1 /\n", "")


def test_a_shell_that_ends_is_said(shell):
    with pytest.raises(AssertionError, match="the shell has ended: so"):
        shell.run("echo so; exit 3")


def test_what_is_wrong_names_its_place(shell, page):
    run_steps(shell, steps(page))
    page.write_text(PAGE.replace("echo one", "echo two"))
    with pytest.raises(AssertionError, match=r"page\.md:8 prints\ntwo"):
        run_steps(shell, steps(page))
    page.write_text(PAGE.replace("echo one", "echo one; ls /nowhere"))
    with pytest.raises(AssertionError, match=r"page\.md:8: ls /nowhere \(exit status 2\)"):
        run_steps(shell, steps(page))


@pytest.mark.parametrize(
    "text",
    ["", "keep = 60", '[[service]]\naddress = "tcp://10.0.0.1:80"\nbackends = ["10.0.0.2"]', 'interface = "eth1"'],
)
def test_a_part_of_a_file(tmp_path, text):
    (tmp_path / "lb.toml").write_text(completed(text))
    assert load_config(tmp_path / "lb.toml").services


def test_links_and_anchors(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# What is a VIP's, `but` [no](x.md) service's\n## Twice\n## Twice\n```sh\n# none\n[a](b)\n```\n"
        '[a](c.md#d), `[a](e)`,\n![f](g.svg) <img width=1 src="h.svg">\n'
    )
    assert anchors(page) == {"what-is-a-vips-but-no-services", "twice", "twice-1"}
    assert links(page) == {"x.md", "c.md#d", "g.svg", "h.svg"}
