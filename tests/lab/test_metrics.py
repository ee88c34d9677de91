"""Metrics and the status page of a running load balancer and its agents, read as Prometheus and people read them."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from crablb.api.client import discover
from crablb.lab import VIP4, Node
from crablb.lab.demo import crablb
from tests.helpers.alerts import firing, healthy_series
from tests.helpers.browser import Browser
from tests.helpers.namespaces import inside
from tests.helpers.processes import until
from tests.helpers.world import World, agent_status, command, status
from tests.unit.test_metrics import named, samples

PORT, AGENT_PORT = 9117, 9118
VIP = f"tcp://{VIP4}:80"


@pytest.fixture
def world(make_world: Callable[..., World]) -> Iterator[World]:
    world = make_world()
    yield world
    world.end()


def get(node: Node, path: str, port: int = PORT, host: str = "127.0.0.1", method: str = "GET") -> tuple[int, bytes]:
    with inside(node.netns):
        connection = http.client.HTTPConnection(host, port, timeout=10)
        try:
            connection.request(method, path)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()


def scraped(node: Node, port: int = PORT) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    code, text = get(node, "/metrics", port)
    assert code == 200
    return samples(text)


def test_a_load_balancer(world: World):
    world.servers()
    world.client()
    world.serve("--metrics-listen", f"127.0.0.1:{PORT}", "--policy", "random")
    lb, server = world.lab.lb, world.lab.servers[0]
    until(lambda: _listens(lb, PORT))
    world.echoes(VIP4, 20)
    time.sleep(1.1)  # a look is good for a second
    found, told = scraped(lb), status(world.lab)
    assert named(found, "crablb_interface_up", interface="eth0") == 1
    redirected = sum(v for (name, _), v in found.items() if name == "crablb_backend_redirects_total")
    assert redirected == 20
    by_reason = {
        dict(labels)["reason"]: value
        for (name, labels), value in found.items()
        if name == "crablb_worker_packets_total"
    }
    assert by_reason["redirected"] == 20
    rounds = sum(value for (name, _), value in found.items() if name == "crablb_worker_round_packets_count")
    assert 0 < rounds <= 21
    assert sum(value for (name, _), value in found.items() if name == "crablb_worker_packet_seconds_count") >= 1
    assert named(found, "crablb_service_backends_serving", service=VIP) == len(world.lab.servers)
    assert named(found, "process_open_fds") > 10
    assert named(found, "crablb_snapshots_published_total") >= 1
    assert named(found, "crablb_flows") == told["flows"]

    # Nothing of it is an alert.
    assert firing(healthy_series(get(lb, "/metrics")[1])) == []

    # Nothing can be changed there.
    assert get(lb, f"/v1/backends/{server.ip4}", method="PATCH")[0] == 404

    command(lb, "drain", str(server.ip4))
    until(lambda: _serves(lb, server) == 0)
    board = json.loads(get(lb, "/status.json")[1])
    backend = next(b for b in board["backends"] if b["address"] == str(server.ip4))
    assert (backend["state"], backend["serving"]) == ("drain", False)


def _serves(lb: Node, server: Node) -> float:
    return named(scraped(lb), "crablb_backend_serving", service=VIP, backend=str(server.ip4))


def _listens(node: Node, port: int) -> bool:
    with inside(node.netns), socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def test_the_page_of_a_running_one(world: World):
    """In a browser within its network namespace; at the API's socket, by a proxy, it can change something."""
    world.servers(agents=False)
    world.serve("--metrics-listen", f"127.0.0.1:{PORT}")
    lb = world.lab.lb
    until(lambda: _listens(lb, PORT))
    with inside(lb.netns), Browser() as browser:
        page = browser.open(f"http://127.0.0.1:{PORT}/")
        rows = 2 * len(world.lab.servers)
        page.until("document.querySelectorAll('tbody tr').length", lambda n: n == rows)
        assert page.run("document.getElementById('state').textContent") in ("serving", "degraded")
        assert page.run("document.querySelectorAll('tbody button').length") == 0
        with proxied(discover("eth0")) as port:
            own = browser.open(f"http://127.0.0.1:{port}/")
            own.until("document.querySelectorAll('tbody button').length", lambda n: n == rows)
            own.run("document.querySelector('tbody button').click()")
            own.until("document.getElementById('said').textContent")
            own.until("document.querySelector('tbody .word').textContent", lambda text: text == "draining")
            page.until("document.querySelector('tbody .word').textContent", lambda text: text == "draining")
            assert page.complaints == own.complaints == []


@contextmanager
def proxied(path: Path) -> Iterator[int]:
    """A UNIX socket at a port of the loopback, as ssh -L has it."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def relay(one: socket.socket, other: socket.socket) -> None:
            with suppress(OSError):
                while data := one.recv(65536):
                    other.sendall(data)
            with suppress(OSError):
                other.shutdown(socket.SHUT_WR)

        def accept() -> None:
            with suppress(OSError):
                while True:
                    near = listening.accept()[0]
                    far = socket.socket(socket.AF_UNIX)
                    far.connect(str(path))
                    for pair in ((near, far), (far, near)):
                        threading.Thread(target=relay, args=pair, daemon=True).start()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield listening.getsockname()[1]
        listening.shutdown(socket.SHUT_RDWR)
        thread.join()


def test_agents(world: World):
    server, client = world.lab.servers[0], world.lab.client
    world.servers(agents=False)
    metrics = ("--metrics", f"127.0.0.1:{AGENT_PORT}")
    world.agent(server, "server", *metrics)
    world.client(*metrics)
    world.serve()
    world.echoes(VIP4, 12)
    found = scraped(server, AGENT_PORT)
    assert named(found, "crablb_agent_installed", role="server") == 1
    assert named(found, "crablb_agent_faults", role="server") == 0
    assert named(found, "crablb_agent_events_total", role="server", event="echoed") == 12
    assert named(found, "crablb_agent_server_redirects_completed_total", vip=VIP) == 12
    assert named(found, "crablb_agent_listening", vip=VIP) == 1
    found = scraped(client, AGENT_PORT)
    assert named(found, "crablb_agent_offers_total", vip=VIP) == 12
    assert named(found, "crablb_agent_redirects_taken_total", vip=VIP) == 12
    assert named(found, "crablb_agent_redirects_completed_total", vip=VIP, backend=str(server.ip4)) == 12
    assert named(found, "crablb_agent_offers_failed_total", vip=VIP) == 0
    assert named(found, "crablb_agent_offering", vip=VIP) == 1
    assert get(client, "/", AGENT_PORT)[0] == 404
    assert get(client, "/metrics", AGENT_PORT, method="POST")[0] == 501

    # Those who connect and say nothing, or dribble, have their time, and no more.
    with inside(client.netns):
        idle = [socket.create_connection(("127.0.0.1", AGENT_PORT)) for _ in range(2)]
    idle[0].sendall(b"GET /metrics HT")
    assert scraped(client, AGENT_PORT)
    for sock in idle:
        sock.settimeout(20)
        assert sock.recv(1) == b""
        sock.close()

    # Where it cannot listen, nothing is installed.
    taken = client.run(*crablb("agent", "server", "--vip", "tcp://10.0.0.200:80", *metrics), check=False)
    assert taken.returncode == 2
    assert f"metrics at 127.0.0.1:{AGENT_PORT}: Address already in use; see who has it" in taken.stderr
    assert "server" not in agent_status(client)


def test_an_address_that_cannot_be_bound(world: World):
    lb = world.lab.lb
    with inside(lb.netns), socket.create_server(("127.0.0.1", PORT)):
        done = lb.run(
            *crablb("serve", "--iface", "eth0", "--service", f"{VIP}={world.lab.servers[0].ip4}"),
            *("--metrics-listen", f"127.0.0.1:{PORT}"),
            check=False,
        )
    assert done.returncode == 2
    assert f"cannot serve metrics at 127.0.0.1:{PORT}: Address already in use" in done.stderr
