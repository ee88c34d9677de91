"""BPF programs at clsact."""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Any, Literal

from crablb.kernel._libbpf import ffi, lib
from crablb.kernel.bpf.errors import BpfError, check
from crablb.kernel.bpf.programs import Program

__all__ = ["TcFilter", "attach_tc"]


@dataclass(slots=True)
class TcFilter:
    """A direct-action program on an interface's clsact hook."""

    ifindex: int
    direction: Literal["ingress", "egress"]
    handle: int
    priority: int

    def detach(self) -> None:
        """Remove the filter; nothing happens if the interface or the filter has gone."""
        opts = ffi.new("struct bpf_tc_opts *")
        opts.sz = ffi.sizeof("struct bpf_tc_opts")
        opts.handle, opts.priority = self.handle, self.priority
        lib.bpf_tc_detach(_tc_hook(self.ifindex, self.direction), opts)
        lib.crab_log_take()

    @property
    def attached(self) -> int:
        """The id of its program; 0 if the filter has gone."""
        opts = ffi.new("struct bpf_tc_opts *")
        opts.sz = ffi.sizeof("struct bpf_tc_opts")
        opts.handle, opts.priority = self.handle, self.priority
        rc = lib.bpf_tc_query(_tc_hook(self.ifindex, self.direction), opts)
        lib.crab_log_take()
        return 0 if rc else int(opts.prog_id)

    def destroy_hook(self) -> None:
        """Remove the interface's clsact qdisc with everything on it."""
        hook = _tc_hook(self.ifindex, self.direction)
        hook.attach_point = lib.BPF_TC_INGRESS | lib.BPF_TC_EGRESS
        lib.bpf_tc_hook_destroy(hook)
        lib.crab_log_take()


def _tc_hook(ifindex: int, direction: Literal["ingress", "egress"]) -> Any:
    hook = ffi.new("struct bpf_tc_hook *")
    hook.sz = ffi.sizeof("struct bpf_tc_hook")
    hook.ifindex = ifindex
    hook.attach_point = lib.BPF_TC_INGRESS if direction == "ingress" else lib.BPF_TC_EGRESS
    return hook


def attach_tc(
    program: Program,
    ifindex: int,
    direction: Literal["ingress", "egress"] = "ingress",
    *,
    priority: int = 1,
    handle: int = 1,
) -> tuple[TcFilter, bool]:
    """Attach at clsact; returns the filter, and whether the clsact qdisc was made for it.

    A filter of the same priority and handle is replaced.
    """
    hook = _tc_hook(ifindex, direction)
    rc = lib.bpf_tc_hook_create(hook)
    made = rc == 0
    if rc not in (0, -errno.EEXIST):  # perhaps only the answer was lost, and it is there
        rc = lib.bpf_tc_hook_create(hook)
        made = rc in (0, -errno.EEXIST)
        check(0 if made else rc, f"cannot make a clsact qdisc on interface {ifindex}")
    opts = ffi.new("struct bpf_tc_opts *")
    opts.sz = ffi.sizeof("struct bpf_tc_opts")
    opts.handle, opts.priority, opts.prog_fd = handle, priority, program.fd
    opts.flags = lib.BPF_TC_F_REPLACE
    filters = TcFilter(ifindex, direction, handle, priority)
    try:
        check(lib.bpf_tc_attach(hook, opts), f"cannot attach to clsact on interface {ifindex}")
    except BpfError:
        if made:
            filters.destroy_hook()
        raise
    return filters, made
