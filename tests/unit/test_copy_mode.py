"""Which mode the load balancer asks for."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from crablb.dataplane import queues


@pytest.mark.parametrize(("driver", "copy"), [("virtio_net", True), ("igb", None), ("veth", None), ("", None)])
def test_zero_copy_is_left_alone_where_it_loses_packets(monkeypatch: pytest.MonkeyPatch, driver: str, copy: Any):
    asked = []

    def socket(*_: object, copy: bool | None, **__: object) -> SimpleNamespace:
        asked.append(copy)
        return SimpleNamespace(zero_copy=copy is None, multi_buffer=True)

    monkeypatch.setattr(queues.ethtool, "driver", lambda _: driver)
    monkeypatch.setattr(queues, "XskSocket", socket)
    interface: Any = SimpleNamespace(name="eth0", mtu=1500)
    assert queues._socket(interface, 0).zero_copy == (copy is None)
    assert asked == [copy]
