"""testssl.sh: what it finds out about a server, by hundreds of handshakes, many of them broken on purpose."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from tests.foreign.conftest import LIMIT, ForeignSite, Result, targets
from tests.stacks.nginx import PORTS, start_nginx

#: Of when it ran, and of itself.
VOLATILE = {"scanTime", "HTTP_clock_skew", "TLS_timestamp", "engine_problem", "cert_expirationStatus"}


#: By family: what it looks for, and how many findings that is at the least.  All of it takes minutes, so once.
LOOKED_FOR: dict[int, tuple[list[str], int]] = {
    4: ([], 80),
    6: (["-6", "--protocols", "--server-preference", "--server-defaults", "--headers"], 40),
}


@pytest.mark.parametrize("family", [4, 6])
def test_testssl(make_site, way, family, compare):
    """One server: two have no session tickets in common."""
    site = make_site(*PORTS, servers=1)
    for server in site.lab.servers:
        start_nginx(site, server, run=site.by)
    own, vip = targets(site.lab.servers[0])[family]

    def through() -> Result:
        # Where it looks for a weakness it leaves as soon as it knows enough.
        with site.went():
            found = run(site, vip, site.folder / "through.csv", *site.by)
        return found

    compare(f"testssl.sh, IPv{family}", way, lambda: run(site, own, site.folder / "own.csv"), through)


def run(site: ForeignSite, host: str, file: Path, *by: str) -> Result:
    """A test is what it looks for with what it found, so that another finding is another test."""
    options, findings = LOOKED_FOR[6 if ":" in host else 4]
    done = site.lab.client.run(
        *by, "testssl", "--quiet", "--color", "0", "--warnings", "off", "--nodns", "none", "--csvfile", str(file),
        *options, "--ip", f"[{host}]" if ":" in host else host, f"crablb.test:{PORTS[1]}",
        check=False, timeout=LIMIT,
    )  # fmt: skip
    with open(file) as rows:
        found = {f"{row['id']}: {row['finding']}" for row in csv.DictReader(rows) if row["id"] not in VOLATILE}
    assert len(found) > findings, done.stdout[-4000:]
    return Result(found)
