"""The description of the API: OpenAPI 3.1, made from the calls and from their types."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from crablb.api import types
from crablb.control.admin.calls import CALLS, Call, Stream

__all__ = ["describe"]

#: What may be answered instead, everywhere.
FAULTS = {
    "400": "what is asked is not as it should be",
    "401": "by TCP: the token is missing, or wrong",
    "404": "there is no such thing",
    "405": "nothing is done there by this method",
    "409": "it is there already, or cannot be done just now",
    "413": "the body is too long",
    "500": "a fault of crablb's; its log has more",
    "503": "too many ask at once, or the load balancer is ending",
}


def describe() -> dict[str, Any]:
    """As a value that JSON can hold."""
    bodies = [call.body for call in CALLS if call.body not in (None, str)]
    answers = [call.answer for call in CALLS if not isinstance(call.answer, Stream)]
    queries = [query.type for call in CALLS for query in call.query.values()]
    wanted = [types.Problems, types.Event, *bodies, *answers, *queries]
    schemas, components = msgspec.json.schema_components(wanted, ref_template="#/components/schemas/{name}")
    of = {repr(type_): schema for type_, schema in zip(wanted, schemas, strict=True)}
    paths: dict[str, dict[str, Any]] = {}
    for call in CALLS:
        paths.setdefault(call.path, {})[call.method.lower()] = _operation(call, of)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "crablb",
            "version": "1",
            "description": "What a running load balancer is asked and told, on /run/crablb/IFACE.sock.",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [{"url": "http://localhost"}],
        "security": [{}, {"token": []}],
        "paths": paths,
        "components": {
            "schemas": dict(sorted(components.items())),
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }


def _operation(call: Call, of: dict[str, Any]) -> dict[str, Any]:
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        for name in re.findall(r"\{(\w+)\}", call.path)
    ]
    for name, query in call.query.items():
        schema = dict(of[repr(query.type)])
        if query.default is not None:
            schema["default"] = query.default
        parameters.append({"name": name, "in": "query", "required": False, "description": query.says, "schema": schema})
    media = call.answer.media if isinstance(call.answer, Stream) else "application/json"
    schema = {"type": "string"} if isinstance(call.answer, Stream) else of[repr(call.answer)]
    made: dict[str, Any] = {
        "operationId": call.name,
        "summary": call.says,
        "parameters": parameters,
        "responses": {"200": {"description": "done", "content": {media: {"schema": schema}}}}
        | {
            status: {"description": says, "content": {"application/json": {"schema": of[repr(types.Problems)]}}}
            for status, says in FAULTS.items()
        },
    }
    if call.body is not None:
        text = call.body is str
        made["requestBody"] = {
            "required": call.body_needed,
            "content": {
                "text/plain" if text else "application/json": {"schema": of.get(repr(call.body), {"type": "string"})}
            },
        }
    return made
