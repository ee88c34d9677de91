"""Capture files and what is said in them, without a kernel: an engine that is not one gives the packets."""

from __future__ import annotations

import asyncio
import subprocess
from ipaddress import ip_address
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import Ether

from crablb.api import types
from crablb.cli import capture as command
from crablb.config import config_from_args
from crablb.control import outcome, pcapng
from crablb.control.capture import capture, checked
from crablb.control.trace import checked as traced
from crablb.control.trace import trace
from crablb.dataplane import statistics
from crablb.dataplane import tap as taps
from crablb.dataplane.tap import Seen, Tap
from crablb.errors import ConfigError, CrablbError
from tests.helpers.frames import ether, syn
from tests.helpers.pcapng import read
from tests.unit.test_differential import frames

CONFIG = config_from_args(["eth0"], ["tcp://10.0.0.100:80=10.0.0.11,10.0.0.12"])
FIRST = ip_address("10.0.0.11")


def seen(frame: bytes = syn(5), out: bytes = b"", *counters: str, **more: Any) -> Seen:
    fields: dict[str, Any] = {
        "at": 10, "done": 20, "counters": frozenset(counters or ["redirected"]), "frame": frame[:2048],
        "length": len(frame), "interface": 3, "out": out[:2048], "out_length": len(out),
        "out_interface": 3 if out else 0, "backend": FIRST if out else None, "queue": 1, "verdict": None,
        "service": True, "known": False, "written": False, "offer": True, "chosen": False,
    }  # fmt: skip
    return Seen(**fields | more)


@pytest.mark.parametrize(("flags", "words"), [("FA", "FIN, ACK"), ("RA", "RST, ACK")])
def test_the_end_of_a_connection_is_told(flags, words):
    """A worker writes it down for the XDP program as ending."""
    frame = bytes(Ether() / IP(src="10.0.0.1", dst="10.0.0.100") / TCP(sport=5, dport=80, flags=flags))
    packet = seen(frame, frame, "fallback_established", "learned")
    said = outcome.told(packet, outcome.headers(frame), CONFIG.services[0])
    assert said.startswith(f"fallback: the end of a connection ({words}); to {FIRST}; written down")
    later = bytes(Ether() / IP(src="10.0.0.1", dst="10.0.0.100") / TCP(sport=5, dport=80, flags="A"))
    assert outcome.told(packet, outcome.headers(later), None).startswith("fallback: a later packet")


class Engine:
    """As much of one as captures ask."""

    def __init__(self) -> None:
        self.config = CONFIG
        self.links = {3: SimpleNamespace(name="eth0"), 4: SimpleNamespace(name="eth1")}
        self.interfaces = [SimpleNamespace(index=3)]
        self.modes = {"eth0": "native"}
        self.open: list[Tap] = []

    def _closed(self, tap: Tap) -> None:
        if tap in self.open:
            self.open.remove(tap)

    async def tap(self, wanted: object, snap: int) -> Tap:
        tap = Tap(wanted, snap, 0, self._closed)  # type: ignore[arg-type]
        self.open.append(tap)
        return tap


def captured(tmp_path, packets: list[Seen], /, **asked: Any):
    """A capture of these packets alone, which the engine's end ends; the file as it was read."""

    async def main() -> None:
        engine = Engine()
        pieces = await capture(engine, types.Capture(**asked))  # type: ignore[arg-type]
        (tap,) = engine.open
        for packet in packets:
            tap.give(packet)
        tap.end()
        with open(tmp_path / "a.pcapng", "wb") as file:
            async for piece in pieces:
                file.write(piece)
        await pieces.aclose()
        assert engine.open == []

    asyncio.run(main())
    return read(tmp_path / "a.pcapng")


def test_a_packet_and_its_comment(tmp_path):
    came, went = syn(5), syn(6) + b"more"
    file = captured(tmp_path, [seen(came, went), seen(came, counters=frozenset({"drop_checksum"}))], filter="port 80")
    assert file.application == "crablb"
    assert "port 80" in file.comment
    assert [(i.name, i.snap) for i in file.interfaces] == [("eth0", 256)]
    into, out, dropped = file.packets
    assert (into.data, out.data) == (came, went)
    assert [p.outbound for p in file.packets] == [False, True, False]
    assert into.number == out.number != dropped.number
    assert (into.queue, out.queue) == (1, None)
    assert out.at - into.at == 10  # nanoseconds
    assert into.comment == out.comment
    assert into.comment == "redirected; to 10.0.0.11; chosen by the hash table; worker of queue 1 [redirected]"
    assert dropped.comment == "dropped: a checksum is wrong; worker of queue 1 [drop_checksum]"
    assert file.ended == "the load balancer has ended"


def test_other_interfaces_are_described_when_they_are_needed(tmp_path):
    file = captured(tmp_path, [seen(out=syn(6), out_interface=4), seen(out=syn(7), out_interface=9)])
    assert [i.name for i in file.interfaces] == ["eth0", "eth1", "if9"]
    assert [p.interface for p in file.packets] == ["eth0", "eth1", "eth0", "if9"]


@pytest.mark.parametrize(
    ("limits", "why", "count"),
    [
        ({"packets": 3}, "3 packets came: no more was asked for", 3),
        ({"bytes": 4096}, "4,096 bytes are full", None),
        ({"seconds": 0}, "0 seconds are over", 0),
        ({}, "the load balancer has ended", 40),
    ],
)
def test_limits(tmp_path, limits, why, count):
    file = captured(tmp_path, [seen(syn(5), syn(6))] * 40, **limits)
    assert file.ended == why
    into = [p for p in file.packets if not p.outbound]
    if count is None:
        assert 5 < len(into) < 40
        assert (tmp_path / "a.pcapng").stat().st_size <= 4096
    else:
        assert len(into) == count
    assert len(file.packets) == 2 * len(into)


def test_what_is_missing_is_said(tmp_path, monkeypatch):
    """In the next packet, and at the end."""
    monkeypatch.setattr(taps, "WAITING", 4)
    file = captured(tmp_path, [seen(syn(5), syn(6))] * 10)
    assert [p.dropped for p in file.packets] == [6, 0, 0, 0, 0, 0, 0, 0]
    assert file.missing == 6
    assert "6 packets missing" in file.ended


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(frames() | st.binary(max_size=300), frames() | st.just(b"")), max_size=5),
    st.integers(1, 2048),
    st.sets(st.sampled_from([*statistics.WORKER_COUNTERS, *statistics.XDP_COUNTERS]), max_size=3),
    st.none() | st.integers(0, 4),
)
def test_whatever_is_captured(tmp_path_factory, pairs, snap, counters, verdict):
    """Whole blocks, and the first bytes of every frame."""
    packets = [seen(a, b, counters=frozenset(counters), verdict=verdict) for a, b in pairs]
    file = captured(tmp_path_factory.mktemp("capture"), packets, snaplen=snap)
    expected = [frame for a, b in pairs for frame in ((a, b) if b else (a,))]
    assert [p.data for p in file.packets] == [frame[:snap] for frame in expected]
    assert [p.length for p in file.packets] == [len(frame) for frame in expected]
    assert all(p.comment for p in file.packets)
    assert {p.verdict for p in file.packets} <= {verdict}


def test_tshark_reads_it(tmp_path):
    packets = [seen(syn(5), syn(6)), seen(syn(7), verdict=1, counters=frozenset({"drop_hops"}))]
    file = captured(tmp_path, packets)
    names = ["frame.comment", "frame.interface_name", "frame.packet_id", "frame.interface_queue", "frame.time_epoch",
             "frame.verdict.ebpf_xdp", "frame.packet_flags_direction"]  # fmt: skip
    fields = [part for name in names for part in ("-e", name)]
    done = subprocess.run(
        ["tshark", "-r", tmp_path / "a.pcapng", "-T", "fields", *fields], capture_output=True, text=True, check=True
    )
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert len(rows) == 3
    for (comment, name, number, queue, at, verdict, direction), packet in zip(rows, file.packets, strict=True):
        assert (comment, name, int(number)) == (packet.comment, packet.interface, packet.number)
        assert queue == ("" if packet.queue is None else str(packet.queue))
        assert at == f"{packet.at // 10**9}.{packet.at % 10**9:09}"
        assert verdict == ("" if packet.verdict is None else str(packet.verdict))
        assert int(direction, 16) == 2 if packet.outbound else 1


def test_every_counter_has_words():
    """Of those that a packet may be counted by: so that no decision is told by its name alone."""
    beside = {"received", "sent"} | {name for name in statistics.WORKER_COUNTERS if name.startswith("xsk_")}
    assert {*outcome.WORKER, *outcome.ASIDE} == set(statistics.WORKER_COUNTERS) - beside
    assert set(outcome.XDP) == set(statistics.XDP_COUNTERS) - {"syn", "other", "icmp", "handler", "vip"}


@settings(max_examples=300)
@given(frames() | st.binary(max_size=100))
def test_headers(frame):
    """As Scapy has them, of what is sound; of anything else, no error."""
    packet = outcome.headers(frame)
    read_ = Ether(frame) if len(frame) >= 14 else None
    if packet and packet.ports and read_ and TCP in read_ and IP in read_ and read_[IP].ihl == 5 and not read_[IP].frag:
        assert (str(packet.source), str(packet.destination)) == (read_[IP].src, read_[IP].dst)
        assert packet.ports == (read_[TCP].sport, read_[TCP].dport)
        assert packet.flags == int(read_[TCP].flags) & 0xFF


def test_questions_that_are_wrong():
    with pytest.raises(ConfigError) as raised:
        checked(types.Capture(filter="prot 80", seconds=float("nan"), packets=0, bytes=1, snaplen=2049))
    problems = raised.value.problems
    assert [p.split(":")[0] for p in problems] == ["filter, character 1", "seconds", "packets", "bytes", "snaplen"]
    with pytest.raises(ConfigError) as raised:
        traced(types.Trace(client="10.0.0.0/8", vip="x", timeout=-1, connections=0))
    assert [p.split(":")[0] for p in raised.value.problems] == ["client", "vip", "connections", "timeout"]
    for client in ("", " ", "a", "10.0.0.1 and port 80"):
        with pytest.raises(ConfigError):
            traced(types.Trace(client=client))
    with pytest.raises(ConfigError, match="one is IPv4, one IPv6"):
        traced(types.Trace(client="10.0.0.1", vip="fd00::100"))


# ---- the reader ----


@given(st.lists(st.binary(max_size=200), max_size=5), st.integers(1, 50))
def test_blocks_are_whole(bodies, size):
    """However a stream is cut."""
    blocks = [pcapng.packet(0, 1, b, len(b), comment="c" * len(b), outbound=False, id=1) for b in bodies]
    stream, taken = b"".join(blocks) + b"\6\0\0\0\x20\0\0", []
    reader = pcapng.Blocks()
    for at in range(0, len(stream), size):
        taken += [block for _, block in reader.feed(stream[at : at + size])]
    assert taken == blocks


@given(st.binary(min_size=8, max_size=100))
def test_what_is_no_block(data):
    try:
        for kind, block in pcapng.Blocks().feed(data):
            if kind in (pcapng.PACKET, pcapng.STATISTICS):
                continue
            assert len(block) % 4 == 0
    except ValueError as error:
        assert "no pcapng block" in str(error)


class Pieces:
    def __init__(self, *pieces: bytes | Exception) -> None:
        self._pieces = iter(pieces)

    def __iter__(self) -> Pieces:
        return self

    def __next__(self) -> bytes:
        piece = next(self._pieces)
        if isinstance(piece, Exception):
            raise piece
        return piece


def file_of(count: int) -> list[bytes]:
    head = pcapng.section("crablb", "a") + pcapng.interface("eth0", "served", 256)
    return [head, *(pcapng.packet(0, i, syn(i), 78, comment="x", outbound=False, id=i) for i in range(1, count + 1))]


def test_a_stream_that_breaks_leaves_a_whole_file(tmp_path):
    head, *packets = file_of(3)
    broken = command.ApiError(["the answer broke off"])
    with command._File(str(tmp_path / "a")) as file, pytest.raises(CrablbError, match="broke off; 3 packets are"):
        command._capture(file, head, Pieces(*packets, packets[0][:50], broken), as_json=False)
    assert len(read(tmp_path / "a").packets) == 3


@pytest.mark.parametrize("rubbish", [b"HTTP/1.1 200 OK\r\n\r\n", b"\6\0\0\0\7\0\0\0" + bytes(20)])
def test_an_answer_that_is_no_capture(tmp_path, rubbish):
    with command._File(str(tmp_path / "a")) as file, pytest.raises(CrablbError, match="no pcapng block"):
        command._capture(file, rubbish, Pieces(), as_json=False)
    assert (tmp_path / "a").read_bytes() == b""


def test_a_full_disk_leaves_a_whole_file(tmp_path, monkeypatch):
    """In the middle of a block."""
    head, *packets = file_of(5)
    room = len(head) + len(packets[0]) + 20
    written = 0
    write = command.os.write

    def full(fd: int, data: bytes) -> int:
        nonlocal written
        if written == room:
            raise OSError(28, "No space left on device")
        n = write(fd, bytes(data)[: room - written])
        written += n
        return n

    monkeypatch.setattr(command.os, "write", full)
    with (
        command._File(str(tmp_path / "a")) as file,
        pytest.raises(CrablbError, match="No space left on device; 1"),
    ):
        command._capture(file, head, Pieces(*packets), as_json=False)
    assert len(read(tmp_path / "a").packets) == 1


# ---- traces ----


def steps(packets: list[Seen], **asked: Any) -> list[types.TraceStep]:
    async def main() -> list[types.TraceStep]:
        engine = Engine()
        pieces = await trace(engine, types.Trace(client="10.0.0.1", **asked))  # type: ignore[arg-type]
        for packet in packets:
            engine.open[0].give(packet)
        found = []
        assert await anext(pieces) is None
        async for step in pieces:
            if step:
                found.append(step)
            else:
                engine.open[0].end()
        assert engine.open == []
        return found

    return asyncio.run(main())


def later(flags: str, port: int = 5, **more: Any) -> Seen:
    frame = bytes(ether() / IP(src="10.0.0.1", dst="10.0.0.100") / TCP(sport=port, flags=flags))
    counters = more.pop("counters", frozenset({"fallback_established"}))
    return seen(frame, frame, counters=counters, offer=False, **more)


def test_a_redirected_connection(monkeypatch):
    monkeypatch.setattr("crablb.control.trace.GONE", 0.05)
    out = bytearray(syn(5))
    out[30:34] = FIRST.packed
    told = steps([seen(syn(5), bytes(out))])
    assert [step.what for step in told] == [
        "in", "service", "flow", "offer", "choice", "decision", "rewritten", "out", "over", "end",
    ]  # fmt: skip
    said = {step.what: step for step in told}
    assert {step.connection for step in told[:-1]} == {"10.0.0.1:5 -> 10.0.0.100:80"}
    assert said["service"].outcome == "tcp://10.0.0.100:80"
    assert said["choice"].outcome == "10.0.0.11"
    assert said["decision"].outcome == "redirected"
    assert "redirect to 10.0.0.100" in said["rewritten"].outcome
    assert "success" in said["over"].why
    assert said["end"].outcome == "1 connection"
    assert said["end"].why == ""


def test_a_connection_by_fallback(monkeypatch):
    monkeypatch.setattr("crablb.control.trace.ENDING", 0.05)
    begun = seen(syn(5), syn(5), "fallback_mode", offer=False)
    told = steps([begun, later("A"), later("PA", verdict=3, counters=frozenset({"flow"})), later("FA")])
    said = [step.outcome for step in told if step.what == "packet"]
    assert said == ["ACK, 0 bytes: to 10.0.0.11", "PSH, ACK, 0 bytes: to 10.0.0.11", "FIN, ACK, 0 bytes: to 10.0.0.11"]
    assert [step.why.split(",")[0] for step in told if step.what == "packet"] == [
        "worker", "XDP program alone", "worker",
    ]  # fmt: skip
    (over,) = (step for step in told if step.what == "over")
    assert over.outcome == "it has ended"


def test_a_trace_is_bounded(monkeypatch):
    monkeypatch.setattr("crablb.control.trace.SILENT", 0.05)
    begun = seen(syn(5), syn(5), "fallback_no_offer", offer=False)
    told = steps([later("A", port=9), begun, *[later("A")] * 100, seen(syn(6), syn(6), "fallback_no_offer")])
    packets = [step for step in told if step.what == "packet"]
    assert len(packets) == 21
    assert "the rest is not told" in packets[-1].outcome
    assert [step.what for step in told].count("in") == 1  # not of another connection than the first
    assert told[-2].outcome == "still there, 100 packets after its SYN"
    assert told[-1].why == "the load balancer has ended"


def test_a_trace_of_nobody():
    told = steps([], timeout=0.05)
    assert [step.what for step in told] == ["end"]
    assert told[0].outcome == "0 connections"
    assert "0.05 seconds are over; no SYN of this client came" in told[0].why


def test_a_syn_that_is_dropped():
    told = steps([seen(syn(5), b"", "drop_no_backend", offer=False)], timeout=0.05)
    assert [(step.what, step.outcome) for step in told][-4:-2] == [
        ("decision", "dropped: no backend can take it"), ("out", "nothing"),
    ]  # fmt: skip
