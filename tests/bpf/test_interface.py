"""crablb.kernel.interface: what there is to know of an interface."""

from __future__ import annotations

import pytest

from crablb.errors import KernelError
from crablb.kernel.interface import interface_info, interfaces_above


def test_interface_info(namespace):
    with pytest.raises(KernelError, match="interface nothing does not exist; there are: lo, veth1, veth0"):
        interface_info("nothing")
    namespace.ip("link", "set", "veth0", "address", "02:00:00:00:00:05", "mtu", "9000")
    info = interface_info("veth0")
    assert (info.name, info.mac, info.mtu, info.up) == ("veth0", bytes.fromhex("020000000005"), 9000, True)
    assert info.rx_queues >= 1
    namespace.ip("link", "set", "veth0", "down")
    assert not interface_info("veth0").up


def test_what_lies_above(namespace):
    """Its bridge and what is made on it; not a veth's peer."""
    namespace.ip("link", "add", "br0", "type", "bridge")
    namespace.ip("link", "set", "veth0", "master", "br0")
    namespace.ip("link", "add", "mv0", "link", "veth1", "type", "macvlan")
    index = {name: interface_info(name).index for name in ("veth0", "veth1", "br0", "mv0")}
    assert interfaces_above(index["veth0"]) == {"br0": index["br0"]}
    assert interfaces_above(index["veth1"]) == {"mv0": index["mv0"]}
    assert interfaces_above(index["br0"]) == interfaces_above(9999) == {}
