"""The commands, without the kernel."""

from __future__ import annotations

import errno

from crablb.kernel.xsk import _explain


def test_a_kernel_without_af_xdp():
    assert _explain("eth0", 0, "socket", errno.EAFNOSUPPORT) == (
        "this kernel has no AF_XDP; it needs CONFIG_XDP_SOCKETS=y"
    )
