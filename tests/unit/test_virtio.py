"""What is known of virtio_net, and what follows for sockets and the XDP program."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from crablb.dataplane import queues
from crablb.errors import KernelError
from crablb.kernel import virtio
from crablb.model import Bypass


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """One that has a virtio_net card: its CPUs and queues, with and without a program, and its driver."""
    one = SimpleNamespace(possible="0-1", queues=2, most=4, driver="virtio_net", release="7.3.4")
    (tmp_path / "possible").write_text("0-1\n")
    monkeypatch.setattr(virtio, "POSSIBLE", tmp_path / "possible")
    monkeypatch.setattr(virtio.ethtool, "driver", lambda _: one.driver)
    monkeypatch.setattr(virtio.rtnetlink, "rx_queues", lambda _: one.queues)
    monkeypatch.setattr(virtio.socket, "if_nametoindex", lambda _: 7)
    monkeypatch.setattr(virtio.os, "uname", lambda: SimpleNamespace(release=one.release))
    return one


@pytest.mark.parametrize(
    ("told", "count"), [("0", 1), ("0-3", 4), ("0-1,4-7", 8), ("0,2", 3), ("", None), ("all", None)]
)
def test_cpus_are_as_the_kernel_counts(machine: Any, told: str, count: int | None) -> None:
    virtio.POSSIBLE.write_text(told + "\n")
    assert virtio.cpus() == (count or virtio.os.cpu_count())


@pytest.mark.parametrize(
    ("driver", "release", "bypass", "copy"),
    [
        ("virtio_net", "7.3.4+deb13-amd64", Bypass.AUTO, None),
        ("virtio_net", "10.0-rc1", Bypass.AUTO, None),
        ("virtio_net", "7.2.12", Bypass.AUTO, True),
        ("virtio_net", "6.18.0", Bypass.ON, True),
        ("virtio_net", "6.18.0", Bypass.OFF, None),
        ("igb", "6.18.0", Bypass.AUTO, None),
        ("", "6.1.0", Bypass.AUTO, None),
    ],
)
def test_copy_mode_is_asked_for_where_zero_copy_loses_packets(
    monkeypatch: pytest.MonkeyPatch, machine: Any, driver: str, release: str, bypass: Bypass, copy: Any
) -> None:
    """That is what the XDP program sends; with `ack_bypass` off it sends nothing."""
    machine.driver, machine.release = driver, release
    asked = []

    def socket(*_: object, copy: bool | None, **__: object) -> Any:
        asked.append(copy)
        raise queues.XskError("enough is known")

    monkeypatch.setattr(queues, "XskSocket", socket)
    one: Any = SimpleNamespace(_config=SimpleNamespace(ack_bypass=bypass))
    port: Any = SimpleNamespace(workers={})
    interface: Any = SimpleNamespace(name="eth0", mtu=1500)
    with pytest.raises(queues.XskError, match="enough is known"):
        queues.Queues._bind(one, port, "eth0", 0, interface)
    assert asked == [copy]


def taken(used: int, most: int, cpus: int) -> int:
    """What virtnet_xdp_set adds to the queues in use."""
    return cpus if used + cpus <= most else 0


def sends_by(used: int, most: int, cpus: int, cpu: int) -> int:
    """The queue that virtnet_xdp_get_sq chooses."""
    now = used + taken(used, most, cpus)
    return used + cpu if now > cpus else cpu % now


@pytest.mark.parametrize("cpus", range(1, 9))
def test_nothing_is_sent_behind_the_last_queue(cpus: int) -> None:
    """Programs are attached to a card if, and only if, each queue that they send by is one that it has."""
    for most in range(1, 18):
        for used in range(1, most + 1):
            inside = all(sends_by(used, most, cpus, cpu) < used + taken(used, most, cpus) for cpu in range(cpus))
            assert virtio.overruns(used, most, cpus) == (not inside), (used, most)


@pytest.mark.parametrize("cpus", [1, 2, 5])
def test_queues_that_only_receive_are_known(machine: Any, cpus: int) -> None:
    """Of every card that a program is attached to."""
    virtio.POSSIBLE.write_text(f"0-{cpus - 1}\n")
    for most in range(1, 12):
        for used in range(1, most + 1):
            if not virtio.overruns(used, most, cpus):
                machine.queues = used + taken(used, most, cpus)
                found = [virtio.only_receives("eth0", queue) for queue in range(machine.queues)]
                assert found == [False] * used + [True] * (machine.queues - used), (used, most)


def test_a_card_whose_queues_are_not_told_sends(machine: Any) -> None:
    machine.queues = None
    assert not virtio.only_receives("eth0", 3)


def test_other_drivers_send_by_all_queues(machine: Any) -> None:
    machine.driver, machine.queues = "igb", 8
    assert not virtio.only_receives("eth0", 7)
    virtio.refuse_to_overrun(SimpleNamespace(name="eth0", rx_queues=8, max_queues=8))  # type: ignore[arg-type]


def test_the_refusal_says_what_to_do(machine: Any) -> None:
    card: Any = SimpleNamespace(name="eth0", rx_queues=4, max_queues=4)
    with pytest.raises(KernelError, match=r"the kernel panics .* ethtool -L eth0 combined 2$"):
        virtio.refuse_to_overrun(card)
    card.rx_queues = 2
    virtio.refuse_to_overrun(card)
