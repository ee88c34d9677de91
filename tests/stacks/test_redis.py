"""Redis: its benchmark.  Its own test suite is in tests/foreign."""

from __future__ import annotations

import csv
import re
import subprocess

from crablb.lab import VIP4, VIP6, Node
from tests.stacks.conftest import FETCHED, Site

PORT = 6379
PROGRAMS = FETCHED / "redis/program/usr/bin"


def start_redis(site: Site, server: Node, *run: str) -> subprocess.Popen[str]:
    """``run``: the command that runs it."""
    folder = site.folder / server.name
    folder.mkdir(exist_ok=True)
    return site.start(
        server, PORT, *run, PROGRAMS / "redis-server", "--port", str(PORT), "--bind", "*", "-::*",
        "--protected-mode", "no", "--save", "", "--dir", folder, "--enable-debug-command", "yes",
        "--enable-protected-configs", "yes", "--enable-module-command", "yes",
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
