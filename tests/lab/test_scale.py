"""Ten thousand backends in a thousand services: what the daemon takes, and that what is asked of it is answered."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from crablb.api import types
from crablb.api.client import Client, NotRunning, discover
from tests.helpers.namespaces import inside
from tests.helpers.processes import until
from tests.helpers.world import World

#: MiB that the daemon may have when it serves.
MOST = 300


def text(weight: int = 1) -> str:
    services = []
    for s in range(1000):
        first = s * 10
        backends = [f"10.{64 + n // 62500}.{n // 250 % 250}.{n % 250 + 1}" for n in range(first, first + 10)]
        if not s:
            backends[0] += f"*{weight}"
        named = ", ".join(f'"{backend}"' for backend in backends)
        services.append(f'[[service]]\naddress = "tcp://10.100.{s // 250}.{s % 250 + 1}:80"\nbackends = [{named}]\n')
    return 'interface = "eth0"\npersist = "off"\n' + "".join(services)


def resident(daemon: subprocess.Popen[str]) -> int:
    """MiB."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{daemon.pid}/status").read_text())
    assert found
    return int(found[1]) >> 10


@pytest.mark.long
def test_ten_thousand_backends(make_world):
    world: World = make_world()
    world.lab.lb.ip("route add 10.64.0.0/10 via 10.0.0.11")
    path = world.folder / "lb.toml"
    path.write_text(text())
    daemon = world.serve(config=path)
    assert resident(daemon) < MOST

    def there() -> bool:
        try:
            with inside(world.lab.lb.netns):
                return bool(discover("eth0"))
        except NotRunning:
            return False

    until(there, 60)
    with inside(world.lab.lb.netns):
        client = Client(discover("eth0"), timeout=120)
    with client:
        assert len(client.get("/v1/backends", list[types.Backend])) == 10_000
        path.write_text(text(5))
        for answer in ("/v1/plan", "/v1/reload"):
            (only,) = client.post(answer, types.Plan).services
            assert only.backends_changed == ["10.64.0.1: weight 1 -> 5"]
        # The log has a line for a kind of news, not one for each backend.
        assert (world.folder / "serve.log").read_text().count("\n") < 1000
