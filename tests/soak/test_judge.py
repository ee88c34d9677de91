"""What counts as a leak, of numbers that are made up."""

from __future__ import annotations

import random

import pytest

from tests.soak.judge import LOOKS, growth, leaks, least

choose = random.Random(17)


def noise(size: float, count: int = 40) -> list[float]:
    return [round(choose.uniform(0, size)) for _ in range(count)]


@pytest.mark.parametrize(
    "looks",
    [
        [7.0] * 40,
        [*range(10), *[9.0] * 30],  # a table that fills
        [float(min(n, 5) + n % 2) for n in range(40)],
        [*[5.0] * 20, *[6.0] * 20],  # one made once, late
        [5.0 + (n % 13 == 0) * 40 for n in range(40)],  # what comes, goes
        noise(1),
        [float(n % 4) for n in range(40)],
    ],
)
def test_what_does_not_grow(looks):
    assert leaks({"descriptors": looks, "Rss KiB": [40000 + 600 * n for n in looks]}) == {}


@pytest.mark.parametrize("every", [1, 2, 5, 10])
@pytest.mark.parametrize("size", [0, 1])
def test_one_in_so_many_looks_is_lost(every, size):
    """Whatever comes and goes beside it, if it is less than what is lost in the end."""
    looks = [n // every + extra for n, extra in enumerate(noise(size))]
    assert leaks({"descriptors": looks}) == {"descriptors": growth(looks)}


@pytest.mark.parametrize("count", [LOOKS, 12, 100])
def test_one_is_lost_each_time(count):
    looks = [float(n) for n in range(count)]
    assert growth(looks) == pytest.approx(count - count // 4 - 1, abs=2)
    assert "x" in leaks({"x": looks})


def test_memory_is_lost():
    """200 KiB each time, in what an allocator does; and as much that is given back.  What is in use says it sooner."""
    lost = [60000 + 200 * n + extra for n, extra in enumerate(noise(900))]
    assert set(leaks({"Rss KiB": lost, "malloc KiB": lost})) == {"Rss KiB", "malloc KiB"}
    assert set(leaks({"Rss KiB": lost[:12], "malloc KiB": lost[:12]})) == {"malloc KiB"}
    assert leaks({"Rss KiB": [60000 + extra for extra in noise(900)]}) == {}


def test_too_few_looks_tell_nothing():
    with pytest.raises(ValueError, match="looks"):
        leaks({"x": [1.0] * (LOOKS - 1)})


def test_what_is_under_way_is_left_out():
    looks = [{"a": 3.0, "b": 1.0}, {"a": 2.0}, {"a": 5.0, "b": 1.0, "c": 9.0}]
    assert least(looks) == {"a": 2.0, "b": 0.0, "c": 0.0}
