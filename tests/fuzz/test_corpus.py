"""What libFuzzer found to reach everything, once more: under ASan and UBSan, and by those who must agree.

The packet target's inputs by three: the core, the oracle in C (both inside of the target), and the reference in Python.
The fourth, the XDP program, is asked in tests/bpf/test_corpus.py.
"""

from __future__ import annotations

from typing import Any

import pytest

from crablb.dataplane import statistics
from tests.fuzz import corpus
from tests.helpers.frames import reference
from tests.reference import packets

pytestmark = pytest.mark.xdist_group("fuzz")


@pytest.fixture(scope="module", autouse=True)
def built() -> None:
    corpus.build()


@pytest.mark.parametrize("target", corpus.TARGETS)
def test_what_is_kept_is_sound(target):
    inputs = corpus.kept(target)
    assert len(inputs) > 50
    corpus.replay(target, inputs)


@pytest.mark.parametrize("name", corpus.found())
def test_what_failed_once_does_not_fail(name):
    target, data = corpus.found()[name]
    corpus.replay(target, [data])


END = "= it->packet.end;\n"
#: A byte too far, in the code under test: its file, a text in it, and what is there instead.
TOO_FAR = {
    "written behind": ("forward", END, f"{END}    frame->data[it->packet.end] = 0;\n"),
    "written in front": ("forward", END, f"{END}    frame->data[-CRAB_HEADROOM - 1] = 0;\n"),
    "read behind": ("answer", "crab_sum(icmp, length);", "crab_sum(icmp, length) + icmp[length];"),
    "copied from behind": ("forward", "memmove(moved, frame, p->l3);", "memmove(moved, frame, *len + 1);"),
}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("name", TOO_FAR)
def test_a_byte_too_far_is_seen(tmp_path, name):
    """Where frames lie, nothing is theirs but the room in front that is promised, and they themselves."""
    program = corpus.mutate("packet", tmp_path, *TOO_FAR[name])
    with pytest.raises(AssertionError, match="AddressSanitizer: use-after-poison"):
        corpus.replay("packet", corpus.kept("packet"), program=program)


def test_the_corpus_is_small():
    assert sum(path.stat().st_size for path in (corpus.FOLDER / "corpus").iterdir()) < 300_000


def as_reference(script: dict[str, Any]) -> packets.LoadBalancer:
    """The reference with the configuration of an input that it can follow."""
    world = reference(script["experimental"], script["mode"], script["fallback"], elsewhere=script["elsewhere"])
    for service in world.services:
        service.on_dead = script["on_dead"]
        if script["nobody"] and world.backends[next(iter(service.table))].address[0] == 0xFD:
            service.table = [65535] * len(service.table)
    if script["dead"]:
        world.backends[0].dead = world.backends[5].dead = True
    if script["unusable"]:
        world.backends[3].usable = world.backends[4].usable = False
    if script["said"]:
        world.services[0].said = {0: (True, False), 3: (False, False), 6: (True, True)}
        world.services[2].said = {3: (False, False), 6: (True, True)}
    return world


def test_the_reference_agrees():
    """Of the inputs that it can follow, every frame: the same counter and the same bytes."""
    followed, outcomes = 0, set()
    for script in corpus.scripts(corpus.kept("packet")):
        if not script["plain"]:
            continue
        followed += 1
        world = as_reference(script)
        for frame, what, quoting, sent, elsewhere in script["frames"]:
            if quoting:
                continue
            outcome, expected = world.handle(bytes.fromhex(frame))
            outcomes.add(outcome)
            assert (outcome, (expected or b"").hex()) == (statistics.WORKER_COUNTERS[what], sent), (script, frame)
            assert not sent or world.elsewhere == elsewhere
    assert followed > 50
    assert len(outcomes) > 15
