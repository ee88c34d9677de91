"""The library, without a network."""

from __future__ import annotations

import inspect
import sys
from concurrent.futures import ThreadPoolExecutor
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


def weights(lb: LoadBalancer) -> list[int]:
    return [backend.weight for backend in lb.service(VIP).backends]


def test_changes_of_threads_before_the_start():
    """None is lost, wherever one thread is when another has its turn."""
    lb = LoadBalancer("eth0", [f"{VIP}=10.0.0.10"])
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda n: lb.add_backend(VIP, f"10.1.{n // 250}.{1 + n % 250}"), range(400)))
    finally:
        sys.setswitchinterval(before)
    assert len(lb.service(VIP).backends) == 401


def test_a_signal_in_the_middle_of_a_change(monkeypatch):
    """What its handler asks for is refused, as the change that it interrupts would undo it; afterwards it is not."""
    lb = LoadBalancer("eth0", [f"{VIP}=10.0.0.10,10.0.0.11"])
    checked = LoadBalancer._checked
    refused = []

    def signalled(self, services):
        found = checked(self, services)
        if not refused:
            refused.append(True)
            with pytest.raises(KernelError, match="is being changed, by what was interrupted"):
                lb.set_weight(VIP, "10.0.0.11", 7)
            assert weights(lb) == [1, 1]  # who only looks may
        return found

    monkeypatch.setattr(LoadBalancer, "_checked", signalled)
    lb.set_weight(VIP, "10.0.0.10", 3)
    assert weights(lb) == [3, 1]
    lb.set_weight(VIP, "10.0.0.11", 7)
    with pytest.raises(ConfigError):
        lb.set_weight(VIP, "10.0.0.12", 1)
    lb.set_weight(VIP, "10.0.0.10", 2)
    assert weights(lb) == [2, 7]
