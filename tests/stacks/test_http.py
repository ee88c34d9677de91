"""curl and nginx."""

from __future__ import annotations

from collections import Counter

import pytest

from crablb.lab import VIP4, VIP6
from crablb.lab.demo import make_big
from tests.stacks.nginx import PORTS, start_nginx

URL = {4: str(VIP4), 6: f"[{VIP6}]"}
SIZE = 16 << 20


@pytest.mark.parametrize("topology", ["bridge", "routed"])
def test_a_connection_a_request(make_site, topology):
    """Of so many both servers have some."""
    site = make_site(*PORTS, topology=topology)
    for server in site.lab.servers:
        start_nginx(site, server)
    for family in (4, 6):
        with site.counted(100):
            said = site.use("curl", "-sS", "-H", "Connection: close", f"http://{URL[family]}/who?[1-100]")
        seen = Counter((who, on) for who, _, on, _ in map(str.split, said.splitlines()))
        assert set(seen) == {(s.name, site.accepted_on(s, family)) for s in site.lab.servers}
        assert seen.total() == 100


@pytest.mark.parametrize("scheme, version", [("http", "--http1.1"), ("https", "--http1.1"), ("https", "--http2")])
@pytest.mark.parametrize("topology", ["bridge", "routed"])
def test_files_go_up_and_down(make_site, topology, scheme, version):
    """One connection that is kept: 50 small requests, an upload, and a download of what was uploaded."""
    site = make_site(*PORTS, topology=topology)
    folders = [start_nginx(site, server) for server in site.lab.servers]
    big, back = site.folder / "big", site.folder / "back"
    make_big(big, SIZE)
    curl = ["curl", "-sS", "-f", version, "--cacert", str(site.folder / "certificate.pem")]
    more = ["--next", "-sS", "-f", version, "--cacert", str(site.folder / "certificate.pem")]
    for family in (4, 6):
        base = f"{scheme}://{URL[family]}"
        up = f"{base}/files/up"
        with site.counted(1):
            said = site.use(*curl, f"{base}/who?[1-50]", *more, "-T", big, up, *more, "-o", back, up)
        assert {line.split()[-1] for line in said.splitlines()} == {"HTTP/2.0" if version == "--http2" else "HTTP/1.1"}
        assert len(said.splitlines()) == 50
        assert back.read_bytes() == big.read_bytes()
        arrived = [path for folder in folders if (path := folder / "up").exists()]
        assert len(arrived) == 1
        assert arrived[0].read_bytes() == big.read_bytes()
        arrived[0].unlink()
        back.unlink()


def test_streams_share_a_connection(make_site):
    """HTTP/2: 20 downloads at once, by one connection."""
    site = make_site(*PORTS)
    for server in site.lab.servers:
        make_big(start_nginx(site, server) / "big", 1 << 20)
    for family in (4, 6):
        with site.counted(1):
            site.use(
                "curl", "-sS", "-f", "--http2", "--cacert", site.folder / "certificate.pem", "--parallel",
                "--parallel-max", "20", "-o", site.folder / "back#1", f"https://{URL[family]}/files/big?[1-20]",
            )  # fmt: skip
        for number in range(1, 21):
            back = site.folder / f"back{number}"
            assert back.read_bytes() == (site.folder / "server1/big").read_bytes()
            back.unlink()
