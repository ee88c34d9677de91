"""What is written about configurations: it is up to date, and what it shows is accepted."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from crablb import reference
from crablb.config import load_config
from crablb.model import Config, Service, State
from crablb.options import OPTIONS, of
from tests.helpers.processes import ROOT
from tests.helpers.secret import secret

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    (f"{page.relative_to(ROOT)}:{page.read_text()[: match.start()].count(chr(10)) + 1}", match[1])
    for page in PAGES
    for match in re.finditer(r"^```toml\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
]


def test_the_reference_is_up_to_date():
    assert (ROOT / "docs" / "reference.md").read_text() == reference.reference(), (
        "run: crablb config reference > docs/reference.md"
    )


def test_the_reference_tells_of_every_option():
    text = reference.reference()
    for option in OPTIONS:
        assert f"| `{option.name}` |" in text
        assert all(f"`{flag}" in text for flag in option.flags)


def test_there_are_examples_in_the_manual():
    assert BLOCKS


@pytest.mark.parametrize(("place", "text"), BLOCKS, ids=[place for place, _ in BLOCKS])
def test_the_manual_s_examples_are_accepted(place, text, tmp_path):
    """With what they need round them: a service, and the files that they name."""
    if "[[service]]" not in text:
        text += '\n[[service]]\naddress = "tcp://10.0.0.100:80"\nbackends = ["10.0.0.11"]\n'
    load_config(written(text, tmp_path), [] if re.search(r"^interface\b", text, re.MULTILINE) else ["eth0"])


def written(text: str, folder: Path) -> Path:
    """A configuration whose key file is there."""
    key = folder / "master.key"
    secret(key, "ab" * 32)
    path = folder / "lb.toml"
    path.write_text(re.sub(r'(?m)^report_key_file = ".*"', f'report_key_file = "{key}"', text))
    return path


def test_the_example_is_accepted_as_it_is(tmp_path):
    config = load_config(written(reference.example(), tmp_path))
    assert [str(service.vip) for service in config.services] == ["tcp://10.0.0.100:80"]
    # What it does not say has its default.
    for option in of(Config):
        if not option.missing:
            assert getattr(config, option.field) == option.default
    for option in of(Service):
        if option.name not in ("address", "backends"):
            assert getattr(config.services[0], option.field) == option.default
    assert config.services[0].backends[2].state is State.DRAIN


def test_the_example_is_accepted_with_everything_in_it(tmp_path):
    text = re.sub(r"(?m)^#(?=\w)", "", reference.example())
    given = set(re.findall(r"(?m)^(\w+) = ", text))
    assert given == {o.name for scope in (Config, Service) for o in of(scope)} - {"service"}
    config = load_config(written(text, tmp_path))
    assert config.report_key == bytes.fromhex("ab" * 32)
    assert config.services[0].source_prefix == (24, 56)


# ---- the ground floor ----

GROUND = {f"crablb.{name}" for name in ("config", "errors", "model", "options", "trust", "values")} | {"crablb"}


@pytest.mark.parametrize("module", ["crablb.config", "crablb.options", "crablb.values", "crablb.model"])
def test_the_ground_floor_needs_nothing_above_it(module):
    code = f"""
import sys
sys.modules.update(dict.fromkeys(("numpy", "structlog", "cffi", "crablb._native", "crablb.kernel"), None))
import {module}
print(*(name for name in sys.modules if name.split(".")[0] == "crablb" and sys.modules[name]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) <= GROUND


def test_a_configuration_is_checked_without_numpy(tmp_path):
    path = written(reference.example(), tmp_path)
    code = f"""
import sys
sys.modules.update(dict.fromkeys(("numpy", "structlog", "crablb._native"), None))
from crablb.cli import main
raise SystemExit(main(["config", "check", {str(path)!r}]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "ok\n", "")
