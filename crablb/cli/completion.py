"""``crablb completion``: what a shell needs to complete crablb's commands and arguments."""

from __future__ import annotations

import argparse

from crablb.errors import CrablbError
from crablb.options import OPTIONS

#: Names of interfaces, in the words of each shell (of tcsh none, whose notation takes a / for the end of a rule).
INTERFACES = {"bash": "_crablb_interfaces", "zsh": "_net_interfaces"}
PREAMBLE = {"bash": '_crablb_interfaces() { compgen -W "$(ls /sys/class/net)" -- "$1"; }'}


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "completion",
        help="print what a shell needs to complete crablb's arguments",
        epilog="For bash: crablb completion bash > /etc/bash_completion.d/crablb. For zsh, as _crablb into a"
        " folder of $fpath. For tcsh, into a file that ~/.tcshrc sources.",
    )
    parser.add_argument("shell", choices=["bash", "zsh", "tcsh"], help="which one")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from crablb.cli import make_parser, parsers

    try:
        import shtab
    except ModuleNotFoundError:
        raise CrablbError("completions are made by shtab, which is not installed: pip install shtab") from None
    words = {flag: option.kind.words for option in OPTIONS for flag in option.flags}
    complete = {"FILE": shtab.FILE, "FILE.toml": shtab.FILE, "DIR": shtab.DIRECTORY, "IF": INTERFACES}
    parser = make_parser()
    for each in parsers(parser):
        for action in each._actions:
            if each.prog == "crablb serve" and (known := words.get("".join(action.option_strings[:1]))):
                action.choices = known  # it is not checked by these: the table does that
            if action.metavar in complete:
                action.complete = complete[action.metavar]  # type: ignore[attr-defined]
    print(shtab.complete(parser, args.shell, preamble=PREAMBLE.get(args.shell, "")))
    return 0
