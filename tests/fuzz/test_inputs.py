"""What programs, people and servers say to the daemon, changed anywhere: it is taken, or refused as it should be.

Examples that are right are changed by Hypothesis, bytes or values; it knows nothing of the code's branches, but shrinks
what fails.  ``make fuzz`` gives it more examples than ``make test`` does (EXAMPLES).
"""

from __future__ import annotations

import hmac
import json
import os
import re
import socket
import struct
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from crablb.config import config_from_table, parse_config, read_backend, read_service
from crablb.control import estate, pcapng, takeover
from crablb.control.health import probes, segments
from crablb.control.health.kept import read as read_kept
from crablb.control.journal import Journal
from crablb.control.reports import Reports
from crablb.control.state import Saved, Store
from crablb.dataplane import handover
from crablb.errors import ConfigError, KernelError
from crablb.model import Config, Vip
from crablb.overlay import Changes, Edit, MemberEdit, ServiceEdit
from crablb.selection import reports
from crablb.selection.completion import Completions
from crablb.selection.loads import Balance
from tests.helpers.processes import ROOT

EXAMPLES = int(os.environ.get("CRABLB_FUZZ_EXAMPLES", "60"))
many = settings(max_examples=EXAMPLES)

CONFIGURATIONS = [
    block.encode() for block in re.findall(r"```toml\n(.*?)```", (ROOT / "docs/configuration.md").read_text(), re.S)
]
SERVICE = parse_config(
    'interface = "eth0"\n[[service]]\naddress = "tcp://10.0.0.100:80"\nbackends = ["10.0.0.11", "10.0.0.12"]\n'
).services[0]


@st.composite
def changed(draw: st.DrawFn, examples: list[bytes]) -> bytes:
    """One of these with a few bytes changed, left out, doubled, put in; or cut off."""
    data = bytearray(draw(st.sampled_from(examples)))
    for _ in range(draw(st.integers(0, 4))):
        at, n = draw(st.integers(0, len(data))), draw(st.integers(0, 8))
        match draw(st.sampled_from(["set", "bit", "out", "in", "twice", "cut", "number"])):
            case "set":
                data[at : at + n] = draw(st.binary(min_size=n, max_size=n))
            case "bit" if at < len(data):
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "out":
                del data[at : at + n]
            case "in":
                data[at:at] = draw(st.binary(max_size=8))
            case "twice":
                data[at:at] = data[at : at + 16 * n]
            case "cut":
                del data[at:]
            case "number":
                data[at : at + 4] = struct.pack("!I", draw(st.sampled_from([0, 1, 0x7FFFFFFF, 0xFFFFFFFF, 0xFFFF])))
    return bytes(data)


ODD = st.sampled_from(
    [None, True, 0, -1, 1.5, 2**16, 2**31, 2**32, 2**63 - 1, 2**64 - 1, -(2**63), 1e308, "", "x", "-1", "::1", [], {}]
)


@st.composite
def values(draw: st.DrawFn, example: Any) -> Any:
    """A tree of plain values with some of them changed."""
    tree = msgspec.msgpack.decode(msgspec.msgpack.encode(example))

    def change(value: Any) -> Any:
        if isinstance(value, (dict, list)) and value and draw(st.integers(0, 9)):
            keys = list(value) if isinstance(value, dict) else list(range(len(value)))
            key = draw(st.sampled_from(keys))
            if draw(st.integers(0, 9)):
                value[key] = change(value[key])
            elif isinstance(value, dict):
                value[draw(st.sampled_from(["", "x", *map(str, keys)]))] = value.pop(key)
            else:
                value.append(value[key])
            return value
        return draw(ODD)

    for _ in range(draw(st.integers(0, 3))):
        tree = change(tree)
    return tree


# ---- reports ----

MASTER, BACKEND = bytes(range(32)), ip_address("10.0.0.11")
KEY = reports.derive(MASTER, BACKEND)


def a_report() -> bytes:
    entries = tuple(reports.VipReport(Vip(ip_address(f"10.0.0.{n}"), 80), 5, 0, 1) for n in (100, 101))
    return reports.Message(reports.REPORT, BACKEND, bytes(8), number=1, vips=entries).encode(KEY)


@many
@given(changed([a_report(), a_report()[:-32]]), st.booleans())
def test_reports(data, signed):
    """Also of somebody who has the backend's key."""
    if signed:
        data += hmac.digest(KEY, data, "sha256")
    judge = reports.Judge(MASTER)
    judge.follow([BACKEND])
    try:
        message, answer = judge.judge(data)
    except reports.Refused:
        return
    assert answer is not None or message is not None
    assert message is None or message.backend == BACKEND


# ---- configuration ----


@many
@given(changed(CONFIGURATIONS))
def test_configurations(data):
    text = data.decode(errors="replace")
    try:
        assert isinstance(parse_config(text), Config)
    except ConfigError as error:
        assert str(error)


TABLE = {
    "interface": "eth0",
    "announce": "arp",
    "service": [
        {
            "address": "tcp://10.0.0.100:80",
            "backends": [
                {"address": "10.0.0.11", "weight": 3, "state": "drain", "cr": False},
                "10.0.0.12",
            ],
            "policy": "maglev",
            "redirect_clients": ["10.0.0.0/8"],
            "check": [{"type": "http", "path": "/", "status": ["200-399"], "interval": 2.0, "timeout": 1.0}],
        }
    ],
}


def test_the_table_is_right():
    assert config_from_table(TABLE).services


@many
@given(values(TABLE))
def test_configurations_as_values(table):
    try:
        if isinstance(table, dict):
            config_from_table(table)
        else:
            read_service(table)
    except ConfigError as error:
        assert str(error)


@many
@given(values(TABLE["service"][0]), values(TABLE["service"][0]["backends"][0]))  # type: ignore[index]
def test_services_and_backends_as_values(service, backend):
    for read, value in ((read_service, service), (read_backend, backend)):
        try:
            read(value)  # type: ignore[operator]
        except ConfigError as error:
            assert str(error)


# ---- state file ----

SEED = bytes(16)
MEMBER = MemberEdit(settings={"weight": Edit(1, 2)})
CHANGES = Changes({"tcp://10.0.0.100:80": ServiceEdit(backends={"10.0.0.11": MEMBER})})


def state(path: Path) -> dict[str, Any]:
    store = Store(path, ("eth0",), SEED)
    return json.loads(
        msgspec.json.encode(Saved(interfaces=("eth0",), deployment=store.saved().deployment, changes=CHANGES))
    )


def load(folder: Path, data: bytes) -> None:
    path = folder / "eth0.state.json"
    path.write_bytes(data)
    path.chmod(0o600)
    store = Store(path, ("eth0",), SEED)
    with capture_logs() as logs:
        saved = store.load()
    assert isinstance(saved, Saved)
    assert saved.changes == CHANGES or not logs or not saved.changes.services
    try:
        read_kept(saved.health or [])
    except ConfigError as error:
        assert str(error)


@many
@given(st.data())
def test_state_files(tmp_path, data):
    example = state(tmp_path / "eth0.state.json")
    load(tmp_path, json.dumps(data.draw(values(example))).encode())
    load(tmp_path, data.draw(changed([json.dumps(example).encode()])))


def test_a_state_file_that_is_no_utf8(tmp_path):
    """One flipped bit."""
    load(tmp_path, json.dumps(state(tmp_path / "eth0.state.json")).encode().replace(b"eth0", b"eth\xb0"))


# ---- health answers ----


def a_syn_ack() -> bytes:
    options = segments.options_of_syn(1500, 4, ip_address("10.0.0.100"))
    here, there = ip_address("10.0.0.2"), BACKEND
    return segments.packet(there, here, 6, segments.segment(there, here, (80, 4000), 7, 0x12, options))


def an_error() -> bytes:
    return segments.packet(BACKEND, ip_address("10.0.0.2"), 1, bytes([3, 3, 0, 0, 0, 0, 0, 0]) + a_syn_ack())


@many
@given(changed([a_syn_ack(), an_error()]))
def test_segments(data):
    found = segments.parse(data)
    assert found is None or isinstance(found, (segments.Reply, segments.Complaint))
    if isinstance(found, segments.Reply):
        assert all(len(address) in (4, 16) for _, address in segments.redirects(found.options))


@many
@given(changed([b"up 75%\n", b"maint, ready 100%", b"down # no disk\r\n", b"drain,fail"]))
def test_what_agents_say(line):
    answer = probes.said_by_agent(line)
    assert answer.reason.isprintable()
    assert answer.percent is None or 0 <= answer.percent <= 1000


# ---- captures ----

STREAM = (
    pcapng.section("crablb", "of a test")
    + pcapng.interface("eth0", "", 100)
    + pcapng.packet(0, 10**18, bytes(60), 80, comment="redirected", outbound=True, id=3, queue=1, verdict=2, dropped=1)
    + pcapng.statistics(0, 1, 2, 3, 4, "")
)


@many
@given(changed([STREAM]), st.integers(1, 50))
def test_captures(data, size):
    """What ``crablb capture`` takes from a daemon."""
    blocks = pcapng.Blocks()
    try:
        for at in range(0, len(data), size):
            for _, block in blocks.feed(data[at : at + size]):
                assert len(block) >= 12
                assert all(isinstance(value, bytes) for value in pcapng.options(block).values())
    except ValueError as error:
        assert str(error)


# ---- takeovers ----


@many
@given(changed([msgspec.msgpack.encode(["offer", {"engine": {}, "fds": 1, "parts": {}}]), b"\x92\xa4take\x80"]))
def test_messages_of_a_takeover(body):
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there:
        here.setblocking(False)
        for last in (0, 1):
            there.send(bytes([last]) + body[: takeover.PIECE] * last)
        inbox = takeover._Inbox(here, 1000)
        try:
            while (message := inbox.read()) is None:
                pass
            assert isinstance(message[0], str)
            if message[0] == "offer":
                handover.understood(message[1], takeover.Offer)
        except KernelError as error:
            assert str(error)


def test_a_message_that_is_no_utf8():
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there:
        there.send(b"\x01\x92\xa1\xff\x80")
        with pytest.raises(KernelError, match="no message"):
            takeover._Inbox(here, 1000).read()


@pytest.mark.parametrize(
    "change",
    [
        {"backends": {"zz": 1}},
        {"backends": {"00": 1}},
        {"services": {"": 1}},
        {"services": {"00" * 20: 65536}},
        {"joins": -1},
    ],
)
def test_an_offer_that_is_none(change):
    with pytest.raises(KernelError):
        _ = handover.understood(OFFER | change, handover.Offer).numbers


def test_numbers_that_are_too_large_are_known_for_what_they_are():
    """In what a predecessor knew of backends: the supervisor takes these four kinds of errors for "not known"."""
    known = of_before()["balance"]
    for turn in (-1, 2**64):
        with pytest.raises(ArithmeticError):
            Balance().adopt(known | {"turns": [[str(SERVICE.vip), turn]]}, [SERVICE])


OFFER = {
    "interfaces": ["eth0"], "seed": handover.fingerprint(SEED), "forms": handover.forms(),
    "backends": {"00000000000000000000ffff0a00000b": 3}, "services": {Vip(BACKEND, 80).key().hex(): 1},
    "ports": {"eth0": {"first": 0, "room": 1, "cpu": 0, "queues": {"0": {"cache": 4096, "bound": {
        "interface": "eth0", "ifindex": 2, "queue": 0, "ring": 64, "flags": 0, "frames": 64, "frame_size": 2048}}}}},
    "joins": 100,
}  # fmt: skip


def test_the_offer_is_right():
    assert handover.understood(OFFER, handover.Offer).numbers.backends == {BACKEND: 3}


@many
@given(values(OFFER))
def test_offers_of_a_takeover(offer):
    try:
        understood = handover.understood(offer, handover.Offer)
        numbers = understood.numbers
        assert all(0 <= number < 65536 for number in (*numbers.backends.values(), *numbers.services.values()))
        assert all(size >= 0 for size in understood.sizes)
    except KernelError as error:
        assert str(error)


def of_before() -> dict[str, Any]:
    """What each part says to the next process of what it knows."""
    balance, completions, judged, journal = Balance(), Completions(), Reports(None, MASTER), Journal()  # type: ignore[arg-type]
    balance.report(SERVICE.vip, BACKEND, 3, 400)
    balance.turn(SERVICE.vip).next = 7
    balance.heard(BACKEND, 5.0)
    completions.report(SERVICE.vip, BACKEND, 3, 1, 2.0)
    judged.follow([SERVICE])
    judged.at_vips[SERVICE.vip, BACKEND] = 2
    return {
        "balance": balance.export(),
        "completions": completions.export(),
        "reports": judged.export(),
        "journal": journal.export(),
    }


@many
@given(st.data())
def test_what_a_successor_is_told(data):
    told = of_before()
    for name, example in told.items():
        known = data.draw(values(example), label=name)
        try:
            match name:
                case "balance":
                    balance = Balance()
                    balance.adopt(known, [SERVICE])
                    balance.export()
                case "completions":
                    completions = Completions()
                    completions.adopt(known, [SERVICE])
                    completions.report(SERVICE.vip, BACKEND, 4, 1, 2.0)
                case "reports":
                    judged = Reports(None, MASTER)  # type: ignore[arg-type]
                    judged.follow([SERVICE])
                    before = judged.export()
                    try:
                        judged.adopt(known)
                    except ValueError:
                        assert judged.export() == before
                        raise
                    judged._judge.judge(a_report())
                case "journal":
                    Journal().adopt(*known)
        except (LookupError, TypeError, ValueError, ArithmeticError, reports.Refused):
            pass  # as the supervisor has it


@many
@given(values(msgspec.to_builtins(estate.Parts())), values(msgspec.to_builtins(estate.Rest())))
def test_parts_and_rest(parts, rest):
    for value, kind in ((parts, estate.Parts), (rest, estate.Rest)):
        try:
            handover.understood(value, kind)
        except KernelError as error:
            assert str(error)
