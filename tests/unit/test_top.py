"""``crablb top``: what keys do, and that it fits on a screen."""

from __future__ import annotations

import io

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from crablb.api.types import Backend, Interface, Patch, Service, Status, Version
from crablb.cli.top import SORTS, Seen, View, keys, render

VIPS = ("tcp://10.0.0.100:80", "tcp://[fd00::100]:443")


PLAIN = Backend(
    service=VIPS[0], address="10.0.0.1", state="up", serving=True, reason="", healthy=True, weight=1, weight_now=1,
    backup=False, cr=True, cr_reason="", reached="eth0", connections=0, load=None, assigned=0, flows=0, share=0.1,
    checks=[], since=0.0, changed=False,
)  # fmt: skip


def backend(vip: str, i: int, **more: object) -> Backend:
    own = {"address": f"10.0.{i // 250}.{i % 250 + 1}", "connections": i, "assigned": 10 * i, "flows": 1000 - i}
    return msgspec.structs.replace(PLAIN, service=vip, **(own | more))


def seen(count: int = 3, at: float = 1.0, **more: object) -> Seen:
    services = [
        Service(
            vip=vip, mode="negotiated", fallback="auto", policy="maglev", backends=count, serving=count,
            healthy_weight=count, weight=count, panic=False, backups=False, quorum=0, announced=True, flows=12,
            packets=1, bytes=2, changed=False,
        )
        for vip in VIPS
    ]  # fmt: skip
    status = Status(
        state="serving", problems=[], version=Version(version="1", api=1, pid=1, started=0.0),
        interfaces=[Interface(name="eth0", mode="native", mtu=1500, queues=1, mac="02:00:00:00:00:01")], queues=1,
        zero_copy=False, ack_bypass=True, services=2, backends=2 * count, backends_serving=2 * count, flows=24,
        configuration="", changes=0, counters={"workers": {"received": int(100 * at)}, "xdp": {}, "daemon": {}},
    )  # fmt: skip
    return Seen(at, status, services, [backend(vip, i, **more) for vip in VIPS for i in range(count)])


def lines(view: View, width: int = 80, height: int = 24) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width, height=height, force_terminal=False).print(render(view, width, height))
    return out.getvalue().rstrip("\n").split("\n")


def nothing(*_: object) -> str:
    raise AssertionError("nothing is to be changed")


def test_what_is_seen():
    view = View()
    view.see(seen())
    view.see(seen(at=3.0))
    shown = lines(view)
    assert shown[0].startswith("eth0  serving  6/6 backends  24 flows  100 packets/s")
    assert [line.split()[0] for line in shown if line.startswith("tcp://")] == list(VIPS)
    row = next(line for line in shown if "10.0.0.2 " in line)
    assert row.split() == ["+", "10.0.0.2", "up", "up", "1", "cr", "1", "0", "999"]


def test_a_backend_that_does_not_serve_says_why():
    view = View()
    view.see(seen(serving=False, healthy=False, reason="tcp: refused"))
    assert any(line.startswith("- 10.0.0.1") and line.endswith("tcp: refused") for line in lines(view))


@pytest.mark.parametrize(("width", "height"), [(80, 24), (40, 5), (200, 60), (20, 3)])
@pytest.mark.parametrize("count", [0, 3, 300])
def test_it_fits(width, height, count):
    view = View()
    view.see(seen(count))
    for _ in range(3):
        shown = lines(view, width, height)
        assert max(map(len, shown)) <= width
        assert len(shown) <= max(height, 5)
        if count and width >= 40:  # the selected one is to be seen, wherever it is
            assert view.current
            assert any(line[2:].startswith(view.current.address) for line in shown)
        view.move(count)


def test_the_keys_are_told_whole():
    """80 columns are enough."""
    view = View()
    view.see(seen())
    view.press("?", nothing)
    shown = lines(view)[-1]
    assert (shown[:6], shown[-9:]) == ("q quit", "+- weight")


def test_keys_that_come_together():
    assert keys("/13\r\x1b[A\x1bOBq\x1b") == ["/", "1", "3", "\r", "k", "j", "q", "\x1b"]


def test_keys_move_sort_and_filter():
    view = View()
    view.see(seen())
    assert view.press("j", nothing) and view.current and view.current.address == "10.0.0.2"
    assert view.press("k", nothing) and view.press("k", nothing) and view.current.address == "10.0.0.1"
    assert view.press("s", nothing) and view.sort == "connections"
    assert [b.connections for b in view.rows] == [2, 1, 0, 2, 1, 0]
    for key in "/fd00":
        view.press(key, nothing)
    assert {b.service for b in view.rows} == {VIPS[1]} and view.current and view.current.service == VIPS[1]
    assert "filter: fd00_" in lines(view)[-1]
    view.press("\r", nothing)
    assert not view.press("q", nothing)


def test_changes_are_confirmed():
    view, done = View(), []
    view.see(seen())

    def change(backend: Backend, fields: Patch) -> str:
        done.append((backend.address, fields))
        return "done"

    view.press("d", nothing)
    assert lines(view)[-1] == "drain 10.0.0.1 in tcp://10.0.0.100:80? y/n"
    view.press("x", nothing)
    assert (done, view.message) == ([], "nothing changed")
    for key, fields in (
        ("d", Patch(state="drain")),
        ("m", Patch(state="maint")),
        ("r", Patch(state="ready")),
        ("+", Patch(weight=2)),
    ):
        view.press(key, change)
        assert not done
        view.press("y", change)
        assert done.pop() == ("10.0.0.1", fields) and view.message == "done"
    assert view.press("-", nothing) and view.asking.endswith("1 -> 0? y/n")


def test_one_that_went_is_not_selected():
    view = View()
    view.see(seen(3))
    view.move(100)
    view.see(seen(1))
    assert view.current and view.current.address == "10.0.0.1"
    view.see(seen(0))
    assert view.current is None and view.press("d", nothing) and not view.asking


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from([*"jks/?dmr+-yn", "\r", "\x1b", "\x7f", "0", "ä"]), max_size=30), st.integers(0, 4))
def test_whatever_is_pressed(keys, count):
    view = View()
    for i, key in enumerate(keys):
        view.see(seen(count, at=float(i)))
        assert view.press(key, lambda *_: "done")
        assert max(map(len, lines(view, 60, 10))) <= 60
    assert view.sort in SORTS
