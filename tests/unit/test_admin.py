"""The API over HTTP, at a real socket: what clients may do to it, and what servers may do to the client."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import structlog
import uvloop

from crablb import cli, lasting
from crablb.api import types
from crablb.api.client import ApiError, Client, NotRunning, UnansweredError
from crablb.control.admin import Admin, app, server
from crablb.control.admin.calls import CALLS, Stream
from crablb.control.admin.sockets import Place
from crablb.control.journal import KEPT
from crablb.control.operator import Operator
from crablb.dataplane.census import FoundFlow
from crablb.dataplane.events import Event
from crablb.errors import ConfigError, KernelError
from crablb.kernel import pins
from tests.helpers.operating import ONE, StillEngine, config, still
from tests.helpers.processes import ROOT


class Served:
    """The API of an engine that stands still, in an event loop of its own."""

    def __init__(self, path: Path, token: str = "") -> None:
        self.path, self._token = path, token
        self.operator: Operator
        self.engine: StillEngine
        self.loop: asyncio.AbstractEventLoop
        self._ready: Future[None] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()
        self._ready.result(30)

    async def _run(self) -> None:
        self.loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        self.operator, self.engine = still()
        sock = socket.socket(socket.AF_UNIX)
        sock.setblocking(False)
        sock.bind(str(self.path))
        self.listener = await server.listen(app.make(self.operator, token=self._token), sock)
        self._ready.set_result(None)
        await self._end.wait()
        await self.listener.close()
        self.operator.close()

    def do(self, work: Callable[[], Any]) -> Any:
        """In its event loop."""

        async def call() -> Any:
            return work()

        return asyncio.run_coroutine_threadsafe(call(), self.loop).result(30)

    def client(self, **more: Any) -> Client:
        return Client(self.path, **more)

    @contextlib.contextmanager
    def connected(self) -> Iterator[socket.socket]:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(30)
            sock.connect(str(self.path))
            yield sock

    def raw(self, request: bytes) -> tuple[int, Any]:
        """What is answered to bytes: the status, and what the JSON says, or the text."""
        with self.connected() as sock:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                sock.sendall(request)
            return answer(sock)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self._end.set)
        self._thread.join(30)


def answer(sock: socket.socket) -> tuple[int, Any]:
    """One answer, to its end or that of the connection."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while b"\r\n\r\n" not in data and (more := sock.recv(65536)):
            data += more
        head, _, body = data.partition(b"\r\n\r\n")
        length = next(
            (int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")),
            1 << 30,
        )
        while len(body) < length and (more := sock.recv(65536)):
            body += more
        data = head + b"\r\n\r\n" + body
    head, _, body = data.partition(b"\r\n\r\n")
    status = int(head.split()[1]) if head else 0
    with contextlib.suppress(ValueError):
        return status, json.loads(body)
    return status, body


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    served = Served(tmp_path / "api.sock")
    yield served
    served.close()


def request(method: str, path: str, body: bytes = b"", *headers: bytes) -> bytes:
    lines = [f"{method} {path} HTTP/1.1".encode(), b"host: x", b"content-length: %d" % len(body), *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


# ---- what is asked ----


def test_questions_and_changes(served):
    with served.client() as client:
        assert client.get("/v1/status", types.Status).state == "serving"
        assert len(client.get("/v1/backends", list[types.Backend], vip=ONE)) == 2
        applied = client.patch("/v1/backends/10.0.0.11", types.Applied, types.Patch(weight=3))
        assert applied.changes == [f"10.0.0.11 of {ONE}: weight 1 -> 3"]
        [event] = [e for e in client.get("/v1/events/kept", list[types.Event]) if e.kind == "weight"]
        assert event.reason.startswith("1 -> 3, by uid ")


#: Requests, and what is answered: the status, and words of the first problem.
WRONG = {
    "no such path": (request("GET", "/v2/status"), 404, "/openapi.json says what there is"),
    "method": (request("PUT", "/v1/status"), 405, "PUT is not for /v1/status; there is GET, HEAD"),
    "method of several": (request("PUT", "/v1/services"), 405, "there is GET, HEAD, POST"),
    "not JSON": (request("PATCH", "/v1/backends/10.0.0.11", b"{"), 400, "the body is not what it should be"),
    "no body": (request("PATCH", "/v1/backends/10.0.0.11"), 400, "nothing is to be changed: give weight or state"),
    "not UTF-8": (request("PATCH", "/v1/backends/10.0.0.11", b'{"state": "\xff"}'), 400, "the body is not"),
    "type": (request("PATCH", "/v1/backends/10.0.0.11", b'{"weight": "3"}'), 400, "weight: Expected `int | null`"),
    "number": (request("PATCH", "/v1/backends/10.0.0.11", b'{"weight": 1e999}'), 400, ""),
    "huge number": (request("PATCH", "/v1/backends/10.0.0.11", b'{"weight": ' + b"9" * 9999 + b"}"), 400, ""),
    "state": (request("PATCH", "/v1/backends/10.0.0.11", b'{"state": "gone"}'), 400, "state: Invalid enum value"),
    "field": (request("PATCH", "/v1/backends/10.0.0.11", b'{"wieght": 3}'), 400, "unknown field `wieght`"),
    "nested": (request("POST", "/v1/services", b'{"a":' * 5000 + b"1" + b"}" * 5000), 400, ""),
    "list": (request("POST", "/v1/services", b"[]"), 400, "Expected `object`"),
    "backend": (request("PATCH", "/v1/backends/10.0.0.1x", b'{"weight": 3}'), 404, "is not an IP address"),
    "stranger": (request("PATCH", "/v1/backends/10.0.0.19", b'{"weight": 3}'), 404, "there are: 10.0.0.11, 10.0.0.12"),
    "service": (request("GET", "/v1/services/tcp%3A%2F%2F10.0.0.100%3A81"), 404, "there are: tcp://10.0.0.100:80, "),
    "parameter": (request("GET", "/v1/backends?vip=" + ONE + "&nothing=1"), 400, "there is no parameter 'nothing'"),
    "parameter's type": (request("GET", "/v1/flows?limit=many"), 400, "limit: Expected `int`"),
    "parameter twice": (request("GET", "/v1/flows?limit=1&limit=2"), 400, "limit: is given 2 times"),
    "too long": (request("POST", "/v1/services", b" " * ((1 << 20) + 1)), 413, "longer than 1,048,576 bytes"),
    "conflict": (
        request("POST", "/v1/services", json.dumps({"address": ONE, "backends": ["10.0.0.11"]}).encode()),
        409,
        "is served already",
    ),
    "event": (request("GET", "/v1/events/kept?since=-5"), 400, "since: Expected `int` >= 0"),
    "event of a stream": (request("GET", "/v1/events?since=-5"), 400, "since: Expected `int` >= 0"),
    "weight and address": (request("PATCH", "/v1/backends/10.0.0.11*3", b'{"state": "up"}'), 404, "has a weight"),
    "weight twice": (
        request("POST", f"/v1/services/{ONE}/backends", b'{"address": "10.0.0.14*3", "weight": 2}'),
        400,
        "weight: is given twice",
    ),
    "blank configuration": (
        request("POST", "/v1/explain", b'{"client": "10.0.0.1:4", "vip": "10.0.0.100:80", "configuration": "\\n"}'),
        400,
        "",
    ),
    "blank plan": (request("POST", "/v1/plan", b" \n"), 400, "service"),
    "takeover": (request("POST", "/v1/takeover"), 409, "within another program"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(served, name):
    asked, status, words = WRONG[name]
    found, said = served.raw(asked)
    assert found == status, said
    assert words in said["problems"][0]
    assert served.raw(request("GET", "/v1/version"))[0] == 200


#: No HTTP: the connection ends, and others' do not.
GARBAGE = {
    "nothing": b"\r\n\r\n",
    "text": b"hello\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
    "version": b"GET / HTTP/x\r\n\r\n",
    "endless line": b"GET /" + b"a" * 100_000,
    "endless headers": b"GET / HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 20_000,
    "two lengths": b"GET / HTTP/1.1\r\nhost: x\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n",
    "chunks": b"POST /v1/services HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    "websocket": b"GET /v1/events HTTP/1.0\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage(served, name):
    if name == "websocket":  # is answered as if it had not asked for that
        with served.connected() as sock:
            sock.sendall(GARBAGE[name])
            assert sock.recv(15).startswith(b"HTTP/1.1 200")
    elif name == "nothing":
        with served.connected() as sock:
            sock.sendall(GARBAGE[name])
    else:
        status, said = served.raw(GARBAGE[name])
        assert status == 400 or (status == 0 and "endless" in name)  # what was not read resets the connection
        assert status == 0 or "no HTTP request" in said["problems"][0]
    assert served.raw(request("GET", "/v1/version"))[0] == 200


def test_a_fault_of_our_own_is_one_requests(served, capsys):
    served.engine.refuse = RuntimeError("a secret")
    status, said = served.raw(request("PATCH", "/v1/backends/10.0.0.11", b'{"weight": 3}'))
    assert (status, said) == (500, {"problems": ["a fault of crablb's own; its log has more"]})
    served.engine.refuse = KernelError("the kernel refuses")
    status, said = served.raw(request("PATCH", "/v1/backends/10.0.0.11", b'{"weight": 3}'))
    assert (status, said) == (503, {"problems": ["the kernel refuses"]})
    served.engine.refuse = ConfigError(["one", "two"])
    status, said = served.raw(request("PATCH", "/v1/backends/10.0.0.11", b'{"weight": 3}'))
    assert (status, said) == (400, {"problems": ["one", "two"]})


@pytest.mark.parametrize("where", ["line", "query", "headers"])
def test_a_long_head_that_comes_in_one_piece(served, where):
    much = "a" * (17 << 10)
    asked = {
        "line": request("GET", f"/{much}"),
        "query": request("GET", f"/v1/version?{much}"),
        "headers": request("GET", "/v1/version", b"", b"x: " + much.encode()),
    }[where]
    status, said = served.raw(asked)
    assert (status, said) == (431, {"problems": ["the request's line and headers are longer than 16,384 bytes"]})
    assert served.raw(request("GET", "/v1/version", b"", b"x: " + b"a" * (15 << 10)))[0] == 200


def test_head_of_a_stream_takes_no_place(served):
    for _ in range(2 * app.STREAMS):
        with served.connected() as sock:
            sock.sendall(request("HEAD", "/v1/events"))
            data = b""
            while b"\r\n\r\n" not in data:
                data += sock.recv(65536)
            assert data.startswith(b"HTTP/1.1 200")
            sock.sendall(request("GET", "/v1/version"))  # it has come to its end
            assert b"text/event-stream" in data
            assert answer(sock)[0] == 200


#: Parameters that are not set are not all there is.
EMPTY = [f"{call.path}?{name}=" for call in CALLS for name in call.query if call.method == "GET"]


@pytest.mark.parametrize("path", EMPTY)
def test_an_empty_parameter_is_refused(served, path):
    name = path.rpartition("?")[2].removesuffix("=")
    status, said = served.raw(request("GET", path))
    assert (status, said["problems"]) == (400, [f"{name}: is empty; leave it out, or say which"])


@pytest.mark.parametrize("path", ["/v1/services//backends/10.0.0.11", "/v1/backends/"])
def test_an_empty_name_is_nothing(served, path):
    status, _ = served.raw(request("PATCH", path, b'{"state": "drain"}'))
    assert status == 404
    with served.client() as client:
        assert {b.state for b in client.get("/v1/backends", list[types.Backend])} == {"up"}


def test_head_has_no_body(served):
    with served.connected() as sock:
        sock.sendall(request("HEAD", "/v1/version") + request("GET", "/v1/version"))
        data = b""
        while data.count(b"HTTP/1.1 200") < 2 or not data.endswith(b"}"):
            data += sock.recv(65536)
    assert data.count(b"{") == 1


# ---- who takes its time ----


def ended(sock: socket.socket) -> bool:
    """Whether the other side ends the connection (within the socket's timeout)."""
    try:
        while sock.recv(65536):
            pass
    except ConnectionResetError:
        pass
    return True


def test_a_head_that_does_not_come(served, monkeypatch):
    """One byte after the other does not help."""
    monkeypatch.setattr(server, "HEAD_TIME", 0.5)
    with served.connected() as silent, served.connected() as dribbling:
        stop = threading.Event()

        def dribble() -> None:
            with contextlib.suppress(OSError):
                while not stop.wait(0.05):
                    dribbling.sendall(b"G")

        thread = threading.Thread(target=dribble)
        thread.start()
        assert ended(silent)
        assert ended(dribbling)
        stop.set()
        thread.join()


def test_a_body_that_does_not_come(served, monkeypatch):
    monkeypatch.setattr(server, "ANSWER_TIME", 0.5)
    with served.connected() as sock:
        sock.sendall(b"POST /v1/services HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        assert ended(sock)


def test_an_idle_connection(served, monkeypatch):
    monkeypatch.setattr(server, "IDLE_TIME", 0.5)
    with served.connected() as sock:
        sock.sendall(request("GET", "/v1/version"))
        assert answer(sock)[0] == 200
        assert ended(sock)


def test_too_many_connections(served):
    """Whoever is first is served on; the next ones are told."""
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(served.connected()) for _ in range(server.CONNECTIONS)]
        for sock in held:
            sock.sendall(request("GET", "/v1/version"))
            assert answer(sock)[0] == 200
        status, said = served.raw(b"")
        assert status == 503
        assert "too many connections" in said["problems"][0]
        held[0].sendall(request("GET", "/v1/version"))
        assert answer(held[0])[0] == 200
        held[1].close()
        with served.client() as client:
            assert until_answered(client)


def test_another_process_listens_from_now_on(served, monkeypatch):
    """Who is answered just now has the answer, who has connected may ask once, who follows is ended; the next one waits
    for the other process."""
    answered, go = threading.Event(), asyncio.Event()

    async def slow(by: str) -> int:
        answered.set()
        await go.wait()
        return 7

    served.operator.succeed = slow
    with contextlib.ExitStack() as more:
        asks, fresh, idle = (more.enter_context(served.connected()) for _ in range(3))
        follower = more.enter_context(served.connected())
        follower.sendall(request("GET", "/v1/events"))
        said = b""
        while b": crablb" not in said:  # in one piece with the head, or after it
            said += follower.recv(1 << 16)
        idle.sendall(request("GET", "/v1/version"))
        assert answer(idle)[0] == 200
        asks.sendall(request("POST", "/v1/takeover"))
        assert answered.wait(30)
        leaving = asyncio.run_coroutine_threadsafe(served.listener.leave(), served.loop)
        assert idle.recv(1) == b""
        with contextlib.suppress(ConnectionResetError):
            while follower.recv(1 << 16):
                pass
        late = more.enter_context(socket.socket(socket.AF_UNIX))
        with pytest.raises(ConnectionRefusedError):
            late.connect(str(served.path))
        fresh.sendall(request("GET", "/v1/version"))
        assert answer(fresh)[0] == 200
        served.loop.call_soon_threadsafe(go.set)
        assert answer(asks) == (
            200,
            {"changes": [f"process 7 serves in place of process {os.getpid()}"], "warnings": []},
        )
        assert asks.recv(1) == fresh.recv(1) == b""
        leaving.result(30)


def test_who_does_not_ask_is_not_waited_for(served, monkeypatch):
    monkeypatch.setattr(server, "LEAVE", 0.1)
    with served.connected() as silent:
        served.raw(request("GET", "/v1/version"))  # it has been accepted then, and is no matter of a successor's
        for end in (served.listener.leave, served.listener.close):
            asyncio.run_coroutine_threadsafe(end(), served.loop).result(30)
        with contextlib.suppress(ConnectionResetError):
            assert silent.recv(1) == b""


def until_answered(client: Client) -> bool:
    """The end of another connection is seen in a moment."""
    for _ in range(1000):
        with contextlib.suppress(ApiError):
            return bool(client.get("/v1/version", types.Version).api)
    return False


#: Those that take a value; a stream's end is not to be waited for.
TAKE = [call for call in CALLS if call.body not in (None, str) and not isinstance(call.answer, Stream)]


@pytest.mark.parametrize("call", TAKE, ids=lambda call: call.name)
def test_no_body_is_an_empty_one(served, call):
    path = call.path.format(vip="tcp:10.0.0.100:80", address="10.0.0.11")
    status, said = served.raw(request(call.method, path))
    assert status == (200 if call.name == "drainLb" else 400)
    assert served.raw(request(call.method, path, b"{}")) == (status, said)


# ---- commands ----

#: What a variable that is not set makes of commands.
UNSET = [
    ["drain", "10.0.0.11", "--vip", ""],
    ["drain", "10.0.0.11", "--vip", "", "--wait"],
    ["drain", ""],
    ["maint", "10.0.0.11", "--vip", ""],
    ["weight", "10.0.0.11", "3", "--vip", ""],
    ["backends", ""],
    ["flows", "--client", ""],
    ["flows", "--backend", ""],
    ["flows", "--vip", ""],
    ["flows", "--count", "--client", ""],
    ["flows", "--limit", ""],
    ["events", "--since", ""],
    ["explain", "10.0.0.1:4 -> 10.0.0.100:80", "--config", ""],
    ["explain", "10.0.0.1:4 -> 10.0.0.100:80", "--config", "/dev/null"],
    ["plan", ""],
    ["plan", "/dev/null"],
    ["capture", "-w", "/dev/null", ""],
    ["capture", "-w", ""],
    ["trace", ""],
    ["trace", "10.0.0.1", "--vip", ""],
    ["status", "--iface", ""],
    ["services", "--iface", ""],
]


@pytest.mark.parametrize("words", UNSET, ids=" ".join)
def test_what_is_empty_is_not_all(served, monkeypatch, capsys, words):
    monkeypatch.setattr("crablb.cli.asking.discover", lambda name: served.path)
    assert cli.main(words) == 2
    assert capsys.readouterr().out == ""
    assert {(b.state.value, b.weight) for s in served.engine.config.services for b in s.backends} == {("up", 1)}


def test_a_drain_waits_for_flows_of_what_left_the_configuration(served, monkeypatch, capsys):
    """One flow of the backend goes on, whatever has become of the backend and the service; then it ends."""
    monkeypatch.setattr("crablb.cli.asking.discover", lambda name: served.path)
    [vip] = [s.vip for s in served.engine.config.services if str(s.vip) == ONE]
    flow = FoundFlow(1, vip, ip_address("10.0.0.11"), 5, "open")
    served.do(lambda: setattr(served.engine, "flows", [flow]))
    looks = []

    def pause(_: float) -> None:
        looks.append(None)
        if len(looks) == 1:
            served.do(lambda: served.operator.remove_backend(ONE, "10.0.0.11"))
        elif len(looks) == 2:
            served.do(lambda: served.operator.remove_service(ONE))
        else:
            served.do(
                lambda: setattr(served.engine, "flows", [replace(flow, state="ending")] if len(looks) < 4 else [])
            )
        served.do(lambda: setattr(served.operator, "_counted", None))

    monkeypatch.setattr("crablb.cli.drain.time", SimpleNamespace(monotonic=lambda: 0.0, sleep=pause))
    assert cli.main(["drain", "10.0.0.11", "--wait"]) == 0
    gone = "it is not in the configuration any more: redirected connections are not seen"
    assert [line for line in capsys.readouterr().out.splitlines() if " left" in line] == [
        "1 connection left (its server does not report: redirected connections are not seen)",
        f"1 connection left ({gone})",
        f"1 connection left (ending; forgotten within 2 minutes; {gone})",
        f"0 connections left ({gone})",
    ]
    assert len(looks) == 4


# ---- events ----


def test_events_come_as_they_happen(served):
    served.do(lambda: served.operator.journal.add(Event("weight", reason="before")))
    with served.client() as client:
        stream = client.events(0)
        assert next(stream).reason == "before"
        served.do(lambda: served.operator.journal.add(Event("state", reason="line\nbreak")))
        event = next(stream)
        assert (event.number, event.kind, event.reason) == (2, "state", "line\nbreak")


def test_events_from_now_on(served):
    served.do(lambda: served.operator.journal.add(Event("weight", reason="before")))
    with served.connected() as sock:
        sock.sendall(request("GET", "/v1/events"))
        data = b""
        while b": crablb" not in data:
            data += sock.recv(65536)
        served.do(lambda: served.operator.journal.add(Event("weight", reason="after")))
        while b"after" not in data:
            data += sock.recv(65536)
        assert b"before" not in data


def test_who_follows_and_reads_nothing(served, monkeypatch):
    """Is let go of, keeps no memory meanwhile, and others get all."""
    monkeypatch.setattr(server, "ANSWER_TIME", 1.0)
    with served.connected() as stalled, served.client() as client:
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stalled.sendall(request("GET", "/v1/events?since=0"))
        stream = client.events(0)
        number = 0
        for _ in range(2 * KEPT):
            served.do(lambda: served.operator.journal.add(Event("weight", reason="x" * 1000)))
            number = next(stream).number
        assert number == 2 * KEPT
        assert served.operator.journal.last == 2 * KEPT

        def connections() -> int:
            return sum(1 for task in asyncio.all_tasks(served.loop) if "run_asgi" in repr(task))

        for _ in range(3000):
            if served.do(connections) <= 1:
                break
            served.do(lambda: None)
            threading.Event().wait(0.01)
        assert served.do(connections) <= 1


def test_too_many_followers(served):
    with contextlib.ExitStack() as stack:
        for _ in range(app.STREAMS):
            sock = stack.enter_context(served.connected())
            sock.sendall(request("GET", "/v1/events"))
            assert sock.recv(12) == b"HTTP/1.1 200"
        status, said = served.raw(request("GET", "/v1/events"))
        assert (status, said) == (503, {"problems": ["16 follow already; end one of them"]})
    with served.client() as client:  # all others have gone
        served.do(lambda: served.operator.journal.add(Event("weight")))
        for _ in range(1000):
            with contextlib.suppress(ApiError):
                assert next(client.events(0)).kind == "weight"
                break
        else:
            pytest.fail("places of those who have gone are not given to others")


# ---- the token ----


def test_a_token(tmp_path):
    served = Served(tmp_path / "api.sock", token="a" * 32)
    try:
        for token in (None, "b" * 32, "a" * 31, "a" * 33):
            with served.client(token=token) as client, pytest.raises(ApiError, match="the token is missing") as raised:
                client.get("/v1/version", types.Version)
            assert raised.value.code == 401
        for path in ("/openapi.json", "/nothing", "/v1/events"):
            assert served.raw(request("GET", path))[0] == 401
        with served.client(token="a" * 32) as client:
            assert client.get("/v1/version", types.Version).api == 1
    finally:
        served.close()


# ---- the client, and servers that misbehave ----

OK = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"


@contextlib.contextmanager
def says(path: Path, reply: bytes | None) -> Iterator[Client]:
    """A client of a server that says this to whatever it is asked, and ends; None: nothing, and does not end."""
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(path))
    listening.listen()
    done = threading.Event()

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = listening.accept()
                with sock:
                    sock.recv(65536)
                    if reply is None:
                        done.wait(30)
                    else:
                        sock.sendall(reply)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    with Client(path, timeout=0.5 if reply is None else 10) as client:
        yield client
    done.set()
    listening.shutdown(socket.SHUT_RDWR)
    listening.close()
    thread.join(30)


REPLIES = {
    "silence": (None, "no answer within 0.5 s"),
    "nothing": (b"", "the answer broke off"),
    "garbage": (b"\xff\xfe\x00garbage\r\n\r\n", "the answer broke off"),
    "half": (OK + b"content-length: 100\r\n\r\n{", "the answer broke off"),
    "no JSON": (OK + b"content-length: 5\r\n\r\nhello", "no load balancer of this version"),
    "other JSON": (OK + b"content-length: 2\r\n\r\n[]", "no load balancer of this version"),
    "another program": (b"HTTP/1.1 404 Not Found\r\ncontent-length: 4\r\n\r\nnope", "404 Not Found"),
    "endless headers": (b"HTTP/1.1 200 OK\r\n" + b"a: b\r\n" * 1000 + b"\r\n", "the answer broke off"),
}


@pytest.mark.parametrize("name", REPLIES)
def test_servers_that_are_none(tmp_path, name):
    reply, words = REPLIES[name]
    with says(tmp_path / "s", reply) as client, pytest.raises(ApiError, match=words):
        client.get("/v1/version", types.Version)


def test_nobody_is_there(tmp_path):
    with pytest.raises(NotRunning, match="there is no such socket") as raised:
        Client(tmp_path / "none").get("/v1/version", types.Version)
    assert raised.value.status == 3
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "stale"))
    with pytest.raises(NotRunning, match="nobody listens there any more"):
        Client(tmp_path / "stale").get("/v1/version", types.Version)
    with pytest.raises(NotRunning):
        Client(tmp_path / ("long" * 100)).get("/v1/version", types.Version)


def test_one_that_takes_no_more_connections_hangs(tmp_path):
    """It is there: that is another thing than nobody."""
    with socket.socket(socket.AF_UNIX) as listening, contextlib.ExitStack() as stack:
        listening.bind(str(tmp_path / "s"))
        listening.listen(1)
        with contextlib.suppress(BlockingIOError):
            while True:
                waiting = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK))
                waiting.connect(str(tmp_path / "s"))
        client = stack.enter_context(Client(tmp_path / "s", timeout=0.2))
        with pytest.raises(ApiError, match=r"no answer within 0\.2 s, and nothing was asked") as raised:
            client.patch("/v1/backends/10.0.0.11", types.Applied, types.Patch(weight=3))
        assert raised.value.status == 2  # not sent: so nothing was changed
        client = stack.enter_context(Client(tmp_path / "s", timeout=30))
        room = threading.Timer(0.1, lambda: stack.enter_context(listening.accept()[0]))
        room.start()
        client._connect()  # waits until there is room
        room.join()


@pytest.mark.parametrize("name", ["silence", "nothing", "half"])
def test_what_became_of_a_change_is_not_known(tmp_path, name):
    with says(tmp_path / "s", REPLIES[name][0]) as client:
        for ask in (
            lambda: client.patch("/v1/backends/10.0.0.11", types.Applied, types.Patch(weight=3)),
            lambda: client.delete("/v1/services/x", types.Applied),
            lambda: client.post("/v1/reload", types.Plan),
            lambda: client.post("/v1/save", types.Applied),
            lambda: client.post("/v1/services", types.Applied, {}),
        ):
            with pytest.raises(UnansweredError, match="it is not known whether the change was made") as raised:
                ask()
            assert raised.value.status == 4
        for ask in (
            lambda: client.get("/v1/diff", types.Diff),
            lambda: client.post("/v1/plan", types.Plan, "text"),
            lambda: client.post("/v1/explain", types.Explanation, {}),
        ):
            with pytest.raises(ApiError) as raised:
                ask()
            assert raised.value.status == 2


@pytest.mark.parametrize("where", ["http://10.0.0.1", "https://", "https://[fd00::1", "ftp://x"])
def test_where_nothing_can_be_asked(where):
    with pytest.raises(ConfigError, match="neither the path of a socket nor https"):
        Client(where, "token")


def test_a_newer_load_balancer_says_more(tmp_path):
    body = b'{"version": "9", "api": 1, "pid": 1, "started": 1.0, "more": true}'
    with says(tmp_path / "s", OK + b"content-length: %d\r\n\r\n" % len(body) + body) as client:
        assert client.get("/v1/version", types.Version).version == "9"


def test_a_connection_that_was_ended_meanwhile_is_made_anew(served, monkeypatch):
    monkeypatch.setattr(server, "IDLE_TIME", 0.1)
    with served.client() as client:
        for _ in range(3):
            assert client.get("/v1/version", types.Version).api == 1
            threading.Event().wait(0.3)


# ---- settings ----


@pytest.fixture(scope="module")
def certified(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate and its key."""
    folder = tmp_path_factory.mktemp("certified")
    certificate, key = folder / "crt", folder / "key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/CN=x",
         "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    return certificate, key


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_hands_are_shaken_with_so_many_at_a_time(certified, monkeypatch, run):
    """Whoever says nothing takes a place until its time is over, and no more than there are."""
    monkeypatch.setattr(server, "CONNECTIONS", 2)
    monkeypatch.setattr(server, "HEAD_TIME", 60.0)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(*certified)
    trusting = ssl.create_default_context(cafile=str(certified[0]))
    trusting.check_hostname = False

    async def ask(port: int) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=trusting)
        writer.write(b"GET /v1/version HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        answered = await reader.read()
        writer.close()
        return answered

    async def test() -> None:
        operator, _ = still()
        sock = socket.create_server(("127.0.0.1", 0))
        sock.setblocking(False)
        port = sock.getsockname()[1]
        listener = await server.listen(app.make(operator), sock, tls)
        async with asyncio.timeout(30):
            assert (await ask(port)).startswith(b"HTTP/1.1 200")
            _, plain = await asyncio.open_connection("127.0.0.1", port)
            plain.write(b"GET / HTTP/1.1\r\n\r\n")  # no TLS: is let go of
            silent = [await asyncio.open_connection("127.0.0.1", port) for _ in range(5)]
            while len(listener._server._hands) < 2:
                await asyncio.sleep(0.001)
            asked = asyncio.create_task(ask(port))
            for _ in range(100):
                await asyncio.sleep(0.001)
                assert len(listener._server._hands) <= 2
            assert not asked.done()
            for _, writer in silent:
                writer.close()
            assert (await asked).startswith(b"HTTP/1.1 200")
            await listener.close()
            with pytest.raises(OSError):
                await ask(port)
        plain.close()
        operator.close()

    run(test())


TOKEN = "0123456789abcdef"
SETTINGS: dict[str, tuple[dict[str, str], str, str]] = {
    "well": ({}, TOKEN, ""),
    "no key": ({"admin_key": ""}, TOKEN, "admin_key is missing; admin_listen needs"),
    "key": ({"admin_key": "/dev/null"}, TOKEN, "no certificate and its key"),
    "certificate": ({"admin_cert": "/nonexistent"}, TOKEN, "No such file"),
    "no such key": ({"admin_key": "/nonexistent"}, TOKEN, "No such file"),
    "NUL": ({"admin_cert": "a\0b"}, TOKEN, "null byte"),
    "no such token": ({"admin_token_file": "/nonexistent"}, TOKEN, "No such file"),
    "short token": ({}, "short", "a token is 16 printable ASCII characters or more"),
    "token of words": ({}, "correct horse battery staple", "without spaces"),
    "group": ({"admin_group": "nobody-at-all"}, TOKEN, "there is no group 'nobody-at-all'"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_settings(tmp_path, certified, name):
    more, secret, words = SETTINGS[name]
    token = tmp_path / "token"
    token.write_text(secret)
    token.chmod(0o600)
    files = {"admin_cert": str(certified[0]), "admin_key": str(certified[1]), "admin_token_file": str(token)}
    described = replace(config(), admin_listen=(ip_address("127.0.0.1"), 0), **(files | more))
    operator, _ = still(described)
    if words:
        with pytest.raises(ConfigError, match=words):
            Admin(operator, described)
    else:
        Admin(operator, described).abandon()


def test_a_token_that_others_can_write(tmp_path, certified):
    token = tmp_path / "token"
    token.write_text(TOKEN)
    token.chmod(0o620)
    files = {"admin_cert": str(certified[0]), "admin_key": str(certified[1]), "admin_token_file": str(token)}
    described = replace(config(), admin_listen=(ip_address("127.0.0.1"), 0), **files)
    with pytest.raises(ConfigError, match=f"chmod 600 {token}"):
        Admin(still(described)[0], described)


def test_an_address_that_is_not_ours(tmp_path, certified):
    token = tmp_path / "token"
    token.write_text(TOKEN)
    token.chmod(0o600)
    files = {"admin_cert": str(certified[0]), "admin_key": str(certified[1]), "admin_token_file": str(token)}
    described = replace(config(), admin_listen=(ip_address("192.0.2.77"), 7172), **files)
    with pytest.raises(KernelError, match=r"cannot serve the API at 192\.0\.2\.77:7172: Cannot assign"):
        Admin(still(described)[0], described)


# ---- its socket ----


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """In place of /run/crablb, and of the network namespace's name."""
    monkeypatch.setattr(pins, "RUN", tmp_path / "run")
    monkeypatch.setattr(pins, "namespace", lambda: "netns-7")
    return tmp_path / "run"


def test_the_socket_has_its_names_while_it_is_there(run):
    place = Place(("eth0", "eth1"), None)
    with place.bind() as sock:
        assert [path.name for path in run.iterdir()] == [f"netns-7-eth0.{os.getpid()}.api"]
        shown = place.show()
        assert [path.name for path in shown] == ["netns-7-eth0.sock", "eth0.sock", "netns-7-eth1.sock", "eth1.sock"]
        assert all(path.samefile(run / f"netns-7-eth0.{os.getpid()}.api") for path in shown)
        assert shown[0].stat().st_mode & 0o777 == 0o600
        place.name("lan0")
        assert (run / "netns-7-lan0.sock").samefile(shown[0])
        sock.getsockname()
    place.remove()
    place.remove()
    assert list(run.iterdir()) == []


def test_what_the_dead_left_is_replaced(run):
    run.mkdir()
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(run / "netns-7-eth0.1.api"))
    (run / "netns-7-eth0.sock").symlink_to("netns-7-eth0.1.api")
    (run / "eth0.sock").symlink_to("netns-7-eth0.1.api")
    (run / "eth5.sock").symlink_to("netns-9-eth5.1.api")
    (run / "netns-7-eth0.sock.1.new").symlink_to("netns-7-eth0.1.api")  # killed in the midst
    place = Place(("eth0",), None)
    with place.bind():
        place.show()
        assert not (run / "netns-7-eth0.1.api").exists()
        assert (run / "eth0.sock").samefile(run / "netns-7-eth0.sock")
        assert not (run / "eth5.sock").is_symlink()
    place.remove()
    assert list(run.iterdir()) == []


def test_what_is_anothers_is_let_be(run):
    """A plain name that somebody answers at, or that is no link; and at the end names that are others' by then."""
    run.mkdir()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(run / "netns-9-eth0.1.api"))
        other.listen()
        (run / "eth0.sock").symlink_to("netns-9-eth0.1.api")
        (run / "eth1.sock").write_text("a file")
        place = Place(("eth0", "eth1"), None)
        with place.bind():
            assert [path.name for path in place.show()] == ["netns-7-eth0.sock", "netns-7-eth1.sock"]
            assert os.readlink(run / "eth0.sock") == "netns-9-eth0.1.api"
            (run / "netns-7-eth1.sock").unlink()
            (run / "netns-7-eth1.sock").symlink_to("netns-9-eth0.1.api")
        place.remove()
        assert sorted(path.name for path in run.iterdir()) == [
            "eth0.sock", "eth1.sock", "netns-7-eth1.sock", "netns-9-eth0.1.api",
        ]  # fmt: skip


UNSERVED = "the API is not served; the load balancer is"


@pytest.mark.parametrize("remote", [False, True], ids=["", "admin_listen"])
def test_where_there_can_be_no_socket_packets_are_served_on(run, tmp_path, certified, monkeypatch, remote):
    """It is told once, and the API is served when there can be one."""
    run.write_text("a file, where a folder should be")
    monkeypatch.setattr(lasting, "FIRST", 0.01)
    marks: list[str] = []
    monkeypatch.setattr(pins, "cannot_be_asked", marks.append)
    monkeypatch.setattr(pins, "can_be_asked", marks.remove)
    described = config()
    if remote:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        (tmp_path / "token").touch(0o600)
        (tmp_path / "token").write_text("s" * 32)
        files = dict(zip(("admin_cert", "admin_key"), map(str, certified), strict=True))
        described = replace(
            described, admin_listen=(ip_address("127.0.0.1"), port), admin_token_file=str(tmp_path / "token"), **files
        )

    async def served() -> None:
        operator, _ = still(described)
        admin = Admin(operator, described)
        with structlog.testing.capture_logs() as logs:
            admin.start()
            while len(tried) < 5:
                await asyncio.sleep(0.01)
            assert marks == ["lb-eth0"]
            run.unlink()
            run.mkdir()
            while marks:
                await asyncio.sleep(0.01)
        said = [(line["event"], line.get("reason", "")) for line in logs]
        assert [event for event, _ in said] == [UNSERVED, "the API is served"]
        assert str(run) in said[0][1]
        with Client(run / "eth0.sock") as client:
            status = await asyncio.to_thread(client.get, "/v1/status", types.Status)
        assert status.state == "serving"
        if remote:
            socket.create_connection(("127.0.0.1", port)).close()
        await admin.close()
        assert list(run.iterdir()) == []

    bind, tried = Place.bind, []
    monkeypatch.setattr(Place, "bind", lambda self: tried.append(self) or bind(self))
    asyncio.run(served())


def test_it_is_served_from_the_start_on_and_imported_aside(run, tmp_path):
    """Whoever connects before it is imported waits; the event loop does not."""
    code = f"""
import asyncio, socket, sys, threading
from pathlib import Path
from crablb.kernel import pins
pins.RUN, pins.namespace = Path({str(run)!r}), lambda: "netns-7"
from crablb.control.admin import Admin
from tests.helpers.operating import config, still
heavy = ("starlette", "uvicorn", "h11", "rich")
assert not any(name in sys.modules for name in heavy[:3])
threads = {{}}
class Finder:
    def find_spec(self, name, path=None, target=None):
        threads.setdefault(name, threading.current_thread())
sys.meta_path.insert(0, Finder())
async def main():
    operator, _ = still()
    admin = Admin(operator, config())
    admin.start()
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(pins.RUN / "eth0.sock"))
    assert "uvicorn" not in threads
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(sock, b"GET /v1/version HTTP/1.1\\r\\nhost: x\\r\\n\\r\\n")
    assert (await loop.sock_recv(sock, 12)) == b"HTTP/1.1 200"
    sock.close()
    await admin.close()
asyncio.run(main())
for name in ("starlette", "uvicorn", "h11"):
    assert threads[name] is not threading.main_thread(), name
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, timeout=60)
    assert list(run.iterdir()) == []
