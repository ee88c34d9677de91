"""How many SYNs a service takes."""

from __future__ import annotations

import time
from dataclasses import replace

from crablb._native import ffi, lib
from hypothesis import given
from hypothesis import strategies as st

from crablb.model import Backend, Mode, Service
from tests.unit.test_snapshot import MAIL, WEB, A, B, Core, build, config, freed, sight  # noqa: F401 (a fixture)

SECOND = 1_000_000_000


@given(
    token=st.integers(1, SECOND),
    burst=st.integers(1, 1000),
    gaps=st.lists(st.integers(0, 3 * SECOND), max_size=200),
)
def test_a_bucket_of_tokens(token, burst, gaps):
    """As one that is counted: never more than there are, never fewer."""
    limit = ffi.new("struct crab_limit *", {"token_ns": token, "size_ns": token * (burst - 1)})
    now, held, since = SECOND, burst * token, SECOND  # in nanoseconds' worth of tokens
    for gap in gaps:
        now += gap
        held, since = min(burst * token, held + now - since), now
        assert lib.crab_limit_take(limit, now) == (held >= token)
        if held >= token:
            held -= token


def served(core: Core, vip: object, ports: range, flags: str = "S") -> int:
    return sum(core.send(vip, port, flags) != ("dropped", None) for port in ports)  # type: ignore[arg-type]


def test_a_flood_to_one_service_leaves_others_alone():
    """Whatever its mode and its clients; those above the limit are counted, and what is no SYN goes on."""
    for more in ({}, {"mode": Mode.NEVER}, {"mode": Mode.ALWAYS}):
        limited = Service(WEB, (Backend(A), Backend(B)), syn_rate=100, **more)
        wanted = config(limited, Service(MAIL, (Backend(A),)))
        core = Core(build(wanted, sight(wanted)))
        begun = time.monotonic()
        passed = served(core, WEB, range(2000, 3000))
        took = time.monotonic() - begun
        assert 16 <= passed <= 16 + 100 * took + 1
        assert core.counters[lib.CRAB_C_DROP_RATE] == 1000 - passed
        assert served(core, MAIL, range(2000, 3000)) == 1000
        assert served(core, WEB, range(2000, 3000), "A") == 1000


def test_a_change_of_something_else_gives_no_tokens():
    services = (Service(WEB, (Backend(A), Backend(B)), syn_rate=1), Service(MAIL, (Backend(A),)))
    wanted = config(*services)
    state = sight(wanted)
    one = build(wanted, state)
    core = Core(one)
    assert 16 <= served(core, WEB, range(2000, 2100)) < 100
    heavier = config(replace(services[0], backends=(Backend(A, 2), Backend(B))), services[1])
    core.look(build(heavier, state, one))
    assert served(core, WEB, range(2100, 2110)) < 10
    core.look(build(config(replace(services[0], syn_rate=20), services[1]), state, core.snapshot))
    assert served(core, WEB, range(2200, 2210)) == 10
    core.look(build(config(replace(services[0], syn_rate=0), services[1]), state, core.snapshot))
    assert served(core, WEB, range(3000, 4000)) == 1000
