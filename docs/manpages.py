"""Write the manual pages: ``python docs/manpages.py FOLDER``.

One for crablb, and one for each of its commands, made by argparse-manpage of the same parsers that ``--help`` shows.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from argparse_manpage.manpage import Manpage

from crablb import __version__
from crablb.cli import COMMANDS, make_parser

TITLE = "crablb manual"
#: Those that argparse-manpage makes.
REQUESTS = "TH|SH|SS|TP|PP|RS|RE|BR|B|EX|EE|br|nf|fi"


def page(parser: argparse.ArgumentParser, name: str, what: str, see: Iterable[str], form: str) -> Manpage:
    data = {
        "description": what,
        "project_name": "crablb",
        "version": __version__,
        "manual_title": TITLE,
    }
    made = Manpage(parser, data, format=form)
    made.prog = name
    made.add_section("see also", "=", ",\n".join(f".BR {other} (1)" for other in see))
    return made


def plain(text: str) -> str:
    """A line of text that begins with a dot or an apostrophe is no request of groff: by ``\\&``, which has no width."""
    return re.sub(rf"^(?=['.])(?!\.(?:{REQUESTS})\b)", r"\\&", text, flags=re.MULTILINE)


def subcommands(parser: argparse.ArgumentParser) -> argparse._SubParsersAction[argparse.ArgumentParser]:
    return next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction))


def write(folder: Path) -> list[Path]:
    """The pages, in ``folder``, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    commands = subcommands(make_parser())
    names = {name: f"crablb-{name}" for name in COMMANDS}
    # Of the commands the page of crablb tells what they are, and no more.
    whole = make_parser(())
    subcommands(whole)._choices_actions = commands._choices_actions
    what = "layer-4 load balancing by connection redirection"
    pages = {"crablb": page(whole, "crablb", what, names.values(), "pretty")}
    for told in commands._choices_actions:
        name = names[told.dest]
        parser = commands.choices[told.dest]
        said = re.findall(r"crablb ([a-z][a-z-]*)", " ".join([told.help or "", *parser.format_help().split()]))
        others = [names[other] for other in dict.fromkeys(said) if other in names and other != told.dest]
        pages[name] = page(parser, name, told.help or "", ["crablb", *others], "single-commands-section")
    written = []
    for name, made in pages.items():
        written.append(folder / f"{name}.1")
        written[-1].write_text(plain(str(made)))
    return written


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python docs/manpages.py FOLDER")
    os.environ["COLUMNS"] = "80"  # whatever the terminal has
    for path in write(Path(sys.argv[1])):
        print(path)
