"""The documentation site: it is made without a warning, whole, of nothing from elsewhere, and fits a phone."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import crablb
from crablb.cli import make_parser, parsers
from tests.helpers.browser import Browser
from tests.helpers.processes import ROOT

pytestmark = [pytest.mark.long, pytest.mark.xdist_group("site")]  # it is made once


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `make docs` makes it."""
    folder = tmp_path_factory.mktemp("site")
    sphinx = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q"]
    done = subprocess.run(
        [*sphinx, "-d", folder / "doctrees", "docs", folder / "html"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return folder / "html"


class Seen(HTMLParser):
    """Of a page: its links, what they may point to, and what a browser fetches for it."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.links: set[str] = set()
        self.names: set[str] = set()
        self.fetched: set[str] = set()
        self.text = page.read_text()
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value}
        self.names |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.add(given["href"])
        elif tag == "link" and given.get("rel") in ("stylesheet", "icon", "preload"):
            self.fetched.add(given["href"])
        elif "src" in given:
            self.fetched.add(given["src"])


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Seen]:
    return {page: Seen(page) for page in site.glob("*.html")}


def test_every_link_leads_somewhere(site, pages):
    for page, seen in pages.items():
        for target in map(urlsplit, seen.links):
            if not target.scheme:
                there = page.parent / unquote(target.path) if target.path else page
                assert there.exists(), (page.name, target)
                if target.fragment and there in pages:
                    assert unquote(target.fragment) in pages[there].names, (page.name, target)


def test_nothing_is_fetched_from_elsewhere(pages):
    for page, seen in pages.items():
        for target in map(urlsplit, seen.fetched):
            assert not target.scheme and not target.netloc, (page.name, target)
            assert (page.parent / unquote(target.path)).exists(), (page.name, target)


def test_what_is_made_of_the_program_is_whole(site, pages):
    manual, api, library = (
        pages[site / f"{name}.html"].names for name in ("manual", "api-reference", "library-reference")
    )
    assert {parser.prog.replace(" ", "-") for parser in parsers(make_parser())} <= manual
    described = json.loads((ROOT / "docs/openapi.json").read_text())
    for path, methods in described["paths"].items():
        for method in methods:
            assert f"{method.upper()} {path}" in pages[site / "api-reference.html"].text
    assert {name.lower() for name in described["components"]["schemas"]} <= api
    assert {f"crablb.{name}" for name in crablb.__all__} <= library
    assert "<!-- here" not in "".join(seen.text for seen in pages.values())


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as browser:
        yield browser


#: Brackets and commas that stand on another line than the word of code that they belong to, with that.
LONE = """(() => {
  const lone = [], box = (node, from, to) => {
    const range = document.createRange();
    range.setStart(node, from);
    range.setEnd(node, to);
    return range.getBoundingClientRect();
  };
  for (const code of document.querySelectorAll("article code.literal")) {
    const lines = [...code.getClientRects()].filter((line) => line.width);
    for (const side of lines.length ? ["previousSibling", "nextSibling"] : []) {
      let node = code;
      while (!node[side] && node.parentNode.matches("a, strong, em")) node = node.parentNode;
      node = node[side];
      if (!node || node.nodeType !== Node.TEXT_NODE) continue;
      if (side === "previousSibling" && node.data.endsWith("(") &&
          box(node, node.length - 1, node.length).bottom <= lines[0].top)
        lone.push("(" + code.textContent);
      if (side === "nextSibling" && /^[),.;:]/.test(node.data) && box(node, 0, 1).top >= lines.at(-1).bottom)
        lone.push(code.textContent + node.data[0]);
    }
  }
  return lone;
})()"""


def test_every_page_fits_a_phone(pages, browser):
    """And a notebook; tables, code and pictures are scrolled, stacked or made smaller, not the page."""
    shown = browser.open("about:blank", 390, 844)
    for page in pages:
        shown.call("Page.navigate", url=f"file://{page}")
        shown.until(f"document.readyState === 'complete' && location.pathname === '{page}'")
        for width in (390, 1280):
            shown.size(width, 844)
            assert shown.run("document.scrollingElement.scrollWidth") == width, (page.name, width)
            assert shown.run(LONE) == [], (page.name, width)
        assert not shown.complaints, page.name
