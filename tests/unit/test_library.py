"""The library, without a network."""

from __future__ import annotations

import pytest

import crablb
from crablb import ConfigError, KernelError, LoadBalancer, Service, Vip
from crablb.lab import VIP4

VIP = Vip(VIP4, 80)


def test_what_is_public():
    assert all(getattr(crablb, name).__doc__ for name in crablb.__all__)


def test_bad_arguments():
    for arguments, problem in (
        ({"services": ["tcp://10.0.0.100:80"]}, "is not VIP=BACKEND"),
        ({"seed": b"short"}, "a seed has 16 bytes, not 5"),
        ({"colour": 1}, "unknown settings: colour"),
        ({"services": [Service(VIP, ())]}, "has no backends"),
    ):
        with pytest.raises(ConfigError, match=problem):
            LoadBalancer("eth0", **arguments)
    with pytest.raises(KernelError, match="not running"):
        LoadBalancer("eth0").process_once()
