"""The table of options as JSON Schema (draft 2020-12), for editors of configuration files."""

from __future__ import annotations

import json
from dataclasses import MISSING
from typing import Any

from crablb.model import Backend, Check, CheckKind, Config
from crablb.options import Option, Scope, held, of

__all__ = ["schema", "text"]

#: An element of a list of tables in its short notation.
_SHORT: dict[Scope, dict[str, Any]] = {
    Backend: {"type": "string", "pattern": r"^[^*]+(\*[0-9]{1,9})?$", "description": "an address, or ADDRESS*WEIGHT"},
    Check: {"enum": [kind.value for kind in CheckKind]},
}


def schema() -> dict[str, Any]:
    """What it refuses no load balancer takes; what it lets through :mod:`crablb.config` may refuse all the same."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Configuration of crablb serve",
        **_table(Config),
    }


def text() -> str:
    return json.dumps(schema(), indent=2) + "\n"


def _table(scope: Scope) -> dict[str, Any]:
    options = of(scope)
    # The interfaces may be said by an argument.
    required = [option.name for option in options if option.missing and option.name != "interface"]
    found: dict[str, Any] = {
        "type": "object",
        "properties": {option.name: _option(option) for option in options},
        "required": required,
        "additionalProperties": False,
    }
    if scope is Check:
        found["allOf"] = [
            {"if": {"properties": {"type": {"const": kind}}}, "then": {"required": [needed]}}
            for kind, needed in (("exec", "command"), ("agent", "port"))
        ]
    return found


def _option(option: Option) -> dict[str, Any]:
    one = dict(option.kind.json)
    if option.kind.nested:
        table = _table(option.kind.nested)
        short = _SHORT.get(option.kind.nested)
        one = {"anyOf": [short, table]} if short else table
    found = {"type": "array", "items": one} if option.kind.each else one
    found = {"description": option.help, **found}
    if option.default is not MISSING and not option.unset:
        found["default"] = held(option, option.default)
    return found
