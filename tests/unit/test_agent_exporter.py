"""An agent's metrics over HTTP, at a real socket."""

from __future__ import annotations

import socket
from ipaddress import ip_address

import pytest

from crablb.agent.base import Agent
from crablb.agent.metrics import Exporter


class Absent(Agent):
    """One that is not in the kernel."""

    role = "server"

    @classmethod
    def status(cls):
        return None


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("/metrics", 200),
        ("/metrics?name=x", 200),
        ("http://host/metrics", 200),
        ("HTTP://host:9117/metrics?name=x", 200),
        ("http://host", 404),
        ("http://host/", 404),
        ("http://host/x/metrics", 404),
        ("/http://host/metrics", 404),
    ],
)
def test_what_is_asked_for(target, status):
    exporter = Exporter(Absent, ip_address("127.0.0.1"), 0)
    with exporter.serving(), socket.create_connection(("127.0.0.1", exporter.port), timeout=10) as sock:
        sock.sendall(f"GET {target} HTTP/1.0\r\n\r\n".encode())
        assert sock.makefile("rb").readline().split()[1] == str(status).encode()
