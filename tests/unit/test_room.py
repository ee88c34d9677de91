"""The room itself: its tests have no more power than anybody."""

from __future__ import annotations

import subprocess

import pytest

from crablb.errors import CrablbError
from crablb.kernel import bpf


def test_nothing_of_root():
    with pytest.raises(CrablbError, match="CAP_BPF"):
        bpf.Object(bpf.object_path("lb"))
    assert subprocess.run(["unshare", "--net", "true"], capture_output=True, check=False).returncode == 1
