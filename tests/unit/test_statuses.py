"""Exit statuses, and what they are decided by."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator

import pytest

from crablb.api import types
from crablb.api.client import ApiError, Client, UnansweredError
from crablb.kernel import pins
from crablb.lab import lab as labs
from crablb.lab.lab import Node


class Failing(http.server.BaseHTTPRequestHandler):
    """Answers as a load balancer that fails in the middle of what it does, or refuses to begin."""

    code = 500

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("content-length") or 0))
        body = b'{"problems": ["something"]}'
        self.send_response(self.code)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PATCH = do_DELETE = _answer

    def log_message(self, *_: object) -> None:
        """Nobody reads it."""


@pytest.fixture
def failing(monkeypatch) -> Iterator[Client]:
    server = http.server.HTTPServer(("127.0.0.1", 0), Failing)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    # In place of a UNIX socket, whose client is the same.
    monkeypatch.setattr(
        Client, "_make", lambda self, _: http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    )
    with Client("here") as client:
        yield client
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("method", "path", "code", "status"),
    [
        ("PATCH", "/v1/backends/10.0.0.11", 500, 4),
        ("POST", "/v1/reload", 500, 4),
        ("DELETE", "/v1/services/x", 500, 4),
        ("POST", "/v1/plan", 500, 2),  # which changes nothing
        ("GET", "/v1/backends", 500, 2),
        ("PATCH", "/v1/backends/10.0.0.11", 503, 2),  # it was not begun
        ("PATCH", "/v1/backends/10.0.0.11", 400, 2),
    ],
)
def test_what_is_known_of_a_change(failing, monkeypatch, method, path, code, status):
    """One that failed in the middle may have been made: that is no refusal."""
    monkeypatch.setattr(Failing, "code", code)
    with pytest.raises(ApiError) as raised:
        failing.ask(method, path, types.Applied, {} if method in ("PATCH", "POST") else None)
    assert (raised.value.status, raised.value.code) == (status, code)
    assert raised.value.problems[0] == "something"
    assert isinstance(raised.value, UnansweredError) == (status == 4)
    assert ("it is not known whether the change was made" in str(raised.value)) == (status == 4)


@pytest.mark.parametrize("first", ["begun", "cannot_be_asked"])
def test_what_a_lock_says_beside_its_owner(tmp_path, monkeypatch, first):
    """In white space, which versions of before read over; the one may come before the other."""
    path = tmp_path / "lock"
    monkeypatch.setattr(pins, "_lock_path", lambda role: path)
    pins.cannot_be_asked("lb-eth0")
    assert not path.exists()  # nobody owns it
    path.write_text("4711")
    assert not pins.has_begun("lb-eth0") and not pins.says_it_cannot_be_asked("lb-eth0")
    getattr(pins, first)("lb-eth0")
    assert pins.has_begun("lb-eth0") == (first == "begun")
    assert pins.says_it_cannot_be_asked("lb-eth0") == (first != "begun")
    pins.begun("lb-eth0") if first != "begun" else pins.cannot_be_asked("lb-eth0")
    assert pins.has_begun("lb-eth0") and pins.says_it_cannot_be_asked("lb-eth0")
    pins.can_be_asked("lb-eth0")
    assert pins.has_begun("lb-eth0") and not pins.says_it_cannot_be_asked("lb-eth0")
    assert int(path.read_bytes()[:32]) == 4711


def test_a_lab_forgets_its_own(tmp_path, monkeypatch):
    """And not what is remembered in labs whose names begin as its nodes' do."""
    monkeypatch.setattr(labs, "REMEMBERED", tmp_path)
    mine = [
        "netns-crab-a-lb-eth0.state.json",
        ".netns-crab-a-lb-eth0.state.json.new",
        "netns-crab-a-lb-eth0.state.json.corrupt-2",
        "netns-crab-a-lb-eth-1.state.json",
    ]
    others = [
        "netns-crab-a-lb-lb-eth0.state.json",
        "netns-crab-a-lb-switch-eth0.state.json.v3",
        "netns-crab-a-lb-x-server12-eth0.state.json",
        ".netns-crab-a-lb-lb-eth0.state.json.new",
        "netns-crab-b-lb-eth0.state.json",
        "eth0.state.json",
    ]
    for name in (*mine, *others):
        (tmp_path / name).touch()
    Node("a", "lb").forget()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(others)
