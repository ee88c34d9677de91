"""Programs, maps and sockets in the kernel: a bare namespace, which needs root, and no lab."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.namespaces import Pair


@pytest.fixture
def namespace() -> Iterator[Pair]:
    with Pair.made() as pair:
        yield pair
