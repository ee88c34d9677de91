"""Labs with unique names, removed whatever happens."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from crablb.lab import Lab
from tests.helpers.namespaces import unique
from tests.helpers.world import World


@pytest.fixture
def make_lab() -> Iterator[Callable[..., Lab]]:
    """``make_lab(topology="bridge", servers=1, offload=True)``: a lab of its own."""
    labs = []

    def make(topology: str = "bridge", servers: int = 1, *, offload: bool = True) -> Lab:
        lab = Lab.create(unique(), topology, servers, offload=offload)  # type: ignore[arg-type]
        labs.append(lab)
        return lab

    yield make
    for lab in labs:
        lab.destroy()


@pytest.fixture
def make_world(make_lab: Callable[..., Lab], tmp_path: Path) -> Callable[..., World]:
    def make(topology: str = "bridge", servers: int = 1, *, offload: bool = True) -> World:
        return World(make_lab(topology, servers, offload=offload), tmp_path)

    return make


@pytest.fixture
def other_xdp_program(tmp_path: Path) -> Path:
    """Somebody else's XDP program, compiled: ``ip link set eth0 xdp obj PATH sec xdp``."""
    source, target = tmp_path / "pass.bpf.c", tmp_path / "pass.bpf.o"
    source.write_text('__attribute__((section("xdp"), used)) int pass(void *c) { return 2; }\n')
    subprocess.run(["clang", "-target", "bpf", "-O2", "-c", source, "-o", target], check=True)
    return target
