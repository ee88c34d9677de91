"""h2load, nghttp2's load generator: HTTP/2 and HTTP/1.1, many streams, many connections."""

from __future__ import annotations

import re

import pytest

from crablb.lab.demo import make_big
from tests.foreign.conftest import LIMIT, ForeignSite, Result, targets
from tests.stacks.nginx import PORTS, start_nginx

# nginx answers 1,000 requests of a connection.
LOADS = {
    "HTTP/2, 50 connections": ("https", "who", "-n5000", "-c50", "-m1"),
    "HTTP/2, 100 streams": ("https", "who", "-n5000", "-c10", "-m100"),
    "HTTP/2, large": ("https", "files/big", "-n40", "-c8", "-m5"),
    "HTTP/2, small windows": ("https", "files/big", "-n8", "-c4", "-m2", "-w14", "-W14"),
    "HTTP/2, connections by and by": ("https", "who", "-n200", "-c100", "-r50"),
    "HTTP/1.1 and TLS": ("https", "who", "-n5000", "-c50", "--h1"),
    "HTTP/1.1": ("http", "who", "-n5000", "-c50", "--h1"),
    "HTTP/1.1, large": ("http", "files/big", "-n40", "-c8", "--h1"),
}


@pytest.mark.parametrize("family", [4, 6])
def test_h2load(make_site, way, family, compare):
    site = make_site(*PORTS)
    for server in site.lab.servers:
        make_big(start_nginx(site, server, run=site.by) / "big", 1 << 20)
    own, vip = targets(site.lab.servers[0])[family]

    def through() -> Result:
        with site.went(
            connections=sum(int(option[2:]) for load in LOADS.values() for option in load if "-c" in option)
        ):
            found = run(site, vip, *site.by)
        return found

    compare(f"h2load, IPv{family}", way, lambda: run(site, own), through)


def run(site: ForeignSite, host: str, *by: str) -> Result:
    """A load is well if each of its requests is."""
    found = Result()
    for name, (scheme, path, *options) in LOADS.items():
        url = f"{scheme}://{f'[{host}]' if ':' in host else host}/{path}"
        said = site.lab.client.run(*by, "h2load", *options, url, check=False, timeout=LIMIT).stdout
        total = options[0][2:]
        well = re.search(rf"requests: {total} total, .* {total} succeeded, 0 failed, 0 errored, 0 timeout", said)
        (found.passed if well else found.failed).add(name)
    return found
