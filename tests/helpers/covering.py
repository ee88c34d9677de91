"""Parameters that a test has together: a few of all that there are by default, every one by ``make test-each``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import product
from typing import Any

import pytest


def covering(ids: Mapping[Any, str] | None = None, /, **values: Iterable[object]) -> pytest.MarkDecorator:
    """``parametrize`` with every combination of the values of these names.

    So many as the longest has, in which each value is, are always tried: the first with the first, the second with the
    second, and so on, from the beginning where there is none left.  The others are for ``make test-each``.
    """
    axes = [tuple(each) for each in values.values()]
    always = {tuple(axis[i % len(axis)] for axis in axes) for i in range(max(map(len, axes)))}
    named = ids or {}
    return pytest.mark.parametrize(
        tuple(values),
        [
            pytest.param(
                *each,
                id="-".join(str(named.get(one, one)) for one in each),
                marks=() if each in always else pytest.mark.each,
            )
            for each in product(*axes)
        ],
    )


OFFLOAD = {True: "offload", False: "no-offload"}
