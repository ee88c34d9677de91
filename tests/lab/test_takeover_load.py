"""Under a load of new connections, reloads, takeovers and an upgrade lose nothing: no connection fails, no SYN is lost.

At a rate that this machine takes while nothing happens.  How long a packet waits decides nothing here (the benchmarks'
suite ``takeover`` says it).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

from bench.takeover import WAYS, Found, Relay
from tests.helpers.bench import quiet
from tests.helpers.earlier import compiled, released

pytestmark = [pytest.mark.long, pytest.mark.xdist_group("takeover-load")]

RATE = 1000
RELOADS, TAKEOVERS = 20, 5


@pytest.fixture(scope="module")
def relay() -> Iterator[Relay]:
    with Relay.standing(quiet()) as relay:
        yield relay


def whole(found: Found) -> bool:
    """Whether all went well.  (Clients may have sent a SYN again that the machine, busy with other things, kept.)"""
    assert found.connections > 0
    assert (found.failed, found.lost) == (Counter(), 0)
    return True


@pytest.mark.parametrize("name", WAYS)
def test_nothing_is_lost(relay: Relay, name: str):
    way = WAYS[name]
    with relay.serving(way):
        rate, calm = relay.bearable(way, RATE)
        assert whole(calm)
        assert whole(relay.often(way, rate, relay.reload, RELOADS))
        assert whole(relay.often(way, rate, relay.takeover, TAKEOVERS))
        # So it is seen when something is.
        assert relay.often(way, rate, relay.restart, 1).lost > 0


@pytest.mark.parametrize("name", WAYS)
def test_an_upgrade_loses_nothing(relay: Relay, name: str, before: list[str]):
    """This version takes over from the one that was released last, and is taken over in its turn."""
    way = WAYS[name]
    with relay.serving(way, before):
        rate, calm = relay.bearable(way, RATE)
        assert whole(calm)
        assert whole(relay.often(way, rate, relay.upgrade, 1))
        assert whole(relay.often(way, rate, relay.takeover, 1))


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return compiled(released(), tmp_path_factory.mktemp("before"))
