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
        "limited",
        "restarts",
        "checksums",
        "joins_known",
        "joins_direct",
        "moved_over",
        "errors_heeded",
        "tagged",
        "elsewhere",
        "early",
        "shared",
        "faded",
        "waited",
        "refused_syns",
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
    "a SYN that nobody remembers fell back to whom its policy chose": Scenario(
        seed=366,
        connections=5000,
        servers=8,
        clients=64,
        ports=500,
        cache=64,
        flows=16,
        multipath=100,
        split=1,
        heal=3500000,
        services=(("power-of-two", 1, 1, 1),),
    ),
    "an error about the packet of a backend without a next hop went to another one": Scenario(
        seed=399,
        connections=5000,
        servers=3,
        agents=0,
        ports=50,
        tags=1,
        heal=3500000,
        services=(("least-connections", 0, 2, 1), ("maglev", 0, 2, 0)),
        events=(
            (474928, "kill", 3, 500000, 0),
            (1240171, "crash", 4, 1000, 0),
            (1431838, "narrow", 1000, 3000000, 0),
            (1907826, "loss", 2000, 3000000, 0),
        ),
    ),
    "a flow with VLAN tags was forgotten with the daemon": Scenario(
        seed=20,
        connections=1000,
        rate=10000,
        servers=2,
        clients=2,
        tags=2,
        split=1,
        heal=3_000_000,
        services=(("power-of-two", 0, 1, 1),),
        events=((437576, "kill", 3, 500000, 0),),
    ),
    "a flow out of the XDP program's reach was forgotten with the daemon": Scenario(
        seed=10,
        connections=500,
        rate=500,
        servers=3,
        clients=1,
        agents=0,
        multipath=30,
        split=1,
        apart=1,
        collide=1,
        heal=5_000_000,
        services=(("random", 1, 1, 1),),
        events=((3238235, "kill", 3, 20000000, 0),),
    ),
    "a SYN's data were executed by another server too, as the first one had no next hop": Scenario(
        seed=26,
        rate=10000,
        balancers=2,
        servers=2,
        clients=64,
        agents=0,
        ports=50,
        multipath=100,
        tags=1,
        split=1,
        heal=3_000_000,
        services=(("least-connections", 2, 0, 1), ("random", 1, 0, 1)),
        events=(
            (218492, "dup", 2000, 3000000, 0),
            (263880, "dup", 100, 3000000, 0),
            (454019, "crash", 7, 500000, 0),
            (510961, "loss", 10, 500000, 0),
            (775879, "back", 1, 500000, 0),
            (1068496, "loss", 500, 3000000, 0),
            (1086995, "dup", 10, 1000, 0),
            (1219580, "dup", 10, 500000, 0),
            (1568119, "mtu", 1300, 0, 0),
            (1777005, "dup", 100, 500000, 0),
            (1966907, "cut", 1, 50000, 0),
            (1970803, "bury", 6, 20000000, 0),
        ),
    ),
    "an error went by an earlier connection that its own queue knew": Scenario(
        seed=537,
        connections=5000,
        rate=500,
        servers=2,
        clients=1,
        agents=100,
        multipath=100,
        tags=1,
        split=1,
        collide=1,
        syn_rate=1000,
        heal=11000000,
        services=(("maglev", 1, 2, 3),),
        events=(
            (4009811, "member", 2, 0, 0),
            (4534860, "hostile", 0, 63, 11),
            (5159003, "kill", 5, 1000, 0),
            (7029683, "narrow", 800, 3000000, 0),
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
    "a bucket has no bottom": ("rate", {"bpf/lb.bpf.c": ("if (lacks + token > all)", "if (lacks > all)")}),
    "anything takes tokens": ("rate", {"bpf/lb.bpf.c": (
        "if (flags & CRAB_SYN && has_enough(*service))", "if (has_enough(*service))"
    )}),
    "subflows go by their hash": ("join-strayed", {"native/examine.c": ("        it->slot = &it->joined;\n", "")}),
}  # fmt: skip

#: More of them, of what only some seeds have: a successor, VLAN tags, two interfaces, a narrow way.
BROKEN_TOO = {
    "a successor does not know subflows": ("join-strayed", {"native/joins.c": (
        "    memcpy((void *)joins->words, given +", "    if (0) memcpy((void *)joins->words, given +"
    )}),
    "a sweep forgets the subflows of those that are left": ("join-strayed", {"native/joins.c": (
        "word & BACKEND && !(backends", "word & BACKEND && (backends"
    )}),
    "subflows are redirected": ("join-redirected", {"native/option.c": (
        "CRAB_OPTION_UNSAFE | CRAB_OPTION_JOIN", "CRAB_OPTION_JOIN"
    )}),
    "errors go by their hash": ("error-moved", {"native/forward.c": (
        "    if (id == CRAB_NO_BACKEND)\n        id = backend_of(s, it);\n    if (!crab",
        "    id = backend_of(s, it);\n    if (!crab",
    )}),
    "tags go along to another interface": ("tags", {"native/forward.c": (
        "uint32_t tags = p->l3 - 14u;", "uint32_t tags = 0; (void)p;"
    )}),
    "a worker sends where a packet came from": ("interface", {"native/forward.c": (
        "        frame->ifindex = backend->ifindex;\n", ""
    )}),
    "the XDP program sends where a packet came from": ("interface", {"bpf/lb.bpf.c": (
        "int back = ifindex == ctx->ingress_ifindex", "int back = 1"
    )}),
    "the XDP program takes tags for addresses": ("tags", {"bpf/lb.bpf.c": (
        " && p.l3 == ETH_HLEN) /* what", ") /* what"
    )}),
    "a flow with VLAN tags is not written down": ("moved", {"native/forward.c": (
        "(written || (!(p->tcp_flags", "(written || (p->l3 == 14 && !(p->tcp_flags",
    )}),
    "a flow out of the XDP program's reach is not written down": ("moved", {"native/forward.c": (
        "(written || (!(p->tcp_flags", "(written || (backend->dst_mac[5] % 3 && !(p->tcp_flags",
    )}),
    "a SYN's data go to another server": ("copy-moved", {"native/forward.c": (
        "    bool data = f && f->data;\n", "    bool data = f && f->data && 0;\n"
    )}),
    "what is late is taken for a new connection's": ("moved", {"native/flows.h": (
        "    return ntohl(seq) - ntohl(syn->isn) - 1 < CRAB_FIRST_WINDOW;", "    return seq || syn;"
    )}),
}  # fmt: skip


@pytest.mark.parametrize("name", [*BROKEN, *(pytest.param(name, marks=pytest.mark.long) for name in BROKEN_TOO)])
def test_broken_rules_are_found(world: Path, tmp_path: Path, name: str) -> None:
    by, mutations = (BROKEN | BROKEN_TOO)[name]
    broken = mutate(world, tmp_path, mutations)
    found: set[str] = set()
    for seed in range(60):
        found |= play(broken, of(seed, CONNECTIONS)).found.keys()
        if by in found:
            return
    pytest.fail(f"{name}: {found or 'nothing'} found")
