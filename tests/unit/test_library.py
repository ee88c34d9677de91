"""The library, without a network."""

from __future__ import annotations

import inspect
from importlib import metadata
from ipaddress import ip_address

import pytest

import crablb
from crablb import Backend, ConfigError, KernelError, LoadBalancer, Mode, Service, Vip
from crablb.lab import VIP4

VIP = Vip(VIP4, 80)
B = Backend(ip_address("10.0.0.11"))


def test_what_is_public():
    """Every name, and every method of each, says what it does."""
    for name in crablb.__all__:
        kind = getattr(crablb, name)
        assert kind.__doc__, name
        for own, value in vars(kind).items():
            if not own.startswith("_") and (inspect.isroutine(value) or isinstance(value, property)):
                assert inspect.getdoc(getattr(kind, own)), f"{name}.{own}"


def test_version():
    assert crablb.__version__ == metadata.version("crablb")
    assert "__version__" in dir(crablb)


def test_bad_arguments():
    for arguments, problem in (
        ({"services": ["tcp://10.0.0.100:80"]}, "is not VIP=BACKEND"),
        ({"seed": b"short"}, "a seed has 16 bytes, not 5"),
        ({"colour": 1}, "unknown settings: colour"),
        ({"services": [Service(VIP, ())]}, "has no backends"),
        ({"services": "tcp://10.0.0.100:80=10.0.0.11"}, "is one; give a list of them"),
        ({"services": None}, "None is not a list of services"),
        ({"services": [5]}, "5 is no crablb.Service"),
        ({"services": [Service(VIP, (B,), mode="sometimes")]}, "mode: 'sometimes' is not one of negotiated"),
        ({"services": [Service(VIP, ("10.0.0.11",))]}, "'10.0.0.11' is no crablb.Backend"),
        ({"services": [Service(VIP, (Backend(B.address, 70000),))]}, "70000 is not a weight"),
        ({"services": [Service(Vip("10.0.0", 80), (B,))]}, "'10.0.0' is not an IP address"),
        ({"services": [Service(Vip(VIP4, 70000), (B,))]}, "'70000' is not a port"),
        ({"queues": -1}, "queues: -1 is not a whole number from 1 to 64"),
        ({"threads": "no"}, "threads: 'no' is not True or False"),
        ({"announce": "bgp"}, "announce: 'bgp' is not one of none, arp"),
    ):
        with pytest.raises(ConfigError, match=problem):
            LoadBalancer("eth0", **arguments)
    for interfaces in (None, 5, b"eth0", [], ["eth0", "eth0"], ""):
        with pytest.raises(ConfigError, match="interfaces: "):
            LoadBalancer(interfaces)
    with pytest.raises(KernelError, match="not running"):
        LoadBalancer("eth0").process_once()


def test_text_for_values():
    lb = LoadBalancer("eth0", [Service(Vip("fd00::100", 80), (Backend("fd00::11"),), mode="never"), f"{VIP}=10.0.0.11"])
    assert [str(service.vip) for service in lb.services] == ["tcp://[fd00::100]:80", str(VIP)]
    assert lb.services[0].mode is Mode.NEVER
    lb.set_weight(str(VIP), "10.0.0.11", 7)
    assert lb.backend(VIP, B.address).weight == 7
    for vip, problem in (("10.0.0.100:80", "has no protocol"), (None, "None is not a string"), (80, "80 is not")):
        with pytest.raises(ConfigError, match=problem):
            lb.remove_service(vip)
    lb.remove_service("tcp://[fd00::100]:80")
    assert [service.vip for service in lb.services] == [VIP]
