"""What an engine tells those that listen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from crablb.kernel.netlink import Link, NextHop
from crablb.model import Address, Vip

__all__ = ["Event", "HopsChanged", "Judged", "LinksChanged", "Notice", "Started", "Swept"]


@dataclass(frozen=True, slots=True)
class Event:
    """Something that befell a load balancer."""

    #: "backend-up", "backend-down", "policy-failed", "handler-failed", "vip-in-use", "vip-taken", "vip-yielded",
    #: "server-silent", "changed", "redirects-stopped", "redirects-resumed",
    #: "backend-healthy", "backend-unhealthy", "panic", "panic-over", "quorum-lost", "quorum-reached",
    #: "checks-late", "checks-in-time",
    #: "reloaded", "not-reloaded", "state", "weight", "taken-over" (from another process), "takeover-failed",
    #: "interface-gone", "interface-back", "interface-renamed", "interface-changed", "interface-unserved",
    #: "failed" (it cannot go on: a task of its own is given up)
    kind: str
    backend: Address | None = None
    vip: Vip | None = None
    reason: str = ""
    interface: str = ""  # its name now


@dataclass(frozen=True, slots=True)
class Started:
    """It serves from now on."""


@dataclass(frozen=True, slots=True)
class Judged:
    """What is thought of some backends has changed."""


@dataclass(frozen=True, slots=True)
class HopsChanged:
    """The ways to some backends have changed."""

    before: Mapping[Address, NextHop]  # of those that there was something to know of
    now: Mapping[Address, NextHop]


@dataclass(frozen=True, slots=True)
class LinksChanged:
    """Interfaces may have changed."""

    links: Mapping[int, Link]  # by index


@dataclass(frozen=True, slots=True)
class Swept:
    """Flows were swept."""

    flows: int  # that the XDP program has
    # Since the last sweep:
    refused: int  # connections that the workers' caches had no room for
    dropped: int = 0  # packets that the kernel dropped in front of the workers
    unsent: int = 0  # packets that it refused to send for them


#: An :class:`Event` is for everybody; the others are for :mod:`crablb.control`.
Notice = Event | Started | Judged | HopsChanged | LinksChanged | Swept
