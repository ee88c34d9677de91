"""What a service manager is told."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from crablb.control import notify
from crablb.control.notify import Watchdog


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "notify"))
        sock.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.delenv("WATCHDOG_USEC", raising=False)
        yield sock


def told(manager: socket.socket) -> list[str]:
    notify.notify("END=1")
    found = []
    while (said := manager.recv(4096).decode()) != "END=1":
        found.append(said)
    return found


def test_status_is_a_line(manager):
    assert notify.status("serving 3 services,\n12 of 12 backends\nREADY=1")
    assert told(manager) == ["STATUS=serving 3 services, 12 of 12 backends READY=1"]


def test_nobody_asks_or_listens(manager, monkeypatch):
    manager.close()
    assert not notify.notify("READY=1")
    monkeypatch.delenv("NOTIFY_SOCKET")
    assert not notify.notify("READY=1")


def test_an_abstract_socket(monkeypatch):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("")
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + sock.getsockname()[1:].decode())
        assert notify.notify("READY=1")
        assert sock.recv(99) == b"READY=1"


def test_a_manager_that_does_not_read_is_not_waited_for_for_ever(manager, monkeypatch):
    monkeypatch.setattr(notify, "PATIENCE", 0.01)
    for _ in range(100_000):
        if not notify.notify("WATCHDOG=1"):
            break
    else:
        raise AssertionError("it takes all")


@pytest.mark.parametrize("usec, interval", [
    ("10000000", 2.5), ("1000000", 0.25),
    ("0", None), ("", None), ("-5", None), ("soon", None), ("1e6", None), ("²", None),
])  # fmt: skip
def test_how_often(manager, monkeypatch, usec, interval):
    """Also where the process that was asked was another one (WATCHDOG_PID), as after a takeover."""
    monkeypatch.setenv("WATCHDOG_USEC", usec)
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert Watchdog(list).interval == interval
    monkeypatch.delenv("NOTIFY_SOCKET")
    assert Watchdog(list).interval is None


def test_it_is_fed_if_all_live(manager):
    late: list[str] = []
    watchdog = Watchdog(lambda: list(late))
    with capture_logs() as said:
        watchdog.look()
        assert told(manager) == ["WATCHDOG=1"]
        late.append("eth0/0")
        for _ in range(5):
            watchdog.look()
        assert told(manager) == []
        late.clear()
        watchdog.look()
        assert told(manager) == ["WATCHDOG=1"]
    assert [entry["threads"] for entry in said] == [["eth0/0"]]
