"""The documentation site: ``make docs``.

Pages are these Markdown files, which GitHub shows as they are; what is made of the program itself (made.py) stands in
place of a line that ends with ``<!-- here: NAME -->``.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import version as version_of
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import made
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

project = "crablb"
author = "the authors of crablb"
copyright = "MIT licence"
version = release = version_of("crablb").partition("+")[0]  # of a commit: what it is about

extensions = ["myst_parser", "sphinx.ext.autodoc"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 4  # as GitHub names them
exclude_patterns = ["conf.py"]

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
# Every name of ours that is public must be there; those of others are not looked up, which would take their sites.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!crablb\b).*|crablb\.kernel\.(bpf\b.*|xsk\.(Bound|Given))")]

html_theme = "furo"
html_title = f"crablb {release}"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = html_show_sourcelink = False
smartquotes = False  # two hyphens begin an option
highlight_language = "text"  # what has no language: output, drawings
pygments_style, pygments_dark_style = "friendly", "github-dark"

# make docs ARGS='-b linkcheck': what needs an account, or is an example's.
linkcheck_ignore = [r"https?://(localhost|127\.|10\.|\[?fd00)", r"http://ADDRESS"]
linkcheck_timeout = 20


#: Pages that are not in this folder, and those that show them.
ELSEWHERE = {
    "../CHANGELOG.md": "changelog.md",
    "../README.md": "index.md",
    "../SECURITY.md": "reporting.md",
    "../bench/report/report.md": "report.md",
}


def fill(app: Sphinx, page: str, source: list[str]) -> None:
    """Put in what is made; and name pages by their titles, where on GitHub they are named by their files."""
    text = re.sub(r"^.*<!-- here: (\S+) -->$", lambda found: made.PIECES[found[1]](), source[0], flags=re.MULTILINE)
    for there, here in ELSEWHERE.items():
        text = text.replace(f"]({there}", f"]({here}")
    source[0] = re.sub(r"\[`?([\w-]+\.md)`?\]\((?=\1[#)])", "[](", text)


#: Letters of a word of code that fits beside others, on a phone too.
SHORT = 30


class Translator(HTML5Translator):
    """Tables that tell something, in sentences, are stacked where the screen is narrow, each cell under its column's
    name; those of figures are scrolled (static/site.css)."""

    def visit_table(self, node: nodes.table) -> None:
        cells = [entry.astext() for body in node.findall(nodes.tbody) for entry in body.findall(nodes.entry)]
        if any(len(cell) > 50 for cell in cells):
            node["classes"].append("told")
        self._names = [entry.astext() for head in node.findall(nodes.thead) for entry in head.findall(nodes.entry)]
        super().visit_table(node)

    def visit_row(self, node: nodes.row) -> None:
        self._column = 0
        super().visit_row(node)

    def visit_entry(self, node: nodes.entry) -> None:
        if not node.astext():
            node["classes"].append("empty")
        super().visit_entry(node)
        if self._names and not isinstance(node.parent.parent, nodes.thead):
            name = self.attval(self._names[self._column])
            self.body[-1] = self.body[-1].replace("<td", f'<td data-column="{name}"', 1)
        self._column += 1

    def visit_Text(self, node: nodes.Text) -> None:
        begun = len(self.body)
        super().visit_Text(node)
        if self.protect_literal_text:
            long = re.compile(rf'<span class="pre">(?=[^<]{{{SHORT + 1},}}<)')
            self.body[begun:] = [long.sub('<span class="pre long">', word) for word in self.body[begun:]]

    def visit_image(self, node: nodes.image) -> None:
        """Those of pictures.py become part of the page, so that they are light or dark as it is."""
        if node["uri"].startswith("pictures/"):
            svg = Path(self.builder.srcdir, node["uri"]).read_text()
            self.body.append(f'<span class="picture">{svg}</span>')
            raise nodes.SkipNode
        super().visit_image(node)


def setup(app: Sphinx) -> None:
    app.connect("source-read", fill)
    app.set_translator("html", Translator)
