"""Frames of the load balancer's sockets, by mode."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from crablb.dataplane import queues


@pytest.mark.parametrize(
    ("zero_copy", "knows", "mtu", "tried"),
    [
        (False, True, 1500, [(2048, None)]),
        (False, True, 9000, [(4096, None)]),
        (False, False, 1500, [(4096, None)]),
        (True, True, 1500, [(2048, None), (4096, None)]),
        (True, False, 1500, [(4096, None)]),
        (True, True, 9000, [(4096, None), (4096, True)]),
    ],
)
def test_frames(monkeypatch: pytest.MonkeyPatch, zero_copy: bool, knows: bool, mtu: int, tried: list[Any]) -> None:
    """In zero-copy mode a page each, as cards may count in kilobytes; copy mode where a packet would not fit."""
    made: list[Any] = []

    def socket(*_: object, frame_size: int, copy: bool | None, **__: object) -> SimpleNamespace:
        assert not any(one.open for one in made), "a queue has one socket"
        in_mode = zero_copy and not copy
        one = SimpleNamespace(size=frame_size, copy=copy, zero_copy=in_mode, multi_buffer=not in_mode, open=True)
        one.close = lambda: setattr(one, "open", False)
        made.append(one)
        return one

    monkeypatch.setattr(queues, "XskSocket", socket)
    monkeypatch.setattr(queues, "lib", SimpleNamespace(crab_xsk_knows_frags=lambda: knows))
    interface: Any = SimpleNamespace(name="eth0", mtu=mtu)
    got = queues._socket(interface, 0)
    assert [(one.size, one.copy) for one in made] == tried
    assert got is made[-1] and made[-1].open
