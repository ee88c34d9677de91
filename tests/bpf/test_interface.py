"""crablb.kernel.interface: what there is to know of an interface."""

from __future__ import annotations

import pytest

from crablb.errors import KernelError
from crablb.kernel.interface import interface_info


def test_interface_info(namespace):
    with pytest.raises(KernelError, match="interface nothing does not exist; there are: lo, veth1, veth0"):
        interface_info("nothing")
    namespace.ip("link", "set", "veth0", "address", "02:00:00:00:00:05", "mtu", "9000")
    info = interface_info("veth0")
    assert (info.name, info.mac, info.mtu, info.up) == ("veth0", bytes.fromhex("020000000005"), 9000, True)
    assert info.rx_queues >= 1
    namespace.ip("link", "set", "veth0", "down")
    assert not interface_info("veth0").up
