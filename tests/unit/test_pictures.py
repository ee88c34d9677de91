"""docs/pictures: what docs/pictures.py draws, whole and within its frame."""

from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from tests.helpers.browser import Browser
from tests.helpers.processes import ROOT

PICTURES = sorted((ROOT / "docs/pictures").glob("*.svg"))


def test_they_are_what_the_script_draws(tmp_path):
    """If not: python docs/pictures.py."""
    script = "import sys, pathlib, pictures; list(pictures.write(pathlib.Path(sys.argv[1])))"
    subprocess.run([sys.executable, "-c", script, tmp_path], cwd=ROOT / "docs", check=True)
    assert {p.name: p.read_text() for p in PICTURES} == {p.name: p.read_text() for p in tmp_path.iterdir()}


@pytest.mark.parametrize("picture", PICTURES, ids=lambda picture: picture.name)
def test_a_picture_has_a_name_and_fetches_nothing(picture: Path):
    root = ET.parse(picture).getroot()
    title = root.find("{http://www.w3.org/2000/svg}title")
    assert title is not None and title.text
    assert root.attrib["aria-labelledby"] == title.attrib["id"]
    assert not re.search(r"href|@import|url\((?!#)", picture.read_text())


#: Words that are wider than their frame, or than the box that they are in.
TOO_WIDE = """
[...document.querySelectorAll('text')].filter(text => {
  const words = text.getBoundingClientRect(), frame = document.documentElement.getBoundingClientRect();
  const box = text.closest('g')?.querySelector('rect')?.getBoundingClientRect() ?? frame;
  return words.left < box.left || words.right > box.right || words.bottom > frame.bottom;
}).map(text => text.textContent)
"""


def test_words_are_within_their_boxes():
    with Browser() as browser:
        for picture in PICTURES:
            page = browser.open(f"file://{picture}", 390)
            page.until("document.readyState === 'complete'")
            assert page.run(TOO_WIDE) == [], picture.name
            page.call("Page.close")
