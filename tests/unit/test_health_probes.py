"""What checks make of servers, sound and malicious, over loopback: every byte, second and descriptor has its bound."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from ipaddress import ip_address
from itertools import pairwise, product
from pathlib import Path

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from crablb.control.health import probes
from crablb.control.health.dialogs import Answer, Dialogs
from crablb.control.health.probes import MOST, Target, ask, quoted, said_by_agent
from crablb.model import Check, CheckKind, Vip
from tests.helpers.processes import until

VIP = Vip(ip_address("10.0.0.100"), 80)
LOCAL, LOCAL6 = ip_address("127.0.0.1"), ip_address("::1")
LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def checked(check: Check, port: int, *, address=LOCAL, loop: str = "uvloop", vip: Vip = VIP) -> Answer:
    """What a check says; nothing of it is left."""

    async def main() -> Answer:
        dialogs = Dialogs(8)
        dialogs.start()
        before = descriptors()
        answered: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        dialogs.hold(
            ask(check, Target(vip, address, address, port)),
            check.timeout,
            lambda answer, _: answered.set_result(answer),
        )
        try:
            return await asyncio.wait_for(answered, 20)
        finally:
            assert len(dialogs) == 0
            until(lambda: descriptors() <= before)  # servers here close theirs a moment later
            dialogs.close()

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        return runner.run(main())


@contextmanager
def server(serve: Callable[[socket.socket], None], address: str = "127.0.0.1") -> Iterator[int]:
    """A port where ``serve`` is given each connection in turn."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family) as listening:
        listening.settimeout(10)

        def run() -> None:
            while True:
                try:
                    connection, _ = listening.accept()
                except OSError:
                    return
                with connection, suppress(OSError):
                    connection.settimeout(10)
                    serve(connection)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            yield listening.getsockname()[1]
        finally:
            listening.shutdown(socket.SHUT_RDWR)
            thread.join(15)


def says(*parts: bytes, pause: float = 0.0) -> Callable[[socket.socket], None]:
    """Answer a request so."""

    def serve(connection: socket.socket) -> None:
        connection.recv(65536)
        for part in parts:
            connection.sendall(part)
            threading.Event().wait(pause)

    return serve


def silent(connection: socket.socket) -> None:
    while connection.recv(65536):
        pass


def resets(connection: socket.socket) -> None:
    connection.recv(65536)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def endless(connection: socket.socket) -> None:
    """Gigabytes, as fast as they are taken."""
    connection.recv(65536)
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    while True:
        connection.sendall(bytes(1 << 16))


def dribbles(connection: socket.socket) -> None:
    """Bytes of a head that never ends."""
    connection.recv(65536)
    connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
    while True:
        connection.sendall(b"a")
        threading.Event().wait(0.02)


def free_port(address: str = "127.0.0.1") -> int:
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as sock:
        sock.bind((address, 0))
        port: int = sock.getsockname()[1]
        return port


# ---- tcp ----


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("address", [LOCAL, LOCAL6])
def test_tcp(loop, address):
    closed = []

    def serve(connection: socket.socket) -> None:
        try:
            connection.recv(1)
            closed.append("end")
        except ConnectionResetError:
            closed.append("reset")

    with server(serve, str(address)) as port:
        assert checked(Check(CheckKind.TCP), port, address=address, loop=loop) == Answer(True, "connected")
        until(lambda: closed)
    assert closed == ["reset"], "a connection of a check stays in TIME_WAIT"
    assert checked(Check(CheckKind.TCP), free_port(str(address)), address=address, loop=loop) == Answer(
        False, "refused"
    )


def test_tcp_of_a_server_whose_backlog_is_full():
    with socket.socket() as listening, socket.socket() as one, socket.socket() as two:
        listening.bind(("127.0.0.1", 0))
        listening.listen(0)
        for sock in (one, two):
            sock.setblocking(False)
            sock.connect_ex(listening.getsockname())
        port = listening.getsockname()[1]
        assert checked(Check(CheckKind.TCP, timeout=0.2), port) == Answer(False, "no answer in 0.2 s")


def test_thousands_at_a_time_by_few_descriptors():
    """More than there are places, all of which are refused, or answered: one after the other, and not in one turn."""
    port = free_port()

    async def main() -> tuple[list[Answer], float]:
        dialogs = Dialogs(8)
        dialogs.start()
        answers: list[Answer] = []
        longest = 0.0
        for _ in range(3000):
            dialogs.hold(ask(Check(CheckKind.TCP), Target(VIP, LOCAL, LOCAL, port)), 1, lambda a, _: answers.append(a))
        while len(answers) < 3000:
            began = time.monotonic()
            await asyncio.sleep(0)
            longest = max(longest, time.monotonic() - began)
        dialogs.close()
        return answers, longest

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        answers, longest = runner.run(main())
    assert set(answers) == {Answer(False, "refused")}
    assert longest < 2, "seconds in one turn of the event loop"


@pytest.mark.parametrize("loop", LOOPS)
def test_an_event_loop_that_had_no_time(loop):
    """Who has answered while it stood still is not silent, though it is too late by then; and who has not is."""

    async def main(port: int, quiet: int) -> list[Answer]:
        dialogs = Dialogs(200)
        dialogs.start()
        answers: list[Answer] = []
        for to in (quiet, *(port,) * 100):
            check = Check(CheckKind.HTTP, timeout=0.5)
            dialogs.hold(ask(check, Target(VIP, LOCAL, LOCAL, to)), 0.5, lambda a, _: answers.append(a))
        for _ in range(20):  # all are connected, and have asked
            await asyncio.sleep(0)
        threading.Event().wait(2)
        async with asyncio.timeout(20):
            while len(answers) < 101:
                await asyncio.sleep(0.01)
        dialogs.close()
        return answers

    with server(says(OK)) as port, server(silent) as quiet, asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        answers = runner.run(main(port, quiet))
    assert sorted(answers) == [Answer(False, "no answer in 0.5 s")] + [Answer(True, "status 200")] * 100


# ---- http ----

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
HTTP = Check(CheckKind.HTTP, timeout=5)
SOON = Check(CheckKind.HTTP, timeout=0.3)
BODY = Check(CheckKind.HTTP, timeout=5, body="needle")

ANSWERS = {
    "ok": (HTTP, says(OK), True, "status 200"),
    "in parts": (HTTP, says(b"HTTP/1.1 2", b"00 OK\r\nConte", b"nt-Length: 0\r\n\r\n", pause=0.01), True, "status 200"),
    "HTTP/1.0": (HTTP, says(b"HTTP/1.0 204 No Content\r\n\r\n"), True, "status 204"),
    "first informational": (HTTP, says(b"HTTP/1.1 103 Early Hints\r\nA: b\r\n\r\n" + OK), True, "status 200"),
    "redirect": (HTTP, says(b"HTTP/1.1 302 Found\r\nLocation: /again\r\n\r\n"), True, "status 302"),
    "error": (HTTP, says(b"HTTP/1.1 503 Service Unavailable\r\n\r\n"), False, "status 503"),
    "not this one": (Check(CheckKind.HTTP, status=((204, 204),)), says(OK), False, "status 200"),
    "body": (BODY, says(b"HTTP/1.1 200 OK\r\n\r\nhay needle hay"), True, "status 200, and the body"),
    "body in chunks": (
        BODY,
        says(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nnee\r\n3\r\ndle\r\n0\r\n\r\n"),
        True,
        "status 200, and the body",
    ),
    "another body": (
        BODY,
        says(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nhay"),
        False,
        "status 200, and 'needle' is not in the first 64 KiB of its body",
    ),
    "needle too late": (
        BODY,
        says(b"HTTP/1.1 200 OK\r\n\r\n" + b"h" * (MOST + 1) + b"needle"),
        False,
        "status 200, and 'needle' is not in the first 64 KiB of its body",
    ),
    "endless, and nothing is asked of it": (HTTP, endless, True, "status 200"),
    "endless": (BODY, endless, False, "status 200, and 'needle' is not in the first 64 KiB of its body"),
    "silent": (SOON, silent, False, "no answer in 0.3 s"),
    "dribbles": (SOON, dribbles, False, "no answer in 0.3 s"),
    "closes": (HTTP, says(), False, "closed without an answer"),
    "resets": (HTTP, resets, False, "reset"),
    "informational without end": (
        HTTP,
        says(b"HTTP/1.1 100 Continue\r\n\r\n" * 100000),
        False,
        "no status in the first 80 KiB of the answer",
    ),
}


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("name", ANSWERS)
def test_http(name, loop):
    check, serve, ok, reason = ANSWERS[name]
    with server(serve) as port:
        assert checked(check, port, loop=loop) == Answer(ok, reason)


@pytest.mark.parametrize(
    "garbage",
    [b"\0" * 100000, b"220 smtp.example.org ESMTP\r\n", b"HTTP/1.1 banana\r\n\r\n", b"HTTP/1.1 200 OK\r\n\xff\xff\r\n",
     b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 10000, b"\x16\x03\x01\x02\x00"],
)  # fmt: skip
def test_not_http(garbage):
    with server(says(garbage)) as port:
        answer = checked(HTTP, port)
    assert answer.ok is False
    assert "HTTP" in answer.reason or "closed" in answer.reason


@pytest.mark.parametrize(
    ("check", "vip", "head"),
    [
        (HTTP, VIP, "GET / HTTP/1.1|Host: 10.0.0.100"),
        (HTTP, Vip(ip_address("fd00::100"), 8080), "GET / HTTP/1.1|Host: [fd00::100]:8080"),
        (Check(CheckKind.HTTP, method="HEAD", path="/up?a=b", host="www.example.org"), VIP,
         "HEAD /up?a=b HTTP/1.1|Host: www.example.org"),
    ],
)  # fmt: skip
def test_request(check, vip, head):
    heard = []

    def serve(connection: socket.socket) -> None:
        heard.append(connection.recv(65536).decode())
        connection.sendall(OK)

    with server(serve) as port:
        assert checked(check, port, vip=vip).ok
    assert heard[0].split("\r\n")[:2] == head.split("|")
    assert "Connection: close" in heard[0]
    assert "Accept-Encoding" not in heard[0]


STATUS_LINES = st.one_of(
    st.builds(
        lambda version, status, reason: b"HTTP/%b %d%b" % (version, status, reason),
        st.sampled_from([b"1.1", b"1.1", b"1.0", b"1.2", b"2.0", b"0.9"]),
        st.sampled_from([200, 204, 304, 302, 404, 503, 999, 100, 101, 103, 99, 1000]) | st.integers(0, 1200),
        st.sampled_from([b" OK", b"", b" ", b" No\tContent ", b" caf\xe9", b" \x7f", b" \x01", b"OK"]),
    ),
    st.sampled_from([b"HTTP/1.1  200 OK", b"http/1.1 200 OK", b" HTTP/1.1 200 OK", b"ICY 200 OK", b"", b"HTTP/1.1 20"]),
)
FIELDS = [
    b"Connection: close", b"Connection: keep-alive", b"Server:nginx", b"A:", b"A: \t b \t ", b"A: \xff", b"A: b\x0bc",
    b"A: \x00", b"A: \x1f", b"A: \x7f", b"A : b", b" folded", b"\tfolded", b"no field", b": b", b"A(: b", b"",
    b"Content-Length: 6", b"content-length:6", b"CONTENT-LENGTH: 14 ", b"Content-Length: 0", b"Content-Length: 6, 6",
    b"Content-Length: 6, 7", b"Content-Length: -6", b"Content-Length:", b"Content-Length: 6 6", b"Content-Length: 0x6",
    b"Content-Length: " + b"9" * 20, b"Content-Length: " + b"9" * 21, b"Content-Length : 6", b"Content-Lengths: 6",
    b"Transfer-Encoding: chunked", b"transfer-encoding:CHUNKED ", b"Transfer-Encoding: gzip, chunked",
    b"Transfer-Encoding:", b"Transfer-Encoding: chunked\x0b", b"Content-Length: \xb2", b"A: " + b"b" * 9000,
]  # fmt: skip
BODIES = st.sampled_from([
    b"", b"needle", b"hay needle hay", b"hay", b"hay" * 9000, b"6\r\nneedle\r\n0\r\n\r\n",
    b"3\r\nnee\r\n3\r\ndle\r\n0\r\n\r\n", b"3\r\nneedle", b"needle" + b"-" * 90000,
])  # fmt: skip
ENDS = st.sampled_from([b"\r\n"] * 30 + [b"\n", b"\r", b"\r\r\n"])


@st.composite
def answers(draw: st.DrawFn) -> list[bytes]:
    """Answers of HTTP/1 and what is somewhat like them, in the pieces in which they come; then the connection ends."""
    said = b""
    for _ in range(draw(st.sampled_from([1, 1, 1, 2]))):
        lines = [draw(STATUS_LINES), *draw(st.lists(st.sampled_from(FIELDS), max_size=4))]
        end = draw(ENDS)
        said += b"".join(line + end for line in lines) + draw(ENDS) + draw(BODIES)
    for _ in range(draw(st.sampled_from([0, 0, 1, 3]))):
        at = draw(st.integers(0, min(len(said), 200)))
        said = said[:at] + draw(st.binary(max_size=2)) + said[at + draw(st.integers(0, 2)) :]
    cuts = sorted(draw(st.lists(st.integers(1, max(1, len(said))), max_size=draw(st.sampled_from([0, 0, 3])))))
    pieces = [said[a:b] for a, b in pairwise([0, *cuts, len(said)])]
    return [piece[n : n + MOST] for piece in pieces for n in range(0, len(piece), MOST)]


class Pieces:
    """A channel that says what it was given."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = iter(pieces)

    def send(self, data: bytes) -> Iterator[None]:
        yield from ()

    def receive(self) -> Iterator[None]:
        yield from ()
        return next(self.pieces, b"")


def run(dialog: Iterator[object]) -> Answer:
    with pytest.raises(StopIteration) as end:
        next(dialog)
    return end.value.value


def both(check: Check, pieces: list[bytes]) -> tuple[Answer, Answer]:
    """What a check says, and what it says by h11 alone."""
    request, _ = probes._request(check.method, "/", "", VIP, 80)
    said = run(probes._http(Pieces(pieces), check, Target(VIP, LOCAL, LOCAL, 80)))
    return said, run(probes._by_h11(Pieces(pieces[1:]), check, request, pieces[0]))


@settings(max_examples=500)
@given(answers().filter(bool), st.sampled_from(["GET", "GET", "HEAD", "POST", "CONNECT"]),
       st.sampled_from(["", "needle", "6"]), st.sampled_from([((200, 399),), ((204, 204), (503, 503)), ((0, 999),)]),
)  # fmt: skip
def test_the_short_way_says_what_h11_does(pieces, method, body, status):
    said, by_h11 = both(Check(CheckKind.HTTP, method=method, body=body, status=status), pieces)
    assert said == by_h11


@pytest.mark.parametrize(
    ("method", "status"), [("GET", b"200"), ("GET", b"204"), ("GET", b"404"), ("GET", b"100"), ("HEAD", b"200")]
)
def test_any_two_fields(method, status):
    for body in ("", "needle"):
        check = Check(CheckKind.HTTP, method=method, body=body)
        for fields in [(), *((field,) for field in FIELDS), *product(FIELDS, repeat=2)]:
            lines = [b"HTTP/1.1 " + status + b" It", *fields, b"", b"needle"]
            said, by_h11 = both(check, [b"\r\n".join(lines)])
            assert said == by_h11, lines


@pytest.mark.parametrize("where", ["version", "phrase", "name", "value", "end"])
def test_any_byte(where):
    for byte in range(256):
        parts = {"version": b"1", "phrase": b"K", "name": b"A", "value": b"b", "end": b"\r"} | {where: bytes([byte])}
        head = b"HTTP/1.%(version)b 200 O%(phrase)b\r\nA%(name)b: b%(value)bb%(end)b\n\r\n" % {
            key.encode(): part for key, part in parts.items()
        }
        said, by_h11 = both(HTTP, [head])
        assert said == by_h11, head


SHORT = {
    "without a body": (HTTP, b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n"),
    "until its end": (HTTP, b"HTTP/1.0 200 OK\r\nServer: x (y; z)\r\nX-Empty:\r\n\r\nhay"),
    "nginx's": (HTTP, b'HTTP/1.1 200 OK\r\nServer: nginx/1.22.1\r\nDate: Fri, 27 Nov 2026 09:00:00 GMT\r\n'
                b'Content-Type: text/html\r\nContent-Length: 615\r\nETag: "65-267"\r\nAccept-Ranges: bytes\r\n\r\n<h'),
    "in chunks": (HTTP, b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nVary: *\r\n\r\n"),
    "no phrase": (HTTP, b"HTTP/1.1 503\r\n\r\n"),
    "a body": (BODY, b"HTTP/1.1 200 OK\r\ncontent-length: 14\r\n\r\nhay needle hay"),
    "a status that is not well": (BODY, b"HTTP/1.1 500 Oh\r\n\r\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", SHORT)
def test_what_goes_the_short_way(name):
    """Else it would be h11 beside itself that is held above, and 10,000 checks take twice the time."""
    assert probes._plainly(*SHORT[name]) is not None


def test_a_head_of_much_is_looked_at_once():
    """Nothing that a server says has the pattern try again and again."""
    for field in (b"a:b\r\n", b"a" * 60, b"Content-Length: 1\r\n", b"Content-Length: \t", b"a: \t "):
        began = time.process_time()
        assert probes._plainly(HTTP, (b"HTTP/1.1 200 OK\r\n" + field * MOST)[:MOST]) is None
        assert time.process_time() - began < 1


# ---- TLS ----


CA = """
[req]
distinguished_name = name
[name]
[ca]
default_ca = this
[this]
database = {folder}/index
new_certs_dir = {folder}
rand_serial = yes
default_md = sha256
policy = any
unique_subject = no
x509_extensions = more
[any]
commonName = supplied
[more]
subjectAltName = DNS:www.example.org, IP:10.0.0.100
basicConstraints = CA:true
"""


@pytest.fixture(scope="module")
def certificates(tmp_path_factory) -> Path:
    """www.example.org's and the VIP's, valid (good) and expired (old)."""
    folder = tmp_path_factory.mktemp("certificates")
    config = folder / "openssl.cnf"
    config.write_text(CA.format(folder=folder))
    (folder / "index").touch()

    def openssl(*words: str) -> None:
        subprocess.run(["openssl", *words, "-config", str(config)], check=True, capture_output=True)

    for name, ends in (("good", "20990101000000Z"), ("old", "20010101000000Z")):
        key, request, made = (str(folder / f"{name}.{kind}") for kind in ("key", "csr", "crt"))
        openssl("req", "-new", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=www", "-keyout", key, "-out", request)
        dates = ["-startdate", "20000101000000Z", "-enddate", ends]
        openssl("ca", "-batch", "-selfsign", "-notext", "-keyfile", key, "-in", request, "-out", made, *dates)
    return folder


def secure(certificates: Path, then: Callable[[socket.socket], None], name: str = "good"):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / f"{name}.crt", certificates / f"{name}.key")

    def serve(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as inside:
            then(inside)

    return serve


@pytest.mark.parametrize("loop", LOOPS)
def test_tls(certificates, loop):
    ca = str(certificates / "good.crt")
    with server(secure(certificates, lambda inside: None)) as port:
        assert checked(Check(CheckKind.TLS, timeout=5), port, loop=loop) == Answer(True, "TLSv1.3")
        trusted = Check(CheckKind.TLS, timeout=5, verify=True, ca_file=ca, sni="www.example.org")
        assert checked(trusted, port, loop=loop).ok
        # The certificate is for the VIP's address as well.
        assert checked(Check(CheckKind.TLS, timeout=5, verify=True, ca_file=ca), port, loop=loop).ok
        other = checked(Check(CheckKind.TLS, timeout=5, verify=True, ca_file=ca, sni="example.net"), port, loop=loop)
        assert other.ok is False
        assert other.reason.startswith("certificate: Hostname mismatch")
        unknown = checked(Check(CheckKind.TLS, timeout=5, verify=True, sni="www.example.org"), port, loop=loop)
        assert unknown == Answer(False, "certificate: self-signed certificate")
        nowhere = checked(Check(CheckKind.TLS, timeout=5, verify=True, ca_file="/nowhere"), port, loop=loop)
        assert nowhere.ok is None
        assert "/nowhere" in nowhere.reason


def test_expired(certificates):
    with server(secure(certificates, lambda inside: None, "old")) as port:
        check = Check(
            CheckKind.TLS, timeout=5, verify=True, ca_file=str(certificates / "old.crt"), sni="www.example.org"
        )
        answer = checked(check, port)
    assert answer.ok is False
    assert answer.reason == "certificate: certificate has expired, on Jan  1 00:00:00 2001 GMT"


def test_https(certificates):
    https = Check(CheckKind.HTTPS, timeout=5, verify=True, ca_file=str(certificates / "good.crt"), body="ok")

    def serve(inside: socket.socket) -> None:
        inside.recv(65536)
        inside.sendall(OK)

    with server(secure(certificates, serve)) as port:
        assert checked(https, port) == Answer(True, "status 200, and the body")
    with server(secure(certificates, endless)) as port:
        assert checked(https, port).reason.endswith("is not in the first 64 KiB of its body")


def test_tls_that_never_ends():
    """A server that is silent, or goes on with a handshake for ever, or is none of TLS."""
    tls = Check(CheckKind.TLS, timeout=0.3)
    with server(silent) as port:
        assert checked(tls, port) == Answer(False, "no TLS handshake in 0.3 s")
    with server(says(OK)) as port:
        answer = checked(tls, port)
        assert (answer.ok, answer.reason[:5]) == (False, "TLS: ")
    # Records of alerts that are warnings, which OpenSSL counts, and of handshakes that are incomplete.
    with server(says(b"\x16\x03\x03\x40\x00\x02\xff\xff\xff" + bytes(1 << 22))) as port:
        assert checked(Check(CheckKind.TLS, timeout=5), port).ok is False


# ---- agents ----

LINES = {
    b"up\n": (True, None, None),
    b"75%\n": (None, 75, None),
    b"up 75%\r\n": (True, 75, None),
    b"weight:50%,up\n": (True, 50, None),
    b"  UP\t100% , ready\n": (True, 100, False),
    b"drain\n": (None, None, True),
    b"maint # for a moment\n": (None, None, True),
    b"ready\n": (None, None, False),
    b"down#it is up to you\n": (False, None, None),
    b"fail\n": (False, None, None),
    b"stopped\n": (False, None, None),
    b"up down\n": (False, None, None),
    b"maxconn:30 up\n": (True, None, None),
    b"up\ndown\n": (True, None, None),
    b"up": (True, None, None),
    b"": (None, None, None),
    b"# up\n": (None, None, None),
}


@pytest.mark.parametrize("line", LINES)
def test_words_of_an_agent(line):
    answer = said_by_agent(line)
    assert (answer.ok, answer.percent, answer.drain) == LINES[line]
    assert answer.decisive is (answer.ok is not None)
    assert "unknown" not in answer.reason


def test_unknown_words_of_an_agent():
    assert said_by_agent(b"up 2000% yes") == Answer(True, "up 2000% yes (unknown: 2000% yes)", decisive=True)


@given(st.binary(max_size=3000))
def test_whatever_an_agent_says(line):
    answer = said_by_agent(line)
    assert len(answer.reason) < 300
    assert answer.reason.isprintable()
    assert answer.percent is None or 0 <= answer.percent <= 1000


def test_agent():
    check = Check(CheckKind.AGENT, port=1, timeout=0.3)

    def one(line: bytes) -> Callable[[socket.socket], None]:
        return lambda connection: connection.sendall(line)

    with server(one(b"up 20% # busy\n")) as port:
        assert checked(check, port) == Answer(True, "up 20% # busy", 20, decisive=True)
    with server(one(b"a" * 100000)) as port:
        assert checked(check, port).ok is None
    # Who is not there says nothing of its server, as with HAProxy.
    with server(silent) as port:
        assert checked(check, port) == Answer(None, "no answer in 0.3 s")
    assert checked(check, free_port()) == Answer(None, "the agent cannot be asked: connection refused")


# ---- programs ----


def script(*words: str, timeout: float = 5) -> Check:
    return Check(CheckKind.EXEC, command=("/bin/sh", "-c", " ".join(words)), timeout=timeout)


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize(
    ("check", "answer"),
    [
        (script("exit 0"), Answer(True, "exit status 0", 100)),
        (script("exit 1"), Answer(False, "exit status 1")),
        (script("echo no replica; echo more; exit 1"), Answer(False, "exit status 1: no replica")),
        (script("exit 2"), Answer(True, "exit status 2", 0)),
        (script("exit 52"), Answer(True, "exit status 52", 50)),
        (script("exit 255"), Answer(True, "exit status 255", 253)),
        (script("kill -SEGV $$"), Answer(False, "killed by SIGSEGV")),
        (script("sleep 100", timeout=0.3), Answer(False, "did not end in 0.3 s")),
        (script("trap '' TERM; while :; do :; done", timeout=0.3), Answer(False, "did not end in 0.3 s")),
        (script("sleep 100 & exit 0"), Answer(True, "exit status 0", 100)),
        (script("printf '\\033[31mred\\n'; exit 1"), Answer(False, "exit status 1: [31mred")),
        (script("head -c 30000 /dev/zero | tr '\\0' x; exit 1"), Answer(False, f"exit status 1: {'x' * 100}...")),
        (script("exec cat /dev/zero", timeout=0.3), Answer(False, "did not end in 0.3 s")),
        (
            Check(CheckKind.EXEC, command=("/nowhere",)),
            Answer(None, "cannot be run: No such file or directory", own=True),
        ),
        (Check(CheckKind.EXEC, command=("/etc/passwd",)), Answer(None, "cannot be run: Permission denied", own=True)),
        (
            script('echo "$CRABLB_VIP $CRABLB_BACKEND $CRABLB_PORT $HOME $(ls /proc/self/fd | wc -l)"; exit 1'),
            Answer(False, "exit status 1: tcp://10.0.0.100:80 127.0.0.1 8080 4"),
        ),
    ],
)
def test_exec(check, answer, loop):
    assert checked(check, 8080, loop=loop) == answer


#: How a program starts another one, and writes down its number.
STARTS = {
    "group": "sleep 100 & echo $! > {told}",
    "job control": "set -m; sleep 100 & echo $! > {told}",
    "two forks": "set -m; (sleep 100 & echo $! > {told}) & wait",
}


def alive(pid: str) -> bool:
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z"
    return False


@pytest.mark.parametrize("how", STARTS)
@pytest.mark.parametrize("late", [True, False], ids=["late", "in time"])
def test_what_a_program_starts_ends_with_it(tmp_path, late, how):
    told = tmp_path / "pid"
    text = f"{STARTS[how].format(told=told)}; {'sleep 100' if late else 'exit 0'}"
    check = Check(CheckKind.EXEC, command=("/bin/bash", "-c", text), timeout=1 if late else 5)
    assert checked(check, 80).ok is not late
    pid = told.read_text().strip()
    until(lambda: not alive(pid), 10)


def test_what_a_program_starts_ends_with_the_daemon(tmp_path):
    told = tmp_path / "pid"

    async def main() -> None:
        dialogs = Dialogs(8)
        dialogs.start()
        check = Check(CheckKind.EXEC, command=("/bin/bash", "-c", f"set -m; sleep 100 & echo $! > {told}; sleep 100"))
        dialogs.hold(ask(check, Target(VIP, LOCAL, LOCAL, 80)), 60, lambda *_: None)
        while not told.exists() or not told.read_text().strip():
            await asyncio.sleep(0)
        dialogs.close()

    asyncio.run(main())
    until(lambda: not alive(told.read_text().strip()), 10)


def test_a_process_that_waits_for_no_child():
    code = (
        "import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN);"
        "from tests.unit.test_health_probes import checked, script; print(checked(script('exit 1'), 80).ok)"
    )
    done = subprocess.run(
        [os.sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert done.stdout.strip() == "None"


@given(st.one_of(st.binary(max_size=500), st.text(max_size=500)))
def test_quoted(said):
    assert quoted(said).isprintable()
    assert len(quoted(said)) <= 103
