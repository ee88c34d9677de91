"""Redis: its benchmark, and its own test suite."""

from __future__ import annotations

import csv
import re
import shutil
from pathlib import Path

from crablb.lab import VIP4, VIP6, Node
from tests.stacks.conftest import FETCHED, LIMIT, Site

PORT = 6379
PROGRAMS = FETCHED / "redis/program/usr/bin"
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


def start_redis(site: Site, server: Node) -> None:
    folder = site.folder / server.name
    folder.mkdir()
    site.start(
        server, PORT, PROGRAMS / "redis-server", "--port", str(PORT), "--bind", "*", "-::*", "--protected-mode", "no",
        "--save", "", "--dir", folder, "--enable-debug-command", "yes", "--enable-protected-configs", "yes",
        "--enable-module-command", "yes",
    )  # fmt: skip


def test_benchmark(make_site):
    """50 connections at a time: kept, and a new one for each request."""
    site = make_site(PORT)
    for server in site.lab.servers:
        start_redis(site, server)
    for vip in (str(VIP4), str(VIP6)):
        benchmark = [PROGRAMS / "redis-benchmark", "-h", vip, "-p", str(PORT), "-c", "50", "--csv"]
        # redis-benchmark makes a connection more, in which it asks for settings.
        with site.counted(2 * 50 + 1):
            rows = list(csv.DictReader(site.use(*benchmark, "-n", "20000", "-t", "set,get").splitlines()))
        assert [row["test"] for row in rows] == ["SET", "GET"]
        # At its end it has new ones under way.
        with site.counted(left=50):
            site.use(*benchmark, "-n", "2000", "-k", "0", "-t", "set")
    for server in site.lab.servers:
        info = server.run(str(PROGRAMS / "redis-cli"), "-h", server.ip4, "info", "stats").stdout
        assert int(re.search(r"total_connections_received:(\d+)", info)[1]) > 1000


def test_suite(make_site):
    """What fails through the load balancer has to fail without one."""
    site = make_site(PORT, servers=1)
    server = site.lab.servers[0]
    start_redis(site, server)
    suite = site.folder / "suite"
    shutil.copytree(SOURCE / "tests", suite / "tests")
    shutil.copy(SOURCE / "runtest", suite)
    (suite / "src").mkdir()
    for name in ("redis-cli", "redis-benchmark"):
        (suite / "src" / name).symlink_to(PROGRAMS / name)
    with site.counted():
        passed, failed = run(site, suite, str(VIP4), *LEFT_OUT)
    assert len(passed) > 1000
    if failed:
        units = [part for unit in {unit for _, unit in failed} for part in ("--single", unit)]
        assert failed <= run(site, suite, server.ip4, *LEFT_OUT, *units)[1]


def run(site: Site, suite: Path, host: str, *more: str) -> tuple[list[str], set[tuple[str, str]]]:
    """The tests that passed, and those that failed with their units."""
    done = site.lab.client.run(
        "./runtest", "--host", host, "--port", str(PORT), *more, cwd=suite, check=False, timeout=LIMIT
    )
    said = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
    # One that it does not come through ends the suite.
    assert "The End" in said, said[-4000:]
    failed = set(re.findall(r"^\*\*\* \[err\]: (.*) in tests/(.*)\.tcl$", said, re.M))
    assert bool(failed) == bool(done.returncode), said[-4000:]
    return re.findall(r"^\[ok\]: (.*) \(\d+ ms\)$", said, re.M), failed
