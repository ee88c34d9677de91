"""HAProxy's own scenarios (reg-tests), by varnishtest, whose clients dial from the client's namespace: elsewhere.c."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import tempfile
from pathlib import Path

from crablb.lab import VIP4
from tests.foreign.conftest import LIMIT, ForeignSite, Result
from tests.stacks.conftest import FETCHED

SOURCE = FETCHED / "foreign/haproxy"
VARNISH = FETCHED / "foreign/varnish/usr"
#: All of its listeners at a time, of two scenarios at a time, and some to come back to late.
PORTS = range(20000, 20064)


def test_scenarios(make_site, way, compare):
    site = make_site(*PORTS, servers=1, one_cgroup=True)
    preload = site.folder / "elsewhere.so"
    source = Path(__file__).with_name("elsewhere.c")
    subprocess.run(["gcc", "-shared", "-fPIC", "-O2", "-Wall", "-Werror", "-o", preload, source, "-ldl"], check=True)

    def through() -> Result:
        # HAProxy's connections to its servers stay within the server's namespace.
        with site.went(only_these=False):
            found = run(site, preload, str(VIP4), *site.by)
        return found

    compare("haproxy", way, lambda: run(site, preload, site.lab.servers[0].ip4), through)


def run(site: ForeignSite, preload: Path, to: str, *by: str) -> Result:
    ports = site.folder / "ports"
    ports.write_bytes(struct.pack("3I", PORTS.start, len(PORTS), 0))
    settings = os.environ | {
        "CRABLB_NETNS": f"/run/netns/{site.lab.client.netns}", "CRABLB_TO": to, "CRABLB_PORTS": str(ports),
        "LD_LIBRARY_PATH": str(next(VARNISH.glob("lib/*/libvarnishapi.so.*")).parent),
        "VTEST_PROGRAM": str(VARNISH / "bin/varnishtest"), "HAPROXY_PROGRAM": "/usr/sbin/haproxy",
    }  # fmt: skip
    # mptcpize says by LD_PRELOAD as well what it wants.
    preloaded = ("sh", "-c", 'LD_PRELOAD="$LD_PRELOAD $0" exec "$@"', str(preload))
    # Not the test's own folder: the paths of HAProxy's sockets have 97 bytes.
    with tempfile.TemporaryDirectory(prefix="crablb-") as temporary:
        done = site.lab.servers[0].run(
            *by, *preloaded, "sh", "scripts/run-regtests.sh", "--v", "--j", "2", "--type", "default,bug",
            "--vtestparams", "-t60", cwd=SOURCE, env=settings | {"TMPDIR": temporary}, check=False, timeout=LIMIT,
        )  # fmt: skip
    found = Result(*(
        set(re.findall(rf"TEST (?:\./)?reg-tests/+(\S+) {how}", done.stdout))
        for how in ("passed", "(?:FAILED|TIMED OUT)")
    ))  # fmt: skip
    assert len(found.run) > 100, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return found
