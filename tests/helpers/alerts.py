"""The alert rules of deploy/, evaluated by promtool over series that stand still, rise, or change."""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Mapping
from typing import Any

import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.helpers.processes import ROOT

RULES = ROOT / "deploy/prometheus-alerts.yml"
#: Minutes that series last, and rules are evaluated.
LENGTH = 30

#: By metric with its labels: values as promtool's tests have them ("0+10x120").
Series = dict[str, str]


def rules() -> dict[str, dict[str, Any]]:
    """The rules by their alerts' names."""
    [group] = yaml.safe_load(RULES.read_text())["groups"]
    return {rule["alert"]: rule for rule in group["rules"]}


def key(name: str, labels: Mapping[str, str]) -> str:
    def quoted(value: str) -> str:
        return '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'

    return name + "{" + ", ".join(f"{label}={quoted(value)}" for label, value in labels.items()) + "}"


def healthy_series(text: bytes, job: str = "crablb") -> Series:
    """What an exposition says, for as long as it takes: gauges as they are, counters too."""
    more = {"job": job, "instance": "lb1"}
    found = {key("up", more): f"1x{LENGTH}"}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            found[key(sample.name, sample.labels | more)] = f"{sample.value:.12g}x{LENGTH}"
    return found


def firing(series: Series, length: int = LENGTH) -> list[str]:
    """The alerts that fire at any time in ``length`` minutes, by name."""
    asked = f'count by (alertname) (max_over_time(ALERTS{{alertstate="firing"}}[{length}m]))'
    # promtool compares with what is expected, and says what there is instead: so nothing is expected.
    test = {
        "rule_files": [str(RULES)],
        "evaluation_interval": "1m",
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": name, "values": values} for name, values in series.items()],
                "promql_expr_test": [{"expr": asked, "eval_time": f"{length}m", "exp_samples": []}],
            }
        ],
    }
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(test, file)
        file.flush()
        done = subprocess.run(["promtool", "test", "rules", file.name], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return []
    [got] = re.findall(r"^ *got: (.*)$", done.stdout + done.stderr, re.M)
    return sorted(re.findall(r'alertname="(\w+)"', got))
