"""``crablb completion``: what a shell needs to complete crablb's commands and arguments."""

from __future__ import annotations

import argparse
from contextlib import suppress

from crablb.api import client as api
from crablb.api import types
from crablb.errors import CrablbError
from crablb.options import OPTIONS

#: Names of interfaces, in the words of each shell (of tcsh none, whose notation takes a / for the end of a rule).
INTERFACES = {"bash": "_crablb_interfaces", "zsh": "_net_interfaces"}
#: What is asked for when it is to be completed, as it changes, by what arguments call it.
ASKED = {"BACKEND": "backends", "VIP": "vips", "LAB": "labs", "NODE": "nodes"}
#: To bash a colon ends a word: what of it stands in front of the last one is not inserted again.
BASH = """
_crablb_%(kind)s() {
  local typed="${COMP_LINE-$1}" found
  typed="${typed:0:${COMP_POINT-${#typed}}}"; typed="${typed##* }"
  compgen -W "$(crablb completion --list %(kind)s 2>/dev/null)" -- "$typed" |
    while read -r found; do echo "${found#"${typed%%"$1"}"}"; done
}"""
ZSH = """
_crablb_%(kind)s() { compadd -- ${(f)"$(crablb completion --list %(kind)s 2>/dev/null)"} }"""
PREAMBLE = {
    "bash": '_crablb_interfaces() { compgen -W "$(ls /sys/class/net)" -- "$1"; }'
    + "".join(BASH % {"kind": kind} for kind in ASKED.values()),
    "zsh": "".join(ZSH % {"kind": kind} for kind in ASKED.values()),
}
#: Seconds that a load balancer has to answer: somebody waits at the keyboard.
PATIENCE = 0.5


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser(
        "completion",
        help="print what a shell needs to complete crablb's arguments",
        epilog="For bash: crablb completion bash > /etc/bash_completion.d/crablb. For zsh, as _crablb into a"
        " folder of $fpath. For tcsh, into a file that ~/.tcshrc sources.",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("shell", nargs="?", choices=["bash", "zsh", "tcsh"], help="which one")
    what.add_argument("--list", choices=list(ASKED.values()), help="what there is now, a line each (for the shell)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.list:
        print("".join(f"{each}\n" for each in _there(args.list)), end="")
        return 0
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
            if args.shell != "tcsh" and action.metavar in ASKED:
                action.complete = {args.shell: f"_crablb_{ASKED[action.metavar]}"}  # type: ignore[attr-defined]
            if action.metavar in complete:
                action.complete = complete[action.metavar]  # type: ignore[attr-defined]
    print(shtab.complete(parser, args.shell, preamble=PREAMBLE.get(args.shell, "")))
    return 0


def _there(kind: str) -> list[str]:
    """Backends and VIPs of the load balancers of this network namespace, or labs, and the nodes of any.  Whoever does
    not answer has none."""
    found: set[str] = set()
    if kind in ("labs", "nodes"):
        from crablb.lab.lab import Lab, existing

        if kind == "labs":
            return existing()
        for name in existing():
            with suppress(CrablbError, OSError, ValueError):  # it is just made, or gone
                found |= Lab.open(name).nodes.keys()
        return sorted(found)
    for path in {path.resolve() for path in api.found().values()}:
        with suppress(CrablbError, OSError), api.Client(path, timeout=PATIENCE) as client:
            if kind == "vips":
                found |= {service.vip for service in client.get("/v1/services", list[types.Service])}
            else:
                found |= {backend.address for backend in client.get("/v1/backends", list[types.Backend])}
    return sorted(found)
