"""crablb: a layer-4 load balancer that takes itself out of the way by connection redirection.

This is the library; what is not named here may change from one version to the next.
"""

from crablb.balancer import LoadBalancer, Statistics
from crablb.engine import Event
from crablb.errors import ConfigError, CrablbError, KernelError
from crablb.handler import Frames, Match
from crablb.model import (
    Announce,
    Backend,
    Bypass,
    Fallback,
    Mode,
    OnDead,
    OptionForm,
    Service,
    State,
    Vip,
    XdpMode,
)
from crablb.policy import Backends, Load

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
