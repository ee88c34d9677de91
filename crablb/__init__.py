"""crablb: a layer-4 load balancer that takes itself out of the way by connection redirection.

This is the library; what is not named here may change from one version to the next.  A name is imported when it is
first used (PEP 562): who uses :mod:`crablb.kernel.xsk` alone does not pay for the rest.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    __version__: str
    from crablb.balancer import LoadBalancer, Statistics
    from crablb.dataplane.events import Event
    from crablb.dataplane.handlers import Frames, Match
    from crablb.errors import ConfigError, CrablbError, KernelError
    from crablb.model import (
        Announce,
        Backend,
        Bypass,
        Fallback,
        Hashing,
        Mode,
        OnDead,
        OptionForm,
        Service,
        State,
        Vip,
        XdpMode,
    )
    from crablb.selection.loads import Backends, Load

__all__ = [
    "Announce",
    "Backend",
    "Backends",
    "Bypass",
    "ConfigError",
    "CrablbError",
    "Event",
    "Fallback",
    "Frames",
    "Hashing",
    "KernelError",
    "Load",
    "LoadBalancer",
    "Match",
    "Mode",
    "OnDead",
    "OptionForm",
    "Service",
    "State",
    "Statistics",
    "Vip",
    "XdpMode",
]

#: Where the names are.
_MODULES = {
    "balancer": ("LoadBalancer", "Statistics"),
    "dataplane.events": ("Event",),
    "errors": ("ConfigError", "CrablbError", "KernelError"),
    "dataplane.handlers": ("Frames", "Match"),
    "model": (
        "Announce",
        "Backend",
        "Bypass",
        "Fallback",
        "Hashing",
        "Mode",
        "OnDead",
        "OptionForm",
        "Service",
        "State",
        "Vip",
        "XdpMode",
    ),
    "selection.loads": ("Backends", "Load"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    if name == "__version__":
        from crablb.version import VERSION

        return VERSION
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, "__version__"})
