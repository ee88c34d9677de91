"""What servers tell load balancers about their connections: the messages, and who is believed."""

from __future__ import annotations

import asyncio
import hmac
import os
import re
import socket
import subprocess
import threading
from ipaddress import ip_address

import pytest
import structlog
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st

from crablb import cli, lasting
from crablb.agent import reporter
from crablb.agent.reporter import Reporter
from crablb.config import config_from_args
from crablb.control import reports as receiver
from crablb.control.reports import Reports
from crablb.errors import KernelError
from crablb.lab import VIP4, VIP6
from crablb.lab.demo import crablb
from crablb.model import Vip
from crablb.selection import reports as report
from crablb.selection.loads import Balance
from crablb.values import read_backend_key, read_master_key

A, B = ip_address("10.0.0.11"), ip_address("fd00::12")

MASTER = bytes(range(32))

VIPS = [Vip(VIP4, 80), Vip(VIP6, 443)]

numbers = st.integers(0, 2**32 - 1)


def versions(version: int, *more: st.SearchStrategy[object]) -> st.SearchStrategy[report.Message]:
    return st.builds(
        report.Message,
        st.sampled_from([report.REPORT, report.CHALLENGE, report.LEAVE]),
        st.sampled_from([A, B]),
        st.binary(min_size=8, max_size=8),
        st.binary(min_size=24, max_size=24),
        st.integers(0, 2**64 - 1),
        numbers,
        st.lists(
            st.builds(report.VipReport, st.sampled_from(VIPS), numbers, numbers, numbers, *more),
            max_size=report.MAX_ENTRIES,
        ).map(tuple),
        st.just(version),
    )


ATVIP = st.none() | st.integers(0, report.MOST_AT_VIP)
messages = versions(1) | versions(2, st.tuples(numbers, numbers), st.booleans(), st.booleans(), ATVIP)


@given(messages, st.data())
def test_a_message_survives_and_a_changed_one_does_not(message, data):
    key = report.derive(MASTER, message.backend)
    wire = message.encode(key)
    assert len(wire) <= 1232
    assert report.Message.decode(wire, key) == message
    bit = data.draw(st.integers(0, 8 * len(wire) - 1))
    changed = bytearray(wire)
    changed[bit // 8] ^= 1 << bit % 8
    cut = wire[: data.draw(st.integers(0, len(wire) - 1))]
    for bad in (bytes(changed), cut, wire + b"x"):
        with pytest.raises(report.Refused):
            report.Message.decode(bad, key)


@given(st.binary(max_size=200))
def test_rubbish_is_refused(data):
    judge = report.Judge(MASTER)
    judge.follow([A])
    for wire in (data, b"CRLR\x01" + data):
        with pytest.raises(report.Refused):
            judge.judge(wire)


class Sender:
    """An agent's side, without a network."""

    def __init__(self, backend=A, master: bytes = MASTER) -> None:
        self.backend, self.key = backend, report.derive(master, backend)
        self.session, self.challenge, self.number = os.urandom(8), report.NO_CHALLENGE, 0

    def report(self, open_: int = 0) -> bytes:
        self.number += 1
        vips = (report.VipReport(VIPS[0], open_),)
        return report.Message(report.REPORT, self.backend, self.session, self.challenge, self.number, 0, vips).encode(
            self.key
        )

    def hear(self, wire: bytes | None) -> None:
        if wire:
            message = report.Message.decode(wire, self.key)
            if message.kind == report.CHALLENGE and message.session == self.session:
                self.challenge = message.challenge


def believed(judge: report.Judge, wire: bytes) -> int | str:
    """Connections that the report is believed to tell; else why not."""
    try:
        message, answer = judge.judge(wire)
    except report.Refused as refused:
        return refused.counter
    return message.vips[0].open if message else "challenged" if answer else "nothing"


def acquainted() -> tuple[report.Judge, Sender]:
    judge, sender = report.Judge(MASTER), Sender()
    judge.follow([A, B])
    sender.hear(judge.judge(sender.report())[1])
    return judge, sender


def test_who_is_believed():
    judge, sender = acquainted()
    assert believed(judge, sender.report(5)) == 5
    assert believed(judge, Sender(master=bytes(32)).report()) == "reports_forged"
    assert believed(judge, Sender(ip_address("10.0.0.99")).report()) == "reports_unknown"
    # One backend's key is of no use for another.
    liar = Sender(B)
    liar.backend = A
    assert believed(judge, liar.report()) == "reports_forged"
    judge.follow([B])
    assert believed(judge, sender.report(6)) == "reports_unknown"
    # Its own challenge is no report.
    judge.follow([A])
    _, challenge = judge.judge(Sender().report())
    assert believed(judge, challenge) == "reports_malformed"


#: What an agent of before sends: version 1, with a connection and one that is half open.
OLD = (
    "43524c5201010001" "00000000000000000000ffff0a00000b" + "5e" * 8 + "00" * 24 + "0000000000000001" "000001f4"
    "00000000000000000000ffff0a000064" "0050" "0000" "00000001" "00000001" "00000000"
)  # fmt: skip


def test_an_agent_of_before_is_understood():
    key = report.derive(MASTER, A)
    wire = bytes.fromhex(OLD)
    wire += hmac.digest(key, wire, "sha256")
    message = report.Message.decode(wire, key)
    assert message.vips == (report.VipReport(VIPS[0], 1, 1, 0, None, None),)
    judge = report.Judge(MASTER)
    judge.follow([A])
    _, challenge = judge.judge(wire)
    assert challenge[4] == 1  # it would not understand another


def test_a_version_of_tomorrow_is_refused():
    judge, sender = acquainted()
    wire = bytearray(sender.report())
    wire[4] = 3
    assert believed(judge, bytes(wire)) == "reports_malformed"


def test_nothing_is_believed_twice():
    judge, sender = acquainted()
    old, new = sender.report(1), sender.report(2)
    assert believed(judge, new) == 2
    for replayed in (new, old, new):  # duplicated, reordered
        assert believed(judge, replayed) == "reports_replayed"
    # The agent is started anew; what the one before had said stays said.
    again = Sender()
    again.hear(judge.judge(again.report())[1])
    later = sender.report(3)
    assert believed(judge, again.report(7)) == 7
    for replayed in (new, later):
        assert believed(judge, replayed) == "reports_replayed"
    # And so when the load balancer is: a recorded report is challenged, which its sender is not there to answer.
    judge = report.Judge(MASTER)
    judge.follow([A])
    assert believed(judge, new) == "challenged"
    recorded = again.report(8)
    assert believed(judge, recorded) == "challenged"
    again.hear(judge.judge(again.report(9))[1])
    assert believed(judge, again.report(10)) == 10
    assert believed(judge, recorded) == "challenged"
    # A replayed challenge of the load balancer before costs one report.
    stale = report.Judge(MASTER)
    stale.follow([A])
    again.hear(stale.judge(again.report())[1])
    again.hear(judge.judge(again.report())[1])
    assert believed(judge, again.report(11)) == 11


def test_nothing_recorded_is_believed_when_its_backend_comes_back():
    """What was challenged before is challenged again, and the server goes on."""
    judge, sender = acquainted()
    told, kept_back = sender.report(1), sender.report(2)
    assert believed(judge, told) == 1
    judge.follow([A, B])  # as a reload does that changes others
    assert believed(judge, sender.report(3)) == 3
    judge.follow([B])
    judge.follow([A, B])
    for recorded in (told, kept_back):
        assert believed(judge, recorded) == "challenged"
    sender.hear(judge.judge(sender.report(4))[1])
    assert believed(judge, sender.report(5)) == 5


@pytest.mark.parametrize("connections", [2**31, 2**32 - 1, 2 * (2**32 - 1)])
def test_counts_near_the_end_of_their_bits(connections):
    """As large as a report can say; the mean that others get is multiplied by their weights."""
    (service,) = config_from_args(["eth0"], ["tcp://10.0.0.100:80=10.0.0.11,10.0.0.12*1000"]).services
    balance = Balance()
    balance.report(service.vip, A, connections, 2**32 - 1)
    balance.heard(A, 0.0)
    balance.age(service)
    balance.load(service.vip, A).assigned += 5
    for backend in service.backends:
        read = balance.read(service.vip, backend.address)
        assert 2**31 - 1 <= read.open < 2**32


def test_refused_senders_are_named_for_ever(monkeypatch):
    """However many there were: a hundred in a while, then that there are more, and others later."""
    now = [0.0]
    monkeypatch.setattr(receiver.time, "monotonic", lambda: now[0])
    with structlog.testing.capture_logs() as logs:
        reports = receiver.Reports(Counting(), MASTER)
        for n in range(3000):
            reports.datagram_received(b"rubbish", (f"10.1.{n // 250}.{n % 250}", 1))
            reports.datagram_received(b"rubbish", ("10.1.0.0", 1))
        assert [line["event"] for line in logs].count("report refused") == 100
        assert len(logs) == 101
        assert logs[-1]["seconds"] == 600
        logs.clear()
        now[0] = 601.0
        reports.datagram_received(b"rubbish", ("10.9.9.9", 1))
        assert [line["sender"] for line in logs] == ["10.9.9.9"]


class Counting:
    """In place of an engine."""

    def count(self, what):
        assert what == "reports_malformed"


def test_keys_are_made_for_their_owner_alone(tmp_path, capsys):
    """Whatever the umask; a file that is there is not lost."""
    master, own = tmp_path / "master", tmp_path / "own"
    before = os.umask(0)
    try:
        assert cli.main(["key", "new", "-o", str(master)]) == 0
        assert cli.main(["key", "backend", "10.0.0.11", "--master", str(master), "-o", str(own)]) == 0
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (master, own)] == [0o600, 0o600]
    key = read_master_key(master)
    assert read_backend_key(own) == report.derive(key, A)
    assert cli.main(["key", "new", "-o", str(master)]) == 2
    assert "is there already; remove it" in capsys.readouterr().err
    assert read_master_key(master) == key
    for path, why in ((tmp_path / "no" / "key", "No such file or directory"), ("/dev/full/x", "Not a directory")):
        assert cli.main(["key", "new", "-o", str(path)]) == 2
        assert f"cannot be made: {why}" in capsys.readouterr().err


@given(st.randoms(use_true_random=False), st.floats(0, 0.6))
@settings(max_examples=50)
def test_a_lossy_network(random, loss):
    """Lost, late, doubled: what is believed only goes forward, and the end is known once it comes through."""
    judge, sender = report.Judge(MASTER), Sender()
    judge.follow([A])
    air: list[bytes] = []
    last, value = -1, 0
    for value in range(60):
        air += [sender.report(value)] * random.choice([1, 1, 2])
        random.shuffle(air)
        for wire in [air.pop() for _ in range(random.randrange(len(air) + 1))]:
            if random.random() < loss:
                continue
            try:
                message, answer = judge.judge(wire)
            except report.Refused as refused:
                assert refused.counter == "reports_replayed"
                continue
            if answer and random.random() >= loss:
                sender.hear(answer)
            if message:
                assert message.vips[0].open > last
                last = message.vips[0].open
    sender.hear(judge.judge(sender.report())[1])
    assert believed(judge, sender.report(value)) == value


BAD = {
    "alone": (["--report-key", "x"], "--report-key: of use with --report only"),
    "detached": (
        ["--report", "10.0.0.2", "--report-key", "x", "--detach"],
        "--report needs a process; leave out --detach",
    ),
    "no-key": (["--report", "10.0.0.2"], r"--report needs --report-key FILE"),
    "bad-key": (["--report", "10.0.0.2", "--report-key", "/dev/null"], "does not hold 64 hexadecimal digits"),
    "bad-address": (["--report", "lb.example", "--report-key", "/dev/null"], "'lb.example' is not an IP address"),
    "bad-port": (["--report", "10.0.0.2:0", "--report-key", "/dev/null"], "is not ADDRESS or ADDRESS:PORT"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name):
    arguments, message = BAD[name]
    done = subprocess.run(
        crablb("agent", "server", "--vip", "tcp://10.0.0.100:80", *arguments),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert re.search(message, done.stderr)
    assert "Traceback" not in done.stderr


def test_another_process_believes_who_was_believed():
    """Without another challenge; what was said before is not believed again, nor a backend that comes back."""
    judge, sender = acquainted()
    wire = sender.report(3)
    assert believed(judge, wire) == 3
    judge.follow([A])  # B is gone
    judge.follow([A, B])
    after = report.Judge(MASTER)
    after.follow([A, B])
    after.adopt(**judge.export())
    assert believed(after, wire) == "reports_replayed"
    assert believed(after, sender.report(4)) == 4
    assert after.export()["floors"] == judge.export()["floors"]
    alone = report.Judge(MASTER)
    alone.follow([B])
    alone.adopt(**judge.export())
    assert believed(alone, sender.report(5)) == "reports_unknown"
    assert alone.export()["sessions"] == []


class OldJudge(report.Judge):
    """A load balancer of before."""

    def judge(self, data: bytes):
        if data[4] != 1:
            raise report.Refused("reports_malformed")
        return super().judge(data)


def test_a_load_balancer_of_before_and_its_successor(monkeypatch):
    """It is told in its own words, and the next one in today's."""
    monkeypatch.setattr("crablb.agent.reporter.TRY_INTERVAL", 0.0)
    here = ip_address("127.0.0.1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((str(here), 0))
        sock.settimeout(20)
        told = Reporter(lambda: {VIPS[0]: 7}, lambda: {VIPS[0]: (5, 3)}, [(here, sock.getsockname()[1])],
                        report.derive(MASTER, here))  # fmt: skip
        told.start()
        try:
            heard = []
            for judge in (OldJudge(MASTER), report.Judge(MASTER)):
                judge.follow([here])
                while True:
                    data, sender = sock.recvfrom(2048)
                    try:
                        message, answer = judge.judge(data)
                    except report.Refused:
                        continue
                    if answer:
                        sock.sendto(answer, sender)
                    if message and message.vips and message.version == len(heard) + 1:
                        heard.append((message.version, message.vips[0].open, message.vips[0].redirects))
                        break
        finally:
            told.stop()
    assert heard == [(1, 7, None), (2, 7, (5, 3))]


def test_a_load_balancer_that_comes_up_late_is_told_in_todays_words():
    """It is not heard of at first, so the words of before are tried; that it understands them too is not the end."""
    here = ip_address("127.0.0.1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((str(here), 0))
        sock.settimeout(20)
        told = Reporter(lambda: {VIPS[0]: 7}, lambda: {}, [(here, sock.getsockname()[1])], report.derive(MASTER, here))
        judge = report.Judge(MASTER)
        judge.follow([here])
        told.start()
        try:
            versions = []
            while versions[-1:] != [2]:
                data, sender = sock.recvfrom(2048)
                if not versions and data[4] == 2:
                    continue  # it is not up yet
                message, answer = judge.judge(data)
                if answer:
                    sock.sendto(answer, sender)
                if message and message.vips:
                    versions.append(message.version)
        finally:
            told.stop()
    assert versions[0] == 1


def test_that_nothing_listens_any_more_is_told_at_once(monkeypatch):
    """And that something does again: neither waits for the next full report."""
    monkeypatch.setattr("crablb.agent.reporter.FULL_INTERVAL", 1e6)
    here = ip_address("127.0.0.1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, socket.create_server(("127.0.0.1", 0)) as server:
        sock.bind((str(here), 0))
        sock.settimeout(20)
        vip = Vip(here, server.getsockname()[1])
        told = Reporter(lambda: {vip: 7}, lambda: {}, [(here, sock.getsockname()[1])], report.derive(MASTER, here))
        judge = report.Judge(MASTER)
        judge.follow([here])

        def listening(wanted: bool) -> None:
            while True:
                data, sender = sock.recvfrom(2048)
                message, answer = judge.judge(data)
                if answer:
                    sock.sendto(answer, sender)
                if message and message.vips[0].listening is wanted:
                    return

        told.start()
        try:
            listening(True)
            server.close()
            listening(False)
            with socket.create_server((str(here), vip.port)):
                listening(True)
        finally:
            told.stop()


def test_reports_go_on_after_a_failure(monkeypatch):
    """What it tells cannot be read for a moment; and one of its load balancers refuses what is sent."""
    monkeypatch.setattr(lasting, "FIRST", 0.0)
    here = ip_address("127.0.0.1")
    failures = [MemoryError("none left"), OSError("gone"), RuntimeError("strange")]

    def connections():
        if failures:
            raise failures.pop()
        return {VIPS[0]: 7}

    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as nobody,
    ):
        for one in (sock, nobody):
            one.bind((str(here), 0))
        sock.settimeout(20)
        targets = [(here, nobody.getsockname()[1]), (here, sock.getsockname()[1])]
        nobody.close()  # ECONNREFUSED from now on
        told = Reporter(connections, lambda: {}, targets, report.derive(MASTER, here))
        told.start()
        try:
            for _ in range(3):
                assert sock.recv(2048)
            assert not failures
        finally:
            told.stop()


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_taking_reports_goes_on_after_a_failure(run):
    counted, failures = [], [MemoryError("none left"), OSError("gone")]

    class Engine:
        def count(self, what):
            if failures:
                raise failures.pop()
            counted.append(what)

    async def main() -> None:
        taker = Reports(Engine(), MASTER)
        taker.follow([])
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        taker.bind(ip_address("127.0.0.1"), port)
        await taker.start()
        asyncio.get_running_loop().set_exception_handler(lambda *_: None)
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                async with asyncio.timeout(20):
                    while len(counted) < 3:
                        sock.sendto(b"rubbish", ("127.0.0.1", port))
                        await asyncio.sleep(0.01)
        finally:
            taker.close()

    run(main())
    assert not failures


# ---- "leave" ----


class Served:
    """In place of an engine and of a socket."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def count(self, what):
        pass

    def report(self, *_):
        return False

    def sendto(self, data, _):
        self.sent.append(data)


def drained(vips=VIPS) -> tuple[Reports, Served]:
    """A load balancer that is being drained, of which A and B serve VIPs."""
    served = Served()
    reports = Reports(served, MASTER)
    reports.follow(
        config_from_args(["eth0"], [f"{vip}={A if vip.address.version == 4 else B}" for vip in vips]).services
    )
    reports.connection_made(served)
    reports.leaving = True
    return reports, served


def answers(reports: Reports, served: Served, wire: bytes, key: bytes) -> list[report.Message]:
    served.sent.clear()
    reports.datagram_received(wire, ("10.0.0.11", 1))
    return [report.Message.decode(data, key) for data in served.sent]


def test_who_is_told_to_leave():
    """Whoever is believed, of the services' VIPs that it speaks of; and nobody once it is over."""
    reports, served = drained()
    sender = Sender()
    (challenge,) = answers(reports, served, sender.report(), sender.key)
    assert challenge.kind == report.CHALLENGE
    sender.challenge = challenge.challenge
    wire = sender.report()
    (leave,) = answers(reports, served, wire, sender.key)
    assert (leave.kind, leave.session, leave.number) == (report.LEAVE, sender.session, sender.number)
    assert leave.challenge == sender.challenge
    assert [v.vip for v in leave.vips] == VIPS[:1]
    assert answers(reports, served, wire, sender.key) == []  # replayed
    assert answers(reports, served, Sender(master=bytes(32)).report(), sender.key) == []
    # Of no service.
    sender.number += 1
    other = report.VipReport(Vip(VIP4, 81), 3)
    wire = report.Message(
        report.REPORT, A, sender.session, sender.challenge, sender.number, 0, (other,)
    ).encode(sender.key)  # fmt: skip
    assert answers(reports, served, wire, sender.key) == []
    reports.leaving = False
    assert answers(reports, served, sender.report(), sender.key) == []


def test_who_leads_clients_away():
    """As each report says; a load balancer forgets it with the service."""
    reports, served = drained()
    sender = Sender()
    sender.hear((reports.datagram_received(sender.report(), ("10.0.0.11", 1)), served.sent[-1])[1])
    for leads in (True, False, True):
        sender.number += 1
        said = (report.VipReport(VIPS[0], 1, redirects=(0, 0), listening=True, leads=leads),)
        told = report.Message(report.REPORT, A, sender.session, sender.challenge, sender.number, 0, said)
        reports.datagram_received(told.encode(sender.key), ("10.0.0.11", 1))
        assert reports.leading == ({(VIPS[0], A)} if leads else set())
    reports.follow([])
    assert not reports.leading


class Target:
    """An agent's idea of one load balancer, at given times."""

    def __init__(self, challenge: bytes = b"c" * 24) -> None:
        self.target = reporter._Target(ip_address("127.0.0.1"), 7171, A)
        self.target.socket.close()
        self.target.challenge = challenge

    def send(self, now: float, parts: int = 1) -> None:
        self.target.sends(now)
        self.target.number += parts

    def leave(self, number: int, now: float, *, challenge: bytes = b"c" * 24, vips=VIPS[:1]) -> bool:
        told = tuple(report.VipReport(vip, 0) for vip in vips)
        return self.target.hears_leave(report.Message(report.LEAVE, A, b"s" * 8, challenge, number, 0, told), now)

    def held(self, now: float) -> set[Vip]:
        return {vip for vip, until in self.target.leaving.items() if until >= now}


def test_what_an_agent_believes():
    """Of a report of the last seconds that no later one was answered of; by the load balancer that it was sent to."""
    one = Target()
    for second in range(20):
        one.send(float(second))
    assert not one.leave(21, 19.5)  # a number that was not sent
    assert not one.leave(20, 19.5, challenge=b"d" * 24)  # another load balancer's, or one's that was before
    assert not one.leave(14, 19.5)  # sent at 13: too old
    assert not one.held(19.5)
    assert one.leave(18, 19.5)
    assert one.held(19.5) == {VIPS[0]}
    for replayed in (18, 17):
        assert not one.leave(replayed, 19.6, vips=VIPS)
        assert one.held(19.6) == {VIPS[0]}
    assert not one.leave(19, 20.0)  # nothing new, but it holds longer
    assert one.held(25.0) == {VIPS[0]}
    assert not one.held(25.1)
    # A VIP more, in the parts of one report.
    one.send(26.0, parts=3)
    assert one.leave(21, 26.1)
    assert one.leave(23, 26.1, vips=VIPS[1:])
    assert one.held(26.2) == set(VIPS)
    # After a silence nothing that was sent before it is believed.
    assert not one.leave(23, 40.0)
    one.send(40.0)
    assert one.leave(24, 40.0)


def test_an_agent_moves_what_is_to_leave(monkeypatch):
    """At once, each second for as long as it is said, and no more when it is over; whatever comes of it."""
    monkeypatch.setattr(reporter, "FULL_INTERVAL", 0.02)
    monkeypatch.setattr(reporter, "HOLD", 0.5)
    here = ip_address("127.0.0.1")
    results = [None, KernelError("no MPTCP"), None, None]
    moved: list[list[Vip]] = []
    over = threading.Event()

    def leave(vips):
        moved.append(list(vips))
        if len(moved) == 4:
            over.set()
        if results and (result := results.pop(0)):
            raise result

    reports, served = drained([Vip(VIP4, 80)])
    with structlog.testing.capture_logs() as logs, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((str(here), 0))
        sock.settimeout(20)
        told = Reporter(lambda: {VIPS[0]: 7, VIPS[1]: 1}, lambda: {}, [(here, sock.getsockname()[1])],
                        report.derive(MASTER, A), A, None, leave, leads=True)  # fmt: skip
        told.start()
        try:
            while not over.is_set():
                data, sender = sock.recvfrom(2048)
                served.sent.clear()
                reports.datagram_received(data, sender)
                for answer in served.sent:
                    sock.sendto(answer, sender)
            reports.leaving = False
            while not any(line["event"].startswith("no load balancer") for line in logs):
                reports.datagram_received(*sock.recvfrom(2048))
        finally:
            told.stop()
    assert {tuple(vips) for vips in moved} == {(VIPS[0],)}
    assert (VIPS[0], A) in reports.leading
    lines = [line for line in logs if "load balancer" in line["event"]]
    assert [line["event"].split()[:3] for line in lines] == [
        ["a", "load", "balancer"],
        ["connections", "cannot", "leave"],
        ["no", "load", "balancer"],
    ]
    assert lines[0]["vips"] == [str(VIPS[0])]
    assert lines[1]["reason"] == "no MPTCP"
