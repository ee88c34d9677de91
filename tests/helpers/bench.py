"""Suites of the benchmarks, run as small as they can be."""

from __future__ import annotations

import json

import jsonschema

from bench import machine
from bench.context import Context, Size
from bench.figures import Results, Suite
from tests.helpers.processes import ROOT

SCHEMA = json.loads((ROOT / "bench/schema.json").read_text())


def quiet(size: Size = "tiny") -> Context:
    return Context(size, say=lambda _: None)


def written(suite: Suite) -> None:
    """What the suite writes is as the schema says."""
    jsonschema.validate(Results("tiny", machine.describe(), [suite]).json(), SCHEMA)
