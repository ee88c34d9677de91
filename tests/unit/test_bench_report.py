"""The benchmarks' frame: rounds, results, reports, comparison.  The suites have tests of their own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import pytest

from bench import run, targets
from bench.compare import compare
from bench.context import AGAIN, Context, Unavailable
from bench.figures import WIDE, Curve, Plot, Results, Row, Suite, Table, Target, spread
from bench.report import markdown, number, overview, text, write
from crablb.cli import main
from crablb.errors import ConfigError
from tests.helpers.bench import SCHEMA, quiet
from tests.helpers.processes import ROOT


def results(**more: list[float]) -> Results:
    rows = [
        Row("bare", [10.0, 12.0, 11.0]),
        Row("ours", [20.0, 18.0, 22.0]),
        Row("other", more.get("other", [1, 2, 3])),
    ]
    table = Table("micro-syn", "A SYN", "ns", rows, baseline="bare", note="pinned")
    plot = Plot(
        "micro-plot",
        "A plot",
        "x",
        "y",
        [Curve("a", [1, 2], [3, 4], [2, 3], [4, 6]), Curve("a", [1], [2], source="paper")],
    )
    bars = Plot("micro-bars", "Bars", "", "y", [Curve("a", [0, 1], [3, 4])], "bars", ["one", "two"])
    suite = Suite(
        "micro", "Hot loop", [table], [plot, bars], [Target("P1", "1.82", False, "memory")], ["A note."], ["x: none"]
    )
    return Results("tiny", run.machine.describe(), [suite])


# ---- rounds ----


def test_measures_in_turn():
    calls: list[str] = []

    def subject(name: str, values: list[float]):
        numbers = cycle(values)

        def measure() -> dict[str, float]:
            calls.append(name)
            return {"ns": next(numbers), "calls": 1.0}

        return measure

    found = quiet("full").in_turn("it", {"a": subject("a", [1, 2, 3]), "b": subject("b", [2, 4, 6])}, 3)
    assert calls == ["a", "b"] * 3
    assert found["ns"]["b"].samples == [2, 4, 6]
    assert Table("k", "t", "ns", list(found["ns"].values()), baseline="a").ratio(found["ns"]["b"]) == [2, 2, 2]
    assert found["calls"]["a"].samples == [1, 1, 1]


def test_a_disturbed_measurement_is_made_again():
    """The calm one counts, whether it was first or last."""
    disturbed, calm = [1.0, 9.0, 1.0, 9.0], [5.0, 5.0, 5.1, 5.0]
    context, numbers = quiet("full"), iter(disturbed + calm)
    (row,) = context.in_turn("it", {"a": lambda: {"ns": next(numbers)}}, 4)["ns"].values()
    assert (row.samples, row.disturbed, context.disturbed) == (calm, False, [])


def test_what_stays_disturbed_is_marked():
    context, numbers = quiet("full"), cycle([1.0, 9.0])
    (row,) = context.in_turn("it", {"a": lambda: {"ns": next(numbers)}}, 4)["ns"].values()
    assert row.disturbed and context.disturbed == ["it, ns: a"]
    assert "disturbed" in text(Suite("s", "S", [Table("k", "t", "ns", [row])]))


@pytest.mark.parametrize("size", AGAIN)
def test_it_is_not_made_again_for_ever(size):
    calls = []
    quiet(size).in_turn("it", {"a": lambda: calls.append(1) or {"ns": [1.0, 9.0][len(calls) % 2]}}, 4)
    assert len(calls) == 4 * (1 + AGAIN[size])


def test_spread():
    assert spread([1, 100]) == 0  # nothing to be said of two
    assert spread([10, 10, 10, 10]) == 0
    assert spread([8, 9, 10, 11, 12]) == pytest.approx(0.2)
    assert spread([5, 5, 15, 15]) > WIDE


def test_missing_tools_are_named():
    with pytest.raises(Unavailable, match="no-such-tool is not installed"):
        quiet("tiny").tool("no-such-tool")
    with pytest.raises(Unavailable, match="false failed"):
        quiet("tiny").output("false")


# ---- results ----


def test_results_are_as_the_schema_says(tmp_path):
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    made = results()  # once: the machine's load is part of it
    data = json.loads(json.dumps(made.json()))
    jsonschema.validate(data, SCHEMA)
    assert Results.of(data) == made
    for broken in ({"suites": []}, {"size": "huge"}, {"version": 0}, {"more": 1}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(data | broken, SCHEMA)


def test_every_target_has_a_line():
    lines = markdown(results()).splitlines()
    assert [line.split()[1] for line in lines if line.startswith("| P")] == list(targets.TARGETS)
    assert any(line.startswith("| P1 |") and line.endswith("| 1.82 | not reached | memory |") for line in lines)
    assert any(line.startswith("| P2 |") and "not measured in this run" in line for line in lines)


def test_report_of_the_same_results_is_the_same(tmp_path):
    same = results()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write(same, tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["micro-bars.svg", "micro-plot.svg", "report.md", "results.json"]
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    report = (tmp_path / "a" / "report.md").read_text()
    assert "| ours | 20.00 | 18.00 | 22.00 | 2.00 | 1.50 - 2.00 |" in report
    assert "![A plot](micro-plot.svg)" in report and "- x: none" in report


def test_overview():
    assert overview(results()) == []
    peers = results()
    peers.suites.append(
        Suite(
            "peers",
            "Peers",
            [
                Table(
                    "peers-connections",
                    "",
                    "1/s",
                    [Row("direct", [100, 200]), Row("ours", [80, 180])],
                    "higher",
                    "direct",
                ),
                Table("peers-packets", "", "packets", [Row("ours", [16.0])]),
            ],
        )
    )
    assert overview(peers)[2:] == ["| direct | 150.0 |  |", "| ours | 130.0 (0.85) | 16.00 |"]
    assert set(overview(peers)) <= set(markdown(peers).splitlines())


def test_readme_quotes_the_report():
    """The README's table and its lines on the targets are those of the committed report, and that is whole."""
    report = run.load(ROOT / "bench/report")
    assert report.size == "full"
    assert [suite.name for suite in report.suites] == list(run.SUITES)
    made = (ROOT / "bench/report/report.md").read_text().splitlines()
    readme = (ROOT / "README.md").read_text()
    quoted = [line for line in readme.splitlines() if line in set(overview(report)) or line.startswith("| P")]
    assert set(quoted) <= set(made)
    assert set(overview(report)) <= set(quoted)
    assert [line.split()[1] for line in quoted if line.startswith("| P")] == list(targets.TARGETS)
    plots = re.findall(r"\(bench/report/(\S+\.svg)\)", readme)
    assert len(plots) >= 2
    assert all((ROOT / "bench/report" / name).exists() for name in plots)


def test_sizing_is_made_of_the_report(capsys):
    """docs/sizing.md has the tables of the committed report; mended by: crablb bench sizing bench/report."""
    assert main(["bench", "sizing", str(ROOT / "bench/report")]) == 0
    made = capsys.readouterr().out
    assert made.count("|") > 50
    assert made in (ROOT / "docs/sizing.md").read_text()


def test_sizing_of_results_that_lack_something(tmp_path, capsys):
    (tmp_path / "results.json").write_text(json.dumps(results().json()))
    assert main(["bench", "sizing", str(tmp_path)]) == 2
    assert "'crablb serve' of xsk-serve" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "written"),
    [(0, "0"), (1234567, "1,234,567"), (123.45, "123.5"), (12.345, "12.35"), (0.5, "0.500"), (0.00123, "0.00123")],
)
def test_numbers(value, written):
    assert number(value) == written


# ---- comparison ----


def test_comparison():
    said = compare(results(other=[1, 2, 3]), results(other=[4, 5, 6]))
    lines = {line.split()[0]: line.split() for line in said.splitlines() if line.startswith("  ")}
    assert lines["bare"][-2:] == ["1.000", "same"]
    assert lines["other"][-2:] == ["2.500", "worse"]
    assert compare(results(other=[4, 5, 6]), results(other=[1, 2, 3])).splitlines()[-1].endswith("better")
    empty = results()
    empty.suites[0].tables[0].key = "another"
    assert "the runs have nothing in common" in compare(results(), empty)
    empty.size = "full"
    empty.machine["cpus"] = 99
    assert "cpus differs" in compare(results(), empty) and "not of one size: tiny | full" in compare(results(), empty)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (None, "No such file"),
        ("{", "is not JSON"),
        ("[]", "not of this version"),
        ('{"version": 0}', r"its version: 0, ours: 1"),
        ('{"version": 1}', "is not what a run writes"),
        ('{"version": 1, "size": "tiny", "machine": {}, "suites": [{"tables": 3}]}', "is not what a run writes"),
    ],
)
def test_not_results(tmp_path, content, problem):
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=problem):
        run.load(path)


# ---- the command ----


@pytest.fixture
def root(monkeypatch):
    """What the command asks for; here its suites do not need it."""
    monkeypatch.setattr(os, "geteuid", lambda: 0)


def test_command(root, tmp_path, monkeypatch, capsys):
    """A suite that cannot run here is left out with its reason, and the others go on."""

    def missing(context: Context) -> Suite:
        raise Unavailable("no second core")

    suites = {
        "micro": SimpleNamespace(run=lambda context: results().suites[0], __doc__="Micro."),
        "xsk": SimpleNamespace(run=missing, __doc__="The xsk suite."),
    }
    monkeypatch.setattr(
        run, "importlib", SimpleNamespace(import_module=lambda name: suites[name.removeprefix("bench.")])
    )
    assert main(["bench", "--tiny", "--suite", "xsk", "--suite", "micro", "--out", str(tmp_path / "new/out")]) == 0
    found = run.load(tmp_path / "new/out")
    assert [suite.name for suite in found.suites] == ["micro", "xsk"]
    assert found.suites[1].left_out == ["all of it: no second core"]
    jsonschema.validate(found.json(), SCHEMA)
    said = capsys.readouterr().out
    assert said.startswith("A SYN") and "left out: all of it: no second core" in said
    assert main(["bench", "compare", str(tmp_path / "new/out"), str(tmp_path / "new/out/results.json")]) == 0


def test_bad_arguments(root, tmp_path, capsys):
    assert main(["bench", "--suite", "none"]) == 2
    assert "there is no such suite; name one of micro, xsk" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main(["bench", "--tiny", "--out", str(tmp_path / "file")]) == 2
    assert "name a folder that can be written" in capsys.readouterr().err
    assert main(["bench", "compare", str(tmp_path), str(tmp_path)]) == 2


def test_without_the_source_tree(tmp_path: Path):
    """Installed alone, the command says where the benchmarks are."""
    program = "import crablb.cli.bench as b, crablb.cli, pathlib; b.ROOT = pathlib.Path('/nonexistent'); "
    program += "raise SystemExit(crablb.cli.main(['bench']))"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "run `make bench` in crablb's source tree" in done.stderr
    assert os.geteuid() != 0 or "root" not in done.stderr
