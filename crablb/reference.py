"""What the table of options says to people: the reference, and an example of a configuration file."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from crablb.model import Backend, Check, Config, Service
from crablb.options import Option, Scope, of, table, toml

__all__ = ["described", "example", "reference"]

_HEADINGS: dict[Scope, tuple[str, str]] = {
    Config: ("The load balancer", "In front of the first `[[service]]`; as arguments, beside `--service`."),
    Service: ("A service", "In each `[[service]]`; as arguments, for all services that are given by `--service`."),
    Backend: (
        "A backend",
        'In `backends`, as a string, `"10.0.0.12"` or with a weight `"10.0.0.12*3"`, or as a table,'
        ' `{ address = "10.0.0.13", weight = 2, cr = false }`.',
    ),
    Check: (
        "A check",
        'In `check`, as its type, `check = ["tcp", "redirect"]`, or each as a table of its own, `[[service.check]]`,'
        " behind the service's other keys.",
    ),
}


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _row(option: Option) -> str:
    value = "" if option.kind.metavar.startswith("{") else f" {option.kind.metavar}"
    flags = ", ".join(f"`{flag}{value}`" for flag in option.flags) or f"none: {option.no_flag}"
    default = f"`{option.default_words}`" if option.default_words and not option.unset else option.unset or "required"
    cells = [f"`{option.name}`", flags, option.kind.says, default, "yes" if option.reload else "no", option.whole_help]
    return f"| {' | '.join(map(_cell, cells))} |"


def reference() -> str:
    """docs/reference.md."""
    parts = [
        "# Reference of the options",
        "Every option of `crablb serve`: its key in a configuration file ([configuration.md](configuration.md)), its"
        " argument on the command line, and whether SIGHUP can change it. This page is printed by `crablb config"
        " reference`, a file with all of them by `crablb config example`.",
    ]
    for scope, (heading, where) in _HEADINGS.items():
        rows = ["| key | argument | values | default | reload | |", "|---|---|---|---|---|---|", *map(_row, of(scope))]
        parts += [f"## {heading}", where, "\n".join(rows)]
    return "\n\n".join("\n".join(textwrap.wrap(p, 120)) if p[0] not in "|#" else p for p in parts) + "\n"


def _explained(option: Option) -> list[str]:
    default = option.default_words
    if not option.unset and isinstance(option.default, tuple):
        default = toml(list(option.default))
    notes = [option.limits, f"default: {default}" if default else "", "" if option.reload else "not by a reload"]
    text = f"{option.help} ({'; '.join(filter(None, notes))})" if any(notes) else option.help
    return [f"# {line}" for line in textwrap.wrap(text, 100, break_on_hyphens=False)]


def example() -> str:
    """A configuration file that is accepted as it is: what must be there, and all else with a # in front of it."""
    lines = [
        "#:schema ./crablb.schema.json",
        "# That is for editors (crablb config schema > crablb.schema.json): they check, complete and explain.",
        "",
        "# A configuration of crablb serve.  What has a # straight in front of it is an example: remove the #.",
        "# Some belong together (report_listen and report_key_file, source_prefix and its policy): crablb config",
        "# check FILE says what is amiss.",
        "",
    ]
    for option in of(Config):
        if not option.kind.nested:
            lines += [*_explained(option), f"{'' if option.missing else '#'}{option.name} = {toml(option.example)}", ""]
    lines.append("[[service]]")
    for option in of(Service):
        lines += _explained(option)
        if option.kind.nested is Backend:
            lines += _backends()
        else:
            lines.append(f"{'' if option.missing else '#'}{option.name} = {toml(option.example)}")
        lines.append("")
    lines += [
        "# Each check may be a table of its own instead, behind all else of its service, with these keys; most go",
        "# with some types only.",
        "# [[service.check]]",
    ]
    for option in of(Check):
        lines += [*_explained(option), f"# {option.name} = {toml(option.example)}"]
    return "\n".join(lines) + "\n"


#: What whoever begins may want next, beside what is said: shown with a # in front.
_NEXT: dict[Scope, tuple[str, ...]] = {Config: ("keep", "metrics_listen"), Service: ("policy", "check")}


def described(config: Config, made: str) -> str:
    """A configuration file that says this and no more, each key explained once; ``made``: by whom, or what for."""
    lines = [
        f"# {made}",
        "# Every option there is: crablb config example.  After a change: crablb check FILE, crablb plan FILE,",
        "# crablb reload.",
        "",
        *_said(config),
    ]
    for i, service in enumerate(config.services):
        lines += ["[[service]]", *_said(service, explained=not i), *([""] if i else [])]
    return "\n".join(lines).rstrip() + "\n"


def _said(value: Config | Service, explained: bool = True) -> Iterator[str]:
    given = table(value)
    for option in of(type(value)):
        if option.name in given and option.kind.nested is not Service:
            held = given[option.name]
            if option.name == "interface" and isinstance(held, list) and len(held) == 1:
                (held,) = held
            yield from _explained(option) if explained else ()
            if option.kind.nested is Backend and isinstance(held, list):
                yield from [f"{option.name} = [", *(f"    {toml(each)}," for each in held), "]"]
            else:
                yield f"{option.name} = {toml(held)}"
            yield from [""] if explained else []
        elif explained and option.name in _NEXT[type(value)]:
            yield from [*_explained(option), f"#{option.name} = {toml(option.example)}", ""]


def _backends() -> list[str]:
    keys = [option for option in of(Backend) if option.name != "address"]
    notes = [f"    {_explained(option)[0].replace('# ', f'# {option.name}: ', 1)}" for option in keys]
    table = ", ".join(f"{o.name} = {toml(o.example)}" for o in keys)
    return [
        "backends = [",
        '    "10.0.0.11",',
        '    "10.0.0.12*3",',
        *notes,
        f'    {{ address = "10.0.0.13", {table} }},',
        "]",
    ]
