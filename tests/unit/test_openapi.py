"""The API's description is true: schemathesis asks by it, right and wrong, and no answer is another one."""

from __future__ import annotations

import json
import subprocess
import sys

import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from schemathesis.checks import CHECKS

from crablb.control.admin import app
from crablb.control.admin.openapi import describe
from tests.helpers.operating import still
from tests.helpers.processes import ROOT

operator, _ = still()
#: Not the streams, which need not end: tests/unit/test_admin.py, tests/lab.
schema = schemathesis.openapi.from_asgi("/openapi.json", app.make(operator)).exclude(
    path=["/v1/events", "/v1/capture", "/v1/trace"]
)

#: Values that a schema allows may be refused: that a backend is there already no schema says.
NOT = {"positive_data_acceptance"}


@schema.parametrize()
@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
def test_every_answer_is_as_declared(case):
    response = case.call()
    assert response.status_code < 500, response.text
    case.validate_response(response, excluded_checks=[check for check in CHECKS.get_all() if check.__name__ in NOT])


def test_the_printed_description_is_this_one():
    """If not: crablb config openapi > docs/openapi.json."""
    printed = subprocess.run(
        [sys.executable, "-m", "crablb", "config", "openapi"], capture_output=True, text=True, check=True
    ).stdout
    assert (ROOT / "docs/openapi.json").read_text() == printed
    assert json.loads(printed) == json.loads(json.dumps(describe()))


def test_every_reference_leads_somewhere():
    description = describe()

    def references(value):
        if isinstance(value, dict):
            yield from (v for k, v in value.items() if k == "$ref")
            for each in value.values():
                yield from references(each)
        elif isinstance(value, list):
            for each in value:
                yield from references(each)

    found = set(references(description))
    assert {"#/components/schemas/Status", "#/components/schemas/Problems"} <= found
    for reference in found:
        assert reference.removeprefix("#/components/schemas/") in description["components"]["schemas"], reference
    for part in description["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(part)


@pytest.mark.parametrize("path", ["/v1/services/{vip}", "/v1/backends"])
def test_it_has_what_it_should(path):
    assert path in describe()["paths"]
