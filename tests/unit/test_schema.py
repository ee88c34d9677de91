"""The JSON Schema of configuration files: up to date, and as strict as can be without refusing what is accepted."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from jsonschema import Draft202012Validator

from crablb import reference, schema
from crablb.cli import main
from crablb.options import OPTIONS, table
from tests.helpers.processes import ROOT
from tests.unit.test_overlay import configs

VALIDATOR = Draft202012Validator(schema.schema())
SERVICE = '[[service]]\naddress = "tcp://10.0.0.100:80"\nbackends = ["10.0.0.11"]\n'


def test_it_is_up_to_date_and_a_schema(capsys):
    assert main(["config", "schema"]) == 0
    printed = capsys.readouterr().out
    assert (ROOT / "deploy" / "crablb.schema.json").read_text() == printed, (
        "run: crablb config schema > deploy/crablb.schema.json"
    )
    Draft202012Validator.check_schema(json.loads(printed))


@settings(max_examples=50)
@given(configs())
def test_what_is_a_configuration_is_accepted(config):
    VALIDATOR.validate(json.loads(json.dumps(table(config))))


def shown() -> list[Any]:
    """The files of the documents, and the examples of all options."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    blocks = [m[1] for p in pages for m in re.finditer(r"(?ms)^```toml\n(.*?)^```", p.read_text())]
    examples = sorted((ROOT / "examples").glob("*.toml")) + sorted((ROOT / "deploy").glob("*.toml"))
    whole = re.sub(r"(?m)^#(?=\w)", "", reference.example())
    return [*blocks, whole, reference.example(), *(path.read_text() for path in examples)]


@pytest.mark.parametrize("text", shown(), ids=range(len(shown())))
def test_what_the_documents_show_is_accepted(text):
    VALIDATOR.validate(tomllib.loads(text) if "[[service]]" in text else tomllib.loads(f"{text}\n{SERVICE}"))


@pytest.mark.parametrize(
    "option", [o for o in OPTIONS if not o.kind.nested], ids=lambda o: f"{o.scope.__name__}-{o.name}"
)
def test_each_option_takes_its_example_and_no_table(option):
    validator = Draft202012Validator(dict(option.kind.json))
    for value in option.example if option.kind.each else [option.example]:
        validator.validate(value)
    assert not validator.is_valid({})
    assert not validator.is_valid([[]])


@pytest.mark.parametrize(
    "text",
    [
        "queues = 0",
        "queues = '4'",
        "quues = 4",
        "xdp_mode = 'fast'",
        "macs = ['x']",
        "seed = 'abc'",
        "ping = 'yes'",
        "keep = -1",
        "interface = []",
        "report_listen = 7171",
    ],
)
def test_what_is_none_of_the_load_balancer_s_is_refused(text):
    assert VALIDATOR.is_valid(tomllib.loads(SERVICE))
    assert not VALIDATOR.is_valid(tomllib.loads(f"{text}\n{SERVICE}"))


@pytest.mark.parametrize(
    "text",
    [
        "adress = 'x'",
        "backend = []",
        "mode = 'no'",
        "policy = 'rondom'",
        "source_prefix = [24]",
        "panic = 101",
        "check = ['ping']",
        "check = 'tcp'",
        "check = [{ interval = 1 }]",
        "check = [{ type = 'exec' }]",
        "check = [{ type = 'agent' }]",
        "check = [{ type = 'http', status = ['2xx'] }]",
        "check = [{ type = 'http', path = 'healthz' }]",
    ],
)
def test_what_is_none_of_a_service_s_is_refused(text):
    assert not VALIDATOR.is_valid(tomllib.loads(f"{SERVICE}{text}\n"))


@pytest.mark.parametrize("backend", ["'10.0.0.11*x'", "{ weight = 1 }", "{ address = '10.0.0.11', wieght = 1 }", "5"])
def test_what_is_no_backend_is_refused(backend):
    text = SERVICE.replace('"10.0.0.11"', backend)
    assert not VALIDATOR.is_valid(tomllib.loads(text))


def test_the_example_names_it_for_editors(tmp_path):
    """taplo(1), and what is made of it for editors, reads the first line."""
    assert reference.example().startswith("#:schema ./crablb.schema.json\n")
    assert Path(ROOT / "deploy" / "crablb.schema.json").name == "crablb.schema.json"
