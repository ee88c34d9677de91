"""PostgreSQL's own ``make installcheck-parallel``, whole: up to 20 sessions at a time."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from crablb.lab import VIP4
from tests.foreign.conftest import LIMIT, ForeignSite, Result
from tests.stacks.conftest import UNPRIVILEGED
from tests.stacks.test_postgresql import FOLDER, PORT, program, start_postgres


def test_regression(make_site, way, compare):
    site = make_site(PORT, servers=1)
    server = site.lab.servers[0]
    start_postgres(site, server, *site.by)
    suite = site.folder / "suite"
    shutil.copytree(FOLDER / "source/src/test/regress", suite)
    # The C functions that it calls.
    folders = [next(FOLDER.glob("program/usr/include/postgresql/*/server")), FOLDER / "source/src/include"]
    include = [f"-I{folder}" for folder in folders]
    subprocess.run(["gcc", "-shared", "-fPIC", "-w", *include, "regress.c", "-o", "regress.so"], cwd=suite, check=True)
    for name in ("refint.so", "autoinc.so"):
        shutil.copy(program(f"lib/{name}"), suite)

    def through() -> Result:
        with site.went():
            found = run(site, suite, str(VIP4), *site.by)
        return found

    compare("postgresql", way, lambda: run(site, suite, server.ip4), through)


def run(site: ForeignSite, suite: Path, host: str, *by: str) -> Result:
    done = site.lab.client.run(
        *UNPRIVILEGED, *by, program("lib/pgxs/src/test/regress/pg_regress"), f"--bindir={program('bin')}",
        f"--dlpath={suite}", "--schedule=parallel_schedule", "--max-concurrent-tests=20",
        f"--host={host}", f"--port={PORT}", "--user=postgres", cwd=suite, check=False, timeout=LIMIT,
    )  # fmt: skip
    # As it has said since 16, and as before.
    lines = re.findall(r"^(ok|not ok) \d+ +[-+] (\S+)", done.stdout, re.M)
    lines += [(how, name) for name, how in re.findall(r"^(?:test)? +(\S+) +\.\.\. (ok|FAILED)", done.stdout, re.M)]
    found = Result({name for how, name in lines if how == "ok"}, {name for how, name in lines if how != "ok"})
    tests = {
        name
        for line in (suite / "parallel_schedule").read_text().splitlines()
        if line.startswith("test:")
        for name in line.split()[1:]
    }
    assert found.run == tests, f"{done.stdout[-4000:]}\n{done.stderr}"
    assert bool(found.failed) == bool(done.returncode), done.stdout[-4000:]
    return found
