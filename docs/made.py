"""What of the documentation site is made of the program itself, as Markdown: the commands' manual, the API's and the
library's reference, the changelog, the security policy."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent


def plain(text: str) -> str:
    """Text in which nothing is Markdown's."""
    return re.sub(r"([\\`*_{}\[\]<>#|~$])", r"\\\1", text)


# ---- commands ----


def manual() -> str:
    """Every command, by the parsers that ``--help`` shows."""
    os.environ["COLUMNS"] = "78"
    from crablb.cli import make_parser, parsers

    return "\n".join(line for parser in parsers(make_parser()) for line in command(parser))


def command(parser: argparse.ArgumentParser) -> Iterator[str]:
    yield f"{'#' * min(1 + len(parser.prog.split()), 4)} {parser.prog}\n"
    if parser.description:
        yield f"{plain(' '.join(parser.description.split()))}\n"
    yield f"```text\n{parser.format_usage().removeprefix('usage: ').rstrip()}\n```\n"
    formatter = parser._get_formatter()
    for group in parser._action_groups:
        shown = [
            a for a in group._group_actions if a.help is not argparse.SUPPRESS and "--help" not in a.option_strings
        ]
        if shown and group.title:
            title = {"positional arguments": "arguments"}.get(group.title, group.title)
            yield f"**{title}**\n"
        for action in shown:
            if isinstance(action, argparse._SubParsersAction):
                for choice in action._choices_actions:
                    name = f"{parser.prog} {choice.dest}"
                    yield f"[`{name}`](#{name.replace(' ', '-')})\n: {plain(choice.help or '')}\n"
            else:
                yield f"`{formatter._format_action_invocation(action)}`"
                yield f": {plain(formatter._expand_help(action)) if action.help else '(see above)'}\n"


# ---- API ----


def api() -> str:
    """Every request and every type of docs/openapi.json."""
    described = json.loads((DOCS / "openapi.json").read_text())
    lines = ["## Requests\n"]
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            lines += request(method.upper(), path, operation)
    lines.append("## Types\n")
    for name, schema in described["components"]["schemas"].items():
        lines += type_(name, schema)
    return "\n".join(lines)


def request(method: str, path: str, operation: dict[str, Any]) -> Iterator[str]:
    yield f"### {method} {plain(path)}\n"
    yield f"{plain(operation['summary'])}.\n"
    for parameter in operation["parameters"]:
        needed = ", required" if parameter.get("required") else ""
        where = {"path": "in the path", "query": "in the query"}[parameter["in"]]
        yield f"`{parameter['name']}`\n: {what(parameter['schema'])}, {where}{needed}\n"
    if body := operation.get("requestBody"):
        needed = ", required" if body["required"] else ""
        yield f"body\n: {content(body['content'])}{needed}\n"
    for status, answer in operation["responses"].items():
        # The others are Problems, with the same meaning everywhere: the page says so once.
        if status.startswith("2"):
            yield f"{status}\n: {content(answer['content']) if 'content' in answer else plain(answer['description'])}\n"


def answers() -> str:
    """What each status means that is no answer to the request."""
    described = json.loads((DOCS / "openapi.json").read_text())
    meanings: dict[str, str] = {}
    for methods in described["paths"].values():
        for operation in methods.values():
            for status, answer in operation["responses"].items():
                if not status.startswith("2"):
                    assert meanings.setdefault(status, answer["description"]) == answer["description"], status
    return "\n".join(f"{status}\n: {plain(meaning)}\n" for status, meaning in sorted(meanings.items()))


def content(by_type: dict[str, Any]) -> str:
    return " or ".join(
        what(form["schema"]) + ("" if kind == "application/json" else f", as `{kind}`")
        for kind, form in by_type.items()
    )


def type_(name: str, schema: dict[str, Any]) -> Iterator[str]:
    yield f"### {name}\n"
    if "description" in schema:
        yield f"{plain(schema['description'])}\n"
    for key, value in schema.get("properties", {}).items():
        rest = ", required" if key in schema.get("required", ()) else ""
        rest += f"; default `{json.dumps(value['default'])}`" if value.get("default") not in (None, "", [], {}) else ""
        yield f"`{key}`\n: {what(value)}{rest}\n"


def what(schema: dict[str, Any]) -> str:
    """A schema in words."""
    match schema:
        case {"$ref": reference}:
            name = reference.rsplit("/", 1)[1]
            return f"[{name}](#{name.lower()})"
        case {"anyOf": choices}:
            return " or ".join(map(what, choices))
        case {"enum": values}:
            return ", ".join(f"`{json.dumps(value)}`" for value in values)
        case {"type": "array", "items": items}:
            return f"list of {what(items)}"
        case {"type": "object", "additionalProperties": dict(values)} if values:
            return f"object, by name {what(values)}"
        case {"type": kind}:
            limits = [f"at least {schema['minimum']}"] if "minimum" in schema else []
            limits += [f"at most {schema['maximum']}"] if "maximum" in schema else []
            return " ".join([str(kind), *limits])
    return "anything"


# ---- the rest ----


def library() -> str:
    """What ``import crablb`` has, and what its signatures name besides, by their docstrings."""
    import crablb
    from crablb.kernel import xsk

    lines = [f"## {name}\n\n{documented(f'crablb.{name}')}" for name in crablb.__all__]
    lines.append("## What these name\n")
    model = ("Config", "Check", "CheckKind", "Closed", "Initially", "Switch")
    lines += map(documented, ["crablb.balancer.Events", *(f"crablb.model.{name}" for name in model)])
    lines.append("## crablb.kernel.xsk\n")
    lines += [documented(f"crablb.kernel.xsk.{name}") for name in xsk.__all__ if isinstance(getattr(xsk, name), type)]
    return "\n".join(lines)


def documented(name: str) -> str:
    return f"```{{eval-rst}}\n.. autoclass:: {name}\n   :members:\n   :undoc-members:\n```\n"


def changelog() -> str:
    """With links to the pages that it names."""
    named = r"docs/([\w-]+\.md(?:#[\w-]+)?)"
    text = (DOCS.parent / "CHANGELOG.md").read_text().partition("\n")[2]
    return re.sub(rf"\[[^]]*\]\({named}\)|{named}", lambda found: f"[]({found[1] or found[2]})", text)


def report() -> str:
    """The benchmarks' own, whose pictures are beside it."""
    text = (DOCS.parent / "bench/report/report.md").read_text().partition("\n")[2]
    return re.sub(r"\]\((?=[\w-]+\.(?:svg|json)\))", "](../bench/report/", text)


def reporting() -> str:
    """Whose links are to the pages of this folder, and others' to the repository's root."""
    text = (DOCS.parent / "SECURITY.md").read_text().partition("\n")[2]
    return text.replace("](docs/", "](")


PIECES: dict[str, Callable[[], str]] = {
    "answers": answers,
    "api": api,
    "changelog": changelog,
    "library": library,
    "manual": manual,
    "report": report,
    "reporting": reporting,
}
