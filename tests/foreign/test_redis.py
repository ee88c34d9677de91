"""Redis's own test suite, against a server that it did not start."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from crablb.lab import VIP4
from tests.foreign.conftest import LIMIT, ForeignSite, Result
from tests.stacks.conftest import FETCHED
from tests.stacks.test_redis import PORT, PROGRAMS, start_redis

SOURCE = FETCHED / "redis/source"

# The suite itself leaves out, for a server that it did not start, what restarts, replicates or looks into files.
LEFT_OUT = [
    "--tags", "-slow",
    # Occupies a port, which the server is to find occupied: for a server on the same host.
    "--skiptest", "CONFIG SET rollback on apply error",
    # A minute of waiting, and of calculations in the server.
    "--skiptest", "MIGRATE cached connections are released after some time",
    "--skiptest", "/[Ff]uzz", "--skiptest", "SCAN regression test for issue #4906",
    "--skipunit", "unit/geo", "--skipunit", "unit/hyperloglog", "--skipunit", "unit/latency-monitor",
]  # fmt: skip


def test_suite(make_site, way, compare):
    site = make_site(PORT, servers=1)
    server = site.lab.servers[0]
    suite = site.folder / "suite"
    shutil.copytree(SOURCE / "tests", suite / "tests")
    shutil.copy(SOURCE / "runtest", suite)
    (suite / "src").mkdir()
    for name in ("redis-cli", "redis-benchmark"):
        (suite / "src" / name).symlink_to(PROGRAMS / name)

    def fresh(host: str, *by: str) -> Result:
        # The suite leaves settings behind, which it does not come through a second time.
        redis = start_redis(site, server, *site.by)
        found = run(site, suite, host, *by)
        redis.terminate()
        redis.wait()
        return found

    def through() -> Result:
        with site.went():
            found = fresh(str(VIP4), *site.by)
        return found

    compare("redis", way, lambda: fresh(server.ip4), through)


def run(site: ForeignSite, suite: Path, host: str, *by: str) -> Result:
    done = site.lab.client.run(
        *by, "./runtest", "--host", host, "--port", str(PORT), *LEFT_OUT, cwd=suite, check=False, timeout=LIMIT
    )
    said = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
    # One that it does not come through ends the suite.
    assert "The End" in said, said[-4000:]
    failed = set(re.findall(r"^\*\*\* \[err\]: (.*) in tests/.*\.tcl$", said, re.M))
    assert bool(failed) == bool(done.returncode), said[-4000:]
    return Result(set(re.findall(r"^\[ok\]: (.*) \(\d+ ms\)$", said, re.M)) - failed, failed)
