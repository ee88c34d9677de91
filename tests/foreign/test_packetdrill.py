"""The kernel's own scripts for packetdrill: TCP does with the agents there what it does without them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from crablb.agent.base import cgroup_root
from tests.foreign import drill
from tests.foreign.conftest import Result, direct
from tests.helpers.namespaces import Island, unique
from tests.helpers.processes import ROOT, until
from tests.stacks.conftest import FETCHED

SOURCE = FETCHED / "foreign/linux/tools/testing/selftests/net/packetdrill"

AGAIN = 2


@pytest.mark.parametrize("agents", [way for way in drill.WAYS if way != "none"])
def test_scripts(agents, tmp_path, compare):
    counts: dict[str, int] = dict.fromkeys(("offers", "redirects", "echoes"), 0)

    def through() -> Result:
        # What fails without agents is not run with them.
        known = direct("packetdrill")
        found = run(tmp_path, agents, counts, known.passed)
        assert found.run == known.passed
        # What a machine that has much to do makes fail: that fails without agents too, or passes with them, just then.
        for _ in range(AGAIN):
            if not (differing := set(found.failed)):
                break
            without, again = (run(tmp_path, way, {}, differing) for way in ("none", agents))
            found.passed |= again.passed
            found.failed -= again.passed | without.failed
            known.passed -= without.failed - again.passed
            known.failed |= without.failed - again.passed
        found.failed |= known.failed
        assert len(found.passed) > 100
        return found

    compare("packetdrill", agents, lambda: run(tmp_path, "none", {}, None), through)
    offers, redirects, echoes = counts.values()
    if agents in ("beside", "mptcp"):
        assert offers == redirects == echoes == 0, counts
    elif agents == "fallback":
        assert offers > 0 == redirects == echoes, counts
    else:
        assert offers > 0 < echoes < redirects, counts


def run(folder: Path, way: str, counts: dict[str, int], only: set[str] | None) -> Result:
    found = Result()
    for name, (verdict, why) in verdicts(folder, SOURCE, way, only, counts).items():
        (found.passed if verdict == "passed" else found.failed).add(name)
        if why:
            print(name, why)
    return found


def verdicts(
    folder: Path, scripts: Path, way: str, only: set[str] | None = None, counts: dict[str, int] | None = None
) -> dict[str, tuple[str, str]]:
    """What became of each script, and why.  ``only``: of these scripts and families, all if it is None."""
    cgroup = cgroup_root() / "crablb-lab" / unique()
    cgroup.mkdir(parents=True)
    place = folder / unique()
    place.mkdir()
    names = place / "only"
    names.write_text("\n".join(sorted(only or ())))
    try:
        with Island(place) as island:
            # Who enters has another folder to begin with.
            program = ("env", f"PYTHONPATH={ROOT}", sys.executable, "-m", "tests.foreign.drill")
            done = island.run(*program, str(scripts), way, str(cgroup), *([str(names)] if only else []), check=False)
    finally:
        (cgroup / "cgroup.kill").write_text("1")
        until(lambda: "populated 0" in (cgroup / "cgroup.events").read_text())
        os.rmdir(cgroup)
    assert not done.returncode, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    assert done.stdout, scripts
    found = {}
    for line in done.stdout.splitlines():
        said = json.loads(line)
        assert said["verdict"] in ("passed", "failed", "unsupported"), said
        found[said["name"]] = said["verdict"], said["why"]
        for name in counts or ():
            counts[name] += said.get(name, 0)  # type: ignore[index]
    return found
