"""Seeds: a farm each, and what befalls it; and whether broken rules are found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.sim.__main__ import RECORD
from tests.sim.scenario import ROOT, Scenario, build, mutate, of, play, shrink

pytestmark = pytest.mark.xdist_group("sim")
CONNECTIONS = 2000


@pytest.fixture(scope="session")
def world() -> Path:
    return build(ROOT / "build/sim")


@pytest.mark.parametrize("seed", range(json.loads(RECORD.read_text())["per_commit"]))
def test_seed(world: Path, seed: int) -> None:
    scenario = of(seed, CONNECTIONS)
    played = play(world, scenario)
    if played.found:
        wanted = set(played.found)
        less = shrink(scenario, lambda s: bool(wanted & set(play(world, s).found)))
        pytest.fail("\n".join((*played.found.values(), less.test(wanted))), pytrace=False)
    assert played.counts["served"] == CONNECTIONS


def test_a_seed_is_one_run(world: Path) -> None:
    """Packet by packet; another seed is another run."""
    first, second, other = (play(world, of(seed, 500), log=1, trace=7) for seed in (3, 3, 4))
    assert first.log == second.log and first.counts == second.counts
    assert other.counts != first.counts
    assert any(line.startswith("trace") for line in first.log)


def test_every_way_is_taken(world: Path) -> None:
    """What the seeds are good for: both ways, the XDP program alone, takeovers, strangers, losses."""
    runs = [play(world, of(seed, CONNECTIONS)).counts for seed in range(8)]
    for name in (
        "taken",
        "redirected",
        "fallback",
        "by_xdp",
        "learned",
        "lost",
        "dropped",
        "hostile",
        "restarts",
        "checksums",
    ):
        assert sum(counts[name] for counts in runs), name


#: What was found, as it was shrunk.
FOUND = {
    "a stranger's SYN in a handshake took the client's place": Scenario(
        seed=147,
        balancers=2,
        servers=7,
        clients=1,
        heal=3_000_000,
        services=(("least-connections", 1, 0, 2), ("weighted-round-robin", 1, 2, 0)),
        events=(
            (163158, "ecmp", 70312984, 0, 0),
            (461929, "corrupt", 2000, 500000, 0),
            (1016698, "member", 3, 0, 0),
            (1200395, "hostile", 0, 109, 2),
        ),
    ),
    "a port used again and again pushed another connection's SYN out": Scenario(
        seed=171,
        balancers=4,
        servers=3,
        agents=0,
        ports=50,
        heal=3_000_000,
        services=(("least-connections", 1, 2, 1),),
        events=(
            (17308, "lose", 3, 3000000, 0),
            (364458, "ecmp", 533228862, 0, 0),
            (630532, "back", 1, 3000000, 0),
        ),
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found(world: Path, name: str) -> None:
    assert play(world, FOUND[name]).found == {}


#: Rules broken, in the very code that is simulated: what they are found by, and the change.
BROKEN = {
    "an established flow goes by its hash": ("moved", {"native/forward.c": (
        "    if (f) {\n        id = f->backend;\n",
        "    if (f) {\n        id = backend_of(s, it) != CRAB_NO_BACKEND ? backend_of(s, it) : f->backend;\n",
    )}),
    "the XDP program does not ask about a SYN's port": ("moved", {"bpf/lb.bpf.c": (
        "f->flags = flow.flags | CRAB_FLOW_ASK;", ";"
    )}),
    "a SYN's copy is decided anew": ("copy-moved", {"native/forward.c": (
        "if (crab_keeps(s, it->service, f)) {", "if (crab_keeps(s, it->service, f) && 0) {"
    )}),
    "data in a SYN are redirected": ("twice", {"native/examine.c": (
        "if (crab_unlikely(data || it->found & CRAB_OPTION_UNSAFE))", "if (0 && data)"
    )}),
    "what was dropped is sent": ("conserved", {"native/forward.c": (
        "        b->frames[i].len = 0;\n", "        (void)i;\n"
    )}),
    "a packet has two reasons": ("reason", {"native/examine.c": (
        "b->core->counters[why]++;", "b->core->counters[why] += 2;"
    )}),
    "the XDP program does not count": ("reason", {"bpf/lb.bpf.c": ("    count(CRAB_XDP_FLOW);\n", "")}),
    "a forged redirect stays": ("forged", {"native/option.c": (
        "        if (len != 2)\n            return CRAB_OPTION_FORGED;", "        if (len != 2)\n            return 0;"
    )}),
    "what comes back goes round": ("loop", {
        "bpf/hop.h": ("    ip[family == 4 ? 8 : 7]--;\n    if (family != 4)", "    if (ip && family)"),
        "bpf/lb.bpf.c": ("if (is_sent_back(data, p, path))", "if (0)"),
        "native/forward.c": (
            "if (crab_unlikely(is_sent_back(frame->data, p, backend)))", "if (0 && is_sent_back(NULL, p, backend))",
        ),
    }),
    "who cannot be reached is redirected for ever": ("unserved", {"native/forward.c": (
        "copies >= 2 &&", "copies >= 99 &&"
    )}),
    "nothing is forgotten": ("bounded", {"native/flows.h": (
        ">= crab_entry_lifetime(f->state);", "> 65536u + crab_entry_lifetime(f->state);"
    )}),
    "wrong checksums are put right": ("healed", {"native/examine.c": (
        "if (crab_unlikely(it->sum.state == CRAB_CSUM_BAD))", "if (0)"
    )}),
    "checksums are left to nobody": ("checksum", {"native/forward.c": (
        "    store16(frame->data + it->packet.l4 + CRAB_TCP_CSUM, crab_tcp_right(it->sum));\n", "    (void)it;\n"
    )}),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_rules_are_found(world: Path, tmp_path: Path, name: str) -> None:
    by, mutations = BROKEN[name]
    broken = mutate(world, tmp_path, mutations)
    found: set[str] = set()
    for seed in range(60):
        found |= play(broken, of(seed, CONNECTIONS)).found.keys()
        if by in found:
            return
    pytest.fail(f"{name}: {found or 'nothing'} found")
